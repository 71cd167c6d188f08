"""The learner, against an independent computation in NumPy at float64 and against properties of the algorithm."""

import dataclasses
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT
from stable_baselines3.common.type_aliases import ReplayBufferSamples

import ddpg_continuous_action as ddpg
import td3_continuous_action as td3

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = gym.spaces.Box(np.array([0, -3], np.float32), np.array([2, 1], np.float32))


@pytest.fixture
def agent() -> ddpg.DDPG:
    torch.manual_seed(0)
    args = ddpg.Args(gamma=0.9, tau=0.1, learning_rate=1e-2)
    return ddpg.DDPG(OBS, ACTIONS, args, torch.device("cpu"))


def batch_of(size: int, seed: int = 0, dtype=torch.float32) -> ReplayBufferSamples:
    """A batch with the shapes of stable-baselines3's replay buffer: dones and rewards have a trailing axis."""
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(size, 3)),
        rng.uniform(ACTIONS.low, ACTIONS.high, (size, 2)),
        rng.normal(size=(size, 3)),
        rng.random((size, 1)) < 0.3,
        rng.normal(size=(size, 1)),
    )
    return ReplayBufferSamples(*(torch.as_tensor(array, dtype=dtype) for array in arrays))


class NumpyDDPG:
    """DDPG by hand: explicit forward and backward passes, Adam and Polyak averaging on plain arrays."""

    critic = "critic"  # the name of the network, or of several, whose first six arrays the actor climbs

    def __init__(self, agent: ddpg.DDPG | td3.TD3):
        self.weights = {
            name: [parameter.detach().numpy().copy() for parameter in network.parameters()]
            for name, network in agent.networks.items()
        }
        self.scale, self.bias = (ACTIONS.high - ACTIONS.low) / 2.0, (ACTIONS.high + ACTIONS.low) / 2.0
        online = [name for name in self.weights if not name.startswith("target_")]
        self.moments = {name: [(np.zeros_like(w), np.zeros_like(w)) for w in self.weights[name]] for name in online}
        self.adam_steps = dict.fromkeys(online, 0)
        self.gamma, self.tau, self.learning_rate = agent.args.gamma, agent.args.tau, agent.args.learning_rate

    @staticmethod
    def forward(weights, x):
        w1, b1, w2, b2, w3, b3 = weights
        h1 = np.maximum(x @ w1.T + b1, 0)
        h2 = np.maximum(h1 @ w2.T + b2, 0)
        return h2 @ w3.T + b3, (x, h1, h2)

    @staticmethod
    def backward(weights, cache, d_out):
        w1, _, w2, _, w3, _ = weights
        x, h1, h2 = cache
        d_h2 = d_out @ w3 * (h2 > 0)
        d_h1 = d_h2 @ w2 * (h1 > 0)
        gradients = [d_h1.T @ x, d_h1.sum(0), d_h2.T @ h1, d_h2.sum(0), d_out.T @ h2, d_out.sum(0)]
        return gradients, d_h1 @ w1

    def act(self, name, obs):
        out, cache = self.forward(self.weights[name], obs)
        return np.tanh(out) * self.scale + self.bias, (np.tanh(out), cache)

    def critic_loss(self, obs, actions, next_obs, dones, rewards):
        next_actions, _ = self.act("target_actor", next_obs)
        next_values, _ = self.forward(self.weights["target_critic"], np.hstack([next_obs, next_actions]))
        values, cache = self.forward(self.weights["critic"], np.hstack([obs, actions]))
        error = values - (rewards + self.gamma * (1 - dones) * next_values)
        gradients, _ = self.backward(self.weights["critic"], cache, 2 * error / len(error))
        return (error**2).mean(), values.mean(), gradients

    def actor_loss(self, obs):
        actions, (tanh, actor_cache) = self.act("actor", obs)
        critic = self.weights[self.critic][:6]
        values, critic_cache = self.forward(critic, np.hstack([obs, actions]))
        _, d_input = self.backward(critic, critic_cache, np.full_like(values, -1 / len(values)))
        d_out = d_input[:, obs.shape[1] :] * self.scale * (1 - tanh**2)
        return -values.mean(), self.backward(self.weights["actor"], actor_cache, d_out)[0]

    def adam(self, name, gradients):
        self.adam_steps[name] += 1
        t = self.adam_steps[name]
        for weight, gradient, (m, v) in zip(self.weights[name], gradients, self.moments[name], strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            weight -= self.learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    def update(self, batch, *noise, update_policy):
        arrays = [tensor.numpy() for tensor in (*batch[:5], *noise)]
        q_loss, q_est, gradients = self.critic_loss(*arrays)
        self.adam(self.critic, gradients)
        losses = {"q_loss": q_loss, "q_est": q_est}
        if update_policy:
            losses["actor_loss"], gradients = self.actor_loss(arrays[0])
            self.adam("actor", gradients)
            for name in ("actor", self.critic):
                for target, online in zip(self.weights[f"target_{name}"], self.weights[name], strict=True):
                    target += self.tau * (online - target)
        return losses


def to_float64(agent: ddpg.DDPG) -> None:
    for network in agent.networks.values():
        network.double()


def test_losses_match_numpy(agent):
    to_float64(agent)
    agent.target_actor.load_state_dict(ddpg.Actor(OBS, ACTIONS, agent.args).double().state_dict())  # so that the targets differ
    agent.target_critic.load_state_dict(ddpg.Critic(OBS, ACTIONS, agent.args).double().state_dict())
    batch, by_hand = batch_of(32, dtype=torch.float64), NumpyDDPG(agent)
    q_loss, q_values = agent.critic_loss(batch)
    expected_loss, expected_mean, _ = by_hand.critic_loss(*(tensor.numpy() for tensor in batch[:5]))
    assert q_values.shape == (32,)
    assert q_loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert q_values.mean().item() == pytest.approx(expected_mean, rel=1e-12)
    assert agent.actor_loss(batch).item() == pytest.approx(by_hand.actor_loss(batch.observations.numpy())[0], rel=1e-12)


def test_five_updates_match_numpy(agent):
    to_float64(agent)
    by_hand = NumpyDDPG(agent)
    for number in range(1, 6):
        batch = batch_of(32, seed=number, dtype=torch.float64)
        losses = agent.update(batch, update_policy=number % 2 == 0)
        expected = by_hand.update(batch, update_policy=number % 2 == 0)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-9), (number, name)
    for name, network in agent.networks.items():
        for parameter, expected in zip(network.parameters(), by_hand.weights[name], strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-7, atol=1e-10, err_msg=name)


def test_critic_loss_of_a_hand_computed_batch(agent):
    """Q = 0 and Q' = 10: targets are 1 + 0.9 x 10 and, where the episode terminated, 1."""
    agent.critic = lambda obs, actions: 0 * actions[:, 0]
    agent.target_critic = lambda obs, actions: 0 * actions[:, 0] + 10
    batch = batch_of(2)._replace(dones=torch.tensor([[0.0], [1.0]]), rewards=torch.ones(2, 1))
    loss, q_values = agent.critic_loss(batch)
    assert q_values.shape == (2,)
    assert loss.item() == pytest.approx((10**2 + 1**2) / 2)


def test_targets_start_equal_and_receive_no_gradient(agent):
    for online, target in ((agent.actor, agent.target_actor), (agent.critic, agent.target_critic)):
        for a, b in zip(online.state_dict().values(), target.state_dict().values(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    agent.update(batch_of(8), update_policy=True)
    assert all(
        p.grad is None and not p.requires_grad for t in (agent.target_actor, agent.target_critic) for p in t.parameters()
    )


def test_an_actor_update_leaves_the_critic_alone(agent):
    """The critic's step is the same with and without an actor update, and no gradient of its weights is computed for it."""
    alone = ddpg.DDPG(OBS, ACTIONS, agent.args, torch.device("cpu"))
    for name, network in alone.networks.items():
        network.load_state_dict(agent.networks[name].state_dict())
    computed = []
    for parameter in agent.critic.parameters():
        parameter.register_hook(lambda gradient: computed.append(gradient.shape))
    alone.update(batch_of(8), update_policy=False)
    agent.update(batch_of(8), update_policy=True)
    assert len(computed) == len(list(agent.critic.parameters()))  # once each, by the critic's own loss
    for a, b in zip(agent.critic.parameters(), alone.critic.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


def test_targets_follow_polyak_averaging(agent):
    before = {name: [p.clone() for p in network.parameters()] for name, network in agent.networks.items()}
    agent.update(batch_of(8), update_policy=False)
    assert all(torch.equal(a, b) for a, b in zip(agent.target_critic.parameters(), before["target_critic"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(agent.actor.parameters(), before["actor"], strict=True))
    agent.update(batch_of(8), update_policy=True)
    for name in ("actor", "critic"):
        online = list(agent.networks[name].parameters())
        assert not all(torch.equal(a, b) for a, b in zip(online, before[name], strict=True))
        for new, old, now in zip(agent.networks[f"target_{name}"].parameters(), before[f"target_{name}"], online, strict=True):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * now)


def test_update_returns_detached_tensors_and_actor_loss_only_when_it_was_computed(agent):
    assert agent.update(batch_of(8), update_policy=False).keys() == {"q_loss", "q_est"}
    losses = agent.update(batch_of(8), update_policy=True)
    assert losses.keys() == {"q_loss", "q_est", "actor_loss"}
    assert all(value.shape == () and not value.requires_grad for value in losses.values())


def test_act_is_greedy_and_float32(agent):
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    actions = agent.act(obs)
    assert actions.dtype == np.float32 and actions.shape == (4, 2)
    np.testing.assert_array_equal(actions, agent.act(obs))
    np.testing.assert_array_equal(actions, agent.actor(torch.from_numpy(obs)).detach().numpy())


@pytest.mark.slow
def test_the_update_path_raises_no_warning():
    """`python -W error` turns a broadcast of (B,) against (B, 1), among others, into a failure."""
    code = "\n".join(
        [
            "import sys; sys.path.append('tests')",
            "import torch, test_ddpg",
            "agent = test_ddpg.ddpg.DDPG(test_ddpg.OBS, test_ddpg.ACTIONS, test_ddpg.ddpg.Args(), torch.device('cpu'))",
            "import warnings; warnings.simplefilter('error')",
            "for number in range(4): agent.update(test_ddpg.batch_of(8), update_policy=number % 2 == 0)",
            "print(warnings.filters[0][0])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "error\n", done.stderr


def test_a_loaded_state_brings_moments_but_no_settings(agent):
    """The learning rate, and whether graphs can be captured, are the arguments' and the device's."""
    other = ddpg.DDPG(OBS, ACTIONS, dataclasses.replace(agent.args, learning_rate=0.1, weight_decay=0.5), torch.device("cpu"))
    other.update(batch_of(8), update_policy=True)
    agent.load_state_dict(other.state_dict())
    for name, optimizer in agent.optimizers.items():
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (agent.args.learning_rate, agent.args.weight_decay) != (0.1, 0.5)
        for parameter, theirs in zip(group["params"], other.optimizers[name].param_groups[0]["params"], strict=True):
            for part, value in other.optimizers[name].state[theirs].items():
                assert torch.equal(optimizer.state[parameter][part], value)
