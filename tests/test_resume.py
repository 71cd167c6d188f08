"""A run that is killed with SIGKILL and resumed leaves the same bits as a run that was never killed."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprint import fingerprint
from helpers import ROOT, Crash, crash, ddpg, scalars
from processes import run_script
from test_arguments import main_in_this_process

from steadyrl import acceleration

SHORT = (
    "--total-timesteps 600 --learning-starts 150 --buffer-size 256 --batch-size 32 --hidden-sizes 32 32 --no-cuda "
    "--max-episode-steps 40 --checkpoint-frequency 100 --eval-frequency 200 --eval-episodes 1 --final-episodes 5"
)


def run_killed(
    cwd: Path, moment: str, number: int, *arguments: str, signals: str = "KILL", script: str = "ddpg_continuous_action"
) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, which tests/killed.py signals at an exact moment."""
    environment: Any = {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": "", "SCRIPT": script}
    command = (moment, str(number), signals, *arguments)
    # Signals to its group shall not reach the tests.
    return run_script(ROOT / "tests" / "killed.py", *command, cwd=cwd, new_session=True, **environment)


def only_run(cwd: Path) -> Path:
    (run_dir,) = (cwd / "runs").iterdir()
    return run_dir


def finish(cwd: Path, run_dir: Path, script: str = "ddpg_continuous_action") -> None:
    """Resume a run, in this process, and let it come to its end."""
    done = main_in_this_process("--resume", str(run_dir), cwd=cwd, script=script)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The fingerprint of a run left alone, in this process, computed once for each command line."""
    known = {}

    def uninterrupted(arguments: str, script: str = "ddpg_continuous_action") -> dict[str, str]:
        if (script, arguments) not in known:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            done = main_in_this_process(*arguments.split(), cwd=cwd, script=script)
            assert done.returncode == 0, done.stderr
            known[script, arguments] = fingerprint(only_run(cwd))
        return known[script, arguments]

    return uninterrupted


CASES = [
    ("Pendulum-v1 --num-envs 1", "step", 60),  # before the first checkpoint
    ("Pendulum-v1 --num-envs 3 --noise ou --normalization batch", "step", 145),
    ("InvertedPendulum-v5 --num-envs 1", "step", 120),  # while warming up, after one
    ("InvertedPendulum-v5 --num-envs 1", "update", 77),  # between two checkpoints
    ("InvertedPendulum-v5 --num-envs 3 --vectorization async --exploration-noise-end 0.0", "step", 117),
    ("Hopper-v4 --num-envs 1", "write", 3),  # inside the writing of the third checkpoint
    ("Hopper-v4 --num-envs 3 --vectorization async --train-frequency 7 --gradient-steps -1", "rename", 3),
    ("Pendulum-v1 --num-envs 1 --accelerate compile --hidden-sizes 32", "step", 277),
    ("Ant-v5 --num-envs 1", "step", 555),  # after the replay buffer wrapped
    ("Ant-v5 --num-envs 3 --reward-scale 0.5", "evaluate", 2),
    ("BipedalWalker-v3 --num-envs 1", "step", 510),
    ("BipedalWalker-v3 --num-envs 3 --vectorization async", "step", 145),
    ("toys:CarriesState-v0 --num-envs 3", "step", 145),
    ("toys:LegacyGenerator-v0 --num-envs 3", "step", 145),
    ("toys:DictSpaces-v0 --num-envs 1", "step", 377),
    ("toys:MatrixActionSpaces-v0 --num-envs 3 --vectorization async", "step", 145),
    ("Pendulum-v1 --num-envs 3 --replay prioritized --normalize-observations", "step", 145),
    ("Pendulum-v1 --num-envs 1 --replay prioritized --n-steps 3 --train-frequency 3", "update", 77),
    ("toys:Reach-v0 --num-envs 1 --replay hindsight", "step", 377),
    ("toys:ReachEnding-v0 --num-envs 3 --vectorization async --replay hindsight --normalize-observations", "step", 145),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "moment", "number"), CASES)
def test_a_killed_run_ends_like_one_left_alone(uninterrupted, tmp_path, task, moment, number):
    arguments = f"{SHORT} --env-id {task}"
    done = run_killed(tmp_path, moment, number, *arguments.split())
    assert done.returncode == -9, done.stderr
    run_dir = only_run(tmp_path)
    finish(tmp_path, run_dir)
    assert fingerprint(run_dir) == uninterrupted(arguments)
    assert not list(run_dir.rglob("*.tmp"))
    for tag, events in scalars(run_dir).items():  # each step once and in order
        steps = [step for step, _ in events]
        assert steps == sorted(steps), tag
        assert tag == "charts/SPS" or len(set(steps)) == len(steps) or "--num-envs 3" in task, tag


@pytest.mark.slow
def test_a_resumed_resume(uninterrupted, tmp_path):
    """Killed three times: while training, while writing a checkpoint after the first resume, and while evaluating."""
    arguments = f"--env-id Pendulum-v1 --num-envs 1 {SHORT}"
    assert run_killed(tmp_path, "step", 250, *arguments.split()).returncode == -9
    run_dir = only_run(tmp_path)
    assert run_killed(tmp_path, "fsync", 12, "--resume", str(run_dir)).returncode == -9
    assert run_killed(tmp_path, "evaluate", 1, "--resume", str(run_dir)).returncode == -9
    finish(tmp_path, run_dir)
    assert fingerprint(run_dir) == uninterrupted(arguments)


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_an_update_of_a_user_that_draws_from_pytorchs_generator_resumes_too(at_step, monkeypatch, tmp_path, mode):
    """As dropout does. It cannot be compiled, so "auto" goes on in eager mode."""
    update = ddpg.DDPG.update

    def noisy(self, batch, update_policy):
        return update(self, batch._replace(rewards=batch.rewards + torch.randn_like(batch.rewards)), update_policy)

    monkeypatch.setattr(ddpg.DDPG, "update", noisy)
    monkeypatch.setattr(acceleration, "UPDATES_WORTH_COMPILING", 0)
    monkeypatch.setattr(acceleration, "compile_function", lambda function, tensors: function)
    arguments = f"--env-id Pendulum-v1 {SHORT} --accelerate {mode}".split()
    folders = [tmp_path / "alone", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        if folder is folders[1]:
            at_step(377, crash)
            with pytest.raises(Crash):
                main_in_this_process(*arguments, cwd=folder)
            arguments = ["--resume", str(only_run(folder))]
        done = main_in_this_process(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("it draws random numbers") == (mode == "auto" and folder is folders[0])
    alone, killed = (fingerprint(only_run(folder)) for folder in folders)
    assert alone == killed
