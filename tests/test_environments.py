"""Environments that nobody here made: which come back, any spaces, errors of their own."""

import dataclasses
import random
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys
from helpers import ROOT, quick_args
from test_arguments import main_in_this_process, refused, script
from test_faults import TOY, steps_of
from test_resume import SHORT, only_run, run_killed

import ddpg_continuous_action as ddpg
import sac_continuous_action as sac
import steadyrl.logs
import steadyrl.run
import td3_continuous_action as td3
from steadyrl import checkpoints, checks, environments, episodes, record, spaces

REPLAYS = {
    "Pendulum-like": "plain",
    "LegacyGenerator": "plain",
    "TimeLimited": "plain",
    "CarriesState": "rebuild",
    "NeedsItsEnd": "rebuild",
    "NeedsItsEndSoon": "plain",
    "Counter": "cut",
    "Mixed": "cut",
} | {
    f"{name}{start}": "cut"
    for name in ("RandomModule", "NumPysGenerator", "Clock", "OwnGenerator", "OwnSeededGenerator")
    for start in ("", "Start")
}
REPLAYS["OwnSeededGenerator"] = "rebuild"


def replay_of(env_id: str) -> str:
    args = quick_args(env_id=env_id)
    return episodes.find_replay(lambda rebuild: environments.make_replayable_env(args, rebuild=rebuild))


@pytest.mark.parametrize("name", REPLAYS)
def test_how_an_episode_comes_back_is_found_out(name):
    assert replay_of(f"{name}-v0") == REPLAYS[name]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Pendulum", "gymnasium.envs.classic_control:Pendulum-v1"])
def test_what_is_known_of_an_environment_holds_for_all_its_names(monkeypatch, capsys, env_id):
    monkeypatch.setitem(checks.KNOWN_REPLAYS, "Pendulum-v1", "rebuild")
    assert checks.check(quick_args(env_id=env_id, episode_replay="auto")).replay == "rebuild"


@pytest.mark.parametrize(("env_id", "replay"), [("BipedalWalker-v3", "rebuild"), ("Hopper-v5", "plain")])
def test_how_a_real_episode_comes_back_is_found_out(env_id, replay):
    assert replay_of(env_id) == replay


def test_the_check_draws_nothing_from_the_random_streams():
    def streams():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = streams()
    assert checks.check(quick_args(episode_replay="auto")).replay == "plain" and streams() == before


def resumed(args: ddpg.Args) -> episodes.TrainingEnvs:
    """Environments that loaded the state of others after three steps."""
    envs = environments.make_envs(args, "run")
    envs.reset(seed=1)
    for _ in range(3):
        envs.step(envs.action_space.sample())
    state = envs.state_dict()
    envs.close()  # before others are made: their workers would keep its pipes open
    envs = environments.make_envs(args, "run")
    envs.reset(seed=1)
    envs.load_state_dict(state)
    return envs


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_every_reward_of_a_replay_is_compared(vectorization, capsys):
    """The clock's observations come back, its rewards do not."""
    for env_id, cut_off in (("Pendulum-like-v0", False), ("Clock-v0", True)):
        envs = resumed(quick_args(env_id=env_id, num_envs=2, vectorization=vectorization))
        envs.close()
        assert envs.starting.tolist() == [cut_off] * 2
        assert capsys.readouterr().out.count("did not come back") == 2 * cut_off


def test_every_observation_of_a_replay_is_compared(monkeypatch):
    """Also the first of three, where the others are the same."""
    step, calls = toys.PendulumLike.step, 0

    def different_once(self, action):
        nonlocal calls
        calls += 1
        obs, *rest = step(self, action)
        return obs + (calls == 4), *rest  # the first one of the replay, after three steps

    monkeypatch.setattr(toys.PendulumLike, "step", different_once)
    assert resumed(quick_args()).starting.tolist() == [True]


def test_an_environment_that_refuses_a_reset_in_the_middle_of_its_episode_comes_back():
    args = quick_args(env_id="NeedsItsEnd-v0", episode_replay="auto")
    found = checks.check(args)
    assert found == checks.Findings("rebuild", disturbed=False)
    assert resumed(dataclasses.replace(args, episode_replay=found.replay)).starting.tolist() == [False]


def test_an_environment_that_cannot_come_back_is_cut_off_even_where_it_looks_the_same():
    assert resumed(quick_args(episode_replay="cut")).starting.tolist() == [True]


@pytest.mark.slow
def test_what_cannot_come_back_is_said_at_the_start_and_on_resume(tmp_path):
    arguments = f"{TOY} --env-id toys:RandomModule-v0 --num-envs 2 --checkpoint-frequency 100".split()
    done = run_killed(tmp_path, "step", 78, *arguments)
    assert done.returncode == -9 and "warning: a replayed episode is not the same" in done.stdout
    done = script("--resume", str(only_run(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: a replayed episode is not the same" in done.stdout
    assert done.stdout.count("did not come back") == 2


@pytest.mark.slow
def test_what_is_built_anew_is_said(run, capsys):
    run(quick_args(env_id="CarriesState-v0", episode_replay="auto"))
    assert "CarriesState-v0: carries state from one episode to the next" in capsys.readouterr().out


def test_a_numpy_random_state_survives_the_end_of_an_episode(run):
    """And a constructor that knows no render_mode."""
    assert len(run(quick_args(env_id="LegacyGenerator-v0")).scalars["charts/episodic_return"]) == 33


# Spaces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("Dict", 5, "Dict('a': Box(0.0, 1.0, (2,), float32), 'b': Discrete(3)), are flattened to 5 numbers"),
        ("Tuple", 5, "Tuple(Box(0.0, 1.0, (2, 2), float32), Box(-5, 5, (1,), int64)), are flattened to 5 numbers"),
        ("Matrix", 6, "observations, Box(-1.0, 1.0, (2, 3), float32), are flattened to 6 numbers"),
        ("Integer", 4, "observations, Box(0, 255, (4,), uint8), are taken as float32"),
        ("Discrete", 4, "observations, Discrete(4), are flattened to 4 numbers"),
        (
            "MatrixAction",
            1,
            "[[ 2. 1.] [11. 6.]], (2, 2), float32), are flattened to 4 numbers",
        ),
    ],
)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_any_spaces_become_vectors(run, capsys, name, size, words, num_envs):
    args = quick_args(env_id=f"{name}Spaces-v0", num_envs=num_envs, exploration_noise=1.0)
    parts = run(args)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name}Spaces-v0: ")]
    assert [words in line for line in said].count(True) == 1
    assert parts.rb.observations.shape[2] == size and parts.rb.observations.dtype == np.float32
    if name == "MatrixAction":
        received = np.array([action for _, action in toys.RECEIVED[:300]])
        np.testing.assert_array_equal(received.reshape(-1, num_envs, 4), parts.rb.actions[: 300 // num_envs])
        low, high = toys.SPACES[name]["action_space"].low, toys.SPACES[name]["action_space"].high
        assert (received >= low).all() and (received <= high).all() and received.shape[1:] == (2, 2)


def box_env(low, high, dtype) -> toys.Shaped:
    """An environment that takes actions of this Box."""
    return toys.Shaped(action_space=gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype))


BOUNDS = [
    (-0.1, 0.1, np.float64),  # float32 has no 0.1: the nearest one is larger
    (1 / 3, 2 / 3, np.float64),
    (-1e-50, 1.0, np.float64),
    (-1e38, 1e38, np.float64),
    (-0.1, 0.7, np.float16),
    (-2.0, 2.0, np.float32),
]


@pytest.mark.parametrize(("low", "high", "dtype"), BOUNDS)
def test_every_legal_action_is_in_the_space(low, high, dtype):
    """Bounds are rounded inward, by no more than a step of float32."""
    env = box_env([[low, low]], [[high, high]], dtype)
    wrapped = spaces.flatten_actions(env)
    space = wrapped.action_space
    assert space.shape == (2,) and space.dtype == dtype
    for bound, exact in ((space.low, low), (space.high, high)):
        assert (bound == bound.astype(np.float32)).all()  # nothing is lost where it is stored
        np.testing.assert_allclose(bound, np.array(exact, dtype), rtol=2e-7, atol=1e-44)
    for asked in (-1e30, low, np.nextafter(np.float32(low), np.float32(-9)), 0.4, np.float32(high), high, 1e30):
        for precision in (np.float32, np.float64):
            stored = spaces.legal(np.full((1, 2), asked, precision), space)
            assert stored.dtype == np.float32
            wrapped.reset(seed=1)
            toys.RECEIVED.clear()
            wrapped.step(stored[0])
            ((_, received),) = toys.RECEIVED
            assert received in env.action_space and received.dtype == dtype
            np.testing.assert_array_equal(received.astype(np.float32).reshape(1, 2), stored)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0 + 1e-12, 1.0 + 2e-12),  # between two numbers of float32
        (1e-60, 2e-60),
        (-1e300, 1e300),
        (-3e38, 3e38),  # their difference is infinite
    ],
)
def test_bounds_that_float32_cannot_hold_are_refused(low, high):
    with pytest.raises(gym.error.Error, match="float32 cannot hold"):
        spaces.flatten_actions(box_env([low], [high], np.float64))


def test_an_environment_gets_a_copy_of_its_action():
    """What it does to it is not seen by the replay buffer."""
    env = box_env([-1.0, -1.0], [1.0, 1.0], np.float32)
    step = env.step

    def spoil(action):
        result = step(action)
        action[:] = 9
        return result

    env.step = spoil
    wrapped = spaces.flatten_actions(env)
    wrapped.reset(seed=1)
    action = np.float32([0.5, -0.5])
    wrapped.step(action)
    assert action.tolist() == [0.5, -0.5]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("script", [ddpg, td3, sac], ids=lambda script: script.__name__)
def test_a_run_stores_what_an_environment_of_any_precision_gets(run, monkeypatch, script, dtype):
    """Actions at the bounds, at random and of the actor; each one is in the space, whatever its precision."""
    box = gym.spaces.Box(np.array([-0.1, 1 / 3], dtype), np.array([0.1, 2 / 3], dtype), dtype=dtype)
    gym.register("Precise-v0", toys.Shaped, kwargs={"action_space": box})
    try:
        large = {"exploration_noise": 3.0} if script is not sac else {}
        parts = run(quick_args(script, env_id="Precise-v0", learning_starts=100, **large))
    finally:
        gym.registry.pop("Precise-v0")
    received = np.array([action for _, action in toys.RECEIVED[:300]])
    assert received.dtype == dtype and all(action in box for action in received)
    np.testing.assert_array_equal(received.astype(np.float32), parts.rb.actions[:300, 0])


# Names


def test_no_nonsense_is_proposed(tmp_path):
    for env_id in ("MyRobot-v0", "Walk-v0", "mine/Robot-v0"):
        done = main_in_this_process("--env-id", env_id, cwd=tmp_path)
        refused(done, env_id.split("-")[0].split("/")[0], "module:EnvId")
        assert "Did you mean" not in done.stderr


@pytest.mark.slow
def test_the_readmes_own_environment_trains_from_its_folder(tmp_path):
    code, command = re.search(
        r"```python\n(# my_envs.py\n.*?)```.*?```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    ).groups()
    (tmp_path / "my_envs.py").write_text(code)
    arguments = command.split()[2:]
    done = script(*arguments, *"--total-timesteps 300 --learning-starts 200 --batch-size 16".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# Errors of an environment


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--num-envs 1", "--num-envs 3", "--num-envs 3 --vectorization async"])
def test_an_error_of_the_environment_is_one_line_after_a_checkpoint(tmp_path, flags):
    done = script(*f"{TOY} --env-id toys:Raising-step-v0 {flags}".split(), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"error: ZeroDivisionError: no mass \(.*toys.py, line \d+\)", line)
    folder = only_run(tmp_path)
    step = 49 * int(flags.split()[1])
    assert steps_of(folder / "checkpoints") == [step] and f"a checkpoint of step {step} is saved, to go on: " in done.stdout
    assert checkpoints.load_checkpoint(folder / "checkpoints")["replay_buffer"]["pos"] == 49


# Resuming without a checkpoint


def test_a_start_from_zero_says_so_and_keeps_what_was_there(run, capsys):
    args = quick_args(eval_frequency=100)
    folder = run(args).run_dir
    shutil.rmtree(folder / "checkpoints")
    before = {
        name: (folder / name).read_bytes() for name in ("best_model.pt", "model.pt", "evaluations.csv", "evaluation.json")
    }
    args = record.load_args(folder, ddpg.Args)
    args.resume, args.total_timesteps, args.eval_frequency = folder, 110, 50
    run(args)
    output = capsys.readouterr().out
    assert (
        "has no checkpoint: training starts again at step 0" in output and "before-1: best_model.pt, evaluation.json" in output
    )
    assert {name: (folder / "before-1" / name).read_bytes() for name in before} == before
    assert len((folder / "evaluations.csv").read_text().splitlines()) == 4 and (folder / "evaluation.json").exists()


def test_checkpoints_of_the_older_format_are_refused(run, tmp_path):
    folder = run(quick_args()).run_dir.absolute()
    for path in checkpoints.list_checkpoints(folder / "checkpoints"):
        path.unlink()
    (folder / "checkpoints" / "300").mkdir()
    (folder / "checkpoints" / "300" / "state.pt").touch()
    before = sorted(folder.rglob("*"))
    refused(main_in_this_process("--resume", str(folder), cwd=tmp_path), "older version", str(folder))
    assert sorted(folder.rglob("*")) == before


# What a run says


def test_a_log_is_never_silent(run, monkeypatch, capsys):
    """By this clock a step takes half a second, so a line is due every 120 steps."""
    made = []

    class Watched(steadyrl.run.Run):
        def __init__(self, args):
            self.global_step = 0
            made.append(self)
            super().__init__(args)

    clock = SimpleNamespace(perf_counter=lambda: made[0].global_step / 2, time=time.time)
    for room in (steadyrl.run, steadyrl.logs):
        monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(ddpg, "Run", Watched)
    run(quick_args(total_timesteps=300, env_id="Counter-v0"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps/s" in line]
    assert lines == [
        "step 120 of 300, 2 steps/s, last return 5.0, 01:30 left",
        "step 240 of 300, 2 steps/s, last return 5.0, 00:30 left",
    ]


@pytest.mark.slow
def test_a_stop_signal_is_acknowledged_at_once(tmp_path):
    """Before the evaluation that it interrupts is over."""
    done = run_killed(tmp_path, "episode", 1, *f"--env-id Pendulum-v1 {SHORT} --eval-episodes 3".split(), signals="INT")
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("SIGINT received: the run stops as soon as it can") and "stopped at" in lines[-1]


@pytest.mark.slow
def test_help_may_be_cut_off(tmp_path):
    command = f"set -o pipefail; {sys.executable} {ROOT / 'ddpg_continuous_action.py'} --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_output_elsewhere(tmp_path):
    """(The working directory holds a file called runs: nothing can be written there.)"""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "runs").touch()
    output = str(tmp_path / "a b" / "out")
    arguments = f"{TOY} --capture-video --checkpoint-frequency 100".split()
    done = run_killed(tmp_path / "cwd", "step", 250, *arguments, "--output", output, signals="TERM")
    assert done.returncode == 143, done.stderr
    (folder,) = (tmp_path / "a b" / "out" / "runs").iterdir()
    videos = tmp_path / "a b" / "out" / "videos" / folder.name
    assert f"videos are in {videos}" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"--resume '{folder}'")
    number = len(list(videos.iterdir()))
    done = script("--resume", str(folder), "--output", str(tmp_path / "other"), cwd=tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    assert len(list(videos.iterdir())) == number and (tmp_path / "other" / "videos" / folder.name).exists()
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["runs"]


@pytest.mark.slow
def test_nothing_of_a_library_looks_like_our_own_error(tmp_path):
    """SDL, which draws Pendulum, prints "error:" where there is no session of a desktop."""
    arguments = f"--env-id Pendulum-v1 --capture-video {SHORT} --total-timesteps 60".split()
    done = script(*arguments, cwd=tmp_path, DISPLAY="", WAYLAND_DISPLAY="", XDG_RUNTIME_DIR="")
    assert done.returncode == 0 and done.stderr == "", done.stderr
