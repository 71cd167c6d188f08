"""Checkpoints: one file each, written completely or not at all, and read without running code.

A checkpoint is `checkpoints/<global_step>.<SHA-256 of the file>.pt`: its name tells whether its content is undamaged.
The content is a dict of tensors and plain values. Its "format" is the version number of its layout.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from steadyrl.arguments import is_text
from steadyrl.errors import UsageError
from steadyrl.files import new_file, sha256, sync_folder
from steadyrl.output import say
from steadyrl.run_folder import list_checkpoints, step_of

FORMAT = 2


class Stateful(Protocol):
    """What a checkpoint can hold: torch's protocol of the same name, with only tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has the very bytes that were written."""
    return checkpoint.exists() and checkpoint.name.split(".")[1] == sha256(checkpoint)


def save_checkpoint(folder: Path, global_step: int, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then remove older ones so that `keep` remain, and an earlier one of the same step.

    The file is written under another name, flushed to the disk and then renamed. A crash at any moment leaves the old
    checkpoints undamaged. Only this one may be missing.

    Raises:
        OSError: if it cannot be written; a part that was written is removed.
    """
    folder.mkdir(exist_ok=True)  # not the run's folder: if that is gone, it must not come back without its arguments
    sync_folder(folder.parent)
    with new_file(folder / f"{global_step:012d}.pt", partial(torch.save, state | {"format": FORMAT})) as unfinished:
        place = folder / f"{global_step:012d}.{sha256(unfinished)}.pt"
        unfinished.rename(place)
        sync_folder(folder)
    others = [path for path in list_checkpoints(folder) if step_of(path) <= global_step and path != place]
    same_step = [path for path in others if step_of(path) == global_step and is_whole(path)]  # damaged ones are kept
    for path in same_step:
        path.unlink(missing_ok=True)
    whole = 1  # a damaged one does not count
    for path in (path for path in others if step_of(path) < global_step):  # the newest first
        if whole < keep:
            with contextlib.suppress(OSError):  # nor does one that cannot be read
                whole += is_whole(path)
        else:
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint in a folder, None if there is none at all. Damaged ones are named, skipped and kept.

    The tensors are mapped from the file: a replay buffer's second copy might not fit into memory. `weights_only` keeps a
    forged file from running code.

    Raises:
        UsageError: if there are checkpoints and each is damaged, or of the older format; or if PyTorch cannot read them there.
    """
    if not is_text(folder):
        raise UsageError(f"--resume {folder.parent}: must be a path in UTF-8, because PyTorch needs that")
    try:
        checkpoints = list_checkpoints(folder)
    except OSError as error:
        raise UsageError(f"--resume {folder.parent}: its checkpoints cannot be read ({error.strerror})") from error
    for path in checkpoints:
        try:
            if not is_whole(path):
                raise ValueError("its content does not match its name")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            newer = state.get("format", 1) > FORMAT
            if not newer:
                state = dict(state if "format" in state else from_format_1(state))
        except Exception as error:  # damaged and forged files raise errors of many types
            say(f"checkpoint {path} is damaged and skipped ({' '.join(str(error).split())[:100]})")
            continue
        if newer:
            raise UsageError(f"--resume {folder.parent}: its checkpoints are from a newer version: resume it with that version")
        return state
    if checkpoints:
        raise UsageError(f"--resume {folder.parent}: must hold an undamaged checkpoint, but all of them are damaged")
    if any(folder.glob("[0-9]*/state.pt")):
        raise UsageError(
            f"--resume {folder.parent}: its checkpoints are folders, from an older version: resume it with that version"
        )
    return None


def from_format_1(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of version 0.2, converted to the format of this one.

    Its NumPy global generator becomes the run's own. It does not store where episodes were cut off. The observations show it:
    the next row starts with another observation.
    """
    parts = {name: state[name] for name in ("run", "agent", "environments", "replay_buffer")}
    name, key, pos, has_gauss, gauss = state["generators"]["numpy"]
    random = {"bit_generator": name, "state": {"key": key, "pos": pos}, "has_gauss": has_gauss, "gauss": gauss}
    transitions, observations = state["replay_buffer"]["transitions"], state["environments"]["observations"]
    size = observations.shape[1]
    following = transitions[..., :size].roll(-1, dims=0)
    if len(following):
        following[(state["replay_buffer"]["pos"] - 1) % len(following)] = observations  # of the newest row
    cut = (following != transitions[..., -size - 2 : -2]).any(dim=-1) & (transitions[..., -2] == 0)
    replay_buffer = state["replay_buffer"] | {"timeouts": cut}
    return parts | {"replay_buffer": replay_buffer, "random": random, "others": {"noise": state.get("noise")}}
