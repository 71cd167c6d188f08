"""Hindsight experience replay: transitions also get goals that their episodes reached later.

Andrychowicz et al., 2017, "Hindsight Experience Replay", arXiv:1707.01495.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from steadyrl.episodes import ReplayableEnv, play, random_actions
from steadyrl.errors import EnvError, TrainingError, UsageError
from steadyrl.replay_buffer import ReplayBuffer, Sampling
from steadyrl.spaces import brief

GOALS_PER_TRANSITION = 4  # k in section 4.5: four of five samples have another goal
RUNNING = -1


class Goals:
    """An environment's goals: where they are in its flat observations, and what its own methods return for them.

    Args:
        space: of its observations, before they were flattened.
        ask: as `ReplayableEnv.compute`.

    Attributes:
        one_by_one: the methods that do not take (N, ...) goals.
        terminates: whether a method returns the terminations for goals.

    Raises:
        UsageError: if its goals cannot be used.
    """

    def __init__(self, space: gym.Space, ask: Callable[..., np.ndarray]):
        parts = space.spaces if isinstance(space, gym.spaces.Dict) else {}
        if not {"observation", "achieved_goal", "desired_goal"} <= set(parts):
            must = "must be a Dict with observation, achieved_goal and desired_goal"
            raise UsageError(f"its observations are {brief(space)}, {must}")
        self.space, self.ask = parts["desired_goal"], ask
        self.one_by_one: set[str] = set()
        self.terminates = False
        known = isinstance(self.space, gym.spaces.Box | gym.spaces.MultiBinary)
        if not known or self.space.shape != parts["achieved_goal"].shape:
            raise UsageError(f"its goals are {brief(self.space)}, must be a Box or MultiBinary of the shape of achieved_goal")
        ends = np.cumsum([gym.spaces.flatdim(part) for part in parts.values()]).tolist()
        places = dict(zip(parts, map(slice, [0, *ends], ends), strict=False))
        self.achieved, self.desired = places["achieved_goal"], places["desired_goal"]

    def compute(self, name: str, achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
        """What a method returns for (N, G) achieved and desired goals: (N,) float32.

        Raises:
            EnvError: if it fails, or does not give one finite number for each.
        """
        pair = [goals.reshape(-1, *(self.space.shape or ())).astype(self.space.dtype) for goals in (achieved, desired)]
        answer = self.ask(name, *pair, name in self.one_by_one)
        if name == "compute_terminated" and answer.shape == ():
            answer = np.full(len(achieved), answer)  # some never terminate, and say so once
        if answer.shape != (len(achieved),):
            raise EnvError(f"its {name} gives the shape {answer.shape} for {len(achieved)} goals, must give a number for each")
        if not (finite := np.isfinite(answer)).all():
            raise EnvError(f"its {name} gives {answer[~finite][0]}, must be finite")
        return answer


def find_goals(env: ReplayableEnv) -> Goals:
    """Play a short episode to find out whether rewards can be computed for other goals.

    Raises:
        UsageError: if the environment has no goals, or if its methods return other values than its steps.
        EnvError: if it fails.
    """
    goals = Goals(env.given_spaces[0], env.compute)
    if not env.has_wrapper_attr("compute_reward"):
        raise UsageError("it has no method compute_reward")
    goals.terminates = env.has_wrapper_attr("compute_terminated")
    env.reset(seed=0)
    steps: list[tuple] = []
    for action in random_actions(env, 0):
        steps.append(env.step(action))
        if any(steps[-1][2:4]):
            break
    obs = np.stack([step[0] for step in steps])
    achieved, desired = obs[:, goals.achieved], obs[:, goals.desired]
    # The goals of these steps, goals that are reached, and goals that are not.
    pairs = np.concatenate([achieved] * 3), np.concatenate([desired, achieved, achieved[::-1]])
    for name, place in (("compute_reward", 1), ("compute_terminated", 2))[: 1 + goals.terminates]:
        told = np.array([step[place] for step in steps], np.float32)
        try:
            batch = goals.compute(name, *pairs)
        except EnvError:  # whatever it does with an array of goals
            batch = np.empty(0)
        try:
            goals.one_by_one.add(name)
            single = goals.compute(name, *pairs)
        except EnvError as error:
            raise UsageError(f"its {name} fails for single goals ({error})") from error
        if not (same := np.isclose(single[: len(told)], told, rtol=1e-3, atol=1e-4)).all():  # a goal was rounded to float32
            step = int(np.argmin(same))
            raise UsageError(
                f"its {name} gives {single[step]} where its step gave {told[step]}, must be the same for goals in float32"
            )
        if batch.shape == single.shape and np.allclose(batch, single, rtol=1e-4, atol=1e-5):
            goals.one_by_one.remove(name)
        # Training asks an environment in the middle of its episode.
        start, actions = {"seed": 0}, random_actions(env, 0)
        alone = [play(env, start, actions) for _ in range(2)]
        asked = play(env, start, actions, meanwhile=partial(goals.compute, name, *pairs))
        if alone[0] == alone[1] != asked:
            raise UsageError(f"its {name} changes the episode that runs, must only compute")
    return goals


class HindsightSampling(Sampling):
    """Draws four of five transitions with another goal: one that their episode achieved at the same step or later. All these
    steps are equally likely (the strategy "future").

    Rewards for that goal, and terminations where the environment tells them, are computed by the environment's own methods.
    An episode that is running is known up to its newest step.

    Args:
        goals: of the environments.
        reward_scale: the factor of stored rewards.
    """

    def __init__(self, goals: Goals, reward_scale: float = 1.0):
        self.goals, self.reward_scale = goals, reward_scale

    def begin(self, rb: ReplayBuffer) -> None:
        super().begin(rb)
        self.ends = np.full((rb.buffer_size, rb.n_envs), RUNNING)  # the row of the last step of each transition's episode
        self.lengths = np.zeros(rb.n_envs, int)  # of the running episodes

    def stored(self, ended: np.ndarray) -> None:
        self.ends[self.rb.pos - 1] = RUNNING
        self.lengths += 1
        self.ended(ended)

    def ended(self, environments: np.ndarray) -> None:
        newest = (self.rb.pos - 1) % self.rb.buffer_size
        for env in np.flatnonzero(environments):
            rows = (newest - np.arange(min(self.lengths[env], self.rb.buffer_size))) % self.rb.buffer_size
            self.ends[rows, env], self.lengths[env] = newest, 0

    def change(self, batch: np.ndarray, rows: np.ndarray, envs: np.ndarray) -> None:
        """Give four of five transitions another goal, with the rewards and terminations for it."""
        rb, size = self.rb, self.rb.buffer_size
        chosen = np.flatnonzero(rb.random.random_sample(len(batch)) < GOALS_PER_TRANSITION / (GOALS_PER_TRANSITION + 1))
        if not len(chosen):
            return
        share, rows, envs = rb.random.random_sample(len(chosen)), rows[chosen], envs[chosen]
        ends = np.where(self.ends[rows, envs] == RUNNING, (rb.pos - 1) % size, self.ends[rows, envs])
        steps = (share * ((ends - rows) % size + 1)).astype(int)  # to the one whose goal is taken
        goals = rb.next_observations[(rows + steps) % size, envs][:, self.goals.achieved]
        obs, _, next_obs, dones, rewards = np.split(batch, np.cumsum(rb.widths)[:-1], axis=1)
        obs[chosen, self.goals.desired] = next_obs[chosen, self.goals.desired] = goals
        achieved = next_obs[chosen, self.goals.achieved]
        try:
            rewards[chosen, 0] = self.goals.compute("compute_reward", achieved, goals) * self.reward_scale
            if self.goals.terminates:
                dones[chosen, 0] = self.goals.compute("compute_terminated", achieved, goals)
        except EnvError as error:  # there can be no checkpoint: this is in the middle of a step
            raise TrainingError(f"--replay hindsight: rewards could not be computed ({error})") from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find out where the episodes in the buffer ended."""
        rb, size = self.rb, self.rb.size()
        rows = (np.arange(size) + (rb.pos if rb.full else 0)) % rb.buffer_size  # from the oldest on
        ended = (rb.dones[rows] > 0) | rb.timeouts[rows]
        self.ends[:], self.lengths[:] = RUNNING, size
        for env in range(rb.n_envs):
            last = np.flatnonzero(ended[:, env])
            following = np.searchsorted(last, np.arange(size))  # for each row, the first end that is not before it
            known = following < len(last)
            self.ends[rows[known], env] = rows[last[following[known]]]
            if len(last):
                self.lengths[env] = size - 1 - last[-1]
