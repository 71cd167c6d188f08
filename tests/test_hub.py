"""The Hugging Face Hub: the folder by itself, and its upload to a server on localhost."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
import yaml
from helpers import ROOT, quick_args
from hub_endpoint import endpoint
from huggingface_hub.utils import validate_repo_id
from test_arguments import main_in_this_process, refused, script

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl import hub, record
from steadyrl.arguments import parse_args

TOY = "--env-id toys:Pendulum-like-v0 --total-timesteps 300 --learning-starts 100 --batch-size 16 --eval-frequency 100"


@hypothesis.settings(max_examples=20)  # parsing a command line is slow
@hypothesis.given(
    env_id=st.sampled_from(["Hopper-v4", "my envs:Mine-v0", "ALE/Pong"]),
    env_kwargs=st.dictionaries(st.text(max_size=3), st.integers(0, 9) | st.text(max_size=5), max_size=2),
    exp_name=st.from_regex(r"[\w.+]{1,5}", fullmatch=True),
    learning_rate=st.floats(1e-8, 1),
    hidden_sizes=st.lists(st.integers(1, 512), min_size=1, max_size=3).map(tuple),
    cuda=st.booleans(),
    target_return=st.none() | st.floats(-1e6, 1e6),
)
def test_the_command_of_a_run_gives_its_arguments_again(**changes):
    args = ddpg.Args(**changes)
    words = shlex.split(hub.command_of(replace(args, output="/scratch", upload_model=True, hf_entity="me", track=True)))
    assert words[:2] == ["python", "ddpg_continuous_action.py"]
    assert parse_args(ddpg.Args, words[2:], ddpg.Args()) == args


def test_the_command_of_the_defaults_is_short():
    assert [hub.command_of(script.Args()) for script in (sac, dqn)] == ["python sac_continuous_action.py", "python dqn.py"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "Hopper-v4-ddpg_continuous_action-seed1"),  # as CleanRL's
        ({"hf_entity": "me", "seed": 3}, "me/Hopper-v4-ddpg_continuous_action-seed3"),
        ({"env_id": "my_envs:ALE/Pong-v5", "exp_name": "a+b"}, "my_envs-ALE-Pong-v5-a-b-seed1"),
    ],
)
def test_the_name_of_a_repository(changes, name):
    assert hub.repo_id_of(ddpg.Args(**changes)) == name
    validate_repo_id(name)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "env_id"), [*((script, "Bounds-v0") for script in (ddpg, td3, sac)), (dqn, "CartPole-v1")])
def test_a_folder_holds_the_run_the_model_the_code_and_a_model_card(run, tmp_path, script, env_id):
    args = quick_args(script, env_id=env_id, eval_frequency=100)
    run_dir, folder = run(args).run_dir, tmp_path / "folder"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    folder.mkdir()
    hub.build_folder(args, "Agent", run_dir, "me/mine", folder)
    name = f"{script.__name__}.py"
    results = {"model.pt", "best_model.pt", "evaluation.json", "evaluations.csv"}
    for file in results | {path.name for path in run_dir.glob("events*")}:
        assert (folder / file).read_bytes() == (run_dir / file).read_bytes()
    record_there, record_here = (json.loads((place / "args.json").read_text()) for place in (folder, run_dir))
    assert record_there["args"].items() < record_here["args"].items() and "output" not in record_there["args"]
    assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert {path.name for path in folder.glob("*.py")} == {name} and not (folder / "checkpoints").exists()
    package = {path.name: path.read_bytes() for path in (ROOT / "steadyrl").iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (folder / "steadyrl").iterdir()} == package
    assert {"sweep.py", "tune.toml", "py.typed"} < package.keys()
    assert (folder / "requirements.txt").read_text().split() == record.pins()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    networks = torch.load(folder / "best_model.pt", weights_only=True)
    expected = {f"{name}.{key}": value for name, network in networks.items() for key, value in network.items()}
    tensors = safetensors.torch.load_file(folder / "best_model.safetensors")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before

    head, card = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    (model,) = yaml.safe_load(head)["model-index"]
    (result,) = model["results"]
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert result["task"]["type"] == "reinforcement-learning" and result["dataset"]["name"] == env_id
    assert result["metrics"][0]["type"] == "mean_reward"
    assert result["metrics"][0]["value"] == f"{evaluation['mean']:.2f} +/- {evaluation['std']:.2f}"
    assert huggingface_hub.ModelCard(head and f"---\n{head}---\n").data.eval_results[0].metric_type == "mean_reward"
    assert hub.command_of(args) in card and torch.__version__.partition("+")[0] in card and "hf download me/mine" in card
    assert "hf download OWNER/mine" in hub.model_card(args, "Agent", run_dir, "mine") and "It also needs" not in card
    args.env_id = f"my_envs:{env_id}"
    assert "It also needs the module `my_envs`, which registers" in hub.model_card(args, "Agent", run_dir, "mine")


def test_the_latest_evaluation_is_the_replay(run, tmp_path):
    args = quick_args(capture_video=True)
    run_dir = run(args).run_dir
    videos = Path("videos", run_dir.name)
    os.utime(videos / "evaluation-episode-0.mp4", (1, 1))  # older than those of training
    shutil.copy(videos / "training-episode-0.mp4", videos / "evaluate-episode-0.mp4")
    for expected in ("evaluate-episode-0.mp4", "evaluation-episode-0.mp4", "training-episode-20.mp4", None):
        folder = tmp_path / f"folder {expected}"
        folder.mkdir()
        hub.build_folder(args, "Agent", run_dir, "me/mine", folder)
        if expected is None:
            assert not (folder / "replay.mp4").exists()
        else:
            assert (folder / "replay.mp4").read_bytes() == (videos / expected).read_bytes()
            for path in [videos / expected] if expected.startswith("evaluat") else videos.glob("*"):
                path.unlink()


def test_a_run_that_trained_on_or_holds_links_is_refused(run, tmp_path, monkeypatch, capsys):
    """Its result is not that of the model that would be uploaded."""
    folder = run(quick_args(env_id="toys:Pendulum-like-v0")).run_dir.absolute()
    record_of_run = json.loads((folder / "args.json").read_text())
    record_of_run["args"]["total_timesteps"] = 400
    (folder / "args.json").write_text(json.dumps(record_of_run))
    monkeypatch.setattr(sys, "argv", ["hub", str(folder), "--to", str(tmp_path / "to")])
    assert hub.main() == 2 and "has trained on since its final evaluation" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    done = main_in_this_process("--evaluate", str(folder), "--upload-model", cwd=tmp_path)
    refused(done, "has trained on since its final evaluation")
    record_of_run["args"]["total_timesteps"] = 300
    (folder / "args.json").write_text(json.dumps(record_of_run))
    (folder / "model.pt").rename(tmp_path / "store.pt")
    (folder / "model.pt").symlink_to(tmp_path / "store.pt")
    assert hub.main() == 2 and "a link does not count" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "no_such_name", "def main(): pass"])
def test_a_script_that_cannot_be_imported_is_one_line(run, tmp_path, monkeypatch, capsys, code):
    folder = run(quick_args()).run_dir
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setattr(sys, "argv", ["hub", str(folder), "--to", "to", "--script", "broken.py"])
    assert hub.main() == 2 and "--script broken.py: must be a training script" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_uploaded_comes_back_and_works_by_itself(tmp_path):
    with endpoint() as server:
        environment = server.environment(tmp_path / "home")
        done = script(*TOY.split(), "--upload-model", "--hf-entity", "me", cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert f"runs/{run_dir.name} is uploaded: {environment['HF_ENDPOINT']}/me/" in done.stdout
        (files,) = server.repos.values()
        assert server.repos.keys() == {"me/toys-Pendulum-like-v0-ddpg_continuous_action-seed1"}
        assert files["best_model.pt"] == (run_dir / "best_model.pt").read_bytes()

        # Once more: what an earlier upload had, and this one has not, goes.
        files |= {"best_model.onnx": b"old", "events.out.tfevents.old": b"old", "replay.mp4": b"old", "mine.txt": b"mine"}
        done = script("--evaluate", str(run_dir), "--upload-model", cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert not {"best_model.onnx", "events.out.tfevents.old", "replay.mp4"} & files.keys() and "mine.txt" in files
        assert files["evaluate.json"] == (run_dir / "evaluate.json").read_bytes()

        (repo,) = server.repos
        download = f"import huggingface_hub; huggingface_hub.snapshot_download({repo!r}, local_dir='policy')"
        subprocess.run([sys.executable, "-c", download], cwd=tmp_path, env=os.environ | environment, check=True)
    policy = tmp_path / "policy"
    assert {name: (policy / name).read_bytes() for name in files} == files
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "ddpg_continuous_action.py", "--evaluate", "."]
    done = subprocess.run(command, cwd=policy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads((policy / name).read_text())["returns"] for name in ("evaluation.json", "evaluate-2.json")]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("refuses", ["create", "commit"])
def test_a_failed_upload_loses_nothing_and_says_how_to_repeat_it(tmp_path, refuses):
    with endpoint() as server:
        server.refuses = refuses
        environment = server.environment(tmp_path / "home")
        done = script(*TOY.split(), "--upload-model", "--hf-entity", "me", cwd=tmp_path, **environment)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert "403" in line and (run_dir / "evaluation.json").exists()
        server.refuses = None
        again = shlex.split(line.split("to try again: ")[1])
        assert again == ["python", "-m", "steadyrl.hub", str(run_dir), "--hf-entity", "me"]
        places = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, *again[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment | places, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not (run_dir / "evaluate.json").exists()  # it is not evaluated again
        (files,) = server.repos.values()
        assert files["best_model.pt"] == (run_dir / "best_model.pt").read_bytes()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--no-save-model", "--no-save-model"),
        ("--exp-name a..b", "a..b"),
        (f"--exp-name {'long' * 30}", "96"),
        ("--hf-entity me/too", "me/too"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_training(tmp_path, monkeypatch, flags, word):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    refused(main_in_this_process("--upload-model", *flags.split(), cwd=tmp_path), "--upload-model", word)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_tracked_is_uploaded_where_wandb_is_not_installed(run, monkeypatch, capsys):
    folder, uploaded = run(quick_args()).run_dir, []
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(record | {"args": record["args"] | {"track": True}}))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *package: None if name == "wandb" else find(name, *package))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(hub, "upload", lambda args, name, run_dir: uploaded.append(run_dir))
    monkeypatch.setattr(sys, "argv", ["hub", str(folder)])
    assert hub.main() == 0 and uploaded == [folder], capsys.readouterr().err


def test_a_missing_package_or_token_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(main_in_this_process("--upload-model", cwd=tmp_path), "--upload-model", "HF_TOKEN")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(main_in_this_process("--upload-model", cwd=tmp_path), "--upload-model", "pip install huggingface_hub safetensors")
    assert not list(tmp_path.iterdir())
