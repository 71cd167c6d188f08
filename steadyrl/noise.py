"""The random numbers of a run, and the exploration noise that is made of them. Nothing here uses a global generator."""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

THETA, DT = 0.15, 0.01  # of the Ornstein-Uhlenbeck process: Lillicrap et al., 2016, section 7; time step of stable-baselines3


class RandomNumbers(np.random.RandomState):
    """The run's own generator: whatever an environment does to the global ones, these draws stay the same."""

    def state_dict(self) -> dict[str, Any]:
        """Where the generator is, in tensors and plain values."""
        state: dict[str, Any] = self.get_state(legacy=False)
        key = torch.from_numpy(state["state"]["key"].astype(np.int64))
        return state | {"state": state["state"] | {"key": key}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.set_state(state | {"state": state["state"] | {"key": state["state"]["key"].numpy().astype(np.uint32)}})


def standard_normal(random: np.random.RandomState, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal draws of the host: compiled and captured functions then hold no random state."""
    drawn = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn  # as a batch comes there


class ExplorationNoise:
    """Noise for each environment and action dimension, in units of half the range of that dimension.

    Args:
        process: gaussian: independent at each step; ou: an Ornstein-Uhlenbeck process that restarts with each episode.
        action_space: of all environments, (N, A).
        random: where it draws from.
        start: its standard deviation (with ou: sigma, the size of what each step adds).
        end: the value to which that falls linearly (None: it stays the same).
        steps: environment steps until the end is reached.

    Attributes:
        scale: start, end, or what lies between, at the latest draw.
    """

    def __init__(
        self,
        process: Literal["gaussian", "ou"],
        action_space: gym.spaces.Box,
        random: np.random.RandomState,
        start: float,
        end: float | None = None,
        steps: float = 1,
    ):
        self.process, self.random = process, random
        self.start, self.end, self.steps = start, start if end is None else end, steps
        dtype = np.result_type(action_space.dtype, np.float32)  # a difference may be too large for float16
        self.half_range = (action_space.high.astype(dtype) - action_space.low.astype(dtype)) / 2
        self.values = np.zeros(action_space.shape)  # of the Ornstein-Uhlenbeck process
        self.scale = start

    def __call__(self, global_step: int, starting: np.ndarray) -> np.ndarray:
        """Draw (N, A) noise; where an episode is `starting`, (N,) bool, its process starts at 0."""
        drawn = self.random.standard_normal(self.values.shape)
        if self.process == "ou":
            self.values[starting] = 0
            drawn = self.values = self.values + THETA * -self.values * DT + np.sqrt(DT) * drawn
        self.scale = self.start + min(1.0, global_step / self.steps) * (self.end - self.start)
        return self.scale * self.half_range * drawn.astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The current value of each Ornstein-Uhlenbeck process."""
        return {"values": torch.from_numpy(self.values.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.values = state["values"].numpy().copy()
