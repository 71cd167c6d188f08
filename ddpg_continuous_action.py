"""Deep Deterministic Policy Gradient (DDPG) for continuous control: the whole algorithm.

Papers: Lillicrap et al., 2016, "Continuous control with deep reinforcement learning", arXiv:1509.02971 (algorithm 1 is `train`
and `DDPG.update` below); Fujimoto et al., 2018, arXiv:1802.09477 (TD3), for the delayed actor and target updates.

    python ddpg_continuous_action.py --env-id Hopper-v4

trains, and everything lands in runs/<run name>/. `--resume runs/<run name>` goes on after a crash, as if it had not happened;
`--evaluate runs/<run name>` evaluates (and with --capture-video, films) a run. What keeps a run alive, whatever its algorithm
(folder, logs, evaluation, checkpoints, signals), is in training/.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "stable-baselines3==2.9.2", "tqdm==4.70.1", "psutil==7.2.2", "filelock==4.2.11", "moviepy==2.2.1"]
# ///

import copy
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

from training import command_line
from training.arguments import (
    Checkpoints,
    Count,
    CountOrAll,
    CountOrZero,
    Discount,
    Environment,
    Evaluating,
    Expectile,
    Experiment,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Sizes,
)
from training.environments import check_finite, final_observations, make_envs
from training.errors import UsageError
from training.replay_buffer import ReplayBuffer, standard_normal
from training.run import Run

NOISES = {"gaussian": NormalActionNoise, "ou": OrnsteinUhlenbeckActionNoise}
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
NORMALIZATIONS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


@dataclass
class Learning:
    """The learner; the defaults are CleanRL's."""

    total_timesteps: Count = 1_000_000
    """environment steps to train for, counted over all environments"""
    learning_starts: CountOrZero = 25_000
    """environment steps of uniformly random actions before the actor acts and learning starts"""
    train_frequency: Count = 1
    """environment steps, over all environments, from one training point to the next (at most one each time they all step)"""
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
    """rewards that a TD target sums before it bootstraps (1: the paper's; 3 learns faster where rewards are dense; the steps
    after the first are not corrected for the exploration in them)"""
    critic_loss: Literal["mse", "huber", "expectile"] = "mse"
    """loss of the TD error: mse is its square; huber is smooth L1 with beta 1, for rare large rewards; expectile weights the
    square by the sign of the error, for a critic that overestimates (eval/q_bias above zero; arXiv:2406.04081)"""
    expectile: Expectile = 0.3
    """with --critic-loss expectile: the weight of errors whose target is above the estimate (0.5: the mean; below 0.5 the
    critic estimates low)"""
    num_critics: Count = 1
    """critics; targets are computed with the smallest of their values (2: TD3's, against over-estimation; arXiv:1802.09477)"""
    policy_noise: NonNegative = 0.0
    """target policy smoothing: standard deviation of the noise on the target actor's action, in units of half the action
    range (0: no noise; TD3 uses 0.2; arXiv:1802.09477). It helps if the actor exploits narrow peaks of the critic"""
    noise_clip: NonNegative = 0.5
    """largest size of the noise of --policy-noise, in the same units"""
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
class Args(Experiment, Environment, Learning, Exploration, Networks, Evaluating, Checkpoints):
    """Train an agent, continue its training, or evaluate it."""

    exp_name: Name = Path(__file__).stem

    def check_spaces(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        """Actions are a vector: a Box, which came here flat and with finite bounds."""
        if not isinstance(action_space, gym.spaces.Box):
            raise UsageError(f"--env-id {self.env_id}: its actions are {action_space}, must be a Box")


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

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = self.hidden(torch.cat([obs, action], dim=1))
        return self.q_value(x).squeeze(-1)  # (N,), as rewards are: (N, 1) would broadcast to (N, N) in the TD error


class Actor(nn.Module):
    """mu(s): (N, O) observations to (N, A) actions inside the bounds of the action space."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        self.hidden = hidden_layers(observation_space.shape[0], args.normalization, args)
        self.mu = nn.Linear(args.hidden_sizes[-1], action_space.shape[0])
        low, high = action_space.low.astype(np.float32), action_space.high.astype(np.float32)
        bias, scale = high / 2 + low / 2, high / 2 - low / 2
        outside = (bias + scale > high) | (bias - scale < low)  # rounding may go beyond a bound, by one float
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
        self.batch_normalized = "batch" in (args.normalization, args.critic_normalization)
        # In evaluation mode: batch normalisation uses its running statistics wherever `batch_mode` does not say otherwise.
        self.actor = Actor(observation_space, action_space, args).to(device).eval()
        critics = [Critic(observation_space, action_space, args) for _ in range(args.num_critics)]
        self.critic, *others = nn.ModuleList(critics).to(device).eval()
        self.other_critics = nn.ModuleList(others)  # none, but for --num-critics
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_other_critics = copy.deepcopy(self.other_critics).requires_grad_(False)
        capturable = device.type == "cuda"  # step counts are then on the device, where a graph can increase them
        adam = partial(torch.optim.AdamW, weight_decay=args.weight_decay, fused=True, capturable=capturable)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_learning_rate or args.learning_rate)
        self.critic_optimizer = adam(nn.ModuleList(critics).parameters(), lr=args.critic_learning_rate or args.learning_rate)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What a saved model consists of."""
        names = ("actor", "critic", "other_critics") if self.other_critics else ("actor", "critic")
        return {name: getattr(self, name) for name in (*names, *(f"target_{name}" for name in names))}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The greedy actions, without noise: (N, O) observations to (N, A) float32 actions."""
        return self.policy(torch.as_tensor(obs, device=self.device)).cpu().numpy()

    @torch.no_grad()
    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        """What `act` computes, on the device."""
        return self.actor(obs)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """What the critic expects of acting greedily, Q(s, mu(s)): (N, O) observations to (N,) values."""
        obs = torch.as_tensor(obs, device=self.device)
        return self.critic(obs, self.actor(obs)).cpu().numpy()

    def critic_loss(self, batch, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the critics' mean losses of the TD errors (Lillicrap et al., equation 4), and the first one's (B,) Q(s, a).

        `batch.dones` marks terminations only: an episode that a time limit cut off had a future, so its last
        transition bootstraps like any other. `noise`, (B, A) standard normal, smooths the target policy (TD3, equation 14).
        """
        with torch.no_grad():
            next_actions = self.target_actor(batch.next_observations)
            if noise is not None:
                scale, bias = self.actor.action_scale, self.actor.action_bias
                noise = (noise * self.args.policy_noise).clamp(-self.args.noise_clip, self.args.noise_clip)
                next_actions = (next_actions + noise * scale).clamp(bias - scale, bias + scale)
            target_critics = self.target_critic, *self.target_other_critics
            next_values = smallest_q_value(target_critics, batch.next_observations, next_actions)
            discounts = self.args.gamma if batch.discounts is None else batch.discounts.flatten()  # gamma^n after n steps
            td_target = batch.rewards.flatten() + discounts * (1 - batch.dones.flatten()) * next_values
        q_values = [critic(batch.observations, batch.actions) for critic in (self.critic, *self.other_critics)]
        return sum(self.td_loss(values, td_target) for values in q_values), q_values[0]

    def td_loss(self, q_values: torch.Tensor, td_target: torch.Tensor) -> torch.Tensor:
        """The mean over a batch, (B,), of what --critic-loss makes of a TD error."""
        if self.args.critic_loss == "huber":
            return F.smooth_l1_loss(q_values, td_target)
        if self.args.critic_loss == "expectile":
            weights = torch.where(td_target > q_values, self.args.expectile, 1 - self.args.expectile)
            return (2 * weights * (td_target - q_values) ** 2).mean()
        return F.mse_loss(q_values, td_target)

    def actor_loss(self, batch) -> torch.Tensor:
        """Minus the mean of Q(s, mu(s)): its gradient is the deterministic policy gradient (equation 6)."""
        return -self.critic(batch.observations, self.actor(batch.observations)).mean()

    def update(self, batch, update_policy: bool, noise: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """One step of the critic and, if asked, one of the actor and of both target networks; `noise` as in `critic_loss`.

        Returns:
            detached scalars, still on the device: q_loss, q_est and, with `update_policy`, actor_loss.
        """
        self.batch_mode(True, self.critic, *self.other_critics)
        q_loss, q_values = self.critic_loss(batch, noise)
        self.batch_mode(False, self.critic, *self.other_critics)
        descend(q_loss, self.critic_optimizer)
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if update_policy:
            self.batch_mode(True, self.actor)
            actor_loss = self.actor_loss(batch)
            descend(actor_loss, self.actor_optimizer)
            self.batch_mode(False, self.actor)
            losses["actor_loss"] = actor_loss.detach()
            self.update_targets()
        return losses

    def batch_mode(self, on: bool, *networks: nn.Module) -> None:
        """Have batch normalisation use the statistics of the batch, or the running ones (other layers ignore the mode)."""
        if self.batch_normalized:
            nn.ModuleList(networks).train(on)

    @torch.no_grad()
    def update_targets(self) -> None:
        """Polyak averaging, target <- (1 - tau) target + tau online; running statistics are copied."""
        networks = self.networks
        for name in [name for name in networks if f"target_{name}" in networks]:
            online, target = networks[name], networks[f"target_{name}"]
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)
            if self.batch_normalized:
                for target_buffer, buffer in zip(target.buffers(), online.buffers(), strict=True):
                    target_buffer.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The states of the networks and of the optimisers."""
        parts = {"networks": self.networks, "optimizers": self.optimizers}
        return {kind: {name: part.state_dict() for name, part in members.items()} for kind, members in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, but keep this agent's own learning rates."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            own = optimizer.state_dict()["param_groups"]  # the saved ones hold that run's learning rate and device options
            optimizer.load_state_dict({"state": state["optimizers"][name]["state"], "param_groups": own})


def smallest_q_value(critics: Iterable[nn.Module], obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The smallest of the critics' values: (N,)."""
    return torch.stack([critic(obs, action) for critic in critics]).amin(dim=0)


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on a loss. Gradients are computed for the parameters of this optimiser only."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


class ExplorationNoise:
    """Noise for each environment and action dimension, in units of half the range of that dimension."""

    def __init__(self, action_space: gym.spaces.Box, args: Args):
        self.args, self.half_range = args, (action_space.high - action_space.low) / 2
        shape = (args.num_envs, *action_space.shape)
        self.process = NOISES[args.noise](np.zeros(shape), np.ones(shape))
        self.process.noise_prev = np.zeros(shape)  # the state of an Ornstein-Uhlenbeck process

    def __call__(self, global_step: int, starting: np.ndarray) -> np.ndarray:
        """Draw (N, A) noise. Its size is constant, or falls linearly and is then constant; where an episode is `starting`,
        (N,) bool, its process starts anew."""
        self.process.noise_prev[starting] = 0
        start, end = self.args.exploration_noise, self.args.exploration_noise_end
        progress = min(1.0, global_step / (self.args.exploration_fraction * self.args.total_timesteps))
        scale = start if end is None else start + progress * (end - start)
        return scale * self.half_range * self.process()

    def state_dict(self) -> dict[str, Any]:
        """The current value of each Ornstein-Uhlenbeck process."""
        return {"values": torch.from_numpy(self.process.noise_prev.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.process.noise_prev = np.stack(state["values"])


def train(args: Args) -> Path:
    """Algorithm 1 of Lillicrap et al. (2016), then an evaluation of the best model.

    Returns:
        the run folder.

    Raises:
        UsageError: before anything is created, if the arguments or the environment do not fit.
        TrainingError: if an action, an observation, a reward, a loss or a weight is not finite, if the disk stays full,
            or if a process of the asynchronous environments fails.
        Stopped: after a checkpoint, if a signal asked for it.
    """
    with Run(args) as run, closing(make_envs(args, run.folder.name)) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = DDPG(*spaces, args, run.device)
        # Only terminations are stored: a time limit is no terminal state.
        options = {"n_steps": args.n_steps, "gamma": args.gamma, "handle_timeout_termination": False}
        rb = ReplayBuffer(args.buffer_size, *spaces, run.device, n_envs=args.num_envs, **options)
        noise = ExplorationNoise(spaces[1], args)
        envs.reset(seed=args.seed)
        run.resume(environments=envs, agent=agent, replay_buffer=rb, noise=noise)
        obs = envs.observations
        batch, noise_shape = rb.example_batch(args.batch_size), (args.batch_size, *spaces[1].shape)
        target_noise = torch.zeros(noise_shape, device=run.device) if args.policy_noise else None
        examples = [{"batch": batch, "noise": target_noise, "update_policy": flag} for flag in (True, False)]
        agent = run.begin(agent, acting=(obs,), learning=examples)

        while run.unfinished:
            # Act: uniformly at random at first, then the actor's action plus noise, within the bounds.
            if run.global_step < args.learning_starts:
                actions = envs.action_space.sample().astype(np.float32)
            else:
                actions = np.clip(agent.act(obs) + noise(run.global_step, envs.starting), spaces[1].low, spaces[1].high)
            check_finite(run.global_step, action=actions)  # MuJoCo would silently use 0 for NaN
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            run.global_step += args.num_envs

            # Store: next_obs of an ended episode is the first of the next one, not its successor.
            successors = final_observations(next_obs, infos)
            check_finite(run.global_step, observation=successors, reward=rewards)
            rb.add(obs, successors, actions, rewards * args.reward_scale, terminations, [])
            obs = next_obs

            # Learn.
            for update in run.updates_due():
                batch = rb.sample(args.batch_size)
                target_noise = standard_normal(noise_shape, run.device) if args.policy_noise else None
                run.record(agent.update(batch, update_policy=update % args.policy_frequency == 0, noise=target_noise))
            run.end_step(agent, infos)  # logs, evaluates and saves what is due; raises Stopped after a signal
        run.finish(agent)
    return run.folder


main = command_line.Script(Args, DDPG, train)

if __name__ == "__main__":
    main()
