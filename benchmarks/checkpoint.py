"""Time a checkpoint of a full Hopper-v4 replay buffer: python benchmarks/checkpoint.py [--folder FOLDER ON THE DISK TO TIME]

Prints the seconds of five saves and of one load, and the bytes on the disk.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpg_continuous_action as ddpg  # noqa: E402
from steadyrl.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from steadyrl.environments import make_env  # noqa: E402
from steadyrl.replay_buffer import ReplayBuffer  # noqa: E402


def main(folder: Path = ROOT / "runs", transitions: int = 1_000_000) -> None:
    """Fill a buffer with random numbers, which no disk can compress, and save it five times."""
    args = ddpg.Args(buffer_size=transitions, cuda=False)
    env: Any = make_env(args)  # its spaces are Boxes
    agent = ddpg.DDPG(env.observation_space, env.action_space, args, torch.device("cpu"))
    rb = ReplayBuffer(transitions, env.observation_space, env.action_space, "cpu")
    rng = np.random.default_rng(0)
    rb.transitions[:] = rng.random(rb.transitions.shape, np.float32)
    rb.full = True
    with tempfile.TemporaryDirectory(dir=folder) as place:
        seconds = []
        for step in range(1, 6):
            begin = time.perf_counter()
            state = {"agent": agent.state_dict(), "replay_buffer": rb.state_dict()}
            save_checkpoint(Path(place), step, state, keep=2)
            seconds.append(time.perf_counter() - begin)
        size = max(path.stat().st_size for path in Path(place).iterdir())
        begin = time.perf_counter()
        rb.load_state_dict((load_checkpoint(Path(place)) or {})["replay_buffer"])
        load = time.perf_counter() - begin
    print(
        f"save: median {statistics.median(seconds):.2f} s, from {min(seconds):.2f} to {max(seconds):.2f} s, {size / 1e6:.0f} MB"
    )
    print(f"load: {load:.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
