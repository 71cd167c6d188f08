"""SAC's learner, against an independent computation in NumPy at float64, torch's distributions, and the algorithm's traps."""

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import quick_args
from test_ddpg import ACTIONS, OBS, NumpyDDPG, batch_of
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform, TransformedDistribution

import sac_continuous_action as sac
from steadyrl import checks, environments, errors, evaluation
from steadyrl.arguments import parse_args


def agent_with(**changes) -> sac.SAC:
    torch.manual_seed(0)
    return sac.SAC(OBS, ACTIONS, quick_args(sac, **({"gamma": 0.9, "tau": 0.1} | changes)), torch.device("cpu"))


def float64(agent: sac.SAC) -> sac.SAC:
    for network in agent.networks.values():
        network.double()
    return agent


def noise_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


class NumpySAC:
    """SAC by hand: explicit forward and backward passes, Adam and Polyak averaging on plain arrays."""

    forward, backward = staticmethod(NumpyDDPG.forward), staticmethod(NumpyDDPG.backward)

    def __init__(self, agent: sac.SAC):
        def copies(network):
            return [parameter.detach().double().numpy().copy() for parameter in network.parameters()]

        *hidden, w_mu, b_mu, w_std, b_std = copies(agent.actor)
        self.actor = [*hidden, np.vstack([w_mu, w_std]), np.hstack([b_mu, b_std])]  # one layer with two parts
        self.critics = [copies(critic) for critic in agent.critics]
        self.targets = [copies(critic) for critic in agent.target_critics]
        self.log_alpha, self.args = np.array(agent.log_alpha.item()), agent.args
        self.scale, self.bias = (ACTIONS.high - ACTIONS.low) / 2.0, (ACTIONS.high + ACTIONS.low) / 2.0
        self.moments: dict[str, Any] = {}

    def act(self, obs, noise):
        out, cache = self.forward(self.actor, obs)
        mu, z = np.split(out, 2, axis=1)
        log_std = -5 + 7 * (np.tanh(z) + 1) / 2
        raw = mu + np.exp(log_std) * noise
        density = np.exp(-(noise**2) / 2) / np.sqrt(2 * np.pi) / np.exp(log_std)
        log_prob = np.log(density / (self.scale * (1 - np.tanh(raw) ** 2))).sum(axis=1)
        return np.tanh(raw) * self.scale + self.bias, log_prob, (cache, z, log_std, raw)

    def values(self, networks, obs, actions):
        results = [self.forward(weights, np.hstack([obs, actions])) for weights in networks]
        return np.stack([out[:, 0] for out, _ in results]), [cache for _, cache in results]

    def critic_loss(self, batch, noise):
        obs, actions, next_obs, dones, rewards = batch
        next_actions, next_log_prob, _ = self.act(next_obs, noise)
        next_values = self.values(self.targets, next_obs, next_actions)[0].min(axis=0) - np.exp(self.log_alpha) * next_log_prob
        target = rewards[:, 0] + self.args.gamma * (1 - dones[:, 0]) * next_values
        values, caches = self.values(self.critics, obs, actions)
        errors = values - target
        gradients = [
            self.backward(weights, cache, (2 * error / len(error))[:, None])[0]
            for weights, cache, error in zip(self.critics, caches, errors, strict=True)
        ]
        return (errors**2).mean(axis=1).sum(), values, gradients

    def actor_loss(self, obs, noise):
        alpha, size = np.exp(self.log_alpha), len(obs)
        actions, log_prob, (cache, z, log_std, raw) = self.act(obs, noise)
        values, caches = self.values(self.critics, obs, actions)
        d_actions = np.zeros_like(actions)
        for index, (weights, critic_cache) in enumerate(zip(self.critics, caches, strict=True)):
            chosen = (values.argmin(axis=0) == index)[:, None]
            d_actions += self.backward(weights, critic_cache, -1.0 * chosen / size)[1][:, obs.shape[1] :]
        d_raw = d_actions * self.scale * (1 - np.tanh(raw) ** 2) + alpha / size * 2 * np.tanh(raw)
        d_log_std = d_raw * np.exp(log_std) * noise - alpha / size
        d_out = np.hstack([d_raw, d_log_std * 3.5 * (1 - np.tanh(z) ** 2)])
        return (alpha * log_prob - values.min(axis=0)).mean(), log_prob, self.backward(self.actor, cache, d_out)[0]

    def adam(self, name, weights, gradients, learning_rate):
        steps, moments = self.moments.setdefault(name, ([0], [(np.zeros_like(w), np.zeros_like(w)) for w in weights]))
        steps[0] += 1
        for weight, gradient, (m, v) in zip(weights, gradients, moments, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            weight -= learning_rate * (m / (1 - 0.9 ** steps[0])) / (np.sqrt(v / (1 - 0.999 ** steps[0])) + 1e-8)

    def update(self, batch, noise, update_policy):
        batch, noise = [tensor.numpy() for tensor in batch[:5]], noise.numpy()
        q_loss, values, gradients = self.critic_loss(batch, noise[0])
        for index, (weights, gradient) in enumerate(zip(self.critics, gradients, strict=True)):
            self.adam(index, weights, gradient, self.args.q_lr)
        losses = {"q_loss": q_loss, "q_est": values.mean()}
        if update_policy:
            for actor_noise in noise[1:]:
                losses["actor_loss"], log_prob, gradients = self.actor_loss(batch[0], actor_noise)
                self.adam("actor", self.actor, gradients, self.args.policy_lr)
                if self.args.autotune:
                    gradient = -np.exp(self.log_alpha) * (log_prob.mean() - 2)  # the entropy target is -2
                    self.adam("alpha", [self.log_alpha], [gradient], self.args.q_lr)
            losses["alpha"] = np.exp(self.log_alpha)
        for target, online in zip(sum(self.targets, []), sum(self.critics, []), strict=True):  # noqa: RUF017
            target += self.args.tau * (online - target)
        return losses


MILESTONES = [{"num_critics": 1, "alpha": 0.0, "autotune": False}, {"num_critics": 2, "alpha": 0.3, "autotune": False}, {}]


@pytest.mark.parametrize("changes", MILESTONES)
def test_losses_match_numpy(changes):
    agent = float64(agent_with(**changes))
    other = float64(agent_with(**changes))
    torch.nn.init.normal_(other.critics[0].q_value.weight)
    agent.target_critics.load_state_dict(other.critics.state_dict())  # so that the targets differ
    batch, by_hand = batch_of(32, dtype=torch.float64), NumpySAC(agent)
    noise = noise_of(32, 2)
    q_loss, q_values = agent.critic_loss(batch, noise)
    expected, values, _ = by_hand.critic_loss([tensor.numpy() for tensor in batch[:5]], noise.numpy())
    assert q_loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(q_values.detach(), values, rtol=1e-12)
    loss, log_prob = agent.actor_loss(batch, noise)
    expected, expected_log_prob, _ = by_hand.actor_loss(batch.observations.numpy(), noise.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(log_prob.detach(), expected_log_prob, rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2**2 + 3**2) / 2),
        ({"critic_loss": "huber"}, (1.5 + 2.5) / 2),
    ],
)
def test_losses_of_a_hand_computed_batch_add_up_over_the_critics(changes, expected):
    """TD errors 2 (target above the estimate) and -3 of two critics."""
    agent = agent_with(**changes)
    agent.critics = [lambda obs, actions: 0 * actions[:, 0]] * 2
    batch = batch_of(2)._replace(rewards=torch.tensor([[2.0], [-3.0]]), dones=torch.ones(2, 1))
    assert agent.critic_loss(batch, noise_of(2, 2).float())[0].item() == pytest.approx(2 * expected)


def test_the_discounts_of_a_batch_take_the_place_of_gamma():
    batch, noise = batch_of(8), noise_of(8, 2).float()
    summed = batch._replace(discounts=torch.full((8, 1), 0.7))
    loss, _ = agent_with(gamma=0.9).critic_loss(summed, noise)
    torch.testing.assert_close(loss, agent_with(gamma=0.7).critic_loss(batch, noise)[0])


def test_n_steps_reach_the_update(run, monkeypatch):
    seen, update = [], sac.SAC.update
    watched = lambda self, batch, **others: seen.append(batch.discounts) or update(self, batch, **others)  # noqa: E731
    monkeypatch.setattr(sac.SAC, "update", watched)
    run(quick_args(sac, env_id="Pendulum-like-v0", n_steps=3, gamma=0.5))
    assert set(torch.cat(seen).flatten().tolist()) == {0.5**3, 0.5**2, 0.5}  # fewer steps at the newest one


def test_weight_decay_is_decoupled_and_leaves_the_temperature_alone():
    plain, decayed = agent_with(), agent_with(weight_decay=0.5)
    before = plain.critics[0].q_value.weight.detach().clone()
    for agent in (plain, decayed):
        agent.update(batch_of(8), noise_of(3, 8, 2).float(), update_policy=False)
    shrunk = plain.critics[0].q_value.weight - 1e-3 * 0.5 * before
    torch.testing.assert_close(decayed.critics[0].q_value.weight, shrunk)
    assert {name: optimizer.param_groups[0]["weight_decay"] for name, optimizer in decayed.optimizers.items()} == {
        "actor": 0.5,
        "critic": 0.5,
        "alpha": 0,
    }


def test_batch_normalization_moves_the_statistics_of_the_network_that_learns_alone():
    """Of the critics, copied to their targets; then of the actor. Acting moves none; a row does not depend on its batch."""
    agent = agent_with(normalization="batch")

    def statistics() -> dict[str, list[torch.Tensor]]:
        return {name: [tensor.clone() for tensor in network.buffers()] for name, network in agent.networks.items()}

    def moved(before: dict[str, list[torch.Tensor]]) -> set[str]:
        return {name for name, tensors in statistics().items() if not all(map(torch.equal, tensors, before[name]))}

    before, noise = statistics(), noise_of(3, 32, 2).float()
    agent.update(batch_of(32), noise, update_policy=False, update_targets=False)
    assert moved(before) == {"critics"}
    before = statistics()
    agent.update(batch_of(32, seed=1), noise, update_policy=True)
    assert moved(before) == {"actor", "critics", "target_critics"}
    assert all(map(torch.equal, agent.critics.buffers(), agent.target_critics.buffers()))
    assert agent.actor.hidden[1].num_batches_tracked == 2  # one for each of its steps
    assert agent.critics[0].hidden[1].num_batches_tracked == 2  # none for the actor's steps
    before, obs = statistics(), batch_of(5).observations.numpy()
    rows = np.concatenate([agent.act(row[None]) for row in obs])
    np.testing.assert_allclose(agent.act(obs), rows, rtol=1e-4, atol=1e-6)
    agent.value(obs), agent.state_value(obs)
    assert not moved(before)


def test_the_critics_can_be_normalised_alone():
    agent = agent_with(critic_normalization="layer")
    kinds = {
        name: {type(layer).__name__ for layer in network.modules()} & {"LayerNorm"} for name, network in agent.networks.items()
    }
    assert kinds == {"actor": set(), "critics": {"LayerNorm"}, "target_critics": {"LayerNorm"}, "temperature": set()}
    assert agent_with(normalization="layer", critic_normalization="none").actor.hidden[1].normalized_shape == (32,)


@pytest.mark.parametrize("changes", MILESTONES)
def test_five_updates_match_numpy(changes):
    agent = float64(agent_with(q_lr=1e-2, **changes))
    by_hand = NumpySAC(agent)
    for number in range(1, 6):
        batch, noise = batch_of(32, seed=number, dtype=torch.float64), noise_of(3, 32, 2, seed=number)
        losses = agent.update(batch, noise, update_policy=number % 2 == 0)
        expected = by_hand.update(batch, noise, update_policy=number % 2 == 0)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert not losses[name].requires_grad
            assert losses[name].item() == pytest.approx(value, rel=1e-8), (number, name)
    mine = [parameter.detach().numpy() for parameter in (*agent.critics.parameters(), *agent.target_critics.parameters())]
    for parameter, expected in zip(mine, sum(by_hand.critics + by_hand.targets, []), strict=True):  # noqa: RUF017
        np.testing.assert_allclose(parameter, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(agent.actor.mu.weight.detach(), by_hand.actor[4][:2], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(agent.actor.log_std.bias.detach(), by_hand.actor[5][2:], rtol=1e-6, atol=1e-9)


def test_log_probabilities_are_those_of_torchs_distribution():
    """Bounds of another width in each dimension."""
    agent, noise = float64(agent_with()), noise_of(64, 2)
    obs = batch_of(64, dtype=torch.float64).observations
    actions, log_prob = agent.actor(obs, noise)
    x = agent.actor.hidden(obs)
    std = (-5 + 3.5 * (agent.actor.log_std(x).tanh() + 1)).exp()
    transforms = [TanhTransform(), AffineTransform(agent.actor.action_bias, agent.actor.action_scale)]
    expected = Independent(TransformedDistribution(Normal(agent.actor.mu(x), std), transforms), 1)
    torch.testing.assert_close(log_prob, expected.log_prob(actions), rtol=1e-8, atol=1e-8)
    low, high = torch.from_numpy(ACTIONS.low), torch.from_numpy(ACTIONS.high)
    assert ((actions >= low) & (actions <= high)).all()


def test_log_probabilities_stay_finite_at_the_bounds():
    agent = agent_with()
    torch.nn.init.constant_(agent.actor.mu.bias, 50.0)
    _, log_prob = agent.actor(batch_of(4).observations, torch.zeros(4, 2))
    assert log_prob.isfinite().all()


def test_without_noise_the_action_is_greedy_and_evaluation_repeats():
    agent = agent_with()
    obs = batch_of(5).observations.numpy()
    greedy = agent.act(obs)
    assert greedy.dtype == np.float32 and greedy.shape == (5, 2)
    np.testing.assert_array_equal(greedy, agent.act(obs, np.zeros((5, 2), np.float32)))
    mu = (
        torch.tanh(agent.actor.mu(agent.actor.hidden(torch.from_numpy(obs)))) * agent.actor.action_scale
        + agent.actor.action_bias
    )
    np.testing.assert_allclose(greedy, mu.detach(), rtol=1e-6)
    assert not np.array_equal(greedy, agent.act(obs, np.ones((5, 2), np.float32)))
    args = quick_args(sac)
    env = environments.make_env(args)
    agent = sac.SAC(env.observation_space, env.action_space, args, torch.device("cpu"))
    first, second = (evaluation.evaluate(agent, args, 3, seed=0) for _ in range(2))
    np.testing.assert_array_equal(first.returns, second.returns)


def test_a_termination_cuts_the_entropy_bonus_too():
    """Reward 0, terminated: the target is 0 whatever alpha is; not terminated, it is gamma (Q' - alpha log pi)."""
    agent = agent_with(alpha=5.0, autotune=False)
    agent.critics = [lambda obs, actions: 0 * actions[:, 0]]
    agent.target_critics = [lambda obs, actions: 0 * actions[:, 0] + 3]
    batch, noise = batch_of(4)._replace(rewards=torch.zeros(4, 1)), noise_of(4, 2).float()
    assert agent.critic_loss(batch._replace(dones=torch.ones(4, 1)), noise)[0].item() == 0
    _, log_prob = agent.actor(batch.next_observations, noise)
    expected = (0.9 * (3 - 5 * log_prob)).square().mean()
    torch.testing.assert_close(agent.critic_loss(batch._replace(dones=torch.zeros(4, 1)), noise)[0], expected.detach())


def test_the_targets_action_is_the_online_actors_with_the_noise_given():
    agent, seen = agent_with(), []
    agent.target_critics = [lambda obs, actions: seen.append((obs, actions)) or 0 * actions[:, 0]]
    batch, noise = batch_of(6), noise_of(6, 2).float()
    agent.critic_loss(batch, noise)
    ((obs, actions),) = seen
    assert torch.equal(obs, batch.next_observations)
    assert torch.equal(actions, agent.actor(batch.next_observations, noise)[0])


def test_gradients_reach_what_they_should_and_nothing_else():
    agent, batch, noise = agent_with(), batch_of(8), noise_of(8, 2).float()
    agent.critic_loss(batch, noise)[0].backward()
    assert all(p.grad is None for p in (*agent.actor.parameters(), *agent.target_critics.parameters(), agent.log_alpha))
    agent = agent_with()
    loss, log_prob = agent.actor_loss(batch, noise)
    loss.backward()
    assert agent.log_alpha.grad is None and log_prob.requires_grad
    agent = agent_with()
    before = [parameter.clone() for parameter in agent.critics.parameters()]
    agent.update(batch, noise_of(3, 8, 2).float(), update_policy=False)
    after = [parameter.clone() for parameter in agent.critics.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    alone = agent_with()
    alone.update(batch, noise_of(3, 8, 2).float(), update_policy=True)  # the actor's steps leave the critics alone
    assert all(torch.equal(a, b) for a, b in zip(alone.critics.parameters(), after, strict=True))
    assert all(parameter.grad is None for parameter in alone.target_critics.parameters())


def test_the_temperature_by_hand():
    """One step of Adam moves it by the learning rate: up while the entropy is below -2, down while it is above."""
    for log_std, sign in ((-50.0, 1), (0.39, -1)):
        agent = agent_with(policy_frequency=1)
        torch.nn.init.constant_(agent.actor.log_std.bias, log_std)
        torch.nn.init.zeros_(agent.actor.log_std.weight)
        torch.nn.init.zeros_(agent.actor.mu.weight)
        agent.update(batch_of(64), noise_of(2, 64, 2).float(), update_policy=True)
        assert agent.log_alpha.item() == pytest.approx(sign * 1e-3, rel=1e-4)


def test_the_temperature_is_fixed_without_autotune():
    for alpha in (0.0, 0.2):
        agent = agent_with(alpha=alpha, autotune=False)
        losses = agent.update(batch_of(8), noise_of(3, 8, 2).float(), update_policy=True)
        assert losses["alpha"].item() == pytest.approx(alpha) and all(value.isfinite() for value in losses.values())
        assert agent.optimizers.keys() == {"actor", "critic"}


def test_a_delayed_policy_is_made_up_for(run):
    """As many steps of the actor as of the critics, three at a time, each with noise of its own; targets at every second."""
    calls, steps = [], []

    class Counting(sac.SAC):
        def update(self, batch, noise, update_policy, update_targets):
            calls.append((update_policy, update_targets, noise.clone()))
            return super().update(batch, noise, update_policy, update_targets)

        def actor_loss(self, batch, noise):
            steps.append(noise.clone())
            return super().actor_loss(batch, noise)

    run(quick_args(sac, policy_frequency=3, target_network_frequency=2, learning_starts=282), Counting)
    assert [policy for policy, _, _ in calls] == [number % 3 == 0 for number in range(1, 19)]
    assert [targets for _, targets, _ in calls] == [number % 2 == 0 for number in range(1, 19)]
    assert len(steps) == 18
    drawn = torch.cat([noise for _, _, noise in calls])
    assert drawn.shape == (18 * 4, 16, 2) and len(drawn.flatten(1).unique(dim=0)) == 18 * 4


@pytest.mark.slow
def test_noise_is_drawn_for_each_environment_and_dimension(run):
    """Four environments in the same state, a standard deviation as small as the actor gives: no two actions go together."""

    class Narrow(sac.SAC):
        def __init__(self, *values):
            super().__init__(*values)
            for layer in (self.actor.mu, self.actor.log_std):
                torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(self.actor.mu.bias), torch.nn.init.constant_(self.actor.log_std.bias, -50.0)

        def update(self, *_, **__):
            return {}

    args = quick_args(sac, env_id="Bounds-v0", num_envs=4, total_timesteps=12_000, learning_starts=0, buffer_size=12_000)
    actions = run(args, Narrow).rb.actions.reshape(-1, 12)
    np.testing.assert_allclose(actions.mean(axis=0), np.tile([1, -1, 10.25], 4), atol=0.001)
    np.testing.assert_allclose(actions.std(axis=0), np.exp(-5) * np.tile([1, 2, 0.25], 4), rtol=0.06)
    assert abs(np.corrcoef(actions.T) - np.eye(12)).max() < 0.1


@pytest.mark.parametrize(("policy_frequency", "steps"), [(3, [200, 300, 400, 500]), (150, [300, 400]), (1000, [])])
def test_an_actor_loss_is_logged_only_if_it_is_new(run, policy_frequency, steps):
    """(An update of the actor is the 150th and the 300th, at steps 250 and 400.)"""

    class Telling(sac.SAC):
        def update(self, batch, update_policy, **others):
            return dict.fromkeys(("q_loss", "actor_loss", "alpha") if update_policy else ("q_loss",), torch.zeros(()))

    args = quick_args(sac, policy_frequency=policy_frequency, total_timesteps=500, learning_starts=100, batch_size=2)
    scalars = run(args, Telling).scalars
    for name in ("actor_loss", "alpha"):
        assert [step for step, _ in scalars.get(f"losses/{name}", [])] == steps
    assert [step for step, _ in scalars["losses/q_loss"]] == [200, 300, 400, 500]


def test_targets_start_equal_and_follow_polyak_averaging():
    agent = agent_with()
    for a, b in zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    before = [parameter.clone() for parameter in agent.target_critics.parameters()]
    agent.update(batch_of(8), noise_of(3, 8, 2).float(), update_policy=False, update_targets=False)
    assert all(torch.equal(a, b) for a, b in zip(agent.target_critics.parameters(), before, strict=True))
    agent.update(batch_of(8), noise_of(3, 8, 2).float(), update_policy=False)
    for new, old, online in zip(agent.target_critics.parameters(), before, agent.critics.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_critics_start_apart():
    first, second = agent_with().critics
    assert not torch.equal(first.q_value.weight, second.q_value.weight)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_q_bias_is_zero_for_a_critic_that_is_right(alpha):
    """Reward 1 a step, an actor of fixed entropy H: Q = 1 + gamma (Q + alpha H), so Q = (1 + gamma alpha H) / (1 - gamma)."""
    args = quick_args(sac, env_id="TimeLimited-v0", gamma=0.5, alpha=alpha, autotune=False, num_critics=1)
    env = environments.make_env(args)
    agent = sac.SAC(env.observation_space, env.action_space, args, torch.device("cpu"))
    for layer in (agent.actor.mu, agent.actor.log_std):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    noise = np.random.default_rng(0).standard_normal((8, 1))
    noise = torch.from_numpy((noise - noise.mean()) / noise.std()).float()
    entropy = -agent.actor(torch.zeros(8, 1), noise)[1].mean().item()
    right = (1 + 0.5 * alpha * entropy) / 0.5
    for error in (0.0, 2.0):
        agent.critics = [lambda obs, actions, value=right + error: torch.full((len(obs),), value)]
        biases = evaluation.evaluate(agent, args, 2, seed=0).q_bias
        share = np.mean([1 - 0.5 ** (5 - t) for t in range(5)])  # the end is completed with the critic's own value
        assert biases == pytest.approx(error * share, abs=1e-5)


def test_the_temperature_may_stay_as_it_is():
    assert not parse_args(sac.Args, ["--no-autotune"], sac.Args()).autotune


@pytest.mark.parametrize(
    ("half_ranges", "warns"), [((0.18, 0.18), True), ((0.19, 0.19), False), ((0.1, 1), False), ((0.02, 0.1, 0), True)]
)
def test_a_target_entropy_out_of_reach_is_said(half_ranges, warns, capsys):
    """The entropy over a range of 2 h is at most log(2 h), which is -1 at h = 0.184. A locked dimension has none."""
    high = np.float32(half_ranges)
    given = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Box(-high, high)
    env: Any = SimpleNamespace(observation_space=given[0], action_space=given[1], given_spaces=given)
    checks.check_spaces(quick_args(sac), env)
    assert ("entropy is at most" in capsys.readouterr().out) == warns
    checks.check_spaces(quick_args(sac, autotune=False), env)
    assert not capsys.readouterr().out


def test_discrete_actions_are_refused():
    with pytest.raises(errors.UsageError, match=r"--env-id CartPole-v1: its actions are Discrete\(2\)"):
        checks.check(sac.Args(env_id="CartPole-v1", buffer_size=1000))


@pytest.mark.slow
def test_identity_is_learned(run):
    """One-step episodes whose best action is the observation; the entropy target leaves the mean there."""
    args = quick_args(
        sac, env_id="Identity-v0", total_timesteps=2000, learning_starts=200, buffer_size=2000, batch_size=64, policy_lr=1e-3
    )
    agent = run(args).agent
    obs = np.linspace(-0.7, 0.7, 29, dtype=np.float32)[:, None]
    assert abs(agent.act(obs) - obs).max() < 0.2  # without learning about 0.7
    assert gym.spaces.Box(-1, 1, (1,)).contains(agent.act(obs)[0])
