"""Deep Deterministic Policy Gradient (DDPG) for continuous control: the whole algorithm.

Paper: Lillicrap et al., 2016, "Continuous control with deep reinforcement learning", arXiv:1509.02971. Algorithm 1 is `train`
and `DDPG.update` below; the actor and the targets are updated less often than the critic, as in Fujimoto et al., 2018.

    python ddpg_continuous_action.py --env-id Hopper-v4

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
from steadyrl.noise import ExplorationNoise
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run import Run
from steadyrl.spaces import legal

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
NORMALIZATIONS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


@dataclass
class Learning:
    """How the agent learns; the defaults are CleanRL's."""

    total_timesteps: Count = 1_000_000
    """environment steps to train for, counted over all environments"""
    learning_starts: CountOrZero = 25_000
    """environment steps of uniformly random actions before the actor acts and learning starts"""
    train_frequency: Count = 1
    """environment steps between two training points, counted over all environments (at most one point for each vector step)"""
    gradient_steps: CountOrAll = 1
    """critic updates at each training point (-1: one for each environment step since the last training point)"""
    policy_frequency: Count = 2
    """critic updates per update of the actor and the target networks"""
    buffer_size: Count = 1_000_000
    """transitions kept in the replay buffer"""
    batch_size: Count = 256
    """transitions sampled for one update"""
    gamma: Discount = 0.99
    """discount factor"""
    tau: Fraction = 0.005
    """how far each target update moves the target networks towards the online ones (1: it copies them)"""
    learning_rate: Positive = 3e-4
    """learning rate of both optimisers"""
    actor_learning_rate: Positive | None = None
    """learning rate of the actor (None: --learning-rate)"""
    critic_learning_rate: Positive | None = None
    """learning rate of the critic (None: --learning-rate)"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay, as in AdamW (0: plain Adam)"""
    n_steps: Count = 1
    """number of rewards that a TD target sums before it bootstraps (1: as in the paper). 3 learns faster if rewards are dense.
    There is no off-policy correction for the steps after the first"""
    critic_loss: Literal["mse", "huber"] = "mse"
    """loss of the TD error: mse is its square; huber is smooth L1 with beta 1, for rare large rewards"""
    reward_scale: Positive = 1.0
    """factor by which rewards are multiplied for learning (logged rewards are not multiplied)"""


@dataclass
class Exploration:
    """How the agent explores."""

    noise: Literal["gaussian", "ou"] = "gaussian"
    """gaussian: independent at each step; ou: an Ornstein-Uhlenbeck process that restarts with each episode"""
    exploration_noise: NonNegative = 0.1
    """standard deviation (with ou: sigma) of the noise, in units of half the action range"""
    exploration_noise_end: NonNegative | None = None
    """value to which the noise falls linearly (None: the noise stays the same)"""
    exploration_fraction: Fraction = 1.0
    """share of --total-timesteps over which the noise falls"""


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
    """mu(s): (N, O) observations to (N, A) actions inside the bounds of the action space."""

    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0], args.normalization, args)
        self.mu = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        self.register_buffer("action_scale", torch.tensor(action_space.high / 2 - action_space.low.astype(float) / 2).float())
        self.register_buffer("action_bias", torch.tensor(action_space.high / 2 + action_space.low.astype(float) / 2).float())

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.mu(self.hidden(obs))) * self.action_scale + self.action_bias


class DDPG(Agent):
    """The agent: an actor, a critic, a slowly moving target copy of each, and an optimiser for the first two."""

    args: Args

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args, device: torch.device):
        super().__init__(observation_space, action_space, args, device)
        # In evaluation mode: batch normalisation uses its running statistics where `training_mode` does not say otherwise.
        self.batch_normalized = "batch" in (args.normalization, args.critic_normalization)
        self.actor = Actor(observation_space, action_space, args).to(device).eval()
        self.critic = Critic(observation_space, action_space, args).to(device).eval()
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        capturable = device.type == "cuda"  # step counts are then on the device, where a graph can increase them
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True, capturable=capturable)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_learning_rate or args.learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_learning_rate or args.learning_rate)
        self.networks = {"actor": self.actor, "critic": self.critic}
        self.networks |= {"target_actor": self.target_actor, "target_critic": self.target_critic}
        self.optimizers = {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    @torch.no_grad()
    def policy(self, obs: Tensor) -> Tensor:
        """The greedy actions mu(s): (N, O) to (N, A)."""
        return self.actor(obs)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """The critic's value of the greedy action, Q(s, mu(s)): (N, O) observations to (N,) values."""
        observations = self.tensor(obs)
        return self.critic(observations, self.actor(observations)).cpu().numpy()

    @torch.no_grad()
    def td_target(self, batch: ReplayBufferSamples) -> Tensor:
        """The (B,) values r + gamma Q'(s', mu'(s')) that the critic learns (equation 5).

        `batch.dones` marks terminations only: where a time limit cut an episode off, the target still bootstraps.
        """
        next_actions = self.target_actor(batch.next_observations)
        next_values = self.target_critic(batch.next_observations, next_actions)
        discounts = self.args.gamma if batch.discounts is None else batch.discounts.flatten()  # gamma^n after n steps
        return batch.rewards.flatten() + discounts * (1 - batch.dones.flatten()) * next_values

    def critic_loss(self, batch: ReplayBufferSamples, td_target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss of the TD errors (equation 4), and the (B,) values Q(s, a). Computes the target if it is None."""
        td_target = self.td_target(batch) if td_target is None else td_target
        q_values = self.critic(batch.observations, batch.actions)
        huber = self.args.critic_loss == "huber" or self.args.replay == "prioritized"
        td_loss = F.smooth_l1_loss if huber else F.mse_loss
        return td_loss(q_values, td_target), q_values

    def actor_loss(self, batch: ReplayBufferSamples) -> Tensor:
        """Minus the mean of Q(s, mu(s)): its gradient is the deterministic policy gradient (equation 6)."""
        return -self.critic(batch.observations, self.actor(batch.observations)).mean()

    def update(self, batch: ReplayBufferSamples, update_policy: bool) -> Losses:
        """One step of the critic and, if asked, one of the actor and of both target networks.

        Returns detached scalars, still on the device: q_loss, q_est and, with `update_policy`, actor_loss. Prioritised replay
        also needs the (B,) td_errors.
        """
        target = {"td_target": self.td_target(batch)} if self.args.replay == "prioritized" else {}  # used twice
        with training_mode(self.critic, self.batch_normalized):
            q_loss, q_values = self.critic_loss(batch, **target)
        descend(q_loss, self.critic_optimizer)
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if target:
            losses["td_errors"] = target["td_target"] - q_values.detach()
        if update_policy:
            with training_mode(self.actor, self.batch_normalized):
                actor_loss = self.actor_loss(batch)
            descend(actor_loss, self.actor_optimizer)
            move(self.target_actor, self.actor, self.args.tau)
            move(self.target_critic, self.critic, self.args.tau)
            losses["actor_loss"] = actor_loss.detach()
        return losses


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
    """Algorithm 1 of Lillicrap et al. (2016), then an evaluation of the best model. Returns the run's folder.

    Raises:
        UsageError, TrainingError, Stopped: as `steadyrl.run.Run` says.
    """
    with Run(args) as run, closing(run.make_envs()) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = DDPG(*spaces, args, run.device)
        rb = ReplayBuffer(args.buffer_size, *spaces, run.device, args.num_envs, n_steps=args.n_steps, **run.replay(agent, envs))
        scale, steps = (args.exploration_noise, args.exploration_noise_end), args.exploration_fraction * args.total_timesteps
        noise = ExplorationNoise(args.noise, envs.action_space, run.random, *scale, steps)
        run.resume(agent, envs, rb, noise=noise)  # a checkpoint is these; a resumed run has them restored
        agent = run.accelerated(agent)  # compiled or captured at its first real calls
        obs = envs.observations

        while run.unfinished:
            # Act: uniformly at random at first, then the actor's action plus noise, within the bounds.
            if run.global_step < args.learning_starts:
                actions = envs.action_space.sample().astype(np.float32)
            else:
                actions = legal(agent.act(obs) + noise(run.global_step, envs.starting), envs.action_space)
            check_finite(run.global_step, action=actions)  # MuJoCo would silently use 0 for NaN
            run.charts["exploration_noise"] = noise.scale
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
                run.record(agent.update(batch, update_policy=update % args.policy_frequency == 0))
            run.end_step(agent, infos)  # logs, evaluates and saves what is due, or stops
        run.finish(agent)
    return run.folder


main = command_line.Script(Args, DDPG, train)

if __name__ == "__main__":
    main()
