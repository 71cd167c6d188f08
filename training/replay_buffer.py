"""stable-baselines3's replay buffer, faster to sample from; and whether it fits into memory."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from stable_baselines3.common import buffers
from stable_baselines3.common.type_aliases import ReplayBufferSamples


class ReplayBuffer(buffers.ReplayBuffer):
    """stable-baselines3's replay buffer with the parts of a transition side by side: a batch is one gather and one copy.

    `transitions` is (buffer_size // n_envs, n_envs, 2 O + A + 2) float32; `observations`, `actions`, `next_observations`,
    `dones` and `rewards` are views of it. Samples hold `dones` as they were stored: the caller stores terminations alone.
    On a CUDA device each sample overwrites the one before if it has the same size: captured graphs always read their input
    from the same memory.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.widths = [*self.obs_shape, self.action_dim, *self.obs_shape, 1, 1]
        self.transitions = np.zeros((self.buffer_size, self.n_envs, sum(self.widths)), np.float32)
        parts = np.split(self.transitions, np.cumsum(self.widths)[:-1], axis=2)
        self.observations, self.actions, self.next_observations, self.dones, self.rewards = parts
        self.dones, self.rewards = self.dones[..., 0], self.rewards[..., 0]
        self.batch = torch.empty(0, 0)

    def example_batch(self, batch_size: int) -> ReplayBufferSamples:
        """A sample of zeros; on a CUDA device, in the memory that all samples of this size will use."""
        self.batch = torch.zeros(batch_size, sum(self.widths), device=self.device)
        return ReplayBufferSamples(*self.batch.split(self.widths, dim=1))

    def _get_samples(self, batch_inds: np.ndarray, env: None = None) -> ReplayBufferSamples:
        env_inds = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        rows = self.transitions.reshape(-1, sum(self.widths))
        batch = torch.from_numpy(np.take(rows, batch_inds * self.n_envs + env_inds, axis=0))
        if self.device.type == "cuda":
            if len(self.batch) != len(batch):
                self.example_batch(len(batch))
            batch = self.batch.copy_(batch.pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
        return ReplayBufferSamples(*batch.split(self.widths, dim=1))

    def state_dict(self) -> dict[str, Any]:
        """The transitions filled so far (not copied), and where the next one goes."""
        return {"transitions": torch.from_numpy(self.transitions[: self.size()]), "pos": self.pos, "full": self.full}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.transitions[: len(state["transitions"])] = state["transitions"].numpy()
        self.pos, self.full = state["pos"], state["full"]


def standard_normal(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal draws, from NumPy's generator: compiled and captured functions then hold no random state."""
    return torch.as_tensor(np.random.standard_normal(shape).astype(np.float32), device=device)


def buffer_bytes(observation_size: int, action_size: int, buffer_size: int) -> int:
    """Bytes of a replay buffer: two observations, an action, a reward and a termination a transition, float32 each."""
    return buffer_size * 4 * (2 * observation_size + action_size + 2)


def available_memory(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process may still use: those free on the machine or, if fewer, in its container."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError):  # not Linux
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, limit, usage = cgroups, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # a limit holds for all groups below it
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                    left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                    available = min(available, left)
    return available
