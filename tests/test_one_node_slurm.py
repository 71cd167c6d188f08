"""The SLURM of the tests disturbs no other one, and leaves nothing behind."""

import os
import subprocess

import psutil
import pytest
from one_node_slurm import ask_slurm, jobs_of_slurm, missing, one_node_slurm, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"{', '.join(missing())} not found: apt-get install slurm-wlm munge"),
]


def processes_of(folder) -> list[psutil.Process]:
    """The living processes whose command line or environment names this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        text = str(process.info["cmdline"]) + str(process.info["environ"])
        if process.pid != os.getpid() and str(folder) in text and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_two_beside_one_another(tmp_path):
    """A job of the second one ignores every signal that it can; the first one never knows of it."""
    words = ["sbatch", "--output=/dev/null", "--wrap", "trap '' TERM INT HUP USR2; while :; do sleep 1; done"]
    with one_node_slurm(tmp_path / "first"):
        with one_node_slurm(tmp_path / "second"):
            subprocess.run(words, check=True, capture_output=True, timeout=60)
            wait_for(lambda: jobs_of_slurm("running"))
        assert processes_of(tmp_path / "second") == []
        assert jobs_of_slurm() == [] and "idle" in ask_slurm("sinfo", "-h", "-o", "%T")
    assert processes_of(tmp_path) == []


def test_an_error_inside_ends_it(tmp_path):
    before = os.environ.get("SLURM_CONF")
    with pytest.raises(ZeroDivisionError), one_node_slurm(tmp_path / "slurm"):
        raise ZeroDivisionError
    assert processes_of(tmp_path) == [] and os.environ.get("SLURM_CONF") == before
