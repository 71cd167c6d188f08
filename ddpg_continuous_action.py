"""Deep Deterministic Policy Gradient (DDPG) for continuous control, in one file.

Papers: Lillicrap et al., 2016, "Continuous control with deep reinforcement learning", arXiv:1509.02971 (algorithm 1
is `train` and `DDPG.update` below); Silver et al., 2014, "Deterministic policy gradient algorithms"; Fujimoto et
al., 2018, arXiv:1802.09477, for the delayed actor and target updates.

    python ddpg_continuous_action.py --env-id Hopper-v4          # train; everything lands in runs/<run name>/
    python ddpg_continuous_action.py --resume runs/<run name>    # go on after a crash, as if it had not happened
    python ddpg_continuous_action.py --evaluate runs/<run name>  # evaluate (and with --capture-video, film) a run
"""

import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import filelock
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common import buffers
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FREQUENCY = 100  # environment steps between two rows of losses in TensorBoard
VIDEO_FREQUENCY = 20  # episodes between two videos
EVALUATION_SEED = 10_000  # first seed of the evaluations while training: the same starts each time, so rows compare
FINAL_EVALUATION_SEED = 20_000  # fresh starts for the reported result: the best model was chosen on the others
FINAL_EVALUATION_EPISODES = 20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))  # a warning, or a wish
WRITE_ATTEMPTS = 3  # writes that may fail in a row (a full disk) before the run stops


def parse_json(texts: list[str]) -> Any:
    """The value of a flag given as JSON."""
    try:
        return json.loads(texts[0])
    except ValueError as error:
        raise ValueError(f"{texts[0]!r} is no JSON ({error})") from None


JSON = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=parse_json,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)
NOISES = {"gaussian": NormalActionNoise, "ou": OrnsteinUhlenbeckActionNoise}
CRITIC_LOSSES = {"mse": F.mse_loss, "huber": F.smooth_l1_loss}
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
NORMALIZATIONS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class UsageError(Exception):
    """Something the user can put right (a flag, a file, a missing package): one line on stderr, status 2."""


class TrainingError(Exception):
    """Training cannot go on (a value is not finite, the disk is full): one line on stderr, status 1."""


class WorkerError(TrainingError):
    """A process of the asynchronous environments died or hangs."""


class Stopped(Exception):
    """A signal asked for the end of the run; its argument is the signal's number."""


# The groups below are the boxes of --help; `Args` joins them into one flat dataclass.


@dataclass
class Experiment:
    """What is run, on what, and what is kept of it."""

    exp_name: str = Path(__file__).stem
    """the name of this experiment"""
    seed: int = 1
    """seed of the networks, the exploration, the replay and the training environments"""
    torch_deterministic: bool = True
    """use only deterministic PyTorch kernels, so that the same seed gives the same run"""
    cuda: bool = True
    """train on a CUDA device if there is one"""
    accelerate: Literal["auto", "eager", "compile", "cudagraph"] = "auto"
    """captured CUDA graphs, compiled functions (which take some seconds to build) or neither (auto: graphs on CUDA)"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """products of float32 matrices may be rounded: high to TF32, medium to bfloat16, where the hardware has them"""
    num_threads: int | None = None
    """threads for the CPU's part of the work (None: OMP_NUM_THREADS, and 2 at most)"""
    track: bool = False
    """also send everything to Weights and Biases"""
    wandb_project_name: str = "ddpg"
    """the Weights and Biases project"""
    wandb_entity: str | None = None
    """the Weights and Biases team (its default entity if None)"""
    capture_video: bool = False
    """film episodes of the first environment (the 0th and then every 20th) and the first of the final evaluation"""
    save_model: bool = True
    """keep the networks in the run folder: the latest in model.pt, those of the best evaluation in best_model.pt"""


@dataclass
class Environment:
    """The task."""

    env_id: str = "Hopper-v4"
    """the Gymnasium environment: flat Box observations and bounded Box actions"""
    env_kwargs: Annotated[dict[str, Any], JSON] = field(default_factory=dict)
    """arguments for gymnasium.make, as in '{"reset_noise_scale": 0.2}'"""
    max_episode_steps: int | None = None
    """time limit of an episode (the environment's own if None)"""
    num_envs: int = 1
    """environments stepped side by side"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments one after the other, or each in a process of its own"""


@dataclass
class Learning:
    """The learner; the defaults are CleanRL's."""

    total_timesteps: int = 1_000_000
    """environment steps to train for, counted over all environments"""
    learning_starts: int = 25_000
    """environment steps of uniformly random actions before the actor acts and learning starts"""
    train_frequency: int = 1
    """environment steps, over all environments, between two training points (at most one per step of them all)"""
    gradient_steps: int = 1
    """critic updates at each training point (-1: as many as environment steps were taken since the last)"""
    policy_frequency: int = 2
    """critic updates per update of the actor and the target networks"""
    buffer_size: int = 1_000_000
    """transitions kept in the replay buffer"""
    batch_size: int = 256
    """transitions sampled for one update"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target networks towards the online ones at each target update (1 copies them)"""
    learning_rate: float = 3e-4
    """learning rate of both optimisers"""
    actor_learning_rate: float | None = None
    """learning rate of the actor (--learning-rate if None)"""
    critic_learning_rate: float | None = None
    """learning rate of the critic (--learning-rate if None)"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW; at 0 it is Adam)"""
    critic_loss: Literal["mse", "huber"] = "mse"
    """loss of the TD error: its square, or smooth L1 with beta 1"""
    reward_scale: float = 1.0
    """factor on the rewards that are learned from, never on those that are logged"""


@dataclass
class Exploration:
    """The noise on the actor's actions."""

    noise: Literal["gaussian", "ou"] = "gaussian"
    """independent at each step, or an Ornstein-Uhlenbeck process that starts anew with each episode"""
    exploration_noise: float = 0.1
    """standard deviation (with ou: sigma) of the noise, in units of half the action range"""
    exploration_noise_end: float | None = None
    """what it decays to (None: it stays)"""
    exploration_fraction: float = 1.0
    """part of --total-timesteps over which it decays, linearly"""


@dataclass
class Networks:
    """The hidden layers of the actor and of the critic."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """units of each hidden layer"""
    activation: Literal["relu", "leaky_relu", "tanh"] = "relu"
    """activation after each hidden layer"""
    normalization: Literal["none", "layer", "batch"] = "none"
    """normalisation before each activation"""


@dataclass
class Evaluating:
    """Greedy evaluation, on environments of its own."""

    eval_frequency: int = 50_000
    """environment steps between two evaluations (0: none but the final one)"""
    eval_episodes: int = 10
    """episodes in each of these evaluations"""
    target_return: float | None = None
    """stop early, successfully, once the mean of an evaluation reaches it"""
    evaluate: Path | None = None
    """a run folder: evaluate its best model (its latest if there is no best) instead of training"""


@dataclass
class Checkpoints:
    """What a run needs to go on after it was stopped or killed, as if it had not been."""

    checkpoint_frequency: int = 50_000
    """environment steps between two checkpoints (0: one on a stop signal and one at the end only)"""
    keep_checkpoints: int = 2
    """checkpoints to keep, the newest"""
    resume: Path | None = None
    """a run folder: continue its newest whole checkpoint, with its arguments"""
    worker_timeout: float = 60.0
    """seconds that an asynchronous environment may take for a step before the run stops"""


@dataclass
class Args(Experiment, Environment, Learning, Exploration, Networks, Evaluating, Checkpoints):
    """Train a DDPG agent, continue its training, or evaluate it."""


def check_args(args: Args) -> None:
    """Check every argument by itself and against the others, before anything is created.

    Raises:
        UsageError: naming the flag, its value and what is allowed.
    """

    def require(names: str, what: str, allowed: Callable[[Any], bool]) -> None:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not allowed(value):
                typed = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"--{name.replace('_', '-')} {typed}: must be {what}")

    # Each is written so that NaN, which compares false with everything, is refused too.
    counts = "num_threads total_timesteps num_envs train_frequency policy_frequency buffer_size batch_size max_episode_steps"
    require(counts + " eval_episodes keep_checkpoints", "a whole number, 1 or more", lambda n: n >= 1)
    require("learning_starts eval_frequency checkpoint_frequency", "a whole number, 0 or more", lambda n: n >= 0)
    require("gradient_steps", "a whole number, 1 or more, or -1", lambda n: n >= 1 or n == -1)
    require("hidden_sizes", "one or more whole numbers, each 1 or more", lambda sizes: sizes and min(sizes) >= 1)
    require(
        "learning_rate actor_learning_rate critic_learning_rate reward_scale worker_timeout",
        "above 0 and finite",
        lambda x: 0 < x < math.inf,
    )
    require("exploration_noise exploration_noise_end weight_decay", "0 or more and finite", lambda x: 0 <= x < math.inf)
    require("gamma", "between 0 and 1", lambda x: 0 <= x <= 1)
    require("tau exploration_fraction", "above 0 and at most 1", lambda x: 0 < x <= 1)
    require("target_return", "finite", math.isfinite)
    require("env_kwargs", "a JSON object", lambda kwargs: isinstance(kwargs, dict))
    require("seed", "between 0 and 4294967295", lambda seed: 0 <= seed < 2**32)
    require("exp_name", "letters, digits and any of . _ + -", lambda name: re.fullmatch(r"[\w.+-]+", name))
    require("learning_starts", f"less than --total-timesteps {args.total_timesteps}", lambda n: n < args.total_timesteps)
    require("buffer_size", f"at least --batch-size {args.batch_size}", lambda n: n >= args.batch_size)
    require("buffer_size", f"at least --num-envs {args.num_envs}", lambda n: n >= args.num_envs)
    require("target_return", "left out with --eval-frequency 0", lambda _: args.eval_frequency > 0)
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UsageError("--track True: needs Weights and Biases, install it with: pip install wandb") from None


def available_memory(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes this process may still take: what the machine has left or, if that is less, what its container has."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError):  # not Linux
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, limit, usage = cgroups, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):  # a limit holds for all groups below it
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                    left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                    available = min(available, left)
    return available


def check_environment(args: Args) -> None:
    """Build the environment once and throw it away, to find what does not fit before a run folder is made.

    Raises:
        UsageError: if it does not exist, has other spaces than DDPG can take, cannot be filmed, or if its replay
            buffer does not fit in memory.
    """
    try:
        env = make_env(args, render=args.capture_video)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        kwargs = f" --env-kwargs {json.dumps(args.env_kwargs)}" if args.env_kwargs else ""
        raise UsageError(f"--env-id {args.env_id}{kwargs}: {error}") from error
    try:
        obs_space, action_space = env.observation_space, env.action_space
        if not (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1):
            raise UsageError(f"--env-id {args.env_id}: its actions are {action_space}, DDPG needs a flat Box")
        if not action_space.is_bounded():
            raise UsageError(f"--env-id {args.env_id}: its actions are {action_space}, DDPG needs finite bounds")
        if not (isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1):
            raise UsageError(f"--env-id {args.env_id}: its observations are {obs_space}, this script needs a flat Box")
        # Two observations, an action, a reward and a termination: float32 each.
        needed = args.buffer_size * 4 * (2 * obs_space.shape[0] + action_space.shape[0] + 2)
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


def make_env(
    args: Args, index: int = 0, render: bool = False, video_folder: Path | None = None, video_name: str = ""
) -> gym.Env:
    """The `index`-th environment, with float32 observations; films its 0th and then every 20th episode if told where."""
    render = render or video_folder is not None
    if render and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # without a display MuJoCo's default, GLFW, cannot render
    with contextlib.suppress(ImportError):
        import mujoco  # after MUJOCO_GL is set: it is read here

        # By default MuJoCo also appends its warnings to a MUJOCO_LOG.TXT in the working directory.
        mujoco.set_mju_user_warning(lambda message: warnings.warn(f"MuJoCo: {message}", stacklevel=2))
    render_mode = "rgb_array" if render else None
    env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, render_mode=render_mode, **args.env_kwargs)
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

    Simulators can neither be pickled nor copied whole, but they are deterministic: the generator's state from before a
    reset, given in that reset's info as "start", and the actions since lead to the same state bit for bit.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index = index

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        start = {"seed": seed} if seed is not None else {"generator": self.unwrapped.np_random.bit_generator.state}
        obs, _ = self.env.reset(seed=seed, options=options)
        return obs, {"start": json.dumps(start, default=np.ndarray.tolist)}  # a string: it travels through vector infos

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


class RecordRunningEpisodes(gym.vector.VectorWrapper):
    """Keeps in `episodes` what `ReplayableEnv.replay` needs: for each environment its start and its actions since."""

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        self.episodes = [{"start": start, "actions": []} for start in infos["start"]]
        return obs, infos

    def step(self, actions):
        step = self.env.step(actions)
        infos = step[-1]
        for episode, action in zip(self.episodes, actions, strict=True):
            episode["actions"].append(action)
        for index in np.flatnonzero(infos.get("_start", ())):
            self.episodes[index] = {"start": infos["start"][index], "actions": []}
        return step

    def replay(self, episodes: list[dict[str, Any]]) -> np.ndarray:
        """Play the episodes again and return the (N, O) observations they lead to."""
        self.episodes = episodes
        return np.stack(self.env.call("replay", episodes))


class WorkerEnvs(AsyncVectorEnv):
    """Asynchronous environments that notice when one of their processes dies or hangs, and whose processes leave with us.

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
        for process in self.processes:  # one that hangs would not hear a polite request
            process.kill()
            process.join()


def in_worker(env_fn: Callable[[], gym.Env]) -> gym.Env:
    """Make an environment; in a process of its own, have that leave with the main one and leave signals to it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        for name in STOP_SIGNALS + SAVE_SIGNALS:
            signal.signal(name, signal.SIG_IGN)  # Ctrl-C and schedulers signal the whole group

        def leave_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=leave_with_parent, daemon=True).start()
    return env_fn()


def make_envs(args: Args, run_name: str, video_name: str = "training") -> gym.vector.VectorEnv:
    """The training environments: `num_envs` of them, stepped together, with episode statistics in `infos`.

    An environment whose episode ends is reset within the same step: `obs` is then the first observation of the next
    episode and `infos["final_obs"]` holds the last one of the ended episode. (Gymnasium's default, a reset at the
    next step, would put a transition that never happened into the replay buffer after each episode.)
    """
    video_folder = Path("videos", run_name) if args.capture_video else None
    env_fns = [
        partial(make_env, args, index, video_folder=video_folder if index == 0 else None, video_name=video_name)
        for index in range(args.num_envs)
    ]
    if args.vectorization == "async":
        envs = WorkerEnvs(env_fns, args.worker_timeout, autoreset_mode=AutoresetMode.SAME_STEP)
    else:
        envs = SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(RecordRunningEpisodes(envs))


def hidden_layers(inputs: int, args: Args) -> nn.Sequential:
    """The hidden layers that `args` asks for: (N, inputs) to (N, last of hidden_sizes)."""
    layers: list[nn.Module] = []
    for units in args.hidden_sizes:
        layers += [nn.Linear(inputs, units), NORMALIZATIONS[args.normalization](units), ACTIVATIONS[args.activation]()]
        inputs = units
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))  # which costs a call


class Critic(nn.Module):
    """Q(s, a): (N, O) observations and (N, A) actions to (N,) values."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0] + action_space.shape[0], args)
        self.q_value = nn.Linear(args.hidden_sizes[-1], 1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = self.hidden(torch.cat([obs, action], dim=1))
        return self.q_value(x).squeeze(-1)  # (N,), as rewards are: (N, 1) would broadcast to (N, N) in the TD error


class Actor(nn.Module):
    """mu(s): (N, O) observations to (N, A) actions inside the bounds of the action space."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0], args)
        self.mu = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        low, high = action_space.low.astype(np.float32), action_space.high.astype(np.float32)
        bias, scale = high / 2 + low / 2, high / 2 - low / 2
        outside = (bias + scale > high) | (bias - scale < low)  # by rounding, one float at most
        scale = np.where(outside, scale - np.spacing(np.maximum(abs(low), abs(high))), scale)
        self.register_buffer("action_scale", torch.from_numpy(scale))
        self.register_buffer("action_bias", torch.from_numpy(bias))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mu(self.hidden(obs))) * self.action_scale + self.action_bias


class DDPG:
    """The agent: an actor, a critic, a slowly moving target copy of each, and an optimiser for the first two.

    Args:
        observation_space, action_space: of one environment.
        args: the hyperparameters.
        device: where the networks live and learn.
    """

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args, device: torch.device):
        self.args, self.device = args, device
        # In evaluation mode, where batch normalisation uses its running statistics, except for their own gradients.
        self.actor = Actor(observation_space, action_space, args).to(device).eval()
        self.critic = Critic(observation_space, action_space, args).to(device).eval()
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        capturable = device.type == "cuda"  # the optimisers count their steps where a graph can count them
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True, capturable=capturable)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_learning_rate or args.learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_learning_rate or args.learning_rate)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What a saved model consists of."""
        return {name: getattr(self, name) for name in ("actor", "critic", "target_actor", "target_critic")}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    def state_dict(self) -> dict[str, Any]:
        """All that the agent is: its networks and its optimisers."""
        parts = {"networks": self.networks, "optimizers": self.optimizers}
        return {kind: {name: part.state_dict() for name, part in members.items()} for kind, members in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` described."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            own = optimizer.state_dict()["param_groups"]  # the learning rate and the device's options are the arguments'
            optimizer.load_state_dict({"state": state["optimizers"][name]["state"], "param_groups": own})

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The greedy actions, without noise: (N, O) observations to (N, A) float32 actions."""
        return self.policy(torch.as_tensor(obs, device=self.device)).cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        """What `act` does, on the device; only an `update` with `update_actor` changes it."""
        return self.actor(obs)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """What the critic expects of acting greedily, Q(s, mu(s)): (N, O) observations to (N,) values."""
        obs = torch.as_tensor(obs, device=self.device)
        return self.critic(obs, self.actor(obs)).cpu().numpy()

    def critic_loss(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of the TD errors (Lillicrap et al., equation 4) of a batch, and the (B,) values Q(s, a).

        `batch.dones` marks terminations only: an episode that a time limit cut off had a future, so its last
        transition bootstraps like any other.
        """
        with torch.no_grad():
            next_actions = self.target_actor(batch.next_observations)
            next_q_values = self.target_critic(batch.next_observations, next_actions)
            td_target = batch.rewards.flatten() + self.args.gamma * (1 - batch.dones.flatten()) * next_q_values
        q_values = self.critic(batch.observations, batch.actions)
        return CRITIC_LOSSES[self.args.critic_loss](q_values, td_target), q_values

    def actor_loss(self, batch) -> torch.Tensor:
        """Minus the mean of Q(s, mu(s)): its gradient is the deterministic policy gradient (equation 6)."""
        return -self.critic(batch.observations, self.actor(batch.observations)).mean()

    def batch_mode(self, network: nn.Module, on: bool) -> None:
        """Have batch normalisation use the statistics of the batch, or the running ones (no other layer heeds this)."""
        if self.args.normalization == "batch":
            network.train(on)

    def update(self, batch, update_actor: bool) -> dict[str, torch.Tensor]:
        """One step of the critic and, if asked, one of the actor and of both target networks.

        Returns:
            detached scalars, still on the device: q_loss, q_est and, with `update_actor`, actor_loss.
        """
        self.batch_mode(self.critic, True)
        q_loss, q_values = self.critic_loss(batch)
        self.batch_mode(self.critic, False)
        self.descend(q_loss, self.critic_optimizer)
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if update_actor:
            self.batch_mode(self.actor, True)
            actor_loss = self.actor_loss(batch)
            self.batch_mode(self.actor, False)
            self.descend(actor_loss, self.actor_optimizer)
            self.update_targets()
            losses["actor_loss"] = actor_loss.detach()
        return losses

    def descend(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step down the gradient of a loss by the parameters of this optimiser; nothing is spent on those of others."""
        parameters = optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            parameter.grad = gradient
        optimizer.step()

    @torch.no_grad()
    def update_targets(self) -> None:
        """Polyak averaging, target <- (1 - tau) target + tau online; running statistics are copied."""
        for online, target in ((self.actor, self.target_actor), (self.critic, self.target_critic)):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)
            if self.args.normalization == "batch":
                for target_buffer, buffer in zip(target.buffers(), online.buffers(), strict=True):
                    target_buffer.copy_(buffer)


class ReplayBuffer(buffers.ReplayBuffer):
    """stable-baselines3's replay buffer with the parts of a transition side by side: a batch is one gather and one copy.

    `transitions` is (buffer_size // n_envs, n_envs, 2 O + A + 2) float32; `observations`, `actions`, `next_observations`,
    `dones` and `rewards` are views of it. On a CUDA device a sample overwrites the one before, of the same size: captured
    graphs read their input in one place. Samples hold `dones` as they were stored: the caller stores terminations alone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.widths = [*self.obs_shape, self.action_dim, *self.obs_shape, 1, 1]
        self.transitions = np.zeros((self.buffer_size, self.n_envs, sum(self.widths)), np.float32)
        parts = np.split(self.transitions, np.cumsum(self.widths)[:-1], axis=2)
        self.observations, self.actions, self.next_observations, self.dones, self.rewards = parts
        self.dones, self.rewards = self.dones[..., 0], self.rewards[..., 0]
        self.batch = torch.empty(0, 0)

    def blank(self, batch_size: int) -> ReplayBufferSamples:
        """A sample of zeros; on a CUDA device, in the place where all samples of this size will be."""
        self.batch = torch.zeros(batch_size, sum(self.widths), device=self.device)
        return ReplayBufferSamples(*self.batch.split(self.widths, dim=1))

    def _get_samples(self, batch_inds: np.ndarray, env: None = None) -> ReplayBufferSamples:
        env_inds = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
        rows = self.transitions.reshape(-1, sum(self.widths))
        batch = torch.from_numpy(np.take(rows, batch_inds * self.n_envs + env_inds, axis=0))
        if self.device.type == "cuda":
            if len(self.batch) != len(batch):
                self.blank(len(batch))
            batch = self.batch.copy_(batch.pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
        return ReplayBufferSamples(*batch.split(self.widths, dim=1))


# Acceleration: eager code is the specification; this is the one place that makes something faster of it.


def accelerate(agent, args: Args, batch: ReplayBufferSamples) -> None:
    """Put fast versions of `agent.update` and `agent.act` in their place, as `--accelerate` asks; the maths is the same.

    Building them trains nothing. What cannot be built stays eager, and a line says why. From then on
    `agent.load_state_dict` fills the tensors that are there, because the fast versions refer to those.

    Args:
        agent: has what DDPG has of `update`, `policy`, `optimizers` and `state_dict`.
        batch: of the shape of those to come; for captured graphs, also in their place.
    """
    auto = "cudagraph" if agent.device.type == "cuda" else "eager"
    mode = auto if args.accelerate == "auto" else args.accelerate
    if mode == "eager":
        return
    before, start_time = copy.deepcopy(agent.state_dict()), time.perf_counter()
    try:
        with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
            for update_actor in (True, False):
                agent.update(batch, update_actor)  # has the optimisers make their state
            {"compile": compile_agent, "cudagraph": capture_agent}[mode](agent, batch)
            for num_envs in {args.num_envs, 1}:  # training's and evaluation's
                agent.act(np.zeros((num_envs, batch.observations.shape[1]), np.float32))
        agent.load_state_dict = partial(restore, agent)
        print(f"--accelerate {mode}: built in {time.perf_counter() - start_time:.1f} seconds")
    except Exception as error:  # no compiler, no device, an operation that cannot be captured: there are many types
        for name in ("update", "act", "policy"):
            vars(agent).pop(name, None)  # uncovers the class's own
        reason = next(iter(str(error).splitlines()), repr(error))
        print(f"--accelerate {mode} does not work here ({reason}), training goes on in eager mode")
    finally:
        restore(agent, before)


def restore(agent, state: dict[str, Any]) -> None:
    """What `agent.load_state_dict` does, with each tensor left in its place."""
    fill(agent.state_dict(), state)
    if agent.device.type == "cuda":
        torch.cuda.synchronize()  # a captured `act` reads on a stream of its own


@torch.no_grad()
def fill(tensors: dict[Any, Any], values: dict[Any, Any]) -> None:
    """Copy nested values into nested tensors; for none at all (an optimiser's state before its first step), zeros."""
    for name, tensor in tensors.items():
        if isinstance(tensor, dict):
            fill(tensor, values[name] if values else {})
        elif isinstance(tensor, torch.Tensor):
            tensor.copy_(values[name] if values else torch.zeros_like(tensor))


def compile_agent(agent, batch: ReplayBufferSamples) -> None:
    """`update` as two compiled functions, with and without the actor, and `policy` as one for each number of observations."""
    eager_update, eager_policy, updates = agent.update, agent.policy, {}
    for optimizer in agent.optimizers.values():
        optimizer.step = partial(adamw_step, optimizer)  # its own is one kernel, which nothing can be fused with
    try:
        for update_actor in (True, False):
            updates[update_actor] = compile_function(
                lambda *parts, flag=update_actor: eager_update(ReplayBufferSamples(*parts), flag), batch[:5]
            )
    finally:
        for optimizer in agent.optimizers.values():
            del optimizer.step

    @cache
    def policy_for(shape: torch.Size) -> Callable:
        return compile_function(lambda obs: eager_policy(obs), (torch.zeros(shape, device=agent.device),))

    agent.update = lambda new_batch, update_actor: updates[update_actor](*new_batch[:5])
    agent.policy = lambda obs: policy_for(obs.shape)(obs)


def compile_function(function: Callable, inputs: tuple[torch.Tensor, ...]) -> Callable:
    """A function compiled for inputs laid out like these; the other tensors it reads and writes stay where they are.

    Unlike `torch.compile`, whose checks before each call take a tenth of a millisecond, this records the operations once
    and for all: what `function` decides in Python stays decided.
    """
    graph = make_fx(function)(*inputs)  # the other tensors are its parameters and buffers
    for node in graph.graph.nodes:
        node.meta.clear()  # shapes recorded one by one, which the compiler wants to find out together
    with torch.no_grad():
        return torch._inductor.compile(graph, list(inputs), options={"cpp_wrapper": True})


@torch.no_grad()
def adamw_step(optimizer: torch.optim.AdamW) -> None:
    """What `optimizer.step()` does (Loshchilov and Hutter, 2019, algorithm 2), in operations that a compiler can fuse."""
    (group,) = optimizer.param_groups
    (beta1, beta2), lr = group["betas"], group["lr"]
    steps = [state["step"].add_(1) for state in optimizer.state.values()]
    step = steps[0].double()  # float32 would leave four digits of 1 - beta2**step
    step_size, correction = (lr / (1 - beta1**step)).float(), (1 - beta2**step).sqrt().float()
    for parameter, state in optimizer.state.items():
        exp_avg = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / correction + group["eps"]))


def capture_agent(agent, batch: ReplayBufferSamples) -> None:
    """`update` as two CUDA graphs, with and without the actor, and `act` as one for each number of observations.

    `act` runs on a stream of its own that waits for the last update of the actor, no more: while the device still trains
    the critic, the environments step.
    """
    eager_update, policy = agent.update, agent.policy
    acting, actor_ready = torch.cuda.Stream(), torch.cuda.Event()
    names, updates = {}, {}
    acting.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(acting):  # cuBLAS and autograd want to be warm before a capture, and not on the default stream
        for update_actor in (True, False) * 3:
            names[update_actor] = tuple(eager_update(batch, update_actor))
    torch.cuda.current_stream().wait_stream(acting)
    for update_actor in names:
        updates[update_actor] = capture(lambda flag=update_actor: torch.stack(tuple(eager_update(batch, flag).values())))
    actor_ready.record()

    def update(new_batch: ReplayBufferSamples, update_actor: bool) -> dict[str, torch.Tensor]:
        for place, values in zip(batch[:5], new_batch[:5], strict=True):
            if place.data_ptr() != values.data_ptr():  # not from our replay buffer, which samples into that place
                place.copy_(values)
        replay, losses = updates[update_actor]
        replay()
        if update_actor:
            actor_ready.record()
        return dict(zip(names[update_actor], losses.clone(), strict=True))  # a clone: the next replay overwrites them

    @cache
    def policy_for(shape: tuple[int, int]) -> tuple[torch.Tensor, Callable[[], None], torch.Tensor]:
        place = torch.zeros(shape, device=agent.device)
        return place, *capture(lambda: policy(place))

    def act(obs: np.ndarray) -> np.ndarray:
        place, replay, actions = policy_for(obs.shape)
        with torch.cuda.stream(acting):
            acting.wait_event(actor_ready)
            place.copy_(torch.from_numpy(obs).pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
            replay()
            return actions.cpu().numpy()  # waits for this stream alone

    agent.update, agent.act = update, act


def capture(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record what `function` has the device do; returns what does it again, and where the result then is."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class Evaluation(NamedTuple):
    """What `evaluate` found, an entry per episode."""

    returns: np.ndarray
    lengths: np.ndarray
    q_bias: float


def evaluate(
    agent, args: Args, episodes: int, seed: int, video_folder: Path | None = None, video_name: str = "evaluation"
) -> Evaluation:
    """Greedy episodes on an environment of their own; the i-th starts from seed `seed + i`.

    Nothing here draws from the random streams of training. `q_bias` is the mean, over all states visited, of the
    critic's value Q(s, mu(s)) minus the discounted return that followed: above zero the critic overestimates. An
    episode cut off by a time limit would have gone on, so there the return is completed with the critic's own value
    of the last observation; close to such an end the two share their error, and q_bias shows less of it.

    Returns:
        undiscounted returns (episodes,), lengths in steps (episodes,) and q_bias.

    Raises:
        TrainingError: if a return is not finite.
    """
    env = make_env(args, video_folder=video_folder, video_name=video_name)
    returns, lengths, q_errors = [], [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        observations, rewards, terminated, truncated = [obs], [], False, False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            observations.append(obs)
            rewards.append(float(reward))
        values = agent.value(np.stack(observations)) / args.reward_scale  # in units of the rewards themselves
        discounted_return = 0.0 if terminated else float(values[-1])
        for value, reward in zip(values[-2::-1], reversed(rewards), strict=True):
            discounted_return = reward + args.gamma * discounted_return
            q_errors.append(value - discounted_return)
        if not math.isfinite(sum(rewards)):
            raise TrainingError(f"evaluation: the return of episode {episode} is not finite")
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    env.close()
    return Evaluation(np.array(returns), np.array(lengths), float(np.mean(q_errors)))


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    from importlib.metadata import version

    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def make_run_folder(args: Args) -> Path:
    """A new folder runs/<env_id>__<exp_name>__<seed>__<time>, shared with no other run of the same second.

    Raises:
        UsageError: if it cannot be made.
    """
    env_name = re.sub(r"[^\w.+-]", "-", args.env_id)  # ids may hold a "/" or a ":"
    stem = f"{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}"
    try:
        Path("runs").mkdir(exist_ok=True)
        for number in range(1_000_000):
            folder = Path("runs", f"{stem}-{number}" if number else stem)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UsageError(f"the run folder runs/{stem} cannot be made: {error.strerror}") from error


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Have `write` fill a new file, and bring it to the disk."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file that takes the place of `path` once it is whole and on the disk, or else not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        write_file(unfinished, write)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_weights(agent) -> None:
    """Raise a TrainingError if a weight is not finite, before anything good is written over."""
    for name, network in agent.networks.items():
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise TrainingError(f"the weights of {name} are not finite: the models saved before are kept")


def save_model(agent, path: Path) -> None:
    """Write the networks so that a reader finds the old file or the whole new one, never a part.

    Raises:
        TrainingError: if a weight is not finite; the file stays as it was.
    """
    check_weights(agent)
    saved = {name: network.state_dict() for name, network in agent.networks.items()}
    replace_file(path, partial(torch.save, saved))


def load_model(agent, path: Path) -> None:
    """Load what `save_model` wrote; `weights_only` keeps a forged file from running code.

    Raises:
        UsageError: if the file is damaged or of other networks than the agent's.
    """
    try:
        # By way of the host, whose copies are waited for: a captured `act` reads the networks on a stream of its own.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, network in agent.networks.items():
            network.load_state_dict(saved[name])
    except Exception as error:  # zip, pickle, key and shape errors, by where the damage is
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a whole model of this environment and network size ({reason})") from error


def final_evaluation(agent, args: Args, run_dir: Path) -> Evaluation:
    """Evaluate the run's best model (its latest if none was kept) on fresh starts, print and file the result."""
    models = [path for path in (run_dir / "best_model.pt", run_dir / "model.pt") if path.exists()]
    if models:
        load_model(agent, models[0])
    number = next(n for n in range(1, 1_000_000) if not (run_dir / f"evaluation{f'-{n}' if n > 1 else ''}.json").exists())
    name = f"evaluation-{number}" if number > 1 else "evaluation"  # a result is never overwritten
    video_folder = Path("videos", run_dir.name) if args.capture_video else None
    evaluation = evaluate(agent, args, FINAL_EVALUATION_EPISODES, FINAL_EVALUATION_SEED, video_folder, name)
    mean, std = evaluation.returns.mean(), evaluation.returns.std()
    result = {
        "env_id": args.env_id,
        "mean": mean,
        "std": std,
        "episodes": FINAL_EVALUATION_EPISODES,
        "seeds": list(range(FINAL_EVALUATION_SEED, FINAL_EVALUATION_SEED + FINAL_EVALUATION_EPISODES)),
        "returns": evaluation.returns.tolist(),
        "lengths": evaluation.lengths.tolist(),
        "q_bias": evaluation.q_bias,
        "model": models[0].name if models else None,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }
    replace_file(run_dir / f"{name}.json", lambda file: file.write(json.dumps(result, indent=2).encode() + b"\n"))
    tqdm.write(
        f"final evaluation: {mean:.1f} +- {std:.1f} over {FINAL_EVALUATION_EPISODES} episodes of {args.env_id} "
        f"({models[0].name if models else 'latest networks'}), written to {run_dir / name}.json"
    )
    return evaluation


def set_up_torch(args: Args) -> torch.device:
    """Set the process's threads, precision and determinism; returns the device, and says so if the CUDA device asked for
    does not exist."""
    torch.set_num_threads(args.num_threads or min(2, torch.get_num_threads()))
    torch.set_float32_matmul_precision(args.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for the next line
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs, and nothing here reads memory it did not write
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found, using the CPU")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


class DiskGuard:
    """Calls functions that write files; a full disk is a warning, the third time in a row for one file the end of the run.

    Raises:
        TrainingError: at that third time.
    """

    def __init__(self) -> None:
        self.failures: dict[Path, int] = defaultdict(int)

    def __call__(self, path: Path, write: Callable, *values: Any) -> None:
        try:
            write(*values)
            self.failures[path] = 0
        except OSError as error:
            self.failures[path] += 1
            tqdm.write(f"warning: {path} could not be written ({error.strerror or error})")
            if self.failures[path] == WRITE_ATTEMPTS:
                raise TrainingError(f"{path} could not be written {WRITE_ATTEMPTS} times in a row: {error}") from error


class EventWriter(SummaryWriter):
    """TensorBoard's writer, which goes on with a new file where the disk was full, and reports what it could not write.

    Args:
        run_dir: the run's folder.
        global_step: events after this step, of a process that was killed, are superseded.
        guard: counts the failures.
    """

    def __init__(self, run_dir: Path, global_step: int, guard: DiskGuard):
        self.guard = guard
        # TensorBoard's thread raises what it could not write a second time, in the main thread: here.
        excepthook = threading.excepthook
        threading.excepthook = lambda failure: issubclass(failure.exc_type, OSError) or excepthook(failure)
        # A purge step also at the start of a run: without one, readers ignore those of later event files.
        super().__init__(run_dir, purge_step=global_step + 1)

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.guard(Path(self.log_dir, "events.out.tfevents"), self._add_scalar, tag, value, global_step)

    def _add_scalar(self, *event) -> None:
        try:
            super().add_scalar(*event)
        except OSError:
            self.file_writer = self.all_writers = self.purge_step = None  # the next event opens a new file
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def settings_of(args: Args, device: torch.device) -> dict[str, Any]:
    """What a run depends on, in plain values: its arguments, the versions and the device."""
    values = dataclasses.asdict(dataclasses.replace(args, resume=None, evaluate=None))
    return {"args": values, "versions": versions(), "device": str(device)}


def start_run(args: Args, run_dir: Path, device: torch.device) -> filelock.BaseFileLock:
    """Take the run's folder for this process, write its args.json and, with --track, start Weights and Biases.

    Returns:
        the lock that keeps other processes out for as long as this one lives.

    Raises:
        UsageError: if another process has the folder, or Weights and Biases does not start.
    """
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"--resume {run_dir}: another process is training this run") from None
    if args.track:
        import wandb

        try:
            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                id=run_dir.name,
                resume="allow",
                config=dataclasses.asdict(args),
                sync_tensorboard=True,  # patches TensorBoard's writer, so it comes before our writer is made
                save_code=True,
            )
        except wandb.Error as error:
            if args.resume is None:
                shutil.rmtree(run_dir)
            raise UsageError(f"--track True: Weights and Biases did not start: {error}") from error
    settings = json.dumps(settings_of(args, device), indent=2).encode() + b"\n"
    replace_file(run_dir / "args.json", lambda file: file.write(settings))
    print(f"training on {args.env_id} ({device}), the run's folder is {run_dir}")
    return lock


def log_evaluation(evaluation: Evaluation, global_step: int, evaluations: list[dict[str, float]], writer: EventWriter) -> None:
    """Report an evaluation on the screen and in TensorBoard, and add its row to `evaluations`."""
    returns, lengths, q_bias = evaluation
    mean, std, length = float(returns.mean()), float(returns.std()), float(lengths.mean())
    row = {"global_step": global_step, "mean": mean, "std": std, "min": float(returns.min()), "max": float(returns.max())}
    evaluations.append(row | {"length": length, "q_bias": q_bias})
    writer.add_scalar("eval/episodic_return", mean, global_step)
    writer.add_scalar("eval/episodic_return_std", std, global_step)
    writer.add_scalar("eval/episodic_length", length, global_step)
    writer.add_scalar("eval/q_bias", q_bias, global_step)
    tqdm.write(
        f"step {global_step}: evaluation {mean:.1f} +- {std:.1f} over {len(returns)} episodes "
        f"of mean length {length:.0f}, q_bias {q_bias:+.2f}"
    )


def write_evaluations(evaluations: list[dict[str, float]], path: Path) -> None:
    """Write evaluations.csv, a row per evaluation."""
    text = io.StringIO()
    table = csv.DictWriter(text, ("global_step", "mean", "std", "min", "max", "length", "q_bias"))
    table.writeheader()
    table.writerows(evaluations)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


# Checkpoints: a folder for each, checkpoints/<global_step>/, with state.pt, the transitions replayed and a manifest.


def manifest_of(folder: Path) -> bytes:
    """The manifest of a checkpoint as its files are now: their sizes and SHA-256 sums."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            with open(path, "rb") as file:
                sums[path.name] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return json.dumps(sums, indent=2).encode()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is as it was written, to the byte."""
    try:
        return (checkpoint / "manifest.json").read_bytes() == manifest_of(checkpoint)
    except OSError:
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the newest first."""
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def save_checkpoint(folder: Path, keep: int, progress: dict[str, Any], agent, rb: ReplayBuffer, envs, noise) -> None:
    """Write all that makes the next step what it is; then, and only then, remove checkpoints older than the last `keep`.

    `progress` is what the training loop itself counts. The checkpoint is written in a folder beside its place, brought
    to the disk, and renamed into its place: a crash at any moment leaves the old ones whole and at most this one missing.

    Raises:
        OSError: if it cannot be written; what was written of it is removed.
        TrainingError: if a weight is not finite.
    """
    check_weights(agent)
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()
    state = {
        "progress": progress,
        "agent": agent.state_dict(),
        "python_random": random.getstate(),
        "numpy_random": [numpy_name, torch.from_numpy(numpy_keys.astype(np.int64)), *numpy_rest],
        "torch_random": torch.get_rng_state(),
        "action_space": envs.action_space.np_random.bit_generator.state,
        "noise": [torch.from_numpy(np.array(getattr(process, "noise_prev", 0.0))) for process in noise.noises],
        "episodes": [
            {"start": episode["start"], "actions": torch.from_numpy(np.array(episode["actions"], np.float32))}
            for episode in envs.env.episodes
        ],
        "episode_returns": torch.from_numpy(envs.episode_returns),
        "episode_lengths": torch.from_numpy(envs.episode_lengths),
        "replay": {"pos": rb.pos, "full": rb.full},
    }
    transitions = rb.transitions[: rb.size()]
    writers = {"state.pt": partial(torch.save, state), "transitions.npy": partial(write_array, transitions)}

    place = folder / f"{progress['global_step']:012d}"
    if is_whole(place):  # resumed here, and stopped again before a step
        return
    unfinished = folder / f"{place.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, write in writers.items():
            write_file(unfinished / name, write)
        manifest = manifest_of(unfinished)
        write_file(unfinished / "manifest.json", lambda file: file.write(manifest))
        sync_folder(unfinished)
        if place.exists():  # damaged: nothing is deleted, so it makes room
            place.rename(folder / f"{place.name}.damaged-{time.time_ns()}")
        unfinished.rename(place)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    older = [path for path in list_checkpoints(folder) if path.name < place.name]  # a newer one can only be damaged
    for old in older[keep - 1 :]:
        shutil.rmtree(old)


def write_array(array: np.ndarray, file: BinaryIO) -> None:
    """Write an array that holds no objects."""
    np.save(file, array, allow_pickle=False)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest whole checkpoint in a folder; None if there is none at all.

    Neither tensors nor arrays are read in a way that could run code, and nothing is deleted.

    Raises:
        UsageError: if there are some and each is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for place in checkpoints:
        try:
            if not is_whole(place):
                raise ValueError("its files are not as they were written")
            state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
            # Mapped: a second array of that size might not fit beside the replay buffer.
            return state | {"transitions": np.load(place / "transitions.npy", mmap_mode="r", allow_pickle=False)}
        except Exception as error:  # forged files fail in as many ways as there are
            print(f"checkpoint {place} is damaged and passed over ({' '.join(str(error).split())[:100]})")
    if checkpoints:
        raise UsageError(f"--resume {folder.parent}: must hold a whole checkpoint, and all of them are damaged")
    return None


def load_checkpoint(state: dict[str, Any], agent, rb: ReplayBuffer, envs, noise) -> dict[str, Any]:
    """Put back what `save_checkpoint` wrote, environments in the middle of their episodes included.

    An environment that does not come back to the same observation starts a new episode; the old one counts as cut off.

    Returns:
        `progress`.
    """
    agent.load_state_dict(state["agent"])
    random.setstate(state["python_random"])
    numpy_name, numpy_keys, *numpy_rest = state["numpy_random"]
    np.random.set_state((numpy_name, numpy_keys.numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(state["torch_random"])
    envs.action_space.np_random.bit_generator.state = state["action_space"]
    for process, value in zip(noise.noises, state["noise"], strict=True):
        process.noise_prev = value.numpy()
    rb.transitions[: len(state["transitions"])] = state["transitions"]
    rb.pos, rb.full = state["replay"]["pos"], state["replay"]["full"]

    progress = state["progress"]
    obs = progress["obs"].numpy()
    episodes = [{"start": episode["start"], "actions": list(episode["actions"].numpy())} for episode in state["episodes"]]
    envs.reset()
    same = (envs.env.replay(episodes) == obs).all(axis=1)
    if not same.all():
        fresh_obs, infos = envs.reset(options={"reset_mask": ~same})
        obs, envs.env.episodes = np.where(same[:, None], obs, fresh_obs), episodes
        for index in np.flatnonzero(~same):
            print(f"environment {index} did not come back as it was: its episode is cut off here and a new one starts")
            episodes[index] = {"start": infos["start"][index], "actions": []}
            noise.reset([index])
    envs.episode_returns[:] = np.where(same, state["episode_returns"].numpy(), 0)
    envs.episode_lengths[:] = np.where(same, state["episode_lengths"].numpy(), 0)
    return progress | {"obs": obs}


class Signals:
    """SIGTERM and SIGINT ask for a stop after the running step, SIGUSR1 and SIGUSR2 for a checkpoint; a second SIGINT exits."""

    def __init__(self) -> None:
        self.stop = self.save = 0

    def __enter__(self) -> "Signals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS + SAVE_SIGNALS}
        return self

    def receive(self, number: int, frame) -> None:
        if number in SAVE_SIGNALS:
            self.save = number
            return
        if self.stop == number == signal.SIGINT:  # schedulers send SIGTERM twice, only a person is impatient
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(128 + number)
        self.stop = self.stop or number

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


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


def check_losses(global_step: int, losses: dict[str, list[torch.Tensor]]) -> None:
    """Stop at a loss that is not finite, also one that the next update hid again.

    Raises:
        TrainingError: naming the step up to which it happened and the loss.
    """
    for name, values in losses.items():
        if not torch.stack(values).isfinite().all():
            raise TrainingError(f"step {global_step}: {name} is not finite")


def exploration_noise(args: Args, global_step: int) -> float:
    """The noise at a step, in units of half the action range: constant, or decaying linearly and then constant."""
    if args.exploration_noise_end is None:
        return args.exploration_noise
    progress = min(1.0, global_step / (args.exploration_fraction * args.total_timesteps))
    return args.exploration_noise + progress * (args.exploration_noise_end - args.exploration_noise)


def crossed(every: int, step: int, global_step: int) -> bool:
    """Whether a multiple of `every` lies in (step, global_step]; never if `every` is 0."""
    return every > 0 and global_step // every > step // every


def train(args: Args, agent_class: type = DDPG) -> Path:
    """Train an agent (algorithm 1 of Lillicrap et al., 2016), then evaluate the best of it.

    Args:
        args: the arguments of the run.
        agent_class: called as `agent_class(observation_space, action_space, args, device)`; has `act`, `value`,
            `update`, `networks`, `state_dict` and `load_state_dict` as DDPG has, and for --accelerate what that asks for.

    Returns:
        the run folder.

    Raises:
        UsageError: before anything is created, if the arguments or the environment do not fit.
        TrainingError: if an action, an observation, a reward, a loss or a weight is not finite, if the disk stays full,
            or if a process of the asynchronous environments fails.
        Stopped: after a checkpoint, if a signal asked for it.
    """
    check_args(args)
    check_environment(args)
    device = set_up_torch(args)
    run_dir = args.resume or make_run_folder(args)
    checkpoint = read_checkpoint(run_dir / "checkpoints") if args.resume else None
    lock = start_run(args, run_dir, device)
    global_step = checkpoint["progress"]["global_step"] if checkpoint else 0

    random.seed(args.seed)
    np.random.seed(args.seed)  # the generator that stable-baselines3's noise and replay buffer draw from
    torch.manual_seed(args.seed)
    guard = DiskGuard()
    video_name = f"training-resumed-{int(time.time())}" if args.resume else "training"
    with (
        lock,
        Signals() as signals,
        contextlib.closing(make_envs(args, run_dir.name, video_name)) as envs,
        contextlib.closing(EventWriter(run_dir, global_step, guard)) as writer,
        tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, disable=None) as progress_bar,
    ):
        if checkpoint is None:
            table = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        observation_space, action_space = envs.single_observation_space, envs.single_action_space
        envs.action_space.seed(args.seed)
        agent = agent_class(observation_space, action_space, args, device)
        rb = ReplayBuffer(
            args.buffer_size,
            observation_space,
            action_space,
            device,
            n_envs=args.num_envs,
            handle_timeout_termination=False,  # we store the termination alone: a time limit is no terminal state
        )
        unit_noise = NOISES[args.noise](np.zeros(action_space.shape), np.ones(action_space.shape))
        noise = VectorizedActionNoise(unit_noise, args.num_envs)
        half_range = (action_space.high - action_space.low) / 2

        settings = settings_of(args, device)
        updates, trained_step, elapsed = 0, args.learning_starts, 0.0
        evaluations: list[dict[str, float]] = []
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # since the last row in TensorBoard, on the device
        finished = False
        if checkpoint is None:
            obs, _ = envs.reset(seed=args.seed)
            check_finite(global_step, observation=obs)
        else:
            progress = load_checkpoint(checkpoint, agent, rb, envs, noise)
            obs, updates, trained_step = progress["obs"], progress["updates"], progress["trained_step"]
            evaluations, elapsed = progress["evaluations"], progress["elapsed"]
            losses |= {name: list(values.to(device)) for name, values in progress["losses"].items()}
            finished = progress["target_reached"] or global_step >= args.total_timesteps
            print(f"resumed at step {global_step}")
            if progress["settings"]["versions"] != settings["versions"]:
                print(f"with other versions than {progress['settings']['versions']}: the result may differ")
        if not finished:
            accelerate(agent, args, rb.blank(args.batch_size))
        status = {"return": "-", "evaluation": f"{evaluations[-1]['mean']:.1f}" if evaluations else "-"}
        checkpoint, start_time = None, time.perf_counter() - elapsed
        start_step = log_step = global_step
        log_time = time.perf_counter()

        def save() -> None:
            writer.flush()
            progress = {
                "global_step": global_step,
                "updates": updates,
                "trained_step": trained_step,
                "obs": torch.from_numpy(obs),
                "losses": {name: torch.stack(values).cpu() for name, values in losses.items()},
                "evaluations": evaluations,
                "target_reached": finished and global_step < args.total_timesteps,
                "elapsed": time.perf_counter() - start_time,
                "settings": settings,
            }
            save_checkpoint(run_dir / "checkpoints", args.keep_checkpoints, progress, agent, rb, envs, noise)

        while not finished:
            # Act: uniformly random at first, then the actor's action plus noise, within the bounds.
            if global_step < args.learning_starts:
                actions = envs.action_space.sample().astype(np.float32)
            else:
                exploration = exploration_noise(args, global_step) * half_range * noise()
                actions = np.clip(agent.act(obs) + exploration, action_space.low, action_space.high)
            check_finite(global_step, action=actions)  # MuJoCo would take a NaN for a zero
            try:
                next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            except WorkerError:
                guard(run_dir / "checkpoints", save)
                raise
            last_step, global_step = global_step, global_step + args.num_envs

            # Store the transition with its true successor: next_obs of an ended episode is the next one's first.
            real_next_obs = next_obs
            if "final_obs" in infos:
                ended = infos["_final_obs"]
                real_next_obs = next_obs.copy()
                real_next_obs[ended] = np.stack(infos["final_obs"][ended])
            check_finite(global_step, observation=real_next_obs, reward=rewards)
            rb.add(obs, real_next_obs, actions, rewards * args.reward_scale, terminations, [])
            noise.reset(np.flatnonzero(terminations | truncations))
            obs = next_obs

            # Learn.
            if global_step > args.learning_starts and crossed(args.train_frequency, last_step, global_step):
                for _ in range(args.gradient_steps if args.gradient_steps > 0 else global_step - trained_step):
                    updates += 1
                    batch = rb.sample(args.batch_size)
                    for name, loss in agent.update(batch, update_actor=updates % args.policy_frequency == 0).items():
                        losses[name].append(loss)
                trained_step = global_step

            # Report.
            for index in np.flatnonzero(infos.get("_episode", ())):
                episode_return, episode_length = infos["episode"]["r"][index], infos["episode"]["l"][index]
                writer.add_scalar("charts/episodic_return", episode_return, global_step)
                writer.add_scalar("charts/episodic_length", episode_length, global_step)
                status["return"] = f"{episode_return:.1f}"
                progress_bar.set_postfix(status, refresh=False)
            progress_bar.update(args.num_envs)
            finished = global_step >= args.total_timesteps
            evaluation_due = args.eval_frequency > 0 and (crossed(args.eval_frequency, last_step, global_step) or finished)
            save_due = crossed(args.checkpoint_frequency, last_step, global_step) or signals.save or signals.stop
            log_due = crossed(LOG_FREQUENCY, last_step, global_step) or finished
            if log_due or evaluation_due or save_due:
                check_losses(global_step, losses)
            if log_due:
                for name, values in losses.items():
                    writer.add_scalar(f"losses/{name}", values[-1].item(), global_step)
                losses.clear()
                now = time.perf_counter()
                writer.add_scalar("charts/SPS", (global_step - log_step) / (now - log_time), global_step)
                log_step, log_time = global_step, now
            pause = time.perf_counter()  # charts/SPS is the speed of training alone
            if args.save_model and (evaluation_due or finished):
                guard(run_dir / "model.pt", save_model, agent, run_dir / "model.pt")
            if evaluation_due:
                evaluation = evaluate(agent, args, args.eval_episodes, EVALUATION_SEED)
                log_evaluation(evaluation, global_step, evaluations, writer)
                means = [row["mean"] for row in evaluations]
                if args.save_model and means[-1] == max(means):
                    guard(run_dir / "best_model.pt", save_model, agent, run_dir / "best_model.pt")
                guard(run_dir / "evaluations.csv", write_evaluations, evaluations, run_dir / "evaluations.csv")
                status["evaluation"] = f"{means[-1]:.1f}"
                if args.target_return is not None and means[-1] >= args.target_return:
                    tqdm.write(f"step {global_step}: --target-return {args.target_return} is reached, training ends")
                    finished = True
            if save_due or finished:
                guard(run_dir / "checkpoints", save)
                signals.save = 0
            log_time += time.perf_counter() - pause
            if signals.stop:
                tqdm.write(f"stopped at step {global_step}, to go on: python {sys.argv[0]} --resume {run_dir}")
                raise Stopped(signals.stop)

        if global_step > start_step or not (run_dir / "evaluation.json").exists():
            final_evaluation(agent, args, run_dir)
        else:
            goal = "" if progress["target_reached"] else f", a --total-timesteps above {args.total_timesteps} goes on with it"
            print(f"{run_dir} is finished at step {global_step}{goal}")
    if args.track:
        import wandb

        wandb.finish()
    return run_dir


def load_args(run_dir: Path, args_class: type[Args] = Args) -> Args:
    """The arguments a run was started with.

    Raises:
        UsageError: if the folder is not a run's.
    """
    try:
        saved = json.loads((run_dir / "args.json").read_text())["args"]
        names = {field.name for field in dataclasses.fields(args_class)}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return args_class(**{name: value for name, value in values.items() if name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_dir}: must be the folder of a run, with a readable args.json ({error!r})") from None


def parse_saved_args(args_class: type[Args], argv: list[str], flag: str, run_dir: Path, may_change: set[str]) -> Args:
    """The arguments of the saved run that `flag` names, with the changes that the command line makes to them.

    Raises:
        UsageError: for a change that would make it another run, with the saved and the requested value.
    """
    try:
        saved = load_args(run_dir, args_class)
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from None
    args = parse_args(args_class, argv, saved)
    for name in vars(args):
        if name not in may_change and getattr(args, name) != getattr(saved, name):
            change = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"{change}: must be {getattr(saved, name)}, as saved in {run_dir}, or left out")
    return args


def evaluate_run(args: Args, agent_class: type = DDPG) -> Evaluation:
    """Evaluate the saved model of the run `args.evaluate`, as at the end of training."""
    check_args(args)
    check_environment(args)
    if not any((args.evaluate / name).exists() for name in ("best_model.pt", "model.pt")):
        raise UsageError(f"--evaluate {args.evaluate}: must hold a best_model.pt or a model.pt")
    env = make_env(args)
    agent = agent_class(env.observation_space, env.action_space, args, set_up_torch(args))
    env.close()
    return final_evaluation(agent, args, args.evaluate)


def parse_args(args_class: type[Args], argv: list[str], default: Args) -> Args:
    """Parse the command line.

    Raises:
        UsageError: for what tyro refuses, its box of several lines put into one.
    """
    # tyro prints a box of help for each nested dataclass: nest the bases of Args for it, and flatten what comes back.
    groups = [base for base in args_class.__bases__ if dataclasses.is_dataclass(base)]
    values = dataclasses.asdict(default)
    defaults = [base(**{field.name: values[field.name] for field in dataclasses.fields(base)}) for base in groups]
    nested = dataclasses.make_dataclass("Args", [(base.__name__.lower(), base) for base in groups])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = tyro.cli(
                nested,
                args=argv,
                default=nested(*defaults),
                description=args_class.__doc__,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit:
        if exit.code in (0, None):  # --help
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in errors.getvalue().splitlines()[1:]]
        text = " ".join(line for line in lines if line)
        text = text.replace("Argument helptext:", "-- expected").split(" For full helptext")[0]
        raise UsageError(f"{text} (see --help)") from None
    return args_class(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def show_once(showwarning: Callable) -> Callable:
    """A `warnings.showwarning` that shows each text once, however many environments are made.

    Python's own "once" filter forgets what it has shown whenever a library changes the filters.
    """
    shown = set()

    def show(message, category, *where) -> None:
        if (str(message), category) not in shown:
            shown.add((str(message), category))
            showwarning(message, category, *where)

    return show


def main(args_class: type[Args] = Args, agent_class: type = DDPG) -> None:
    """The command line: train, or evaluate a saved run; expected failures become one line on stderr."""
    sys.stdout.reconfigure(line_buffering=True)  # so that `> log` can be followed
    warnings.showwarning = show_once(warnings.showwarning)
    warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")  # that is what make_env wants
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # no: each run has its folder, each video its name
    try:
        args = parse_args(args_class, sys.argv[1:], args_class())
        if args.evaluate and args.resume:
            raise UsageError(f"--evaluate {args.evaluate}: must be left out with --resume {args.resume}")
        if args.evaluate:
            may_change = {"evaluate", "capture_video", "cuda"}
            evaluate_run(parse_saved_args(args_class, sys.argv[1:], "--evaluate", args.evaluate, may_change), agent_class)
        elif args.resume:
            frequencies = {"eval_frequency", "checkpoint_frequency", "keep_checkpoints"}
            may_change = {"resume", "total_timesteps", "track", "capture_video"} | frequencies
            train(parse_saved_args(args_class, sys.argv[1:], "--resume", args.resume, may_change), agent_class)
        else:
            train(args, agent_class)
    except Stopped as stop:
        sys.exit(128 + stop.args[0])
    except (UsageError, TrainingError) as error:
        sys.unraisablehook = lambda _: None  # a renderer that failed to open complains again when it is collected
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
