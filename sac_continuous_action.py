"""Soft Actor-Critic (SAC) for continuous control: the whole algorithm.

Papers: Haarnoja et al., 2018, "Soft actor-critic", arXiv:1801.01290, and "Soft actor-critic algorithms and applications",
arXiv:1812.05905 (algorithm 1 is `train` and `SAC.update` below). Three steps from DDPG: a stochastic policy (--num-critics 1
--alpha 0 --no-autotune), the smaller of two critics (--num-critics 2 --alpha 0 --no-autotune), entropy (the defaults).

    python sac_continuous_action.py --env-id Hopper-v4

trains an agent. Its run folder is runs/<run name>/. `--resume runs/<run name>` continues a run as if it had never crashed.
`--evaluate runs/<run name>` evaluates a run; with --capture-video it also films it. Everything that does not depend on the
algorithm (folder, logs, evaluation, checkpoints, signals) is in the package steadyrl/.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "stable-baselines3==2.9.2", "tqdm==4.70.1", "psutil==7.2.2", "filelock==4.2.11", "moviepy==2.2.1"]
# ///

import copy
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from steadyrl import command_line
from steadyrl.agent import Agent, Losses, training_mode
from steadyrl.arguments import (
    Checkpoints,
    Count,
    CountOrAll,
    CountOrZero,
    Discount,
    Environment,
    Evaluating,
    Experiment,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Replay,
    Sizes,
)
from steadyrl.environments import check_finite, final_observations
from steadyrl.noise import standard_normal
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run import Run

LOG_STD_MIN, LOG_STD_MAX = -5, 2
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
NORMALIZATIONS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


@dataclass
class Learning:
    """How the agent learns; the defaults are CleanRL's."""

    total_timesteps: Count = 1_000_000
    """environment steps to train for, counted over all environments"""
    learning_starts: CountOrZero = 5_000
    """environment steps of uniformly random actions before the actor acts and learning starts"""
    train_frequency: Count = 1
    """environment steps between two training points, counted over all environments (at most one point for each vector step)"""
    gradient_steps: CountOrAll = 1
    """critic updates at each training point (-1: one for each environment step since the last training point)"""
    policy_frequency: Count = 2
    """after this many critic updates, the actor is updated the same number of times in a row"""
    target_network_frequency: Count = 1
    """critic updates per update of the target networks"""
    buffer_size: Count = 1_000_000
    """transitions kept in the replay buffer"""
    batch_size: Count = 256
    """transitions sampled for one update"""
    gamma: Discount = 0.99
    """discount factor"""
    tau: Fraction = 0.005
    """how far each target update moves the target networks towards the online ones (1: it copies them)"""
    policy_lr: Positive = 3e-4
    """learning rate of the actor"""
    q_lr: Positive = 1e-3
    """learning rate of the critics and of the temperature"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay, as in AdamW (0: plain Adam)"""
    n_steps: Count = 1
    """number of rewards that a TD target sums before it bootstraps (1: as in the paper; more: without off-policy correction)"""
    critic_loss: Literal["mse", "huber"] = "mse"
    """loss of the TD error: mse is its square; huber is smooth L1 with beta 1, for rare large rewards"""
    num_critics: Count = 2
    """number of critics; targets use the smallest of their values (2: as in TD3, against over-estimation; arXiv:1802.09477)"""
    reward_scale: Positive = 1.0
    """factor by which rewards are multiplied for learning (logged rewards are not multiplied)"""


@dataclass
class Exploration:
    """How the agent explores."""

    alpha: NonNegative = 0.2
    """temperature: the weight of the entropy relative to the rewards (only with --no-autotune)"""
    autotune: bool = True
    """learn the temperature, starting at 1, so that the entropy approaches minus the number of action dimensions"""


@dataclass
class Networks:
    """The hidden layers of the actor and of the critic."""

    hidden_sizes: Sizes = (256, 256)
    """units of each hidden layer"""
    activation: Literal["relu", "leaky_relu", "tanh"] = "relu"
    """activation after each hidden layer"""
    normalization: Literal["none", "layer", "batch"] = "none"
    """normalisation before each activation"""
    critic_normalization: Literal["none", "layer", "batch"] | None = None
    """normalisation in the critic only (None: as --normalization); layer keeps its values bounded (arXiv:2302.02948)"""


@dataclass
class Args(Experiment, Environment, Learning, Replay, Exploration, Networks, Evaluating, Checkpoints):
    """Train an agent, continue its training, or evaluate it."""

    exp_name: Name = Path(__file__).stem


def hidden_layers(inputs: int, normalization: str, args: Args) -> nn.Sequential:
    """The hidden layers that `args` asks for: (N, inputs) to (N, last of hidden_sizes)."""
    layers: list[nn.Module] = []
    for units in args.hidden_sizes:
        layers += [nn.Linear(inputs, units), NORMALIZATIONS[normalization](units), ACTIVATIONS[args.activation]()]
        inputs = units
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))  # an Identity would cost a call


class Critic(nn.Module):
    """Q(s, a): (N, O) observations and (N, A) actions to (N,) values."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        normalization = args.critic_normalization or args.normalization
        self.hidden = hidden_layers(observation_space.shape[0] + action_space.shape[0], normalization, args)
        self.q_value = nn.Linear(args.hidden_sizes[-1], 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.hidden(torch.cat([obs, action], dim=1))
        return self.q_value(x).squeeze(-1)  # (N,), as rewards are: (N, 1) would broadcast to (N, N) in the TD error


class Actor(nn.Module):
    """pi(a|s), a Gaussian squashed by tanh. Takes (N, O) observations and (N, A) standard normal noise. Returns (N, A) actions
    inside the bounds of the action space, and their (N,) log probabilities. Zero noise, or none, gives the greedy action."""

    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0], args.normalization, args)
        self.mu = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        self.log_std = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        self.register_buffer("action_scale", torch.tensor(action_space.high / 2 - action_space.low.astype(float) / 2).float())
        self.register_buffer("action_bias", torch.tensor(action_space.high / 2 + action_space.low.astype(float) / 2).float())

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.hidden(obs)
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(self.log_std(x)) + 1) / 2
        noise = torch.zeros_like(log_std) if noise is None else noise
        raw = self.mu(x) + log_std.exp() * noise
        # The change of variables (1801.01290, equation 21): log da/draw = log(scale (1 - tanh(raw)^2)), in a form that
        # neither overflows nor takes the logarithm of 0.
        log_scale = self.action_scale.where(self.action_scale > 0, 1).log()  # low == high: a fixed action, any scale will do
        log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw)) + log_scale
        log_prob = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2 - log_slope
        return torch.tanh(raw) * self.action_scale + self.action_bias, log_prob.sum(dim=1)


class SAC(Agent):
    """The agent: a stochastic actor, critics with a slowly moving target copy of each, and a temperature."""

    args: Args

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args, device: torch.device):
        super().__init__(observation_space, action_space, args, device)
        # In evaluation mode: batch normalisation uses its running statistics where `training_mode` does not say otherwise.
        self.batch_normalized = "batch" in (args.normalization, args.critic_normalization)
        self.actor = Actor(observation_space, action_space, args).to(device).eval()
        critics = (Critic(observation_space, action_space, args) for _ in range(args.num_critics))
        self.critics = nn.ModuleList(critics).to(device).eval()
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        alpha = torch.tensor(1.0 if args.autotune else args.alpha, dtype=torch.float64, device=device)
        self.log_alpha = nn.Parameter(alpha.log(), requires_grad=args.autotune)  # minus infinity for an alpha of 0
        temperature = nn.ParameterDict({"log_alpha": self.log_alpha} if args.autotune else {})
        self.target_entropy = -float(action_space.shape[0])
        capturable = device.type == "cuda"  # step counts are then on the device, where a graph can increase them
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True, capturable=capturable)
        self.optimizers = {"actor": adam(self.actor.parameters(), lr=args.policy_lr)}
        self.optimizers["critic"] = adam(self.critics.parameters(), lr=args.q_lr)
        if args.autotune:
            self.optimizers["alpha"] = adam([self.log_alpha], lr=args.q_lr, weight_decay=0.0)
        self.networks = {"actor": self.actor, "critics": self.critics, "target_critics": self.target_critics}
        self.networks["temperature"] = temperature

    @torch.no_grad()
    def policy(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, O) observations and (N, A) standard normal noise to (N, A) actions; the greedy ones without noise."""
        return self.actor(obs, noise)[0]

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """The critics' value of the greedy action, the smallest Q(s, mu(s)): (N, O) observations to (N,) values."""
        observations = self.tensor(obs)
        return smallest_q_value(self.critics, observations, self.actor(observations)[0]).cpu().numpy()

    @torch.no_grad()
    def state_value(self, obs: np.ndarray) -> np.ndarray:
        """V(s), the critics' value of the policy with its noise and its entropy: (N, O) observations to (N,) values.

        The mean over eight actions. Their noise is always the same, with mean 0 and variance 1. Evaluation needs it for q_bias.
        """
        observations = self.tensor(obs)
        drawn = np.random.default_rng(0).standard_normal((8, 1, gym.spaces.flatdim(self.action_space)))
        noise = torch.as_tensor((drawn - drawn.mean(axis=0)) / drawn.std(axis=0), dtype=torch.float32, device=self.device)
        values = [self.soft_value(self.critics, observations, row.expand(len(observations), -1))[0] for row in noise]
        return (sum(values[1:], start=values[0]) / len(values)).cpu().numpy()

    def soft_value(self, critics: nn.ModuleList, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """For an action a drawn from pi(.|s): min Q(s, a) - alpha log pi(a|s) (1801.01290, equation 3), and log pi(a|s)."""
        action, log_prob = self.actor(obs, noise)
        return smallest_q_value(critics, obs, action) - self.log_alpha.exp().detach() * log_prob, log_prob

    @torch.no_grad()
    def td_target(self, batch: ReplayBufferSamples, noise: Tensor) -> Tensor:
        """The (B,) values r + gamma V(s') that the critics learn. `noise`, (B, A) standard normal, draws the next actions.

        `batch.dones` marks terminations only: where a time limit cut an episode off, the target still bootstraps.
        """
        next_values, _ = self.soft_value(self.target_critics, batch.next_observations, noise)
        discounts = self.args.gamma if batch.discounts is None else batch.discounts.flatten()  # gamma^n after n steps
        return batch.rewards.flatten() + discounts * (1 - batch.dones.flatten()) * next_values

    def critic_loss(self, batch: ReplayBufferSamples, noise: Tensor, td_target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of the critics' mean losses of the TD errors (1812.05905, equation 5), and the (critics, B) values Q(s, a)."""
        huber = self.args.critic_loss == "huber" or self.args.replay == "prioritized"
        td_loss = F.smooth_l1_loss if huber else F.mse_loss
        td_target = self.td_target(batch, noise) if td_target is None else td_target
        q_values = torch.stack([critic(batch.observations, batch.actions) for critic in self.critics])
        first, *others = (td_loss(values, td_target) for values in q_values)
        return sum(others, start=first), q_values

    def actor_loss(self, batch: ReplayBufferSamples, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the mean soft value of the actor's own actions (1801.01290, equation 12), and their (B,) log probabilities."""
        values, log_prob = self.soft_value(self.critics, batch.observations, noise)
        return -values.mean(), log_prob

    def update(self, batch: ReplayBufferSamples, noise: Tensor, update_policy: bool, update_targets: bool = True) -> Losses:
        """One step of the critics. If asked, also `policy_frequency` of the actor and the temperature, and one of the targets.

        `noise`, (1 + policy_frequency, B, A) standard normal, is for the critics' targets, then for each step of the actor.
        Returns detached q_loss, q_est; with `update_policy` actor_loss, alpha; for prioritised replay the largest td_errors.
        """
        target = {"td_target": self.td_target(batch, noise[0])} if self.args.replay == "prioritized" else {}  # used twice
        with training_mode(self.critics, self.batch_normalized):
            q_loss, q_values = self.critic_loss(batch, noise[0], **target)
        descend(q_loss, self.optimizers["critic"])
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if target:
            losses["td_errors"] = (target["td_target"] - q_values.detach()).abs().amax(dim=0)
        for actor_noise in noise[1:] if update_policy else ():  # as many times as it was left out before
            with training_mode(self.actor, self.batch_normalized):
                actor_loss, log_prob = self.actor_loss(batch, actor_noise)
            descend(actor_loss, self.optimizers["actor"])
            if self.args.autotune:  # 1812.05905, equation 18
                alpha_loss = -self.log_alpha.exp() * (log_prob.detach().mean() + self.target_entropy)
                descend(alpha_loss, self.optimizers["alpha"])
            losses |= {"actor_loss": actor_loss.detach(), "alpha": self.log_alpha.detach().exp()}
        if update_targets:
            move(self.target_critics, self.critics, self.args.tau)
        return losses


def smallest_q_value(critics: Iterable[nn.Module], obs: Tensor, action: Tensor) -> Tensor:
    """The smallest of the critics' values: (N,)."""
    return torch.stack([critic(obs, action) for critic in critics]).amin(dim=0)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on a loss. Gradients are computed for the parameters of this optimiser only."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def move(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Polyak averaging, target <- (1 - tau) target + tau online; running statistics are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for target_buffer, buffer in zip(target.buffers(), online.buffers(), strict=True):
        target_buffer.copy_(buffer)


def train(args: Args) -> Path:
    """Algorithm 1 of Haarnoja et al. (1812.05905), then an evaluation of the best model. Returns the run's folder.

    Raises:
        UsageError, TrainingError, Stopped: as `steadyrl.run.Run` says.
    """
    with Run(args) as run, closing(run.make_envs()) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = SAC(*spaces, args, run.device)
        rb = ReplayBuffer(args.buffer_size, *spaces, run.device, args.num_envs, n_steps=args.n_steps, **run.replay(agent, envs))
        run.resume(agent, envs, rb)  # a checkpoint is these; a resumed run has them restored
        agent = run.accelerated(agent)  # compiled or captured at its first real calls
        obs = envs.observations

        while run.unfinished:
            # Act: uniformly at random at first, then what the policy draws.
            if run.global_step < args.learning_starts:
                actions = envs.action_space.sample().astype(np.float32)
            else:
                actions = agent.act(obs, run.random.standard_normal(envs.action_space.shape).astype(np.float32))
            check_finite(run.global_step, action=actions)  # MuJoCo would silently use 0 for NaN
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            run.global_step += args.num_envs

            # Store: next_obs of an ended episode is the first of the next one, not its successor. Only terminations are done.
            successors = final_observations(next_obs, infos)
            check_finite(run.global_step, observation=successors, reward=rewards)
            rb.add(obs, successors, actions, rewards * args.reward_scale, terminations, truncations)
            obs = next_obs

            # Learn.
            for update in run.updates_due():
                batch = rb.sample(args.batch_size)
                noise = standard_normal(run.random, (1 + args.policy_frequency, *batch.actions.shape), run.device)
                policy, targets = update % args.policy_frequency == 0, update % args.target_network_frequency == 0
                run.record(agent.update(batch, noise=noise, update_policy=policy, update_targets=targets))
            run.end_step(agent, infos)  # logs, evaluates and saves what is due, or stops
        run.finish(agent)
    return run.folder


main = command_line.Script(Args, SAC, train)

if __name__ == "__main__":
    main()
