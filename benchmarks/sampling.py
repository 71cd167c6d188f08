"""Microseconds to have a batch of Hopper-v4 on the device: where should the replay buffer live?

    python benchmarks/sampling.py --cuda

Compared, in alternation and after a full buffer of 1,000,000 transitions: stable-baselines3's buffer (five gathers, five
copies), the script's (one gather, one copy from pinned memory) and one that lives on the device (the indices are copied and
the rows gathered there). Each figure is a median until the device is done.
"""

import statistics
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3.common import buffers

sys.path.insert(0, str(Path(__file__).parent.parent))
from steadyrl import replay_buffer


def main(cuda: bool = False, transitions: int = 1_000_000, batch_size: int = 256, repeats: int = 2000) -> None:
    """Measure all three and print them."""
    device = torch.device("cuda" if cuda else "cpu")
    spaces = gym.spaces.Box(-1, 1, (11,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
    theirs = buffers.ReplayBuffer(transitions, *spaces, device, handle_timeout_termination=False)
    ours = replay_buffer.ReplayBuffer(transitions, *spaces, device)
    ours.transitions[:] = np.random.default_rng(0).random(ours.transitions.shape, np.float32)
    for name in ("observations", "actions", "next_observations", "dones", "rewards"):
        getattr(theirs, name)[:] = getattr(ours, name)
    theirs.full = ours.full = True
    on_device = torch.from_numpy(ours.transitions[:, 0]).to(device)

    def sample_on_device() -> torch.Tensor:
        indices = torch.from_numpy(np.random.randint(0, transitions, size=batch_size))
        if cuda:
            indices = indices.pin_memory().to(device, non_blocking=True)
        return on_device.index_select(0, indices)

    ways = {
        "stable-baselines3's buffer": lambda: theirs.sample(batch_size),
        "the script's buffer": lambda: ours.sample(batch_size),
        "a buffer on the device": sample_on_device,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, sample in ways.items():
            begin = time.perf_counter()
            sample()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values[repeats // 10 :]) * 1e6:.0f} microseconds")


if __name__ == "__main__":
    tyro.cli(main)
