"""What the scripts of the family share: the loop, exact resume, accelerated updates, refusals, the command line."""

import ast
import csv
import json
import shlex
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys
from fingerprint import fingerprint
from helpers import AGENTS, ROOT, drop_biases, quick_args
from processes import run_script
from test_accelerate import COMPILED_ONCE, assert_same
from test_arguments import refused
from test_resume import SHORT, finish, only_run, run_killed, uninterrupted  # noqa: F401

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
from steadyrl import acceleration, command_line, setup
from steadyrl.arguments import parse_args

SCRIPTS = sorted(f"{script.__name__}.py" for script in AGENTS)


def loop_of(path) -> str:
    """The text of the training loop, without what stands under "Act" and "Learn"."""
    text = path.read_text()
    loop = text[text.index("        while run.unfinished:") : text.index("        run.finish(agent)")]
    act, store = loop.index("            # Act"), loop.index("            next_obs, rewards,")
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


CASES = [
    ("sac_continuous_action", "--env-id Pendulum-v1", "step", 277),
    ("sac_continuous_action", "--env-id Hopper-v4 --num-envs 3 --vectorization async --alpha 0 --no-autotune", "step", 117),
    ("sac_continuous_action", "--env-id Pendulum-v1 --accelerate compile --hidden-sizes 32", "step", 377),
    ("dqn", "--env-id CartPole-v1 --target-network-frequency 50", "step", 377),
    ("dqn", "--env-id InvertedPendulum-v5 --bins 2 --num-envs 3 --double-q --train-frequency 3", "update", 60),
    ("dqn", "--env-id CartPole-v1 --accelerate compile --double-q --train-frequency 2 --hidden-sizes 32", "rename", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "task", "moment", "number"), CASES)
def test_a_killed_run_ends_like_one_left_alone(uninterrupted, tmp_path, script, task, moment, number):  # noqa: F811
    arguments = f"{SHORT} {task}"
    done = run_killed(tmp_path, moment, number, *arguments.split(), script=script)
    assert done.returncode == -9, done.stderr
    run_dir = only_run(tmp_path)
    finish(tmp_path, run_dir, script)
    assert fingerprint(run_dir) == uninterrupted(arguments, script)


def trained(script, mode: str, num_actions: int = 1, **changes):
    """An agent after twelve updates, and what these returned: of Pendulum-v1's sizes, or CartPole-v1's, as in `CASES`."""
    torch.manual_seed(0)
    args = quick_args(script, **(COMPILED_ONCE | changes))
    setup.set_up_device(args)
    box = gym.spaces.Box(-2, 2, (num_actions,), np.float32)
    spaces = gym.spaces.Box(-1, 1, (4 if script is dqn else 3,), np.float32), gym.spaces.Discrete(2) if script is dqn else box
    rb = script.ReplayBuffer(200, *spaces, "cpu", handle_timeout_termination=False)
    rng = np.random.default_rng(0)
    rb.transitions[:] = rng.normal(size=rb.transitions.shape)
    rb.actions[:] = rng.integers(0, 2, rb.actions.shape) if script is dqn else rng.uniform(-2, 2, rb.actions.shape)
    rb.full = True
    agent = getattr(script, AGENTS[script])(*spaces, args, torch.device("cpu"))
    flags, noise, acting = [{"update_policy": True}], {}, (np.zeros((1, *spaces[0].shape), np.float32),)
    if script is sac:
        cycle = range(args.policy_frequency * args.target_network_frequency)
        flags = [(n % args.policy_frequency == 0, n % args.target_network_frequency == 0) for n in cycle]
        flags = [{"update_policy": policy, "update_targets": targets} for policy, targets in flags]
        noise = {"noise": torch.zeros(1 + args.policy_frequency, 32, num_actions)}
        acting = (*acting, np.zeros((1, num_actions), np.float32))
    fast = acceleration.accelerate(agent, mode, acting, [{"batch": rb.example_batch(32)} | noise | flag for flag in flags])
    assert (fast is agent) == (mode == "eager")
    np.random.seed(0)
    losses = []
    for number in range(12):
        noise = {name: torch.from_numpy(rng.standard_normal(value.shape).astype(np.float32)) for name, value in noise.items()}
        losses.append(fast.update(rb.sample(32), **noise, **flags[number % len(flags)]))
    return agent, fast, losses


FIRST_MILESTONE = {"num_critics": 1, "alpha": 0.0, "autotune": False, "policy_frequency": 1, "target_network_frequency": 2}
NORMALIZED = {"weight_decay": 0.1, "normalization": "batch", "num_actions": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "changes"), [(sac, {}), (sac, FIRST_MILESTONE | NORMALIZED), (dqn, {"double_q": True})])
def test_compiled_is_the_same_algorithm(monkeypatch, script, changes):
    if "normalization" in changes:
        drop_biases(monkeypatch, script)
    agent, eager, eager_losses = trained(script, "eager", **changes)
    compiled_agent, compiled, losses = trained(script, "compile", **changes)
    assert_same(agent.state_dict(), compiled_agent.state_dict(), rtol=1e-4, atol=1e-5)
    for one, other in zip(eager_losses, losses, strict=True):
        assert one.keys() == other.keys()
        assert_same(one, other, rtol=1e-4, atol=1e-5)
    obs = np.random.default_rng(2).normal(size=(2, 1, 4 if script is dqn else 3)).astype(np.float32)
    for rows in obs:
        np.testing.assert_allclose(compiled.act(rows), eager.act(rows), rtol=1e-4, atol=1e-5)


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


def idle(script) -> type:
    """The agent of a script, that acts and never learns."""
    return type("Idle", (getattr(script, AGENTS[script]),), {"update": lambda self, *values, **named: {}})


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("script", [sac, dqn])
def test_every_stored_transition_happened(run, script, num_envs):
    """As of DDPG in test_replay: each successor is its observation plus 1, and only terminations are marked done."""
    bins = {"bins": 3} if script is dqn else {}
    args = quick_args(script, env_id="Mixed-v0", num_envs=num_envs, total_timesteps=210, **bins)
    rb = run(args, idle(script)).rb
    steps, ends = 210 // num_envs, [(1, 1), (3, 0), (2, 1), (1, 0)]  # lengths of the episodes, and whether they terminate
    np.testing.assert_array_equal(rb.next_observations[:steps], rb.observations[:steps] + 1)
    expected = [done for _ in range(steps) for length, end in ends for done in [0] * (length - 1) + [end]][:steps]
    np.testing.assert_array_equal(rb.dones[:steps], np.tile(expected, (num_envs, 1)).T)


@pytest.mark.parametrize("script", [sac, dqn])
def test_the_stored_action_is_the_one_that_was_sent(run, script):
    """Bounds that differ per dimension. DQN stores the number of a row in the table of 3 x 3 x 3 actions."""
    bins = {"bins": 3, "end_e": 0.5} if script is dqn else {}
    args = quick_args(script, env_id="Bounds-v0", num_envs=4, total_timesteps=400, **bins)
    stored = run(args, idle(script)).rb.actions[:100]
    low, high = toys.Bounds.action_space.low, toys.Bounds.action_space.high
    if script is dqn:
        digits = np.stack(np.unravel_index(stored[..., 0].astype(int), (3, 3, 3)), axis=-1)
        stored = low + (digits + 0.5) / 3 * (high - low)  # the middles of the bins
    received = np.array([action for _, action in toys.RECEIVED[:400]]).reshape(100, 4, 3)
    np.testing.assert_allclose(stored, received, rtol=0 if script is sac else 1e-6)
    assert (received >= low).all() and (received <= high).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", [sac, dqn])
def test_a_time_limit_is_no_terminal_state(run, script):
    """Reward 1, cut off after 5 steps, gamma 0.5: every value is 2, where a truncated sum would be 1 at the last step."""
    own = {"bins": 2, "train_frequency": 1, "learning_rate": 1e-3} if script is dqn else {"alpha": 0.0, "autotune": False}
    args = quick_args(script, env_id="TimeLimited-v0", gamma=0.5, tau=0.05, target_network_frequency=1, **own)
    args.total_timesteps = 2000
    values = run(args).agent.value(np.arange(5, dtype=np.float32)[:, None] / 5)
    np.testing.assert_allclose(values, 2, atol=0.1)


@pytest.mark.parametrize("script", AGENTS)
def test_values_do_without_the_accelerated_policy(script):
    """It is built for each number of observations, and the episodes of an evaluation have many lengths."""
    space = gym.spaces.Discrete(3) if script is dqn else gym.spaces.Box(-2, 2, (2,), np.float32)
    agent = getattr(script, AGENTS[script])(
        gym.spaces.Box(-1, 1, (5,), np.float32), space, quick_args(script), torch.device("cpu")
    )
    agent.policy = None
    for name in {"value", "state_value"} & set(dir(agent)):
        assert getattr(agent, name)(np.zeros((7, 5), np.float32)).shape == (7,)


@pytest.mark.parametrize("script", [sac, dqn])
def test_a_state_is_taken_over_but_not_its_learning_rates(script):
    spaces = gym.spaces.Box(-1, 1, (5,), np.float32), gym.spaces.Box(-2, 2, (2,), np.float32)
    spaces = (spaces[0], gym.spaces.Discrete(3)) if script is dqn else spaces

    def agent_with(rate: float):
        rates = {"learning_rate": rate} if script is dqn else {"policy_lr": rate, "q_lr": rate}
        return getattr(script, AGENTS[script])(*spaces, quick_args(script, **rates), torch.device("cpu"))

    agent, other = agent_with(0.1), agent_with(0.2)
    rb = script.ReplayBuffer(20, *spaces, "cpu", handle_timeout_termination=False)
    rb.full = True
    noise = {} if script is dqn else {"noise": torch.zeros(3, 16, 2)}
    other.update(rb.sample(16), update_policy=True, **noise)
    agent.load_state_dict(other.state_dict())
    ours, theirs = agent.state_dict(), other.state_dict()
    assert_same(ours["networks"], theirs["networks"])
    for name, optimizer in theirs["optimizers"].items():
        assert_same(ours["optimizers"][name]["state"], optimizer["state"])
        assert optimizer["state"] and ours["optimizers"][name]["param_groups"][0]["lr"] == 0.1


def command_line_of(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own."""
    name, *arguments = command.split()
    return run_script(ROOT / name, *arguments, cwd=cwd, **environment)


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
    assert parse_args(script.Args, words, script.Args()) == script.Args()


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
    done = command_line_of(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert only_run(tmp_path).joinpath("evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "recorded"),
    [
        ("sac_continuous_action.py", "--env-id Pendulum-v1", ("policy_lr", "losses/alpha")),
        ("dqn.py", "--env-id CartPole-v1 --train-frequency 2", ("double_q", "losses/q_est")),
    ],
)
def test_video_tracking_and_evaluation(tmp_path, name, flags, recorded):
    """The run is filmed and tracked offline; its best model, evaluated again, does the same again, and is filmed if asked."""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path), "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    short = f"--total-timesteps 300 --learning-starts 100 --batch-size 16 --hidden-sizes 32 32 {flags}"
    short += " --eval-frequency 150 --eval-episodes 2 --final-episodes 2"
    done = command_line_of(f"{name} {short} --track --capture-video", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    videos = tmp_path / "videos" / folder.name
    assert {"training-episode-0.mp4", "evaluation-episode-0.mp4"} <= {path.name for path in videos.iterdir()}
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for expected in (folder.name, "losses/q_loss", "eval/q_bias", "charts/episodic_return", *recorded):
        assert expected.encode() in record.read_bytes(), expected

    before = {path.name for path in videos.iterdir()}
    done = command_line_of(f"{name} --evaluate {folder}", tmp_path, **environment)
    assert done.returncode == 0 and {path.name for path in videos.iterdir()} == before, done.stderr
    done = command_line_of(f"{name} --evaluate {folder} --capture-video", tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in videos.iterdir()} == before | {"evaluation-3-episode-0.mp4"}
    assert all(path.stat().st_size > 1000 for path in videos.iterdir())
    returns = [json.loads((folder / f"evaluation{end}.json").read_text())["returns"] for end in ("", "-2", "-3")]
    assert returns[0] == returns[1] == returns[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sac_continuous_action.py --env-id CartPole-v1", ("--env-id CartPole-v1", "Discrete(2)")),
        ("dqn.py --env-id InvertedPendulum-v5", ("--env-id InvertedPendulum-v5", "--bins")),
    ],
)
def test_what_an_algorithm_cannot_take_is_refused(tmp_path, command, words):
    refused(command_line_of(command, tmp_path), *words)
    assert list(tmp_path.iterdir()) == []
