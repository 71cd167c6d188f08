"""Learning itself, from fixed seeds and with a margin."""

import json

import numpy as np
import pytest
from helpers import quick_args

import ddpg_continuous_action as ddpg
import td3_continuous_action as td3


@pytest.mark.slow
@pytest.mark.parametrize("script", [ddpg, td3])
def test_identity_is_learned(run, script):
    """One-step episodes whose best action is the observation."""
    lengths = {"total_timesteps": 2000, "learning_starts": 200, "buffer_size": 2000}
    args = quick_args(script, env_id="Identity-v0", batch_size=64, learning_rate=1e-3, **lengths)
    agent = run(args).agent
    obs = np.linspace(-0.8, 0.8, 33, dtype=np.float32)[:, None]
    assert abs(agent.act(obs) - obs).max() < 0.15  # 0.05 when written; without learning about 0.8


@pytest.mark.slow
def test_a_time_limit_is_no_terminal_state(run):
    """Reward 1 a step, cut off after 5, gamma 0.5: every value is 2. Cut off as if terminal, the last state's would be 1."""
    args = quick_args(
        env_id="TimeLimited-v0",
        total_timesteps=1500,
        learning_starts=100,
        buffer_size=2000,
        batch_size=64,
        gamma=0.5,
        learning_rate=1e-3,
        tau=0.05,
    )
    agent = run(args).agent
    values = agent.value(np.arange(5, dtype=np.float32)[:, None] / 5)
    np.testing.assert_allclose(values, 2, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "steps"), [(ddpg, 8_000), (td3, 10_000)])
def test_pendulum_is_learned(run, script, steps):
    """Pendulum-v1 to a greedy mean of at least -250 over 20 fresh episodes."""
    args = quick_args(
        script,
        env_id="Pendulum-v1",
        total_timesteps=steps,
        learning_starts=500,
        buffer_size=20_000,
        hidden_sizes=(64, 64),
        batch_size=64,
        learning_rate=1e-3,
        gamma=0.98,
        eval_frequency=1_000,
        eval_episodes=5,
        final_episodes=20,
    )
    result = json.loads((run(args).run_dir / "evaluation.json").read_text())
    assert len(result["returns"]) == 20
    assert result["mean"] >= -250
