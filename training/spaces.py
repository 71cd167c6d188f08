"""Any spaces become those that agents and the replay buffer take: observations and actions that are vectors."""

import textwrap
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

Spaces = tuple[gym.Space, gym.Space]  # of the observations and of the actions


def flatten_actions(env: gym.Env) -> gym.Env:
    """The environment with its Box of actions as a vector; it gets them in their own shape. Other spaces stay as they are.

    Raises:
        gymnasium.error.Error: if the actions are whole numbers or have infinite bounds.
    """
    space = env.action_space
    if not isinstance(space, Box):
        return env
    wrapper = "gymnasium.wrappers.TransformAction gives it another space"
    if not np.issubdtype(space.dtype, np.floating):
        raise gym.error.Error(f"its actions, {brief(space)}, are whole numbers, not a Box of floats: {wrapper}")
    if not space.is_bounded():
        raise gym.error.Error(f"its actions, {brief(space)}, have no finite bounds: {wrapper}")
    if len(space.shape) == 1:
        return env
    flat = Box(space.low.flatten(), space.high.flatten(), dtype=space.dtype)
    return gym.wrappers.TransformAction(env, lambda action: action.reshape(space.shape), flat)


def flatten_observations(env: gym.Env) -> gym.Env:
    """The environment with observations that are float32 vectors, whatever they were.

    Raises:
        gymnasium.error.Error: if they are images, or nothing that can be a vector.
    """
    space = env.observation_space
    if has_image(space):
        raise gym.error.Error(f"its observations, {brief(space)}, hold images, and the networks here take vectors")
    if not space.is_np_flattenable:
        raise gym.error.Error(f"its observations, {brief(space)}, cannot be flattened to a vector")
    if not (isinstance(space, Box) and len(space.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")  # that is what is wanted
        return gym.wrappers.DtypeObservation(env, np.float32)  # float64 would double the replay buffer


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
    """A space in one line of some length."""
    return textwrap.shorten(str(space), 160, placeholder=" ...")
