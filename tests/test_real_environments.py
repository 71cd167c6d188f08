"""Environments of other packages: train, kill, resume bit-identical, evaluate, film.

Those of tests/requirements-environments.txt work with the MuJoCo of requirements.txt; dm_control needs an older one, and so a
virtual environment of its own (tests/requirements-dm-control.txt). `.ci/run` makes both. What is not installed is skipped.
"""

from importlib.metadata import version

import pytest
from fingerprint import fingerprint
from helpers import quick_args
from test_arguments import script
from test_end_to_end import egl_renders
from test_resume import only_run, run_killed

from steadyrl import checks

TASKS = {  # and how a running episode comes back
    "gymnasium_robotics:PointMaze_UMaze-v3": "plain",  # a Dict of observations
    "gymnasium_robotics:AdroitHandDoor-v1": "plain",
    "panda_gym:PandaReach-v3": "cut",  # a Dict, over PyBullet; its task has a generator of its own
    "highway_env:parking-v0": "plain",  # a Dict, and a road that is built anew at each reset
    "shimmy:dm_control/cartpole-balance-v0": "plain",  # a Dict, and a NumPy RandomState
}
SHORT = (
    "--total-timesteps 90 --learning-starts 30 --buffer-size 64 --batch-size 16 --hidden-sizes 16 16 --no-cuda "
    "--max-episode-steps 12 --checkpoint-frequency 25 --eval-frequency 45 --eval-episodes 1"
)


def skip_what_is_not_installed(env_id: str) -> None:
    pytest.importorskip(env_id.split(":")[0])
    if "dm_control" in env_id and version("mujoco") >= "4":
        pytest.skip("dm_control 1.0.50 needs MuJoCo below 4")


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASKS)
def test_it_trains_is_killed_comes_back_and_is_filmed(tmp_path, env_id):
    skip_what_is_not_installed(env_id)
    arguments = f"--env-id {env_id} {SHORT}".split()
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder, moment in zip(folders, (0, 68), strict=True):
        folder.mkdir()
        done = run_killed(folder, "step", moment, *arguments)
        assert done.returncode == (-9 if moment else 0), done.stderr
    whole, killed = map(only_run, folders)
    done = script("--resume", str(killed), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("did not come back" in done.stdout) == (TASKS[env_id] == "cut")
    assert TASKS[env_id] == "cut" or fingerprint(killed) == fingerprint(whole)
    if not egl_renders():
        pytest.skip("everything but the film passed (no EGL: apt-get install libegl1 libgl1)")
    done = script("--evaluate", str(whole), "--capture-video", cwd=tmp_path, DISPLAY="", WAYLAND_DISPLAY="")
    assert done.returncode == 0, done.stderr
    (video,) = (tmp_path / "videos" / whole.name).iterdir()
    assert video.stat().st_size > 1000


@pytest.mark.parametrize("env_id", TASKS)
def test_it_comes_back_by_a_replay(env_id):
    skip_what_is_not_installed(env_id)
    assert checks.check(quick_args(env_id=env_id, episode_replay="auto")) == (TASKS[env_id], False)
