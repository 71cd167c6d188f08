"""Deep Q-Network (DQN) for discrete actions, or for continuous ones in bins: the whole algorithm.

Papers: Mnih et al., 2015, "Human-level control through deep reinforcement learning", doi:10.1038/nature14236 (algorithm 1 is
`train` and `DQN.update` below); van Hasselt et al., 2016, "Deep reinforcement learning with double Q-learning",
arXiv:1509.06461, for --double-q.

    python dqn.py --env-id CartPole-v1

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
    Positive,
    Probability,
    Replay,
    Sizes,
)
from steadyrl.environments import check_finite, final_observations
from steadyrl.errors import UsageError
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run import Run

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
MOST_OUTPUTS = 1_000_000  # of the network
MAX_ACTIONS = 4096  # a network does not learn a larger table; with --bins, the number grows with each dimension


@dataclass
class Learning:
    """How the agent learns; the defaults are CleanRL's."""

    total_timesteps: Count = 500_000
    """environment steps to train for, counted over all environments"""
    learning_starts: CountOrZero = 10_000
    """environment steps before learning starts"""
    train_frequency: Count = 10
    """environment steps between two training points, counted over all environments (at most one point for each vector step)"""
    gradient_steps: CountOrAll = 1
    """updates at each training point (-1: one for each environment step since the last training point)"""
    target_network_frequency: Count = 500
    """environment steps between two updates of the target network"""
    buffer_size: Count = 10_000
    """transitions kept in the replay buffer"""
    batch_size: Count = 128
    """transitions sampled for one update"""
    gamma: Discount = 0.99
    """discount factor"""
    tau: Fraction = 1.0
    """how far each target update moves the target network towards the online one (1: it copies it)"""
    learning_rate: Positive = 2.5e-4
    """learning rate of the optimiser"""
    double_q: bool = False
    """the online network chooses the next action, and the target network evaluates it (against over-estimation)"""
    reward_scale: Positive = 1.0
    """factor by which rewards are multiplied for learning (logged rewards are not multiplied)"""


@dataclass
class Exploration:
    """Random actions, and how continuous actions are discretised."""

    start_e: Probability = 1.0
    """probability of a random action at the start"""
    end_e: Probability = 0.05
    """probability of a random action at the end"""
    exploration_fraction: Fraction = 0.5
    """share of --total-timesteps over which the probability falls, linearly"""
    bins: Count | None = None
    """number of values for each dimension of continuous actions (a Box); only such actions need this flag"""


@dataclass
class Networks:
    """The hidden layers of the Q-network."""

    hidden_sizes: Sizes = (120, 84)
    """units of each hidden layer"""
    activation: Literal["relu", "leaky_relu", "tanh"] = "relu"
    """activation after each hidden layer"""


@dataclass
class Args(Experiment, Environment, Learning, Replay, Exploration, Networks, Evaluating, Checkpoints):
    """Train an agent, continue its training, or evaluate it."""

    exp_name: Name = Path(__file__).stem
    env_id: str = "CartPole-v1"

    def wrap(self, env: gym.Env) -> gym.Env:
        """Discretise the actions if they are a Box: --bins values for each dimension."""
        if isinstance(env.action_space, gym.spaces.Box) and self.bins is not None:
            number = self.bins**env.action_space.low.size
            if number > MAX_ACTIONS:
                raise UsageError(
                    f"--bins {self.bins}: makes {number} actions of {env.action_space}, must make {MAX_ACTIONS} at most"
                )
            env = gym.wrappers.DiscretizeAction(env, self.bins)
        return env

    def check_spaces(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        """Actions must be Discrete, numbered from 0."""
        what = f"--env-id {self.env_id}: its actions are {action_space}, must be Discrete"
        if isinstance(action_space, gym.spaces.Box):
            raise UsageError(f"{what}, or be discretised with --bins 3")
        if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0 or action_space.n > MOST_OUTPUTS:
            raise UsageError(f"{what}, numbered from 0, {MOST_OUTPUTS:,} at most")


class QNetwork(nn.Module):
    """Q(s, .): (N, O) observations to (N, number of actions) values."""

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete, args: Args):
        super().__init__()
        layers, inputs = [], observation_space.shape[0]
        for units in args.hidden_sizes:
            layers += [nn.Linear(inputs, units), ACTIVATIONS[args.activation]()]
            inputs = units
        self.network = nn.Sequential(*layers, nn.Linear(inputs, int(action_space.n)))

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(obs)


class DQN(Agent):
    """The agent: a Q-network, a target copy of it, and an optimiser."""

    args: Args

    def __init__(self, observation_space: gym.spaces.Box, action_space: gym.spaces.Discrete, args: Args, device: torch.device):
        super().__init__(observation_space, action_space, args, device)
        self.q_network = QNetwork(observation_space, action_space, args).to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        capturable = device.type == "cuda"  # step counts are then on the device, where a graph can increase them
        adam = partial(torch.optim.AdamW, weight_decay=0.0, fused=True, capturable=capturable)
        self.optimizer = adam(self.q_network.parameters(), lr=args.learning_rate)
        self.networks = {"q_network": self.q_network, "target_network": self.target_network}
        self.optimizers = {"q_network": self.optimizer}

    @torch.no_grad()
    def policy(self, obs: Tensor) -> Tensor:
        """The greedy actions: (N, O) observations to (N,) indices; of equal values, the first."""
        return self.q_network(obs).argmax(dim=1)

    @torch.no_grad()
    def value(self, obs: np.ndarray) -> np.ndarray:
        """The network's value of the greedy action, max Q(s, a): (N, O) observations to (N,) values."""
        return self.q_network(self.tensor(obs)).amax(dim=1).cpu().numpy()

    @torch.no_grad()
    def td_target(self, batch: ReplayBufferSamples) -> Tensor:
        """The (B,) values r + gamma max Q'(s', a') that the network learns (algorithm 1).

        `batch.dones` marks terminations only: where a time limit cut an episode off, the target still bootstraps.
        """
        next_q_values = self.target_network(batch.next_observations)
        if self.args.double_q:  # van Hasselt et al., equation 4
            next_actions = self.q_network(batch.next_observations).argmax(dim=1, keepdim=True)
            next_q_values = next_q_values.gather(1, next_actions).squeeze(1)
        else:
            next_q_values = next_q_values.amax(dim=1)
        return batch.rewards.flatten() + self.args.gamma * (1 - batch.dones.flatten()) * next_q_values

    def q_loss(self, batch: ReplayBufferSamples, td_target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss of the TD errors, and the (B,) values Q(s, a). `batch.actions` are (B, 1) indices."""
        td_target = self.td_target(batch) if td_target is None else td_target
        q_values = self.q_network(batch.observations).gather(1, batch.actions.long()).squeeze(1)
        td_loss = F.smooth_l1_loss if self.args.replay == "prioritized" else F.mse_loss
        return td_loss(q_values, td_target), q_values

    def update(self, batch: ReplayBufferSamples, update_policy: Literal[True] = True) -> Losses:
        """One step of the Q-network, and so of the policy: `update_policy` cannot be false.

        Returns detached scalars, still on the device: q_loss and q_est. Prioritised replay also needs the (B,) td_errors.
        """
        target = {"td_target": self.td_target(batch)} if self.args.replay == "prioritized" else {}  # used twice
        q_loss, q_values = self.q_loss(batch, **target)
        losses = {"q_loss": q_loss.detach(), "q_est": q_values.detach().mean()}
        if target:
            losses["td_errors"] = target["td_target"] - q_values.detach()
        self.optimizer.zero_grad()
        q_loss.backward()
        self.optimizer.step()
        return losses

    @torch.no_grad()
    def update_target(self) -> None:
        """Polyak averaging, target <- (1 - tau) target + tau online."""
        torch._foreach_lerp_(list(self.target_network.parameters()), list(self.q_network.parameters()), self.args.tau)


def epsilon(args: Args, global_step: int) -> float:
    """The probability of a random action at a step: falling linearly, then constant."""
    progress = min(1.0, global_step / (args.exploration_fraction * args.total_timesteps))
    return args.start_e + progress * (args.end_e - args.start_e)


def train(args: Args) -> Path:
    """Algorithm 1 of Mnih et al. (2015), then an evaluation of the best model. Returns the run's folder.

    Raises:
        UsageError, TrainingError, Stopped: as `steadyrl.run.Run` says.
    """
    with Run(args) as run, closing(run.make_envs()) as envs:
        spaces = envs.single_observation_space, envs.single_action_space
        agent = DQN(*spaces, args, run.device)
        rb = ReplayBuffer(args.buffer_size, *spaces, run.device, args.num_envs, **run.replay(agent, envs))
        run.resume(agent, envs, rb)  # a checkpoint is these; a resumed run has them restored
        agent = run.accelerated(agent)  # compiled or captured at its first real calls
        obs = envs.observations

        while run.unfinished:
            # Act: in each environment at random with probability epsilon, otherwise greedily.
            run.charts["epsilon"] = epsilon(args, run.global_step)
            explore = run.random.random_sample(args.num_envs) < run.charts["epsilon"]
            actions = envs.action_space.sample()
            if not explore.all():
                actions = np.where(explore, actions, agent.act(obs))
            next_obs, rewards, terminations, truncations, infos = envs.step(actions)
            run.global_step += args.num_envs

            # Store: next_obs of an ended episode is the first of the next one, not its successor. Only terminations are done.
            successors = final_observations(next_obs, infos)
            check_finite(run.global_step, observation=successors, reward=rewards)
            rb.add(obs, successors, actions, rewards * args.reward_scale, terminations, truncations)
            obs = next_obs

            # Learn.
            for _ in run.updates_due():
                run.record(agent.update(rb.sample(args.batch_size), update_policy=True))
            if run.global_step > args.learning_starts and run.due(args.target_network_frequency):
                agent.update_target()
            run.end_step(agent, infos)  # logs, evaluates and saves what is due, or stops
        run.finish(agent)
    return run.folder


main = command_line.Script(Args, DQN, train)

if __name__ == "__main__":
    main()
