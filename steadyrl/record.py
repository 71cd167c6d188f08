"""The record of a run, args.json: what made it, written at its start and read back by whoever takes the run up."""

import dataclasses
import json
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from steadyrl.arguments import A, RunArgs, script_name
from steadyrl.errors import UsageError
from steadyrl.family import is_harmless, removed

# What the scripts need, by the names of the distributions.
DEPENDENCIES = (
    *("torch", "gymnasium[mujoco]", "mujoco", "numpy", "tyro", "tensorboard", "stable-baselines3", "tqdm", "psutil"),
    *("filelock", "moviepy"),
)


def pins() -> list[str]:
    """The installed version of each of them, as a requirements.txt has it. (+cpu and the like are builds, not versions.)"""
    return [f"{name}=={version(name.partition('[')[0]).partition('+')[0]}" for name in DEPENDENCIES]


@cache  # importlib.metadata reads files anew each time
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def record_of(args: RunArgs, device: torch.device) -> dict[str, Any]:
    """What a run depends on, in plain values: its script, its arguments, the versions, the device and the threads."""
    return {
        "script": script_name(type(args)),
        "args": dataclasses.asdict(dataclasses.replace(args, resume=None, evaluate=None)),
        "versions": versions(),
        "device": str(device),
        "num_threads": torch.get_num_threads(),
    }


def load_record(run_dir: Path) -> dict[str, Any]:
    """What args.json of a run holds.

    Raises:
        UsageError: if the folder is not a run's.
    """
    try:
        record = json.loads((run_dir / "args.json").read_text())
        return record | {"args": dict(record["args"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run_dir}: must be the folder of a run, with a readable args.json ({error!r})") from None


def load_args(run_dir: Path, args_class: type[A]) -> A:
    """The arguments a run was started with.

    Raises:
        UsageError: if the folder is not a run's, is one of another script, or has a flag that the script no longer has.
    """
    record, script = load_record(run_dir), script_name(args_class)
    if record.get("script", script) != script:
        raise UsageError(f"{run_dir}: is a run of {record['script']}.py, must be one of {script}.py")
    try:
        values = current_args(script, args_class, record["args"])
    except UsageError as error:
        raise UsageError(f"{run_dir}: {error}") from None
    make: Callable[..., A] = args_class
    return make(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def current_args(script: str, args_class: type, saved: dict[str, Any]) -> dict[str, Any]:
    """Saved arguments as today's script has them: without flags that changed nothing and are gone.

    Raises:
        UsageError: for one that changed something. A flag that this project never had is named and left out.
    """
    names, values = {field.name for field in dataclasses.fields(args_class)}, {}
    for name, value in saved.items():
        if is_harmless(script, name, value):
            continue
        if gone := removed(script, name, value):
            raise UsageError(f"was trained with --{name.replace('_', '-')} {value}: {gone.went}")
        if name in names:
            values[name] = value
        else:
            print(f"this version of {script}.py has no --{name.replace('_', '-')}; it was {value}")
    return values
