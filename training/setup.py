"""What is set up once, before the first step: torch, the random generators, the run's folder, Weights and Biases."""

import contextlib
import dataclasses
import inspect
import os
import platform
import random
import re
import shutil
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from training.arguments import Args
from training.errors import UsageError


@cache  # importlib.metadata reads files anew each time
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


class Generators:
    """The random generators of the process: Python's, NumPy's and torch's. stable-baselines3 draws from NumPy's."""

    def __init__(self, seed: int):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()
        numpy_state = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
        return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].clone())


def set_up_torch(args: Args) -> torch.device:
    """Set the process's threads, precision and determinism; returns the device, and says so if the CUDA device asked for
    does not exist."""
    torch.set_num_threads(args.num_threads or min(2, torch.get_num_threads()))
    torch.set_float32_matmul_precision(args.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for the next line
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and all memory is written before it is read
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found, using the CPU")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def script_name(args_class: type) -> str:
    """The name of the script that these arguments are of, without its ".py"."""
    return Path(inspect.getfile(args_class)).stem


def settings_of(args: Args, device: torch.device) -> dict[str, Any]:
    """What a run depends on, in plain values: its script, its arguments, the versions, the device and the threads."""
    values = dataclasses.asdict(dataclasses.replace(args, resume=None, evaluate=None))
    return {
        "script": script_name(type(args)),
        "args": values,
        "versions": versions(),
        "device": str(device),
        "num_threads": torch.get_num_threads(),
    }


def make_run_folder(args: Args) -> Path:
    """A new folder <output>/runs/<env_id>__<exp_name>__<seed>__<time>, shared with no other run of the same second.

    Raises:
        UsageError: if it cannot be made.
    """
    env_name = re.sub(r"[^\w.+-]", "-", args.env_id)  # ids may hold a "/" or a ":"
    stem = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    runs = Path(args.output, "runs")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for number in range(1_000_000):
            folder = runs / (f"{stem}-{number}" if number else stem)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UsageError(f"the run folder {runs / stem} cannot be made: {error.strerror}") from error


def start_again(folder: Path) -> None:
    """Move what a run without a checkpoint left, its models and evaluations, out of the way of a start at step 0."""
    left = [*folder.glob("*model.pt"), *folder.glob("evaluation*")]
    print(f"{folder} has no checkpoint: training starts again at step 0")
    if left:
        aside = next(path for n in range(1, 1_000_000) if not (path := folder / f"before-{n}").exists())
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
        print(f"what was there is kept in {aside}: {', '.join(sorted(path.name for path in left))}")


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Take the run's folder for this process: no other process can train the run while this one lives.

    Raises:
        UsageError: if another process has it.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"--resume {folder}: another process is training this run") from None
    return lock


def start_wandb(args: Args, folder: Path) -> None:
    """Start Weights and Biases, before our TensorBoard writer is made: it patches TensorBoard to receive what is logged there.

    Raises:
        UsageError: if it does not start; a new run's folder is removed.
    """
    import wandb

    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=args.output,
            config=dataclasses.asdict(args),
            sync_tensorboard=True,
            save_code=True,
        )
    except wandb.Error as error:
        if args.resume is None:
            shutil.rmtree(folder)
        raise UsageError(f"--track True: Weights and Biases did not start: {error}") from error
