"""Microseconds that the border to an environment costs in each step: copies, checks, legal actions, what is set again.

    python benchmarks/border.py

An environment that does nothing is stepped, once by itself, as gymnasium.make gives it, and once as a run steps it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpg_continuous_action as ddpg  # noqa: E402
from steadyrl.device import Defaults  # noqa: E402
from steadyrl.environments import make_envs, make_replayable_env  # noqa: E402
from steadyrl.signals import Signals  # noqa: E402


class Nothing(gym.Env):
    """Hopper-v4's spaces, and no work."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    observation = np.zeros(11)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation, {}

    def step(self, action):
        return self.observation, 0.0, False, False, {}


gym.register("Nothing-v0", lambda **kwargs: Nothing(**kwargs))


def microseconds(call: Callable[[], object], calls: int = 10_000, rounds: int = 7) -> float:
    """The median over some rounds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Print a row for each layer."""
    args, action = ddpg.Args(env_id="Nothing-v0", episode_replay="plain"), np.zeros(3, np.float32)
    plain, border, envs = gym.make("Nothing-v0"), make_replayable_env(args), make_envs(args, "none")
    for env in (plain, border, envs):
        env.reset(seed=0)
    defaults = Defaults()
    with Signals() as signals:

        def set_again() -> None:
            signals.hold()
            defaults.hold()

        rows = {
            "gymnasium.make alone": microseconds(lambda: plain.step(action)),
            "behind the border": microseconds(lambda: border.step(action)),
            "as a run steps it (a vector of one)": microseconds(lambda: envs.step(action[None])),
            "what is set again: signals, defaults of torch and NumPy": microseconds(set_again),
        }
    print("| | microseconds a step |\n|---|---|")
    for name, taken in rows.items():
        print(f"| {name} | {taken:.1f} |")


if __name__ == "__main__":
    main()
