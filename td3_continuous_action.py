"""Twin Delayed Deep Deterministic Policy Gradient (TD3) for continuous control: the whole algorithm.

Paper: Fujimoto et al., 2018, "Addressing function approximation error in actor-critic methods", arXiv:1802.09477. Algorithm 1
is `train` and `TD3.update` below. It differs from ddpg_continuous_action.py in two ways: targets use the smaller value of two
critics, and the actions of the target actor get noise.

    python td3_continuous_action.py --env-id Hopper-v4

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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from steadyrl import command_line
from steadyrl.agent import Agent, Losses
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
from steadyrl.noise import ExplorationNoise, standard_normal
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run import Run
from steadyrl.spaces import legal


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
    """learning rate of the critics (None: --learning-rate)"""
    policy_noise: NonNegative = 0.2
    """standard deviation of the noise on the target actor's actions, in units of half the action range"""
    noise_clip: NonNegative = 0.5
    """absolute value at which the noise of --policy-noise is clipped, in the same units"""
    n_steps: Count = 1
    """number of rewards that a TD target sums before it bootstraps (1: as in the paper). 3 learns faster if rewards are dense.
    There is no off-policy correction for the steps after the first"""
    reward_scale: Positive = 1.0
    """factor by which rewards are multiplied for learning (logged rewards are not multiplied)"""


@dataclass
class Exploration:
    """How the agent explores: with Gaussian noise, independent at each step."""

    exploration_noise: NonNegative = 0.1
    """standard deviation of the noise, in units of half the action range"""
    exploration_noise_end: NonNegative | None = None
    """value to which the noise falls linearly (None: the noise stays the same)"""
    exploration_fraction: Fraction = 1.0
    """share of --total-timesteps over which the noise falls"""


@dataclass
class Networks:
    """The hidden layers of the actor and of the critics."""

    hidden_sizes: Sizes = (256, 256)
    """units of each hidden layer"""


@dataclass
class Args(Experiment, Environment, Learning, Replay, Exploration, Networks, Evaluating, Checkpoints):
    """Train an agent, continue its training, or evaluate it."""

    exp_name: Name = Path(__file__).stem


def hidden_layers(inputs: int, args: Args) -> nn.Sequential:
    """The hidden layers that `args` asks for: (N, inputs) to (N, last of hidden_sizes)."""
    layers: list[nn.Module] = []
    for units in args.hidden_sizes:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    return nn.Sequential(*layers)


class Critic(nn.Module):
    """Q(s, a): (N, O) observations and (N, A) actions to (N,) values."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0] + action_space.shape[0], args)
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
        self.hidden = hidden_layers(observation_space.shape[0], args)
        self.mu = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        self.register_buffer("action_scale", torch.tensor(action_space.high / 2 - action_space.low.astype(float) / 2).float())
        self.register_buffer("action_bias", torch.tensor(action_space.high / 2 + action_space.low.astype(float) / 2).float())

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.mu(self.hidden(obs))) * self.action_scale + self.action_bias


class TD3(Agent):
    """The agent: an actor, two critics, a slowly moving target copy of each, and two optimisers."""

    args: Args

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args, device: torch.device):
        super().__init__(observation_space, action_space, args, device)
        self.actor = Actor(observation_space, action_space, args).to(device)
        self.scale, self.mid = self.actor.action_scale, self.actor.action_bias
        self.critics = nn.ModuleList(Critic(observation_space, action_space, args) for _ in range(2)).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        capturable = device.type == "cuda"  # step counts are then on the device, where a graph can increase them
        adam = partial(torch.optim.AdamW, weight_decay=0.0, fused=True, capturable=capturable)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_learning_rate or args.learning_rate)
        self.critic_optimizer = adam(self.critics.parameters(), lr=args.critic_learning_rate or args.learning_rate)
        self.networks = {"actor": self.actor, "critics": self.critics}
        self.networks |= {"target_actor": self.target_actor, "target_critics": self.target_critics}
        self.optimizers = {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    @torch.no_grad()
    def policy(self, obs: Tensor) -> Tensor:
        """The greedy actions mu(s): (N, O) to (N, A)."""
        return self.actor(obs)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """The first critic's value of the greedy action, Q(s, mu(s)): (N, O) observations to (N,) values."""
        observations = self.tensor(obs)
        return self.critics[0](observations, self.actor(observations)).cpu().numpy()

    @torch.no_grad()
    def td_target(self, batch: ReplayBufferSamples, noise: Tensor) -> Tensor:
        """The (B,) values that both critics learn. `noise`, (B, A) standard normal, smooths the target policy (equation 14).

        `batch.dones` marks terminations only: where a time limit cut an episode off, the target still bootstraps.
        """
        noise = (noise * self.args.policy_noise).clamp(-self.args.noise_clip, self.args.noise_clip) * self.scale
        next_actions = (self.target_actor(batch.next_observations) + noise).clamp(self.mid - self.scale, self.mid + self.scale)
        next_values = [critic(batch.next_observations, next_actions) for critic in self.target_critics]
        discounts = self.args.gamma if batch.discounts is None else batch.discounts.flatten()  # gamma^n after n steps
        return batch.rewards.flatten() + discounts * (1 - batch.dones.flatten()) * torch.minimum(*next_values)

    def critic_loss(
        self, batch: ReplayBufferSamples, noise: Tensor, td_target: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Sum of both critics' mean losses of the TD errors, and the (B,) values of each. Computes the target if it is None."""
        td_target = self.td_target(batch, noise) if td_target is None else td_target
        td_loss = F.smooth_l1_loss if self.args.replay == "prioritized" else F.mse_loss
        q_values = [critic(batch.observations, batch.actions) for critic in self.critics]
        return td_loss(q_values[0], td_target) + td_loss(q_values[1], td_target), q_values

    def actor_loss(self, batch: ReplayBufferSamples) -> Tensor:
        """Minus the mean of the first critic's Q(s, mu(s)): its gradient is the deterministic policy gradient."""
        return -self.critics[0](batch.observations, self.actor(batch.observations)).mean()

    def update(self, batch: ReplayBufferSamples, noise: Tensor, update_policy: bool) -> Losses:
        """One step of the critics and, if asked, one of the actor and of all target networks; `noise` as in `critic_loss`.

        Returns detached scalars, still on the device: q_loss, q_est (the first critic's) and, with `update_policy`, actor_loss.
        Prioritised replay also needs the (B,) td_errors: for each transition, the larger of the two critics' errors.
        """
        target = {"td_target": self.td_target(batch, noise)} if self.args.replay == "prioritized" else {}  # used twice
        q_loss, q_values = self.critic_loss(batch, noise, **target)
        descend(q_loss, self.critic_optimizer)
        losses = {"q_loss": q_loss.detach(), "q_est": q_values[0].detach().mean()}
        if target:
            losses["td_errors"] = (target["td_target"] - torch.stack(q_values).detach()).abs().amax(dim=0)
        if update_policy:
            actor_loss = self.actor_loss(batch)
            descend(actor_loss, self.actor_optimizer)
            for target, online in zip((self.target_actor, *self.target_critics), (self.actor, *self.critics), strict=True):
                move(target, online, self.args.tau)
            losses["actor_loss"] = actor_loss.detach()
        return losses


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on a loss. Gradients are computed for the parameters of this optimiser only."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def move(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Polyak averaging, target <- (1 - tau) target + tau online."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def train(args: Args) -> Path:
    """Algorithm 1 of Fujimoto et al. (2018), then an evaluation of the best model. Returns the run's folder.

    Raises:
        UsageError, TrainingError, Stopped: as `steadyrl.run.Run` says.
    """
    with Run(args) as run, closing(run.make_envs()) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = TD3(*spaces, args, run.device)
        rb = ReplayBuffer(args.buffer_size, *spaces, run.device, args.num_envs, n_steps=args.n_steps, **run.replay(agent, envs))
        scale, steps = (args.exploration_noise, args.exploration_noise_end), args.exploration_fraction * args.total_timesteps
        noise = ExplorationNoise("gaussian", envs.action_space, run.random, *scale, steps)
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
                target_noise = standard_normal(run.random, batch.actions.shape, run.device)
                run.record(agent.update(batch, noise=target_noise, update_policy=update % args.policy_frequency == 0))
            run.end_step(agent, infos)  # logs, evaluates and saves what is due, or stops
        run.finish(agent)
    return run.folder


main = command_line.Script(Args, TD3, train)

if __name__ == "__main__":
    main()
