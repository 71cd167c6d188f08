"""The border to an environment. Values that cross it are copied and checked. A resume restores running episodes.

Simulators cannot be pickled or completely copied, but most are deterministic. The state of the generator before a reset and
the actions since then lead to the same state, bit for bit. `find_replay` finds out whether an environment is one of them, and
`find_company` whether two of them in one process disturb each other.
"""

import copy
import gc
import json
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from steadyrl.errors import EnvError, UsageError, in_one_line
from steadyrl.output import say
from steadyrl.signals import Interrupt
from steadyrl.spaces import Misfit, Spaces, flag_of, observation_of, reward_of, success_of

PROBE_STEPS = 50  # of each of the episodes that are played to find something out
TIMERS = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF


def generator_state(env: gym.Env) -> Mapping[str, Any] | None:
    """The state of an environment's generator; None if it has none, or one of a type that is not known here."""
    generator: Any = None
    with suppress(Exception):  # a property may raise anything
        generator = env.unwrapped.np_random
    if isinstance(generator, np.random.RandomState):  # dm_control's
        return generator.get_state(legacy=False)
    known = isinstance(generator, np.random.Generator) and hasattr(np.random, type(generator.bit_generator).__name__)
    return generator.bit_generator.state if known else None


def set_generator_state(env: gym.Env, state: dict[str, Any] | None) -> None:
    """Restore a state from `generator_state`. The environment may have made a generator of another type since."""
    if state is None:
        return
    generator: Any = env.unwrapped.np_random
    if "has_gauss" in state:
        generator = generator if isinstance(generator, np.random.RandomState) else np.random.RandomState()
        generator.set_state(state)
    else:
        kind = getattr(np.random, state["bit_generator"])
        if not isinstance(getattr(generator, "bit_generator", None), kind):
            generator = np.random.Generator(kind())
        generator.bit_generator.state = state
    if generator is not env.unwrapped.np_random:
        with suppress(AttributeError):  # a property of the environment's own: the replay will be another one
            env.unwrapped.np_random = generator


class ReplayableEnv(gym.Wrapper):
    """The border to one environment. Its running episode can be played again in another process, to the same state.

    Observations that come in are copies, and their shape is checked, as are rewards and flags. `reset` returns what the
    episode started from in its info, as "start".

    Args:
        build: makes the environment, and returns the spaces that it had before they were converted.
        index: its place among the training environments.
        rebuild: build the environment again for each episode, because it carries state from one to the next.
        finite: refuse observations and rewards that are not finite.

    Raises:
        EnvError: for whatever the environment raises, SystemExit and KeyboardInterrupt too, and for a value that does not fit.
    """

    def __init__(
        self, build: Callable[[], tuple[gym.Env, Spaces]], index: int = 0, rebuild: bool = False, finite: bool = False
    ):
        self.build, self.index, self.rebuild, self.finite = build, index, rebuild, finite
        self.fresh, self.steps, self.process = True, 0, os.getpid()
        self.timers = [timer for timer in TIMERS if signal.getitimer(timer)[0] == 0]
        with self.crossing():
            env, self.given_spaces = build()
            super().__init__(env)
        self.shape = env.observation_space.shape or ()

    @contextmanager
    def crossing(self) -> Iterator[None]:
        """Around the environment's code: whatever it raises is an EnvError, and `come_back` follows."""
        try:
            yield
        except BaseException as error:
            self.refuse(error)
        finally:
            self.come_back()

    def come_back(self) -> None:
        """After each call of the environment's code: stop the timers that it started. A process that it forked ends here: it
        must not go on as the run."""
        if os.getpid() != self.process:
            os._exit(1)
        for timer in self.timers:
            signal.setitimer(timer, 0)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        with self.crossing():
            start = {"seed": seed} if seed is not None else {"generator": generator_state(self.env)}
        obs = self.begin(start, options)
        # Vector environments pass strings on as they are.
        return obs, {"start": json.dumps(start, default=lambda value: value.tolist())}

    def begin(self, start: dict[str, Any], options: dict | None = None) -> np.ndarray:
        """Start the episode that `start` describes and return its first observation."""
        if self.rebuild and not self.fresh:
            self.close()
        with self.crossing():
            if self.rebuild and not self.fresh:
                before = self.env.action_space
                self.env, _ = self.build()
                if self.env.action_space != before:
                    raise EnvError(f"a new instance has other actions, {self.env.action_space}, than the last one, {before}")
            self.fresh = False
            if "generator" in start:
                set_generator_state(self.env, start["generator"])
            # Gymnasium's vector environments make {} of None if only some of them are reset.
            obs = self.env.reset(seed=start.get("seed"), options=options or None)[0]
        return self.checked(lambda: observation_of(obs, self.shape, self.finite))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except BaseException as error:  # not `crossing`, which takes two microseconds
            self.refuse(error)
        finally:
            self.come_back()
        return self.checked(
            lambda: (
                observation_of(obs, self.shape, self.finite),
                reward_of(reward, self.finite),
                flag_of("terminated", terminated),
                flag_of("truncated", truncated),
                success_of(info) if terminated or truncated else {},  # nobody reads anything else of it
            )
        )

    def checked(self, values: Callable[[], Any]) -> Any:
        """Values from the environment, or an EnvError with the step, the field, its value and what it must be."""
        try:
            return values()
        except BaseException as error:
            self.refuse(error)

    def refuse(self, error: BaseException) -> NoReturn:
        """Raise the EnvError for whatever the environment raised. A UsageError of the algorithm and a user's Ctrl-C stay."""
        if os.getpid() != self.process:  # the environment forked it: its status is for that environment
            os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
        if isinstance(error, Misfit):
            raise EnvError(f"step {self.steps}: {error.field} of environment {self.index} {error.what}") from error
        if isinstance(error, EnvError | UsageError | Interrupt):
            raise error
        raise EnvError(in_one_line(error)) from error

    def compute(self, name: str, achieved: np.ndarray, desired: np.ndarray, each: bool) -> np.ndarray:
        """What a method of an environment with goals returns for (N, ...) achieved and desired goals, as float32.

        Args:
            each: call it once for each goal.
        """
        with self.crossing():
            method = self.env.get_wrapper_attr(name)
            if each:
                answers = [np.asarray(method(*pair, {})).item() for pair in zip(achieved, desired, strict=True)]
                return np.array(answers, np.float32)
            return np.array(method(achieved, desired, {}), np.float32)

    def render(self) -> Any:
        with self.crossing():
            frame = self.env.render()
            return frame.copy() if isinstance(frame, np.ndarray) else frame  # a renderer may draw into it again

    def close(self) -> None:
        """Close the environment. If that fails, a warning is enough: the environment is not needed any more."""
        try:
            with self.crossing():
                self.env.close()
        except EnvError as error:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # the environment may have asked for errors
                warnings.warn(f"the environment could not be closed ({error}): the run goes on", stacklevel=2)

    def replay(self, episodes: list[dict[str, Any]], steps: int) -> int | None:
        """Play this environment's one of `episodes` again and return its checksum, None if it could not be played.

        Args:
            steps: that it had made in the run.
        """
        start, actions = json.loads(episodes[self.index]["start"]), episodes[self.index]["actions"]
        try:
            obs = self.begin(start)
            crc = checksum(obs)
            for action in actions:
                obs, reward, terminated, truncated, _ = self.step(action)
                if terminated or truncated:
                    return None
                crc = checksum(obs, reward, crc)
        except EnvError:
            return None
        finally:
            self.steps = steps
        return crc


def checksum(obs: np.ndarray, reward: float = 0.0, crc: int = 0) -> int:
    """The CRC-32 of an episode so far: of each observation and reward, after that of the steps before."""
    return zlib.crc32(np.float64(reward).tobytes(), zlib.crc32(obs.tobytes(), crc))


class TrainingEnvs(gym.vector.VectorWrapper):
    """The training environments: their state can be saved, running episodes included.

    Args:
        replayable: whether their running episodes can be restored.
        steps: that each of them has made in the run.

    Attributes:
        observations: the (N, O) observations to act on next.
        cut_off: (N,) bool: after a resume, the environments whose running episode was not restored, and has ended.
        before_close: called before the environments are closed, which may fail.
        hold: called after each step; it restores what an environment in this process may have changed.
    """

    env: RecordEpisodeStatistics
    # Gymnasium only knows that these are spaces. They are a Box of vectors, and what the algorithm's `check_spaces` let pass.
    single_observation_space: Any
    single_action_space: Any
    action_space: Any

    def __init__(self, env: RecordEpisodeStatistics, replayable: bool = True, steps: int = 0):
        super().__init__(env)
        self.replayable, self.steps = replayable, steps
        self.hold: Callable[[], None] = lambda: None
        self.before_close: Callable[[], None] = lambda: None
        self.cut_off = np.zeros(env.num_envs, bool)
        self.episodes: list[dict[str, Any]] = []

    @property
    def starting(self) -> np.ndarray:
        """(N,) bool: which environments are at the first observation of an episode."""
        return np.array([not episode["actions"] for episode in self.episodes])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.action_space.seed(seed)
            self.sampler = self.action_space.np_random.bit_generator.state
        self.observations, infos = self.env.reset(seed=seed, options=options)
        self.episodes = [{}] * self.num_envs
        self.start_episodes(range(self.num_envs), infos)
        return self.observations, infos

    def compute(self, *question: Any) -> np.ndarray:
        """`ReplayableEnv.compute` of the first environment; an EnvError if it fails. A signal does not end the waiting."""
        envs: Any = self.unwrapped
        if isinstance(envs, SyncVectorEnv):
            try:
                return envs.envs[0].get_wrapper_attr("compute")(*question)
            finally:
                self.hold()
        signals, envs.signals = envs.signals, None
        try:
            return envs.call("compute", *question)[0]
        finally:
            envs.signals = signals

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        actions = np.array(actions)  # kept until the episode ends, whatever the caller does with its own
        try:
            self.observations, rewards, terminations, truncations, infos = self.env.step(actions)
        finally:
            self.hold()
        for episode, action, obs, reward in zip(self.episodes, actions, self.observations, rewards, strict=True):
            episode["actions"].append(action)
            episode["checksum"] = checksum(obs, reward, episode["checksum"])
        self.start_episodes(np.flatnonzero(infos.get("_start", ())), infos)
        self.sampler = self.action_space.np_random.bit_generator.state
        return self.observations, rewards, terminations, truncations, infos

    def close(self, **kwargs: Any) -> None:
        self.before_close()
        super().close(**kwargs)

    def start_episodes(self, indices: Iterable[int], infos: dict[str, Any]) -> None:
        """Note that these environments were reset, to their present observations."""
        for index in indices:
            crc = checksum(self.observations[index])
            self.episodes[index] = {"start": infos["start"][index], "actions": [], "checksum": crc}

    def state_dict(self) -> dict[str, Any]:
        """Where each environment is: its observation and its running episode; and the generator of the random actions.

        If a worker failed, this generator is the one before the actions that failed: they may be repeated. An environment in
        this process would fail at them again.
        """
        workers = isinstance(self.unwrapped, AsyncVectorEnv)
        return {
            "observations": torch.from_numpy(self.observations),
            "episodes": [episode | {"actions": torch.from_numpy(np.array(episode["actions"]))} for episode in self.episodes],
            "episode_returns": torch.from_numpy(self.env.episode_returns),
            "episode_lengths": torch.from_numpy(self.env.episode_lengths),
            "action_space": self.sampler if workers else self.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the running episodes again. If the observations and rewards of an environment are not the
        same bit for bit, it starts a new episode, and a message says so."""
        self.env.reset()
        self.episodes = [episode | {"actions": list(episode["actions"].numpy().copy())} for episode in state["episodes"]]
        self.observations = state["observations"].numpy().copy()
        vector: Any = self.unwrapped
        longest = 1 + max(len(episode["actions"]) for episode in self.episodes)
        with vector.longer(longest) if isinstance(self.unwrapped, AsyncVectorEnv) else nullcontext():
            checksums = vector.call("replay", self.episodes, self.steps)  # also brings the generators back
        same = [crc == episode["checksum"] for crc, episode in zip(checksums, self.episodes, strict=True)]
        self.cut_off = cut_off = ~np.array(same) | (not self.replayable)
        if cut_off.any():
            fresh_observations, infos = self.env.reset(options={"reset_mask": cut_off})  # clears the returns of all
            self.observations[cut_off] = fresh_observations[cut_off]
            self.start_episodes(np.flatnonzero(cut_off), infos)
            for index in np.flatnonzero(cut_off):
                say(f"environment {index} did not come back to the same state: its episode is cut off and a new one starts")
        self.env.episode_returns[~cut_off] = state["episode_returns"].numpy()[~cut_off]
        self.env.episode_lengths[~cut_off] = state["episode_lengths"].numpy()[~cut_off]
        self.action_space.np_random.bit_generator.state = self.sampler = state["action_space"]


def find_replay(make: Callable[[bool], ReplayableEnv]) -> str:
    """How to restore the running episode of an environment on a fresh instance, after others were played on the first.

    Some short episodes are played, with random actions. A fresh instance plays one of them again, then the next, then the
    first: all observations and rewards must be the same, bit for bit. Nothing is drawn from the random streams of training.
    There is one instance at a time.

    Args:
        make: makes a new instance, with its `rebuild` as the argument.

    Returns:
        plain: by a replay; rebuild: by a replay, if the environment is built again for each episode; cut: not at all.

    Raises:
        EnvError: if the environment raises an error, also if it is built again for each episode.
    """
    for rebuild in (False, True):
        try:
            with closing(make(rebuild)) as env:
                first, second, third = (random_actions(env, seed) for seed in range(3))
                expected_first = play(env, {"seed": 0}, first)
                for _ in range(2):  # more resets than the fresh instance will have had
                    play(env, None, third)
                start = {"generator": generator_state(env)}
                expected = [play(env, start, second), play(env, None, third), expected_first]
            with closing(make(rebuild)) as fresh:
                play(fresh, None, third)
                found = [play(fresh, start, second), play(fresh, None, third), play(fresh, {"seed": 0}, first)]
        except EnvError:
            if rebuild:
                raise
            continue  # some fail if they are reset in the middle of an episode, which a new instance never is
        if found == expected:
            return "rebuild" if rebuild else "plain"
        if found[0][0] != expected[0][0]:  # built anew, each episode would begin as the first: that is another task
            break
    return "cut"


class Company(NamedTuple):
    """What `find_company` found."""

    disturbed: bool  # an episode goes another way if a second instance plays meanwhile in this process
    mixed: bool  # the next episode starts in another way: they draw from one generator
    alone: str  # why there can be no second instance while the first one exists; empty if there can
    ended: bool  # the episode that was played came to its end (true as well if none was played)


def find_company(make: Callable[[], ReplayableEnv], plays: bool = True) -> Company:
    """Whether a second instance in this process disturbs the first one: its running episode, or the start of its next one.

    An episode is played twice on one instance, and the next one is begun. Then it is played again, while another instance is
    made, plays in turns with the first, and is closed.

    Args:
        plays: if false, nothing is played. The only test is then whether there can be a second one.
    """
    with closing(make()) as env:
        actions = random_actions(env, 0) if plays else []
        expected = play(env, {"seed": 0}, actions)
        ended, actions = not plays or len(expected) <= PROBE_STEPS, actions[: len(expected) - 1]
        expected += play(env, None, [])
        again = play(env, {"seed": 0}, actions) + play(env, None, [])
        found = [checksum(env.begin({"seed": 0}))]
        half = (len(actions) + 1) // 2
        try:
            other = make()
        except EnvError as error:
            return Company(False, False, str(error), ended)
        try:
            with closing(other):
                try:
                    other.reset(seed=1)
                except EnvError as error:  # some simulators only start here
                    return Company(False, False, str(error), ended)
                for action in actions[:half]:
                    found.append(checksum(*env.step(action)[:2]))
                    if any(other.step(action)[2:4]):
                        other.reset()
            del other
            gc.collect()  # a simulator may end in its __del__
            for action in actions[half:]:
                found.append(checksum(*env.step(action)[:2]))
            found += play(env, None, [])
        except EnvError:  # neither failed when it was alone
            return Company(True, False, "", ended)
    if expected[:-1] != again[:-1]:  # nothing can be told of an environment that is not the same without company
        return Company(False, False, "", ended)
    mixed = plays and expected[-1] == again[-1] != found[-1]
    return Company(expected[:-1] != found[:-1], mixed, "", ended)


def random_actions(env: gym.Env, seed: int) -> list[Any]:
    """Random actions for a short test episode."""
    space = copy.deepcopy(env.action_space)
    space.seed(seed)
    return [space.sample() for _ in range(PROBE_STEPS)]


def play(
    env: ReplayableEnv,
    start: dict[str, Any] | None,
    actions: Sequence[Any],
    meanwhile: Callable[[], object] = lambda: None,
) -> list[int]:
    """Play an episode, up to its end if that comes first; returns the checksum of each observation and reward.

    Args:
        meanwhile: called once, before the second step.
    """
    checksums = [checksum(env.reset()[0] if start is None else env.begin(start))]
    for index, action in enumerate(actions):
        if index == 1:
            meanwhile()
        obs, reward, terminated, truncated, _ = env.step(action)
        checksums.append(checksum(obs, reward))
        if terminated or truncated:
            break
    return checksums
