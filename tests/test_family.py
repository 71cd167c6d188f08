"""What the scripts of the family share: the loop, exact resume, accelerated updates, refusals, the command line."""

import ast
import csv
import json
import shlex
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, quick_args
from fingerprint import fingerprint
from test_accelerate import assert_same
from test_arguments import refused
from test_resume import finish, only_run, run_killed, uninterrupted  # noqa: F401

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
from training import acceleration, command_line

SCRIPTS = sorted(f"{script.__name__}.py" for script in AGENTS)


def loop_of(path) -> str:
    """The text of the training loop, without what stands under "Act" and "Learn"."""
    text = path.read_text()
    loop = text[text.index("        while run.unfinished:") : text.index("        run.finish(agent)")]
    act, store = loop.index("            # Act"), loop.index("            check_finite(run.global_step, action=actions)")
    learn, end = loop.index("            # Learn"), loop.index("            run.end_step(agent, infos)")
    return loop[:act] + loop[store:learn] + loop[end:]


def test_the_loops_differ_only_under_act_and_learn():
    first, *others = (loop_of(ROOT / name) for name in SCRIPTS)
    assert all(other == first for other in others) and "rb.add(" in first


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_read_in_one_sitting(name):
    """At most 420 lines, and a `train` of at most 70."""
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= 420
    (train,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno < 70


SHORT = (
    "--total-timesteps 600 --learning-starts 150 --buffer-size 256 --batch-size 32 --hidden-sizes 32 32 --no-cuda "
    "--max-episode-steps 40 --checkpoint-frequency 100 --eval-frequency 200 --eval-episodes 1"
)
CASES = [
    ("sac_continuous_action", "--env-id Pendulum-v1", "step", 277),
    ("sac_continuous_action", "--env-id Hopper-v4 --num-envs 3 --vectorization async --alpha 0 --no-autotune", "step", 117),
    ("sac_continuous_action", "--env-id Pendulum-v1 --accelerate compile", "step", 377),
    ("dqn", "--env-id CartPole-v1 --target-network-frequency 50", "step", 377),
    ("dqn", "--env-id InvertedPendulum-v5 --bins 2 --num-envs 3 --double-q --train-frequency 3", "update", 60),
    ("dqn", "--env-id CartPole-v1 --accelerate compile --train-frequency 2", "rename", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "task", "moment", "number"), CASES)
def test_a_killed_run_ends_like_one_left_alone(uninterrupted, tmp_path, script, task, moment, number):  # noqa: F811
    arguments = f"{task} {SHORT}"
    done = run_killed(tmp_path, moment, number, *arguments.split(), script=script)
    assert done.returncode == -9, done.stderr
    run_dir = only_run(tmp_path)
    finish(tmp_path, run_dir, script)
    assert fingerprint(run_dir) == uninterrupted(arguments, script)


def trained(script, mode: str, changes: dict):
    """An agent after twelve updates, and what these returned."""
    torch.manual_seed(0)
    spaces = gym.spaces.Box(-1, 1, (5,), np.float32), gym.spaces.Box(-2, 2, (2,), np.float32)
    spaces = (spaces[0], gym.spaces.Discrete(6)) if script is dqn else spaces
    args = quick_args(script, hidden_sizes=(32, 24), **changes)
    rb = script.ReplayBuffer(200, *spaces, "cpu", handle_timeout_termination=False)
    rng = np.random.default_rng(0)
    rb.transitions[:] = rng.normal(size=rb.transitions.shape)
    rb.actions[:] = rng.integers(0, 6, rb.actions.shape) if script is dqn else rng.uniform(-2, 2, rb.actions.shape)
    rb.full = True
    agent = getattr(script, AGENTS[script])(*spaces, args, torch.device("cpu"))
    flags = [{"update_policy": True}, {"update_policy": False}]
    noise = {} if script is dqn else {"noise": torch.zeros(3, 16, 2)}
    if script is sac:
        flags = [flag | {"update_targets": targets} for flag in flags for targets in (True, False)]
    flags = flags[:1] if script is dqn else flags
    examples = [{"batch": rb.example_batch(16)} | noise | flag for flag in flags]
    acting = (np.zeros((3, 5), np.float32), np.zeros((3, 2), np.float32)) if script is sac else (np.zeros((3, 5), np.float32),)
    fast = acceleration.accelerate(agent, mode, acting, examples)
    assert (fast is agent) == (mode == "eager")
    np.random.seed(0)
    losses = []
    for number in range(12):
        noise = {name: torch.from_numpy(rng.standard_normal(value.shape).astype(np.float32)) for name, value in noise.items()}
        losses.append(fast.update(rb.sample(16), **noise, **flags[number % len(flags)]))
    return agent, fast, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changes"), [(sac, {}), (sac, {"num_critics": 1, "alpha": 0.0, "autotune": False}), (dqn, {"double_q": True})]
)
def test_compiled_is_the_same_algorithm(script, changes):
    agent, eager, eager_losses = trained(script, "eager", changes)
    compiled_agent, compiled, losses = trained(script, "compile", changes)
    assert_same(agent.state_dict(), compiled_agent.state_dict(), rtol=1e-4, atol=1e-5)
    for one, other in zip(eager_losses, losses, strict=True):
        assert one.keys() == other.keys()
        assert_same(one, other, rtol=1e-4, atol=1e-5)
    obs = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_allclose(compiled.act(obs), eager.act(obs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("script", "env_id"), [(sac, "Pendulum-like-v0"), (dqn, "CartPole-v1")])
def test_the_same_seed_gives_the_same_run(run, script, env_id):
    def digest(**changes):
        parts = run(quick_args(script, env_id=env_id, num_envs=2, save_model=False, **changes))
        return parts.agent.state_dict(), parts.rb.transitions

    (first, transitions), (again, same), (other, _) = digest(), digest(eval_frequency=70, eval_episodes=1), digest(seed=2)
    assert_same(first, again)
    np.testing.assert_array_equal(transitions, same)
    with pytest.raises(AssertionError):
        assert_same(first, other)


@pytest.mark.parametrize(("script", "env_id"), [(sac, "Pendulum-like-v0"), (dqn, "CartPole-v1")])
def test_a_run_leaves_what_a_run_leaves(run, script, env_id):
    parts = run(quick_args(script, env_id=env_id, eval_frequency=100))
    names = {path.name for path in parts.run_dir.iterdir()}
    assert {"args.json", "model.pt", "best_model.pt", "evaluations.csv", "evaluation.json", "checkpoints"} <= names
    assert len(list(csv.DictReader((parts.run_dir / "evaluations.csv").open()))) == 3
    assert {"losses/q_loss", "losses/q_est", "charts/SPS", "eval/q_bias"} <= parts.scalars.keys()
    args = command_line.load_args(parts.run_dir, script.Args)
    args.evaluate = parts.run_dir
    command_line.evaluate_run(args, getattr(script, AGENTS[script]))
    first, second = (json.loads((parts.run_dir / name).read_text()) for name in ("evaluation.json", "evaluation-2.json"))
    assert first["returns"] == second["returns"]


# The flags of CleanRL's scripts of these names, at their defaults (but --no-save-model: here models are kept).
CLEANRLS_FLAGS = (
    "--seed 1 --torch-deterministic --cuda --no-track --wandb-project-name cleanRL --wandb-entity None --no-capture-video "
    "--save-model --no-upload-model --hf-entity ''"
)
CLEANRLS_OWN_FLAGS = {
    ddpg: "--exp-name ddpg_continuous_action --env-id Hopper-v4 --total-timesteps 1000000 --learning-rate 3e-4 "
    "--buffer-size 1000000 --gamma 0.99 --tau 0.005 --batch-size 256 --exploration-noise 0.1 --learning-starts 25000 "
    "--policy-frequency 2 --noise-clip 0.5",
    sac: "--exp-name sac_continuous_action --env-id Hopper-v4 --total-timesteps 1000000 --num-envs 1 --buffer-size 1000000 "
    "--gamma 0.99 --tau 0.005 --batch-size 256 --learning-starts 5000 --policy-lr 3e-4 --q-lr 1e-3 --policy-frequency 2 "
    "--target-network-frequency 1 --alpha 0.2 --autotune",
    dqn: "--exp-name dqn --env-id CartPole-v1 --total-timesteps 500000 --learning-rate 2.5e-4 --num-envs 1 --buffer-size 10000 "
    "--gamma 0.99 --tau 1.0 --target-network-frequency 500 --batch-size 128 --start-e 1 --end-e 0.05 "
    "--exploration-fraction 0.5 --learning-starts 10000 --train-frequency 10",
}


@pytest.mark.parametrize("script", AGENTS, ids=lambda script: script.__name__)
def test_cleanrls_flags_are_ours_with_the_same_defaults(script):
    words = shlex.split(f"{CLEANRLS_FLAGS} {CLEANRLS_OWN_FLAGS[script]}")
    assert command_line.parse_args(script.Args, words, script.Args()) == script.Args()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "dqn.py --learning-starts 200 --total-timesteps 205",
        "sac_continuous_action.py --env-id Hopper-v4 --batch-size 128 --total-timesteps 135",
        "ddpg_continuous_action.py --env-id Hopper-v4 --learning-starts 100 --batch-size 32 --total-timesteps 105",
    ],
)
def test_cleanrls_short_commands_run(tmp_path, command):
    name, *arguments = command.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path).joinpath("evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sac_continuous_action.py --env-id CartPole-v1", ("--env-id CartPole-v1", "Discrete(2)")),
        ("dqn.py --env-id InvertedPendulum-v5", ("--env-id InvertedPendulum-v5", "--bins")),
    ],
)
def test_what_an_algorithm_cannot_take_is_refused(tmp_path, command, words):
    name, *arguments = command.split()
    done = subprocess.run([sys.executable, str(ROOT / name), *arguments], cwd=tmp_path, capture_output=True, text=True)
    refused(done, *words)
    assert list(tmp_path.iterdir()) == []
