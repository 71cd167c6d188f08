"""Convert any spaces to those that agents and the replay buffer take: vectors of observations and actions."""

import math
import textwrap
import warnings
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box

LARGEST = float(np.finfo(np.float32).max)
Spaces = tuple[gym.Space, gym.Space]  # of the observations and of the actions


class LegalActions(gym.ActionWrapper[Any, Any, Any]):
    """The environment with its Box of actions as a vector. Bounds that float32 cannot hold are rounded inward.

    The environment gets a copy of each action, in its own shape and dtype. So it may change this copy.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.space = space = env.action_space
        assert isinstance(space, Box)
        low, high = (bound.flatten().astype(np.float32) for bound in (space.low, space.high))
        low = np.where(low < space.low.flatten(), np.nextafter(low, np.float32(np.inf)), low)
        high = np.where(high > space.high.flatten(), np.nextafter(high, np.float32(-np.inf)), high)
        with np.errstate(over="ignore"):
            held = (low <= high).all() and np.isfinite(high - low).all()
        if not held:
            raise gym.error.Error(f"its actions, {brief(space)}, have bounds that float32 cannot hold")
        dtype = np.float64 if np.dtype(space.dtype).itemsize > 8 else space.dtype  # torch has no long double
        self.action_space = Box(low.astype(dtype), high.astype(dtype), dtype=dtype)

    def action(self, action: np.ndarray) -> np.ndarray:
        """As the environment takes it."""
        return np.array(action, self.space.dtype).reshape(self.space.shape)


def legal(actions: np.ndarray, space: Box) -> np.ndarray:
    """The nearest actions that an environment takes exactly, as float32.

    Args:
        actions: (N, A) of any float dtype.
        space: as `flatten_actions` makes it, of one environment or of N.
    """
    clipped = np.minimum(np.maximum(actions, space.low), space.high)
    return clipped.astype(space.dtype, copy=False).astype(np.float32, copy=False)


def flatten_actions(env: gym.Env) -> gym.Env:
    """The environment with its Box of actions as `LegalActions` makes it. Discrete actions get the dtype of their space.

    Raises:
        gymnasium.error.Error: if the actions are whole numbers, or have bounds that are infinite or that float32 cannot hold.
    """
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return gym.wrappers.TransformAction(env, np.dtype(space.dtype).type, space)
    if not isinstance(space, Box):
        return env
    wrapper = "convert them with gymnasium.wrappers.TransformAction"
    if not np.issubdtype(space.dtype, np.floating):
        raise gym.error.Error(f"its actions, {brief(space)}, are whole numbers, not a Box of floats: {wrapper}")
    if not space.is_bounded():
        raise gym.error.Error(f"its actions, {brief(space)}, have no finite bounds: {wrapper}")
    return LegalActions(env)


def flatten_observations(env: gym.Env) -> gym.Env:
    """The environment with observations that are float32 vectors, whatever they were. (float64 would double the replay buffer.)

    Raises:
        gymnasium.error.Error: if they are images, or cannot become a vector.
    """
    space = env.observation_space
    if has_image(space):
        raise gym.error.Error(f"its observations, {brief(space)}, contain images, but the networks here take vectors")
    if not space.is_np_flattenable:
        raise gym.error.Error(f"its observations, {brief(space)}, cannot be flattened to a vector")
    if not (isinstance(space, Box) and len(space.shape) == 1):
        # Gymnasium's FlattenObservation would cast values to the dtypes of the spaces, and 473.5 to 473.
        flatten = partial(gym.spaces.flatten, with_floats(space))
        env = gym.wrappers.TransformObservation(CheckedObservation(env), flatten, gym.spaces.flatten_space(space))
    flat = env.observation_space
    assert isinstance(flat, Box)
    with np.errstate(over="ignore"), warnings.catch_warnings():  # a bound beyond float32 becomes infinite
        warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")
        bounds = flat.low.astype(np.float32), flat.high.astype(np.float32)
        return gym.wrappers.TransformObservation(env, to_float32, Box(*bounds, dtype=np.float32))


def with_floats(space: gym.Space) -> gym.Space:
    """A space with a Box of float64 in the place of each Box in it."""
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({name: with_floats(part) for name, part in space.items()}, sort_keys=False)
    if isinstance(space, gym.spaces.Tuple):
        return gym.spaces.Tuple(map(with_floats, space))
    return Box(-np.inf, np.inf, space.shape, np.float64) if isinstance(space, Box) else space


def to_float32(values: Any) -> np.ndarray:
    """Values as float32. Raises a Misfit if they are not numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "biufO":
        raise Misfit("observation", f"is {array}, must be numbers")
    try:
        with np.errstate(all="ignore"):  # the environment may have asked for errors
            return array.astype(np.float32, copy=False)
    except (TypeError, ValueError, OverflowError):  # objects
        raise Misfit("observation", f"is {brief(array)}, must be numbers") from None


class Misfit(ValueError):
    """A value from an environment that does not fit: the name of its field, and what is wrong with it."""

    def __init__(self, field: str, what: str):
        super().__init__(field, what)
        self.field, self.what = field, what


def observation_of(value: Any, shape: tuple[int, ...], finite: bool) -> np.ndarray:
    """A copy of an observation from an environment, which may change its own array later.

    Args:
        finite: refuse values that are not finite.

    Raises:
        Misfit: if it has another shape, or such a value.
    """
    if np.shape(value) != shape:
        raise Misfit("observation", f"has the shape {np.shape(value)}, must be {shape}")
    observation = np.array(value, np.float32)
    if finite and not np.isfinite(observation).all():
        raise Misfit("observation", f"is not finite: {observation}")
    return observation


def reward_of(value: Any, finite: bool) -> float:
    """A reward from an environment; a Misfit if it is not a single number, or not finite as float32."""
    if not isinstance(value, float):
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "biufO":
            raise Misfit("reward", f"is {value!r} of the shape {array.shape}, must be a single number")
        try:
            value = float(array.item())
        except (TypeError, ValueError, OverflowError):  # an object: None, or 10**400
            raise Misfit("reward", f"is {brief(value)}, must be a single number") from None
    if finite and not abs(value) <= LARGEST:
        raise Misfit("reward", f"is not finite: {value}")
    return value


def success_of(info: Any) -> dict[str, float]:
    """The success of an episode, from the info of its last step; empty if the environment does not report it."""
    try:
        if "is_success" not in info:  # asked for it, a defaultdict would invent one
            return {}
        value = info["is_success"]
        success = float(value.item() if isinstance(value, torch.Tensor) else np.asarray(value).item())
    except Exception:  # of an info of any type
        return {}
    return {"is_success": success} if math.isfinite(success) else {}


def flag_of(name: str, value: Any) -> bool:
    """One of the two flags of a step; a Misfit if it is not true or false."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    array = np.asarray(value)
    if array.size != 1 or array.item() not in (0, 1):
        raise Misfit(name, f"is {value!r}, must be true or false")
    return bool(array.item())


class CheckedObservation(gym.ObservationWrapper[Any, Any, Any]):
    """The environment with a check that structured observations have the shapes of their space: flattening has no check."""

    def observation(self, observation: Any) -> Any:
        check_shapes(self.observation_space, observation)
        return observation


def check_shapes(space: gym.Space, value: Any) -> None:
    """Raise a Misfit if a value, or a part of it, has another shape than its space, or is no member of it."""
    if isinstance(space, gym.spaces.Dict):
        for name, part in space.spaces.items():
            check_shapes(part, value[name])
    elif isinstance(space, gym.spaces.Tuple):
        for part, one in zip(space.spaces, value, strict=True):
            check_shapes(part, one)
    elif isinstance(space, Box):
        if np.shape(value) != space.shape:
            raise Misfit("observation", f"has a part of the shape {np.shape(value)}, must be {space.shape}")
    elif not space.contains(value):
        raise Misfit("observation", f"has a part {value!r}, must be in {brief(space)}")


def has_image(space: gym.Space) -> bool:
    """Whether a space is one of images, or a Dict or Tuple with one in it."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return any(map(has_image, space.values() if isinstance(space, gym.spaces.Dict) else space))
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3


def changes(given: Spaces, taken: Spaces) -> list[str]:
    """What was done to an environment's spaces, in words."""
    words = []
    for name, before, after in zip(("observations", "actions"), given, taken, strict=True):
        if isinstance(after, Box) and before.shape != after.shape:
            words.append(f"its {name}, {brief(before)}, are flattened to {after.shape[0]} numbers")
        elif name == "observations" and not np.issubdtype(before.dtype, np.floating):
            words.append(f"its {name}, {brief(before)}, are taken as float32")
    return words


def brief(space: Any) -> str:
    """A space in one short line."""
    return textwrap.shorten(str(space), 160, placeholder=" ...")
