"""A trained policy in the user's own code."""

import json
import os
import re
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import AGENTS, ROOT, quick_args

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
from steadyrl.errors import UsageError
from steadyrl.evaluation import FINAL_EVALUATION_SEED
from steadyrl.policies import load_agent, load_args

RUNS = {
    "ddpg": (ddpg, {"env_id": "toys:MatrixActionSpaces-v0", "normalization": "batch"}),
    "sac": (sac, {"env_id": "Pendulum-like-v0"}),
    "dqn": (dqn, {"env_id": "InvertedPendulum-v5", "bins": 3}),
}


def test_a_flag_that_a_newer_version_no_longer_has_is_said(tmp_path, capsys):
    settings = {"script": "ddpg_continuous_action", "args": {"gamma": 0.9, "hidden_sizes": [8], "old_flag": True}}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    args = load_args(tmp_path, ddpg.Args)
    assert (args.gamma, args.hidden_sizes, args.tau) == (0.9, (8,), 0.005)
    assert capsys.readouterr().out == f"{tmp_path}: this version of ddpg_continuous_action.py has no --old-flag; it was True\n"


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_agent_plays_the_episodes_of_the_final_evaluation(run, name):
    """In the environment of training, with its wrappers, and with the best model."""
    script, changes = RUNS[name]
    run_dir = run(quick_args(script, eval_frequency=100, final_episodes=3, exp_name="mine", **changes)).run_dir
    agent, env = load_agent(run_dir)
    returns = []
    for seed in range(FINAL_EVALUATION_SEED, FINAL_EVALUATION_SEED + 3):
        obs, _ = env.reset(seed=seed)
        rewards, over = [], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            rewards.append(reward)
            over = terminated or truncated
        returns.append(sum(rewards))
    assert type(agent) is getattr(script, AGENTS[script])
    assert returns == json.loads((run_dir / "evaluation.json").read_text())["returns"]


def test_the_best_model_before_the_latest(run):
    run_dir = run(quick_args(eval_frequency=100)).run_dir
    shutil.copy(run(quick_args(seed=2)).run_dir / "model.pt", run_dir)
    for name in ("best_model", "model"):
        weights = torch.load(run_dir / f"{name}.pt", weights_only=True)["actor"]
        for key, value in load_agent(run_dir)[0].actor.state_dict().items():
            assert torch.equal(value, weights[key])
        (run_dir / f"{name}.pt").unlink()
    with pytest.raises(UsageError, match=r"best_model\.pt or a model\.pt"):
        load_agent(run_dir)


def test_the_environment_keeps_its_infos_and_renders(run):
    run_dir = run(quick_args(dqn, env_id="CartPole-v1")).run_dir
    agent, env = load_agent(run_dir, render_mode="rgb_array")
    obs, info = env.reset(seed=3)
    assert info == {} and env.render().ndim == 3  # no "start", which is for resuming
    plain = gym.make("CartPole-v1")
    np.testing.assert_array_equal(plain.reset(seed=3)[0], obs)
    env.close()


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="folder of a run"):
        load_agent(tmp_path)
    run_dir = run(quick_args()).run_dir
    settings = json.loads((run_dir / "args.json").read_text())
    for script in ("os", "../ddpg_continuous_action", None, ["dqn"]):  # only a script of ours is imported
        (run_dir / "args.json").write_text(json.dumps(settings | {"script": script}))
        with pytest.raises(UsageError, match="must name a script"):
            load_agent(run_dir)


@pytest.mark.slow
def test_the_readmes_lines_play_an_episode(run, tmp_path):
    """As they stand, in a process of its own, with the run's folder for `runs/<run name>`."""
    run_dir = run(quick_args(dqn, env_id="CartPole-v1")).run_dir
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from steadyrl.policies import load_agent\n.*?)```", readme, re.DOTALL)
    code = code.replace("runs/<run name>", str(run_dir)) + "print(terminated or truncated)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
