"""Prioritised replay: the probabilities, what they come from, and that nothing else changes."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import AGENTS, agent_of, ddpg, dqn, quick_args, td3
from test_accelerate import assert_same, filled_buffer, stand_in, update_of  # noqa: F401  # stand_in is a fixture

from steadyrl import prioritized_replay
from steadyrl.acceleration import accelerate
from steadyrl.prioritized_replay import PrioritizedSampling
from steadyrl.replay_buffer import ReplayBuffer

BOX = gym.spaces.Box(-1, 1, (1,), np.float32)


class Watched:
    """A prioritised buffer whose observations are the numbers of its transitions; and its priorities, computed one by one."""

    def __init__(self, size: int, num_envs: int):
        random = np.random.RandomState(0)
        self.rb = ReplayBuffer(size, BOX, BOX, "cpu", num_envs, random=random, sampling=PrioritizedSampling())
        self.priorities = np.zeros(size // num_envs * num_envs)
        self.numbers = np.full(len(self.priorities), -1)
        self.highest, self.added, self.num_envs = 1.0, 0, num_envs

    def add(self, rows: int) -> None:
        for _ in range(rows):
            numbers = self.added + np.arange(self.num_envs)
            obs, flags = numbers[:, None].astype(np.float32), np.zeros(self.num_envs)
            self.rb.add(obs, obs, obs, flags, flags, flags)
            places = numbers % len(self.priorities)
            self.priorities[places], self.numbers[places] = self.highest, numbers
            self.added += self.num_envs

    def learn(self, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a batch and tell its TD errors, of both signs and of all sizes; the numbers that were drawn."""
        drawn = self.rb.sample(batch_size).observations[:, 0].numpy().astype(int)
        errors = 10 ** (drawn % 7 - 3.0) * rng.choice([-1, 1], len(drawn))  # of a transition the same, drawn twice or not
        self.rb.sampling.prioritize(torch.from_numpy(errors).float())
        for number, error in zip(drawn, errors, strict=True):
            self.priorities[number % len(self.priorities)] = max(abs(error) ** 0.4, 1.0)
            self.highest = max(self.highest, abs(error) ** 0.4)
        return drawn


def shares(watched: Watched, draws: int = 100_000) -> np.ndarray:
    """How often each transition is drawn."""
    drawn = watched.rb.sample(draws).observations[:, 0].numpy().astype(int)
    return np.bincount(np.searchsorted(np.sort(watched.numbers), drawn), minlength=len(watched.numbers))[
        np.argsort(np.argsort(watched.numbers))
    ]


@pytest.mark.parametrize("top", [4096, 8, 1])
@pytest.mark.parametrize(
    ("size", "num_envs", "rows"), [(40, 1, 23), (40, 1, 40), (40, 1, 67), (45, 3, 9), (45, 3, 40), (1, 1, 3)]
)
def test_transitions_are_drawn_in_proportion_to_their_priorities(monkeypatch, size, num_envs, rows, top):
    """max(|TD error|^0.4, 1), over 10^5 draws; also in a buffer that is not full, that wrapped, of several environments."""
    monkeypatch.setattr(prioritized_replay, "TOP", top)
    watched, rng = Watched(size, num_envs), np.random.default_rng(1)
    for part in (rows // 2, rows - rows // 2):
        watched.add(part)
        for _ in range(6 if part else 0):
            watched.learn(8, rng)
    watched.add(1)
    expected = 100_000 * watched.priorities / watched.priorities.sum()
    found = shares(watched)
    assert found[watched.numbers < 0].sum() == 0  # what is not filled yet
    np.testing.assert_array_less(abs(found - expected), 5 * np.sqrt(expected) + 1)
    assert size == 1 or ((watched.priorities > 3).any() and (watched.priorities == 1).any())


def test_many_rows_and_many_samples_leave_the_same_priorities():
    """Through a thousand steps in a random order, more rows than the buffer has among them."""
    watched, rng = Watched(300, 3), np.random.default_rng(2)
    for _ in range(300):
        watched.add(int(rng.choice([1, 2, 150], p=[0.7, 0.25, 0.05])))
        for _ in range(rng.integers(3)):
            watched.learn(16, rng)
    sampling = watched.rb.sampling
    sampling.write_priorities()
    np.testing.assert_allclose(sampling.sums[sampling.leaves :][:300], watched.priorities, rtol=1e-6)
    np.testing.assert_allclose(sampling.sums[sampling.top : 2 * sampling.top].sum(), watched.priorities.sum(), rtol=1e-6)


def test_a_restored_buffer_draws_the_same():
    """Also where TD errors and new rows wait to be written."""
    watched, rng = Watched(45, 3), np.random.default_rng(1)
    watched.add(12)
    watched.learn(8, rng)
    watched.add(2)
    again = Watched(45, 3)
    again.add(45)  # it was used before, and full
    again.learn(8, rng)
    again.added = watched.added
    again.rb.load_state_dict(copy.deepcopy(watched.rb.state_dict()))
    np.testing.assert_array_equal(again.rb.sampling.sums, watched.rb.sampling.sums)
    for one in (watched, again):
        one.rb.random.seed(5)
        one.add(1)
        one.learn(8, np.random.default_rng(6))
    assert torch.equal(again.rb.sample(500).observations, watched.rb.sample(500).observations)


def test_a_checkpoint_changes_nothing():
    """The state is asked for between a sample and the next one, or not."""
    drawn = []
    for asked in (False, True):
        watched, rng = Watched(45, 3), np.random.default_rng(1)
        watched.add(20)
        for _ in range(5):
            watched.learn(8, rng)
            if asked:
                watched.rb.state_dict()
            watched.add(1)
        drawn.append(watched.rb.sample(500).observations)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("script", AGENTS)
def test_the_td_errors_are_those_of_the_batch_before_the_update(script):
    """Of several critics the largest; and the loss is Huber's."""
    agent = agent_of(script, replay="prioritized")
    update = update_of(agent, filled_buffer(script, agent.args), 2)
    batch, noise = update["batch"], update.get("noise")
    noise = (noise[0] if noise is not None and noise.dim() == 3 else noise,) if noise is not None else ()
    with torch.no_grad():
        target = agent.td_target(batch, *noise)
        loss, q_values = (agent.q_loss if script is dqn else agent.critic_loss)(batch, *noise)
    values = torch.stack(q_values) if isinstance(q_values, list) else q_values.reshape(-1, 32)
    errors = (target - values).double()
    losses = agent.update(**update)
    np.testing.assert_allclose(losses["td_errors"].abs(), errors.abs().max(dim=0).values, rtol=1e-4, atol=1e-6)
    size = errors.abs()
    huber = torch.where(size < 1, size**2 / 2, size - 0.5).mean(dim=1).sum()
    np.testing.assert_allclose([loss, losses["q_loss"]], [huber, huber], rtol=1e-5)
    assert size.max() > 1  # where the square would differ


def test_a_run_learns_from_what_surprises_it(run):
    """Every TD error reaches its transition: with one that is large, its transitions are drawn more often."""
    drawn: list[torch.Tensor] = []

    class Surprised(ddpg.DDPG):
        def update(self, batch, update_policy):
            drawn.append(batch.observations[:, 0])
            surprise = batch.observations[:, 0] % 100 == 3  # the fourth step of each episode
            return {"td_errors": torch.where(surprise, 1e5, 0.0)}  # its priority is 100

    args = quick_args(env_id="Counter-v0", replay="prioritized", learning_starts=100, total_timesteps=1000, buffer_size=1000)
    parts = run(args, Surprised)
    share = (torch.cat(drawn[-300:]) % 100 == 3).float().mean()
    assert 0.7 < share < 0.999  # 100 of 104 among what was seen before
    assert not any("td_errors" in tag for tag in parts.scalars)


@pytest.mark.slow
@pytest.mark.parametrize("script", AGENTS)
def test_compiled_is_the_same(script):
    """TD errors too."""
    eager, fast = (agent_of(script, replay="prioritized", hidden_sizes=(32,), batch_size=32) for _ in range(2))
    compiled, rb = accelerate(fast, "compile"), filled_buffer(script, eager.args)
    for number in range(1, 5):
        update = update_of(eager, rb, number)
        expected, found = eager.update(**update), compiled.update(**update)
        assert expected.keys() == found.keys() and found["td_errors"].shape == (32,)
        assert_same(expected, found, rtol=1e-4, atol=1e-5)
    assert_same(eager.state_dict(), compiled.state_dict(), rtol=1e-4, atol=1e-5)


def test_captured_td_errors_are_not_overwritten_by_the_next_replay(stand_in):  # noqa: F811
    agent = agent_of(td3, replay="prioritized")
    captured, rb = accelerate(agent, "cudagraph"), filled_buffer(td3, agent.args)
    first = captured.update(**update_of(agent, rb, 1))["td_errors"]
    kept = first.clone()
    captured.update(**update_of(agent, rb, 3))
    assert torch.equal(first, kept) and first.shape == (32,)
