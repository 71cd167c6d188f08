"""A sweep runs what is asked for, once, and goes on after whatever ended it; on this machine and on a real SLURM."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fingerprint import fingerprint
from helpers import ROOT
from one_node_slurm import jobs_of_slurm, wait_for

from steadyrl import checks, sweep

QUICK = ROOT / "tests" / "quick_script.py"
SCRIPT = ROOT / "ddpg_continuous_action.py"
FLAGS = (
    "--total-timesteps 600 --learning-starts 100 --batch-size 16 --buffer-size 1000 --hidden-sizes 16 16 --no-cuda "
    "--eval-frequency 200 --eval-episodes 1 --final-episodes 2 --checkpoint-frequency 50"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working directory of its own and gets its signal handlers back; processes find the package and the toy
    environments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    sweep.LOGS.mkdir(parents=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def quick_job(does: str, seed: int = 1, name: str = "quick") -> sweep.Job:
    """A run of the stand-in for a script."""
    args = {"env_id": "Env-v0", "exp_name": name, "seed": seed, "total_timesteps": 10, "does": does}
    return sweep.Job(QUICK, [json.dumps(args)], args)


def write_run(job: sweep.Job, time: int = 1, finished: bool = False, **changes) -> Path:
    """A run folder of this job as its script would write it."""
    run = Path("runs", f"{job.name}__{time}")
    (run / "checkpoints").mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"args": job.args | changes}))
    os.utime(run / "args.json", (time, time))
    if finished:
        (run / "evaluation.json").write_text(json.dumps({"mean": 1.5, "global_step": job.args["total_timesteps"], "date": ""}))
    return run


def started() -> list[int]:
    """The process numbers of the scripts that were started."""
    return [int(line) for line in Path("started").read_text().splitlines()] if Path("started").exists() else []


def command(*words: str | Path) -> list[str]:
    """The words of a sweep of the real script over two seeds."""
    settings = f"quick={FLAGS}"
    return [sys.executable, "-m", "steadyrl.sweep", "--script", str(SCRIPT), "--settings", settings, *map(str, words)]


def fingerprints(folder: Path) -> dict[str, dict[str, str]]:
    """The sums of all that the finished runs of a sweep leave, by their names without the time."""
    runs = [path.parent for path in folder.glob("runs/*/evaluation.json")]
    return {run.name.rpartition("__")[0]: fingerprint(run) for run in runs}


def main(monkeypatch, *words: str) -> int:
    """The command line, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--script", str(SCRIPT), *words])
    return sweep.main()


# What is asked for


def test_the_table_makes_nothing_in_a_folder_without_runs(monkeypatch, capsys):
    shutil.rmtree("runs")
    assert main(monkeypatch, "--env-ids", "Pendulum-v1", "--status", "--engine", "local") == 0
    assert "3 new" in capsys.readouterr().out and list(Path.cwd().iterdir()) == []


def test_a_run_whose_arguments_cannot_be_read_is_named(monkeypatch, capsys):
    folder = Path("runs/Pendulum-v1__ddpg_continuous_action__1__0")
    folder.mkdir(parents=True)
    for text in ('{"args": {"see', "[" * 100_000):
        (folder / "args.json").write_text(text)
        assert main(monkeypatch, "--env-ids", "Pendulum-v1", "--status", "--engine", "local") == 0
        assert f"warning: {folder}/args.json cannot be read, so this run is not counted" in capsys.readouterr().out


def test_a_sweep_is_environments_times_settings_times_seeds():
    options = sweep.Options(env_ids=("Pendulum-v1", "Hopper-v4"), settings=("a=--tau 0.01", "b=--gamma 0.5", ""), seeds=(4, 7))
    jobs = sweep.plan(options)
    assert len(jobs) == len({job.log for job in jobs}) == 12
    job = next(job for job in jobs if job.name == "Hopper-v4__ddpg_continuous_action-b__7")
    assert (job.args["gamma"], job.args["tau"], job.args["hidden_sizes"]) == (0.5, 0.005, [256, 256])
    assert job.flags == shlex.split("--gamma 0.5 --env-id Hopper-v4 --exp-name ddpg_continuous_action-b --seed 7")
    assert {job.args["exp_name"] for job in jobs} == {f"ddpg_continuous_action{end}" for end in ("", "-a", "-b")}


def test_cleanrls_names_for_seeds_are_understood():
    options = sweep.Options(env_ids=("Pendulum-v1",), num_seeds=3, start_seed=5)
    assert [job.args["seed"] for job in sweep.plan(options)] == [5, 6, 7]


@pytest.mark.parametrize(
    "words, part",
    [
        ("--settings good= bad='--critic-los huber'", "--critic-los"),
        ("--settings good= bad='--tau 2'", "--tau 2.0: must be"),
        ("--settings bad='--tau \"0.1'", "No closing quotation"),
        ("--settings 'b d=--tau 0.1'", "--exp-name"),
        ("--settings a= a='--tau 0.1'", "--settings: each must have a different name"),
        ("--settings a='--seed 3'", "--seed is not for a setting"),
        ("--settings a='--resume runs/x'", "--resume is not for a setting"),
        ("--env-ids Pendulum-v1 Pendulun-v1", "Pendulun"),
        ("--env-ids CartPole-v1", "CartPole-v1: its actions are"),
        ("--seeds 1 -1", "--seed -1: must be"),
        ("--workers 0", "--workers 0: must be"),
        ("--partition long", "--partition long: is for SLURM only"),
        ("--settings", "--settings: must name at least one"),
        ("--settings a='--replay hindsight'", "--replay hindsight: --env-id Pendulum-v1 does not fit it"),
        ("--settings a='--init-from nowhere'", "--init-from nowhere: must hold"),
        ("--settings a='--accelerate cudagraph --no-cuda'", "--accelerate cudagraph: needs"),
        ("--settings a='--upload-model'", "--upload-model: needs a token"),
        ("--settings huber", "--settings huber: must be NAME=FLAGS"),
        ("--engine slurn", "--engine"),
        ("--script nowhere.py", "--script nowhere.py: must be a training script"),
        ("--script flat.py", "--script flat.py: must be a training script"),
        ("--script few_flags.py", "--script few_flags.py: must be a training script"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(monkeypatch, capsys, words, part):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("flat.py").write_text("import dataclasses\n@dataclasses.dataclass\nclass Args:\n    seed: int = 1\n")
    Path("few_flags.py").write_text(
        "import dataclasses\nfrom steadyrl.arguments import Experiment\n"
        "@dataclasses.dataclass\nclass Args(Experiment):\n    pass\n"
    )
    known = [] if "--env-ids" in words else ["--env-ids", "Pendulum-v1"]
    known += [] if "--engine" in words else ["--engine", "local"]
    assert main(monkeypatch, *known, *shlex.split(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(r"error: .*\n", printed.err) and part in printed.err
    assert os.listdir("runs") == [".sweep"] and os.listdir(sweep.LOGS) == []


@pytest.mark.parametrize(("stderr", "said"), [(None, "returned non-zero exit status 1"), ("no controller", "no controller")])
def test_a_program_that_fails_is_named(monkeypatch, capsys, stderr, said):
    failed = subprocess.CalledProcessError(1, ["scontrol"], stderr=stderr)
    monkeypatch.setattr(sweep, "read_queue", lambda patience: (_ for _ in ()).throw(failed))
    assert main(monkeypatch, "--env-ids", "Pendulum-v1", "--engine", "slurm") == 2
    assert said in capsys.readouterr().err


def test_an_environment_may_lie_in_the_working_directory(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_envs.py").write_text("import gymnasium as gym\ngym.register('Own-v0', lambda **_: gym.make('Pendulum-v1'))\n")
    assert main(monkeypatch, "--engine", "local", "--env-ids", "own_envs:Own-v0", "--num-seeds", "1", "--status") == 0
    monkeypatch.setattr(sweep, "sweep", lambda jobs, options: len(jobs))
    assert main(monkeypatch, "--engine", "local", "--env-ids", "own_envs:Own-v0", "--num-seeds", "3") == 3


def test_environments_are_checked_once_for_many_seeds_and_not_for_a_table(monkeypatch):
    checked = Counter()
    monkeypatch.setattr(checks, "check", lambda args: checked.update([args.env_id]))
    options = sweep.Options(env_ids=("A-v0", "B-v0"), num_seeds=100, settings=("a=", "b="))
    assert len(sweep.plan(options)) == 400 and checked == {"A-v0": 2, "B-v0": 2}
    options.status = True
    sweep.plan(options)
    assert checked.total() == 4


def test_a_table_needs_no_script_if_nothing_has_changed(monkeypatch, capsys):
    """Importing a script takes seconds. Asked for something else, or after a change of the script, it is imported."""
    plans, plan = [], sweep.plan
    monkeypatch.setattr(sweep, "plan", lambda options: plans.append(options) or plan(options))

    def table(plans_until_then: int, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--script", "own.py", "--status", "--engine", "local", *words])
        assert sweep.main() == 0 and len(plans) == plans_until_then
        return capsys.readouterr().out

    shutil.copy(SCRIPT, "own.py")
    assert table(1) == table(1) and table(1).count("Hopper-v4__own__") == 3
    assert table(2, "--num-seeds", "2") == table(2, "--num-seeds", "2", "--workers", "5") != table(3)
    os.utime("own.py", (1, 1))
    table(4)
    sweep.PLAN.write_text("{")  # another sweep is writing it
    table(5)


def test_without_importing_a_script_there_is_no_torch():
    code = "import sys, steadyrl.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_script_is_found_by_its_name_or_by_its_path(folder, monkeypatch):
    """One's own is found from wherever its path leads to it, and can import what is beside it. Jobs have its absolute path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "mine").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "mine" / "beside_it.py").write_text("GAMMA = 0.25\n")
    own = SCRIPT.read_text().replace("gamma: Discount = 0.99", "gamma: Discount = __import__('beside_it').GAMMA")
    (folder / "mine" / "my_algo.py").write_text(own)
    for place, path in (("elsewhere", "../mine/my_algo.py"), ("mine", "my_algo.py")):
        monkeypatch.chdir(folder / place)
        job = sweep.plan(sweep.Options(script=Path(path), env_ids=("Pendulum-v1",)))[0]
        assert job.script == folder / "mine" / "my_algo.py" and job.args["gamma"] == 0.25 and job.args["exp_name"] == "my_algo"
    job = sweep.plan(sweep.Options(script=Path("dqn.py"), env_ids=("CartPole-v1",)))[0]
    assert job.script == ROOT / "dqn.py"


def test_a_script_needs_no_object_named_main(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("no_main.py").write_text(SCRIPT.read_text().replace("main = command_line", "start = command_line"))
    assert len(sweep.plan(sweep.Options(script=Path("no_main.py"), env_ids=("Pendulum-v1",)))) == 3


def test_ctrl_c_while_nothing_runs_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "plan", lambda options: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(monkeypatch, "--engine", "local") == 130 and capsys.readouterr() == ("", "")


# What is known of a run


def test_a_run_is_known_by_its_folder_of_equal_arguments():
    job = quick_job("finish")
    assert job.status({})[0] == "new"
    write_run(job, 3, finished=True, total_timesteps=11)
    (write_run(job, 4) / "args.json").write_text("{")
    assert job.status({})[0] == "new" and job.folder() is None
    write_run(job, 1, finished=True)
    assert job.status({})[0] == "finished"
    newest = write_run(job, 2)
    assert job.status({})[0] == "interrupted" and job.folder() == newest
    assert job.status({job.log.name: "queued"})[0] == "queued"


def test_a_sweep_of_the_version_before_goes_on():
    """Its runs have flags that the script no longer has, and lack a newer one. One of these flags changed what was learned."""
    jobs = sweep.plan(sweep.Options(env_ids=("Pendulum-v1",), status=True))
    before: dict[str, Any] = {"num_critics": 1, "policy_noise": 0.0, "noise_clip": 0.5, "expectile": 0.7}
    runs = [
        write_run(jobs[0], finished=True, **before),
        write_run(jobs[1], **before),
        write_run(jobs[2], finished=True, **before | {"num_critics": 2}),
    ]
    for path in (run / "args.json" for run in runs):
        saved = json.loads(path.read_text())
        del saved["args"]["worker_timeout"]
        path.write_text(json.dumps(saved))
    assert [job.status({})[0] for job in jobs] == ["finished", "interrupted", "new"]
    assert jobs[0].start() == "finished" and jobs[1].command(jobs[1].folder())[2:] == ["--resume", str(runs[1])]
    (job, *_) = sweep.plan(sweep.Options(env_ids=("Pendulum-v1",), settings=("=--worker-timeout 9",), status=True))
    assert job.status({})[0] == "new"  # the older run had the default


def test_steps_last_evaluation_and_time_left(monkeypatch):
    """Of 10 steps the last 4 need 40 seconds, since 4 to 6 took 20, and 5 of them are over."""
    job = quick_job("finish")
    run = write_run(job, 1000)
    (run / "evaluations.csv").write_text("global_step,mean,std\n")
    for step, at in ((2, 900), (4, 1010), (6, 1030)):
        path = run / "checkpoints" / f"{step:012d}.{'0' * 64}.pt"
        path.touch()
        os.utime(path, (at, at))
    monkeypatch.setattr(sweep.time, "time", lambda: 1035.0)
    assert job.status({})[1:] == (6, None, 35.0)
    (run / "evaluations.csv").write_text("global_step,mean,std\n5,-3.5,1\n7,-2.5,1\n")
    assert job.status({})[1:3] == (7, -2.5)
    os.utime(run / "args.json", (1020, 1020))  # resumed in between: the pace is not known yet
    assert job.status({})[3] is None


def test_the_table_tells_where_each_run_is(capsys):
    jobs = [quick_job("fail", 1), quick_job("finish", 2), quick_job("wait", 3)]
    assert sweep.run_here(jobs, jobs[:2], workers=1) == 1
    capsys.readouterr()
    sweep.show_table([(job, job.status({})) for job in jobs])
    printed = capsys.readouterr().out
    for row in (
        r"quick__1 +failed +0/10 +- +-",
        r"quick__2 +finished +0/10 +1\.5 +-",
        r"quick__3 +new",
        "1 failed, 1 finished, 1 new",
    ):
        assert re.search(row, printed), printed
    assert "error: it failed\nsweep: failed, with status 1" in printed


# This machine


def test_a_failing_run_is_named_with_its_last_lines_and_stops_no_other(capsys):
    jobs = [quick_job(does, seed) for seed, does in enumerate(("fail", "die", "finish", "finish"))]
    assert sweep.run_here(jobs, jobs, workers=1) == 1
    printed = capsys.readouterr().out
    assert "quick__0 failed: " in printed and "error: it failed\nsweep: failed, with status 1" in printed
    assert "a line before the end\nsweep: failed, killed by SIGKILL" in printed
    assert [job.status({})[0] for job in jobs] == ["failed", "failed", "finished", "finished"]
    folders = {job.folder() for job in jobs}
    sweep.run_here(jobs, jobs, workers=4)
    assert len(started()) == 6 and {job.folder() for job in jobs} == folders  # the failed ones again, in their folders


def test_a_run_that_somebody_else_stopped_is_not_the_success_of_a_sweep():
    job = quick_job("wait")
    Path("go").touch()

    def stop() -> None:
        wait_for(started)
        os.kill(job.started.pid, signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert sweep.run_here([job], [job], workers=1) == 1 and job.status({})[0] == "interrupted"
    stopper.join()


def test_a_script_of_ones_own_finds_the_package_in_a_clone(monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    Path("own.py").write_text("import steadyrl.errors, pathlib; pathlib.Path('found').touch()")
    job = replace(quick_job("finish"), script=Path("own.py").absolute())
    assert job.start() == "started" and job.started.wait() == 0, job.last_lines()
    assert Path("found").exists()


def test_no_more_runs_side_by_side_than_workers(monkeypatch):
    jobs, most = [quick_job("finish", seed) for seed in range(5)], []
    start = sweep.Job.start

    def counted(job):
        most.append(1 + sum(other.process is not None for other in jobs))
        return start(job)

    monkeypatch.setattr(sweep.Job, "start", counted)
    assert sweep.run_here(jobs, jobs, workers=2) == 0 and max(most) == 2 and len(most) == 5


def test_a_copy_of_a_run_is_not_taken_for_it():
    job = quick_job("end")
    run = write_run(job, finished=True)
    shutil.copytree(run, f"{run}.bak")
    (Path(f"{run}.bak") / "evaluation.json").unlink()
    os.utime(Path(f"{run}.bak") / "args.json", (9, 9))
    assert job.folder() == run and job.status({})[0] == "finished"


def test_a_run_that_was_resumed_by_hand_with_another_flag_is_still_the_run():
    job = quick_job("end")
    job.args |= {"num_threads": None}
    run = write_run(job, time=5, finished=True, num_threads=1)
    assert job.folder() == run and job.status({})[0] == "finished"
    exact = write_run(job, time=4)
    assert job.folder() == exact
    other = write_run(quick_job("other"), time=6, num_threads=1)
    assert quick_job("end").folder() not in (run, other)


def stop_when_started(scripts: int, number: int) -> None:
    """Send a signal to this process once that many scripts were started."""

    def stop():
        wait_for(lambda: len(started()) == scripts)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_has_every_run_saved_and_starts_no_other(number, capsys, monkeypatch):
    """Each script gets one SIGTERM and saves: its checkpoint is named by how many it got. A file was started, no module."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["my sweep.py", "--seeds", "3"])
    Path("go").touch()
    jobs = [quick_job("wait", seed) for seed in range(3)]
    stop_when_started(2, number)
    assert sweep.run_here(jobs, jobs, workers=2) == 128 + number
    assert "stopped, to go on: python 'my sweep.py' --seeds 3" in capsys.readouterr().out
    assert [job.status({})[:2] for job in jobs] == [("interrupted", 1), ("interrupted", 1), ("new", 0)]
    folders = [job.folder() for job in jobs[:2]]
    stop_when_started(5, number)  # the third one waits again
    sweep.run_here(jobs, jobs, workers=3)
    assert [job.status({})[0] for job in jobs] == ["finished", "finished", "interrupted"]
    assert [job.folder() for job in jobs[:2]] == folders


def test_a_second_ctrl_c_leaves_the_runs_to_their_saving(monkeypatch):
    """The second one comes when the first was answered: two at once are one signal."""
    job = quick_job("wait")
    stop_when_started(1, signal.SIGINT)
    monkeypatch.setattr(sweep, "say", lambda text: text.startswith("stopping") and os.kill(os.getpid(), signal.SIGINT))
    assert sweep.run_here([job], [job], workers=1) == 130
    again = quick_job("wait")
    assert again.status({})[0] == "running" and again.start() == "busy"
    Path("go").touch()
    wait_for(lambda: again.status({})[0] == "interrupted")
    assert again.status({})[1] == 1


def test_a_script_that_outlives_its_sweep_is_not_started_twice():
    """Nobody holds the log but the script, and it does so before it has a folder."""
    first, second = quick_job("wait"), quick_job("wait")
    assert first.start() == "started" and second.start() == "busy" and second.status({})[0] == "running"
    wait_for(started)
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.end() == "failed" and second.start() == "started" and second.end() == "finished"
    assert len(list(Path("runs").glob("Env*"))) == 1 and quick_job("wait").start() == "finished"


class Clock:
    """A clock that only sleeping moves."""

    now = 100.0
    strftime = time.strftime

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_busy_run_is_not_looked_for_all_the_time(monkeypatch):
    """Many sweeps may wait on one file system. A locked log says enough, and once a second is enough."""
    first, busy, other = quick_job("wait"), quick_job("wait"), quick_job("wait", seed=2)
    assert first.start() == "started"
    wait_for(started)
    Path("go").touch()
    monkeypatch.setattr(busy, "folder", lambda: pytest.fail("looked for"))
    starts, start, asked = Counter(), sweep.Job.start, itertools.count(1)

    def counted(job):
        starts[job.name] += 1
        return start(job)

    monkeypatch.setattr(sweep.Job, "start", counted)
    monkeypatch.setattr(sweep, "time", Clock())
    sweep.run_here([other], [busy, other], 2, lambda: next(asked) == 4)  # it asks once a second
    assert starts[other.name] == 1 and 3 <= starts[busy.name] <= 5
    os.kill(first.started.pid, signal.SIGKILL)
    first.started.wait()


def test_a_run_that_somebody_resumed_by_hand_is_let_alone():
    job = quick_job("wait")
    job.start()
    wait_for(started)
    job.log.unlink()  # what is locked now is the folder alone
    other = quick_job("wait")
    assert other.status({})[0] == "running" and other.start() == "busy"
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again_end_bit_identical(folder):
    """Both runs of the real script are inside a step when Ctrl-C is pressed in the terminal of the sweep."""
    (folder / "alone").mkdir()
    (folder / "alone" / "go").touch()
    words = command("--engine", "local", "--env-ids", "toys:Gate-v0", "--num-seeds", 2, "--workers", 2)
    alone = subprocess.Popen(words, cwd=folder / "alone", stdout=subprocess.DEVNULL)
    stopped = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(list(folder.glob("at_the_gate_*"))) == 2)
    os.killpg(stopped.pid, signal.SIGINT)
    lines = iter(stopped.stdout.readline, "")
    assert any("stopping: 2 runs" in line for line in lines)
    (folder / "go").touch()
    rest = stopped.communicate()[0]
    assert stopped.returncode == 130 and rest.count("interrupted: stopped at step") == 2
    assert "to go on: python -m steadyrl.sweep --script" in rest
    assert alone.wait() == 0
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0 and "2 interrupted" in again.stdout, again
    assert len(fingerprints(folder / "alone")) == 2
    assert fingerprints(folder) == fingerprints(folder / "alone")


# As a job of SLURM


def test_a_script_gets_no_sigusr2_and_the_job_does():
    job = quick_job("wait")
    job.start()
    wait_for(started)
    os.kill(job.process.pid, signal.SIGUSR2)
    Path("go").touch()
    job.process.terminate()
    assert job.end() == "interrupted"  # and not killed by SIGUSR2
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_before_the_time_limit_the_run_is_saved_and_queued_again():
    pytest.importorskip("submitit")
    job = quick_job("wait")
    job.start()
    wait_for(started)
    Path("go").touch()
    again = job.checkpoint().function
    assert job.process.wait() == 143 and again.status({})[1] == 1
    assert again.args == job.args and again.fruitless_starts == 0
    again()
    assert again.status({})[0] == "finished"


def test_a_limit_shorter_than_the_start_up_is_not_tried_forever():
    """A job that is saved without a step three times in a row is not queued again, and the table says why."""
    pytest.importorskip("submitit")
    job = quick_job("hang")
    Path("go").touch()
    for number in (1, 2, 3):
        job.start()
        wait_for(lambda number=number: len(started()) == number)
        again = job.checkpoint()
        job.process.wait()
        job = again.function if again else job
    job = quick_job("hang")
    assert again is None and job.status({})[0] == "failed" and "needs a longer --time" in job.last_lines()


def test_a_failing_script_fails_its_job():
    with pytest.raises(RuntimeError, match="error: it failed"):
        quick_job("fail")()


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_runs_each_job_once_and_names_what_failed(slurm, capsys, folder):
    """Five jobs are two arrays; while they are queued or running nothing is submitted again; then the failed one is."""
    Path("go").touch()
    jobs = [quick_job("fail" if seed == 4 else "finish", seed) for seed in range(5)]
    options = sweep.Options(engine="slurm", time=5, workers=1, script=QUICK)
    assert sweep.sweep(jobs, options) == 0
    printed = capsys.readouterr().out
    assert "submitted 3 jobs" in printed and "submitted 2 jobs" in printed
    sweep.sweep(jobs, options)
    assert "submitted" not in capsys.readouterr().out
    wait_for(lambda: not jobs_of_slurm())
    sweep.sweep(jobs, sweep.Options(engine="slurm", status=True))
    printed = capsys.readouterr().out
    assert "4 finished, 1 failed" in printed and "error: it failed\nsweep: failed, with status 1" in printed
    sweep.sweep(jobs, options)
    assert "submitted 1 jobs" in capsys.readouterr().out
    wait_for(lambda: not jobs_of_slurm())
    assert len(started()) == 6


@pytest.mark.slow
@pytest.mark.slurm
def test_preempted_out_of_time_and_cancelled_runs_end_bit_identical(slurm, folder):
    """Three runs of the real script, each at its 250th step, and the same command again at the end."""
    (folder / "alone").mkdir()
    (folder / "alone" / "go").touch()
    words = command("--env-ids", "toys:Gate-v0", "--num-seeds", 3)
    subprocess.run([*words, "--engine", "local"], cwd=folder / "alone", check=True, capture_output=True)
    again = [*words, "--engine", "slurm", "--time", "5"]
    subprocess.run(again, check=True, capture_output=True)
    wait_for(lambda: len(list(folder.glob("at_the_gate_*"))) == 3)
    one, other = jobs_of_slurm("running")[:2]
    subprocess.run(["scancel", "--signal=USR2", one], check=True)
    subprocess.run(["scancel", other], check=True)
    logs = Path("runs/.sweep/slurm")
    wait_for(lambda: any("Calling checkpoint" in path.read_text() for path in logs.glob("*.out")))
    wait_for(lambda: any("Bypassing signal SIGTERM" in path.read_text() for path in logs.glob("*.out")))
    preempting = ["sbatch", "--partition=high", "--cpus-per-task=4", "--output=/dev/null", "--wrap=true"]
    subprocess.run(preempting, check=True, capture_output=True)
    (folder / "go").touch()
    wait_for(lambda: not jobs_of_slurm())
    table = subprocess.run([*again, "--workers", "1"], check=True, capture_output=True, text=True).stdout
    assert "2 finished" in table and "1 interrupted" in table and "submitted 1 jobs" in table, table
    wait_for(lambda: not jobs_of_slurm())
    assert len(fingerprints(folder / "alone")) == 3
    assert fingerprints(folder) == fingerprints(folder / "alone")
