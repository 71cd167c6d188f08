"""The command line: each mistake is one line on stderr that names the flag and the value, status 2, nothing created."""

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, quick_args
from processes import run_script

import ddpg_continuous_action as ddpg
from steadyrl import arguments, checks, environments, errors, replay_buffer
from steadyrl.arguments import parse_args


def script(*arguments: str, cwd: Path, fresh: bool = False, **environment: Any) -> subprocess.CompletedProcess:
    """Run the script as a user does, in a process of its own. The toy environments are found as `toys:NAME`."""
    environment = {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""} | environment
    return run_script(ROOT / "ddpg_continuous_action.py", *arguments, cwd=cwd, fresh=fresh, **environment)


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


BAD = {
    "unknown environment": ("--env-id Hoper-v4", "Hoper", "Did you mean Hopper-v4", "module:EnvId"),
    "unknown version": ("--env-id Hopper-v99", "Hopper-v99"),
    "unknown module": ("--env-id nowhere:Hopper-v4", "nowhere"),
    "discrete actions": ("--env-id CartPole-v1", "Discrete(2)"),
    "unbounded actions": ("--env-id toys:UnboundedActions-v0", "finite bounds", "gymnasium.wrappers.TransformAction"),
    "integer actions": ("--env-id toys:IntegerActions-v0", "whole numbers", "gymnasium.wrappers.TransformAction"),
    "image observations": ("--env-id toys:ImageObservation-v0", "(8, 8, 3)", "images"),
    "list observations": ("--env-id toys:Lists-v0", "Sequence", "cannot be flattened"),
    "an environment that is not made": (
        "--env-id toys:Raising-constructor-v0",
        "RuntimeError: no licence was",
        "toys.py, line",
    ),
    "an environment that does not start": ("--env-id toys:Raising-reset-v0", "KeyError: 'goal'", "toys.py, line"),
    "an environment that takes no step": ("--env-id toys:Raising-first-step-v0", "ZeroDivisionError", "toys.py, line"),
    "no steps": ("--total-timesteps 0", "1 or more"),
    "no environments": ("--num-envs 0", "1 or more"),
    "negative count": ("--policy-frequency -1", "1 or more"),
    "negative frequency": ("--eval-frequency -1", "0 or more"),
    "fractional count": ("--batch-size 2.5", "INT"),
    "no number": ("--gamma high", "FLOAT"),
    "gamma above 1": ("--gamma 1.01", "between 0 and 1"),
    "gamma below 0": ("--gamma -0.1", "between 0 and 1"),
    "tau 0": ("--tau 0", "above 0 and at most 1"),
    "tau above 1": ("--tau 1.5", "above 0 and at most 1"),
    "negative noise": ("--exploration-noise -0.1", "0 or more"),
    "negative learning rate": ("--learning-rate -0.001", "above 0"),
    "infinite learning rate": ("--learning-rate inf", "finite"),
    "buffer below batch": ("--buffer-size 100", "--batch-size 256"),
    "batch of one": ("--batch-size 1 --normalization batch", "2 or more with --normalization batch"),
    "batch of one for the critic": ("--batch-size 1 --critic-normalization batch", "2 or more with --critic-normalization"),
    "buffer above memory": ("--buffer-size 1000000000000", "GB"),
    "negative seed": ("--seed -1", "4294967295"),
    "folder in the name": ("--exp-name ../mine", "letters"),
    "event file in the name": ("--exp-name my.tfevents.1", "without tfevents"),
    "unknown flag": ("--learning-rte 0.1", "--learning-rte"),
    "unknown noise": ("--noise white", "gaussian", "ou"),
    "negative end": ("--exploration-noise-end -1", "0 or more"),
    "fraction 0": ("--exploration-fraction 0", "above 0 and at most 1"),
    "actor rate 0": ("--actor-learning-rate 0", "above 0"),
    "negative decay": ("--weight-decay -0.1", "0 or more"),
    "empty layer": ("--hidden-sizes 256 0", "1 or more"),
    "no updates": ("--gradient-steps 0", "1 or more, or -1"),
    "negative scale": ("--reward-scale -1", "above 0"),
    "no JSON": ("--env-kwargs {reset", "JSON"),
    "no JSON object": ("--env-kwargs [1]", "JSON object"),
    "unknown argument of the environment": ('--env-kwargs {"gravity":1}', "gravity"),
    "empty episodes": ("--max-episode-steps 0", "1 or more"),
    "target never evaluated": ("--target-return 5.5 --eval-frequency 0",),
    "no threads": ("--num-threads 0", "1 to 1024"),
    "unknown acceleration": ("--accelerate jit", "cudagraph"),
    "unknown precision": ("--matmul-precision low", "medium"),
    "no run": ("--evaluate runs/none", "folder of a run"),
} | {
    f"NaN {name}": (f"--{name.replace('_', '-')} nan", "must be")
    for name, hint in typing.get_type_hints(ddpg.Args).items()
    if hint in (float, float | None)
}


def main_in_this_process(*arguments: str, cwd: Path, script: str = "ddpg_continuous_action") -> subprocess.CompletedProcess:
    """Run a script as a user does, but without the seconds that a new process takes to import torch."""
    output, errors = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *arguments])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards, as the others
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", errors)
        try:
            importlib.import_module(script).main()
            status: Any = 0
        except SystemExit as exit:
            status = exit.code
    return subprocess.CompletedProcess(arguments, status, output.buffer.getvalue().decode(), errors.getvalue())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused(name, tmp_path):
    arguments, *words = BAD[name]
    done = main_in_this_process(*arguments.split(), cwd=tmp_path)
    refused(done, *arguments.replace(":1", ": 1").split(" --")[0].split(maxsplit=1), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--policy-noise", "--noise-clip"])
@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "1e+308"])
def test_a_bad_smoothing_is_refused(flag, value, tmp_path):
    done = main_in_this_process(flag, value, cwd=tmp_path, script="td3_continuous_action")
    refused(done, f"{flag} {value}: must be 0 or more")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words", "place"),
    [
        ("ddpg", "--num-critics 2", "td3_continuous_action.py"),
        ("ddpg", "--num-critics=2", "td3_continuous_action.py"),
        ("ddpg", "--num-critics 1", "td3_continuous_action.py"),
        ("ddpg", "--env-id Pendulum-v1 --num-critics", "td3_continuous_action.py"),
        ("ddpg", "--policy-noise 0.2", "td3_continuous_action.py"),
        ("ddpg", "--noise-clip 0.5", "td3_continuous_action.py"),
        ("ddpg", "--noise_clip 0.5 --seed 1", "td3_continuous_action.py"),
        ("ddpg", "--expectile 0.7", "td3_continuous_action.py"),
        ("ddpg", "--critic-loss expectile", "td3_continuous_action.py"),
        ("ddpg", "--critic_loss=expectile", "td3_continuous_action.py"),
        ("sac", "--expectile 0.7", "an experiment"),
        ("sac", "--critic-loss expectile", "an experiment"),
    ],
)
def test_a_removed_flag_is_refused_with_the_place_it_went_to(script, words, place, tmp_path):
    done = main_in_this_process(*words.split(), cwd=tmp_path, script=f"{script}_continuous_action")
    refused(done, words.replace("=", " ").removeprefix("--env-id Pendulum-v1 ").removesuffix(" --seed 1"), place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unknown environment", "unknown flag", "tau 0"])
def test_a_bad_argument_is_refused_by_the_script_itself(name, tmp_path):
    arguments, *words = BAD[name]
    refused(script(*arguments.split(), cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_never_learns_is_a_warning(tmp_path):
    """CleanRL's script runs with --learning-starts at or above --total-timesteps, and so does this one."""
    for total in (100, 60):
        arguments = f"--env-id toys:Counter-v0 --total-timesteps {total} --learning-starts 100"
        done = main_in_this_process(*arguments.split(), cwd=tmp_path)
        assert done.returncode == 0
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
        assert "--learning-starts 100" in line and f"--total-timesteps {total}" in line


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("critic_loss", "expectile", "--critic-loss expectile: must be one of: mse, huber"),
        ("noise", "pink", "--noise pink: must be one of: gaussian, ou"),
        ("total_timesteps", 100.5, "--total-timesteps 100.5: must be of the type int"),
        ("batch_size", True, "--batch-size True: must be of the type int"),
        ("learning_starts", None, "--learning-starts None: must be of the type int"),
        ("tau", "0.5", "--tau 0.5: must be of the type float"),
        ("hidden_sizes", 64, "--hidden-sizes 64: must be of the type"),
    ],
)
def test_arguments_made_in_python_are_checked_as_those_of_a_command_line(name, value, words):
    with pytest.raises(errors.UsageError, match=f"^{re.escape(words)}"):
        arguments.check_args(quick_args(**{name: value}))
    arguments.check_args(quick_args(tau=1, hidden_sizes=[32, 32], resume=Path("here")))  # these mean the same


def test_every_float_is_checked_for_nan():
    assert sum(name.startswith("NaN") for name in BAD) == 12


def test_runs_that_cannot_be_written(tmp_path):
    """(A file in the folder's place: root, as which tests may run, can write to any folder.)"""
    (tmp_path / "runs").write_text("mine")
    refused(main_in_this_process("--env-id", "Pendulum-v1", cwd=tmp_path), "runs/")
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_missing_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises an ImportError
    refused(main_in_this_process("--track", cwd=tmp_path), "--track: needs wandb", "pip install wandb")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_no_renderer(tmp_path):
    """A missing rendering library is found before training starts."""
    done = script("--capture-video", cwd=tmp_path, MUJOCO_GL="osmesa", PYOPENGL_PLATFORM="egl", DISPLAY="")
    refused(done, "--capture-video", "apt-get install")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_libegl_only_mujoco_does_not_render(tmp_path):
    """As on a server without a display where nobody installed it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes\n"
        "class CDLL(ctypes.CDLL):\n"
        "    def __init__(self, name, *args, **kwargs):\n"
        "        if 'EGL' in str(name):\n"
        "            raise OSError(name)\n"
        "        super().__init__(name, *args, **kwargs)\n"
        "ctypes.CDLL = ctypes.cdll._dlltype = CDLL\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}", "MUJOCO_GL": "egl", "DISPLAY": ""}
    refused(
        script("--capture-video", cwd=tmp_path, fresh=True, **environment), "Hopper-v4", "OpenGL", "apt-get install libegl1"
    )
    films = "--env-id Pendulum-v1 --capture-video --total-timesteps 1 --final-episodes 1 --eval-frequency 0"
    done = script(*films.split(), cwd=tmp_path, fresh=True, **environment)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "videos").rglob("*.mp4"))


def test_a_missing_moviepy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)  # importing it raises an ImportError
    done = main_in_this_process("--capture-video", "--env-id", "toys:Counter-v0", cwd=tmp_path)
    refused(done, "--capture-video: needs moviepy", "pip install moviepy")
    assert not (tmp_path / "runs").exists()


def test_buffer_memory_is_checked_against_the_container(tmp_path):
    """The tightest limit among a group and the groups around it, less what is used there; v1 and v2."""
    membership = tmp_path / "membership"
    v2 = tmp_path / "v2"
    (v2 / "a" / "b").mkdir(parents=True)
    for folder, limit, used in ((v2, "max", 5000), (v2 / "a", "4000", 1000), (v2 / "a" / "b", "9000", 500)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
    membership.write_text("0::/a/b\n")
    assert replay_buffer.available_memory(v2, membership) == 3000
    v1 = tmp_path / "v1" / "memory" / "job"
    v1.mkdir(parents=True)
    (v1 / "memory.limit_in_bytes").write_text("2000")
    (v1 / "memory.usage_in_bytes").write_text("500")
    membership.write_text("3:cpu:/other\n2:memory:/job\n")
    assert replay_buffer.available_memory(tmp_path / "v1", membership) == 1500
    membership.write_text("0::/\n")
    assert replay_buffer.available_memory(tmp_path / "none", membership) > 10_000


def test_the_estimate_is_the_size_of_the_buffer(monkeypatch):
    """With one byte less than the buffer takes, it is refused; with as many, it is not."""
    args = quick_args(env_id="Pendulum-v1", buffer_size=12_345)
    env = environments.make_env(args)
    rb = ddpg.ReplayBuffer(12_345, env.observation_space, env.action_space, "cpu")
    size = rb.transitions.nbytes + rb.timeouts.nbytes
    monkeypatch.setattr(checks, "available_memory", lambda: size)
    checks.check(args)
    monkeypatch.setattr(checks, "available_memory", lambda: size - 1)
    with pytest.raises(errors.UsageError, match="--buffer-size 12345"):
        checks.check(args)


def test_help_is_grouped_and_names_every_flag(tmp_path):
    done = main_in_this_process("--help", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for field in dataclasses.fields(ddpg.Args):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert all(f"{group.__name__.lower()} options" in done.stdout for group in ddpg.Args.__bases__)


def test_underscores_and_negations_work_as_in_cleanrl():
    parsed = parse_args(ddpg.Args, ["--env_id", "Ant-v5", "--no-cuda", "--learning_rate", "1e-3"], ddpg.Args())
    assert parsed == ddpg.Args(env_id="Ant-v5", cuda=False, learning_rate=1e-3)
    assert parse_args(ddpg.Args, [], ddpg.Args()) == ddpg.Args()


@pytest.fixture
def saved_run(run) -> Path:
    return run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()


def test_a_damaged_run_is_refused(saved_run, tmp_path):
    arguments = ("--evaluate", str(saved_run))
    model = saved_run / "model.pt"
    before = model.read_bytes()
    results = set(saved_run.iterdir())

    model.write_bytes(before[: len(before) // 2])
    refused(main_in_this_process(*arguments, cwd=tmp_path), "model.pt", "not a complete model")

    shutil.copy(ROOT / "LICENSE", model)
    refused(main_in_this_process(*arguments, cwd=tmp_path), "model.pt", "not a complete model")

    model.write_bytes(before)
    settings = json.loads((saved_run / "args.json").read_text())
    settings["args"]["env_id"] = "Pendulum-v1"  # the model is then one of another environment
    (saved_run / "args.json").write_text(json.dumps(settings))
    refused(main_in_this_process(*arguments, cwd=tmp_path), "model.pt", "not a complete model")

    (saved_run / "args.json").write_text("{}")
    refused(main_in_this_process(*arguments, cwd=tmp_path), "--evaluate", "folder of a run")

    model.unlink()
    settings["args"]["env_id"] = "toys:Pendulum-like-v0"
    (saved_run / "args.json").write_text(json.dumps(settings))
    refused(main_in_this_process(*arguments, cwd=tmp_path), "--evaluate", "model.pt")
    assert set(saved_run.iterdir()) == results - {model}  # nothing was added


def test_evaluating_with_other_arguments_is_refused(saved_run, tmp_path):
    refused(main_in_this_process("--evaluate", str(saved_run), "--gamma", "0.5", cwd=tmp_path), "--gamma 0.5", "0.99")


def test_evaluating_plays_as_many_episodes_as_asked(saved_run, tmp_path):
    done = main_in_this_process("--evaluate", str(saved_run), "--final-episodes", "5", cwd=tmp_path)
    assert done.returncode == 0 and "over 5 episodes" in done.stdout
    two, five = (json.loads((saved_run / name).read_text()) for name in ("evaluation.json", "evaluate.json"))
    assert five["episodes"] == len(five["returns"]) == len(five["seeds"]) == 5 and five["returns"][:2] == two["returns"]


HARMLESS = {"num_critics": 1, "policy_noise": 0.0, "noise_clip": 0.3, "expectile": 0.9}  # flags of the version before


def write_saved_args(run_dir: Path, **changes) -> None:
    """Change what the args.json of a run holds."""
    settings = json.loads((run_dir / "args.json").read_text())
    settings["args"] |= changes
    (run_dir / "args.json").write_text(json.dumps(settings))


def test_a_run_of_the_version_before_goes_on_where_removed_flags_changed_nothing(saved_run, tmp_path):
    write_saved_args(saved_run, **HARMLESS)
    done = main_in_this_process("--evaluate", str(saved_run), cwd=tmp_path)
    assert done.returncode == 0 and "has no --" not in done.stdout, done.stderr
    done = main_in_this_process("--resume", str(saved_run), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0 and "has no --" not in done.stdout, done.stderr
    assert not HARMLESS.keys() & json.loads((saved_run / "args.json").read_text())["args"].keys()


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("num_critics", 2, "td3_continuous_action.py"),
        ("policy_noise", 0.2, "td3_continuous_action.py"),
        ("critic_loss", "expectile", "an experiment"),
    ],
)
def test_a_run_of_the_version_before_is_refused_where_one_changed_something(saved_run, tmp_path, name, value, word):
    def content() -> dict[Path, tuple]:
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in saved_run.rglob("*")}

    write_saved_args(saved_run, **HARMLESS | {name: value})
    before = content()
    for flag in ("--evaluate", "--resume"):
        done = main_in_this_process(flag, str(saved_run), cwd=tmp_path)
        refused(done, f"{flag} {saved_run}: was trained with --{name.replace('_', '-')} {value}: ", word)
    assert content() == before


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_forged_model_runs_no_code(saved_run, tmp_path):
    torch.save({"actor": Malicious()}, saved_run / "model.pt")
    refused(main_in_this_process("--evaluate", str(saved_run), cwd=tmp_path), "model.pt", "not a complete model")
    assert not (tmp_path / "owned").exists()
