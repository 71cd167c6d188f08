"""Microseconds to have a batch of Hopper-v4 on the device: where should the replay buffer live, and what do priorities cost?

    python benchmarks/sampling.py --cuda

Compared, in alternation and after a full buffer of 1,000,000 transitions: stable-baselines3's buffer (five gathers, five
copies), the script's (one gather, one copy from pinned memory), the same with prioritised replay (the priorities of the batch
before are written, and that of a new transition), one that lives on the device (the indices are copied and the rows gathered
there); and an update of DDPG, compiled or captured, without and with the TD errors that priorities need. Each figure is a
median until the device is done.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3.common import buffers

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpg_continuous_action as ddpg
from steadyrl.acceleration import accelerate
from steadyrl.prioritized_replay import PrioritizedSampling
from steadyrl.replay_buffer import ReplayBuffer


def main(cuda: bool = False, transitions: int = 1_000_000, batch_size: int = 256, repeats: int = 2000) -> None:
    """Measure all of them and print them."""
    device = torch.device("cuda" if cuda else "cpu")
    spaces = gym.spaces.Box(-1, 1, (11,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
    theirs = buffers.ReplayBuffer(transitions, *spaces, device, handle_timeout_termination=False)
    ours = ReplayBuffer(transitions, *spaces, device)
    ours.transitions[:] = np.random.default_rng(0).random(ours.transitions.shape, np.float32)
    for name in ("observations", "actions", "next_observations", "dones", "rewards"):
        getattr(theirs, name)[:] = getattr(ours, name)
    theirs.full = ours.full = True
    by_priority = ReplayBuffer(transitions, *spaces, device, sampling=PrioritizedSampling())
    by_priority.load_state_dict(ours.state_dict() | {"priorities": torch.ones(transitions), "highest_priority": 1.0})
    by_priority.sample(batch_size)
    td_errors = torch.randn(batch_size, device=device) * 3

    def sample_by_priority() -> None:
        by_priority.sampling.prioritize(td_errors)
        by_priority.sampling.stored(np.zeros(1))
        by_priority.sample(batch_size)

    def updates(replay: str) -> Callable[[], object]:
        args = ddpg.Args(cuda=cuda, replay=replay)  # type: ignore[arg-type]
        agent = accelerate(ddpg.DDPG(*spaces, args, device), "cudagraph" if cuda else "compile")
        batch = ours.sample(batch_size)
        numbers = itertools.count(1)
        return lambda: agent.update(batch, update_policy=next(numbers) % 2 == 0)

    on_device = torch.from_numpy(ours.transitions[:, 0]).to(device)

    def sample_on_device() -> torch.Tensor:
        indices = torch.from_numpy(np.random.randint(0, transitions, size=batch_size))
        if cuda:
            indices = indices.pin_memory().to(device, non_blocking=True)
        return on_device.index_select(0, indices)

    ways = {
        "stable-baselines3's buffer": lambda: theirs.sample(batch_size),
        "the script's buffer": lambda: ours.sample(batch_size),
        "the script's buffer, prioritised": sample_by_priority,
        "a buffer on the device": sample_on_device,
        "an update": updates("uniform"),
        "an update with TD errors": updates("prioritized"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, sample in ways.items():
            begin = time.perf_counter()
            sample()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values[repeats // 10 :]) * 1e6 for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.0f} microseconds")
    more = medians["the script's buffer, prioritised"] - medians["the script's buffer"]
    print(f"priorities cost {more / medians['an update']:.2f} of an update")


if __name__ == "__main__":
    tyro.cli(main)
