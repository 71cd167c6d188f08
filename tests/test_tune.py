"""Tuning: what is tried, what a trial is worth, and that nothing is lost whoever is killed."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT
from one_node_slurm import is_gone, jobs_of_slurm, wait_for

from steadyrl import family, sweep

optuna = pytest.importorskip("optuna")
from steadyrl import tune  # noqa: E402

TOY = ROOT / "tests" / "toy_script.py"
SPACE = '[toy_script]\nx = { low = 0.0, high = 1.0 }\ny = ["left", "right"]\n'
TRIAL = optuna.trial.TrialState


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working directory of its own, with a search space in it; processes find the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("space.toml").write_text(SPACE)
    return tmp_path


def toy_options(**changes) -> tune.Options:
    """Options of tuning the stand-in for a script."""
    values: dict[str, Any] = {"script": TOY, "space": Path("space.toml"), "num_seeds": 2, "trials": 2, "engine": "local"}
    return tune.Options(**(values | changes))


def command(*words: str) -> list[str]:
    """The words of tuning it on the command line."""
    return [sys.executable, *f"-m steadyrl.tune --script {TOY} --space space.toml --num-seeds 2".split(), *words]


def main(monkeypatch, *words: str) -> int:
    """The command line, without a process of its own."""
    monkeypatch.setattr(sys, "argv", command(*words)[2:])
    return sweep.main(tune.Options, tune.tune)


def started() -> list[tuple[str, int]]:
    """Names and process numbers of the runs that were started."""
    lines = Path("started").read_text().splitlines() if Path("started").exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def value(x: float, y: str) -> float:
    """The mean return of the stand-in over seeds 11 and 12."""
    return -((x - 0.7) ** 2) - (y == "left") + 0.0005


# What is asked for


@pytest.mark.parametrize(
    "words, space, part",
    [
        ("--seeds 11 2", SPACE, "--seeds [11, 2]: must be none of 1 to 3"),
        ("--start-seed 3", SPACE, "--seeds [3, 4]: must be none of 1 to 3"),
        ("--env-ids Pendulum-v1 Pendulum-v1 MountainCarContinuous-v0", SPACE, "one environment"),
        ("--settings a= b=", SPACE, "--settings: must be one environment and one setting"),
        ("--settings", SPACE, "--settings: must name at least one"),
        ("", "[toy_script]\n", "is empty"),
        ("--settings a='--z 1'", SPACE, "--z"),
        ("--settings a='--eval-frequency 0'", SPACE, "--eval-frequency 0: must be 1 or more"),
        ("--settings a='--target-return 5'", SPACE, "--target-return 5.0: must be left out"),
        ("", "[toy_script]\ntarget_return = [5.0, 6.0]", "target_return must be left out"),
        ("--trials 0", SPACE, "--trials 0: must be a whole number, 1 or more"),
        ("", "[toy_script]\nseed = [11]", "seed must be left out"),
        ("", "[toy_script]\neval_frequency = [0, 5]", "eval_frequency must be left out"),
        ("--space nowhere.toml", SPACE, "--space nowhere.toml, table [toy_script]: "),
        ("", "[other]\nx = [1]", "table [toy_script]: is missing"),
        ("", "[toy_script]\nx = [1", "table [toy_script]: "),
        ("", "[toy_script]\nz = [1]", "--z"),
        ("", '[toy_script]\ny = ["left", "up"]', "up"),
        ("", "[toy_script]\nbatch_size = { low = 0, high = 5 }", "--batch-size"),
        ("", "[toy_script]\nx = { low = 2.0, high = 1.0 }", "low"),
        ("", "[toy_script]\nx = { low = 2.0 }", "high"),
        ("", "[toy_script]\nx = 3", "table [toy_script]: "),
        ("", "[toy_script]\nepisodes = [1]", "--episodes must be a flag"),
        ("", "[toy_script]\n'x=0.1 --y' = ['left']", "--x=0.1 --y must be a flag"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(monkeypatch, capsys, words, space, part):
    Path("space.toml").write_text(space)
    assert main(monkeypatch, "--engine", "local", *shlex.split(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(r"error: .*\n", printed.err) and part in printed.err
    assert not Path("runs").exists()


def test_optuna_is_asked_for_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(monkeypatch) == 2
    assert re.fullmatch(r"error: .*optuna.*pip install optuna\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, env_id", [(script, "CartPole-v1" if script == "dqn" else "Pendulum-v1") for script in family.SCRIPTS]
)
def test_the_search_space_fits_every_script_and_begins_with_its_own_setting(script, env_id):
    """Each value of it is a command line that the script takes; none of the defaults lies outside."""
    tuner = tune.Tuner(tune.Options(script=ROOT / f"{script}.py", env_ids=(env_id,), engine="local"))
    trial = tuner.take()
    (job, *_) = tuner.jobs("first", {name: trial._suggest(name, kind) for name, kind in tuner.space.items()})
    for name in tuner.args.keys() - {"seed", "exp_name"}:
        own = tuner.args["learning_rate" if name in ("actor_learning_rate", "critic_learning_rate") else name]
        assert job.args[name] == own, name


def test_a_flag_may_be_written_as_on_the_command_line(tmp_path):
    space = tmp_path / "hyphens.toml"
    space.write_text("[dqn]\nlearning-rate = { low = 1e-5, high = 1e-2, log = true }\n")
    tuner = tune.Tuner(tune.Options(script=ROOT / "dqn.py", env_ids=("CartPole-v1",), space=space, engine="local"))
    assert tuner.take()._suggest("learning_rate", tuner.space["learning_rate"]) == tuner.args["learning_rate"] == 2.5e-4


def test_a_flag_without_a_value_is_in_no_space(capsys):
    Path("space.toml").write_text("[toy_script]\nmax_episode_steps = [50, 100]")
    tuner = tune.Tuner(toy_options())
    assert "does not contain the script's own --max-episode-steps None" in capsys.readouterr().out
    assert not tuner.study.get_trials()


@pytest.mark.slow
def test_another_space_setting_or_seeds_are_another_study():
    names = {tune.Tuner(toy_options(**changes)).name for changes in ({}, {"num_seeds": 3}, {"settings": ("a=--fail",)})}
    Path("space.toml").write_text(SPACE.replace("0.0", "0.5"))
    names.add(tune.Tuner(toy_options()).name)
    assert len(names) == 4 and tune.Tuner(toy_options(trials=7, workers=9)).name in names


# Trials


def tuner_with(trials: list[float], **changes) -> tune.Tuner:
    """A tuner after trials of these returns, at each evaluation, that were completed before."""
    tuner = tune.Tuner(toy_options(trials=1 + len(trials), **changes))
    for each in trials:
        curve = dict.fromkeys((10, 20, 30, 40), each)
        params = {"x": 0.5, "y": "left"}
        tuner.study.add_trial(
            optuna.create_trial(params=params, distributions=tuner.space, value=each, intermediate_values=curve)
        )
    return tuner


@pytest.mark.slow
def test_a_trial_below_the_median_is_stopped_and_pruned():
    """It would wait for ever after its second evaluation."""
    tuner = tuner_with([0.0] * 5, settings=("hold=--hold",))
    assert tuner.train(tuner.take()) == 0
    trial = tuner.study.trials[0]
    assert trial.state == TRIAL.PRUNED and trial.intermediate_values == pytest.approx(
        {10: value(0, "left"), 20: value(0, "left")}
    )
    assert len(started()) == 2 and not any(psutil.pid_exists(pid) for _, pid in started())


def test_a_trial_whose_worker_was_killed_before_it_was_pruned_is_pruned():
    tuner = tuner_with([0.0] * 5)
    trial = tuner.take()
    trial.report(-9.0, 20)
    assert tuner.train(tuner.take()) == 0 and tuner.study.trials[0].state == TRIAL.PRUNED


def test_a_worker_on_a_node_without_sbatch_knows_that_it_is_on_slurm(monkeypatch):
    planned: list[sweep.Job] = []
    monkeypatch.setattr("shutil.which", lambda program: "/bin/sbatch")
    monkeypatch.setattr(sweep, "sweep", lambda jobs, options: planned.extend(jobs) or 0)
    assert main(monkeypatch, "--partition", "long", "--trials", "1") == 0
    monkeypatch.setattr("shutil.which", lambda program: None)
    options = sweep.parse_args(tune.Options, planned[0].flags, tune.Options())
    assert options.worker and sweep.uses_slurm(options)


@pytest.mark.slow
def test_a_trial_above_the_median_is_worth_the_mean_over_seeds():
    tuner = tuner_with([-9.0] * 5)
    assert tuner.train(tuner.take()) == 0
    trial = tuner.study.trials[0]
    assert trial.state == TRIAL.COMPLETE and trial.value == pytest.approx(value(0, "left"))
    assert {name for name, _ in started()} == {f"Pendulum-v1__toy_script-{tuner.name}-0__{seed}" for seed in (11, 12)}


@pytest.mark.slow
def test_a_trial_whose_runs_fail_is_over_and_the_next_one_comes(capsys):
    tuner = tune.Tuner(toy_options(settings=("fail=--fail",)))
    assert tuner.train(tuner.take()) == tuner.train(tuner.take()) == 1
    assert [trial.state for trial in tuner.study.trials] == [TRIAL.FAIL] * 2 and tuner.take() is None
    assert "error: it failed" in capsys.readouterr().out


def test_a_trial_is_one_workers_until_that_is_gone():
    first, second = tune.Tuner(toy_options()), tune.Tuner(toy_options())
    one, other = first.take(), second.take()
    assert (one.number, other.number) == (0, 1) and tune.Tuner(toy_options()).take() is None
    params = {name: one._suggest(name, kind) for name, kind in first.space.items()}
    first.lock.release()  # as the system does for a process that is killed
    third = tune.Tuner(toy_options())
    again = third.take()
    assert third.take().number == 0  # somebody stopped its scripts: it goes on with it
    assert again.number == 0 and {name: again._suggest(name, kind) for name, kind in first.space.items()} == params


# The command line


@pytest.mark.slow
def test_a_search_with_a_known_answer_ends_with_the_command_that_trains_it():
    words = command("--engine", "local", "--trials", "24", "--workers", "2", "--num-seeds", "1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done
    best = shlex.split(done.stdout.splitlines()[-1])
    x, y = float(best[best.index("--x") + 1]), best[best.index("--y") + 1]
    assert abs(x - 0.7) < 0.2 and y == "right"
    subprocess.run([sys.executable, *best[1:]], check=True, timeout=600)
    assert started()[-1][0] == "Pendulum-v1__toy_script-tuned__1" and len(started()) == 24 + 1
    again = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1] and len(started()) == 24 + 1


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the worker", "the worker and its scripts", "Ctrl-C"])
def test_the_same_command_again_takes_a_trial_up(who):
    """A trial of two runs is in the middle; nothing of it is started twice that still runs, and nothing is lost."""
    words = command("--engine", "local", "--trials", "2", "--workers", "1", "--settings", "hold=--hold")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as tuning:
        wait_for(lambda: len(list(Path("runs").glob("*/checkpoints/*20.0*.pt"))) == 2)
        (worker,) = [child for child in psutil.Process(tuning.pid).children() if "--worker" in child.cmdline()]
        folders, scripts = sorted(Path("runs").glob("*-0__*")), [psutil.Process(pid) for _, pid in started()]
        if who == "Ctrl-C":
            tuning.send_signal(signal.SIGINT)
        else:
            worker.kill()
            for script in scripts if "scripts" in who else ():
                script.kill()
        printed = tuning.communicate(timeout=300)[0]
    assert tuning.returncode == (130 if who == "Ctrl-C" else 1)
    assert "to go on: python -m steadyrl.tune --script" in printed if who == "Ctrl-C" else "killed by SIGKILL" in printed
    if who == "the worker":
        assert not any(map(is_gone, scripts))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as tuning:
            wait_for(lambda: "--worker" in str([child.cmdline() for child in psutil.Process(tuning.pid).children()]))
            Path("go").touch()
            printed = tuning.communicate(timeout=300)[0]
    else:
        wait_for(lambda: all(map(is_gone, scripts)))
        Path("go").touch()
        printed = subprocess.run(words, capture_output=True, text=True, timeout=300).stdout
    assert "2 trials: 2 complete" in printed
    names = [name for name, _ in started()]
    again = 0 if who == "the worker" else 2
    assert len(set(names)) == 4 and len(names) == 4 + again and sorted(Path("runs").glob("*-0__*")) == folders


@pytest.mark.slow
@pytest.mark.slurm
def test_workers_on_slurm(slurm):
    """Two workers, of which one is warned of its time limit and one cancelled; then the same command again."""
    words = command("--engine", "slurm", "--trials", "4", "--workers", "2", "--time", "5", "--settings", "hold=--hold")
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    wait_for(lambda: len(list(Path("runs").glob("*/checkpoints/*20.0*.pt"))) == 4)
    one, other = jobs_of_slurm("running")
    subprocess.run(["scancel", "--signal=USR2", one], check=True, timeout=60)
    subprocess.run(["scancel", other], check=True, timeout=60)
    wait_for(lambda: not any(psutil.pid_exists(pid) for _, pid in started()[:4]))
    Path("go").touch()
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    wait_for(lambda: not jobs_of_slurm())
    printed = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "4 trials: 4 complete" in printed and len(list(Path("runs").glob("*-tune-*"))) == 8


# What others left


@pytest.mark.slow
def test_a_worker_that_was_killed_with_the_lock_keeps_nobody_waiting(monkeypatch):
    """Nor does the link that Optuna's own lock would have left."""
    assert main(monkeypatch, "--engine", "local", "--trials", "1") == 0
    (journal,) = sweep.LOGS.glob("*.journal")
    hold = "import filelock, os, sys; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", hold, f"{journal.absolute()}.write"])
    Path(f"{journal}.lock").symlink_to(journal)
    assert main(monkeypatch, "--engine", "local", "--trials", "2") == 0


@pytest.mark.parametrize("line", [b"{}", b"1", b"null", b'{"op_code": 99}', b'{"op_code": 4}', b"\xff"])
def test_a_damaged_line_of_a_journal_is_one_line(monkeypatch, capsys, line):
    tune.Tuner(toy_options())
    (journal,) = sweep.LOGS.glob("*.journal")
    journal.write_bytes(journal.read_bytes() + line + b"\n")
    capsys.readouterr()
    assert main(monkeypatch, "--engine", "local", "--worker") == 2
    assert re.fullmatch(r"error: .*a line of it cannot be read.*\n", capsys.readouterr().err)


def test_values_that_do_not_fit_together_fail_their_trial_only(monkeypatch, capsys):
    """The next trials are tried."""
    Path("space.toml").write_text("[toy_script]\nbatch_size = [4]\nbuffer_size = [2]\n")
    setting = "a=--batch-size 2 --buffer-size 4"
    words = ["--engine", "local", "--trials", "2", "--settings", setting]
    assert main(monkeypatch, *words, "--worker") == 0
    assert capsys.readouterr().out.count("cannot be run: ") == 2
    assert main(monkeypatch, *words) == 1  # there is no result
    tuner = tune.Tuner(toy_options(trials=2, settings=(setting,)))
    assert [trial.state for trial in tuner.study.trials] == [TRIAL.FAIL] * 2


@pytest.mark.slow
def test_the_cut_end_of_a_journal_is_dropped(monkeypatch, capsys):
    assert main(monkeypatch, "--engine", "local", "--trials", "1") == 0
    (journal,) = sweep.LOGS.glob("*.journal")
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"a')
    capsys.readouterr()
    assert main(monkeypatch, "--engine", "local", "--trials", "1") == 0
    assert f"{journal}: its last line was incomplete and is removed\n" in capsys.readouterr().out
    assert journal.read_bytes().startswith(whole) and journal.read_bytes().endswith(b"\n")


@pytest.mark.slow
@pytest.mark.parametrize("space", ["[toy_script]\nx = { low = 0.6, high = 1.0 }", '[toy_script]\ny = ["right"]'])
def test_a_space_without_the_scripts_own_setting_is_one_line(monkeypatch, capsys, space):
    Path("space.toml").write_text(space)
    assert main(monkeypatch, "--engine", "local", "--trials", "1") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "does not contain" in line]
    assert "--x 0.0" in line or "--y left" in line
