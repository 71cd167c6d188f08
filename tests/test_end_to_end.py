"""The script as its users run it: a real Hopper-v4, real event files, a real Weights and Biases client, real videos."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import scalars
from test_arguments import script

HOPPER = "--env-id Hopper-v4 --total-timesteps 1200 --learning-starts 1000 --buffer-size 2000 --eval-episodes 2".split()


@pytest.mark.slow
def test_hopper_from_the_command_line(tmp_path):
    done = script(*HOPPER, "--eval-frequency", "500", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()

    lines = done.stdout.splitlines()
    assert lines[0] == "no CUDA device found, using the CPU"
    assert f"runs/{folder.name}" in lines[1]
    assert [line.split(":")[0] for line in lines[2:5]] == ["step 500", "step 1000", "step 1200"]
    assert lines[5].startswith("final evaluation: ") and all(line.startswith("to ") for line in lines[6:])
    assert "\r" not in done.stdout + done.stderr  # no progress bar in a log
    assert done.stderr.count("out of date") == 0

    events = scalars(folder)
    assert {tag for tag in events if tag.startswith("eval/")} == {
        "eval/episodic_return",
        "eval/episodic_return_std",
        "eval/episodic_length",
        "eval/q_bias",
        "eval/final_return",
        "eval/best_return",
    }
    assert {tag for tag in events if tag.startswith("charts/")} == {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/SPS",
        "charts/exploration_noise",
        "charts/updates",
        "charts/replay_size",
    }
    for name in ("q_est", "q_loss", "actor_loss"):
        assert [step for step, _ in events[f"losses/{name}"]] == [1100, 1200]
    assert [step for step, _ in events["charts/updates"]] == list(range(100, 1201, 100))
    assert [step for step, _ in events["charts/SPS"]] == [1100, 1200]
    lengths = [length for _, length in events["charts/episodic_length"]]
    ends = [step for step, _ in events["charts/episodic_length"]]
    assert ends == [sum(lengths[: number + 1]) for number in range(len(lengths))]

    rows = list(csv.DictReader((folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [500, 1000, 1200]
    weights = torch.load(folder / "model.pt", weights_only=True)["critic"]
    assert weights["hidden.0.weight"].shape == (256, 11 + 3)

    again = script("--evaluate", str(folder), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    results = [json.loads((folder / name).read_text()) for name in ("evaluation.json", "evaluate.json")]
    assert results[0]["returns"] == results[1]["returns"]
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()


@pytest.mark.slow
def test_a_deprecated_model_attribute_is_said_once_and_not_logged_to_a_file(tmp_path):
    """HalfCheetah-v4's model makes MuJoCo warn each time an environment is built, here three times."""
    arguments = [*HOPPER, "--eval-frequency", "0", "--num-envs", "2", "--env-id", "HalfCheetah-v4", "--save-model"]
    arguments += ["--max-episode-steps", "50"]
    arguments[arguments.index("1200")] = "1010"
    done = script(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: MuJoCo: compiler attribute") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def egl_renders() -> bool:
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).render()"
    return (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"MUJOCO_GL": "egl"}, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or not egl_renders(), reason="no EGL: apt-get install libegl1 libgl1")
def test_videos_on_a_machine_without_a_display(tmp_path):
    """InvertedPendulum's episodes are short: the 0th and the 20th are filmed, and the first of the final evaluation."""
    arguments = "--env-id InvertedPendulum-v5 --total-timesteps 160 --learning-starts 150 --batch-size 16 --eval-frequency 0"
    done = script(*arguments.split(), "--capture-video", cwd=tmp_path, DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    videos = tmp_path / "videos" / folder.name
    training = len(scalars(folder)["charts/episodic_return"])
    expected = {f"training-episode-{number}.mp4" for number in range(0, training + 1, 20)} | {"evaluation-episode-0.mp4"}
    assert {path.name for path in videos.iterdir()} == expected
    assert all(path.stat().st_size > 1000 for path in videos.iterdir())
    assert "Overwriting" not in done.stderr

    done = script("--evaluate", str(folder), cwd=tmp_path, DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 0 and {path.name for path in videos.iterdir()} == expected, done.stderr

    done = script("--evaluate", str(folder), "--capture-video", cwd=tmp_path, DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 0, done.stderr
    (film,) = {path.name for path in videos.iterdir()} - expected
    assert film.startswith("evaluate-") and film.endswith("-episode-0.mp4")
    assert f"filmed in videos/{folder.name}" in done.stdout


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path):
    """The offline run's own record holds our configuration and what TensorBoard got."""
    arguments = (
        "--env-id toys:Pendulum-like-v0 --total-timesteps 300 --learning-starts 100 --batch-size 16 --eval-frequency 100"
    )
    done = script(*arguments.split(), "--track", cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for expected in (folder.name, "exploration_noise", "losses/q_loss", "eval/q_bias", "charts/episodic_return"):
        assert expected.encode() in content, expected
