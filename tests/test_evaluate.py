"""Greedy evaluation, the over-estimation monitor, and `--evaluate` on a saved run."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import toys
from helpers import quick_args

import ddpg_continuous_action as ddpg
from steadyrl import command_line, environments, errors, evaluation, record


def agent_for(args: ddpg.Args, value=None) -> ddpg.DDPG:
    env: Any = environments.make_env(args)
    agent: Any = ddpg.DDPG(env.observation_space, env.action_space, args, torch.device("cpu"))
    if value is not None:
        agent.critic = lambda obs, actions: torch.full((len(obs),), float(value))
    return agent


def test_returns_lengths_and_seeds():
    args = quick_args()
    agent = agent_for(args)
    first, again = evaluation.evaluate(agent, args, 5, seed=3), evaluation.evaluate(agent, args, 5, seed=3)
    np.testing.assert_array_equal(first.returns, again.returns)
    assert first.returns.shape == first.lengths.shape == (5,) and (first.lengths >= 7).all()
    shifted = evaluation.evaluate(agent, args, 4, seed=4)  # episode i starts from seed + i
    np.testing.assert_array_equal(first.returns[1:], shifted.returns)
    assert len(np.unique(first.returns)) == 5


def test_evaluation_is_greedy():
    """The noise flag changes nothing, and neither does the state of NumPy's generator."""
    agent = agent_for(quick_args())
    reference = evaluation.evaluate(agent, quick_args(), 3, seed=0)
    np.random.seed(99)
    noisy = evaluation.evaluate(agent, quick_args(exploration_noise=5.0), 3, seed=0)
    np.testing.assert_array_equal(reference.returns, noisy.returns)


def test_evaluation_leaves_the_training_streams_alone():
    agent = agent_for(quick_args())
    np.random.seed(1), torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluation.evaluate(agent, quick_args(), 2, seed=0)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_q_bias_of_terminated_episodes(value):
    """Episodes of 1 step pay 1: the return that followed the only state is 1."""
    args = quick_args(env_id="Identity-v0")
    agent = agent_for(args, value)
    agent.actor = lambda obs: obs  # the best action: reward 0
    assert evaluation.evaluate(agent, args, 4, seed=0).q_bias == pytest.approx(value)


def test_q_bias_completes_a_truncated_episode_with_the_critics_value():
    """Reward 1 for 5 steps, cut off: from t on, the return is the discounted sum of 5 - t ones plus gamma^(5 - t) Q."""
    args = quick_args(env_id="TimeLimited-v0", gamma=0.5)
    expected = np.mean([10 - (sum(0.5**k for k in range(5 - t)) + 0.5 ** (5 - t) * 10) for t in range(5)])
    assert evaluation.evaluate(agent_for(args, 10), args, 2, seed=0).q_bias == pytest.approx(expected)
    assert evaluation.evaluate(agent_for(args, 2), args, 2, seed=0).q_bias == pytest.approx(0)  # 2 is the true value


def test_q_bias_of_a_plain_agent_is_in_single_precision():
    """To the bit: runs with a seed are compared over versions of this code. (`state_value`, if there is one, may add to it.)"""
    args = quick_args(gamma=0.9, reward_scale=0.3)
    agent = agent_for(args)
    env, errors = environments.make_env(args), []
    for seed in (5, 6, 7):
        observations, rewards, over = [env.reset(seed=seed)[0]], [], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.act(observations[-1][None])[0])
            observations.append(obs), rewards.append(reward)
            over = terminated or truncated
        values = agent.value(np.stack(observations)) / 0.3
        assert values.dtype == np.float32
        follows = [0.0 if terminated else float(values[-1])]
        for reward in rewards[::-1]:
            follows.append(reward + 0.9 * follows[-1])
        errors += list(values[-2::-1] - np.array(follows[1:], np.float32))
    assert evaluation.evaluate(agent, args, 3, seed=5).q_bias == float(np.mean(errors, dtype=np.float32))


def test_a_saved_run_gives_its_own_result_again(run):
    """A run's best model, evaluated later, returns what the run reported; the first result is kept beside the second."""
    args = quick_args(eval_frequency=100)
    folder = run(args).run_dir
    saved = record.load_args(folder, ddpg.Args)
    saved.evaluate = folder
    command_line.evaluate_run(saved, ddpg.DDPG)
    first, second = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "evaluate.json"))
    assert first["returns"] == second["returns"] and first["model"] == second["model"] == "best_model.pt"


def test_the_model_of_another_run_is_named_and_its_step_is_not_guessed(run):
    folder = run(quick_args(eval_frequency=100)).run_dir
    (other := folder.parent / "other").mkdir()
    shutil.copy(folder / "best_model.pt", other)
    saved = record.load_args(folder, ddpg.Args)
    saved.evaluate, saved.model = folder, str(other / "best_model.pt")
    command_line.evaluate_run(saved, ddpg.DDPG)
    result = json.loads((folder / "evaluate.json").read_text())
    assert (result["model"], result["model_step"]) == ("other/best_model.pt", None)


def test_a_first_observation_not_finite_is_an_error(monkeypatch):
    """No action is asked for it."""
    args = quick_args()
    agent = agent_for(args)
    monkeypatch.setattr(toys.PendulumLike, "reset", lambda self, **_: (np.array([0, np.nan, 0], np.float32), {}))
    monkeypatch.setattr(agent, "act", lambda obs: pytest.fail("acted"))
    with pytest.raises(errors.EnvError, match="episode 0 is not finite: it starts with the observation"):
        evaluation.evaluate(agent, args, 2, seed=0)


def test_a_return_not_finite_is_an_error():
    args = quick_args(env_id="NaNReward-v0")
    with pytest.raises(errors.TrainingError, match="episode 29 is not finite"):
        evaluation.evaluate(agent_for(args), args, 40, seed=0)
