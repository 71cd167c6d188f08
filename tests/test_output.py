"""What a run tells: its last lines, TensorBoard, success, the models it can evaluate; and the tools that show many runs."""

import csv
import json
import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from helpers import ROOT, ddpg, dqn, idle, quick_args, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata
from test_arguments import main_in_this_process, refused
from test_compare import STEPS, write_run
from test_resume import only_run

from steadyrl import compare, evaluation, files, logs, record, run_folder, spaces
from steadyrl.files import write_csv

TOY = "--env-id toys:Pendulum-like-v0 --total-timesteps 300 --learning-starts 250 --batch-size 16 --buffer-size 1000 --no-cuda"
TOY += " --eval-frequency 100 --eval-episodes 1 --final-episodes 2 --hidden-sizes 16 16 --episode-replay plain"


def test_the_last_lines_are_the_result_and_three_commands(tmp_path):
    done = main_in_this_process(*TOY.split(), cwd=tmp_path)
    result, *commands = done.stdout.splitlines()[-4:]
    folder = f"runs/{only_run(tmp_path).name}"
    assert result.startswith("final evaluation: ") and result.endswith(f"written to {folder}/evaluation.json")
    assert [command.split()[1] for command in commands] == ["watch:", "film:", "go"]
    assert commands[0].endswith("tensorboard --logdir runs")
    for command, flag in zip(commands[1:], ("--evaluate", "--resume"), strict=True):
        assert f" {flag} {folder} " in command
    arguments = commands[2].split(".py ")[1].split()
    assert main_in_this_process(*arguments, cwd=tmp_path).returncode == 0  # as it stands there


@pytest.mark.parametrize(("script", "name"), [(ddpg, "charts/exploration_noise"), (dqn, "charts/epsilon")])
def test_tensorboard_has_what_was_explored_and_learned_from(run, script, name):
    flags = {"exploration_noise": 0.5, "exploration_noise_end": 0.0} if script is ddpg else {}
    env_id = "Pendulum-like-v0" if script is ddpg else "CartPole-v1"
    logged = run(quick_args(script, env_id=env_id, total_timesteps=400, learning_starts=200, buffer_size=250, **flags)).scalars
    assert dict(logged["charts/replay_size"]) == {100: 100, 200: 200, 300: 250, 400: 250}
    assert [step for step, _ in logged["charts/SPS"]] == [300, 400]  # not before learning
    updates = dict(logged["charts/updates"])
    assert updates[200] == 0 < updates[300] < updates[400]
    values = dict(logged[name])
    assert values[100] > values[400]


def test_tensorboard_has_the_arguments_and_the_result(run):
    """The text table begins with task and seed, and has nothing private; HParams knows arguments and both metrics."""
    parts = run(quick_args(eval_frequency=100, seed=7, wandb_entity="secret"))
    events = EventAccumulator(str(parts.run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert text[2:4] == ["|env_id|Pendulum-like-v0|", "|seed|7|"]
    assert "secret" not in "".join(text) and not {"|resume|None|", "|evaluate|None|", "|export|None|", "|output|.|"} & {*text}
    result = json.loads((parts.run_dir / "evaluation.json").read_text())
    rows = run_folder.read_evaluations(parts.run_dir)
    assert parts.scalars["eval/final_return"] == [(300, pytest.approx(result["mean"], rel=1e-6))]
    assert parts.scalars["eval/best_return"] == [(300, pytest.approx(max(mean for _, mean in rows), rel=1e-6))]
    assert result["model_step"] == max(rows, key=lambda row: (row[1], row[0]))[0] and result["global_step"] == 300
    (file,) = parts.run_dir.glob("events*")
    tags = {value.tag for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    assert {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG} <= tags


def test_a_resume_without_anything_to_do_leaves_no_event_file(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    before = sorted(run_dir.glob("events*"))
    assert main_in_this_process("--resume", str(run_dir), cwd=tmp_path).returncode == 0
    assert sorted(run_dir.glob("events*")) == before


def test_evaluate_takes_a_model_a_seed_and_a_number_of_episodes(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0", eval_frequency=100)).run_dir.absolute()
    (run_dir / "mine.pt").write_bytes((run_dir / "model.pt").read_bytes())
    for number, (flags, model, step) in enumerate(
        [
            ([], "best_model.pt", json.loads((run_dir / "evaluation.json").read_text())["model_step"]),
            (["--model", "latest"], "model.pt", 300),
            (["--model", str(run_dir / "mine.pt")], "mine.pt", None),
        ],
        1,
    ):
        words = ["--evaluate", str(run_dir), "--episodes", "3", "--eval-seed", "5", *flags]
        assert main_in_this_process(*words, cwd=tmp_path).returncode == 0
        result = json.loads((run_dir / f"evaluate{f'-{number}' if number > 1 else ''}.json").read_text())
        assert (result["model"], result["model_step"], result["seeds"]) == (model, step, [5, 6, 7])
    refused(main_in_this_process("--evaluate", str(run_dir), "--model", "none.pt", cwd=tmp_path), "--model none.pt")
    refused(main_in_this_process("--model", "best", cwd=tmp_path), "--model best", "without --evaluate")


def test_a_window_needs_a_display(run, tmp_path, monkeypatch):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    refused(main_in_this_process("--evaluate", str(run_dir), "--render", cwd=tmp_path), "--render", "needs a display")


# Success


@pytest.mark.parametrize("changes", [{}, {"vectorization": "async", "num_envs": 2}])
def test_the_success_of_episodes_is_counted(run, capsys, changes):
    """Of this environment every second episode of an evaluation succeeds: those of even seeds."""
    parts = run(quick_args(env_id="toys:Goal-v0", eval_frequency=150, eval_episodes=3, final_episodes=4, **changes), idle())
    with open(parts.run_dir / "evaluations.csv", newline="") as file:
        assert [row["success"] for row in csv.DictReader(file)] == [str(2 / 3)] * 2
    assert [value for _, value in parts.scalars["eval/success_rate"]] == [pytest.approx(2 / 3)] * 2
    assert json.loads((parts.run_dir / "evaluation.json").read_text())["success"] == 0.5
    assert "success 0.67" in capsys.readouterr().out


def test_without_a_success_there_is_no_column(run):
    parts = run(quick_args(eval_frequency=150))
    assert "success" not in (parts.run_dir / "evaluations.csv").read_text() and "eval/success_rate" not in parts.scalars


@pytest.mark.parametrize("value", [None, "yes", [1, 2], object()])
def test_an_odd_success_is_none(value):
    assert spaces.success_of({"is_success": value}) == {} == spaces.success_of(None)
    assert spaces.success_of({"is_success": np.array([True])}) == {"is_success": 1.0}


# Tools


@pytest.mark.slow
def test_a_hub_folder_is_made_without_a_network(run, tmp_path):
    run_dir = run(quick_args(env_id="toys:Pendulum-like-v0", eval_frequency=100)).run_dir.absolute()

    def hub(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "steadyrl.hub", *words]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://localhost:1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = hub(str(run_dir), "--to", "folder")
    assert done.returncode == 0 and (tmp_path / "folder" / "README.md").exists(), done.stderr
    refused(hub(str(run_dir), "--to", "folder"), "--to folder", "File exists")
    refused(hub(str(run_dir)), "token")
    (run_dir / "evaluation.json").unlink()
    refused(hub(str(run_dir), "--to", "other"), "final evaluation")


def test_each_evaluation_is_logged_once_after_two_interruptions(tmp_path):
    """One was interrupted and made after a resume. Later ones were logged, given up after a kill, and are made again."""
    row = dict.fromkeys(("mean", "std", "length", "q_bias"), 1.0)
    for start, steps in ((0, []), (50, [50, 100, 150, 200]), (50, [50, 100, 150, 200, 250])):
        with closing(logs.Log(quick_args(), tmp_path, start, files.WriteOrWarn())) as log:
            if start:
                log.find_evaluation()
            for step in steps:
                log.evaluation(row | {"global_step": step}, 1)
    assert [step for step, _ in scalars(tmp_path)["eval/episodic_return"]] == [50, 100, 150, 200, 250]


def test_what_git_prints_need_not_be_text(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "config", "core.quotepath", "false"], check=True)
    (tmp_path / os.fsdecode(b"\xff")).touch()
    assert "??" in (record.git(tmp_path, "status", "--porcelain") or "")


def test_the_newest_of_two_runs_with_a_seed(tmp_path, monkeypatch):
    for number, name in enumerate(("a", "b")):
        folder = write_run(tmp_path / name, [float(number)] * 6, STEPS)
        os.utime(folder, (number, number))
    notes: list[str] = []
    read = [compare.read_run(tmp_path / name, None, None, notes) for name in ("b", "a")]
    (run,) = compare.name_groups(read, notes, newest=True)
    assert run.folder == tmp_path / "b" and notes == [f"{tmp_path / 'a'} is left out: {tmp_path / 'b'} is newer."]


def test_evaluations_with_and_without_success_share_a_table(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": 2, "success": 0.5}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["a,success", "1,", "2,0.5"]
    assert evaluation.Evaluation(np.ones(2), np.ones(2), 0.0, np.array([1.0, 0.0])).summary()["success"] == 0.5
