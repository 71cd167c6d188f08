import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import quick_args
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.type_aliases import ReplayBufferSamples

import ddpg_continuous_action as ddpg
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl.agent import training_mode

DETERMINISTIC = [ddpg, td3]  # the scripts whose actor gives an action, not a distribution
OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)


def box(low, high) -> gym.spaces.Box:
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


@pytest.mark.parametrize("script", DETERMINISTIC)
def test_shapes(script):
    actor = script.Actor(OBS, box([0, -3], [2, 1]), script.Args())
    critic = script.Critic(OBS, gym.spaces.Box(-1, 1, (2,)), script.Args())
    obs = torch.randn(5, 3)
    assert actor(obs).shape == (5, 2)
    assert critic(obs, actor(obs)).shape == (5,)


@pytest.mark.parametrize("script", DETERMINISTIC)
def test_actions_are_scaled_and_shifted_per_dimension(script):
    """At tanh 0, 1 and -1 an action is the middle, the upper and the lower bound of its own dimension."""
    low, high = [0, -3, 10], [2, 1, 10.5]
    actor = script.Actor(OBS, box(low, high), script.Args())
    for bias, expected in ((0, np.add(low, high) / 2), (100, high), (-100, low)):
        torch.nn.init.zeros_(actor.mu.weight)
        torch.nn.init.constant_(actor.mu.bias, bias)
        np.testing.assert_allclose(actor(torch.randn(4, 3)).detach(), np.tile(expected, (4, 1)), rtol=1e-6)


finite = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize("script", [*DETERMINISTIC, sac])
@given(st.tuples(finite, finite).filter(lambda bounds: bounds[0] < bounds[1]))
def test_an_agent_acts_inside_any_bounds(script, bounds):
    """Also where its actor is saturated: middle plus half range, as rounded, may be beyond the bound."""
    agent = script.main.agent_class(OBS, box(bounds[:1], bounds[1:]), quick_args(script), torch.device("cpu"))
    for bias in (-100.0, 100.0):
        torch.nn.init.constant_(agent.actor.mu.bias, bias)
        action = agent.act(np.zeros((1, 3), np.float32)).item()
        assert np.float32(bounds[0]) <= action <= np.float32(bounds[1])


@pytest.mark.parametrize("script", DETERMINISTIC)
@pytest.mark.parametrize("obs", [1e-3, 1.0, 1e3])
def test_a_row_does_not_depend_on_its_batch(script, obs):
    actor, critic = (network(OBS, box([-1], [1]), script.Args()) for network in (script.Actor, script.Critic))
    batch = obs * torch.randn(6, 3)
    for network in (actor, lambda rows: critic(rows, actor(rows))):
        torch.testing.assert_close(network(batch)[2:3], network(batch[2:3]), rtol=1e-5, atol=1e-5)


def test_the_critic_can_be_normalised_alone():
    """Layers by name in both networks; and with batch normalisation the critic's statistics move, also in its target."""

    def kinds(**changes):
        agent = ddpg.DDPG(OBS, gym.spaces.Box(-1, 1, (2,), np.float32), ddpg.Args(**changes), torch.device("cpu"))
        return agent, [
            {type(layer).__name__ for layer in network.modules()} & {"LayerNorm", "BatchNorm1d"}
            for network in (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
        ]

    assert kinds(critic_normalization="layer")[1] == [set(), {"LayerNorm"}] * 2
    assert kinds(normalization="layer", critic_normalization="none")[1] == [{"LayerNorm"}, set()] * 2
    assert kinds(normalization="layer")[1] == [{"LayerNorm"}] * 4
    agent, layers = kinds(critic_normalization="batch")
    assert layers == [set(), {"BatchNorm1d"}] * 2
    rows = [torch.randn(8, size) for size in (3, 2, 3)]
    agent.update(ReplayBufferSamples(*rows, torch.zeros(8, 1), torch.randn(8, 1)), update_policy=True)
    for network in (agent.critic, agent.target_critic):
        assert network.hidden[1].running_mean.abs().sum() > 0
    assert not agent.critic.training


def test_an_error_does_not_leave_a_network_in_training_mode():
    network = torch.nn.BatchNorm1d(2).eval()
    with pytest.raises(ValueError, match="1 value"), training_mode(network):
        network(torch.zeros(1, 2))
    assert not network.training
