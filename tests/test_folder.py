"""A run's folder and its output among strangers: files, links, records and readers that are not as they should be."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint
from helpers import ROOT, Crash, crash, quick_args
from processes import run_script
from test_arguments import main_in_this_process, refused, write_saved_args
from test_faults import TOY, full_disk
from test_resume import finish, only_run

import ddpg_continuous_action as ddpg
from steadyrl import arguments, checkpoints, checks, device, files, hub, output, policies, record, run_folder, sweep
from steadyrl.errors import TrainingError, UsageError

SCRIPT = ROOT / "ddpg_continuous_action.py"
SHORT = f"{TOY} --final-episodes 2 --eval-frequency 100 --eval-episodes 1 --checkpoint-frequency 100 --episode-replay plain"


@pytest.fixture
def finished(run):
    """A finished run in the working directory, of an environment that a process of its own finds too."""
    return run(quick_args(env_id="toys:Pendulum-like-v0", eval_frequency=100, checkpoint_frequency=100)).run_dir.absolute()


def content(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, but those of locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# What "finished" means


def stopped_run(at_step, tmp_path: Path, step: int = 150) -> Path:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main_in_this_process(*SHORT.split(), cwd=tmp_path).returncode == 143
    return only_run(tmp_path)


def test_an_evaluation_of_a_half_trained_run_does_not_finish_it(at_step, tmp_path):
    run_dir = stopped_run(at_step, tmp_path)
    assert main_in_this_process("--evaluate", str(run_dir), cwd=tmp_path).returncode == 0
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert (run_dir / "evaluate.json").exists() and run_folder.final_result(run_dir, args) is None
    finish(tmp_path, run_dir)
    result = run_folder.final_result(run_dir, args)
    assert result is not None and result["global_step"] == 300


def test_one_of_an_older_version_does_not_either(at_step, tmp_path):
    """That version gave the file of --evaluate the name of the final result, without a step."""
    run_dir = stopped_run(at_step, tmp_path)
    assert main_in_this_process("--evaluate", str(run_dir), cwd=tmp_path).returncode == 0
    (run_dir / "evaluate.json").rename(run_dir / "evaluation.json")
    args = json.loads((run_dir / "args.json").read_text())["args"]
    job = sweep.Job(SCRIPT, [], args)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert job.status({}).state == "interrupted"
    finish(tmp_path, run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text())["global_step"] == 300
    assert len(list(run_dir.glob("evaluation-*.json"))) == 1  # the older one, renamed


def test_a_run_that_was_made_longer_is_finished_at_its_last_step_only(finished, tmp_path):
    args = json.loads((finished / "args.json").read_text())["args"]
    assert run_folder.final_result(finished, args) is not None
    assert run_folder.final_result(finished, args | {"total_timesteps": 400}) is None
    assert run_folder.final_result(finished, args | {"total_timesteps": 400, "target_return": -1e9}) is not None
    with open(finished / "evaluations.csv", "a") as table:  # the target was reached later, without a final evaluation then
        table.write("350,10.0,0,0,0,0,0\n")
    assert run_folder.final_result(finished, args | {"total_timesteps": 400, "target_return": 10.0}) is None


# Output


class Pipe:
    """The writing end of a pipe that nobody reads."""

    def __enter__(self) -> int:
        reader, self.writer = os.pipe()
        os.close(reader)
        return self.writer

    def __exit__(self, *error) -> None:
        os.close(self.writer)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no reader", "closed", "/dev/full", "ascii", "closed by the environment"])
def test_output_never_ends_a_run(tmp_path, how):
    command, environment = [sys.executable, str(SCRIPT), *SHORT.split()], os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    if how == "no reader":
        with Pipe() as pipe:
            done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe)
    elif how == "closed":
        words = ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *command]
        done = subprocess.run(words, cwd=tmp_path, env=environment)
    elif how == "/dev/full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=full, stderr=full)
    else:
        if how == "ascii":
            environment |= {"PYTHONIOENCODING": "ascii"}
            command += ["--output", "Läufe"]
        else:
            command += ["--env-id", "toys:ClosesOutput-v0"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert how != "ascii" or "L\\xe4ufe" in done.stdout
        assert "final evaluation" in done.stdout
    assert done.returncode == 0
    (run_dir,) = tmp_path.glob("**/runs/*")
    assert (run_dir / "evaluation.json").exists() and run_folder.list_checkpoints(run_dir / "checkpoints")
    assert not any(b"final evaluation" in data for data in content(run_dir).values())  # no file took a closed one's number


@pytest.mark.slow
def test_help_for_a_reader_who_leaves_is_quiet(tmp_path):
    words = ["sh", "-c", '"$@" | head -1', "sh", sys.executable, str(SCRIPT), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and "usage" in done.stdout


def test_what_is_said_is_one_line_without_commands_to_the_terminal(capsys):
    output.say("a\nerror: forged \x1b[2J é")
    output.report("b\n\x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == "a\\nerror: forged \\x1b[2J é\n"
    assert captured.err == "error: b \\x1b[2J\n"


def test_nothing_is_raised_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    output.say("a")
    with open(os.devnull) as file:  # not for writing
        monkeypatch.setattr(sys, "stdout", file)
        output.say("b")


# A disk that is really full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave that many bytes of a disk free."""
    with open(disk / "filler", "wb") as filler:
        space = os.statvfs(disk)
        filler.write(b"\0" * (space.f_bavail * space.f_frsize - leave))


@pytest.mark.slow
def test_a_disk_that_is_really_full_ends_a_run_in_order_and_it_goes_on(at_step, small_disk, tmp_path):
    """torch raises a RuntimeError over the OSError, in the middle of a checkpoint. The log is on that disk, too."""
    whole = tmp_path / "whole"
    whole.mkdir()
    words = [*SHORT.split(), "--checkpoint-frequency", "40"]
    assert main_in_this_process(*words, cwd=whole).returncode == 0
    at_step(130, lambda: fill(small_disk, 30_000))  # a checkpoint needs more
    done = main_in_this_process(*words, cwd=small_disk)
    assert done.returncode == 1 and done.stderr.startswith("error: 3 checkpoints in a row"), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout.count("checkpoints could not be written") == 1  # in a minute
    run_dir = only_run(small_disk)
    assert not list(run_dir.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    finish(small_disk, run_dir)
    found, expected = fingerprint(run_dir), fingerprint(only_run(whole))
    assert {name for name in expected if found[name] != expected[name]} <= {"scalars"}  # rows of the full minutes are lost


def test_the_cause_is_found_under_what_torch_raises(tmp_path, monkeypatch):
    """A file that fails after N bytes, at each place of a checkpoint. What it raises is what a full disk does: ENOSPC."""
    state = {"weights": torch.zeros(50_000), "more": [torch.zeros(10)] * 3}
    for limit in (0, 100, 5_000, 150_000, 200_000):
        left = [limit]

        class Disk(io.FileIO):
            """Has room for that many bytes."""

            def write(self, data, left=left):
                left[0] -= len(data)
                return full_disk() if left[0] < 0 else super().write(data)

        with monkeypatch.context() as patch:
            patch.setattr(files, "Writer", type("Writer", (files.Writer, Disk), {}))
            with pytest.raises(OSError) as failure:
                files.replace_file(tmp_path / "a.pt", partial(torch.save, state))
        assert failure.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


# The order of what reaches the disk


def test_events_are_on_the_disk_before_the_checkpoint_has_its_name(run, monkeypatch):
    """And every new name is followed by a sync of its folder."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda path, place: (done.append(("name", str(place))), rename(path, place))[1])
    monkeypatch.setattr(Path, "replace", lambda path, place: (done.append(("name", str(place))), replace(path, place))[1])
    run(quick_args(checkpoint_frequency=100, eval_frequency=150))
    names = [number for number, (kind, _) in enumerate(done) if kind == "name"]
    assert len(names) > 5
    for number in names:
        place = Path(done[number][1])
        assert ("sync", str(place.parent)) == done[number + 1]
        if place.parent.name == "checkpoints":
            *before, checkpoint = [path for kind, path in done[:number] if kind == "sync"][-4:]
            assert ".tmp" in checkpoint and any("events.out.tfevents" in path for path in before)


def test_a_new_folder_is_on_the_disk(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()


# The best model


def test_the_best_model_is_the_one_that_the_checkpoint_knows(at_step, tmp_path):
    """Killed after a best evaluation, and resumed with evaluations elsewhere: no row is of the newer model."""
    words = f"{SHORT} --checkpoint-frequency 200 --eval-frequency 110".split()
    at_step(250, crash)
    with pytest.raises(Crash):
        main_in_this_process(*words, cwd=tmp_path)
    run_dir = only_run(tmp_path)
    state = torch.load(run_folder.list_checkpoints(run_dir / "checkpoints")[0], weights_only=True)["run"]
    newer = {"actor": {}}
    torch.save(newer, run_dir / "best_model.pt")  # of an evaluation after that checkpoint
    digest = files.sha256(run_dir / "best_model.pt")
    done = main_in_this_process("--resume", str(run_dir), "--eval-frequency", "1000", cwd=tmp_path)
    assert done.returncode == 0 and "best_model.pt is not the one of the checkpoint" in done.stdout, done.stderr
    assert files.sha256(run_dir / f"best_model-{digest[:16]}.pt") == digest
    evaluations = run_folder.read_evaluations(run_dir)
    assert [step for step, _ in evaluations] == [110, 300]
    if evaluations[0][1] > evaluations[1][1]:
        assert files.sha256(run_dir / "best_model.pt") == state["best_model"]["sha256"]


def test_a_best_model_with_a_weight_that_is_not_finite_is_refused(finished, tmp_path):
    model = torch.load(finished / "best_model.pt", weights_only=True)
    next(iter(model["actor"].values())).fill_(float("nan"))
    torch.save(model, finished / "best_model.pt")
    before = content(finished)
    refused(main_in_this_process("--evaluate", str(finished), cwd=tmp_path), "best_model.pt", "finite", "actor")
    with pytest.raises(UsageError, match="finite"):
        policies.load_agent(finished)
    assert content(finished) == before


# Saved arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": 0.1}, ["--tau 0.1", "must be 0.005, as its checkpoint has it"]),
        ({"seed": 7}, ["--seed 7", "must be 1"]),
        ({"tau": "0.005"}, ["--tau", "must be of the type float"]),
        ({"tau": 5}, ["--tau 5", "above 0 and at most 1"]),
        ({"tau": float("nan")}, ["--tau nan", "above 0 and at most 1"]),
        ({"tau": None}, ["--tau null", "must be of the type float"]),
        ({"seed": True}, ["--seed true", "must be of the type int"]),
        ({"cuda": "no"}, ["--cuda", "must be of the type bool"]),
        ({"hidden_sizes": 256}, ["--hidden-sizes 256", "must be of the type"]),
        ({"hidden_sizes": [16, "16"]}, ["--hidden-sizes", "must be of the type"]),
        ({"noise": "pink"}, ["--noise", "must be one of: gaussian, ou"]),
        ({"env_id": ["Hopper-v4"]}, ["--env-id", "must be of the type str"]),
        ({"gamma": 10**400}, ["--gamma inf"]),
        ({"env_kwargs": {"a": json.loads("[" * 200 + "]" * 200)}}, ["--env-kwargs", "nested"]),
    ],
)
def test_an_edited_args_json_is_refused(finished, tmp_path, changes, words):
    """In one line, like the same value on the command line; nothing is changed."""
    write_saved_args(finished, **changes)
    before = content(finished)
    refused(main_in_this_process("--resume", str(finished), cwd=tmp_path), "--resume", *words)
    assert content(finished) == before


def test_a_checkpoint_of_another_run_is_refused(finished, run, tmp_path):
    other = run(quick_args(env_id="toys:Pendulum-like-v0", seed=2, checkpoint_frequency=100)).run_dir
    shutil.rmtree(finished / "checkpoints")
    shutil.copytree(other / "checkpoints", finished / "checkpoints")
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "400", cwd=tmp_path)
    refused(done, "--seed 1", "must be 2, as its checkpoint has it")


def test_a_training_cannot_end_before_the_step_that_it_has_reached(finished, tmp_path):
    before = content(finished)
    refused(
        main_in_this_process("--resume", str(finished), "--total-timesteps", "200", cwd=tmp_path),
        "--total-timesteps 200",
        "300",
    )
    assert content(finished) == before


def test_a_name_in_args_json_forges_no_line(finished, tmp_path):
    write_saved_args(finished, **{"x\nerror: forged": "y\nerror: forged"})
    done = main_in_this_process("--evaluate", str(finished), cwd=tmp_path)
    assert done.returncode == 0 and not any(
        line.startswith("error") for line in done.stdout.splitlines() + done.stderr.splitlines()
    )


def test_a_network_of_another_shape_is_one_line(finished, tmp_path, monkeypatch):
    """As where a user changed the network in the script."""
    hidden_layers = ddpg.hidden_layers

    def wider(*values):
        return torch.nn.Sequential(*hidden_layers(*values), torch.nn.Linear(32, 32))

    before = content(finished)
    monkeypatch.setattr(ddpg, "hidden_layers", wider)
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "400", cwd=tmp_path)
    refused(done, "--resume", "does not fit this agent")
    assert content(finished) == before


# Code in a folder


HELPER = "import pathlib, gymnasium\npathlib.Path('ran').touch()\nfrom toys import *\n"


@pytest.fixture
def stranger(finished, tmp_path):
    """A downloaded folder whose args.json names a module that is inside it."""
    folder = tmp_path / "policy"
    shutil.copytree(finished, folder)
    (folder / "helper.py").write_text(HELPER)
    write_saved_args(folder, env_id="policy.helper:Pendulum-like-v0")
    state = torch.load(path := run_folder.list_checkpoints(folder / "checkpoints")[0], weights_only=True)
    state["run"]["settings"]["args"]["env_id"] = "policy.helper:Pendulum-like-v0"
    path.unlink()
    torch.save(state, path)
    path.rename(path.with_name(f"{run_folder.step_of(path):012d}.{files.sha256(path)}.pt"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_folder_does_not_run_its_code(stranger, tmp_path, flag, where):
    cwd = tmp_path if where == "outside" else stranger
    name = "policy.helper" if where == "outside" else "helper"
    write_saved_args(stranger, env_id=f"{name}:Pendulum-like-v0")
    folder = os.path.relpath(stranger, cwd)
    done = run_script(SCRIPT, flag, folder, cwd=cwd, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (cwd / "ran").exists()
    if where == "outside":
        assert "helper.py" in done.stderr and "--env-id policy.helper:Pendulum-like-v0" in done.stderr
        done = run_script(SCRIPT, flag, folder, "--env-id", f"{name}:Pendulum-like-v0", cwd=cwd, PYTHONPATH=str(ROOT / "tests"))
        assert done.returncode == 0 and (cwd / "ran").exists(), done.stderr


def test_load_agent_does_not_run_it_either(stranger, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="inside it"):
        policies.load_agent(stranger)
    assert not Path("ran").exists()


def test_a_module_from_elsewhere_is_named(finished, tmp_path):
    done = run_script(SCRIPT, "--evaluate", str(finished), cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert (
        done.returncode == 0
        and f"toys:Pendulum-like-v0: this environment comes from {ROOT / 'tests' / 'toys.py'}\n" in done.stdout
    ), done.stderr


# The record


def test_a_resume_names_what_changed(finished, tmp_path, monkeypatch):
    settings = json.loads((finished / "args.json").read_text())
    assert settings["code"]["package"] and settings["code"]["script"] == files.sha256(SCRIPT)[:16] and settings["processor"]
    assert settings["versions"]["toys.py"].startswith("SHA-256 ")
    assert (finished / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    monkeypatch.setattr(record, "processor", lambda: "another, AVX9")
    monkeypatch.setattr(record, "code_of", lambda script: settings["code"] | {"script": "0123", "commit": "f00"})
    changed = tmp_path / "changed" / SCRIPT.name
    changed.parent.mkdir()
    changed.write_text(SCRIPT.read_text() + "# changed\n")
    monkeypatch.setattr(record.inspect, "getfile", lambda thing: str(changed))
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "310", cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("results may differ")]
    assert f"script was {settings['code']['script']} and is now 0123" in line and "is now another, AVX9" in line
    assert "package" not in line and "torch" not in line
    assert (finished / "ddpg_continuous_action-2.py").read_text() == changed.read_text()  # the first one is kept


def test_the_environments_own_distribution_is_recorded():
    assert "mujoco" in record.versions("Hopper-v4") and "gymnasium" in record.versions("Pendulum-v1")


# The user's own files


def test_only_names_that_are_exactly_ours_are_touched(at_step, tmp_path):
    at_step(250, crash)
    with pytest.raises(Crash):
        main_in_this_process(*SHORT.split(), cwd=tmp_path)
    run_dir = only_run(tmp_path)
    mine = ["notes.md.tmp", "evaluation-notes.json", "my_model.pt", "evaluation.json.bak", "model.pt.tmp", "args.json.old.tmp"]
    mine += [
        f"checkpoints/{name}" for name in ("1500.before-the-change.pt", "5k.backup.pt", "000000000100.pt", "000000000900.x.pt")
    ]
    for name in mine:
        (run_dir / name).write_text("mine")
    left = [
        run_dir / "checkpoints" / f"000000000300.pt.{'0' * 16}.tmp",
        run_dir / f"model.pt.{'0' * 16}.tmp",
    ]  # of a killed writer
    for path in left:
        path.touch()
    finish(tmp_path, run_dir)
    assert [(run_dir / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not any(path.exists() for path in left)
    assert main_in_this_process("--evaluate", str(run_dir), cwd=tmp_path).returncode == 0
    run_folder.start_again(run_dir)
    assert [(run_dir / name).read_text() for name in mine] == ["mine"] * len(mine)


@pytest.mark.slow
def test_evaluations_at_once_lose_nothing(finished, tmp_path):
    command = [sys.executable, str(SCRIPT), "--evaluate", str(finished)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert all(json.loads((finished / name).read_text())["mean"] for name in ("evaluate.json", "evaluate-2.json"))


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "precious")
    assert files.write_new(tmp_path / "a.json", lambda file: file.write(b"new")).name == "a-2.json"
    files.write_json(tmp_path / "a.json", {})  # replaces the link, not what it leads to
    assert (tmp_path / "precious").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "a.json", "a-2.json"}


def test_the_hub_gets_neither_links_nor_private_names(finished, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (finished / "best_model.onnx").symlink_to(secret)
    (finished / "events.out.tfevents.1").symlink_to(secret)
    (finished / "my.onnx").write_text("mine")
    write_saved_args(finished, output="/home/me/secret", wandb_entity="secret-team", hf_entity="me")
    folder = tmp_path / "folder"
    folder.mkdir()
    hub.build_folder(record.load_args(finished, ddpg.Args), "DDPG", finished, "me/mine", folder)
    assert not any(b"secret" in data for path, data in content(folder).items() if path.parent == folder)
    assert not (folder / "my.onnx").exists() and (folder / "evaluation.json").exists()


# What cannot be


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden-sizes", "1000000", "1000000"], ["--hidden-sizes 1000000 1000000", "100,000"]),
        (["--num-threads", "1000000000"], ["--num-threads 1000000000", "1 to 1024"]),
        (["--worker-timeout", "1e300"], ["--worker-timeout", "1,000,000"]),
        (["--output", "a\0b"], ["--output", "a path"]),
        (["--env-kwargs", '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}"], ["--env-kwargs"]),
        (["--env-kwargs", '{"a": ' + "[" * 150 + "]" * 150 + "}"], ["--env-kwargs", "nested"]),
        (["--env-kwargs", '{"a": NaN}'], ["--env-kwargs", "NaN"]),
        (["--env-kwargs", "null"], ["--env-kwargs", "JSON object"]),
        (["--exp-name", "a" * 300], ["--exp-name", "at most 240 bytes"]),
        (["--output", "new/" + "a" * 300], ["--output", "at most 240 bytes"]),
        (["--init-from", "l\udcff"], ["--init-from", "UTF-8"]),
    ],
)
def test_values_beyond_reason_are_refused(tmp_path, flags, words):
    refused(main_in_this_process(*flags, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused(monkeypatch, tmp_path):
    """What a mount without them answers to flock: ENOSYS."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    refused(main_in_this_process(*SHORT.split(), cwd=tmp_path), "--output", "locked (Function not implemented)")
    assert not list((tmp_path / "runs").iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(finished, small_disk, tmp_path):
    shutil.copytree(finished, small_disk / "copy")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flag, words in (("--resume", "Read-only file system"), ("--evaluate", "can be written to")):
        refused(main_in_this_process(flag, str(small_disk / "copy"), cwd=tmp_path), flag, words)
    refused(main_in_this_process(*SHORT.split(), "--output", str(small_disk), cwd=tmp_path), "Read-only file system")


# What was found next to these


def test_the_best_model_is_written_as_soon_as_it_can_be(run, monkeypatch):
    """The disk is full just when the best evaluation was made: the final evaluation is of that model all the same."""
    best, write = [], files.new_file

    def new_file(path, *values):
        if path.name == "best_model.pt":
            best.append(path)
        return full_disk() if len(best) == 1 and path == best[0] else write(path, *values)

    monkeypatch.setattr(files, "new_file", new_file)
    parts = run(quick_args(eval_frequency=100, checkpoint_frequency=100))
    state = run_folder.list_checkpoints(parts.run_dir / "checkpoints")[0]
    best = torch.load(state, weights_only=True)["run"]["best_model"]
    assert best["sha256"] == files.sha256(parts.run_dir / "best_model.pt")


@pytest.mark.parametrize("name", ["model.pt", "best_model.pt"])
def test_a_model_that_cannot_be_written_is_not_evaluated(run, monkeypatch, tmp_path, name):
    """An older one of that name would give a wrong result."""
    write = files.new_file
    monkeypatch.setattr(files, "new_file", lambda path, *rest: full_disk() if path.name == name else write(path, *rest))
    with pytest.raises(TrainingError, match=r"No space left on device.* are not evaluated"):
        run(quick_args(eval_frequency=100))
    assert not (only_run(tmp_path) / "evaluation.json").exists()


def test_a_best_model_that_is_lost_comes_back(finished, tmp_path):
    content = (finished / "best_model.pt").read_bytes()
    (finished / "best_model.pt").unlink()
    assert main_in_this_process("--resume", str(finished), cwd=tmp_path).returncode == 0
    assert (finished / "best_model.pt").read_bytes() == content


def test_checkpoints_may_be_links(finished, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(finished / "checkpoints", elsewhere)
    (finished / "checkpoints").mkdir()
    for path in elsewhere.iterdir():
        (finished / "checkpoints" / path.name).symlink_to(path)
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0 and "resumed at step 300" in done.stdout, done.stderr


def test_checkpoints_that_cannot_be_read_are_no_new_start(finished, tmp_path):
    shutil.rmtree(finished / "checkpoints")
    (finished / "checkpoints").touch()
    before = content(finished)
    refused(main_in_this_process("--resume", str(finished), cwd=tmp_path), "--resume", "cannot be read (Not a directory)")
    assert content(finished) == before


@pytest.mark.parametrize("state", [[1], {"format": 2}, {"format": "x"}, {"format": 2, "run": {}}, {"format": 1}, {}])
def test_a_checkpoint_with_foreign_content_is_one_line(finished, tmp_path, state):
    for path in run_folder.list_checkpoints(finished / "checkpoints"):
        path.unlink()
    torch.save(state, path)
    path.rename(path.with_name(f"{run_folder.step_of(path):012d}.{files.sha256(path)}.pt"))
    refused(main_in_this_process("--resume", str(finished), cwd=tmp_path), "--resume", "checkpoint")


@pytest.mark.parametrize(
    "changes", [{"global_step": "300"}, {"global_step": 1e400}, {"mean": "x"}, {"mean": None}, b"\xff\xfe"]
)
def test_a_damaged_result_is_none(finished, tmp_path, changes):
    """The run is evaluated once more, and the damaged file is kept."""
    path = finished / "evaluation.json"
    result = json.loads(path.read_text())
    path.write_bytes(changes if isinstance(changes, bytes) else json.dumps(result | changes).encode())
    assert run_folder.results_of(finished) == []
    assert main_in_this_process("--resume", str(finished), cwd=tmp_path).returncode == 0
    assert json.loads(path.read_text())["returns"] == result["returns"]
    assert len(list(finished.glob("evaluation-*.json"))) == 1


def test_a_run_in_a_folder_whose_name_is_no_text(finished, tmp_path):
    """Its checkpoints are whole."""
    odd = finished.rename(finished.with_name("x\udcff"))
    before = content(odd)
    refused(main_in_this_process("--resume", str(odd), "--total-timesteps", "310", cwd=tmp_path), "--resume", "UTF-8")
    assert content(odd) == before


def test_a_checkpoint_is_read_under_the_lock(finished, tmp_path, monkeypatch):
    """Read before, it could be older than what another process writes while it stops."""
    load, locked = checkpoints.load_checkpoint, []

    def watched(folder):
        locked.append(sweep.is_locked(finished / ".lock"))
        return load(folder)

    monkeypatch.setattr("steadyrl.run.load_checkpoint", watched)
    assert main_in_this_process("--resume", str(finished), cwd=tmp_path).returncode == 0 and locked == [True]


def test_a_saved_evaluate_is_not_obeyed(finished, tmp_path):
    write_saved_args(finished, evaluate=str(finished), resume="elsewhere")
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run_folder.results_of(finished)[-1]["global_step"] == 310 and not (finished / "evaluate.json").exists()


def test_what_was_left_is_kept_under_a_name_that_is_free(finished, tmp_path):
    shutil.rmtree(finished / "checkpoints")
    (finished / "before-1").symlink_to("nowhere")
    assert main_in_this_process("--resume", str(finished), cwd=tmp_path).returncode == 0
    assert (finished / "before-2" / "best_model.pt").exists()


@pytest.mark.parametrize("kind", ["best model", "event file"])
def test_odd_entries_of_a_run_folder(finished, tmp_path, kind):
    if kind == "best model":
        (finished / "best_model.pt").unlink()
        (finished / "best_model.pt").mkdir()
    else:
        (finished / "events.out.tfevents.\u00b2.x").mkdir()
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (finished / "best_model.pt").is_file()


def test_films_that_cannot_be_made_are_left_out(tmp_path):
    (tmp_path / "videos").touch()
    done = main_in_this_process(*SHORT.split(), "--capture-video", cwd=tmp_path)
    assert done.returncode == 0 and "there will be no films" in done.stdout, done.stderr
    assert "filmed in" not in done.stdout


def test_a_path_that_is_no_text_is_refused(tmp_path):
    refused(main_in_this_process(*SHORT.split(), "--output", "a\udcff", cwd=tmp_path), "--output", "UTF-8")
    assert not list(tmp_path.iterdir())


def test_a_whole_number_has_an_end(tmp_path):
    refused(main_in_this_process("--total-timesteps", "9" * 400, cwd=tmp_path), "--total-timesteps", "10^15")


def test_a_stopped_evaluation_leaves_nothing(finished, tmp_path, monkeypatch):
    before = content(finished)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpg.DDPG, "value", stop)
    assert main_in_this_process("--evaluate", str(finished), cwd=tmp_path).returncode == 130
    assert content(finished) == before


def test_a_linked_film_is_not_uploaded(finished, tmp_path):
    (tmp_path / "secret").write_text("secret")
    videos = tmp_path / "videos" / finished.name
    videos.mkdir(parents=True)
    (videos / "evaluation.mp4").symlink_to(tmp_path / "secret")
    (finished / "events.out.tfevents.my-notes").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    hub.build_folder(record.load_args(finished, ddpg.Args), "DDPG", finished, "me/mine", folder)
    assert not (folder / "replay.mp4").exists() and not (folder / "events.out.tfevents.my-notes").exists()
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("text", ["raise ValueError('a')", "import sys; sys.exit(3)", "Args = 3", "main = 3"])
def test_a_script_that_is_none_is_one_line(finished, tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UsageError, match="must be a training script"):
        sweep.plan(sweep.Options(script=tmp_path / "bad.py", engine="local"))
    sys.modules.pop("bad", None)
    with pytest.raises(UsageError, match="must be a training script"):
        policies.load_agent(finished, script=tmp_path / "bad.py")
    sys.modules.pop("bad", None)


def test_a_sweep_on_a_read_only_disk_shows_its_table(small_disk, monkeypatch, capsys):
    monkeypatch.chdir(small_disk)
    words = ["sweep", "--engine", "local", "--env-ids", "Pendulum-v1", "--num-seeds", "1", "--status"]
    monkeypatch.setattr(sys, "argv", words)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert sweep.main() == 0 and "1 runs: 1 new" in capsys.readouterr().out


@pytest.mark.slow
def test_a_request_to_save_before_training_ends_nothing(tmp_path):
    words = [*SHORT.split(), "--env-id", "toys:Signals-v0", "--episode-replay", "auto"]
    done = run_script(SCRIPT, *words, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr


TINY = (
    "--total-timesteps 300 --learning-starts 250 --batch-size 16 --buffer-size 1000 --hidden-sizes 8 --no-cuda "
    "--eval-frequency 0 --final-episodes 1"
)


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_goes_away_ends_the_training(run, tmp_path, how):
    """Half of the run must not land in a new folder of the old name, without its arguments."""
    places = []

    class GoesAway(ddpg.DDPG):
        def update(self, *args, **kwargs):
            if not places:
                (folder,) = (tmp_path / "runs").iterdir()
                places.append(folder)
                if how == "moved":
                    folder.rename(tmp_path / "elsewhere")
                while folder.exists():  # TensorBoard's thread may be writing
                    shutil.rmtree(folder, ignore_errors=True)
            return super().update(*args, **kwargs)

    with pytest.raises(TrainingError, match="was moved or removed while its run trained"):
        run(quick_args(output=str(tmp_path), checkpoint_frequency=100), GoesAway)
    assert places and not list(tmp_path.rglob("runs/*/*"))
    if how == "moved":
        assert {"args.json", "checkpoints"} <= {path.name for path in (tmp_path / "elsewhere").iterdir()}


def test_a_lock_that_is_removed_is_taken_again_unless_another_process_has_it(tmp_path):
    with run_folder.lock_folder(tmp_path, new=False) as check:
        (tmp_path / ".lock").unlink()
        check()
        with pytest.raises(UsageError, match="another process is training"), run_folder.lock_folder(tmp_path, new=False):
            pass
        (tmp_path / ".lock").unlink()
        with (
            run_folder.lock_folder(tmp_path, new=False),
            pytest.raises(TrainingError, match="another process trains this run"),
        ):
            check()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_checkpoints_on_a_disk_that_is_not_there_are_no_new_start(finished, tmp_path, what):
    path = finished / "checkpoints"
    path = path if what == "folder" else run_folder.list_checkpoints(path)[0]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "not there")
    for other in run_folder.list_checkpoints(finished / "checkpoints") if what == "file" else ():
        if other != path:
            other.unlink()
    before = sorted(finished.iterdir())
    done = main_in_this_process("--resume", str(finished), "--total-timesteps", "400", cwd=tmp_path)
    refused(done, "--resume", "cannot be read" if what == "folder" else "must hold an undamaged checkpoint")
    assert sorted(finished.iterdir()) == before


def test_an_evaluation_needs_neither_the_memory_of_a_training_nor_its_packages(finished, tmp_path, monkeypatch):
    write_saved_args(finished, track=True)
    monkeypatch.setattr(checks, "available_memory", lambda: 1)
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    assert main_in_this_process("--evaluate", str(finished), cwd=tmp_path).returncode == 0


def test_an_id_without_its_version(tmp_path):
    done = main_in_this_process(*f"--env-id Pendulum {TINY}".split(), cwd=tmp_path)
    assert done.returncode == 0 and (only_run(tmp_path) / "evaluation.json").exists()
    assert record.versions("Pendulum") == record.versions("Pendulum-v1")


def test_a_path_is_shown_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert files.shown(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("damage", ["model", "result"])
def test_a_damaged_run_is_not_half_copied_for_the_hub(finished, tmp_path, monkeypatch, capsys, damage):
    if damage == "model":
        model = finished / "best_model.pt"
        model.write_bytes(model.read_bytes()[:3000])
    else:
        result = json.loads((finished / "evaluation.json").read_text())
        del result["std"]
        (finished / "evaluation.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["hub", str(finished), "--to", str(tmp_path / "to")])
    assert hub.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "to").exists()


def test_no_temporary_folder_is_no_error(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(device.tempfile, "gettempdir", missing)
    monkeypatch.setattr(device.tempfile, "mkdtemp", missing)
    device.set_up_cache()
