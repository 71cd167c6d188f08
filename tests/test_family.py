"""What the scripts of the family share: the loop, exact resume, accelerated updates, refusals, the command line."""

import ast
import copy
import csv
import dataclasses
import json
import random
import re
import shlex
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys
from fingerprint import fingerprint
from helpers import AGENTS, ROOT, agent_of, idle, quick_args
from processes import run_script
from test_accelerate import assert_same, filled_buffer, update_of
from test_arguments import refused
from test_resume import SHORT, finish, only_run, run_killed, uninterrupted  # noqa: F401

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl import acceleration, command_line, record
from steadyrl.arguments import READ_FLAGS, Checkpoints, Environment, Evaluating, Experiment, parse_args
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run import Run

LINES = {ddpg: 335, td3: 300, sac: 355, dqn: 275}  # at most
OTHERS = [td3, sac, dqn]  # for what other files test of DDPG
TASKS = {ddpg: "Pendulum-like-v0", td3: "Pendulum-like-v0", sac: "Pendulum-like-v0", dqn: "CartPole-v1"}
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


@pytest.mark.parametrize(("script", "lines"), LINES.items())
def test_a_script_can_be_read_in_one_sitting(script, lines):
    text = (ROOT / f"{script.__name__}.py").read_text()
    assert len(text.splitlines()) <= lines
    (train,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno < 55


CASES = [
    ("td3_continuous_action", "--env-id Pendulum-v1 --n-steps 3", "step", 277),
    ("td3_continuous_action", "--env-id Hopper-v4 --num-envs 3 --vectorization async --exploration-noise-end 0", "step", 117),
    ("td3_continuous_action", "--env-id Pendulum-v1 --accelerate compile --hidden-sizes 32", "step", 377),
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


def end_of(run, script, **changes) -> tuple[dict, np.ndarray]:
    """The last agent of a run, and what it stored."""
    parts = run(quick_args(script, env_id=TASKS[script], num_envs=2, save_model=False, **changes))
    return parts.agent.state_dict(), parts.rb.transitions


@pytest.mark.parametrize("script", OTHERS)
def test_the_same_seed_gives_the_same_run(run, script):
    def digest(**changes):
        return end_of(run, script, **changes)

    (first, transitions), (again, same), (other, _) = digest(), digest(eval_frequency=70, eval_episodes=1), digest(seed=2)
    assert_same(first, again)
    np.testing.assert_array_equal(transitions, same)
    with pytest.raises(AssertionError):
        assert_same(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("script", AGENTS)
def test_training_draws_from_no_global_generator(run, monkeypatch, script):
    """Between any two steps something else seeds them: the run stays the same, to the bit."""
    end, transitions = end_of(run, script, train_frequency=1, eval_frequency=70, eval_episodes=1)
    add, seeds = ReplayBuffer.add, iter(range(10_000))

    def disturbed(*values) -> None:
        add(*values)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(next(seeds))

    monkeypatch.setattr(ReplayBuffer, "add", disturbed)
    again, same = end_of(run, script, train_frequency=1, eval_frequency=70, eval_episodes=1)
    assert next(seeds) > 400
    assert_same(end, again)
    np.testing.assert_array_equal(transitions, same)


# The contract


@pytest.mark.parametrize("script", AGENTS)
def test_act_takes_one_observation_or_many_of_any_dtype(script):
    agent = agent_of(script, num_actions=2)
    many = np.random.default_rng(0).uniform(0, 90, (5, *agent.observation_space.shape))
    expected = ((5,), np.int64) if script is dqn else ((5, 2), np.float32)
    for dtype in (np.float64, np.float16, np.int64, np.uint8, bool):
        obs = many.astype(dtype)
        actions = agent.act(obs)
        np.testing.assert_array_equal(actions, agent.act(obs.astype(np.float32)))
        np.testing.assert_array_equal(actions, agent.act(obs.tolist()))
        assert (actions.shape, actions.dtype) == expected
        for row, action in zip(obs, actions, strict=True):
            assert agent.action_space.contains(action) and agent.action_space.contains(agent.act(row))
            np.testing.assert_allclose(agent.act(row), agent.act(row[None])[0], rtol=0)
            np.testing.assert_allclose(agent.act(row), action, rtol=1e-4, atol=1e-5)
    if script is sac:
        noise = np.ones((1, 2), np.float32)
        np.testing.assert_array_equal(agent.act(many[0], noise), agent.act(many[:1], noise)[0])


@pytest.mark.parametrize("script", AGENTS)
@pytest.mark.filterwarnings("error")
def test_observations_may_lie_in_memory_as_they_like(script):
    agent = agent_of(script)
    (size,) = agent.observation_space.shape
    plain = np.random.default_rng(0).normal(size=(4, size)).astype(np.float32)
    fixed = plain.copy()
    fixed.flags.writeable = False
    for obs in (plain[::-1][::-1], np.asfortranarray(plain), fixed, np.hstack([plain, plain])[:, :size], plain.tolist()):
        np.testing.assert_array_equal(agent.act(obs), agent.act(plain))
        np.testing.assert_array_equal(agent.value(obs), agent.value(plain))
    np.testing.assert_allclose(agent.value(plain[0]), agent.value(plain)[:1], rtol=1e-5)


@pytest.mark.parametrize("script", [ddpg, td3, sac])
@pytest.mark.parametrize(("low", "high"), [(2048.0, 2050.0), (-40_000.0, 40_000.0), (0.1, 0.3)])
def test_a_saturated_actor_reaches_the_bounds_of_a_float16_space(script, low, high):
    """Their middle and their range may be no float16."""
    spaces = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(np.float16(low), np.float16(high), (1,), np.float16)
    agent = script.main.agent_class(*spaces, quick_args(script), torch.device("cpu"))
    with torch.no_grad():
        for sign, bound in ((-1, spaces[1].low), (1, spaces[1].high)):
            agent.actor.mu.weight.zero_(), agent.actor.mu.bias.fill_(sign * 1e6)
            np.testing.assert_array_equal(agent.act(np.zeros(3)).astype(np.float16), bound)


@pytest.mark.parametrize("script", AGENTS)
def test_what_was_loaded_is_a_copy(script):
    """Two agents with the state of a third go their own ways; a checkpoint's file is let go."""
    agents = [agent_of(script) for _ in range(3)]
    rb = filled_buffer(script, agents[0].args)
    for number in (1, 2):
        agents[0].update(**update_of(agents[0], rb, number))
    state = agents[0].state_dict()
    for agent in agents[1:]:
        agent.load_state_dict(state)
    before = copy.deepcopy(state)
    assert_same(agents[1].state_dict(), before)
    agents[1].update(**update_of(agents[1], rb, 3))
    for agent in (agents[0], agents[2]):
        assert_same(agent.state_dict(), before)
    agents[1].load_state_dict(before)  # once more, into tensors that exist
    assert_same(agents[1].state_dict(), before)


@pytest.mark.parametrize("script", AGENTS)
@pytest.mark.parametrize("shape", [(), (9,), (5, 9), (9, 5), (2, 5, "O"), ("O", 1), (1, "O", 1)], ids=str)
def test_observations_of_another_shape_are_refused(script, shape):
    agent = agent_of(script)
    (size,) = agent.observation_space.shape
    obs = np.zeros([size if length == "O" else length for length in shape])
    words = rf"observations have the shape {re.escape(str(obs.shape))}, must be \(N, {size}\) or \({size},\)"
    for method in (agent.act, agent.value):
        with pytest.raises(ValueError, match=words):
            method(obs)


@pytest.mark.parametrize("script", AGENTS)
@pytest.mark.parametrize("kind", ["networks", "optimizers"])
@pytest.mark.parametrize("held", [lambda part: part, lambda part: [part], lambda part: {"a": part}], ids=["", "list", "dict"])
def test_a_part_that_no_checkpoint_would_hold_is_refused(run, script, kind, held):
    class Forgetful(script.main.agent_class):
        def __init__(self, *values):
            super().__init__(*values)
            network = next(iter(self.networks.values()))
            self.known = [next(network.children()), network]  # of one that is saved
            curiosity = torch.nn.Linear(1, 1) if kind == "networks" else torch.optim.SGD(network.parameters(), lr=1.0)
            self.curiosity = held(curiosity)

    with pytest.raises(TypeError, match=f"^Forgetful.curiosity is not among its `{kind}`: no checkpoint would hold it$"):
        run(quick_args(script, env_id=TASKS[script]), Forgetful)


def test_arguments_that_lack_a_flag_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [(name, int, 1) for name in READ_FLAGS if name not in ("gamma", "batch_size")]
    args = dataclasses.make_dataclass("Short", flags, bases=(Experiment, Environment, Evaluating, Checkpoints))
    with pytest.raises(TypeError, match=r"^Short lacks gamma, batch_size, which this package reads$"):
        Run(args())
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_trained_and_in_no_network_is_refused(run):
    class Forgetful(sac.SAC):
        def __init__(self, *values):
            super().__init__(*values)
            self.log_alpha = torch.zeros(1, requires_grad=True)  # as CleanRL has it
            self.optimizers["alpha"] = torch.optim.AdamW([self.log_alpha])

    words = "^the optimizer alpha trains a tensor that is not in a network: no checkpoint would hold it$"
    with pytest.raises(TypeError, match=words):
        run(quick_args(sac), Forgetful)


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_a_network_that_is_replaced_is_refused_at_the_next_checkpoint(at_step, monkeypatch, tmp_path, mode):
    accelerated, agents = Run.accelerated, []
    monkeypatch.setattr(Run, "accelerated", lambda run, agent: agents.append(accelerated(run, agent)) or agents[0])
    monkeypatch.setattr(acceleration, "UPDATES_WORTH_COMPILING", 0)
    monkeypatch.setattr(acceleration, "compile_function", lambda function, tensors: function)
    at_step(270, lambda: setattr(agents[0], "critic", copy.deepcopy(agents[0].critic)))
    with pytest.raises(TypeError, match=r"^DDPG\.critic is not among its `networks`"):
        ddpg.train(quick_args(accelerate=mode, output=str(tmp_path)))


def test_a_forgotten_resume_is_an_error_before_the_first_step(tmp_path):
    with Run(quick_args(output=str(tmp_path))) as run, closing(run.make_envs()):
        with pytest.raises(RuntimeError, match=r"^call run.resume\(agent, envs, rb\) before the loop"):
            assert run.unfinished
        with pytest.raises(RuntimeError, match=r"run\.resume"):
            run.accelerated(agent_of(ddpg))


# Whole runs


@pytest.mark.parametrize("script", OTHERS)
def test_a_run_leaves_what_a_run_leaves(run, script):
    parts = run(quick_args(script, env_id=TASKS[script], eval_frequency=100))
    names = {path.name for path in parts.run_dir.iterdir()}
    assert {"args.json", "model.pt", "best_model.pt", "evaluations.csv", "evaluation.json", "checkpoints"} <= names
    assert len(list(csv.DictReader((parts.run_dir / "evaluations.csv").open()))) == 3
    assert {"losses/q_loss", "losses/q_est", "charts/SPS", "eval/q_bias"} <= parts.scalars.keys()
    args = record.load_args(parts.run_dir, script.Args)
    args.evaluate = parts.run_dir
    command_line.evaluate_run(args, script.main.agent_class)
    first, second = (json.loads((parts.run_dir / name).read_text()) for name in ("evaluation.json", "evaluate.json"))
    assert first["returns"] == second["returns"]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("script", OTHERS)
def test_every_stored_transition_happened(run, script, num_envs):
    """As of DDPG in test_replay: each successor is its observation plus 1, and only terminations are marked done."""
    bins = {"bins": 3} if script is dqn else {}
    args = quick_args(script, env_id="Mixed-v0", num_envs=num_envs, total_timesteps=210, **bins)
    rb = run(args, idle(script)).rb
    steps, ends = 210 // num_envs, [(1, 1), (3, 0), (2, 1), (1, 0)]  # lengths of the episodes, and whether they terminate
    np.testing.assert_array_equal(rb.next_observations[:steps], rb.observations[:steps] + 1)
    expected = [done for _ in range(steps) for length, end in ends for done in [0] * (length - 1) + [end]][:steps]
    ended = [end for _ in range(steps) for length, _ in ends for end in [0] * (length - 1) + [1]][:steps]
    np.testing.assert_array_equal(rb.dones[:steps], np.tile(expected, (num_envs, 1)).T)
    np.testing.assert_array_equal((rb.dones > 0)[:steps] | rb.timeouts[:steps], np.tile(ended, (num_envs, 1)).T)


@pytest.mark.parametrize("script", OTHERS)
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
    np.testing.assert_allclose(stored, received, rtol=1e-6 if script is dqn else 0)
    assert (received >= low).all() and (received <= high).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_a_time_limit_is_no_terminal_state(run, script):
    """Reward 1, cut off after 5 steps, gamma 0.5: every value is 2, where a truncated sum would be 1 at the last step."""
    own = {
        td3: {"learning_rate": 1e-3},
        sac: {"alpha": 0.0, "autotune": False},
        dqn: {"bins": 2, "train_frequency": 1, "learning_rate": 1e-3, "target_network_frequency": 1},
    }
    args = quick_args(script, env_id="TimeLimited-v0", gamma=0.5, tau=0.05, total_timesteps=2000, **own[script])
    values = run(args).agent.value(np.arange(5, dtype=np.float32)[:, None] / 5)
    np.testing.assert_allclose(values, 2, atol=0.1)


@pytest.mark.parametrize("script", AGENTS)
def test_values_do_without_the_accelerated_policy(script):
    """It is built for each number of observations, and the episodes of an evaluation have many lengths."""
    agent = agent_of(script)
    agent.policy = None
    for name in {"value", "state_value"} & set(dir(agent)):
        assert getattr(agent, name)(np.zeros((7, *agent.observation_space.shape))).shape == (7,)


@pytest.mark.parametrize("script", OTHERS)
def test_a_state_is_taken_over_but_not_its_learning_rates(script):
    names = ("policy_lr", "q_lr") if script is sac else ("learning_rate",)
    agent, other = (agent_of(script, **dict.fromkeys(names, rate)) for rate in (0.1, 0.2))
    other.update(**update_of(other, filled_buffer(script, other.args), 2))
    agent.load_state_dict(other.state_dict())
    ours, theirs = agent.state_dict(), other.state_dict()
    assert_same(ours["networks"], theirs["networks"])
    for name, optimizer in theirs["optimizers"].items():
        assert_same(ours["optimizers"][name]["state"], optimizer["state"])
        assert optimizer["state"] and ours["optimizers"][name]["param_groups"][0]["lr"] == 0.1


def command_line_of(command: str, cwd: Path, **environment: Any) -> subprocess.CompletedProcess:
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
    "--policy-frequency 2",
    td3: "--exp-name td3_continuous_action --env-id Hopper-v4 --total-timesteps 1000000 --learning-rate 3e-4 --num-envs 1 "
    "--buffer-size 1000000 --gamma 0.99 --tau 0.005 --batch-size 256 --policy-noise 0.2 --exploration-noise 0.1 "
    "--learning-starts 25000 --policy-frequency 2 --noise-clip 0.5",
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
        "td3_continuous_action.py --env-id Hopper-v4 --learning-starts 100 --batch-size 32 --total-timesteps 105",
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
        ("td3_continuous_action.py", "--env-id Pendulum-v1", ("policy_noise", "losses/actor_loss")),
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
    (film,) = {path.name for path in videos.iterdir()} - before
    assert film.startswith("evaluate-") and film.endswith("-episode-0.mp4")
    assert all(path.stat().st_size > 1000 for path in videos.iterdir())
    names = ("evaluation.json", "evaluate.json", "evaluate-2.json")
    returns = [json.loads((folder / name).read_text())["returns"] for name in names]
    assert returns[0] == returns[1] == returns[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("td3_continuous_action.py --env-id CartPole-v1", ("--env-id CartPole-v1", "Discrete(2)")),
        ("sac_continuous_action.py --env-id CartPole-v1", ("--env-id CartPole-v1", "Discrete(2)")),
        ("dqn.py --env-id InvertedPendulum-v5", ("--env-id InvertedPendulum-v5", "--bins")),
    ],
)
def test_what_an_algorithm_cannot_take_is_refused(tmp_path, command, words):
    refused(command_line_of(command, tmp_path), *words)
    assert list(tmp_path.iterdir()) == []
