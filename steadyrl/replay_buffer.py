"""stable-baselines3's replay buffer, faster to sample from; and whether it fits into memory."""

import contextlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch
from stable_baselines3.common import buffers
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from steadyrl.normalization import Normalizer


class ReplayBuffer(buffers.ReplayBuffer):
    """stable-baselines3's replay buffer with the parts of a transition in one row: a batch is one gather and one copy.

    `transitions` is (buffer_size // n_envs, n_envs, 2 O + A + 2) float32; `observations`, `actions`, `next_observations`,
    `dones` and `rewards` are views of it. `dones` are terminations alone; `timeouts` marks the other ends of episodes.
    On a CUDA device each sample overwrites the one before if it has the same size. So captured graphs always read their input
    from the same memory.

    Args:
        args, kwargs: stable-baselines3's.
        random: where samples are drawn from.
        n_steps: rewards that a sample sums up. Above 1, samples also hold `discounts`, the factor of the value that follows.
        gamma: the discount factor of these sums.
        normalizer: takes its statistics from each stored observation. It normalises samples, but not what is stored.
        sampling: how transitions are drawn (None: uniformly).
    """

    def __init__(
        self,
        *args: Any,
        random: np.random.RandomState | None = None,
        n_steps: int = 1,
        gamma: float = 1.0,
        normalizer: Normalizer | None = None,
        sampling: "Sampling | None" = None,
        **kwargs: Any,
    ):
        if kwargs.pop("optimize_memory_usage", False) or kwargs.pop("handle_timeout_termination", False):
            raise ValueError("optimize_memory_usage and handle_timeout_termination must be left out")
        super().__init__(*args, **kwargs | {"handle_timeout_termination": False})
        self.random, self.n_steps, self.gamma = random or np.random.RandomState(0), n_steps, gamma
        self.normalizer, self.sampling = normalizer, sampling or Sampling()
        assert isinstance(self.observation_space, gym.spaces.Box)
        self.widths = [*self.observation_space.shape, self.action_dim, *self.observation_space.shape, 1, 1]
        self.transitions = np.zeros((self.buffer_size, self.n_envs, sum(self.widths)), np.float32)
        parts = np.split(self.transitions, np.cumsum(self.widths)[:-1], axis=2)
        self.observations, self.actions, self.next_observations, dones, rewards = parts
        self.dones, self.rewards = dones[..., 0], rewards[..., 0]
        self.timeouts = np.zeros((self.buffer_size, self.n_envs), bool)
        self.batch = torch.empty(0, 0)
        self.sampling.begin(self)

    def add(  # type: ignore[override]  # stable-baselines3 takes a list of infos, and finds the truncations in it
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """Store a transition of each environment: (N, O), (N, O), (N, A) or (N,), (N,), (N,), (N,).

        `done` marks terminations. `truncated` marks episodes that were cut off: a sum of rewards ends there too, but its
        target bootstraps.
        """
        self.timeouts[self.pos] = truncated
        if self.normalizer:
            self.normalizer.observe(obs)
        super().add(obs, next_obs, action, reward, done, [])
        self.sampling.stored(np.logical_or(done, truncated))

    def cut_off(self, environments: np.ndarray) -> None:
        """Mark that in some environments, (N,) bool, the episode of the newest transition has ended."""
        self.timeouts[self.pos - 1] |= environments
        self.sampling.ended(environments)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """A batch: observations (B, O), actions (B, A), next observations (B, O), dones (B, 1), rewards (B, 1), and discounts,
        (B, 1) or None. Raises a ValueError if nothing is stored."""
        if self.size() == 0:
            raise ValueError("the replay buffer is empty")
        return self.gather(*self.sampling.draw(batch_size))

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        return self.gather(batch_inds, self.random.randint(0, high=self.n_envs, size=len(batch_inds)))

    def gather(self, batch_inds: np.ndarray, env_inds: np.ndarray) -> ReplayBufferSamples:
        """The batch of the transitions in these rows, (B,), of these environments, (B,)."""
        rows, widths = self.transitions.reshape(-1, sum(self.widths)), self.widths
        batch = np.take(rows, batch_inds * self.n_envs + env_inds, axis=0)
        self.sampling.change(batch, batch_inds, env_inds)
        if self.n_steps > 1:
            batch, widths = np.hstack([batch, self.add_steps(batch, batch_inds, env_inds)]), [*widths, 1]
        if self.normalizer:
            for start in (0, sum(widths[:2])):
                place = slice(start, start + widths[0])
                batch[:, place] = self.normalizer.normalize(batch[:, place])
        samples = torch.from_numpy(batch)
        if self.device.type == "cuda":
            if self.batch.shape != samples.shape:
                self.batch = torch.empty(*samples.shape, device=self.device)
            samples = self.batch.copy_(samples.pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
        return ReplayBufferSamples(*samples.split(widths, dim=1))

    def add_steps(self, batch: np.ndarray, batch_inds: np.ndarray, env_inds: np.ndarray) -> np.ndarray:
        """Lengthen each transition of a batch, in place, by the n - 1 that followed it (Sutton and Barto, 2018, equation 7.1).

        Rewards become r_t + gamma r_t+1 + ...; next observations and dones become those of the last of these steps. A sum
        ends where its episode ended, and at the newest row.

        Returns:
            (B, 1) discounts: gamma to the power of the number of steps that each sum has.
        """
        rows, edges = self.transitions.reshape(-1, sum(self.widths)), np.cumsum(self.widths)[:-1]
        _, _, next_obs, dones, rewards = np.split(batch, edges, axis=1)
        discounts, goes_on = np.full_like(rewards, self.gamma), np.ones(len(batch), bool)
        newest = (self.pos - 1) % self.buffer_size
        for _ in range(self.n_steps - 1):
            ended = (self.dones[batch_inds, env_inds] > 0) | self.timeouts[batch_inds, env_inds]
            goes_on &= ~ended & (batch_inds != newest)
            if not goes_on.any():
                break
            batch_inds = (batch_inds + 1) % self.buffer_size
            following = np.split(np.take(rows, batch_inds * self.n_envs + env_inds, axis=0), edges, axis=1)
            rewards[goes_on] += (discounts * following[4])[goes_on]
            next_obs[goes_on], dones[goes_on] = following[2][goes_on], following[3][goes_on]
            discounts[goes_on] *= self.gamma
        return discounts

    def state_dict(self) -> dict[str, Any]:
        """The transitions filled so far (not copied), which of them ended by a cut, and where the next one goes."""
        filled = {"transitions": self.transitions[: self.size()], "timeouts": self.timeouts[: self.size()]}
        state = {name: torch.from_numpy(part) for name, part in filled.items()} | {"pos": self.pos, "full": self.full}
        return state | self.sampling.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for name in ("transitions", "timeouts"):
            getattr(self, name)[: len(state[name])] = state[name].numpy()
        self.pos, self.full = state["pos"], state["full"]
        self.sampling.load_state_dict(state)


class Sampling:
    """How a replay buffer draws transitions: here, uniformly. A subclass overrides what it does in another way."""

    def begin(self, rb: ReplayBuffer) -> None:
        """Draw from this buffer."""
        self.rb = rb

    def stored(self, ended: np.ndarray) -> None:
        """A row was stored; (N,) bool: with it the episodes of these environments ended."""

    def ended(self, environments: np.ndarray) -> None:
        """The episodes of these environments, (N,) bool, turned out to have ended with the newest row."""

    def draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the environments, (B,) each, of a batch."""
        rows = self.rb.random.randint(0, self.rb.size(), size=batch_size)
        return rows, self.rb.random.randint(0, high=self.rb.n_envs, size=batch_size)

    def change(self, batch: np.ndarray, rows: np.ndarray, envs: np.ndarray) -> None:
        """Change, in place, the copies of the drawn transitions."""

    def prioritize(self, td_errors: torch.Tensor) -> None:
        """Take the (B,) TD errors of the latest batch."""

    def state_dict(self) -> dict[str, Any]:
        """What the buffer's own state does not hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from the buffer's `state_dict`, after the buffer itself."""


def buffer_bytes(observation_size: int, action_size: int, buffer_size: int) -> int:
    """Bytes of a replay buffer: two observations, an action, a reward and a termination, float32 each, and a timeout, bool."""
    return buffer_size * (4 * (2 * observation_size + action_size + 2) + 1)


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
