"""What the training loop stores: true transitions, the actions that were sent, terminations apart from truncations."""

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
import toys
from helpers import idle, quick_args
from stable_baselines3.common.type_aliases import ReplayBufferSamples

import ddpg_continuous_action as ddpg
import td3_continuous_action as td3
from steadyrl.replay_buffer import ReplayBuffer

Idle = idle(ddpg)
DELAYED = [ddpg, td3]  # the scripts that explore with Gaussian noise, and update the actor less often than the critic
PARTS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def stored(rb) -> dict[str, np.ndarray]:
    size = rb.buffer_size if rb.full else rb.pos
    return {name: getattr(rb, name)[:size] for name in PARTS}


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("env_id", "ends"), [("Counter-v0", [(5, 0)]), ("Mixed-v0", [(1, 1), (3, 0), (2, 1), (1, 0)])])
def test_every_stored_transition_happened(run, env_id, ends, num_envs):
    """Each successor is its observation plus 1, also where an episode ended, and only terminations are marked done."""
    args = quick_args(env_id=env_id, num_envs=num_envs, total_timesteps=210, learning_starts=100)
    rows = stored(run(args, Idle).rb)
    assert rows["observations"].shape == (210 // num_envs, num_envs, 1)
    np.testing.assert_array_equal(rows["next_observations"], rows["observations"] + 1)
    expected_obs, expected_dones, expected_ends = [], [], []
    for episode in range(210):
        length, terminated = ends[episode % len(ends)]
        expected_obs += [100 * episode + step for step in range(length)]
        expected_dones += [0] * (length - 1) + [terminated]
        expected_ends += [0] * (length - 1) + [1]
    for index in range(num_envs):
        np.testing.assert_array_equal(rows["observations"][:, index, 0], expected_obs[: 210 // num_envs])
        np.testing.assert_array_equal(rows["dones"][:, index], expected_dones[: 210 // num_envs])
        ends_found = (rows["dones"] > 0) | rows["timeouts"]
        np.testing.assert_array_equal(ends_found[:, index], expected_ends[: 210 // num_envs])


def test_the_number_of_steps_is_the_number_of_transitions(run):
    parts = run(quick_args(env_id="Counter-v0"), Idle)
    training = toys.RECEIVED[0][0]  # the final evaluation has an environment of its own
    assert sum(environment == training for environment, _ in toys.RECEIVED) == 300 == parts.rb.pos


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_stored_action_is_the_one_the_environment_received(run, num_envs):
    args = quick_args(env_id="Bounds-v0", num_envs=num_envs, total_timesteps=400, exploration_noise=2.0)
    actions = stored(run(args, Idle).rb)["actions"]
    received = np.array([action for _, action in toys.RECEIVED[:400]]).reshape(-1, num_envs, 3)
    assert received.dtype == np.float32
    np.testing.assert_array_equal(actions, received)
    low, high = toys.Bounds.action_space.low, toys.Bounds.action_space.high
    assert (actions >= low).all() and (actions <= high).all()
    assert (actions == low).any(axis=(0, 1)).all() and (actions == high).any(axis=(0, 1)).all()  # so clipping was at work


@pytest.mark.parametrize("script", DELAYED)
def test_noise_is_independent_and_scaled_to_each_dimension(run, script):
    """Four environments in the same state: standard deviation 0.1 x half the range in each, and no correlation."""
    args = quick_args(script, env_id="Bounds-v0", num_envs=4, total_timesteps=6_000, learning_starts=0, buffer_size=6_000)
    parts = run(args, idle(script))
    actions = stored(parts.rb)["actions"].reshape(-1, 12)  # (steps, environments x dimensions)
    half_range = np.tile([1, 2, 0.25], 4)
    np.testing.assert_allclose(actions.std(axis=0), 0.1 * half_range, rtol=0.08)
    greedy = parts.agent.act(np.zeros((1, 1), np.float32))[0]
    np.testing.assert_allclose(actions.mean(axis=0), np.tile(greedy, 4), atol=0.01 * half_range.max())
    correlation = np.corrcoef(actions.T) - np.eye(12)
    assert abs(correlation).max() < 0.1


@pytest.mark.parametrize("script", DELAYED)
def test_random_actions_are_uniform_until_learning_starts(run, script):
    lengths = {"total_timesteps": 2100, "learning_starts": 2000, "buffer_size": 3000}
    parts = run(quick_args(script, env_id="Bounds-v0", exploration_noise=0.0, **lengths), idle(script))
    actions = stored(parts.rb)["actions"][:, 0]
    low, high = toys.Bounds.action_space.low, toys.Bounds.action_space.high
    uniform = (actions[:2000] - low) / (high - low)
    np.testing.assert_allclose(uniform.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(uniform.std(axis=0), 12**-0.5, atol=0.02)
    greedy = parts.agent.act(np.zeros((1, 1), np.float32))[0]
    np.testing.assert_array_equal(actions[2000:], np.tile(greedy, (100, 1)))


def test_observations_are_float32_and_copied(run):
    """Counter changes its observation in place: a kept reference would have changed with it."""
    parts = run(quick_args(env_id="Counter-v0"), Idle)
    assert parts.rb.observations.dtype == parts.rb.next_observations.dtype == np.float32
    assert parts.rb.observations[0, 0, 0] == 0 and parts.rb.next_observations[0, 0, 0] == 1


def test_environments_are_seeded_and_differ(run):
    args = quick_args(num_envs=3)
    first, second, other = (stored(run(a, Idle).rb)["observations"] for a in (args, args, quick_args(num_envs=3, seed=2)))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[0, :, 0])) == 3


@pytest.mark.parametrize("script", DELAYED)
@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_updates_follow_the_clock(run, num_envs, script):
    """One critic update for each vector step after learning_starts, every third with the actor."""
    calls = []

    class Counting(script.main.agent_class):
        def update(self, batch, update_policy, **noise):
            assert batch.observations.shape == (16, 3)
            calls.append(update_policy)
            return super().update(batch, update_policy=update_policy, **noise)

    args = quick_args(script, num_envs=num_envs, policy_frequency=3, learning_starts=100)
    run(args, Counting)
    vector_steps = list(range(num_envs, 300 + num_envs, num_envs))
    assert len(calls) == sum(step > 100 for step in vector_steps)
    assert calls == [number % 3 == 0 for number in range(1, len(calls) + 1)]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_replay_buffer_samples_as_stable_baselines3s(num_envs):
    """Bit for bit, from the same random stream, also after it wrapped; in 4 (2 O + A) + 8 bytes a transition."""
    spaces = gym.spaces.Box(-1, 1, (5,), np.float32), gym.spaces.Box(-1, 1, (2,), np.float32)
    rng = np.random.default_rng(0)
    size = {"n_envs": num_envs, "handle_timeout_termination": False}
    ours = ReplayBuffer(60, *spaces, "cpu", random=np.random.RandomState(0), **size)
    theirs = stable_baselines3.common.buffers.ReplayBuffer(60, *spaces, "cpu", **size)
    for _ in range(70):
        obs, next_obs = rng.random((2, num_envs, 5), np.float32)
        transition = obs, next_obs, rng.random((num_envs, 2), np.float32), rng.random(num_envs), rng.random(num_envs) < 0.3
        ours.add(*transition, rng.random(num_envs) < 0.3)
        theirs.add(*transition, [])
        np.random.seed(1), ours.random.seed(1)
        for a, b in zip(ours.sample(16)[:5], theirs.sample(16)[:5], strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        assert ours.random.random_sample() == np.random.random_sample()  # and as many numbers are drawn
    assert ours.transitions.nbytes == 60 // num_envs * num_envs * (4 * (2 * 5 + 2) + 8)


@pytest.mark.parametrize("transitions", [40, 70])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [2, 3, 5])
def test_n_step_samples_are_stable_baselines3s(n_steps, num_envs, transitions):
    """From the same random stream, with episodes that end in either way, before and after the buffer wrapped."""
    spaces = gym.spaces.Box(-1, 1, (4,), np.float32), gym.spaces.Box(-1, 1, (2,), np.float32)
    rng = np.random.default_rng(0)
    steps = {"n_envs": num_envs, "n_steps": n_steps, "gamma": 0.9}
    ours = ReplayBuffer(60 * num_envs, *spaces, "cpu", random=np.random.RandomState(1), **steps)
    theirs = stable_baselines3.common.buffers.NStepReplayBuffer(60 * num_envs, *spaces, "cpu", **steps)
    obs = rng.random((num_envs, 4), np.float32)
    for _ in range(transitions):
        successors, actions, rewards = (rng.random((num_envs, size), np.float32) for size in (4, 2, 1))
        terminations, truncations = rng.random((2, num_envs)) < 0.15
        ours.add(obs, successors, actions, rewards[:, 0], terminations, truncations)
        infos = [{"TimeLimit.truncated": bool(cut and not end)} for cut, end in zip(truncations, terminations, strict=True)]
        theirs.add(obs, successors, actions, rewards[:, 0], terminations | truncations, infos)
        obs = np.where((terminations | truncations)[:, None], rng.random((num_envs, 4), np.float32), successors)
    before = ours.transitions.copy()
    np.random.seed(1)
    sample = ours.sample(500)
    for a, b in zip(sample, theirs.sample(500), strict=True):
        torch.testing.assert_close(a, b)
    assert len(sample.discounts.unique()) == n_steps  # so episodes did end inside the sums
    np.testing.assert_array_equal(ours.transitions, before)  # the sums are made in the sample


@pytest.mark.parametrize("script", DELAYED)
def test_n_steps_reach_the_update(run, script):
    """In Counter each reward is 1 and an episode is cut off after 5 steps: sums of 3, 2 at an episode's last step but one."""
    seen = []

    class Looking(script.main.agent_class):
        def update(self, batch, **_):
            seen.append(batch)
            return {}

    run(quick_args(script, env_id="Counter-v0", n_steps=3, gamma=0.5, reward_scale=2.0, learning_starts=100), Looking)
    for batch in seen:
        left = 5 - batch.observations[:, 0] % 100  # steps to the end of the episode
        steps = left.clamp(max=3)
        newest = batch.next_observations[:, 0] - batch.observations[:, 0] < steps  # nothing is known after the newest step
        steps = torch.where(newest, batch.next_observations[:, 0] - batch.observations[:, 0], steps)
        torch.testing.assert_close(batch.discounts[:, 0], 0.5**steps)
        torch.testing.assert_close(batch.rewards[:, 0], 2.0 * (2 - 2 * 0.5**steps))
        torch.testing.assert_close(batch.next_observations[:, 0], batch.observations[:, 0] + steps)
    assert newest.sum() < 4 and len(seen) == 200


def buffer_of_zeros(ends: str) -> ReplayBuffer:
    """One of 9 rows whose observations are all zeros: by them alone, every step would follow every other one. Each
    letter is a step that pays 1: T terminates the episode, C cuts it off."""
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    rb = ReplayBuffer(9, space, space, "cpu", n_steps=3, gamma=0.5)
    for end in ends:
        flags = np.array([end == "T"]), np.array([end == "C"])
        rb.add(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), np.ones(1), *flags)
    return rb


@pytest.mark.parametrize(
    ("ends", "steps", "dones"),
    [
        ("..T..", [3, 2, 1, 2, 1], [1, 1, 1, 0, 0]),
        ("..C..", [3, 2, 1, 2, 1], [0, 0, 0, 0, 0]),  # what would have followed a cut still counts, but not as a reward
        (".CT..", [2, 1, 1, 2, 1], [0, 0, 1, 0, 0]),
        (".....C......", [3, 2, 1, 3, 2, 1, 3, 3, 3], [0] * 9),  # it wrapped: the newest is in row 2
        ("C..........", [2, 1, 3, 3, 3, 3, 3, 3, 3], [0] * 9),  # a cut that was overwritten is none
    ],
)
def test_a_sum_of_rewards_ends_where_its_episode_did_and_at_the_newest_step(ends, steps, dones):
    rb = buffer_of_zeros(ends)
    batch = rb._get_samples(np.arange(rb.size()))
    assert batch.discounts[:, 0].tolist() == [0.5**n for n in steps]
    assert batch.rewards[:, 0].tolist() == [2 - 2 * 0.5**n for n in steps]
    assert batch.dones[:, 0].tolist() == dones


def test_a_restored_buffer_samples_the_same():
    """Also where episodes ended, and with its next row in the same place."""
    rb, restored = buffer_of_zeros(".C.T.....C."), buffer_of_zeros("")
    restored.load_state_dict(rb.state_dict())
    for buffer in (rb, restored):
        buffer.random.seed(1)
        buffer.add(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)), np.ones(1), np.zeros(1), np.ones(1))
    np.testing.assert_array_equal(rb.timeouts, restored.timeouts)
    for one, other in zip(rb.sample(50), restored.sample(50), strict=True):
        assert torch.equal(one, other)


def test_the_discounts_of_a_batch_replace_gamma():
    """Each row has its own: the loss is the mean of the losses of the single rows, each computed with that gamma."""
    torch.manual_seed(0)
    spaces = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Box(-1, 1, (2,), np.float32)
    batch = ReplayBufferSamples(*(torch.randn(4, size) for size in (3, 2, 3)), torch.zeros(4, 1), torch.randn(4, 1))
    agent = ddpg.DDPG(*spaces, quick_args(), torch.device("cpu"))
    discounts = torch.tensor([[0.99], [0.7], [0.3], [0.0]])
    expected = []
    for row, gamma in enumerate(discounts.flatten().tolist()):
        agent.args.gamma = gamma
        one = ReplayBufferSamples(*(values[row : row + 1] for values in batch[:5]))
        expected.append(agent.critic_loss(one)[0])
    losses, _ = agent.critic_loss(batch._replace(discounts=discounts))
    torch.testing.assert_close(losses, torch.stack(expected).mean())


def test_an_empty_buffer_and_options_that_it_does_not_have_are_errors():
    spaces = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    with pytest.raises(ValueError, match=r"^the replay buffer is empty$"):
        ReplayBuffer(8, *spaces).sample(4)
    for option in ("optimize_memory_usage", "handle_timeout_termination"):
        with pytest.raises(ValueError, match="must be left out"):
            ReplayBuffer(8, *spaces, **{option: True})
        ReplayBuffer(8, *spaces, **{option: False})  # as CleanRL's scripts have it
