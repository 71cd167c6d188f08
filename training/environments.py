"""The environments of a run: stepped together, seeded, watched, and able to come back to where they were."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from training.arguments import Args, check_args
from training.errors import TrainingError, UsageError, WorkerError
from training.replay_buffer import available_memory, buffer_bytes
from training.signals import SAVE_SIGNALS, STOP_SIGNALS

VIDEO_FREQUENCY = 20  # episodes between two videos


def make_env(
    args: Args, index: int = 0, render: bool = False, video_folder: Path | None = None, video_name: str = ""
) -> gym.Env:
    """One environment, with float32 observations; with a video folder it films its 0th and then every 20th episode.

    Args:
        index: its place among the training environments.
    """
    render = render or video_folder is not None
    if render and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display MuJoCo's default, GLFW, cannot render
    with contextlib.suppress(ImportError):
        import mujoco  # after MUJOCO_GL is set: MuJoCo reads it when it is imported

        # By default MuJoCo also appends its warnings to a MUJOCO_LOG.TXT in the working directory.
        mujoco.set_mju_user_warning(lambda message: warnings.warn(f"MuJoCo: {message}", stacklevel=2))
    rendering = {"render_mode": "rgb_array"} if render else {}  # not None: some constructors do not know the argument
    env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, **rendering, **args.env_kwargs)
    env = args.wrap(env)
    if isinstance(env.observation_space, gym.spaces.Box):
        env = gym.wrappers.DtypeObservation(env, np.float32)  # float64 would double the replay buffer
    env = ReplayableEnv(env, index)
    if video_folder is not None:
        env = gym.wrappers.RecordVideo(
            env, str(video_folder), lambda episode: episode % VIDEO_FREQUENCY == 0, name_prefix=video_name
        )
    return env


class ReplayableEnv(gym.Wrapper):
    """An environment whose running episode can be played again in another process, to the same state.

    Simulators can neither be pickled nor copied whole, but they are deterministic: the state of the generator before a
    reset (`reset` returns it in its info, as "start") and the actions since then lead to the same state, bit for bit.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index = index

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        start = {"seed": seed} if seed is not None else {"generator": self.unwrapped.np_random.bit_generator.state}
        obs, _ = self.env.reset(seed=seed, options=options)
        return obs, {"start": json.dumps(start, default=np.ndarray.tolist)}  # vector environments pass strings on as they are

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return *self.env.step(action)[:4], {}  # nobody reads the info of a step, and collecting it costs time

    def replay(self, episodes: list[dict[str, Any]]) -> np.ndarray:
        """Play this environment's one of `episodes` again and return its last observation."""
        start, actions = json.loads(episodes[self.index]["start"]), episodes[self.index]["actions"]
        if "generator" in start:
            self.unwrapped.np_random.bit_generator.state = start["generator"]
        obs, _ = self.env.reset(seed=start.get("seed"))
        for action in actions:
            obs = self.env.step(action)[0]
        return obs


class TrainingEnvs(gym.vector.VectorWrapper):
    """The training environments: their state can be saved, running episodes included.

    Attributes:
        observations: the (N, O) observations to act on next.
    """

    @property
    def starting(self) -> np.ndarray:
        """(N,) bool: which environments are at the first observation of an episode."""
        return np.array([not episode["actions"] for episode in self.episodes])

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.action_space.seed(seed)
        self.observations, infos = self.env.reset(seed=seed, options=options)
        self.episodes = [{"start": start, "actions": []} for start in infos["start"]]
        return self.observations, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.observations, rewards, terminations, truncations, infos = self.env.step(actions)
        for episode, action in zip(self.episodes, actions, strict=True):
            episode["actions"].append(action)
        for index in np.flatnonzero(infos.get("_start", ())):
            self.episodes[index] = {"start": infos["start"][index], "actions": []}
        return self.observations, rewards, terminations, truncations, infos

    def state_dict(self) -> dict[str, Any]:
        """Where each environment is: its observation and its running episode; and the generator of the random actions."""
        return {
            "observations": torch.from_numpy(self.observations),
            "episodes": [
                {"start": episode["start"], "actions": torch.from_numpy(np.array(episode["actions"]))}
                for episode in self.episodes
            ],
            "episode_returns": torch.from_numpy(self.env.episode_returns),
            "episode_lengths": torch.from_numpy(self.env.episode_lengths),
            "action_space": self.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the running episodes again. An environment that does not come back to its observation starts a new episode,
        and a line says so."""
        self.env.reset()
        self.episodes = [
            {"start": episode["start"], "actions": list(episode["actions"].numpy())} for episode in state["episodes"]
        ]
        self.observations = state["observations"].numpy().copy()
        same = (np.stack(self.unwrapped.call("replay", self.episodes)) == self.observations).all(axis=1)
        self.env.episode_returns[:] = state["episode_returns"]
        self.env.episode_lengths[:] = state["episode_lengths"]
        if not same.all():
            fresh_observations, infos = self.env.reset(options={"reset_mask": ~same})
            self.observations[~same] = fresh_observations[~same]
            for index in np.flatnonzero(~same):
                print(f"environment {index} did not come back as it was: its episode is cut off here and a new one starts")
                self.episodes[index] = {"start": infos["start"][index], "actions": []}
        self.action_space.np_random.bit_generator.state = state["action_space"]


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
    """Asynchronous environments: notices a worker process that died or hangs, and leaves no worker behind.

    Raises:
        WorkerError: from `step`, naming the worker and its exit status.
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]], timeout: float, **kwargs):
        self.timeout, self.broken = timeout, False
        super().__init__([partial(in_worker, env_fn) for env_fn in env_fns], **kwargs)

    def step(self, actions):
        try:
            self.step_async(actions)
            return self.step_wait(self.timeout)
        except (EOFError, OSError, multiprocessing.TimeoutError) as error:
            self.broken = True
            for process in self.processes:
                process.join(0.1)  # a pipe breaks a moment before its process has an exit status
            dead = [index for index, process in enumerate(self.processes) if not process.is_alive()]
            silent = [index for index, pipe in enumerate(self.parent_pipes) if index not in dead and not pipe.poll()]
            what = [f"worker {index} ended with exit status {self.processes[index].exitcode}" for index in dead]
            what += [f"worker {index} gave no answer in {self.timeout:g} seconds" for index in silent] if not dead else []
            raise WorkerError(f"asynchronous environments: {', '.join(what)}") from error

    def close_extras(self, **kwargs):
        if not self.broken:
            super().close_extras(**kwargs)
            return
        for process in self.processes:  # a worker that hangs does not answer a request to close
            process.kill()
            process.join()


def in_worker(env_fn: Callable[[], gym.Env]) -> gym.Env:
    """Make an environment. In a worker process, also ignore signals meant for the main process, and exit when that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        for name in STOP_SIGNALS + SAVE_SIGNALS:
            signal.signal(name, signal.SIG_IGN)  # Ctrl-C and schedulers signal the whole process group

        def exit_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=exit_with_parent, daemon=True).start()
    return env_fn()


def make_envs(args: Args, run_name: str) -> TrainingEnvs:
    """The training environments: `num_envs` of them, stepped together, with episode statistics in `infos`.

    An environment whose episode ends is reset within the same step: `obs` is then the first observation of the next
    episode and `infos["final_obs"]` holds the last one of the ended episode. (Gymnasium's default, a reset at the
    next step, would put a transition that never happened into the replay buffer after each episode.)
    """
    video_folder = Path("videos", run_name) if args.capture_video else None
    video_name = f"training-resumed-{int(time.time())}" if args.resume else "training"
    env_fns = [
        partial(make_env, args, index, video_folder=video_folder if index == 0 else None, video_name=video_name)
        for index in range(args.num_envs)
    ]
    if args.vectorization == "async":
        envs = WorkerEnvs(env_fns, args.worker_timeout, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        envs = SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
    return TrainingEnvs(gym.wrappers.vector.RecordEpisodeStatistics(envs))


def check(args: Args) -> None:
    """Find what cannot be run before anything is created: check the flags, then build the environment once and close it.

    Raises:
        UsageError: if a flag is wrong, or if the environment does not exist, has spaces that the algorithm cannot take, cannot
            be filmed, or needs a replay buffer that does not fit into memory.
    """
    check_args(args)
    try:
        env = make_env(args, render=args.capture_video)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        kwargs = f" --env-kwargs {json.dumps(args.env_kwargs)}" if args.env_kwargs else ""
        raise UsageError(f"--env-id {args.env_id}{kwargs}: {error}") from error
    try:
        obs_space, action_space = env.observation_space, env.action_space
        if not (isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1):
            raise UsageError(f"--env-id {args.env_id}: its observations are {obs_space}, this script needs a flat Box")
        args.check_spaces(obs_space, action_space)
        needed = buffer_bytes(obs_space.shape[0], math.prod(action_space.shape) or 1, args.buffer_size)
        available = available_memory()
        if needed > available:
            raise UsageError(
                f"--buffer-size {args.buffer_size}: needs {needed / 1e9:.1f} GB of memory, "
                f"must be at most {available // (needed // args.buffer_size)} for the {available / 1e9:.1f} GB available"
            )
        if args.capture_video:
            check_rendering(env)
    finally:
        with contextlib.suppress(Exception):  # a renderer that failed to open may also fail to close
            env.close()


def check_rendering(env: gym.Env) -> None:
    """Render a frame, so that a missing library is found now and not after an hour.

    Raises:
        UsageError: naming what to install.
    """
    try:
        import moviepy  # noqa: F401
    except ImportError:
        raise UsageError("--capture-video True: needs moviepy, install it with: pip install moviepy") from None
    try:
        env.reset()
        env.render()
    except Exception as error:  # each renderer fails in its own way, down to an AttributeError inside OpenGL
        hint = "" if "install" in str(error) else "; on Debian and Ubuntu try: apt-get install libegl1 libgl1"
        raise UsageError(f"--capture-video True: {env.spec.id} cannot be rendered ({error!r}){hint}") from error
