"""The exported policy, run by onnxruntime, does what the agent does."""

import sys

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import AGENTS, quick_args
from test_arguments import main_in_this_process, refused

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl import policies
from steadyrl.environments import make_env

POLICIES = {
    "ddpg": (ddpg, {"env_id": "Hopper-v5"}),
    "layer norm": (ddpg, {"env_id": "toys:MatrixActionSpaces-v0", "normalization": "layer", "activation": "leaky_relu"}),
    "batch norm": (ddpg, {"env_id": "Hopper-v5", "normalization": "batch", "activation": "tanh"}),
    "td3": (td3, {"env_id": "Hopper-v5"}),
    "sac": (sac, {"env_id": "Hopper-v5"}),
    "dqn": (dqn, {"env_id": "CartPole-v1"}),
}


def fresh_agent(script, **changes):
    args = quick_args(script, **changes)
    env = make_env(args)
    torch.manual_seed(1)
    return getattr(script, AGENTS[script])(env.observation_space, env.action_space, args, torch.device("cpu")), env


def observations(env: gym.Env, number: int) -> np.ndarray:
    """Those of random play: (number, O)."""
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    found: list[np.ndarray] = []
    while len(found) < number:
        found.append(obs)
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            obs, _ = env.reset()
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_onnxruntime_acts_like_the_agent_on_1000_observations(tmp_path, name):
    script, changes = POLICIES[name]
    agent, env = fresh_agent(script, **changes)
    if name == "batch norm":  # statistics of its own, as after training
        agent.actor.hidden[1].running_mean.uniform_(-1, 1), agent.actor.hidden[1].running_var.uniform_(0.5, 2)
    place = policies.export_onnx(agent, env, tmp_path / "model.pt")
    onnx.checker.check_model(onnx.load(place), full_check=True)
    session = onnxruntime.InferenceSession(place)
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("observation", ["batch", *env.observation_space.shape])
    ]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("action", ["batch", *env.action_space.shape])]

    obs = observations(env, 1000)
    (actions,) = session.run(["action"], {"observation": obs})
    expected = agent.act(obs)
    assert actions.dtype == expected.dtype
    if script is dqn:
        two_best = agent.q_network(torch.from_numpy(obs)).sort(dim=1).values[:, -2:]
        tie = (two_best[:, 1] - two_best[:, 0]).abs().detach().numpy() < 1e-6
        assert tie.mean() < 0.01 and len(set(expected)) == 2
        np.testing.assert_array_equal(actions[~tie], expected[~tie])
    else:
        half_range = (env.action_space.high - env.action_space.low) / 2
        print(f"{name}: largest difference {(abs(actions - expected) / half_range).max():.1e} of half the range")
        np.testing.assert_array_less(abs(actions - expected) / half_range, 1e-5)
        assert expected.std(axis=0).min() > 1e-4  # not the same for all
    assert len(session.run(["action"], {"observation": obs[:1]})[0]) == 1


@pytest.mark.slow
def test_no_action_leaves_the_bounds(tmp_path):
    """onnxruntime's tanh goes beyond 1 by a rounding error, so without the last clamp some of these do."""
    space = gym.spaces.Box(np.float32([-1, -3e-3, 5, 0.1]), np.float32([1, 2, 1e3, 0.7]))
    env = gym.Env()
    env.observation_space, env.action_space = gym.spaces.Box(-np.inf, np.inf, (4,)), space
    agent = ddpg.DDPG(env.observation_space, space, ddpg.Args(hidden_sizes=(16,)), torch.device("cpu"))
    session = onnxruntime.InferenceSession(policies.export_onnx(agent, env, tmp_path / "model.pt"))
    for size in (1, 10, 30, 100, 1e3, 1e30):
        obs = (np.random.default_rng(0).normal(size=(5000, 4)) * size).astype(np.float32)
        (actions,) = session.run(["action"], {"observation": obs})
        assert (space.low <= actions).all() and (actions <= space.high).all(), size


@pytest.mark.slow
def test_evaluate_exports_the_best_model_and_overwrites_nothing(run, tmp_path, capfd):
    run_dir = run(quick_args(dqn, env_id="CartPole-v1", eval_frequency=100)).run_dir.absolute()
    for name in ("best_model.onnx", "best_model-2.onnx"):
        done = main_in_this_process("--evaluate", str(run_dir), "--export", "onnx", cwd=tmp_path, script="dqn")
        assert done.returncode == 0 and f"best_model.pt is exported to {run_dir / name}" in done.stdout, done.stderr
        assert "arning" not in done.stderr + capfd.readouterr().err
    assert (run_dir / "evaluate-2.json").exists()
    first, second = ((run_dir / f"best_model{suffix}.onnx").read_bytes() for suffix in ("", "-2"))
    obs = np.zeros((3, 4), np.float32)
    (actions,) = onnxruntime.InferenceSession(first).run(["action"], {"observation": obs})
    np.testing.assert_array_equal(actions, policies.load_agent(run_dir)[0].act(obs))


def test_an_export_without_a_run_or_without_its_packages_is_refused(run, tmp_path, monkeypatch):
    refused(main_in_this_process("--export", "onnx", cwd=tmp_path), "--export onnx", "--evaluate")
    run_dir = str(run(quick_args()).run_dir.absolute())
    refused(main_in_this_process("--evaluate", run_dir, "--export", "tflite", cwd=tmp_path), "--export", "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(
        main_in_this_process("--evaluate", run_dir, "--export", "onnx", cwd=tmp_path),
        "--export onnx",
        "pip install onnx onnxscript",
    )
