"""The defaults are plain DDPG: a loop written out flat, with none of the script's controls, gives the same bits."""

import copy

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import quick_args


def plain_ddpg(args) -> dict[str, list[torch.Tensor]]:
    """CleanRL's algorithm on one environment; returns the final weights of actor, critic and their targets."""
    random = np.random.RandomState(args.seed)
    torch.manual_seed(args.seed)
    env = gym.make(args.env_id)
    assert isinstance(env.action_space, gym.spaces.Box)
    env.action_space.seed(args.seed)
    low, high = (torch.from_numpy(bound) for bound in (env.action_space.low, env.action_space.high))

    def mlp(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))

    actor_net, critic_net = mlp(3, 2), mlp(5, 1)
    targets = copy.deepcopy(actor_net), copy.deepcopy(critic_net)

    def mu(network, obs):
        return torch.tanh(network(obs)) * (high - low) / 2 + (high + low) / 2

    def q(network, obs, actions):
        return network(torch.cat([obs, actions], 1))[:, 0]

    actor_optimizer = torch.optim.Adam(actor_net.parameters(), lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic_net.parameters(), lr=args.learning_rate, fused=True)
    replay = []
    obs = env.reset(seed=args.seed)[0].astype(np.float32)
    updates = 0
    for step in range(1, args.total_timesteps + 1):
        if step <= args.learning_starts:
            action = env.action_space.sample()
        else:
            with torch.no_grad():
                mean = mu(actor_net, torch.from_numpy(obs[None])).numpy()[0]
            noise = random.standard_normal(2).astype(np.float32)
            action = np.clip(mean + args.exploration_noise * (high - low).numpy() / 2 * noise, low.numpy(), high.numpy())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        next_obs = next_obs.astype(np.float32)
        replay.append((obs, action, np.float32(reward), np.float32(terminated), next_obs))
        obs = env.reset()[0].astype(np.float32) if terminated or truncated else next_obs
        if step <= args.learning_starts:
            continue
        updates += 1
        rows = random.randint(0, len(replay), size=args.batch_size)
        random.randint(0, 1, size=args.batch_size)  # stable-baselines3 also draws an environment for each row
        s, a, r, d, s2 = (torch.from_numpy(np.stack(column)) for column in zip(*(replay[row] for row in rows), strict=True))
        with torch.no_grad():
            target = r + args.gamma * (1 - d) * q(targets[1], s2, mu(targets[0], s2))
        critic_optimizer.zero_grad()
        F.mse_loss(q(critic_net, s, a), target).backward()
        critic_optimizer.step()
        if updates % args.policy_frequency == 0:
            actor_optimizer.zero_grad()
            (-q(critic_net, s, mu(actor_net, s)).mean()).backward()
            actor_optimizer.step()
            for target_net, net in zip(targets, (actor_net, critic_net), strict=True):
                for target_parameter, parameter in zip(target_net.parameters(), net.parameters(), strict=True):
                    target_parameter.data.lerp_(parameter.data, args.tau)
    networks = {"actor": actor_net, "critic": critic_net, "target_actor": targets[0], "target_critic": targets[1]}
    return {name: list(network.parameters()) for name, network in networks.items()}


def test_the_defaults_are_plain_ddpg_to_the_last_bit(run):
    args = quick_args(
        env_id="Pendulum-like-v0", hidden_sizes=(256, 256), learning_starts=100, save_model=False, episode_replay="auto"
    )
    agent = run(args).agent
    for name, expected in plain_ddpg(args).items():
        for parameter, plain in zip(agent.networks[name].parameters(), expected, strict=True):
            assert torch.equal(parameter, plain), name
