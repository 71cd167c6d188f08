"""Deep Deterministic Policy Gradient (DDPG) for continuous control, in one file.

Papers: Lillicrap et al., 2016, "Continuous control with deep reinforcement learning", arXiv:1509.02971 (algorithm 1
is `train` and `DDPG.update` below); Silver et al., 2014, "Deterministic policy gradient algorithms"; Fujimoto et
al., 2018, arXiv:1802.09477, for the delayed actor and target updates.

    python ddpg_continuous_action.py --env-id Hopper-v4          # train; everything lands in runs/<run name>/
    tensorboard --logdir runs                                    # watch
    python ddpg_continuous_action.py --evaluate runs/<run name>  # evaluate (and with --capture-video, film) a run
"""

import contextlib
import copy
import csv
import dataclasses
import datetime
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FREQUENCY = 100  # environment steps between two rows of losses in TensorBoard
VIDEO_FREQUENCY = 20  # episodes between two videos
EVALUATION_SEED = 10_000  # first seed of the evaluations while training: the same starts each time, so rows compare
FINAL_EVALUATION_SEED = 20_000  # fresh starts for the reported result: the best model was chosen on the others
FINAL_EVALUATION_EPISODES = 20


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
    """Training cannot go on (a value is not finite): one line on stderr, status 1."""


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
class Args(Experiment, Environment, Learning, Exploration, Networks, Evaluating):
    """Train a DDPG agent, or evaluate a trained one."""


def check_args(args: Args) -> None:
    """Check every argument by itself and against the others, before anything is created.

    Raises:
        UsageError: naming the flag, its value and what is allowed.
    """

    def require(names: str, what: str, allowed: Callable[[Any], bool]) -> None:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not allowed(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be {what}")

    # Each is written so that NaN, which compares false with everything, is refused too.
    counts = "total_timesteps num_envs train_frequency policy_frequency buffer_size batch_size max_episode_steps eval_episodes"
    require(counts, "a whole number, 1 or more", lambda n: n >= 1)
    require("learning_starts eval_frequency", "a whole number, 0 or more", lambda n: n >= 0)
    require("gradient_steps", "a whole number, 1 or more, or -1", lambda n: n >= 1 or n == -1)
    require("hidden_sizes", "one or more whole numbers, each 1 or more", lambda sizes: sizes and min(sizes) >= 1)
    require(
        "learning_rate actor_learning_rate critic_learning_rate reward_scale", "above 0 and finite", lambda x: 0 < x < math.inf
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
        # Two observations, an action, and the reward, termination, timeout of stable-baselines3: float32 each.
        needed = args.buffer_size * 4 * (2 * obs_space.shape[0] + action_space.shape[0] + 3)
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


def make_env(args: Args, render: bool = False, video_folder: Path | None = None, video_name: str = "") -> gym.Env:
    """One environment with float32 observations; into `video_folder` it films its 0th and then every 20th episode."""
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
    if video_folder is not None:
        env = gym.wrappers.RecordVideo(
            env, str(video_folder), lambda episode: episode % VIDEO_FREQUENCY == 0, name_prefix=video_name
        )
    return env


def make_envs(args: Args, run_name: str) -> gym.vector.VectorEnv:
    """The training environments: `num_envs` of them, stepped together, with episode statistics in `infos`.

    An environment whose episode ends is reset within the same step: `obs` is then the first observation of the next
    episode and `infos["final_obs"]` holds the last one of the ended episode. (Gymnasium's default, a reset at the
    next step, would put a transition that never happened into the replay buffer after each episode.)
    """
    video_folder = Path("videos", run_name) if args.capture_video else None
    env_fns = [
        partial(make_env, args, video_folder=video_folder if index == 0 else None, video_name="training")
        for index in range(args.num_envs)
    ]
    vector_env = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[args.vectorization]
    envs = vector_env(env_fns, autoreset_mode=AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def hidden_layers(inputs: int, args: Args) -> nn.Sequential:
    """The hidden layers that `args` asks for: (N, inputs) to (N, last of hidden_sizes)."""
    layers: list[nn.Module] = []
    for units in args.hidden_sizes:
        layers += [nn.Linear(inputs, units), NORMALIZATIONS[args.normalization](units), ACTIVATIONS[args.activation]()]
        inputs = units
    return nn.Sequential(*layers)


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
        # In evaluation mode, where batch normalisation uses its running statistics, except for their own updates.
        self.actor = Actor(observation_space, action_space, args).to(device).eval()
        self.critic = Critic(observation_space, action_space, args).to(device).eval()
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_learning_rate or args.learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_learning_rate or args.learning_rate)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What a saved model consists of."""
        return {name: getattr(self, name) for name in ("actor", "critic", "target_actor", "target_critic")}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The greedy actions, without noise: (N, O) observations to (N, A) float32 actions."""
        return self.actor(torch.as_tensor(obs, device=self.device)).cpu().numpy()

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

    def update(self, batch, update_actor: bool) -> dict[str, torch.Tensor]:
        """One step of the critic and, if asked, one of the actor and of both target networks.

        Returns:
            detached scalars, still on the device: q_loss, q_est (the mean of Q(s, a)) and, with `update_actor`,
            actor_loss.
        """
        self.critic.train()
        q_loss, q_values = self.critic_loss(batch)
        self.critic_optimizer.zero_grad()
        q_loss.backward()
        self.critic_optimizer.step()
        self.critic.eval()
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if update_actor:
            self.actor.train()
            actor_loss = self.actor_loss(batch)
            self.actor_optimizer.zero_grad()
            actor_loss.backward(inputs=list(self.actor.parameters()))  # spends nothing on the critic's weights
            self.actor_optimizer.step()
            self.actor.eval()
            losses["actor_loss"] = actor_loss.detach()
            self.update_target(self.actor, self.target_actor)
            self.update_target(self.critic, self.target_critic)
        return losses

    @torch.no_grad()
    def update_target(self, online: nn.Module, target: nn.Module) -> None:
        """Polyak averaging, target <- (1 - tau) target + tau online; running statistics are copied."""
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)
        for target_buffer, buffer in zip(target.buffers(), online.buffers(), strict=True):
            target_buffer.copy_(buffer)


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


def save_model(agent, path: Path) -> None:
    """Write the networks so that a reader finds the old file or the whole new one, never a part.

    Raises:
        TrainingError: if a weight is not finite; the file stays as it was.
    """
    saved = {name: network.state_dict() for name, network in agent.networks.items()}
    for name, weights in saved.items():
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise TrainingError(f"the weights of {name} are not finite: {path} keeps the last good ones")
    unfinished = path.with_suffix(".tmp")
    torch.save(saved, unfinished)
    unfinished.replace(path)


def load_model(agent, path: Path) -> None:
    """Load what `save_model` wrote; `weights_only` keeps a forged file from running code.

    Raises:
        UsageError: if the file is damaged or of other networks than the agent's.
    """
    try:
        saved = torch.load(path, map_location=agent.device, weights_only=True)
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
    (run_dir / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"final evaluation: {mean:.1f} +- {std:.1f} over {FINAL_EVALUATION_EPISODES} episodes of {args.env_id} "
        f"({models[0].name if models else 'latest networks'}), written to {run_dir / name}.json"
    )
    return evaluation


def get_device(args: Args) -> torch.device:
    """The device to train on; says so if the CUDA device asked for does not exist."""
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found, using the CPU")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def start_run(args: Args, device: torch.device) -> Path:
    """Make the run folder with its args.json and, with --track, the Weights and Biases run."""
    run_dir = make_run_folder(args)
    if args.track:
        import wandb

        try:
            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                config=dataclasses.asdict(args),
                sync_tensorboard=True,  # patches TensorBoard's writer, so it comes before our writer is made
                save_code=True,
            )
        except wandb.Error as error:
            run_dir.rmdir()
            raise UsageError(f"--track True: Weights and Biases did not start: {error}") from error
    settings = {"args": dataclasses.asdict(args), "versions": versions(), "device": str(device)}
    (run_dir / "args.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    print(f"training on {args.env_id} ({device}), the run's folder is {run_dir}")
    return run_dir


def log_evaluation(evaluation: Evaluation, global_step: int, writer: SummaryWriter, run_dir: Path) -> None:
    """Report an evaluation on the screen, in TensorBoard and as a row of evaluations.csv."""
    returns, lengths, q_bias = evaluation
    row = {
        "global_step": global_step,
        "mean": returns.mean(),
        "std": returns.std(),
        "min": returns.min(),
        "max": returns.max(),
        "length": lengths.mean(),
        "q_bias": q_bias,
    }
    writer.add_scalar("eval/episodic_return", row["mean"], global_step)
    writer.add_scalar("eval/episodic_return_std", row["std"], global_step)
    writer.add_scalar("eval/episodic_length", row["length"], global_step)
    writer.add_scalar("eval/q_bias", row["q_bias"], global_step)
    with open(run_dir / "evaluations.csv", "a", newline="") as file:
        table = csv.DictWriter(file, row)
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)
    tqdm.write(
        f"step {global_step}: evaluation {row['mean']:.1f} +- {row['std']:.1f} over {len(returns)} episodes "
        f"of mean length {row['length']:.0f}, q_bias {q_bias:+.2f}"
    )


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
            `update` and `networks` as DDPG has.

    Returns:
        the run folder.

    Raises:
        UsageError: before anything is created, if the arguments or the environment do not fit.
        TrainingError: if an action, an observation, a reward or a loss is not finite.
    """
    check_args(args)
    check_environment(args)
    device = get_device(args)
    run_dir = start_run(args, device)

    random.seed(args.seed)
    np.random.seed(args.seed)  # the generator that stable-baselines3's noise and replay buffer draw from
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for the next line
    torch.use_deterministic_algorithms(args.torch_deterministic)
    with (
        contextlib.closing(make_envs(args, run_dir.name)) as envs,
        SummaryWriter(run_dir) as writer,
        tqdm(total=args.total_timesteps, unit="step", dynamic_ncols=True, disable=None) as progress,
    ):
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

        global_step, updates, trained_step, best_mean = 0, 0, args.learning_starts, -math.inf
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # since the last row in TensorBoard, on the device
        status = {"return": "-", "evaluation": "-"}
        log_step, log_time = global_step, time.perf_counter()
        obs, _ = envs.reset(seed=args.seed)
        check_finite(global_step, observation=obs)
        while global_step < args.total_timesteps:
            # Act: uniformly random at first, then the actor's action plus noise, within the bounds.
            if global_step < args.learning_starts:
                actions = envs.action_space.sample().astype(np.float32)
            else:
                exploration = exploration_noise(args, global_step) * half_range * noise()
                actions = np.clip(agent.act(obs) + exploration, action_space.low, action_space.high)
            check_finite(global_step, action=actions)  # MuJoCo would take a NaN for a zero
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
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
                progress.set_postfix(status, refresh=False)
            progress.update(args.num_envs)
            finished = global_step >= args.total_timesteps
            evaluation_due = args.eval_frequency > 0 and (crossed(args.eval_frequency, last_step, global_step) or finished)
            log_due = crossed(LOG_FREQUENCY, last_step, global_step) or finished
            if log_due or evaluation_due:
                check_losses(global_step, losses)
            if log_due:
                for name, values in losses.items():
                    writer.add_scalar(f"losses/{name}", values[-1].item(), global_step)
                losses.clear()
                now = time.perf_counter()
                writer.add_scalar("charts/SPS", (global_step - log_step) / (now - log_time), global_step)
                log_step, log_time = global_step, now
            if args.save_model and (evaluation_due or finished):
                save_model(agent, run_dir / "model.pt")
            if evaluation_due:
                evaluation = evaluate(agent, args, args.eval_episodes, EVALUATION_SEED)
                log_evaluation(evaluation, global_step, writer, run_dir)
                mean = evaluation.returns.mean()
                if mean > best_mean and args.save_model:
                    best_mean = mean
                    save_model(agent, run_dir / "best_model.pt")
                status["evaluation"] = f"{mean:.1f}"
                log_time = time.perf_counter()  # SPS is the speed of training alone
                if args.target_return is not None and mean >= args.target_return:
                    tqdm.write(f"step {global_step}: --target-return {args.target_return} is reached, training ends")
                    break

    final_evaluation(agent, args, run_dir)
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
        raise UsageError(f"--evaluate {run_dir}: must be the folder of a run, with a readable args.json ({error!r})") from None


def evaluate_run(args: Args, agent_class: type = DDPG) -> Evaluation:
    """Evaluate the saved model of the run `args.evaluate`, as at the end of training."""
    check_args(args)
    check_environment(args)
    if not any((args.evaluate / name).exists() for name in ("best_model.pt", "model.pt")):
        raise UsageError(f"--evaluate {args.evaluate}: must hold a best_model.pt or a model.pt")
    env = make_env(args)
    agent = agent_class(env.observation_space, env.action_space, args, get_device(args))
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
        if args.evaluate is None:
            train(args, agent_class)
            return
        saved = load_args(args.evaluate, args_class)
        args = parse_args(args_class, sys.argv[1:], saved)
        for name in (field.name for field in dataclasses.fields(args)):
            if name not in ("evaluate", "capture_video", "cuda") and getattr(args, name) != getattr(saved, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: must be {getattr(saved, name)}, as saved in "
                    f"{args.evaluate}, or left out"
                )
        evaluate_run(args, agent_class)
    except (UsageError, TrainingError) as error:
        sys.unraisablehook = lambda _: None  # a renderer that failed to open complains again when it is collected
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
