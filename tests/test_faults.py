"""Signals, dying workers, full disks, damaged and forged checkpoints: what happens to a run, and what it keeps."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest
import torch
from conftest import quick_args, scalars
from fingerprint import fingerprint, sha
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter
from test_arguments import Malicious, refused, script
from test_resume import SHORT, only_run, run_killed, uninterrupted  # noqa: F401

import ddpg_continuous_action as ddpg

PENDULUM = f"--env-id Pendulum-v1 --num-envs 1 {SHORT}"
TOY = "--env-id toys:Pendulum-like-v0 --total-timesteps 300 --learning-starts 100 --buffer-size 1000 --batch-size 16 --no-cuda"


# Signals


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_a_stop_signal_saves_and_says_how_to_go_on(uninterrupted, tmp_path, name, status):  # noqa: F811
    done = run_killed(tmp_path, "step", 377, *PENDULUM.split(), signals=name)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    run_dir = only_run(tmp_path)
    assert (run_dir / "checkpoints" / "000000000377").is_dir()
    command = done.stdout.splitlines()[-1].split("to go on: ")[1].split()
    assert command[0] == "python" and command[2:] == ["--resume", f"runs/{run_dir.name}"]
    done = script(*command[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fingerprint(run_dir) == uninterrupted(PENDULUM)


def test_a_second_stop_signal_exits_at_once(tmp_path):
    done = run_killed(tmp_path, "step", 377, *PENDULUM.split(), signals="TERM,TERM")
    assert done.returncode == 143
    assert sorted(path.name for path in (only_run(tmp_path) / "checkpoints").iterdir()) == ["000000000200", "000000000300"]


def test_sigusr1_saves_and_goes_on(uninterrupted, tmp_path):  # noqa: F811
    done = run_killed(tmp_path, "step", 577, *PENDULUM.split(), signals="USR1")
    assert done.returncode == 0, done.stderr
    run_dir = only_run(tmp_path)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["000000000577", "000000000600"]
    assert fingerprint(run_dir) == uninterrupted(PENDULUM)


@pytest.mark.parametrize(("signals", "status"), [("KILL", -9), ("TERM", 143), ("TERM,TERM", 143), ("GROUP-INT", 130)])
def test_workers_leave_with_the_run(tmp_path, signals, status):
    """(The workers carry a mark in their environment; they are waited for, not slept for.)"""
    mark = f"mark-{os.getpid()}-{signals}"
    arguments = f"step 50 {signals} {TOY} --num-envs 3 --vectorization async".split()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TEST_MARK": mark}
    command = [sys.executable, str(Path(__file__).parent / "killed.py"), *arguments]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **output, text=True, start_new_session=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    if signals in ("TERM", "GROUP-INT"):
        assert ddpg.read_checkpoint(only_run(tmp_path) / "checkpoints")["progress"]["global_step"] == 150

    def marked():
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == mark:
                    yield process
            except psutil.Error:
                pass

    assert psutil.wait_procs(list(marked()), timeout=20)[1] == []


# Workers of asynchronous environments


def handlers_in_worker() -> list:
    ddpg.in_worker(int)
    return [signal.getsignal(number) for number in ddpg.STOP_SIGNALS + ddpg.SAVE_SIGNALS]


def test_a_worker_leaves_signals_to_the_main_process():
    """In a process that inherits no handlers, as Python starts them on macOS and, from 3.14 on, on Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(handlers_in_worker) == [signal.SIG_IGN] * 3


@pytest.mark.parametrize(
    ("env_id", "words"),
    [("Dying-v0", "worker 1 ended with exit status 3"), ("Hanging-v0", "worker 1 gave no answer in 3 seconds")],
)
def test_a_worker_that_dies_or_hangs_stops_the_run_after_a_checkpoint(tmp_path, env_id, words):
    arguments = f"{TOY} --env-id toys:{env_id} --num-envs 3 --vectorization async --worker-timeout 3"
    done = script(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert words in done.stderr
    state = ddpg.read_checkpoint(only_run(tmp_path) / "checkpoints")
    assert state["progress"]["global_step"] == 3 * 49 and state["replay"]["pos"] == 49


# Resuming what cannot be, or need not be


def test_a_run_that_another_process_trains_is_refused(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    with filelock.FileLock(run_dir / ".lock"):
        refused(script("--resume", str(run_dir), cwd=tmp_path), "--resume", "another process")


def test_a_finished_run_says_so_and_goes_on_with_more_steps(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    before = sha([path.read_bytes() for path in sorted(run_dir.rglob("*.pt"))])
    done = script("--resume", str(run_dir), cwd=tmp_path)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert sha([path.read_bytes() for path in sorted(run_dir.rglob("*.pt"))]) == before
    done = script("--resume", str(run_dir), "--total-timesteps", "350", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ddpg.read_checkpoint(run_dir / "checkpoints")["progress"]["global_step"] == 350
    assert [step for step, _ in scalars(run_dir)["losses/q_loss"]] == [200, 300, 350]
    assert (run_dir / "evaluation-2.json").exists() and ddpg.load_args(run_dir).total_timesteps == 350


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ("--env-id Pendulum-v1", "toys:Pendulum-like-v0"),
        ("--hidden-sizes 64 64", "(256, 256)"),
        ("--learning-rate 0.01", "0.0003"),
        ("--num-envs 2", "1"),
    ],
)
def test_another_run_is_not_resumed(run, tmp_path, flags, saved):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    refused(script("--resume", str(run_dir), *flags.split(), cwd=tmp_path), flags.split()[0], flags.split()[1], saved)
    assert sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before


def test_an_environment_that_does_not_come_back_is_said_so_and_starts_anew(run, tmp_path):
    """Counter's observations depend on how many episodes came before: no replay of the running one brings them back."""
    arguments = f"{TOY} --env-id toys:Counter-v0 --num-envs 2 --checkpoint-frequency 100".split()
    assert run_killed(tmp_path, "step", 78, *arguments).returncode == -9
    done = script("--resume", str(only_run(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f"environment {index} did not come back" in done.stdout for index in (0, 1, 2)] == [True, True, False]
    state = ddpg.read_checkpoint(only_run(tmp_path) / "checkpoints")
    observations, _, next_observations, _, _ = np.split(state["transitions"], [1, 2, 3, 4], axis=2)
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
    args = quick_args(checkpoint_frequency=50, keep_checkpoints=1)
    monkeypatch.setattr(ddpg, "write_array", failing(ddpg.write_array, {2, 3}))
    kept = []
    save_checkpoint = ddpg.save_checkpoint

    def save(folder, *rest):
        try:
            save_checkpoint(folder, *rest)
        finally:
            kept.append(sorted(path.name for path in folder.iterdir()))
            assert ddpg.read_checkpoint(folder) is not None

    monkeypatch.setattr(ddpg, "save_checkpoint", save)
    run(args)
    assert [[int(name) for name in names] for names in kept] == [[50], [50], [50], [200], [250], [300]]
    assert capsys.readouterr().out.count("No space left on device") == 2


def test_a_disk_that_stays_full_stops_the_run_in_order(run, monkeypatch, tmp_path):
    monkeypatch.setattr(ddpg, "write_array", failing(ddpg.write_array, {2, 3, 4}))
    with pytest.raises(ddpg.TrainingError, match="No space left on device"):
        run(quick_args(checkpoint_frequency=50))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["000000000050"]
    assert ddpg.read_checkpoint(run_dir / "checkpoints")["progress"]["global_step"] == 50


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_survived(run, monkeypatch, capsys):
    monkeypatch.setattr(RecordWriter, "write", failing(RecordWriter.write, {20}))
    parts = run(quick_args(env_id="Counter-v0", total_timesteps=1000, learning_starts=900))
    captured = capsys.readouterr()
    assert "could not be written" in captured.out and "Traceback" not in captured.err
    steps = [step for step, _ in parts.scalars["charts/episodic_return"]]
    assert steps == sorted(set(steps)) and steps[-1] == 1000 and len(steps) > 100


# Checkpoints


def test_reading_takes_no_second_replay_buffer(tmp_path):
    """What fitted once beside the process fits again when it is resumed."""
    place = tmp_path / "000000000100"
    place.mkdir()
    torch.save({}, place / "state.pt")
    np.save(place / "transitions.npy", np.zeros((100_000, 1, 50), np.float32))  # 20 MB
    (place / "manifest.json").write_bytes(ddpg.manifest_of(place))
    tracemalloc.start()
    try:
        transitions = ddpg.read_checkpoint(tmp_path)["transitions"]
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert transitions.shape == (100_000, 1, 50)


@pytest.fixture
def saved(run, tmp_path):
    """The parts of a finished run, a function that saves them as another checkpoint, and the folder they are saved in."""
    parts = run(quick_args(num_envs=2, noise="ou", hidden_sizes=(8,), buffer_size=64, checkpoint_frequency=0))
    folder = parts.run_dir / "checkpoints"
    state = ddpg.read_checkpoint(folder)
    envs, noise = ddpg.make_envs(quick_args(num_envs=2), "x"), ddpg.VectorizedActionNoise(ddpg.NormalActionNoise(0, 1), 2)
    envs.reset(seed=1)

    def save(global_step: int, keep: int = 2) -> None:
        progress = state["progress"] | {"global_step": global_step}
        ddpg.save_checkpoint(folder, keep, progress, parts.agent, parts.rb, envs, noise)

    return folder, save


def test_the_last_two_are_kept(saved):
    folder, save = saved
    for step in (400, 500, 600):
        save(step)
    assert sorted(path.name for path in folder.iterdir()) == ["000000000500", "000000000600"]


def test_a_damaged_newer_checkpoint_does_not_cost_the_one_just_written(saved):
    folder, save = saved
    save(500)
    (folder / "000000000500" / "transitions.npy").unlink()
    save(400, keep=1)
    assert ddpg.read_checkpoint(folder)["progress"]["global_step"] == 400


@pytest.mark.parametrize("owner", ["write_array", "torch.save", "os.fsync", "sync_folder", "Path.rename"])
def test_any_write_that_fails_leaves_the_old_or_the_whole_new_checkpoint(saved, monkeypatch, owner):
    """Each write, flush to the disk and rename of a save fails once; the loader never gets anything in between."""
    folder, save = saved
    *path, name = owner.split(".")
    target = {"": ddpg, "torch": ddpg.torch, "os": ddpg.os, "Path": ddpg.Path}["".join(path)]
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
            before = sorted(path.name for path in folder.iterdir())
            try:
                save(step + 1)
            except OSError:
                assert failed
        loaded = ddpg.read_checkpoint(folder)["progress"]["global_step"]
        assert not list(folder.glob("*.tmp"))
        if not failed:
            assert number > 1 and loaded == step + 1
            return
        assert loaded in (step, step + 1)
        if loaded == step:
            assert sorted(path.name for path in folder.iterdir()) == before  # a save that failed prunes nothing
        step = loaded


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_or_cut_is_noticed(saved, data):
    folder, _ = saved
    (place,) = ddpg.list_checkpoints(folder)
    path = data.draw(st.sampled_from(sorted(place.iterdir())))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(0, 255))  # 0: cut here
    damaged = whole[:position] if flip == 0 else whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
    path.write_bytes(damaged)
    try:
        assert not ddpg.is_whole(place)
    finally:
        path.write_bytes(whole)
    assert ddpg.is_whole(place)


def test_a_damaged_checkpoint_is_passed_over_and_kept(saved, capsys):
    folder, save = saved
    save(400)
    damaged = folder / "000000000400" / "transitions.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert ddpg.read_checkpoint(folder)["progress"]["global_step"] == 300
    assert "000000000400 is damaged" in capsys.readouterr().out
    save(400)  # the run comes by again
    assert ddpg.read_checkpoint(folder)["progress"]["global_step"] == 400
    assert len(list(folder.glob("000000000400.damaged-*"))) == 1
    for place in ddpg.list_checkpoints(folder):
        (place / "state.pt").unlink()
    with pytest.raises(ddpg.UsageError, match="all of them are damaged"):
        ddpg.read_checkpoint(folder)


@pytest.mark.parametrize("name", ["state.pt", "transitions.npy"])
def test_a_forged_file_runs_no_code(saved, name, monkeypatch):
    """Also where its manifest was forged with it."""
    folder, save = saved
    save(400)
    place = folder / "000000000400"
    if name == "state.pt":
        torch.save({"progress": Malicious()}, place / name)
    else:
        np.save(place / name, np.array([Malicious()], dtype=object), allow_pickle=True)
    (place / "manifest.json").write_bytes(ddpg.manifest_of(place))
    assert ddpg.is_whole(place)
    assert ddpg.read_checkpoint(folder)["progress"]["global_step"] == 300
    assert not Path("owned").exists()


def test_poisoned_weights_are_not_saved(run, tmp_path):
    """The losses of this agent look good while its weights are not finite."""

    class Poisoned(ddpg.DDPG):
        updates = 0

        def update(self, batch, update_actor):
            self.updates += 1
            if self.updates == 60:
                torch.nn.init.constant_(self.target_critic.q_value.bias, float("nan"))
            return {"q_loss": torch.zeros(())}

    with pytest.raises(ddpg.TrainingError, match="weights of target_critic are not finite"):
        run(quick_args(checkpoint_frequency=50), Poisoned)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["000000000100", "000000000150"]


def test_other_versions_are_said_so(run, tmp_path, monkeypatch, capsys):
    run_dir = run(quick_args()).run_dir
    args = ddpg.load_args(run_dir)
    args.resume, args.total_timesteps = run_dir, 350
    now = ddpg.versions()
    monkeypatch.setattr(ddpg, "versions", lambda: now | {"torch": "9.9"})
    run(args)
    assert f"other versions than {now}" in capsys.readouterr().out


def test_a_run_moved_elsewhere_is_resumed_there(tmp_path):
    done = run_killed(tmp_path, "step", 150, *f"{TOY} --checkpoint-frequency 100".split())
    assert done.returncode == -9
    shutil.move(only_run(tmp_path), tmp_path / "moved")
    done = script("--resume", "moved", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "moved" / "evaluation.json").read_text())["episodes"] == 20
