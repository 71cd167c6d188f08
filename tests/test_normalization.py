"""Normalised observations: the statistics, everywhere that a network sees an observation, and nowhere else."""

import itertools
import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import AGENTS, agent_of, ddpg, dqn, idle, quick_args
from test_accelerate import assert_same, stand_in, update_of  # noqa: F401  # stand_in is a fixture

from steadyrl.acceleration import accelerate
from steadyrl.models import load_model, weights_of
from steadyrl.normalization import Normalizer
from steadyrl.policies import export_onnx, load_agent
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run_folder import results_of


def seen(rng: np.random.Generator, steps: int = 500, num_envs: int = 3) -> np.ndarray:
    """(steps, N, 3) observations of very different units; the last one never changes."""
    values = rng.normal(size=(steps, num_envs, 3)) * (1e4, 1e-3, 0) + (3e5, 1, 7)
    return values.astype(np.float32)


def test_the_statistics_are_those_of_everything_seen():
    """Mean and standard deviation as NumPy computes them of all at once, in float64; far from zero and near it."""
    obs, normalizer = seen(np.random.default_rng(0)), Normalizer(3)
    np.testing.assert_array_equal(normalizer.normalize(obs[0]), np.clip(obs[0], -10, 10))  # nothing is known yet
    for rows in obs:
        normalizer.observe(rows)
    everything = obs.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.deviation[:2], everything.std(axis=0)[:2], rtol=1e-5)
    new = np.float32([[3.2e5, 1.0005, 7], [1e9, -1, 7]])
    expected = (new - everything.mean(axis=0)) / everything.std(axis=0).clip(1e-9)
    expected[:, 2] = 0  # what never changed
    np.testing.assert_allclose(normalizer.normalize(new), expected.clip(-10, 10), rtol=1e-4, atol=1e-6)
    assert normalizer.normalize(new).dtype == np.float32


def test_batches_are_normalised_and_what_is_stored_is_not():
    obs, normalizer = seen(np.random.default_rng(1), 40), Normalizer(3)
    spaces = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
    buffers = [
        ReplayBuffer(120, *spaces, "cpu", 3, random=np.random.RandomState(0), n_steps=2, normalizer=one)
        for one in (normalizer, None)
    ]
    for before, after in itertools.pairwise(obs):
        for rb in buffers:
            rb.add(before, after, np.zeros((3, 1)), np.ones(3), np.zeros(3), np.zeros(3))
    np.testing.assert_array_equal(buffers[0].transitions, buffers[1].transitions)
    everything = obs[:-1].reshape(-1, 3).astype(np.float64)
    mean, std = everything.mean(axis=0), np.append(everything.std(axis=0)[:2], 1)
    normalised, raw = (rb.sample(50) for rb in buffers)
    for name in ("observations", "next_observations"):
        expected = (getattr(raw, name).numpy() - mean) / std
        np.testing.assert_allclose(getattr(normalised, name), expected, rtol=1e-4, atol=1e-5)
    for name in ("actions", "rewards", "dones", "discounts"):
        assert torch.equal(getattr(normalised, name), getattr(raw, name))


@pytest.mark.parametrize("script", AGENTS)
def test_an_agent_sees_normalised_observations(script):
    """It acts and values as one without statistics does on observations that were normalised by hand."""
    agent, plain = (agent_of(script, normalize_observations=normal) for normal in (True, False))
    size = agent.observation_space.shape[0]
    obs = np.random.default_rng(2).normal(size=(40, size)) * 50 + 300
    agent.observation_normalizer.observe(obs.astype(np.float32))
    by_hand = ((obs - obs.mean(axis=0)) / obs.std(axis=0)).astype(np.float32)
    np.testing.assert_allclose(agent.act(obs), plain.act(by_hand), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(agent.act(obs[0]), plain.act(by_hand[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(agent.value(obs), plain.value(by_hand), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(agent.state_value(obs), plain.state_value(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", AGENTS)
def test_statistics_are_of_training_alone_and_part_of_the_model(run, script, tmp_path):
    """Neither an evaluation nor a film adds to them, and a loaded agent has them."""
    env_id = "CartPole-v1" if script is dqn else "Pendulum-like-v0"
    parts = run(quick_args(script, env_id=env_id, normalize_observations=True, eval_frequency=100))
    stored = parts.rb.observations[:300].reshape(300, -1).astype(np.float64)
    latest, best = (torch.load(parts.run_dir / name, weights_only=True)["normalizer"] for name in ("model.pt", "best_model.pt"))
    assert latest["count"] == 300 and best["count"] in (100, 200, 300)
    np.testing.assert_allclose(latest["mean"], stored.mean(axis=0), rtol=1e-9, atol=1e-12)
    (result,) = results_of(parts.run_dir)
    agent, env = load_agent(parts.run_dir)
    np.testing.assert_array_equal(agent.observation_normalizer.mean, best["mean"])
    total, terminated, truncated = 0.0, False, False
    obs, _ = env.reset(seed=20_000)
    while not (terminated or truncated):
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        total += float(reward)
    np.testing.assert_allclose(total, result["returns"][0], rtol=1e-6)


def test_a_model_with_statistics_is_none_without_them(run):
    parts = run(quick_args(normalize_observations=True), idle())
    agent = ddpg.DDPG(parts.agent.observation_space, parts.agent.action_space, quick_args(), torch.device("cpu"))
    assert set(weights_of(parts.agent)) - set(weights_of(agent)) == {"normalizer"}
    with pytest.raises(Exception, match=r"it holds .*normalizer, must hold"):
        load_model(agent, parts.run_dir / "model.pt")


def test_without_the_flag_nothing_is_different(run):
    parts = run(quick_args())
    assert parts.agent.observation_normalizer is None and "normalizer" not in torch.load(
        parts.run_dir / "model.pt", weights_only=True
    )
    assert json.loads((parts.run_dir / "args.json").read_text())["args"]["normalize_observations"] is False


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
def test_a_fast_agent_sees_the_same(mode, stand_in_where_needed):
    """Its statistics go on changing after it was built."""
    eager, agent = (agent_of(ddpg, normalize_observations=True, hidden_sizes=(32,), batch_size=32) for _ in range(2))
    fast, rng = accelerate(agent, mode), np.random.default_rng(0)
    buffers = []
    for one in (eager, fast):
        how: dict[str, Any] = {"random": np.random.RandomState(0), "normalizer": one.observation_normalizer}
        buffers.append(ReplayBuffer(200, one.observation_space, one.action_space, "cpu", **how))
    for number in range(1, 60):
        obs, next_obs = rng.normal(size=(2, 1, 3)).astype(np.float32) * 30 + number
        for rb in buffers:
            rb.add(obs, next_obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), np.zeros(1))
        if number % 10 == 0:
            eager.update(**update_of(eager, buffers[0], number)), fast.update(**update_of(fast, buffers[1], number))
        np.testing.assert_allclose(fast.act(obs), eager.act(obs), rtol=1e-4, atol=1e-5)
    assert_same(eager.state_dict(), fast.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def stand_in_where_needed(request, mode):
    """CUDA graphs without CUDA."""
    if mode == "cudagraph":
        request.getfixturevalue("stand_in")


@pytest.mark.slow
def test_onnx_takes_raw_observations(run):
    onnxruntime = pytest.importorskip("onnxruntime")
    parts = run(quick_args(normalize_observations=True))
    agent, env = load_agent(parts.run_dir)
    session = onnxruntime.InferenceSession(export_onnx(agent, env, parts.run_dir / "model.pt"))
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32) * 5
    (actions,) = session.run(None, {"observation": obs})
    np.testing.assert_allclose(actions, agent.act(obs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("normalized", "solves"), [(True, True), (False, False)])
def test_units_of_all_sizes_are_learned_if_they_are_normalised(run, normalized, solves):
    """From 10^-3 to 10^4: the best action gives 0, the best one that is blind for the small number gives -1."""
    args = quick_args(env_id="toys:Units-v0", normalize_observations=normalized, total_timesteps=3_000, learning_starts=500)
    args.final_episodes = 200
    args.learning_rate, args.batch_size, args.exploration_noise, args.buffer_size, args.final_episodes = (
        1e-3,
        64,
        0.3,
        3000,
        200,
    )
    (result,) = results_of(run(args).run_dir)
    assert result["mean"] > -0.35 if solves else result["mean"] < -0.8
