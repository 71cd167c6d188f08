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

    Args:
        n_steps: rewards that a sample sums up. Above 1, samples also hold `discounts`, the factor of the value that follows.
        gamma: the discount factor of these sums.
        args, kwargs: stable-baselines3's.
    """

    def __init__(self, *args, n_steps: int = 1, gamma: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_steps, self.gamma = n_steps, gamma
        self.widths = [*self.obs_shape, self.action_dim, *self.obs_shape, 1, 1]
        self.transitions = np.zeros((self.buffer_size, self.n_envs, sum(self.widths)), np.float32)
        parts = np.split(self.transitions, np.cumsum(self.widths)[:-1], axis=2)
        self.observations, self.actions, self.next_observations, self.dones, self.rewards = parts
        self.dones, self.rewards = self.dones[..., 0], self.rewards[..., 0]
        self.batch = torch.empty(0, 0)

    def example_batch(self, batch_size: int) -> ReplayBufferSamples:
        """A sample of zeros; on a CUDA device, in the memory that all samples of this size will use."""
        widths = [*self.widths, 1] if self.n_steps > 1 else self.widths
        self.batch = torch.zeros(batch_size, sum(widths), device=self.device)
        return ReplayBufferSamples(*self.batch.split(widths, dim=1))

    def _get_samples(self, batch_inds: np.ndarray, env: None = None) -> ReplayBufferSamples:
        env_inds = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        rows, widths = self.transitions.reshape(-1, sum(self.widths)), self.widths
        batch = np.take(rows, batch_inds * self.n_envs + env_inds, axis=0)
        if self.n_steps > 1:
            batch, widths = np.hstack([batch, self.add_steps(batch, batch_inds, env_inds)]), [*widths, 1]
        batch = torch.from_numpy(batch)
        if self.device.type == "cuda":
            if len(self.batch) != len(batch):
                self.example_batch(len(batch))
            batch = self.batch.copy_(batch.pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
        return ReplayBufferSamples(*batch.split(widths, dim=1))

    def add_steps(self, batch: np.ndarray, batch_inds: np.ndarray, env_inds: np.ndarray) -> np.ndarray:
        """Lengthen each transition of a batch, in place, by the n - 1 that followed it (Sutton and Barto, 2018, equation 7.1).

        Rewards become r_t + gamma r_t+1 + ...; next observations and dones become those of the last of these steps. The next
        row follows if it starts where this one ended, bit for bit. So a sum ends at a termination, at the end of an episode
        that was cut off, and at the newest row. (In a task whose observations repeat it can go on into another episode, from
        what is to the agent the same state.)

        Returns:
            (B, 1) discounts: gamma to the power of the number of steps that each sum has.
        """
        rows, edges = self.transitions.reshape(-1, sum(self.widths)), np.cumsum(self.widths)[:-1]
        _, _, next_obs, dones, rewards = np.split(batch, edges, axis=1)
        discounts, follows = np.full_like(rewards, self.gamma), np.ones(len(batch), bool)
        for _ in range(self.n_steps - 1):
            batch_inds = (batch_inds + 1) % self.buffer_size
            following = np.split(np.take(rows, batch_inds * self.n_envs + env_inds, axis=0), edges, axis=1)
            follows &= (dones[:, 0] == 0) & (batch_inds < self.size()) & (following[0] == next_obs).all(axis=1)
            rewards[follows] += (discounts * following[4])[follows]
            next_obs[follows], dones[follows] = following[2][follows], following[3][follows]
            discounts[follows] *= self.gamma
        return discounts

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
