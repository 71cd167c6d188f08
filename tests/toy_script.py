"""Stands in for a training script where the tuner is tested: its runs take no time, and their returns are known.

The return of a run is highest at --x 0.7 --y right. It has four evaluations, each of that return. With --hold it waits, after
the second one, until there is a file `go` (or a SIGTERM); with --fail it fails.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import filelock
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steadyrl.arguments import Checkpoints, Count, Environment, Evaluating, Experiment


@dataclass
class Toy:
    """What there is to tune."""

    x: float = 0.0
    y: Literal["left", "right"] = "left"
    hold: bool = False
    fail: bool = False
    total_timesteps: Count = 40
    batch_size: Count = 1
    buffer_size: Count = 1


@dataclass
class Args(Experiment, Toy, Environment, Evaluating, Checkpoints):
    """A script of the family, as far as the tuner sees."""

    exp_name: str = Path(__file__).stem
    env_id: str = "Pendulum-v1"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    args = tyro.cli(Args)  # not parse_args of the family, which imports torch
    folder = args.resume or Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}")
    if args.resume:
        args = Args(**json.loads((folder / "args.json").read_text())["args"])
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"), open("started", "a") as started:
        write(folder / "args.json", json.dumps({"args": asdict(args) | {"resume": None}}))
        print(folder.name.rpartition("__")[0], os.getpid(), file=started, flush=True)
        if args.fail:
            sys.exit("error: it failed")
        value = -((args.x - 0.7) ** 2) - (args.y == "left") + 0.001 * (args.seed % 2)
        stops: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
        table = "global_step,mean\n"
        for step in range(10, args.total_timesteps + 1, 10):
            table += f"{step},{value}\n"
            write(folder / "evaluations.csv", table)
            (folder / "checkpoints" / f"{step:012d}.{'0' * 64}.pt").touch()
            while step == 20 and args.hold and not (stops or Path("go").exists()):
                time.sleep(0.01)
            if stops:
                sys.exit(143)
        write(folder / "evaluation.json", json.dumps({"mean": value, "global_step": args.total_timesteps, "date": ""}))


if __name__ == "__main__":
    main()
