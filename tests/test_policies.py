"""A trained policy in the user's own code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import AGENTS, ROOT, quick_args

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl.errors import UsageError
from steadyrl.evaluation import FINAL_EVALUATION_SEED
from steadyrl.models import load_model
from steadyrl.policies import load_agent
from steadyrl.record import load_args

RUNS = {
    "ddpg": (ddpg, {"env_id": "toys:MatrixActionSpaces-v0", "normalization": "batch"}),
    "td3": (td3, {"env_id": "Pendulum-like-v0"}),
    "sac": (sac, {"env_id": "Pendulum-like-v0"}),
    "dqn": (dqn, {"env_id": "InvertedPendulum-v5", "bins": 3}),
}


def test_a_flag_that_a_newer_version_no_longer_has_is_said(tmp_path, capsys):
    settings = {"script": "ddpg_continuous_action", "args": {"gamma": 0.9, "hidden_sizes": [8], "old_flag": True}}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    args = load_args(tmp_path, ddpg.Args)
    assert (args.gamma, args.hidden_sizes, args.tau) == (0.9, (8,), 0.005)
    assert capsys.readouterr().out == "this version of ddpg_continuous_action.py has no --old-flag; it was True\n"


@pytest.mark.slow
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


def ddpg_agent(run_dir: Path, env: gym.Env) -> ddpg.DDPG:
    """The DDPG agent with the latest model of a run."""
    spaces: tuple[Any, Any] = env.observation_space, env.action_space
    agent = ddpg.DDPG(*spaces, quick_args(hidden_sizes=(8,)), torch.device("cpu"))
    load_model(agent, run_dir / "model.pt")
    return agent


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="folder of a run"):
        load_agent(tmp_path)
    run_dir = run(quick_args()).run_dir
    settings = json.loads((run_dir / "args.json").read_text())
    for script in ("os", "../ddpg_continuous_action", None, ["dqn"]):  # only a script of ours is imported
        (run_dir / "args.json").write_text(json.dumps(settings | {"script": script}))
        with pytest.raises(UsageError, match=r"names the script .*, must be one of .*, or give script=PATH"):
            load_agent(run_dir)


def test_the_agent_of_a_script_of_ones_own_is_loaded_where_that_is_given(run, tmp_path, monkeypatch):
    """The script may lie anywhere, and imports what is beside it. Its name in an args.json alone has nothing run."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    run_dir = run(quick_args(hidden_sizes=(8,))).run_dir.absolute()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside_my_agent.py").write_text("from pathlib import Path\nPath('was_run').touch()\n")
    own = (ROOT / "ddpg_continuous_action.py").read_text().replace("import copy\n", "import copy\nimport beside_my_agent\n", 1)
    (tmp_path / "mine" / "my_agent.py").write_text(own)
    settings = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps(settings | {"script": "my_agent"}))
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(UsageError, match="names the script 'my_agent'"):
        load_agent(run_dir)
    assert not Path("was_run").exists()
    monkeypatch.chdir(tmp_path)
    agent, env = load_agent(run_dir, script="mine/my_agent.py")
    assert Path("was_run").exists() and type(agent).__module__ == "my_agent"
    obs, _ = env.reset(seed=1)
    np.testing.assert_array_equal(agent.act(obs), ddpg_agent(run_dir, env).act(obs))


def test_a_script_that_cannot_be_imported_says_so_each_time(run, tmp_path):
    run_dir = run(quick_args()).run_dir
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    for _ in range(2):
        with pytest.raises(UsageError, match="no_such_module"):
            load_agent(run_dir, script=tmp_path / "broken.py")


@pytest.mark.parametrize(
    ("script", "word"),
    [("nowhere.py", "No such file"), ("LICENSE", "not a Python file"), ("tests/toys.py", "main"), ("dqn", "is a run of")],
)
def test_what_is_no_script_of_the_run_is_refused(run, script, word):
    run_dir = run(quick_args()).run_dir
    path = script if script == "dqn" else ROOT / script
    with pytest.raises(UsageError, match=word):
        load_agent(run_dir, script=path)


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
