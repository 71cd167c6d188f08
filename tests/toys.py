"""Environments with a known answer. A script started by a test reaches them as --env-id toys:NAME."""

import contextlib
import copy
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

RECEIVED: list[tuple[int, np.ndarray]] = []  # (id of the environment, action) of every step in this process


class Toy(gym.Env):
    """Base: a flat Box of observations and of actions, and frames that need no display."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012  as gymnasium declares it
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.action_space = copy.deepcopy(self.action_space)  # with a generator of its own, as real environments have

    def render(self) -> np.ndarray:
        return np.zeros((16, 16, 3), np.uint8)


class Counter(Toy):
    """Counts steps without ever repeating an observation: each successor is its observation plus 1.

    Episode k starts at 100 k and pays 1 a step. `ends` gives the length of its episodes in turn and how they end.
    """

    def __init__(self, ends=((5, "truncated"),), render_mode=None):
        super().__init__(render_mode)
        self.ends, self.episode = ends, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        self.obs = np.array([100.0 * self.episode])
        return self.obs, {}

    def step(self, action):
        RECEIVED.append((id(self), np.array(action)))
        self.obs += 1  # in place: whoever keeps a reference sees it change
        self.steps += 1
        length, how = self.ends[self.episode % len(self.ends)]
        over = self.steps >= length
        return self.obs, 1.0, over and how in ("terminated", "both"), over and how in ("truncated", "both"), {}


class TimeLimited(Toy):
    """Pays 1 a step, never terminates and is cut off after 5: with gamma 0.5 every value is 2."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps / 5], np.float32), 1.0, False, self.steps == 5, {}


class Identity(Toy):
    """One step: the best action is the observation."""

    observation_space = gym.spaces.Box(-0.8, 0.8, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-0.8, 0.8, 1).astype(np.float32)
        return self.target, {}

    def step(self, action):
        return self.target, -float((action[0] - self.target[0]) ** 2), True, False, {}


class Bounds(Toy):
    """Another range in each dimension; the observation is always the same."""

    action_space = gym.spaces.Box(np.array([0, -3, 10], np.float32), np.array([2, 1, 10.5], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        RECEIVED.append((id(self), np.array(action)))
        return np.zeros(1), 0.0, False, False, {}


class PendulumLike(Toy):
    """Random dynamics that depend on the seed and on the actions; episodes of 7 to 16 steps by chance."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.left = self.np_random.normal(size=3), self.np_random.integers(7, 17)
        return self.state.copy(), {}

    def step(self, action):
        push = np.array([action[0], action[1], 0])
        self.state = 0.9 * self.state + 0.1 * push + 0.01 * self.np_random.normal(size=3)
        self.left -= 1
        over = bool(self.left == 0)
        return self.state.copy(), -float(self.state @ self.state), over and self.state[0] > 0, over, {}


class WidePendulum(PendulumLike):
    """Of the same shapes, with other bounds of the actions."""

    action_space = gym.spaces.Box(-7, 7, (2,), np.float32)


class NotFinite(Counter):
    """Turns `field` into `value` at its 150th step."""

    def __init__(self, field, value, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.field, self.value, self.total = field, value, 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total == 150:
            if self.field == "observation":
                obs = np.array([self.value])
            else:
                reward = self.value
        return obs, reward, terminated, truncated, info


class Failing(PendulumLike):
    """The environment of index 1 (of a run with seed 1) dies or hangs at its 50th step."""

    def __init__(self, how, render_mode=None):
        super().__init__(render_mode)
        self.how, self.total, self.index = how, 0, None

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.index = seed - 1
        return super().reset(seed=seed)

    def step(self, action):
        self.total += 1
        if self.index == 1 and self.total == 50:
            os._exit(3) if self.how == "die" else signal.pause()
        return super().step(action)


class CarriesState(PendulumLike):
    """As BipedalWalker: each episode begins as it should, and then depends on how many were before."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        return super().reset(seed=seed)

    def step(self, action):
        obs, *rest = super().step(action)
        self.state += 1e-3 * self.episodes * (self.left < 6)
        return obs, *rest


class NeedsItsEnd(PendulumLike):
    """It refuses a reset before its episode of `length` steps is over."""

    def __init__(self, length, render_mode=None):
        super().__init__(render_mode)
        self.length, self.left = length, 0

    def reset(self, *, seed=None, options=None):
        assert self.left == 0, "the episode is not over"
        obs, info = super().reset(seed=seed)
        self.left = self.length
        return obs, info


class DrawsElsewhere(PendulumLike):
    """Its generator is not the one of gymnasium.Env: rewards, or with `starts` also the starts, are what `draw` gives."""

    def __init__(self, draw, starts=False, render_mode=None):
        super().__init__(render_mode)
        self.draw, self.starts = draw(), starts

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs + self.starts * self.draw(), info

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.draw(), *rest


TICKS = itertools.count(int.from_bytes(os.urandom(3), "big"))  # a clock that never shows the same time, in any process


class LegacyGenerator(Toy):
    """As dm_control: `np_random` is a NumPy RandomState, and the constructor takes no `render_mode`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    np_random: Any = None

    def __init__(self):
        super().__init__()
        self.np_random = np.random.RandomState()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random.seed(seed)
        self.steps = 0
        return self.np_random.normal(size=2), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.normal(size=2), float(action[0]), False, self.steps == 9, {}


class Shaped(Toy):
    """Any spaces: observations are drawn from their space, actions must have the shape of theirs."""

    def __init__(self, observation_space=None, action_space=None, render_mode=None):
        super().__init__(render_mode)
        self.observation_space = copy.deepcopy(observation_space or Toy.observation_space)
        self.action_space = copy.deepcopy(action_space or Toy.action_space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action.shape == self.action_space.shape, action
        RECEIVED.append((id(self), np.array(action)))
        self.steps += 1
        return self.observation_space.sample(), 1.0, False, self.steps == 9, {}


class Raising(PendulumLike):
    """Raises in `where`; in "step" that is the 50th step of the environment of index 0 (of a run with seed 1)."""

    def __init__(self, where, render_mode=None):
        super().__init__(render_mode)
        self.where, self.total, self.first = where, 0, False
        if where == "constructor":
            raise RuntimeError("no licence\nwas found")

    def reset(self, *, seed=None, options=None):
        if self.where == "reset":
            raise KeyError("goal")
        self.first |= seed == 1
        return super().reset(seed=seed)

    def step(self, action):
        self.total += self.first
        if self.where == "first-step" or (self.total == 50 and self.where == "step"):
            raise ZeroDivisionError("no mass")
        return super().step(action)


class Gate(PendulumLike):
    """At its 250th step it writes a file at_the_gate_SEED, and goes on when there is a file named go."""

    total, seed = 0, None

    def reset(self, *, seed=None, options=None):
        self.seed = seed if seed is not None else self.seed
        return super().reset(seed=seed)

    def step(self, action):
        self.total += 1
        if self.total == 250:
            Path(f"at_the_gate_{self.seed}").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return super().step(action)


class Unfit(Toy):
    """Spaces that DDPG cannot take."""

    def __init__(self, observation_space=None, action_space=None, render_mode=None):
        super().__init__(render_mode)
        self.observation_space = observation_space or Toy.observation_space
        self.action_space = action_space or Toy.action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


class Goal(PendulumLike):
    """Its episodes succeed if their seed is even."""

    def reset(self, *, seed=None, options=None):
        self.succeeds = seed is not None and seed % 2 == 0
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"is_success": np.bool_(self.succeeds)}


class Reach(Toy):
    """A point in a square that is to be moved within 0.2 of a goal: -1 a step until then, 0 there, for 20 steps.

    Args:
        batches: whether `compute_reward` takes arrays of goals.
        terminates: whether an episode ends at the goal, as `compute_terminated` says of any goal (None: there is none).
        bonus: what a step's reward has beyond `compute_reward`.
        shape: of a goal.
    """

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, batches=True, terminates=None, bonus=0.0, shape=(2,), render_mode=None):
        super().__init__(render_mode)
        goal = gym.spaces.Box(-2, 2, shape, np.float64)
        self.observation_space = gym.spaces.Dict(achieved_goal=goal, desired_goal=goal, observation=gym.spaces.Box(-2, 2, (2,)))
        self.batches, self.bonus, self.shape = batches, bonus, shape
        self.terminates = terminates
        if terminates is not None:
            self.compute_terminated = lambda achieved, desired, info: terminates and self.is_reached(achieved, desired)

    def is_reached(self, achieved, desired):
        distance = np.asarray(achieved) - desired
        if not self.batches:
            return bool(np.linalg.norm(distance) < 0.2)  # of a whole array of goals, one number
        return np.linalg.norm(distance.reshape(*distance.shape[: distance.ndim - len(self.shape)], -1), axis=-1) < 0.2

    def compute_reward(self, achieved, desired, info):
        return np.float64(self.is_reached(achieved, desired)) - 1.0

    def observe(self):
        achieved = self.place.reshape(self.shape)
        return {"achieved_goal": achieved, "desired_goal": self.goal, "observation": self.place.astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place = 0, self.np_random.uniform(-1, 1, 2)
        self.goal = self.np_random.uniform(-1, 1, 2).reshape(self.shape)
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.place = np.clip(self.place + 0.2 * action, -2, 2)
        achieved = self.place.reshape(self.shape)
        reached = bool(self.is_reached(achieved, self.goal))
        over = bool(self.terminates and reached)
        return self.observe(), reached - 1.0 + self.bonus, over, self.steps == 20, {"is_success": reached}


class ReachTardy(Reach):
    """Takes a while to compute the rewards of many goals."""

    def compute_reward(self, achieved, desired, info):
        if np.ndim(achieved) == 2:
            time.sleep(0.3)
        return super().compute_reward(achieved, desired, info)


class ReachSets(Reach):
    """Switches gradients off while it computes rewards."""

    def compute_reward(self, achieved, desired, info):
        torch.set_grad_enabled(False)
        return super().compute_reward(achieved, desired, info)


class ReachCounts(Reach):
    """Counts the goals that are reached, also those that it is only asked for, and ends after three."""

    reached = 0

    def compute_reward(self, achieved, desired, info):
        self.reached += int(np.sum(self.is_reached(achieved, desired)))
        return super().compute_reward(achieved, desired, info)

    def reset(self, **kwargs):
        self.reached = 0
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.reached >= 3, truncated, info


class ReachStrict(Reach):
    """Refuses a reset before the end of an episode, which has 60 steps."""

    steps = 60

    def reset(self, **kwargs):
        if self.steps < 60:
            raise RuntimeError("the episode is not over")
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, self.steps == 60, info


class Units(Toy):
    """Two numbers with units four and three powers of ten from 1: the best action is the product of their signs.

    It can be learned from both alone. Without normalising, the large one hides the small one.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        self.values = self.np_random.normal(size=2)
        return self.values * (1e4, 1e-3) + (3e4, 0)

    def step(self, action):
        self.steps += 1
        reward = -float((action[0] - np.sign(self.values).prod()) ** 2)
        return self.observe(), reward, True, False, {}


class Signals(PendulumLike):
    """Asks for a checkpoint when it is made, long before there is anything to save."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        os.kill(os.getpid(), signal.SIGUSR1)


class ClosesOutput(PendulumLike):
    """Closes what it thinks is its own."""

    def reset(self, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        for number in (1, 2):
            with contextlib.suppress(OSError):
                os.close(number)
        return super().reset(**kwargs)


register: Any = gym.register  # its own type wants constructors that take any arguments
register("Counter-v0", Counter)
register("Mixed-v0", Counter, kwargs={"ends": ((1, "terminated"), (3, "truncated"), (2, "both"), (1, "truncated"))})
register("TimeLimited-v0", TimeLimited)
register("Identity-v0", Identity)
register("Bounds-v0", Bounds, max_episode_steps=50)
register("Pendulum-like-v0", PendulumLike)
register("WidePendulum-v0", WidePendulum)
register("ClosesOutput-v0", ClosesOutput)
register("Goal-v0", Goal)
register("Reach-v0", Reach)
register("ReachEnding-v0", Reach, kwargs={"terminates": True})
register("ReachNever-v0", Reach, kwargs={"terminates": False})
register("ReachSlow-v0", Reach, kwargs={"batches": False, "terminates": True})
register("ReachMatrix-v0", Reach, kwargs={"shape": (2, 1)})
register("ReachTardy-v0", ReachTardy)
register("ReachSets-v0", ReachSets)
register("ReachCounts-v0", ReachCounts)
register("ReachStrict-v0", ReachStrict)
register("ReachBonus-v0", Reach, kwargs={"bonus": 0.5})
register("Units-v0", Units)
register("Signals-v0", Signals)
register("NaNObservation-v0", NotFinite, kwargs={"field": "observation", "value": np.nan})
register("HugeObservation-v0", NotFinite, kwargs={"field": "observation", "value": 1e300})  # infinite in float32
register("NaNReward-v0", NotFinite, kwargs={"field": "reward", "value": np.nan})
register("HugeReward-v0", NotFinite, kwargs={"field": "reward", "value": 1e30})  # its square is not finite
register("UnboundedActions-v0", Unfit, kwargs={"action_space": gym.spaces.Box(-np.inf, np.inf, (1,))})
register("ImageObservation-v0", Unfit, kwargs={"observation_space": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)})
register("IntegerActions-v0", Unfit, kwargs={"action_space": gym.spaces.Box(0, 5, (2,), np.int64)})
register("Lists-v0", Unfit, kwargs={"observation_space": gym.spaces.Sequence(gym.spaces.Discrete(3))})
register("CarriesState-v0", CarriesState)
register("NeedsItsEnd-v0", NeedsItsEnd, kwargs={"length": 60})
register("NeedsItsEndSoon-v0", NeedsItsEnd, kwargs={"length": 40})
DRAWS = {
    "RandomModule": lambda: random.random,
    "NumPysGenerator": lambda: np.random.random,
    "Clock": lambda: lambda: float(next(TICKS)),
    "OwnGenerator": lambda: np.random.default_rng().random,
    "OwnSeededGenerator": lambda: np.random.default_rng(0).random,
}
for name, draw in DRAWS.items():
    register(f"{name}-v0", DrawsElsewhere, kwargs={"draw": draw})
    register(f"{name}Start-v0", DrawsElsewhere, kwargs={"draw": draw, "starts": True})
register("LegacyGenerator-v0", LegacyGenerator)
SPACES: dict[str, dict[str, gym.Space]] = {
    "Dict": {"observation_space": gym.spaces.Dict(a=gym.spaces.Box(0, 1, (2,)), b=gym.spaces.Discrete(3))},
    "Tuple": {"observation_space": gym.spaces.Tuple((gym.spaces.Box(0, 1, (2, 2)), gym.spaces.Box(-5, 5, (1,), np.int64)))},
    "Matrix": {"observation_space": gym.spaces.Box(-1, 1, (2, 3))},
    "Integer": {"observation_space": gym.spaces.Box(0, 255, (4,), np.uint8)},
    "Discrete": {"observation_space": gym.spaces.Discrete(4)},
    "MatrixAction": {"action_space": gym.spaces.Box(*np.array([[[0, -3], [10, 5]], [[2, 1], [11, 6]]], np.float32))},
}
for name, spaces in SPACES.items():
    register(f"{name}Spaces-v0", Shaped, kwargs=spaces)
for where in ("constructor", "reset", "first-step", "step"):
    register(f"Raising-{where}-v0", Raising, kwargs={"where": where})
register("DictObservation-v0", Unfit, kwargs={"observation_space": gym.spaces.Dict(a=gym.spaces.Box(0, 1, (1,)))})
register("Gate-v0", Gate)
register("Dying-v0", Failing, kwargs={"how": "die"})
register("Hanging-v0", Failing, kwargs={"how": "hang"})
