"""DQN's learner, against an independent computation in NumPy at float64, and the algorithm's traps."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import quick_args
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from test_arguments import main_in_this_process
from test_ddpg import NumpyDDPG

import dqn
from steadyrl import checks, environments, errors

OBS, ACTIONS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Discrete(4)


def agent_with(**changes) -> dqn.DQN:
    torch.manual_seed(0)
    return dqn.DQN(OBS, ACTIONS, quick_args(dqn, **({"gamma": 0.9, "tau": 0.1} | changes)), torch.device("cpu"))


def batch_of(size: int, seed: int = 0, dtype=torch.float32) -> ReplayBufferSamples:
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(size, 3)),
        rng.integers(0, 4, (size, 1)),
        rng.normal(size=(size, 3)),
        rng.random((size, 1)) < 0.3,
        rng.normal(size=(size, 1)),
    )
    return ReplayBufferSamples(*(torch.as_tensor(array, dtype=dtype) for array in arrays))


class NumpyDQN:
    """DQN by hand: explicit forward and backward passes and Adam on plain arrays."""

    forward, backward = staticmethod(NumpyDDPG.forward), staticmethod(NumpyDDPG.backward)

    def __init__(self, agent: dqn.DQN):
        self.online, self.target = (
            [parameter.detach().numpy().copy() for parameter in network.parameters()] for network in agent.networks.values()
        )
        self.moments = [(np.zeros_like(w), np.zeros_like(w)) for w in self.online]
        self.steps, self.args = 0, agent.args

    def loss(self, batch):
        obs, actions, next_obs, dones, rewards = (tensor.numpy() for tensor in batch[:5])
        rows, actions = np.arange(len(obs)), actions[:, 0].astype(int)
        target_values, online_values = (self.forward(weights, next_obs)[0] for weights in (self.target, self.online))
        chosen = (online_values if self.args.double_q else target_values).argmax(axis=1)
        td_target = rewards[:, 0] + self.args.gamma * (1 - dones[:, 0]) * target_values[rows, chosen]
        values, cache = self.forward(self.online, obs)
        error = values[rows, actions] - td_target
        d_out = np.zeros_like(values)
        d_out[rows, actions] = 2 * error / len(error)
        return (error**2).mean(), values[rows, actions], self.backward(self.online, cache, d_out)[0]

    def update(self, batch):
        q_loss, values, gradients = self.loss(batch)
        self.steps += 1
        for weight, gradient, (m, v) in zip(self.online, gradients, self.moments, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            step = (m / (1 - 0.9**self.steps)) / (np.sqrt(v / (1 - 0.999**self.steps)) + 1e-8)
            weight -= self.args.learning_rate * step
        return {"q_loss": q_loss, "q_est": values.mean()}


@pytest.mark.parametrize("double_q", [False, True])
def test_five_updates_match_numpy(double_q):
    agent = agent_with(double_q=double_q, learning_rate=1e-2)
    other = agent_with()
    torch.nn.init.normal_(other.q_network.network[-1].weight)
    agent.target_network.load_state_dict(other.q_network.state_dict())  # so that the two networks choose differently
    for network in agent.networks.values():
        network.double()
    by_hand = NumpyDQN(agent)
    loss, q_values = agent.q_loss(batch_of(32, dtype=torch.float64))
    expected, values, _ = by_hand.loss(batch_of(32, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected, rel=1e-12) and q_values.shape == (32,)
    np.testing.assert_allclose(q_values.detach(), values, rtol=1e-12)
    for number in range(5):
        batch = batch_of(32, seed=number, dtype=torch.float64)
        losses, expected = agent.update(batch), by_hand.update(batch)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-9), (number, name)
    for parameter, weights in zip(agent.q_network.parameters(), by_hand.online, strict=True):
        np.testing.assert_allclose(parameter.detach(), weights, rtol=1e-7, atol=1e-10)
    for parameter, weights in zip(agent.target_network.parameters(), by_hand.target, strict=True):
        np.testing.assert_array_equal(parameter.detach(), weights)  # an update leaves it alone


@pytest.mark.parametrize(("double_q", "next_value"), [(False, 9.0), (True, 2.0)])
def test_double_q_by_hand(double_q, next_value):
    """The online network prefers action 1, which the target network values at 2; the target network's own best is 9."""
    agent = agent_with(double_q=double_q)
    agent.q_network = lambda obs: torch.tensor([[0.0, 5.0, 1.0, 0.0]]).expand(len(obs), 4)
    agent.target_network = lambda obs: torch.tensor([[9.0, 2.0, 3.0, 0.0]]).expand(len(obs), 4)
    batch = batch_of(2)._replace(actions=torch.tensor([[1], [2]]), rewards=torch.ones(2, 1), dones=torch.tensor([[0.0], [1.0]]))
    loss, q_values = agent.q_loss(batch)
    assert q_values.tolist() == [5, 1]
    assert loss.item() == pytest.approx(((5 - (1 + 0.9 * next_value)) ** 2 + (1 - 1) ** 2) / 2)


def test_indices_are_taken_as_the_replay_buffer_stores_them():
    """As (B, 1) float32."""
    agent, batch = agent_with(), batch_of(16)
    as_indices = batch._replace(actions=batch.actions.long())
    assert agent.q_loss(batch)[0] == agent.q_loss(as_indices)[0]


def test_a_tie_goes_to_the_first_action():
    agent = agent_with()
    torch.nn.init.zeros_(agent.q_network.network[-1].weight)
    for bias, expected in ((0.0, 0), ([-1.0, 2.0, 0.0, 2.0], 1)):
        agent.q_network.network[-1].bias.data[:] = torch.tensor(bias)
        assert (agent.act(np.zeros((9, 3), np.float32)) == expected).all()


def test_a_hard_target_copy_is_one_of_values():
    agent = agent_with(tau=1.0)
    for a, b in zip(agent.q_network.parameters(), agent.target_network.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    agent.update(batch_of(16))
    assert not torch.equal(agent.q_network.network[0].weight, agent.target_network.network[0].weight)
    agent.update_target()
    for a, b in zip(agent.q_network.parameters(), agent.target_network.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad
    before = agent.target_network.network[0].weight.clone()
    agent.update(batch_of(16))
    assert torch.equal(before, agent.target_network.network[0].weight)


def test_epsilon_is_drawn_for_each_environment_and_decays_in_steps(run):
    """Eight environments, all in one state, whose greedy action is 0 of 1,000: random actions are counted by what is stored."""
    args = quick_args(
        dqn,
        env_id="Bounds-v0",
        bins=10,
        num_envs=8,
        total_timesteps=16_000,
        learning_starts=16_000,
        buffer_size=16_000,
        start_e=0.8,
        end_e=0.1,
        exploration_fraction=0.5,
    )

    class Idle(dqn.DQN):
        def act(self, obs):
            return np.zeros(len(obs), np.int64)

    random_actions = run(args, Idle).rb.actions[:2000, :, 0] != 0
    early, late = random_actions[:200].mean(), random_actions[1000:].mean()
    assert early == pytest.approx(0.8 - 0.7 * 0.1, abs=0.03) and late == pytest.approx(0.1, abs=0.02)
    together = random_actions[1000:].all(axis=1).mean()
    assert together < 0.01  # drawn once for all, it would be 0.1
    assert [dqn.epsilon(dqn.Args(), step) for step in (0, 125_000, 250_000, 500_000)] == pytest.approx([1, 0.525, 0.05, 0.05])


@pytest.mark.parametrize(("fraction", "said"), [(0.9, True), (0.3, False)])
def test_a_longer_training_says_that_it_explores_more_again(run, tmp_path, fraction, said):
    """At step 300 of 400, 0.9 of the steps are not over yet; 0.3 of them are."""
    folder = run(quick_args(dqn, env_id="CartPole-v1", exploration_fraction=fraction)).run_dir
    done = main_in_this_process(*f"--resume {folder} --total-timesteps 400".split(), cwd=tmp_path, script="dqn")
    assert done.returncode == 0
    message = f"--exploration-fraction {fraction} is a share of 400 steps now, not of 300"
    assert (message in done.stdout) == said


def test_updates_and_target_updates_follow_the_clock(run):
    """A training point every 10 steps after learning starts, a target update every 50."""
    calls = []

    class Counting(dqn.DQN):
        def update(self, batch, update_policy=True):
            assert batch.observations.shape == (16, 4) and batch.actions.shape == (16, 1)
            calls.append("update")
            return super().update(batch)

        def update_target(self):
            calls.append("target")

    run(quick_args(dqn, env_id="CartPole-v1", target_network_frequency=50, learning_starts=100), Counting)
    assert calls == (["update"] * 5 + ["target"]) * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env_id": "InvertedPendulum-v5"}, "--bins"),
        ({"env_id": "Ant-v5", "bins": 5}, "--bins 5: makes 390625 actions"),
    ],
)
def test_what_is_no_table_of_actions_is_refused(changes, words):
    with pytest.raises(errors.UsageError, match=words):
        checks.check(quick_args(dqn, **changes))


def test_more_actions_than_a_network_can_have_are_refused():
    box = gym.spaces.Box(-1, 1, (2,), np.float32)
    with pytest.raises(errors.UsageError, match="1,000,000 at most"):
        quick_args(dqn).check_spaces(box, gym.spaces.Discrete(2**40))


def test_a_box_is_cut_into_bins():
    env = environments.make_env(quick_args(dqn, env_id="InvertedPendulum-v5", bins=2))
    assert env.action_space == gym.spaces.Discrete(2)
    assert environments.make_env(quick_args(dqn, env_id="Bounds-v0", bins=3)).action_space == gym.spaces.Discrete(27)
