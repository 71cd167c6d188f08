"""Signals, dying workers, full disks, damaged and forged checkpoints: what happens to a run, and what it keeps."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from fingerprint import fingerprint, sha
from helpers import ROOT, Crash, crash, quick_args, scalars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from test_accelerate import COMPILED_ONCE
from test_arguments import Malicious, main_in_this_process, refused, script
from test_resume import SHORT, finish, only_run, run_killed, uninterrupted  # noqa: F401

import ddpg_continuous_action as ddpg
import steadyrl.run
from steadyrl import checkpoints, environments, errors, files, record, run_folder
from steadyrl.signals import SAVE_SIGNALS, STOP_SIGNALS

PENDULUM = f"--env-id Pendulum-v1 --num-envs 1 {SHORT}"
TOY = "--env-id toys:Pendulum-like-v0 --total-timesteps 300 --learning-starts 100 --buffer-size 1000 --batch-size 16 --no-cuda"


def steps_of(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, which holds nothing else."""
    assert len(list(folder.iterdir())) == len(run_folder.list_checkpoints(folder))
    return [run_folder.step_of(path) for path in reversed(run_folder.list_checkpoints(folder))]


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_a_stop_signal_saves_and_says_how_to_go_on(uninterrupted, tmp_path, name, status):  # noqa: F811
    done = run_killed(tmp_path, "step", 377, *PENDULUM.split(), signals=name)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    run_dir = only_run(tmp_path)
    assert 377 in steps_of(run_dir / "checkpoints")
    command = done.stdout.splitlines()[-1].split("to go on: ")[1].split()
    assert command[0] == "python" and command[2:] == ["--resume", f"runs/{run_dir.name}"]
    done = script(*command[2:], cwd=tmp_path)  # in a process of its own, as a user does
    assert done.returncode == 0, done.stderr
    assert fingerprint(run_dir) == uninterrupted(PENDULUM)


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once(tmp_path):
    done = run_killed(tmp_path, "step", 377, *PENDULUM.split(), signals="INT,INT")
    assert done.returncode == 130
    assert steps_of(only_run(tmp_path) / "checkpoints") == [200, 300]


@pytest.mark.slow
def test_ctrl_c_while_a_saved_run_is_evaluated_is_quiet(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    done = run_killed(tmp_path, "episode", 2, "--evaluate", str(run_dir), signals="INT")
    assert done.returncode == 130 and done.stderr == ""
    assert not (run_dir / "evaluate.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "signals"),
    [
        ("step", 377, "TERM,TERM"),
        ("step", 377, "TERM,INT"),
        ("step", 377, "GROUP-TERM,TERM"),
        ("write", 4, "TERM,TERM"),  # of step 300: at 200, where an evaluation is due, there are two
        ("write", 4, "TERM,USR2,TERM"),
    ],
)
def test_a_scheduler_may_signal_twice(uninterrupted, tmp_path, moment, number, signals):  # noqa: F811
    """Also while a checkpoint is being written: it is whole, and the run goes on from it."""
    done = run_killed(tmp_path, moment, number, *PENDULUM.split(), signals=signals)
    assert done.returncode == 143 and "stopped at step" in done.stdout, done.stderr
    run_dir = only_run(tmp_path)
    assert steps_of(run_dir / "checkpoints")[-1] == (377 if moment == "step" else 300)
    finish(tmp_path, run_dir)
    assert fingerprint(run_dir) == uninterrupted(PENDULUM)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_save_signal_saves_and_goes_on(uninterrupted, at_step, tmp_path, name):  # noqa: F811
    at_step(577, lambda: os.kill(os.getpid(), getattr(signal, f"SIG{name}")))
    done = main_in_this_process(*PENDULUM.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = only_run(tmp_path)
    assert steps_of(run_dir / "checkpoints") == [577, 600]
    assert fingerprint(run_dir) == uninterrupted(PENDULUM)


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "status"), [("KILL", -9), ("TERM", 143), ("TERM,TERM", 143), ("GROUP-INT", 130)])
def test_workers_leave_with_the_run(tmp_path, signals, status):
    """The workers are found by a mark in their environment variables; the test waits until all of them are gone."""
    mark = f"mark-{os.getpid()}-{signals}"
    arguments = f"step 50 {signals} {TOY} --num-envs 3 --vectorization async".split()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TEST_MARK": mark}
    command = [sys.executable, str(Path(__file__).parent / "killed.py"), *arguments]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **output, text=True, start_new_session=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    if signals in ("TERM", "GROUP-INT"):
        assert checkpoints.load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] == 150

    def marked():
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == mark:
                    yield process
            except psutil.Error:
                pass

    assert psutil.wait_procs(list(marked()), timeout=600)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "episode", "words"),
    [
        ("eager", 5, "stopped at step 400"),
        ("eager", 9, "stopped at step 600"),
        ("eager", 12, "stopped in the final evaluation"),
        ("compile", 5, "stopped at step 400"),
    ],
)
def test_a_stop_while_evaluating_waits_for_the_episode_at_most(uninterrupted, tmp_path, episode, words, mode):  # noqa: F811
    """Three episodes in each of three evaluations, then five; the resumed run makes the evaluation up."""
    arguments = f"{PENDULUM} --eval-episodes 3 --hidden-sizes 32 --accelerate {mode}"
    moment = 2 * episode - 1  # an evaluation asks for values twice in each episode: `value` and `state_value`
    done = run_killed(tmp_path, "episode", moment, *arguments.split(), signals="TERM")
    assert done.returncode == 143 and words in done.stdout, done.stderr
    run_dir = only_run(tmp_path)
    rows = (run_dir / "evaluations.csv").read_text().splitlines()[1:]
    assert len(rows) == {5: 1, 9: 3, 12: 3}[episode]  # the last episode of an evaluation ends it
    assert not (run_dir / "evaluation.json").exists()
    finish(tmp_path, run_dir)
    assert fingerprint(run_dir) == uninterrupted(arguments)


# Workers of asynchronous environments


def survives_in_worker() -> bool:
    environments.in_worker(gym.Env)
    for number in STOP_SIGNALS + SAVE_SIGNALS:
        os.kill(os.getpid(), number)
    return True


@pytest.mark.slow
def test_a_worker_ignores_signals_meant_for_the_main_process():
    """In a process that inherits no handlers, as Python starts them on macOS and, from 3.14 on, on Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(survives_in_worker).get(timeout=60)
        pool.close(), pool.join()  # else it would be ended by a SIGTERM, which its worker ignores now


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "words"),
    [("Dying-v0", "worker 1 ended with exit status 3"), ("Hanging-v0", "worker 1 gave no answer in 10 seconds")],
)
def test_a_worker_that_dies_or_hangs_stops_the_run_after_a_checkpoint(tmp_path, env_id, words):
    """(A worker that works answers within the ten seconds, also on a busy machine.)"""
    arguments = f"{TOY} --env-id toys:{env_id} --num-envs 3 --vectorization async --worker-timeout 10"
    done = script(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert words in done.stderr
    state = checkpoints.load_checkpoint(only_run(tmp_path) / "checkpoints")
    assert state["run"]["global_step"] == 3 * 49 and state["replay_buffer"]["pos"] == 49


@pytest.mark.slow
@pytest.mark.parametrize("step", [30, 77])  # with random actions, and with noise on the actor's
def test_a_run_whose_worker_died_is_resumed_as_if_it_had_not(uninterrupted, at_step, tmp_path, step):  # noqa: F811
    """The actions of the step that failed were drawn already: the checkpoint holds the generators as they were before."""
    arguments = f"--env-id Pendulum-v1 --num-envs 3 --vectorization async --noise ou {SHORT} --checkpoint-frequency 0"
    at_step(step, lambda: multiprocessing.active_children()[0].kill())  # between two steps of the environments
    done = main_in_this_process(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 1 and f"a checkpoint of step {3 * step} is saved" in done.stdout, done.stderr
    finish(tmp_path, only_run(tmp_path))
    assert fingerprint(only_run(tmp_path)) == uninterrupted(arguments)


# Runs that cannot be resumed as they are, or need not be


def test_a_run_that_another_process_trains_is_refused(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    with filelock.FileLock(run_dir / ".lock"):
        refused(main_in_this_process("--resume", str(run_dir), cwd=tmp_path), "--resume", "another process")


def test_a_finished_run_says_so_and_goes_on_with_more_steps(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    before = sha([path.read_bytes() for path in sorted(run_dir.rglob("*.pt"))])
    done = main_in_this_process("--resume", str(run_dir), cwd=tmp_path)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert sha([path.read_bytes() for path in sorted(run_dir.rglob("*.pt"))]) == before
    done = main_in_this_process("--resume", str(run_dir), "--total-timesteps", "350", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkpoints.load_checkpoint(run_dir / "checkpoints")["run"]["global_step"] == 350
    assert [step for step, _ in scalars(run_dir)["losses/q_loss"]] == [300, 350]
    assert (run_dir / "evaluation-300.json").exists() and record.load_args(run_dir, ddpg.Args).total_timesteps == 350


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ("--env-id Pendulum-v1", "toys:Pendulum-like-v0"),
        ("--hidden-sizes 64 64", "(32, 32)"),
        ("--learning-rate 0.01", "0.0003"),
        ("--num-envs 2", "1"),
    ],
)
def test_another_run_is_not_resumed(run, tmp_path, flags, saved):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    done = main_in_this_process("--resume", str(run_dir), *flags.split(), cwd=tmp_path)
    refused(done, flags.split()[0], flags.split()[1], saved)
    assert sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before


def test_an_environment_that_does_not_come_back_is_said_so_and_starts_anew(at_step, tmp_path):
    """Counter's observations depend on how many episodes came before: no replay of the running one brings them back."""
    arguments = f"{TOY} --env-id toys:Counter-v0 --num-envs 2 --checkpoint-frequency 100".split()
    at_step(78, crash)
    with pytest.raises(Crash):
        main_in_this_process(*arguments, cwd=tmp_path)
    done = main_in_this_process("--resume", str(only_run(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f"environment {index} did not come back" in done.stdout for index in (0, 1, 2)] == [True, True, False]
    state = checkpoints.load_checkpoint(only_run(tmp_path) / "checkpoints")
    observations, _, next_observations, _, _ = np.split(state["replay_buffer"]["transitions"].numpy(), [1, 2, 3, 4], axis=2)
    np.testing.assert_array_equal(next_observations, observations + 1)
    assert {value for _, value in scalars(only_run(tmp_path))["charts/episodic_return"]} == {5.0}


# Full disks


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(function, calls: set[int]):
    """`function`, with a full disk at the given calls of it, counted from 1."""
    count = 0

    def write(*values, **named):
        nonlocal count
        count += 1
        return full_disk() if count in calls else function(*values, **named)

    return write


def test_a_full_disk_is_survived(run, monkeypatch, capsys):
    """The second and third checkpoint cannot be written: both are removed, the first stays until the fourth is there."""
    args = quick_args(checkpoint_frequency=50, keep_checkpoints=1, save_model=False)
    monkeypatch.setattr(torch, "save", failing(torch.save, {2, 3}))
    kept = []
    save_checkpoint = checkpoints.save_checkpoint

    def save(folder, *rest):
        try:
            save_checkpoint(folder, *rest)
        finally:
            kept.append(steps_of(folder))
            assert checkpoints.load_checkpoint(folder) is not None

    monkeypatch.setattr(steadyrl.run, "save_checkpoint", save)
    run(args)
    assert kept == [[50], [50], [50], [200], [250], [300]]
    assert capsys.readouterr().out.count("No space left on device") == 1  # in a minute


def test_a_step_whose_checkpoint_fails_before_and_after_its_evaluation_counts_once(run, monkeypatch):
    monkeypatch.setattr(torch, "save", failing(torch.save, {1, 2, 3, 4}))
    parts = run(quick_args(checkpoint_frequency=50, eval_frequency=50, eval_episodes=1, save_model=False))
    assert steps_of(parts.run_dir / "checkpoints") == [250, 300]


def test_a_run_whose_arguments_cannot_be_written_does_not_begin(monkeypatch, tmp_path):
    """Nobody could resume it. A resumed run has an args.json, and goes on with it."""
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", failing(os.fsync, {3}))  # the folders were synced before
        done = main_in_this_process(*TOY.split(), cwd=tmp_path)
    assert done.returncode == 1 and "args.json could not be written (No space left on device)" in done.stdout
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "runs").iterdir())
    assert main_in_this_process(*TOY.split(), cwd=tmp_path).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", failing(os.fsync, {1}))
        done = main_in_this_process("--resume", str(only_run(tmp_path)), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0 and "args.json could not be written" in done.stdout, done.stderr


def test_a_checkpoint_that_was_not_written_is_not_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    done = main_in_this_process(*f"{TOY} --env-id toys:Raising-step-v0".split(), cwd=tmp_path)
    assert done.returncode == 1 and "no mass" in done.stderr
    assert "could not be written" in done.stdout and "is saved" not in done.stdout


def test_a_disk_that_stays_full_stops_the_run_in_order(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "save", failing(torch.save, {2, 3, 4}))
    with pytest.raises(errors.TrainingError, match="No space left on device"):
        run(quick_args(checkpoint_frequency=50))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert steps_of(run_dir / "checkpoints") == [50]
    assert checkpoints.load_checkpoint(run_dir / "checkpoints")["run"]["global_step"] == 50


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_survived(run, monkeypatch, capsys):
    monkeypatch.setattr(RecordWriter, "write", failing(RecordWriter.write, {20}))
    parts = run(quick_args(env_id="Counter-v0", total_timesteps=1000, learning_starts=900))
    captured = capsys.readouterr()
    assert "could not be written" in captured.out and "Traceback" not in captured.err
    steps = [step for step, _ in parts.scalars["charts/episodic_return"]]
    assert steps == sorted(set(steps)) and steps[-1] == 1000 and len(steps) > 100


def test_a_run_leaves_the_hook_of_threads_as_it_was(run):
    before = threading.excepthook
    run(quick_args())
    assert threading.excepthook is before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8888888888.other-host.77.0", "{now}.zzz.9.0", "{now}.{host}.{pid}.0.0"])
def test_a_clock_that_was_set_back_costs_no_rows(at_step, monkeypatch, tmp_path, name):
    """TensorBoard reads event files in the order of their names. The one of the run that was killed is called as if the clock
    had been ahead, as if it was killed in this second and had a higher number, or exactly as the next one would be."""
    arguments = f"{TOY} --checkpoint-frequency 100".split()
    at_step(250, crash)
    with pytest.raises(Crash):
        main_in_this_process(*arguments, cwd=tmp_path)
    (events,) = only_run(tmp_path).glob("events*")
    now = time.time()
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    place = {"now": f"{int(now):010d}", "host": socket.gethostname(), "pid": os.getpid()}
    events.rename(events.with_name("events.out.tfevents." + name.format(**place)))
    finish(tmp_path, only_run(tmp_path))
    assert [step for step, _ in scalars(only_run(tmp_path))["losses/q_loss"]] == [200, 300]
    assert len(list(only_run(tmp_path).glob("events*"))) == 2


def test_unfinished_files_of_a_killed_run_are_removed(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    left = [run_dir / "model.pt", run_dir / "args.json", run_dir / "checkpoints" / "000000000400.pt"]
    left = [path.with_name(f"{path.name}.{'0' * 16}.tmp") for path in left]
    for path in left:
        path.write_bytes(b"")
    finish(tmp_path, run_dir)
    assert not any(path.exists() for path in left)


# Checkpoints


def test_reading_takes_no_second_replay_buffer(tmp_path):
    """A run that fitted into memory also fits when it is resumed."""
    checkpoints.save_checkpoint(tmp_path, 100, {"transitions": torch.zeros(100_000, 1, 50)}, keep=1)  # 20 MB
    before = psutil.Process().memory_full_info().uss
    transitions = checkpoints.load_checkpoint(tmp_path)["transitions"]
    assert psutil.Process().memory_full_info().uss - before < 5e6
    assert transitions.shape == (100_000, 1, 50)


@pytest.mark.slow
def test_writing_takes_no_second_replay_buffer(tmp_path):
    """Measured in a process of its own, where saving sets the peak of memory."""
    code = """
import resource, numpy as np
from gymnasium.spaces import Box
from steadyrl import checkpoints, replay_buffer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB
box = Box(-1, 1, (50,), np.float32)
rb = replay_buffer.ReplayBuffer(200_000, box, box, "cpu")
rb.transitions[:], rb.full = 1, True  # 120 MB
from pathlib import Path
checkpoints.save_checkpoint(Path("small"), 1, {}, keep=1)
before = peak()
checkpoints.save_checkpoint(Path("large"), 1, {"replay_buffer": rb.state_dict()}, keep=1)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert int(done.stdout) < 30_000, done.stderr


@pytest.fixture
def saved(tmp_path):
    """A function that saves a small checkpoint of a step, and the folder, with that of step 300 in it."""
    folder = tmp_path / "checkpoints"

    def save(global_step: int, keep: int = 2) -> None:
        checkpoints.save_checkpoint(folder, global_step, {"run": {"global_step": global_step}, "x": torch.rand(9)}, keep)

    save(300)
    return folder, save


def file_of(folder: Path, step: int) -> Path:
    (path,) = folder.glob(f"{step:012d}.*")
    return path


def test_the_last_two_are_kept(saved):
    folder, save = saved
    for step in (400, 500, 600):
        save(step)
    assert steps_of(folder) == [500, 600]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(saved):
    folder, save = saved
    save(400), save(400)
    assert steps_of(folder) == [300, 400]


def test_a_damaged_newer_checkpoint_does_not_cost_the_one_just_written(saved):
    folder, save = saved
    save(500)
    file_of(folder, 500).write_bytes(b"")
    save(400, keep=1)
    assert checkpoints.load_checkpoint(folder)["run"]["global_step"] == 400
    assert steps_of(folder) == [400, 500]


def test_a_damaged_checkpoint_does_not_count(saved):
    """Two undamaged ones remain, also where a damaged one lies between them, or one that cannot be read."""
    folder, save = saved
    save(400)
    (file := file_of(folder, 400)).unlink()
    file.symlink_to("/proc/self/mem")  # its first byte is in no memory
    save(500)
    assert steps_of(folder) == [300, 400, 500]
    file.unlink()
    file.touch()
    save(500)
    assert steps_of(folder) == [300, 400, 500]
    save(600)
    assert steps_of(folder) == [500, 600]


@pytest.mark.parametrize("owner", ["torch.save", "os.fsync", "checkpoints.sha256", "checkpoints.sync_folder", "Path.rename"])
def test_any_write_that_fails_leaves_the_old_or_the_whole_new_checkpoint(saved, monkeypatch, owner):
    """Each write, flush to the disk and rename of a save fails once; the loader never gets anything in between."""
    folder, save = saved
    target, name = owner.split(".")
    target = {"torch": torch, "os": os, "Path": Path, "checkpoints": checkpoints}[target]
    function, number, step = getattr(target, name), 0, 301
    save(step)  # as many as are kept: another one will remove the oldest
    while True:
        number += 1
        with monkeypatch.context() as patch:
            failed = False

            def once(*values, number=number, **named):
                nonlocal failed, calls
                calls += 1
                if calls == number:
                    failed = True
                    full_disk()
                return function(*values, **named)

            calls = 0
            patch.setattr(target, name, once)
            before = steps_of(folder)
            try:
                save(step + 1)
            except OSError:
                assert failed
        loaded = checkpoints.load_checkpoint(folder)["run"]["global_step"]
        if not failed:
            assert number > 1 and loaded == step + 1
            return
        assert loaded in (step, step + 1)
        if loaded == step:
            assert steps_of(folder) == before  # a save that failed removes nothing, and leaves nothing
        step = loaded


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flipped_byte_or_cut_is_noticed(saved, data):
    folder, _ = saved
    (path,) = run_folder.list_checkpoints(folder)
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(0, 255))  # 0: cut here
    damaged = whole[:position] if flip == 0 else whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
    path.write_bytes(damaged)
    try:
        assert not checkpoints.is_whole(path)
    finally:
        path.write_bytes(whole)
    assert checkpoints.is_whole(path)


def test_a_damaged_checkpoint_is_skipped_and_kept(saved, capsys):
    folder, save = saved
    save(400)
    damaged = file_of(folder, 400)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert checkpoints.load_checkpoint(folder)["run"]["global_step"] == 300
    assert f"{damaged.name} is damaged and skipped" in capsys.readouterr().out
    save(400)  # the resumed run reaches this step again
    assert checkpoints.load_checkpoint(folder)["run"]["global_step"] == 400
    assert damaged.exists() and steps_of(folder) == [300, 400, 400]
    for path in run_folder.list_checkpoints(folder):
        path.write_bytes(b"")
    with pytest.raises(errors.UsageError, match="all of them are damaged"):
        checkpoints.load_checkpoint(folder)


def test_a_forged_file_runs_no_code(saved):
    """Also where its name was forged with it."""
    folder, save = saved
    save(400)
    path = file_of(folder, 400)
    torch.save({"run": Malicious()}, path)
    path = path.rename(folder / f"{400:012d}.{files.sha256(path)}.pt")
    assert checkpoints.is_whole(path)
    assert checkpoints.load_checkpoint(folder)["run"]["global_step"] == 300
    assert not Path("owned").exists()


def test_poisoned_weights_are_not_saved(run, tmp_path):
    """The losses of this agent look good while its weights are not finite."""

    class Poisoned(ddpg.DDPG):
        updates = 0

        def update(self, batch, update_policy):
            self.updates += 1
            if self.updates == 60:
                torch.nn.init.constant_(self.target_critic.q_value.bias, float("nan"))
            return {"q_loss": torch.zeros(())}

    with pytest.raises(errors.TrainingError, match="weights of target_critic are not finite"):
        run(quick_args(checkpoint_frequency=50, learning_starts=100), Poisoned)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert steps_of(run_dir / "checkpoints") == [100, 150]


def test_other_versions_are_said_so(run, tmp_path, monkeypatch, capsys):
    run_dir = run(quick_args()).run_dir
    args = record.load_args(run_dir, ddpg.Args)
    args.resume, args.total_timesteps = run_dir, 350
    now = record.versions(args.env_id)
    monkeypatch.setattr(record, "versions", lambda env_id: now | {"torch": "9.9"})
    run(args)
    assert f"results may differ: torch was {now['torch']} and is now 9.9\n" in capsys.readouterr().out


@pytest.mark.slow
def test_another_machine_may_take_other_threads_and_another_mode(run, capsys):
    """A line then says that results may differ; without a change there is no such line."""
    args = quick_args(num_threads=1, accelerate="eager", **COMPILED_ONCE)
    run_dir = run(args).run_dir
    for changes, lines in (
        ({}, []),
        ({"num_threads": 2}, ["num_threads was 1 and is now 2"]),
        (
            {"num_threads": 1, "accelerate": "compile"},
            ["accelerate was eager and is now compile, num_threads was 2 and is now 1"],
        ),
    ):
        args = dataclasses.replace(args, resume=run_dir, total_timesteps=args.total_timesteps + 20, **changes)
        capsys.readouterr()
        run(args)
        output = capsys.readouterr().out
        said = [line for line in output.splitlines() if "may differ" in line]
        assert said == [f"results may differ: {line}" for line in lines]
    assert {"num_threads", "accelerate"} <= record.RESUME_MAY_CHANGE
    assert json.loads((run_dir / "args.json").read_text())["accelerate"] == "compile"


def rewrite(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Leave the newest checkpoint of a run alone, with other content."""
    newest, *older = run_folder.list_checkpoints(run_dir / "checkpoints")
    state = torch.load(newest, weights_only=True)
    for path in (newest, *older):
        path.unlink()
    torch.save(change(state), newest)
    newest.rename(newest.with_name(f"{run_folder.step_of(newest):012d}.{files.sha256(newest)}.pt"))


def to_format_1(state: dict[str, Any]) -> dict[str, Any]:
    """What version 0.2 would have written: the global generators, no ends of episodes, the noise beside the other parts."""
    numpy_state = state["random"]
    key, pos = numpy_state["state"]["key"], numpy_state["state"]["pos"]
    generators = {
        "python": random.getstate(),
        "numpy": [numpy_state["bit_generator"], key, pos, numpy_state["has_gauss"], numpy_state["gauss"]],
        "torch": torch.get_rng_state(),
    }
    replay_buffer = {name: part for name, part in state["replay_buffer"].items() if name != "timeouts"}
    parts = {name: state[name] for name in ("run", "agent", "environments")}
    return parts | {"replay_buffer": replay_buffer, "generators": generators} | state["others"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "step"),
    [
        ("ddpg_continuous_action", "--env-id Pendulum-v1 --noise ou", 377),
        ("ddpg_continuous_action", "--env-id Pendulum-v1 --n-steps 3", 177),  # before the replay buffer wrapped
        ("ddpg_continuous_action", "--env-id InvertedPendulum-v5 --n-steps 3 --num-envs 3", 145),  # after it did
        ("sac_continuous_action", "--env-id Pendulum-v1", 377),
        ("dqn", "--env-id CartPole-v1", 377),
    ],
)
def test_a_checkpoint_of_the_version_before_is_resumed(uninterrupted, at_step, tmp_path, script, flags, step):  # noqa: F811
    """And the run ends like one left alone: its sums of rewards go on at the very row where it was saved."""
    arguments = f"{SHORT} {flags}"
    expected = uninterrupted(arguments, script)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main_in_this_process(*arguments.split(), cwd=tmp_path, script=script).returncode == 143
    rewrite(only_run(tmp_path), to_format_1)
    finish(tmp_path, only_run(tmp_path), script)
    assert fingerprint(only_run(tmp_path)) == expected


def test_a_checkpoint_of_a_newer_version_is_refused(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    rewrite(run_dir, lambda state: state | {"format": checkpoints.FORMAT + 1})
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    refused(main_in_this_process("--resume", str(run_dir), cwd=tmp_path), f"--resume {run_dir}: ", "newer version")
    assert sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before


def test_a_run_moved_elsewhere_is_resumed_there(at_step, tmp_path):
    at_step(150, crash)
    with pytest.raises(Crash):
        main_in_this_process(*f"{TOY} --checkpoint-frequency 100".split(), cwd=tmp_path)
    shutil.move(only_run(tmp_path), tmp_path / "moved")
    finish(tmp_path, Path("moved"))
    assert json.loads((tmp_path / "moved" / "evaluation.json").read_text())["episodes"] == 20
