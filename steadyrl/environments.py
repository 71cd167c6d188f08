"""The environments of a run: made, stepped together, and watched."""

import contextlib
import copy
import multiprocessing
import os
import queue
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

from steadyrl.arguments import RunArgs
from steadyrl.episodes import ReplayableEnv, TrainingEnvs
from steadyrl.errors import EnvError, TrainingError, in_one_line
from steadyrl.output import guard, say
from steadyrl.signals import SAVE_SIGNALS, STOP_SIGNALS, Signals, at_fork, handlers_now, is_ignored_hangup
from steadyrl.spaces import Spaces, flatten_actions, flatten_observations

VIDEO_FREQUENCY = 20  # episodes between two videos
FILM_LENGTH = 2_000  # steps: all frames are in memory, of MuJoCo's 0.7 MB each
EPISODE_LIMIT = 100_000  # steps of an episode of an evaluation
SLICE = 0.1  # seconds of waiting for a worker before looking whether to go on waiting


def make_env(
    args: RunArgs,
    index: int = 0,
    render_mode: str | None = None,
    video_folder: Path | None = None,
    video_name: str = "",
    rebuild: bool = False,
    finite: bool = False,
) -> gym.Env:
    """One environment, with float32 observations; with a video folder it films its 0th and then every 20th episode.

    Args:
        index: its place among the training environments.
        render_mode: as for gymnasium.make; a video folder needs none.
        rebuild: build it again for each episode.
        finite: refuse observations and rewards that are not finite, as training does.
    """
    env = make_replayable_env(args, index, render_mode or ("rgb_array" if video_folder else None), rebuild, finite)
    if video_folder is None:
        return env
    try:
        with warnings.catch_warnings():  # the environment may have asked for errors
            warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # each film has a name of its own
            return FilmedEnv(env, str(video_folder), lambda episode: episode % VIDEO_FREQUENCY == 0, name_prefix=video_name)
    except Exception as error:  # of the system, or a render_mode that this instance does not have
        say(f"warning: there will be no films in {video_folder} ({in_one_line(error)[:200]})")
        return env


@contextlib.contextmanager
def coming_back() -> Iterator[Callable[[], None]]:
    """Around code of an environment: signals are afterwards as before, and so is the working directory if it still exists.

    Yields:
        a function that restores the signals at once.
    """
    folder, restore = None, handlers_now()
    with contextlib.suppress(OSError):
        folder = os.getcwd()
    try:
        yield restore
    finally:
        restore()
        if folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(folder)


def has_display() -> bool:
    """Whether there is one, on Linux."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class FilmedEnv(gym.wrappers.RecordVideo):
    """Films episodes, long ones in part. A film that cannot be written (frames of another size, a full disk) is a warning."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        if self.recording and len(self.recorded_frames) == 1:  # a resume resets twice
            self.recorded_frames, self.recording = [], False
            self.episode_id -= 1
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        step = super().step(action)
        if len(self.recorded_frames) > FILM_LENGTH and not (step[2] or step[3]):
            say(f"{self._video_name}.mp4 has the first {FILM_LENGTH:,} steps of its episode: more would fill the memory")
            self.stop_recording()
        return step

    def stop_recording(self) -> None:
        try:
            super().stop_recording()
        except Exception as error:  # of NumPy, moviepy, ffmpeg or the system: many types
            say(f"warning: {self._video_name}.mp4 could not be written ({in_one_line(error)[:200]})")
            self.recorded_frames, self.recording, self._video_name = [], False, None


def make_replayable_env(
    args: RunArgs, index: int = 0, render_mode: str | None = None, rebuild: bool = False, finite: bool = False
) -> ReplayableEnv:
    """One environment that is not filmed; the arguments are those of `make_env`."""
    if render_mode and sys.platform == "linux" and not has_display():
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display MuJoCo's default, GLFW, cannot render
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # and SDL prints an "error:"
    with contextlib.suppress(ImportError, AttributeError):  # AttributeError: PyOpenGL found no libEGL, which others do not need
        import mujoco  # after MUJOCO_GL is set: MuJoCo reads it when it is imported

        # By default MuJoCo also appends its warnings to a MUJOCO_LOG.TXT in the working directory.
        mujoco.set_mju_user_warning(lambda message: warnings.warn(f"MuJoCo: {message}", stacklevel=2))
    rendering: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}  # some constructors do not know it

    def build() -> tuple[gym.Env, Spaces]:
        with coming_back():  # some go to where their simulator's files are
            kwargs = rendering | copy.deepcopy(args.env_kwargs)  # a constructor may change what is in them
            env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, **kwargs)
        wrapped = args.wrap(flatten_actions(env))
        return flatten_observations(wrapped), (wrapped.observation_space, env.action_space)

    return ReplayableEnv(build, index, rebuild, finite)


def final_observations(next_obs: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
    """The true successors of a step, (N, O): `next_obs` of an ended episode is the first observation of the next one."""
    if "final_obs" not in infos:
        return next_obs
    ended, successors = infos["_final_obs"], next_obs.copy()
    successors[ended] = np.stack(infos["final_obs"][ended])
    return successors


def check_finite(global_step: int, **fields: np.ndarray) -> None:
    """Stop at a value that is not finite; `fields` are arrays with an entry per environment.

    Raises:
        TrainingError: naming the step, the first such environment and the field.
    """
    for name, values in fields.items():
        if not np.isfinite(values).all():
            finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            index = int(np.flatnonzero(~finite)[0])
            raise TrainingError(f"step {global_step}: {name} of environment {index} is not finite: {values[index]}")


class WorkerEnvs(AsyncVectorEnv):
    """Asynchronous environments. Each exchange with a worker process has a time limit. They leave no process behind.

    Args:
        env_fns: make the environments.
        timeout: seconds that a worker may take to answer, while this process runs.
        signals: a signal to stop ends the waiting.
        spaces: of each environment. If they are given, this process makes no environment to get them.

    Raises:
        EnvError: from the constructor, `reset`, `step` and `call`: what a worker's environment raised; or which worker ended
            or gave no answer.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        timeout: float,
        signals: Signals | None = None,
        spaces: Spaces | None = None,
        **kwargs: Any,
    ):
        self.timeout, self.signals, self.broken = timeout, signals, False
        self.processes: list[multiprocessing.Process] = []
        self.parent_pipes: list[Any] = []
        try:
            with self.exchange():
                # Not daemonic: an environment may start processes of its own.
                made = [partial(in_worker, env_fn, spaces) for env_fn in env_fns]
                super().__init__(made, daemon=False, worker=quiet_worker, **kwargs)
        except BaseException:
            self.close()
            raise

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        with self.exchange():
            return super().reset(seed=seed, options=options)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        with self.exchange():
            return super().step(actions)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with self.exchange():
            return super().call(name, *args, **kwargs)

    def _check_spaces(self) -> None:
        """Gymnasium's own would wait without a limit for a worker whose environment is not made."""
        wanted = self.single_observation_space, self.single_action_space
        for index, spaces in enumerate(zip(self.call("observation_space"), self.call("action_space"), strict=True)):
            if (spaces[0].shape, spaces[1]) != (wanted[0].shape, wanted[1]):  # the bounds of observations do not matter
                raise EnvError(f"environment {index} has other spaces, {spaces}, than the first one, {wanted}")

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Raise a worker's error. Gymnasium's own method waits for ever if a worker ended before it reported its error."""
        failed = [index for index, success in enumerate(successes) if not success]
        if failed:
            try:
                _, kind, error, _ = self.error_queue.get(timeout=10 * SLICE)
            except queue.Empty:
                raise EnvError(f"asynchronous environments: worker {failed[0]} failed, and ended before it said why") from None
            raise error if isinstance(error, EnvError) else EnvError(f"{kind.__name__}: {error}")

    def _poll_pipe_envs(self, timeout: float | None = None) -> bool:
        """Wait for an answer, or the end, of each worker. Gymnasium calls it before it reads the answers of any command.

        Time counts in slices of waiting. Time in which this process was stopped, or the machine slept, does not count.
        """
        waited = 0.0
        for pipe in self.parent_pipes:
            while not pipe.poll(SLICE):
                waited += SLICE
                if waited >= self.timeout or (self.signals is not None and self.signals.stop):
                    return False
        return True

    @contextlib.contextmanager
    def longer(self, steps: int) -> Iterator[None]:
        """Inside, an exchange may take as long as that many steps."""
        timeout = self.timeout
        self.timeout = timeout * steps
        try:
            yield
        finally:
            self.timeout = timeout

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Around an exchange with the workers: if it fails, an EnvError says why."""
        try:
            yield
        except EnvError:  # a worker raised it and ends
            self.broken = True
            raise
        except (EOFError, OSError, multiprocessing.TimeoutError) as error:
            self.broken = True
            for process in self.processes:
                process.join(SLICE)  # a pipe breaks a moment before its process has an exit status
            dead = [index for index, process in enumerate(self.processes) if not process.is_alive()]
            what = [f"worker {index} ended with exit status {self.processes[index].exitcode}" for index in dead]
            late = isinstance(error, multiprocessing.TimeoutError) and not dead
            silent = [index for index, pipe in enumerate(self.parent_pipes) if late and not pipe.poll()]
            stopped = self.signals is not None and self.signals.stop
            limit = "until the signal" if stopped else f"in {self.timeout:g} seconds"
            what += [f"worker {index} gave no answer {limit}" for index in silent]
            what = what or [in_one_line(error)]
            raise EnvError(f"asynchronous environments: {', '.join(what)}") from error

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ask the workers to close their environments. A worker that does not end in time is killed, with its children."""
        children = [child for process in self.processes for child in descendants(process.pid)]
        for pipe in self.parent_pipes:
            with contextlib.suppress(OSError, AttributeError):  # Gymnasium has None for the pipe of one that failed
                pipe.send(("close", None))
        stopped = self.signals is not None and self.signals.stop  # schedulers do not wait for long
        limit = SLICE if self.broken or terminate else min(self.timeout, 5.0) if stopped else self.timeout
        for process in self.processes:
            while process.is_alive() and limit > 0:
                process.join(SLICE)
                limit -= SLICE
            children += descendants(process.pid)
            process.kill()
            process.join()
        kill(children)
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()


def descendants(pid: int | None) -> list[psutil.Process]:
    """The processes that a process started, and those that these started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill those that are still there. (psutil can tell a process from a later one with the same number.)"""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class SpacesOf(gym.Env):
    """A placeholder for an environment if only its spaces are needed."""

    def __init__(self, spaces: Spaces):
        self.observation_space, self.action_space = spaces


class FailedEnv(gym.Env):
    """A placeholder for an environment that could not be made in a worker. The first request to it raises the error."""

    observation_space = action_space = gym.spaces.Discrete(1)

    def __init__(self, error: EnvError):
        self.error = error

    def get_wrapper_attr(self, name: str) -> Any:
        raise self.error


def quiet_worker(*args: Any) -> None:
    """Gymnasium's worker. If the main process is gone, a closed pipe is no error."""
    try:
        _async_worker(*args)
    except (EOFError, OSError):
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join(10 * SLICE)  # its pipes are closed one after the other
            if not parent.is_alive():
                exit_with_children()
        raise


def exit_with_children() -> None:
    """End a worker, and what its environment started."""
    kill(descendants(os.getpid()))
    os._exit(1)


def in_worker(env_fn: Callable[[], gym.Env], spaces: Spaces | None = None) -> gym.Env:
    """Make an environment. In a worker process, also ignore signals meant for the main process, and exit when that ends.

    Args:
        spaces: if given, the main process gets these instead of an environment. It needs nothing else.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return env_fn() if spaces is None else SpacesOf(spaces)
    ignore_signals()  # Ctrl-C and schedulers signal the whole process group
    at_fork(listen_to_signals)
    guard()  # what the environment prints may have no reader

    def exit_with_parent() -> None:
        parent.join()
        exit_with_children()

    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        env = env_fn()
        ignore_signals()  # the environment may have installed handlers
        return env
    except EnvError as error:
        return FailedEnv(error)


def ignore_signals() -> None:
    """Ignore what stops or saves a run, and output without a reader. (A program that the environment starts, and wants to end,
    would inherit SIG_IGN.)"""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in STOP_SIGNALS + SAVE_SIGNALS:
        if not is_ignored_hangup(number):
            signal.signal(number, lambda number, frame: None)
            signal.siginterrupt(number, False)  # system calls of a simulator go on


def listen_to_signals() -> None:
    """In a process that an environment forks in its worker: signals end it."""
    for number in STOP_SIGNALS + SAVE_SIGNALS:
        if not is_ignored_hangup(number):
            signal.signal(number, signal.SIG_DFL)


class WorkerEnv(gym.Env):
    """One environment in a process of its own, for those that disturb each other in one process.

    Args:
        env_fn: makes the environment.
        spaces, timeout, signals: as for WorkerEnvs.
    """

    def __init__(self, env_fn: Callable[[], gym.Env], spaces: Spaces, timeout: float, signals: Signals | None = None):
        self.envs = WorkerEnvs([env_fn], timeout, signals, spaces, autoreset_mode=AutoresetMode.DISABLED)
        self.observation_space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        observations, _ = self.envs.reset(seed=seed, options=options)
        return observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observations, rewards, terminations, truncations, infos = self.envs.step(np.asarray(action)[None])
        info = {"is_success": infos["is_success"][0]} if "is_success" in infos else {}
        return observations[0], float(rewards[0]), bool(terminations[0]), bool(truncations[0]), info

    def close(self) -> None:
        self.envs.close()


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_seeded(env_fn: Callable[[], gym.Env], seed: int, global_step: int) -> gym.Env:
    """Make an environment of a worker, which may draw from global generators. Each worker draws other numbers, and a resumed
    run does not repeat them."""
    seed_generators(seed)
    env = env_fn()
    if global_step:
        seed_generators(seed + global_step)
    return env


def make_envs(
    args: RunArgs, run_name: str, replay: str | None = None, signals: Signals | None = None, global_step: int = 0
) -> TrainingEnvs:
    """The training environments: `num_envs` of them, stepped together, with episode statistics in `infos`.

    An environment whose episode ends is reset within the same step. `obs` is then the first observation of the next
    episode, and `infos["final_obs"]` holds the last one of the ended episode. (Gymnasium's default, a reset at the
    next step, would put a transition that never happened into the replay buffer after each episode.)

    Args:
        run_name: the folder of its videos, in <output>/videos or absolute.
        replay: how running episodes come back, as `checks.check` found it (None: as --episode-replay says).
        signals: a signal to stop ends the waiting for a worker.
        global_step: at which a run is resumed.

    Raises:
        EnvError: if a worker fails.
    """
    video_folder = Path(args.output, "videos", run_name).absolute() if args.capture_video else None
    replay = replay or args.episode_replay
    video_name = f"training-resumed-{int(time.time())}" if args.resume else "training"
    env_fns = [
        partial(make_env, args, index, None, video_folder if index == 0 else None, video_name, replay == "rebuild", True)
        for index in range(args.num_envs)
    ]
    envs: gym.vector.VectorEnv
    if args.vectorization == "async":
        seeded = [partial(make_seeded, env_fn, args.seed + index, global_step) for index, env_fn in enumerate(env_fns)]
        envs = WorkerEnvs(seeded, args.worker_timeout, signals, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        try:
            with contextlib.ExitStack() as stack:  # if one fails, those before it are closed
                makers = [lambda make=make: stack.enter_context(contextlib.closing(make())) for make in env_fns]
                envs = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
                stack.pop_all()
        except RuntimeError as error:  # they have different spaces
            raise EnvError(str(error)) from error
    steps = global_step // args.num_envs
    return TrainingEnvs(gym.wrappers.vector.RecordEpisodeStatistics(envs), replay != "cut", steps)
