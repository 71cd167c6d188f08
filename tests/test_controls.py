"""The controls beyond plain DDPG, each against what it promises."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.vector.utils import batch_space
from helpers import idle, quick_args
from test_ddpg import ACTIONS, OBS, batch_of
from test_replay import stored

import ddpg_continuous_action as ddpg
import steadyrl.run
from steadyrl import environments, evaluation
from steadyrl.arguments import parse_args
from steadyrl.noise import ExplorationNoise

Idle = idle(ddpg)


def agent_with(**changes) -> ddpg.DDPG:
    torch.manual_seed(0)
    return ddpg.DDPG(OBS, ACTIONS, quick_args(**changes), torch.device("cpu"))


def noise_of(parts) -> np.ndarray:
    """What exploration added to the greedy action, in units of half the range: (steps, environments, dimensions)."""
    greedy = parts.agent.act(np.zeros((1, 1), np.float32))
    return (stored(parts.rb)["actions"] - greedy) / ((ACTION_RANGE[1] - ACTION_RANGE[0]) / 2)


ACTION_RANGE = np.array([0, -3, 10], np.float32), np.array([2, 1, 10.5], np.float32)


@pytest.mark.slow
def test_ou_noise_is_a_process_of_each_environment_that_starts_anew_with_each_episode(run):
    args = quick_args(
        env_id="Bounds-v0",
        num_envs=3,
        noise="ou",
        exploration_noise=0.2,
        total_timesteps=15_000,
        learning_starts=0,
        buffer_size=15_000,
    )
    noise = noise_of(run(args, Idle)).reshape(-1, 50, 9)  # (episodes of 50 steps, step, environments x dimensions)
    increments = noise[:, 1:] - (1 - 0.15 * 0.01) * noise[:, :-1]
    np.testing.assert_allclose(noise[:, 0].std(axis=0), 0.2 * 0.1, rtol=0.25)  # from zero: sigma sqrt(dt)
    np.testing.assert_allclose(increments.reshape(-1, 9).std(axis=0), 0.2 * 0.1, rtol=0.06)
    correlation = np.corrcoef(increments.reshape(-1, 9).T) - np.eye(9)
    assert abs(correlation).max() < 0.1
    assert np.corrcoef(noise[:, 10:-1].ravel(), noise[:, 11:].ravel())[0, 1] > 0.9


def test_ou_noise_starts_anew_where_an_episode_starts():
    noise = ExplorationNoise("ou", batch_space(ACTIONS, 2), np.random.RandomState(0), 1.0)
    noise.values[:] = 100.0
    anew, going_on = noise(0, np.array([True, False])) / noise.half_range
    assert (abs(anew) < 10).all() and (going_on > 90).all()


class Ones(np.random.RandomState):
    """A generator that always draws ones."""

    def standard_normal(self, size=None):
        return np.ones(size)


def test_noise_decays_linearly_and_then_stays(run):
    steps, space = (0, 125, 250, 500, 750, 1000), batch_space(ACTIONS, 1)
    falling = ExplorationNoise("gaussian", space, Ones(), 0.5, end=0.1, steps=500)
    constant = ExplorationNoise("gaussian", space, Ones(), 0.3)
    none_starts, half_range = np.zeros(1, bool), (ACTIONS.high - ACTIONS.low) / 2
    np.testing.assert_allclose(
        [falling(step, none_starts) for step in steps], np.multiply.outer([0.5, 0.4, 0.3, 0.1, 0.1, 0.1], [half_range])
    )
    np.testing.assert_allclose(constant(10**6, none_starts), [0.3 * half_range])

    falling = {"exploration_noise": 0.3, "exploration_noise_end": 0.0, "total_timesteps": 1600, "buffer_size": 1600}
    args = quick_args(env_id="Bounds-v0", learning_starts=0, **falling)
    whole, half = (noise_of(run(dataclasses.replace(args, exploration_fraction=share), Idle)) for share in (1.0, 0.5))
    assert whole[:200].std() == pytest.approx(0.3 * 15 / 16, rel=0.1)
    assert whole[-200:].std() == pytest.approx(0.3 / 16, rel=0.3)
    assert half[:200].std() == pytest.approx(0.3 * 7 / 8, rel=0.1) and not half[800:].any()


def test_learning_rates_and_weight_decay():
    def rates(agent):
        return [optimizer.param_groups[0]["lr"] for optimizer in (agent.actor_optimizer, agent.critic_optimizer)]

    assert rates(agent_with(learning_rate=0.3)) == [0.3, 0.3]
    assert rates(agent_with(learning_rate=0.3, actor_learning_rate=0.1)) == [0.1, 0.3]
    assert rates(agent_with(learning_rate=0.3, critic_learning_rate=0.1)) == [0.3, 0.1]
    plain, decayed = agent_with(), agent_with(weight_decay=0.5)
    before = plain.critic.q_value.weight.detach().clone()
    for agent in (plain, decayed):
        agent.update(batch_of(8), update_policy=False)
    shrunk = plain.critic.q_value.weight - 3e-4 * 0.5 * before  # decoupled: subtracted beside Adam's own step
    torch.testing.assert_close(decayed.critic.q_value.weight, shrunk)


def test_huber_loss_of_a_hand_computed_batch():
    """TD errors 0.5 and 3: 0.5 x 0.5^2 and 3 - 0.5."""
    agent = agent_with(critic_loss="huber", gamma=0.0)
    agent.critic = lambda obs, actions: 0 * actions[:, 0]
    loss, _ = agent.critic_loss(batch_of(2)._replace(rewards=torch.tensor([[0.5], [-3.0]])))
    assert loss.item() == pytest.approx((0.125 + 2.5) / 2)


@pytest.mark.parametrize(("activation", "layer"), [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)])
def test_hidden_sizes_and_activation(activation, layer):
    agent = agent_with(hidden_sizes=(7, 5, 3), activation=activation)
    for network, inputs, outputs in ((agent.actor, 3, 2), (agent.critic, 5, 1)):
        shapes = [tuple(module.weight.shape) for module in network.modules() if isinstance(module, nn.Linear)]
        assert shapes == [(7, inputs), (5, 7), (3, 5), (outputs, 3)]
        assert sum(isinstance(module, layer) for module in network.modules()) == 3


def test_layer_normalization_comes_before_the_activation():
    hidden = agent_with(normalization="layer").actor.hidden
    assert [type(module) for module in hidden] == [nn.Linear, nn.LayerNorm, nn.ReLU] * 2


def state(network) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_normalization_acts_with_running_statistics():
    agent = agent_with(normalization="batch")
    for number in range(4):
        agent.update(batch_of(32, seed=number), update_policy=number % 2 == 1)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    before = state(agent.actor)
    rows = np.concatenate([agent.act(row[None]) for row in obs])
    np.testing.assert_allclose(agent.act(obs), rows, rtol=1e-4, atol=1e-6)
    agent.value(obs)
    assert equal(state(agent.actor), before)  # acting moves no statistics


def test_batch_normalization_learns_with_the_batchs_own_statistics():
    agent = agent_with(normalization="batch")
    batch = batch_of(32)
    seen = []
    agent.critic.hidden[1].register_forward_hook(lambda module, inputs, output: seen.append((module.training, output)))
    agent.update(batch, update_policy=True)
    (critic_training, critic_output), (actor_training, _) = seen
    assert critic_training and not actor_training
    torch.testing.assert_close(critic_output.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
    assert not any(module.training for network in agent.networks.values() for module in network.modules())


def test_batch_normalization_carries_its_statistics_to_the_targets_and_leaves_other_networks_alone():
    agent = agent_with(normalization="batch")
    initial = {name: state(network) for name, network in agent.networks.items()}
    agent.update(batch_of(32), update_policy=False)
    assert not equal(list(agent.critic.buffers()), list(agent.target_critic.buffers()))
    assert all(equal(state(agent.networks[name]), initial[name]) for name in ("actor", "target_actor", "target_critic"))
    alone = agent_with(normalization="batch")
    alone.update(batch_of(32), update_policy=False)
    alone.update(batch_of(32, seed=1), update_policy=False)
    agent.update(batch_of(32, seed=1), update_policy=True)
    assert equal(state(agent.critic), state(alone.critic))  # the actor's update moved no statistics of the critic
    for online, target in ((agent.actor, agent.target_actor), (agent.critic, agent.target_critic)):
        assert equal(list(online.buffers()), list(target.buffers()))


def test_asynchronous_environments_give_the_same_run(run):
    synchronous, asynchronous = (run(quick_args(num_envs=3, vectorization=how)) for how in ("sync", "async"))
    for name, rows in stored(synchronous.rb).items():
        np.testing.assert_array_equal(rows, stored(asynchronous.rb)[name])
    for name in synchronous.agent.networks:
        assert equal(state(synchronous.agent.networks[name]), state(asynchronous.agent.networks[name]))


@pytest.mark.parametrize(
    ("num_envs", "train_frequency", "gradient_steps", "points", "updates"),
    [
        (1, 1, 1, 200, [1] * 200),
        (1, 10, 4, 20, [4] * 20),
        (1, 10, -1, 20, [10] * 20),
        (4, 1, -1, 50, [4] * 50),
        (4, 10, 1, 20, [1] * 20),  # the steps 112, 120, 132, 140 and so on cross multiples of 10
        (4, 10, -1, 20, [12, 8] * 10),
    ],
)
def test_training_points(run, num_envs, train_frequency, gradient_steps, points, updates):
    calls = []

    class Counting(Idle):
        def act(self, obs):
            calls.append("act")
            return super().act(obs)

        def update(self, batch, update_policy):
            calls.append(update_policy)
            return {}

    rhythm = {"train_frequency": train_frequency, "gradient_steps": gradient_steps, "policy_frequency": 3}
    run(quick_args(num_envs=num_envs, learning_starts=100, **rhythm), Counting)
    order = " ".join("a" if call == "act" else "u" for call in calls)
    groups = [len(group.split()) for group in order.split("a") if group.strip()]
    assert len(groups) == points and groups == updates
    actor_updates = [call for call in calls if call != "act"]
    assert actor_updates == [number % 3 == 0 for number in range(1, len(actor_updates) + 1)]


def test_reward_scale_is_seen_by_the_learner_alone(run):
    plain, scaled = (run(quick_args(reward_scale=scale, eval_frequency=100), Idle) for scale in (1.0, 0.25))
    np.testing.assert_allclose(stored(scaled.rb)["rewards"], 0.25 * stored(plain.rb)["rewards"], rtol=1e-6)
    assert scaled.scalars["charts/episodic_return"] == plain.scalars["charts/episodic_return"]
    assert scaled.scalars["eval/episodic_return"] == plain.scalars["eval/episodic_return"]


def test_q_bias_is_in_units_of_the_rewards():
    """A critic that expects 3 scaled by 0.5, where 0 follows."""
    args = quick_args(env_id="Identity-v0", reward_scale=0.5)
    env = environments.make_env(args)
    agent = ddpg.DDPG(env.observation_space, env.action_space, args, torch.device("cpu"))
    agent.actor, agent.critic = lambda obs: obs, lambda obs, actions: torch.full((len(obs),), 1.5)
    assert evaluation.evaluate(agent, args, 2, seed=0).q_bias == pytest.approx(3)


def test_environment_arguments_and_time_limit(run):
    ends = [[3, "truncated"]]
    lengths = run(quick_args(env_id="Counter-v0", env_kwargs={"ends": ends}), Idle).scalars["charts/episodic_length"]
    assert {length for _, length in lengths} == {3}
    lengths = run(quick_args(env_id="Counter-v0", max_episode_steps=2), Idle).scalars["charts/episodic_length"]
    assert {length for _, length in lengths} == {2}
    parsed = parse_args(ddpg.Args, ["--env-kwargs", '{"reset_noise_scale": 0.2}'], ddpg.Args())
    assert parsed.env_kwargs == {"reset_noise_scale": 0.2}
    env = gym.make("InvertedPendulum-v5", **parsed.env_kwargs)
    assert env.unwrapped._reset_noise_scale == 0.2


def test_target_return_ends_training_at_the_evaluation_that_reaches_it(run, monkeypatch, capsys):
    means = iter([1.0, 5.0, 9.0])

    def evaluations(*_, **__):
        return evaluation.Evaluation(np.array([next(means)]), np.array([1]), 0.0)

    monkeypatch.setattr(steadyrl.run, "evaluate", evaluations)
    parts = run(quick_args(eval_frequency=100, target_return=5.0))
    assert [step for step, _ in parts.scalars["eval/episodic_return"]] == [100, 200]
    assert parts.rb.pos == 200 and "to go on" not in capsys.readouterr().out  # nothing would continue it
    assert all((parts.run_dir / name).exists() for name in ("best_model.pt", "model.pt", "evaluation.json"))
