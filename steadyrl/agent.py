"""The contract between an algorithm and a run. The modules of this package know an agent only through this class."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch

from steadyrl.arguments import RunArgs
from steadyrl.normalization import Normalizer
from steadyrl.spaces import legal

Losses = dict[str, torch.Tensor]  # detached, by name, on the device: scalars, and td_errors (B,) for prioritised replay
AnyAgent = TypeVar("AnyAgent", bound="Agent")


class Agent(ABC):
    """Something that acts and learns. A subclass makes its parts in `__init__`, after calling this one.

    Args:
        observation_space: of one environment: a Box of float32 vectors.
        action_space: of one environment: a Box of vectors, or Discrete.
        args: the hyperparameters.
        device: where the networks live and learn.

    Attributes:
        networks: by name, what a saved model consists of: everything that `update` changes, except the optimisers' states.
        optimizers: by name. To be compiled, each must be an AdamW with one group of parameters.
        observation_normalizer: with --normalize-observations, normalises observations before the networks see them.
    """

    networks: dict[str, torch.nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: RunArgs, device: torch.device):
        self.observation_space, self.action_space = observation_space, action_space
        self.args, self.device = args, device
        self.observation_normalizer: Normalizer | None = None
        if getattr(args, "normalize_observations", False):  # not every script has this flag
            self.observation_normalizer = Normalizer(gym.spaces.flatdim(observation_space))

    @property
    def saved_modules(self) -> dict[str, torch.nn.Module]:
        """By name, what is saved and loaded: the networks and, if there is one, the normaliser."""
        return self.networks | ({"normalizer": self.observation_normalizer} if self.observation_normalizer else {})

    @abstractmethod
    def policy(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(N, O) observations, and further tensors if the agent draws its actions, to N actions, without gradients.

        It decides greedily if it gets observations alone. This is the part of `act` that is compiled or captured.
        """

    @abstractmethod
    def value(self, obs: np.ndarray) -> np.ndarray:
        """The agent's value of the greedy action: (N, O) observations to (N,) values, (1,) for (O,). q_bias needs it."""

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> Losses:
        """One learning step on a batch of the replay buffer; returns detached values by name, still on the device.

        They are scalars, except "td_errors": (B,), one for each transition, which prioritised replay needs.

        It is mathematics only: no random numbers, no NumPy, no value read back from the device, no state outside `networks`
        and `optimizers`. Random numbers are drawn before and passed in. Its arguments are batches, tensors, bools and None.
        If one of them is `update_policy`, an update without it leaves the policy as it is.
        """

    def state_value(self, obs: np.ndarray) -> np.ndarray:
        """The critic's value of each state, (N, O) to (N,). It differs from `value` if it includes more than rewards."""
        return self.value(obs)

    def act(self, obs: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """Actions; the greedy ones if only observations are given.

        Args:
            obs: (N, O) observations, or (O,) for a single one, of any real dtype.
            others: what else the policy takes, with N rows.

        Returns:
            (N, A) float32 actions inside the bounds of a Box, (N,) indices of a Discrete space; without N for a single one.

        Raises:
            ValueError: if the observations have another shape.
        """
        single = np.shape(obs) == self.observation_space.shape
        actions = self.compute(self.checked(obs), *map(np.ascontiguousarray, others))
        if isinstance(self.action_space, gym.spaces.Box):
            actions = legal(actions, self.action_space)
        return actions[0] if single else actions

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        """`policy` from arrays to arrays."""
        return self.policy(*(torch.as_tensor(array, device=self.device) for array in arrays)).cpu().numpy()

    def checked(self, obs: np.ndarray) -> np.ndarray:
        """(N, O) observations, or (O,) for one, as networks see them: (N, O) float32. Raises a ValueError for other shapes."""
        (size,) = self.observation_space.shape or (1,)
        array = np.require(obs, np.float32, ["C", "W"])  # of what is not writable, PyTorch would warn
        array = array[None] if array.shape == (size,) else array
        if array.ndim != 2 or array.shape[1] != size:
            raise ValueError(f"observations have the shape {np.shape(obs)}, must be (N, {size}) or ({size},)")
        return self.observation_normalizer.normalize(array) if self.observation_normalizer else array

    def tensor(self, obs: np.ndarray) -> torch.Tensor:
        """(N, O) observations, or (O,) for one, on the device, as the networks see them: (N, O)."""
        return torch.as_tensor(self.checked(obs), device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """The states of the model and of the optimisers."""
        networks = {name: network.state_dict() for name, network in self.saved_modules.items()}
        return {"networks": networks, "optimizers": {name: part.state_dict() for name, part in self.optimizers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, but keep this agent's own learning rates. The state is copied.

        Tensors that exist are filled, not replaced, because compiled and captured functions refer to them.
        """
        for name, network in self.saved_modules.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            own, saved = optimizer.state_dict(), state["optimizers"][name]["state"]
            if own["state"].keys() >= saved.keys():
                fill(own["state"], saved)
            else:  # the saved groups hold that run's learning rate and device options
                optimizer.load_state_dict({"state": copy.deepcopy(saved), "param_groups": own["param_groups"]})
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a captured `act` reads on a stream of its own

    def check_parts(self) -> None:
        """Raise a TypeError for a part that no checkpoint would hold: one without a name, or a trained tensor of no network."""
        saved = {
            id(tensor) for network in self.saved_modules.values() for tensor in network.state_dict(keep_vars=True).values()
        }
        for name, attribute in vars(self).items():
            values = tuple(attribute.values()) if isinstance(attribute, dict) else attribute
            for part in values if isinstance(values, list | tuple) else [values]:
                tensors = part.state_dict(keep_vars=True).values() if isinstance(part, torch.nn.Module) else ()
                forgotten = isinstance(part, torch.optim.Optimizer) and part not in self.optimizers.values()
                if forgotten or not saved.issuperset(map(id, tensors)):
                    where = "optimizers" if forgotten else "networks"
                    raise TypeError(f"{type(self).__name__}.{name} is not among its `{where}`: no checkpoint would hold it")
        for name, optimizer in self.optimizers.items():
            if not saved.issuperset(id(tensor) for group in optimizer.param_groups for tensor in group["params"]):
                raise TypeError(f"the optimizer {name} trains a tensor that is not in a network: no checkpoint would hold it")


@torch.no_grad()
def fill(tensors: dict[Any, Any], values: dict[Any, Any]) -> None:
    """Copy nested values into nested tensors. Without values (an optimiser before its first step) the tensors become zero."""
    for name, tensor in tensors.items():
        if isinstance(tensor, dict):
            fill(tensor, values[name] if values else {})
        elif isinstance(tensor, torch.Tensor):
            tensor.copy_(values[name] if values else torch.zeros_like(tensor))


@contextmanager
def training_mode(network: torch.nn.Module, needed: bool = True) -> Iterator[None]:
    """Inside, batch normalisation uses the statistics of its batch and updates the running ones. Outside, it uses the latter.

    Args:
        needed: whether the network has such layers; the others ignore the mode, and setting it takes time.
    """
    if needed:
        network.train()
    try:
        yield
    finally:
        if needed:
            network.eval()
