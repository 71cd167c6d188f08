"""Checkpoints: one file each, written whole or not at all, and read without running code.

A checkpoint is `checkpoints/<global_step>.<SHA-256 of the file>.pt`: its own name says whether it is as it was written.
Nothing here knows what is inside: a dict of tensors and plain values.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.errors import UsageError
from training.files import sync_folder, write_file


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(checkpoint.name.split(".")[0])


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is as it was written, to the byte."""
    return checkpoint.name.split(".")[1] == sha256(checkpoint)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the newest first."""
    return sorted(folder.glob("[0-9]*.*.pt"), key=step_of, reverse=True)


def save_checkpoint(folder: Path, global_step: int, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then remove those that it makes superfluous: more than `keep`, or another of this step.

    The file is written beside its place, brought to the disk and renamed: a crash at any moment leaves the old
    checkpoints whole, and at most this one missing.

    Raises:
        OSError: if it cannot be written; what was written of it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{global_step:012d}.tmp"
    try:
        write_file(unfinished, partial(torch.save, state))
        place = folder / f"{global_step:012d}.{sha256(unfinished)}.pt"
        unfinished.rename(place)
        sync_folder(folder)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    others = [path for path in list_checkpoints(folder) if step_of(path) <= global_step and path != place]
    same_step = [path for path in others if step_of(path) == global_step and is_whole(path)]  # a damaged one is kept
    older = [path for path in others if step_of(path) < global_step]  # a newer one can only be damaged
    for path in same_step + older[keep - 1 :]:
        path.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint in a folder; None if there is none at all. Damaged ones are named, passed over and kept.

    The tensors are mapped from the file: a replay buffer's second copy might not fit into memory. `weights_only` keeps a
    forged file from running code.

    Raises:
        UsageError: if there are checkpoints and each is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            if not is_whole(path):
                raise ValueError("it is not as it was written")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # forged files fail in as many ways as there are
            print(f"checkpoint {path} is damaged and passed over ({' '.join(str(error).split())[:100]})")
    if checkpoints:
        raise UsageError(f"--resume {folder.parent}: must hold a whole checkpoint, and all of them are damaged")
    return None
