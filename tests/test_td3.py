"""TD3's learner, against an independent computation in NumPy at float64, DDPG's, and the algorithm's traps."""

import numpy as np
import pytest
import torch
import toys
from helpers import idle, quick_args
from test_ddpg import ACTIONS, OBS, NumpyDDPG, batch_of
from test_replay import stored

import ddpg_continuous_action as ddpg
import td3_continuous_action as td3


def agent_with(**changes) -> td3.TD3:
    torch.manual_seed(0)
    return td3.TD3(OBS, ACTIONS, quick_args(td3, **({"gamma": 0.9, "tau": 0.1} | changes)), torch.device("cpu"))


def noise_of(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).standard_normal((size, 2)), dtype=dtype)


def float64(agent: td3.TD3) -> td3.TD3:
    for network in agent.networks.values():
        network.double()
    return agent


class NumpyTD3(NumpyDDPG):
    """TD3 by hand. The arrays of the second critic follow those of the first."""

    critic = "critics"

    def __init__(self, agent: td3.TD3):
        super().__init__(agent)
        self.policy_noise, self.noise_clip = agent.args.policy_noise, agent.args.noise_clip

    def critic_loss(self, obs, actions, next_obs, dones, rewards, noise):
        smoothing = np.minimum(np.maximum(self.policy_noise * noise, -self.noise_clip), self.noise_clip)
        next_actions = self.act("target_actor", next_obs)[0] + smoothing * self.scale
        legal = np.minimum(np.maximum(next_actions, ACTIONS.low), ACTIONS.high)
        self.clipped = (abs(smoothing) == self.noise_clip).mean(), (legal != next_actions).mean()
        next_actions = legal
        targets = self.weights["target_critics"]
        first, second = (self.forward(ws, np.hstack([next_obs, next_actions]))[0] for ws in (targets[:6], targets[6:]))
        td_target = rewards + self.gamma * (1 - dones) * np.where(first < second, first, second)
        loss, gradients, means = 0.0, [], []
        for weights in (self.weights["critics"][:6], self.weights["critics"][6:]):
            values, cache = self.forward(weights, np.hstack([obs, actions]))
            error = values - td_target
            loss += (error**2).mean()
            means.append(values.mean())
            gradients += self.backward(weights, cache, 2 * error / len(error))[0]
        return loss, means[0], gradients


NOISY = {"policy_noise": 0.8, "noise_clip": 0.6}  # so that both the noise and the actions are clipped


def test_losses_match_numpy():
    agent = float64(agent_with(**NOISY))
    for target in (agent.target_actor, *agent.target_critics):  # so that the targets differ
        for parameter in target.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    batch, noise, by_hand = batch_of(64, dtype=torch.float64), noise_of(64, dtype=torch.float64), NumpyTD3(agent)
    q_loss, q_values = agent.critic_loss(batch, noise)
    expected_loss, expected_mean, _ = by_hand.critic_loss(*(tensor.numpy() for tensor in (*batch[:5], noise)))
    assert [values.shape for values in q_values] == [(64,), (64,)]
    assert q_loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert q_values[0].mean().item() == pytest.approx(expected_mean, rel=1e-12)
    assert agent.actor_loss(batch).item() == pytest.approx(by_hand.actor_loss(batch.observations.numpy())[0], rel=1e-12)
    assert all(0.05 < share < 0.95 for share in by_hand.clipped), by_hand.clipped


def test_five_updates_match_numpy():
    agent = float64(agent_with(learning_rate=1e-2, **NOISY))
    by_hand = NumpyTD3(agent)
    for number in range(1, 6):
        batch, noise = batch_of(32, seed=number, dtype=torch.float64), noise_of(32, seed=number, dtype=torch.float64)
        losses = agent.update(batch, noise, update_policy=number % 2 == 0)
        expected = by_hand.update(batch, noise, update_policy=number % 2 == 0)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].shape == () and not losses[name].requires_grad
            assert losses[name].item() == pytest.approx(value, rel=1e-9), (number, name)
    for name, network in agent.networks.items():
        for parameter, expected in zip(network.parameters(), by_hand.weights[name], strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-7, atol=1e-10, err_msg=name)


def test_the_smallest_value_counts_and_losses_add_up():
    """Q' = 10 and 4, the smaller counts: targets are 1 + 0.9 x 4 and, where the episode terminated, 1. Q = 0 and 2."""
    agent = agent_with()
    agent.critics = [lambda obs, actions: 0 * actions[:, 0], lambda obs, actions: 0 * actions[:, 0] + 2]
    agent.target_critics = [lambda obs, actions: 0 * actions[:, 0] + 10, lambda obs, actions: 0 * actions[:, 0] + 4]
    batch = batch_of(2)._replace(dones=torch.tensor([[0.0], [1.0]]), rewards=torch.ones(2, 1))
    for _ in range(2):
        loss, q_values = agent.critic_loss(batch, noise_of(2))
        assert loss.item() == pytest.approx((4.6**2 + 1**2) / 2 + (2.6**2 + 1**2) / 2)
        assert sorted(values[0].item() for values in q_values) == [0, 2]
        agent.critics.reverse(), agent.target_critics.reverse()


def test_the_target_does_not_ask_the_online_actor():
    """An actor of somebody else has no bounds of ours."""
    agent, batch, noise = agent_with(), batch_of(8), noise_of(8)
    loss, _ = agent.critic_loss(batch, noise)
    agent.actor = torch.nn.Linear(OBS.shape[0], 1)
    assert torch.equal(agent.critic_loss(batch, noise)[0], loss)


def test_equal_critics_without_smoothing_learn_what_ddpgs_learns():
    """The smallest value is then that of each; and the actor climbs the first alone."""
    agent = agent_with(policy_noise=0.0)
    plain = ddpg.DDPG(OBS, ACTIONS, quick_args(gamma=0.9, tau=0.1), torch.device("cpu"))
    pairs = [(agent.actor, plain.actor), (agent.target_actor, plain.target_actor)]
    pairs += [(critic, plain.critic) for critic in agent.critics]
    pairs += [(critic, plain.target_critic) for critic in agent.target_critics]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    for number in range(6):
        batch, policy = batch_of(8, seed=number), number % 2 == 1
        plain.update(batch, update_policy=policy)
        agent.update(batch, noise_of(8), update_policy=policy)
    for ours, theirs in pairs:
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)


def test_target_policy_smoothing_by_hand():
    """Noise of 0.2 half ranges, at most 0.5, on the target actor's action, within the bounds of each dimension ([0, 2] and
    [-3, 1])."""
    agent, seen = agent_with(policy_noise=0.2, noise_clip=0.5), []
    agent.target_actor = lambda obs: torch.tensor([[1.0, 0.5]]).expand(len(obs), 2)
    agent.target_critics = [lambda obs, actions: seen.append(actions) or 0 * actions[:, 0]] * 2
    noise = torch.tensor([[1.0, -1.0], [9.0, 9.0], [-2.0, 0.0]])
    agent.critic_loss(batch_of(3), noise)
    for actions in seen:  # both critics see the same
        torch.testing.assert_close(actions, torch.tensor([[1.2, 0.1], [1.5, 1.0], [0.6, 0.5]]))
    agent.args.policy_noise = 0.0  # the target actor's own
    agent.critic_loss(batch_of(3), noise)
    torch.testing.assert_close(seen[2], torch.tensor([[1.0, 0.5]]).expand(3, 2))


def test_smoothing_draws_fresh_noise_for_each_update(run):
    draws = []

    class Listening(td3.TD3):
        def update(self, batch, noise, update_policy):
            draws.append(noise)
            return {}

    run(quick_args(td3, policy_noise=0.3, learning_starts=100), Listening)
    assert all(noise.shape == (16, 2) and noise.dtype == torch.float32 for noise in draws)
    drawn = torch.stack(draws)
    assert len(drawn) == 200 == len(drawn.flatten(1).unique(dim=0))
    assert abs(drawn.std() - 1) < 0.05 and abs(drawn.mean()) < 0.05


def test_critics_start_apart_and_targets_equal():
    agent = agent_with()
    assert not torch.equal(agent.critics[0].q_value.weight, agent.critics[1].q_value.weight)
    for name in ("actor", "critics"):
        online, target = (agent.networks[key].parameters() for key in (name, f"target_{name}"))
        for a, b in zip(online, target, strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_targets_follow_polyak_averaging_where_the_policy_is_updated_and_receive_no_gradient():
    agent = agent_with()
    before = {name: [p.clone() for p in network.parameters()] for name, network in agent.networks.items()}
    losses = agent.update(batch_of(8), noise_of(8), update_policy=False)
    assert losses.keys() == {"q_loss", "q_est"}
    for name in ("actor", "target_actor", "target_critics"):
        assert all(map(torch.equal, agent.networks[name].parameters(), before[name])), name
    agent.update(batch_of(8), noise_of(8), update_policy=True)
    for name in ("actor", "critics"):
        online = list(agent.networks[name].parameters())
        assert not any(map(torch.equal, online, before[name]))
        for new, old, now in zip(agent.networks[f"target_{name}"].parameters(), before[f"target_{name}"], online, strict=True):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * now)
            assert new.grad is None and not new.requires_grad


def test_an_actor_update_leaves_the_critics_alone():
    """Their step is the same with and without it; no gradient of their weights is computed for it."""
    agent, alone, computed = agent_with(), agent_with(), []
    for parameter in agent.critics.parameters():
        parameter.register_hook(lambda gradient: computed.append(gradient.shape))
    alone.update(batch_of(8), noise_of(8), update_policy=False)
    agent.update(batch_of(8), noise_of(8), update_policy=True)
    assert len(computed) == len(list(agent.critics.parameters()))  # once each, by the critics' own loss
    for a, b in zip(agent.critics.parameters(), alone.critics.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


def test_act_is_greedy():
    agent, obs = agent_with(), batch_of(4).observations
    np.testing.assert_array_equal(agent.act(obs.numpy()), agent.actor(obs).detach().numpy())
    values = agent.critics[0](obs, agent.actor(obs)).detach().numpy()
    np.testing.assert_array_equal(agent.value(obs.numpy()), values)


def test_learning_rates():
    def rates(**changes) -> list[float]:
        agent = agent_with(learning_rate=0.3, **changes)
        return [optimizer.param_groups[0]["lr"] for optimizer in (agent.actor_optimizer, agent.critic_optimizer)]

    assert rates() == [0.3, 0.3]
    assert rates(actor_learning_rate=0.1) == [0.1, 0.3] and rates(critic_learning_rate=0.1) == [0.3, 0.1]


def test_hidden_sizes():
    agent = agent_with(hidden_sizes=(7, 5, 3))
    for network, inputs, outputs in ((agent.actor, 3, 2), *((critic, 5, 1) for critic in agent.critics)):
        shapes = [tuple(module.weight.shape) for module in network.modules() if isinstance(module, torch.nn.Linear)]
        assert shapes == [(7, inputs), (5, 7), (3, 5), (outputs, 3)]


def test_the_discounts_of_a_batch_take_the_place_of_gamma():
    batch, noise = batch_of(8), noise_of(8)
    summed = batch._replace(discounts=torch.full((8, 1), 0.7))
    loss, _ = agent_with(gamma=0.9).critic_loss(summed, noise)
    torch.testing.assert_close(loss, agent_with(gamma=0.7).critic_loss(batch, noise)[0])


def test_exploration_noise_falls_linearly(run):
    """From 0.3 half ranges to 0: at the middle of the first eighth of the run it is 15/16 of that, at the end 1/16."""
    falling = {"exploration_noise": 0.3, "exploration_noise_end": 0.0, "total_timesteps": 1600, "learning_starts": 0}
    parts = run(quick_args(td3, env_id="Bounds-v0", buffer_size=1600, **falling), idle(td3))
    greedy = parts.agent.act(np.zeros((1, 1), np.float32))
    space = toys.Bounds.action_space
    noise = (stored(parts.rb)["actions"] - greedy) / ((space.high - space.low) / 2)
    assert noise[:200].std() == pytest.approx(0.3 * 15 / 16, rel=0.1)
    assert noise[-200:].std() == pytest.approx(0.3 / 16, rel=0.3)
