"""The environments of a run: made, stepped together, and watched."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from steadyrl.arguments import RunArgs
from steadyrl.episodes import ReplayableEnv, TrainingEnvs
from steadyrl.errors import EnvError, TrainingError
from steadyrl.signals import SAVE_SIGNALS, STOP_SIGNALS
from steadyrl.spaces import Spaces, flatten_actions, flatten_observations

VIDEO_FREQUENCY = 20  # episodes between two videos


def make_env(
    args: RunArgs,
    index: int = 0,
    render_mode: str | None = None,
    video_folder: Path | None = None,
    video_name: str = "",
    rebuild: bool = False,
) -> gym.Env:
    """One environment, with float32 observations; with a video folder it films its 0th and then every 20th episode.

    Args:
        index: its place among the training environments.
        render_mode: as for gymnasium.make; a video folder needs none.
        rebuild: build it anew for each episode.
    """
    env = make_replayable_env(args, index, render_mode or ("rgb_array" if video_folder else None), rebuild)
    if video_folder is None:
        return env
    return gym.wrappers.RecordVideo(
        env, str(video_folder), lambda episode: episode % VIDEO_FREQUENCY == 0, name_prefix=video_name
    )


def make_replayable_env(args: RunArgs, index: int = 0, render_mode: str | None = None, rebuild: bool = False) -> ReplayableEnv:
    """One environment that is not filmed; the arguments are those of `make_env`."""
    if render_mode and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display MuJoCo's default, GLFW, cannot render
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # and SDL prints an "error:"
    with contextlib.suppress(ImportError, AttributeError):  # AttributeError: PyOpenGL found no libEGL, which others do not need
        import mujoco  # after MUJOCO_GL is set: MuJoCo reads it when it is imported

        # By default MuJoCo also appends its warnings to a MUJOCO_LOG.TXT in the working directory.
        mujoco.set_mju_user_warning(lambda message: warnings.warn(f"MuJoCo: {message}", stacklevel=2))
    rendering: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}  # some constructors do not know it

    def build() -> tuple[gym.Env, Spaces]:
        env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, **rendering, **args.env_kwargs)
        return flatten_observations(args.wrap(flatten_actions(env))), (env.observation_space, env.action_space)

    return ReplayableEnv(build, index, rebuild)


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
    """Asynchronous environments that notice a worker process which died or hangs, and that leave no worker behind.

    Raises:
        EnvError: from `step`, naming the worker and its exit status.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], timeout: float, **kwargs: Any):
        self.timeout, self.broken = timeout, False
        super().__init__([partial(in_worker, env_fn) for env_fn in env_fns], **kwargs)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
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
            raise EnvError(f"asynchronous environments: {', '.join(what)}") from error

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        if not self.broken:
            super().close_extras(timeout, terminate)
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


def make_envs(args: RunArgs, run_name: str, replay: str | None = None) -> TrainingEnvs:
    """The training environments: `num_envs` of them, stepped together, with episode statistics in `infos`.

    An environment whose episode ends is reset within the same step: `obs` is then the first observation of the next
    episode and `infos["final_obs"]` holds the last one of the ended episode. (Gymnasium's default, a reset at the
    next step, would put a transition that never happened into the replay buffer after each episode.)

    Args:
        run_name: names the folder of the videos.
        replay: how running episodes come back, as `checks.check` found it (None: as --episode-replay says).
    """
    video_folder = Path(args.output, "videos", run_name) if args.capture_video else None
    replay = replay or args.episode_replay
    video_name = f"training-resumed-{int(time.time())}" if args.resume else "training"
    env_fns = [
        partial(make_env, args, index, None, video_folder if index == 0 else None, video_name, replay == "rebuild")
        for index in range(args.num_envs)
    ]
    envs: gym.vector.VectorEnv
    if args.vectorization == "async":
        envs = WorkerEnvs(env_fns, args.worker_timeout, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        envs = SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
    return TrainingEnvs(gym.wrappers.vector.RecordEpisodeStatistics(envs), replayable=replay != "cut")
