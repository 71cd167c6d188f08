"""The record of a run, args.json: all that its result depends on. It is written at each start, and read when a run is used."""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium as gym
import torch
from gymnasium.envs.registration import find_highest_version, parse_env_id

from steadyrl.arguments import RESUME_MAY_CHANGE, A, RunArgs, as_typed, check_each, script_name
from steadyrl.errors import UsageError
from steadyrl.family import is_harmless, removed
from steadyrl.files import sha256, write_new
from steadyrl.output import say
from steadyrl.run_folder import ours

# What the scripts need, by the names of the distributions.
DEPENDENCIES = (
    *("torch", "gymnasium[mujoco]", "mujoco", "numpy", "tyro", "tensorboard", "stable-baselines3", "tqdm", "psutil"),
    *("filelock", "moviepy"),
)


def pins() -> list[str]:
    """The installed version of each of them, as a requirements.txt has it. (+cpu and the like are builds, not versions.)"""
    return [f"{name}=={version(name.partition('[')[0]).partition('+')[0]}" for name in DEPENDENCIES]


@cache  # importlib.metadata reads files anew each time
def versions(env_id: str) -> dict[str, str]:
    """The versions that a result depends on: of packages, and of the environment, which was made before.

    An environment that is not from a package is identified by the hash of the file that defines it.
    """
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
    found = {"python": platform.python_version()} | {name: version(name) for name in packages}
    name = env_id.rpartition(":")[2]
    if name not in gym.registry:  # an id without its version: gymnasium.make takes the highest
        name += f"-v{find_highest_version(*parse_env_id(name)[:2])}"
    entry = gym.spec(name).entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    if owners := packages_distributions().get(module.partition(".")[0]):
        return found | {name: version(name) for name in owners}
    file = getattr(sys.modules.get(module), "__file__", None)
    with contextlib.suppress(OSError):  # it may lie in a zip file
        return found | ({Path(file).name: f"SHA-256 {sha256(Path(file))[:16]}"} if file else {})
    return found


def git(folder: Path, *words: str) -> str | None:
    """The output of git for a folder; None where there is no git, or no repository."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def code_of(script: Path) -> dict[str, Any]:
    """The code of a run: git's commit, whether files differ from it, and hashes."""
    commit, changed = git(script.parent, "rev-parse", "HEAD"), git(script.parent, "status", "--porcelain", "-uno")
    package = hash_of(sorted(Path(__file__).parent.glob("*.py")))
    return {"commit": commit, "clean": commit and changed == "", "script": hash_of([script]), "package": package}


def hash_of(files: Iterable[Path]) -> str:
    """A short hash of the contents of files."""
    hashes = [sha256(file) for file in files]
    return (hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest())[:16]


@cache
def processor() -> str:
    """The model of the processor, and the vector instructions that PyTorch uses on it. Rounding depends on both."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return f"{model[1] if model else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def record_of(args: RunArgs, device: torch.device) -> dict[str, Any]:
    """What a run depends on, in plain values: its script, arguments, versions, code, processor, device and threads."""
    values = dataclasses.asdict(dataclasses.replace(args, resume=None, evaluate=None))
    return {
        "script": script_name(type(args)),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in values.items()},
        "versions": versions(args.env_id),
        "code": code_of(Path(inspect.getfile(type(args))).resolve()),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_threads": torch.get_num_threads(),
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two records that may change a result, in one line; empty if there are none."""
    old, new = ({**record, **record["versions"], **record.get("code", {})} for record in (before, now))
    names = [*new["versions"], *(name for name in old["versions"] if name not in new["versions"])]
    names += ["script", "package"] if "code" in old else []  # the name of the script is the same
    names += ["processor", "device", "accelerate", "num_threads"]
    differing = [name for name in names if name in old | new and old.get(name, "none") != new.get(name, "none")]
    if "code" not in old:
        differing = [name for name in differing if name != "processor"]  # version 0.2 did not record it
    return ", ".join(f"{name} was {old.get(name, 'none')} and is now {new.get(name, 'none')}" for name in differing)


def keep_script(folder: Path, args_class: type) -> None:
    """Keep a copy of the script in a run's folder: a new one where it has changed since the last one."""
    script = Path(inspect.getfile(args_class))
    copies = ours(folder, re.compile(rf"{re.escape(script.stem)}(-\d+)?\.py"))
    if sha256(script) not in map(sha256, copies):
        write_new(folder / script.name, lambda file: file.write(script.read_bytes()))


def load_record(run_dir: Path) -> dict[str, Any]:
    """What args.json of a run holds.

    Raises:
        UsageError: if the folder is not a run's.
    """
    try:
        record = json.loads((run_dir / "args.json").read_text())
        return record | {"args": dict(record["args"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{run_dir}: must be the folder of a run, with a readable args.json ({error!r:.200})") from None


def load_args(run_dir: Path, args_class: type[A], env_id: str | None = None) -> A:
    """The arguments a run was started with.

    Args:
        env_id: an environment that the user named. If it is the saved one, its module may be inside the folder.

    Raises:
        UsageError: if the folder is not a run's, or is one of another script. Also if it has a flag that the script no longer
            has, or a value that is not allowed. Also if it names a module that is inside the folder.
    """
    record, script = load_record(run_dir), script_name(args_class)
    if record.get("script", script) != script:
        raise UsageError(f"{run_dir}: is a run of {record['script']}.py, must be a run of {script}.py")
    try:
        args = as_args(args_class, record["args"], announce=True)
    except UsageError as error:
        raise UsageError(f"{run_dir}: {error}") from None
    if args.env_id != env_id:
        name_module(run_dir, args.env_id)
    return args


def as_args(args_class: type[A], saved: dict[str, Any], announce: bool = False) -> A:
    """Saved arguments for the present script: each has the type of its flag, and removed flags without effect are left out.

    Args:
        announce: name each flag that the script does not know. It is left out.

    Raises:
        UsageError: for a removed flag that had an effect, and for a value that is not allowed.
    """
    script, hints = script_name(args_class), get_type_hints(args_class, include_extras=True)
    values = {}
    for name, value in saved.items():
        if is_harmless(script, name, value):
            continue
        flag = f"--{name.replace('_', '-')}"
        if gone := removed(script, name, value):
            raise UsageError(f"was trained with {flag} {value}: {gone.went}")
        if name not in hints:
            if announce:
                say(f"this version of {script}.py has no {flag}; it was {value}")
            continue
        try:
            values[name] = as_typed(hints[name], value)
        except TypeError as error:
            raise UsageError(f"{flag} {json.dumps(value)[:200]}: {error}") from None
    make: Callable[..., A] = args_class
    check_each(args := make(**values))
    return args


def refuse_changes(args: A, checkpoint: dict[str, Any], folder: str) -> tuple[A, int]:
    """Refuse a checkpoint that does not belong to these arguments: args.json was edited, or the checkpoint is from another run.

    Args:
        checkpoint: the state of the run in it.
        folder: as the user named it.

    Returns:
        the arguments and the step that are in the checkpoint.

    Raises:
        UsageError: naming the flag, its value and the checkpoint's; or the step, if the training would end before it.
    """
    try:
        saved, step = as_args(type(args), dict(checkpoint["settings"]["args"])), int(checkpoint["global_step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--resume {folder}: its checkpoint is not from a run ({error!r:.100})") from None
    for name in vars(args):
        if name not in RESUME_MAY_CHANGE | {"evaluate"} and getattr(args, name) != getattr(saved, name):
            raise UsageError(
                f"--resume {folder}: its args.json has --{name.replace('_', '-')} {getattr(args, name)}, must be "
                f"{getattr(saved, name)}, as its checkpoint has it"
            )
    if args.total_timesteps < step and args.total_timesteps != saved.total_timesteps:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps}: must be at least {step}, the step that {folder} has reached"
        )
    return saved, step


def say_if_exploration_rises(args: RunArgs, saved: RunArgs, step: int) -> None:
    """Print a message if more --total-timesteps than before put the exploration back to an earlier point of its fall."""
    falls = getattr(args, "exploration_noise_end", None) is not None or getattr(args, "start_e", 0) != getattr(args, "end_e", 0)
    if falls and args.total_timesteps > saved.total_timesteps:
        fraction = args.exploration_fraction  # type: ignore[attr-defined]  # of a script that has one of the flags above
        if step < fraction * args.total_timesteps:
            say(
                f"--exploration-fraction {fraction} is a share of {args.total_timesteps:,} steps now, not of "
                f"{saved.total_timesteps:,}: the run explores as it did at an earlier step"
            )


def name_module(run_dir: Path, env_id: str) -> None:
    """Name the module that a saved environment's id will import. Refuse one that is inside the run's folder: a user who
    evaluates a folder from elsewhere does not expect to run its code. Nothing is imported here.

    Raises:
        UsageError: if it is inside.
    """
    module = env_id.rpartition(":")[0]
    if not module or module in sys.modules:
        return
    where: Any = None
    places: list[str] = []
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        specs = (finder.find_spec(name, where) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return  # gymnasium will say so
        where = spec.submodule_search_locations
        places += [spec.origin] if spec.origin and spec.has_location else list(where or ())
    if inside := [place for place in places if Path(place).resolve().is_relative_to(run_dir.resolve())]:
        raise UsageError(
            f"{run_dir}: its environment {env_id} would run {inside[-1]}, which is inside it; --env-id {env_id} allows that"
        )
    say(f"{env_id}: this environment comes from {places[-1] if places else module}")
