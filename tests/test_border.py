"""Whatever an environment does, the run stays right: each habit of border_toys.py, and what it must lead to."""

import collections
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import closing
from pathlib import Path

import border_toys
import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from helpers import AGENTS, ROOT, Crash, crash, quick_args, scalars
from processes import run_script
from test_arguments import main_in_this_process, refused
from test_resume import only_run, run_killed

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3
from steadyrl import checks, environments, episodes, errors, evaluation, policies, record, run_folder, signals, spaces
from steadyrl.checkpoints import load_checkpoint
from steadyrl.noise import ExplorationNoise

SHORT = (
    "--total-timesteps 300 --learning-starts 250 --batch-size 16 --buffer-size 1000 --hidden-sizes 8 --no-cuda "
    "--eval-frequency 0 --final-episodes 2 --eval-episodes 2 --checkpoint-frequency 0"
)


@pytest.fixture(autouse=True)
def as_it_was():
    """The process as it was, whatever a toy did to it."""
    folder, recursion = os.getcwd(), sys.getrecursionlimit()
    handlers = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS + signals.SAVE_SIGNALS}
    os.environ.pop(border_toys.MAIN, None)
    border_toys.RECEIVED.clear()
    yield
    os.chdir(folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_default_dtype(torch.float32), torch.set_grad_enabled(True), np.seterr(all="warn", under="ignore")
    sys.setrecursionlimit(recursion)
    torch.set_default_device(None), torch.set_autocast_enabled("cpu", False), torch.set_float32_matmul_precision("highest")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def border_args(name: str, script=ddpg, **changes):
    return quick_args(script, **({"env_id": f"border_toys:{name}-v0"} | changes))


def script(name: str, *words: str, cwd: Path, algorithm="ddpg_continuous_action", **kwargs) -> subprocess.CompletedProcess:
    """A short run of an environment, in this process."""
    flags = ["--env-kwargs", json.dumps(kwargs)] if kwargs else []
    all_words = ["--env-id", f"border_toys:{name}-v0", *SHORT.split(), *flags, *words]
    return main_in_this_process(*all_words, cwd=cwd, script=algorithm)


def assert_true_transitions(rb) -> None:
    """Each stored transition happened, and only terminations are marked done."""
    size = rb.size()
    obs, successors = rb.observations[:size], rb.next_observations[:size]
    np.testing.assert_array_equal(successors - obs, np.broadcast_to([0, 1], obs.shape))
    assert len(np.unique(obs[..., 0])) > 3


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("ends", ["truncated", "terminated"])
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_an_environment_that_reuses_its_array(run, ends, num_envs, vectorization):
    args = border_args(
        "ReusesItsArray", env_kwargs={"ends": ends}, num_envs=num_envs, vectorization=vectorization, total_timesteps=150
    )
    rb = run(args).rb
    assert_true_transitions(rb)
    assert (rb.dones[: rb.size()] == (rb.next_observations[: rb.size(), :, 1] == 7) * (ends == "terminated")).all()


@pytest.mark.parametrize(("script", "bins"), [(sac, {}), (td3, {}), (dqn, {"bins": 2})])
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_an_environment_that_reuses_its_array_and_the_other_algorithms(run, script, bins):
    assert_true_transitions(run(border_args("ReusesItsArray", script, total_timesteps=150, **bins)).rb)


def test_an_environment_that_writes_into_its_actions(run):
    """The action stored is the one that was sent, and its memory is not the environment's."""
    args = border_args("WritesIntoActions", learning_starts=100, total_timesteps=200)
    border_toys.RECEIVED.clear()
    rb = run(args).rb
    after = args.final_episodes * 7  # of the final evaluation; some others were sent before training
    sent = np.array(border_toys.RECEIVED[-200 - after : -after])
    np.testing.assert_array_equal(rb.actions[:200, 0], sent)
    assert (sent != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_an_environment_that_seeds_the_global_generators(run, where):
    """Exploration, replay and the networks are those of a run on the environment without this habit."""
    tame, seeding = (
        run(border_args(name, env_kwargs=kwargs, save_model=False, episode_replay="plain"))
        for name, kwargs in (("Tame", {}), ("Seeds", {"where": where}))
    )
    np.testing.assert_array_equal(tame.rb.transitions, seeding.rb.transitions)
    for one, other in zip(tame.agent.actor.parameters(), seeding.agent.actor.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_environments_that_share_a_world(run, capsys):
    """Evaluations have a process of their own, and give what those of an environment without this habit give."""
    changes = {"eval_frequency": 100, "eval_episodes": 3, "save_model": False, "episode_replay": "auto"}
    shared, tame = run(border_args("SharesItsWorld", **changes)), run(border_args("Tame", **changes))
    assert_true_transitions(shared.rb)
    np.testing.assert_array_equal(shared.rb.transitions, tame.rb.transitions)
    texts = [(parts.run_dir / "evaluations.csv").read_text() for parts in (shared, tame)]
    assert texts[0] == texts[1] and capsys.readouterr().out.count("disturb each other") == 1


def test_several_that_share_a_world_in_one_process_are_refused(run, tmp_path):
    refused(script("SharesItsWorld", "--num-envs", "3", cwd=tmp_path), "--num-envs 3", "--vectorization async")
    assert list(tmp_path.iterdir()) == []
    rb = run(border_args("SharesItsWorld", num_envs=3, vectorization="async", eval_frequency=150)).rb
    assert_true_transitions(rb)


@pytest.mark.parametrize("replay", ["plain", "rebuild", "cut"])
def test_what_is_not_tested_before_training_is_said(tmp_path, replay):
    """Without `auto` nothing is played: the user knows the environment."""
    done = script("SharesItsWorld", "--episode-replay", replay, cwd=tmp_path)
    assert done.returncode == 0 and "it is not known whether instances disturb each other" in done.stdout
    assert "it is not known" not in script("Tame", cwd=tmp_path).stdout


def test_no_more_instances_than_there_can_be(tmp_path):
    refused(script("Few", "--num-envs", "3", "--capture-video", cwd=tmp_path), "--num-envs 3", "no more licences")
    assert not list((tmp_path / "runs").iterdir()) and not list((tmp_path / "videos").iterdir())
    assert script("Few", "--num-envs", "2", cwd=tmp_path).returncode == 0


def test_two_that_leave_each_other_alone_are_not_suspected():
    for name in ("Tame", "Seeds", "ReusesItsArray"):
        args = border_args(name)
        assert episodes.find_company(lambda args=args: environments.make_replayable_env(args)) == (False, False, "", True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shape", "last shape", "reward", "nothing", "flag"])
@pytest.mark.parametrize("words", ["", "--num-envs 2", "--num-envs 2 --vectorization async"])
def test_a_late_value_that_does_not_fit(tmp_path, what, words):
    """One line names the step, the field, what it was and what it must be. A checkpoint of the step before is saved."""
    done = script("Misfit", *words.split(), "--total-timesteps", "700", cwd=tmp_path, what=what)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    field = {"reward": "reward", "nothing": "reward", "flag": "terminated"}.get(what, "observation")
    assert "environment " in line and "step 27" in line and field in line and "must be" in line
    step = load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"]
    number = int(line.partition("step ")[2].partition(":")[0]) - 1
    assert step == number * (2 if words else 1)


def test_a_first_value_that_does_not_fit_is_refused(tmp_path):
    for what in ("shape", "reward", "flag"):
        refused(script("Misfit", cwd=tmp_path, what=what, late=0), "border_toys:Misfit-v0", "must be")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["SystemExit", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["step", "reset", "evaluation"])
def test_an_environment_that_leaves(tmp_path, what, where):
    words = ["--eval-frequency", "100"] if where == "evaluation" else []
    done = script("Leaves", *words, cwd=tmp_path, what=what, where=where)
    assert done.returncode == 1 and f"error: {what}" in done.stderr
    step = load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"]
    assert step == (100 if where == "evaluation" else pytest.approx(270, abs=7))


def test_a_saved_run_of_a_failing_environment_goes_on(tmp_path):
    """Here the failure is not repeated: the environment counts its own steps, which a resume plays again."""
    script("Misfit", "--max-episode-steps", "5", cwd=tmp_path, what="shape", late=270)
    folder = only_run(tmp_path)
    done = main_in_this_process("--resume", str(folder), cwd=tmp_path)
    assert done.returncode == 0 and "resumed at step" in done.stdout


@pytest.mark.slow
def test_there_can_be_only_one(tmp_path):
    """Without evaluations it trains, and is evaluated afterwards; with them, it is refused."""
    refused(script("Single", "--eval-frequency", "100", cwd=tmp_path), "only one", "--eval-frequency 0")
    refused(script("Single", "--num-envs", "2", cwd=tmp_path), "only one", "--num-envs 1")
    assert list(tmp_path.iterdir()) == []
    for words in ([], ["--vectorization", "async"]):
        done = script("Single", *words, cwd=tmp_path)
        assert done.returncode == 0 and "final evaluation: 7.0" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_does_not_close(tmp_path, vectorization):
    """There is one warning, however many of them are closed."""
    flags = [*SHORT.split(), "--env-id", "border_toys:DoesNotClose-v0", "--vectorization", vectorization]
    done = run_script(
        ROOT / "ddpg_continuous_action.py", *flags, "--eval-frequency", "100", cwd=tmp_path, PYTHONPATH=str(ROOT / "tests")
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("could not be closed (AttributeError: no viewer") == 1


STRICT = [
    (-0.1, 0.1, "float64"),
    (0.3, 0.7, "float64"),
    (0.0, 1e-3, "float64"),
    (-0.3, 0.7, "float16"),
    (1e-40, 2.0, "float64"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high", "dtype"), STRICT)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_each_action_is_one_that_the_environment_takes(run, low, high, dtype, num_envs):
    """Random, explored with much noise, and those of an actor at its bounds; and what is stored is what was sent."""

    class Saturated(ddpg.DDPG):
        def policy(self, obs):
            return super().policy(obs) * 0 + torch.tensor([1e9, -1e9])

    kwargs = {"low": low, "high": high, "dtype": dtype}
    args = border_args("Strict", env_kwargs=kwargs, exploration_noise=5.0, num_envs=num_envs, eval_frequency=100)
    rb = run(args, Saturated).rb
    stored = rb.actions[: rb.size()].astype(np.float64)
    received = {tuple(action.astype(np.float64)) for action in border_toys.RECEIVED}
    assert {tuple(action) for action in stored.reshape(-1, 2)} <= received
    assert stored.min() >= np.float64(np.dtype(dtype).type(low)) and stored.max() <= np.float64(np.dtype(dtype).type(high))


def test_a_loaded_policy_stays_inside_the_bounds(run, tmp_path):
    parts = run(border_args("Strict", env_kwargs={"low": 0.3, "high": 0.7}))
    agent, env = policies.load_agent(parts.run_dir)
    for parameter in agent.actor.mu.parameters():
        parameter.data.fill_(1e4)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        obs, *_ = env.step(agent.act(obs))


def test_an_environment_without_a_time_limit(run, monkeypatch, capsys):
    """It is said at the start. An evaluation cuts its episodes, and says so."""
    monkeypatch.setattr(evaluation, "EPISODE_LIMIT", 30)
    rows = run(border_args("Endless", episode_replay="auto")).run_dir
    output = capsys.readouterr().out
    assert "no time limit" in output and "--max-episode-steps" in output and "cut off after 30 steps" in output
    assert json.loads((rows / "evaluation.json").read_text())["lengths"] == [30, 30]


@pytest.mark.slow
def test_time_limits_that_are_no_news(run, capsys):
    run(border_args("Endless", max_episode_steps=20, episode_replay="auto"))
    run(border_args("Tame", episode_replay="auto"))
    assert "time limit" not in capsys.readouterr().out
    run(border_args("InnerLimit", max_episode_steps=50))
    assert "a time limit of its own, 20" in capsys.readouterr().out


def test_a_signal_ends_an_evaluation_in_the_middle_of_an_episode(tmp_path, monkeypatch):
    """The evaluation is of an episode without an end. The run saves the step at which it began, and makes it after a resume."""

    class Stopping(signals.Signals):
        holds = 0

        def hold(self):
            super().hold()
            self.holds += 1
            if self.holds == 500:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("steadyrl.run.Signals", Stopping)
        done = script("Endless", "--eval-frequency", "280", cwd=tmp_path)
    assert done.returncode == 143 and "stopped at step 280" in done.stdout, done.stderr
    folder = only_run(tmp_path)
    monkeypatch.setattr(evaluation, "EPISODE_LIMIT", 30)
    done = main_in_this_process("--resume", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row.split(",")[0] for row in (folder / "evaluations.csv").read_text().splitlines()[1:]] == ["280", "300"]


def children() -> set[psutil.Process]:
    """The processes that this one has started, and that live."""
    return {child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


FAILURES = [(where, how) for where in ("constructor", "reset", "step") for how in ("raise", "die", "hang")]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how"), FAILURES)
def test_a_worker_that_fails_at_the_start(tmp_path, where, how):
    before, words = children(), "--num-envs 2 --vectorization async --worker-timeout 1".split()
    done = script("FailsInWorkers", *words, cwd=tmp_path, where=where, how=how)
    refused(done, "FailsInWorkers", {"raise": "no graphics here", "die": "status 7", "hang": "no answer in 1 seconds"}[how])
    assert list(tmp_path.iterdir()) == []
    assert children() == before


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how"), [*FAILURES[3:], ("close", "raise"), ("close", "die"), ("close", "hang")])
def test_a_worker_that_fails_later(tmp_path, where, how):
    """In training, what was done is saved; in closing, nothing is lost. No process is left."""
    before, words = children(), "--num-envs 2 --vectorization async --worker-timeout 1".split()
    done = script("FailsInWorkers", *words, cwd=tmp_path, where=where, how=how, late=0 if where == "close" else 100)
    assert done.returncode == (0 if where == "close" else 1) and "Traceback" not in done.stderr, done.stderr
    assert load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] >= 190
    assert children() == before


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "--resume"])
def test_a_signal_ends_the_wait_for_a_worker(tmp_path, words):
    """At the start, and in a step: with the state before it saved."""
    late = {"where": "step", "how": "hang", "late": 100}
    flags = ["--env-id", "border_toys:FailsInWorkers-v0", *SHORT.split(), "--env-kwargs", json.dumps(late)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    environment.pop(border_toys.MAIN, None)
    command = [sys.executable, str(ROOT / "ddpg_continuous_action.py"), *flags, "--num-envs", "2", "--vectorization", "async"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("training on"):
            break
    time.sleep(0)  # whenever the signal comes: before, in or after the step that hangs
    children = psutil.Process(process.pid).children
    while len(children()) < 2:
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output


@pytest.mark.slow
def test_children_of_workers_are_allowed_and_do_not_outlive_the_run(tmp_path):
    before = set(psutil.process_iter())
    done = script("HasAChild", "--num-envs", "2", "--vectorization", "async", "--episode-replay", "cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    toys = {process for process in psutil.process_iter(["cmdline"]) if "child of a toy" in (process.info["cmdline"] or ())}
    toys -= before
    own = {process for process in toys if process.ppid() == os.getpid()}  # of instances in this process
    for process in own:
        process.kill()
    assert toys == own


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_an_environment_that_goes_elsewhere(tmp_path, where):
    """Everything lands where the command was given: run, videos, evaluations."""
    before = set(Path(border_toys.tempfile.gettempdir()).iterdir())
    words = ["--eval-frequency", "150", "--capture-video", "--checkpoint-frequency", "100"]
    done = script("GoesElsewhere", *words, cwd=tmp_path, where=where)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert {"best_model.pt", "evaluation.json", "evaluations.csv", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert list((tmp_path / "videos" / folder.name).glob("*.mp4"))
    new = set(Path(border_toys.tempfile.gettempdir()).iterdir()) - before
    assert not {"runs", "videos"} & {path.name for path in new}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "reset", "step"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_an_environment_that_takes_the_signals(tmp_path, where, name):
    """A signal saves, and the run ends as one that was left alone; the process is as the run needs it."""
    flags = [*SHORT.split(), "--env-id", "border_toys:TakesOver-v0", "--env-kwargs", json.dumps({"where": where})]
    done = run_script(
        ROOT / "tests" / "killed.py", "step", "270", name[3:], *flags, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests")
    )
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert "stopped at step 270" in done.stdout
    done = run_script(
        ROOT / "ddpg_continuous_action.py", "--resume", str(only_run(tmp_path)), cwd=tmp_path, PYTHONPATH=str(ROOT / "tests")
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_belongs_to_the_process_is_set_again(run):
    taken, tame = (
        run(border_args(name, save_model=False, eval_frequency=100, episode_replay="plain")) for name in ("TakesOver", "Tame")
    )
    for one, other in zip(taken.agent.actor.parameters(), tame.agent.actor.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("kind", "words"), [("largest", "float32"), ("huge", "float32"), ("narrow", "float32")])
def test_actions_that_float32_cannot_hold_are_refused(tmp_path, kind, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(script("Odd", cwd=tmp_path, kind=kind), "border_toys:Odd-v0", words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", [each for each in AGENTS if each is not dqn], ids=lambda script: script.__name__)
@pytest.mark.parametrize("kind", ["locked", "wide"])
@pytest.mark.filterwarnings("ignore:.*maximum and minimum")
def test_odd_spaces_that_can_be_learned_on(run, script, kind):
    parts = run(border_args("Odd", script, env_kwargs={"kind": kind}))
    losses = [value for tag, rows in parts.scalars.items() if tag.startswith("losses/") for _, value in rows]
    assert losses and np.isfinite(losses).all()
    if kind == "locked":
        assert (parts.rb.actions[: parts.rb.size(), 0, 1] == 0.5).all()


def test_a_crash_in_an_evaluation_costs_no_step_and_repeats_no_event(tmp_path, monkeypatch):
    """A checkpoint is due at the same step: it is written before the evaluation and again after it. A process that is killed
    between these two has logged the evaluation, and a resume makes it again."""
    from steadyrl import run as room

    with monkeypatch.context() as patch:
        record = room.Run.record_evaluation

        def killed(self, *values):
            record(self, *values)
            self.log.writer.flush()
            raise SystemError("killed here")

        patch.setattr(room.Run, "record_evaluation", killed)
        with pytest.raises(SystemError):
            script("Tame", "--eval-frequency", "280", "--checkpoint-frequency", "140", cwd=tmp_path)
    folder = only_run(tmp_path)
    assert load_checkpoint(folder / "checkpoints")["run"]["global_step"] == 280
    assert main_in_this_process("--resume", str(folder), cwd=tmp_path).returncode == 0
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [280, 300]
    assert [row.split(",")[0] for row in (folder / "evaluations.csv").read_text().splitlines()[1:]] == ["280", "300"]


def test_values_that_come_in():
    """Scalars of every kind are taken; a copy is made; anything else is named."""
    array = np.zeros(2, np.float32)
    assert spaces.observation_of(array, (2,), True) is not array
    assert spaces.observation_of([1, 2], (2,), True).dtype == np.float32
    for reward in (1, 1.0, np.float32(1), np.array(1.0), np.array([1.0]), torch.tensor(1.0), True):
        assert spaces.reward_of(reward, True) == 1.0 and type(spaces.reward_of(reward, True)) is not np.ndarray
    for flag in (True, np.True_, 1, np.array(True), torch.tensor(True)):
        assert spaces.flag_of("terminated", flag) is True
    for bad in (np.zeros(2), None, "yes"):
        with pytest.raises((ValueError, TypeError)):
            spaces.flag_of("terminated", bad)
    for bad in (np.zeros(2), "much", None, 1j, [[1.0], [2.0]], np.nan, 1e39, 10**400):
        with pytest.raises(spaces.Misfit, match="reward"):
            spaces.reward_of(bad, True)


def test_a_hangup_stops_unless_it_is_ignored(monkeypatch):
    """nohup has it ignored."""
    for ignored in (False, True):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        with signals.Signals() as asked:
            handler = signal.getsignal(signal.SIGHUP)
            if not ignored:
                os.kill(os.getpid(), signal.SIGHUP)
        assert (handler == signal.SIG_IGN) == ignored and asked.stop == (0 if ignored else signal.SIGHUP)


def test_a_probe_holds_one_instance_at_a_time():
    """But for the question whether there may be two."""
    made, closed = [], []

    class Counted(episodes.ReplayableEnv):
        def __init__(self, *values):
            assert len(made) == len(closed)
            made.append(self)
            super().__init__(*values)

        def close(self):
            closed.append(self)
            super().close()

    args = border_args("Tame")
    real = environments.make_replayable_env(args)
    assert episodes.find_replay(lambda rebuild: Counted(real.build, 0, rebuild)) == "plain" and len(made) == 2


def test_findings_are_returned():
    assert checks.check(border_args("SharesItsWorld", episode_replay="auto")) == ("plain", True)
    assert issubclass(errors.EnvError, errors.TrainingError)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["init", "reset", "close", "del"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_world_that_a_second_instance_disturbs(run, by, raises):
    """By being made, started or closed; silently or with an error. The evaluation leaves no trace in training."""
    kwargs = {"by": by, "raises": raises}
    rb = run(border_args("SharesOddly", env_kwargs=kwargs, eval_frequency=100, episode_replay="auto")).rb
    assert_true_transitions(rb)


@pytest.mark.parametrize("kind", ["RandomState", "MT19937", "Philox", "SFC64", "PCG64DXSM", "PCG64"])
def test_a_generator_of_any_kind(kind):
    assert checks.check(border_args("OldGenerator", env_kwargs={"kind": kind}, episode_replay="auto")) == ("plain", False)


def test_there_can_be_only_one_that_runs(tmp_path):
    refused(script("Lazy", "--eval-frequency", "100", cwd=tmp_path), "only one", "--eval-frequency 0")
    done = script("Lazy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


LATE = [
    ("Structured", {}, "observation"),
    *[("Strange", {"what": what}, "reward") for what in ("nan", "over", "gradient", "huge")],
]
LATE += [("Strange", {"what": "message"}, "Speechless"), ("Strange", {"what": "observation"}, "observation")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs", "words"), LATE)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore:.*")
def test_a_late_value_of_a_strange_kind(tmp_path, name, kwargs, words, vectorization):
    done = script(name, "--vectorization", vectorization, cwd=tmp_path, **kwargs)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert any(
        line.startswith("error: ") and any(word in line for word in (words, "OverflowError", "requires grad"))
        for line in done.stderr.splitlines()
    )
    assert load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] == 269


def test_a_first_value_that_is_not_finite_is_refused(tmp_path):
    for what in ("nan", "over", "observation"):
        refused(script("Strange", "--episode-replay", "auto", cwd=tmp_path, what=what, late=1), "not finite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "die"])
def test_a_run_is_saved_before_anything_is_closed(tmp_path, how):
    """A closing that hangs is ended by a signal."""
    flags = ["--env-id", "border_toys:Unclosable-v0", *SHORT.split(), "--env-kwargs", json.dumps({"how": how})]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "ddpg_continuous_action.py"), *flags, "--episode-replay", "plain"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "a checkpoint of step 269 is saved" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in ({"hang": (143,), "die": (7, 143)}[how])
    assert load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] == 269


@pytest.mark.slow
def test_a_worker_that_dies_before_it_says_why(tmp_path):
    words = "--num-envs 2 --vectorization async --worker-timeout 1 --total-timesteps 700".split()
    done = script("Unclosable", *words, cwd=tmp_path, how="die", workers=True)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] == 2 * 269


def test_instances_with_other_spaces(run, monkeypatch):
    """One line, also where Gymnasium raises a RuntimeError of its own."""
    made = []

    class Different(border_toys.Tame):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append(self)
            self.action_space = border_toys.gym.spaces.Box(-1, len(made), (2,), np.float32)

    border_toys.gym.register("Different-v0", Different)
    with pytest.raises(errors.UsageError, match="--num-envs 3"):
        run(quick_args(env_id="Different-v0", num_envs=3))


HABITS = [
    ("WritesIntoActions", {}, "", 0, ""),
    ("Seeds", {"where": "step"}, "", 0, ""),
    ("SharesItsWorld", {}, "", 0, "a process of their own"),
    ("DoesNotClose", {}, "", 0, ""),
    ("Strict", {}, "", 0, ""),
    ("GoesElsewhere", {"where": "step"}, "", 0, ""),
    ("TakesOver", {"where": "step"}, "", 0, ""),
    ("Misfit", {"what": "shape"}, "", 1, "must be"),
    ("Misfit", {"what": "reward"}, "", 1, "must be"),
    ("Leaves", {"what": "SystemExit"}, "", 1, "SystemExit"),
    ("FailsInWorkers", {"where": "step", "how": "die", "late": 100}, "--num-envs 2 --vectorization async", 1, "worker"),
    ("FailsInWorkers", {"where": "reset", "how": "raise"}, "--num-envs 2 --vectorization async", 2, ""),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*could not be closed")
@pytest.mark.parametrize("algorithm", ["td3_continuous_action", "sac_continuous_action", "dqn"])
@pytest.mark.parametrize(("name", "kwargs", "words", "status", "part"), HABITS, ids=lambda value: str(value)[:20])
def test_the_other_algorithms_have_the_same_border(tmp_path, algorithm, name, kwargs, words, status, part):
    """Each habit ends as it does with DDPG: the run is finished, or saved, or refused before anything was made."""
    words += " --bins 2" if algorithm == "dqn" else ""
    done = script(name, "--eval-frequency", "150", *words.split(), cwd=tmp_path, algorithm=algorithm, **kwargs)
    assert done.returncode == status and part in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    if status == 2:
        assert not (tmp_path / "runs").exists()
    else:
        assert (only_run(tmp_path) / "evaluation.json").exists() == (status == 0)
        assert load_checkpoint(only_run(tmp_path) / "checkpoints")["run"]["global_step"] > 0


@pytest.mark.slow
def test_a_signal_during_the_saving_ends_a_closing_that_hangs(tmp_path):
    """It came too early to end the process at once, and there is no second one."""
    flags = ["--env-id", "border_toys:Unclosable-v0", *SHORT.split(), "--env-kwargs", '{"how": "hang"}']
    done = run_killed(tmp_path, "write", 1, *flags, "--episode-replay", "plain", signals="TERM")
    assert done.returncode == 143, done.stdout + done.stderr
    assert "a checkpoint of step 269 is saved" in done.stdout


def test_an_environment_that_changes_its_arguments(tmp_path):
    """Each instance gets the arguments as they were typed, and args.json has them."""
    done = script("ChangesItsArguments", "--num-envs", "2", cwd=tmp_path, config={"length": 3})
    assert done.returncode == 0
    folder = only_run(tmp_path)
    assert json.loads((folder / "args.json").read_text())["args"]["env_kwargs"] == {"config": {"length": 3}}
    assert json.loads((folder / "evaluation.json").read_text())["lengths"] == [3, 3]


@pytest.mark.parametrize("how", ["fork", "start"])
@pytest.mark.parametrize("when", ["close", "reset"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_ends_its_child(tmp_path, how, when, vectorization):
    """SIGTERM ends the child, though the run, and a worker, do not end by it."""
    words = f"--vectorization {vectorization} --num-envs 2 --eval-frequency 150 --worker-timeout 10".split()
    kwargs = json.dumps({"how": how, "when": when})
    words += [
        "--env-id",
        "border_toys:EndsItsChild-v0",
        *SHORT.replace("--eval-frequency 0", "").split(),
        "--env-kwargs",
        kwargs,
    ]
    done = run_script(ROOT / "ddpg_continuous_action.py", *words, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0 and "SIGTERM received" not in done.stdout and "could not be closed" not in done.stderr


def test_an_environment_that_reads_its_options_is_resumed(tmp_path):
    assert script("WantsOptions", cwd=tmp_path).returncode == 0
    done = main_in_this_process("--resume", str(only_run(tmp_path)), "--total-timesteps", "310", cwd=tmp_path)
    assert done.returncode == 0 and "its episode is cut off" in done.stdout


def test_a_value_of_an_evaluation_that_is_not_finite_costs_no_step(tmp_path):
    done = script("FailsInEvaluations", "--eval-frequency", "280", cwd=tmp_path)
    assert done.returncode == 1 and "error: evaluation: episode 0 is not finite: step 3 has the reward nan" in done.stderr
    checkpoint = load_checkpoint(only_run(tmp_path) / "checkpoints")
    assert checkpoint is not None and checkpoint["run"]["global_step"] == 280


def test_an_error_in_the_final_evaluation_leaves_the_last_checkpoint_as_it_was(tmp_path):
    """The agent holds the best model by then. A resume must go on with the latest networks."""
    flags = "--learning-starts 50 --total-timesteps 300 --eval-frequency 100"
    done = script("FailsInEvaluations", *flags.split(), cwd=tmp_path, first=20_000, worse=True)
    folder = only_run(tmp_path)
    assert done.returncode == 1 and "error: evaluation: episode 0 is not finite" in done.stderr
    assert "a checkpoint of step 300 is saved, to go on: " in done.stdout and folder.name in done.stdout.splitlines()[-1]
    latest, best = (torch.load(folder / name, weights_only=True)["actor"] for name in ("model.pt", "best_model.pt"))
    saved = load_checkpoint(folder / "checkpoints")["agent"]["networks"]["actor"]
    assert all(saved[name].equal(latest[name]) for name in saved)
    assert not all(saved[name].equal(best[name]) for name in saved)


def test_a_reset_that_fails_is_one_line_with_a_film_too(tmp_path):
    for words in ([], ["--capture-video"]):
        done = main_in_this_process("--env-id", "toys:Raising-reset-v0", *SHORT.split(), *words, cwd=tmp_path)
        refused(done, "KeyError", "goal")
    with (
        pytest.raises(errors.EnvError) as caught,
        closing(environments.make_replayable_env(quick_args(env_id="toys:Raising-reset-v0"))) as env,
    ):
        env.reset(seed=0)
    assert isinstance(caught.value.__cause__, KeyError)


def test_after_an_error_at_a_random_action_a_resume_draws_others(tmp_path):
    """With the same action it would fail again, however often it is resumed."""
    done = script("DislikesLargeActions", "--episode-replay", "plain", cwd=tmp_path)
    folder, reached = only_run(tmp_path), []
    for _ in range(6):
        assert done.returncode == 1 and "is too large" in done.stderr
        reached.append(load_checkpoint(folder / "checkpoints")["run"]["global_step"])
        done = main_in_this_process("--resume", str(folder), cwd=tmp_path)
    assert len(set(reached)) > 3


def test_where_one_episode_is_cut_off_the_others_keep_their_returns():
    """And each environment knows how many steps it has made in the run: an error names the step."""
    args = border_args("Tame", num_envs=2)
    fresh = environments.make_envs(args, "unused", global_step=22)
    with closing(environments.make_envs(args, "unused")) as envs, closing(fresh):
        envs.reset(seed=1)
        for _ in range(11):  # episodes have 7
            envs.step(envs.action_space.sample())
        state = envs.state_dict()
        state["episodes"][1]["checksum"] += 1
        fresh.reset(seed=1)
        fresh.load_state_dict(state)
        assert fresh.cut_off.tolist() == [False, True]
        assert fresh.env.episode_returns.tolist() == [4, 0] and fresh.env.episode_lengths.tolist() == [4, 0]
        fresh.unwrapped.envs[1].unwrapped.look = lambda: np.zeros(3)
        with pytest.raises(errors.EnvError, match="step 12: observation of environment 1"):
            fresh.step(fresh.action_space.sample())


def test_a_failing_evaluation_does_not_bind_a_resume_without_it(tmp_path):
    done = script("FailsInEvaluations", "--eval-frequency", "100", cwd=tmp_path)
    folder = only_run(tmp_path)
    for words in (["--eval-frequency", "0"], ["--eval-frequency", "250"]):
        assert done.returncode == 1 and "error: evaluation: episode 0 is not finite" in done.stderr
        done = main_in_this_process("--resume", str(folder), *words, cwd=tmp_path)
        assert load_checkpoint(folder / "checkpoints")["run"]["global_step"] == 300  # the final evaluation fails, too


def test_global_generators_differ_between_workers_and_after_a_resume(run):
    """Each episode starts where no other does: nothing that was drawn once is drawn again."""
    for vectorization in ("sync", "async"):
        args = border_args("DrawsItsStart", num_envs=3, vectorization=vectorization, total_timesteps=63, learning_starts=60)
        first = run(args)
        starts = first.rb.observations[: first.rb.pos : 7, :, 0]
        args.resume, args.total_timesteps = first.run_dir, 126
        rb = run(args).rb
        starts = np.concatenate([starts, rb.observations[21 : rb.pos : 7, :, 0]])
        assert len(np.unique(starts)) >= starts.size - 1  # of a thousand, two may be the same
        args.resume = None


def test_instances_with_other_bounds_are_an_error(tmp_path):
    """An action inside the bounds of one is outside those of another. So is a resumed run's, if they have changed."""
    border_toys.Unequal.instances = 0
    done = script("Unequal", "--eval-frequency", "100", "--episode-replay", "rebuild", cwd=tmp_path)
    assert done.returncode == 2 and "a new instance has other actions" in done.stderr
    done = script("Unequal", "--eval-frequency", "100", "--episode-replay", "plain", cwd=tmp_path)
    assert done.returncode == 1 and "an instance made for an evaluation has other spaces" in done.stderr
    (file := tmp_path / "bound").write_text("1")
    (again := tmp_path / "again").mkdir()
    assert script("Unequal", cwd=again, file=str(file)).returncode == 0
    folder = only_run(again)
    file.write_text("2")
    for words in (["--resume", str(folder), "--total-timesteps", "400"], ["--evaluate", str(folder)]):
        done = main_in_this_process(*words, cwd=again)
        assert done.returncode == 2 and "its actions have other bounds" in done.stderr


def test_a_wrapper_that_keeps_statistics_is_named(capsys):
    checks.check(border_args("Normalizing"))
    printed = capsys.readouterr().out
    for name in ("NormalizeReward", "NormalizeObservation"):
        assert f"its wrapper {name} keeps statistics" in printed


@pytest.mark.parametrize("where", ["init", "step", "close"])
@pytest.mark.parametrize("how", ["logger", "none", "bytes"])
def test_standard_streams_that_are_replaced(tmp_path, how, where):
    done = script("SpeaksElsewhere", cwd=tmp_path, how=how, where=where)
    assert done.returncode == 0 and "final evaluation: 7.0" in done.stdout and done.stderr == ""


def test_a_signal_after_a_handler_that_c_installed_stops_the_run(tmp_path):
    done = run_killed(tmp_path, "step", 260, "--env-id", "border_toys:HandlesInC-v0", *SHORT.split(), signals="TERM")
    assert done.returncode == 143 and "stopped at step 260" in done.stdout


def test_a_setting_that_a_replayed_step_changes_does_not_reach_the_first_action(run, monkeypatch):
    args = border_args("Sets", env_kwargs={"what": "autocast"}, learning_starts=100)
    args.resume, args.total_timesteps = run(args).run_dir, 303
    act, found = ddpg.DDPG.act, []

    def noted(agent, obs):
        found.append(torch.is_autocast_enabled("cpu"))
        return act(agent, obs)

    monkeypatch.setattr(ddpg.DDPG, "act", noted)
    run(args)
    assert found and not any(found)


def test_a_resume_through_a_link_is_of_the_run_that_the_system_means(run, tmp_path):
    folder = run(border_args("Tame")).run_dir.absolute()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (folder.parent / "inside").mkdir()
    (elsewhere / "link").symlink_to(folder.parent / "inside")
    done = main_in_this_process("--resume", f"link/../{folder.name}", "--total-timesteps", "400", cwd=elsewhere)
    assert done.returncode == 0 and "resumed at step 300" in done.stdout, done.stderr


def test_a_resume_gives_up_evaluations_of_the_future(run, at_step):
    """Without evaluations, nothing else would write the file again."""
    args = border_args("Tame", eval_frequency=100, eval_episodes=1, checkpoint_frequency=150, learning_starts=50)
    at_step(220, crash)
    with pytest.raises(Crash):
        run(args)
    args.resume, args.eval_frequency = only_run(Path()), 0
    folder = run(args).run_dir
    assert [step for step, _ in run_folder.read_evaluations(folder)] == [100]
    assert json.loads((folder / "evaluation.json").read_text())["model_step"] == 100


def test_a_film_of_an_episode_that_was_reset_at_once_begins_anew(tmp_path):
    with closing(environments.make_env(border_args("Tame"), video_folder=tmp_path, video_name="film")) as env:
        env.reset(seed=0), env.reset(seed=1)  # as a resume does
        for _ in range(3):
            env.step(env.action_space.sample())
        assert env.episode_id == 0 and len(env.recorded_frames) == 4


def test_a_film_of_a_long_episode_has_its_first_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environments, "FILM_LENGTH", 5)
    with closing(environments.make_env(border_args("Tame"), video_folder=tmp_path, video_name="long")) as env:
        env.reset(seed=0)
        for _ in range(7):
            env.step(env.action_space.sample())
    assert "long-episode-0.mp4 has the first 5 steps" in capsys.readouterr().out
    monkeypatch.setattr(environments, "FILM_LENGTH", 7)
    with closing(environments.make_env(border_args("Tame"), video_folder=tmp_path, video_name="whole")) as env:
        env.reset(seed=0)
        for _ in range(7):
            env.step(env.action_space.sample())
    assert capsys.readouterr().out == ""
    assert (tmp_path / "long-episode-0.mp4").stat().st_size > 0


def test_films_though_warnings_are_errors_or_an_instance_cannot_be_filmed(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with closing(environments.make_env(border_args("Tame"), video_folder=tmp_path, video_name="film")) as env:
            assert isinstance(env, environments.FilmedEnv)
    with closing(environments.make_env(border_args("ForgetsItsMode"), video_folder=tmp_path, video_name="film")) as env:
        assert not isinstance(env, environments.FilmedEnv)
    assert "there will be no films" in capsys.readouterr().out


def test_an_environment_whose_close_goes_elsewhere_is_evaluated_where_it_is(run, tmp_path):
    args = border_args("GoesElsewhere", env_kwargs={"where": "close"})
    folder = f"runs/{run(args).run_dir.name}"
    for words in (f"--evaluate {folder}", f"{SHORT} --env-id {args.env_id} --hidden-sizes 32 32 --init-from {folder}"):
        kwargs = ["--env-kwargs", json.dumps(args.env_kwargs)] * ("--init-from" in words)
        done = main_in_this_process(*words.split(), *kwargs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_run_that_is_resumed_from_its_own_folder_films_where_it_did(run, tmp_path):
    folder = run(border_args("Tame", save_model=False)).run_dir.absolute()
    words = "--resume .. --capture-video --total-timesteps 450 --output ../../..".split()
    done = main_in_this_process(*words, cwd=folder / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "videos" / folder.name).glob("training-resumed-*.mp4"))


def test_a_module_in_a_zip_file(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "envs.zip", "w") as file:
        file.writestr(
            "zipped_envs.py",
            "import border_toys, gymnasium\ngymnasium.register('Zipped-v0', border_toys.Tame)\n"
            "class Own(border_toys.Tame): ...\ngymnasium.register('ZippedOwn-v0', Own)\n",
        )
    monkeypatch.syspath_prepend(str(tmp_path / "envs.zip"))
    importlib.import_module("zipped_envs")
    assert "zipped_envs.py" not in record.versions("ZippedOwn-v0") and "torch" in record.versions("ZippedOwn-v0")


def test_an_exchange_with_workers_that_fails_says_why():
    args = border_args("Tame", vectorization="async")
    said = pytest.raises(errors.EnvError, match="No space left")
    with closing(environments.make_envs(args, "unused")) as envs, said, envs.unwrapped.exchange():
        raise OSError(28, "No space left on device")


def test_a_mode_of_rendering_that_is_forgotten_is_refused(tmp_path):
    done = script("ForgetsItsMode", "--capture-video", cwd=tmp_path)
    refused(done, "--capture-video: ForgetsItsMode-v0 has the render_mode None")
    assert not list(tmp_path.iterdir())


def test_a_film_of_a_renderer_that_draws_into_its_frame():
    with closing(environments.make_replayable_env(border_args("DrawsIntoItsFrame"), render_mode="rgb_array")) as env:
        env.reset(seed=0)
        frames = [env.render()]
        for _ in range(3):
            env.step(np.zeros(2, np.float32))
            frames.append(env.render())
    assert [frame.max() for frame in frames] == [0, 30, 60, 90]


@pytest.mark.timeout(0)  # which sets an alarm of its own
@pytest.mark.parametrize("where", ["step", "close"])
@pytest.mark.parametrize("timer", ["REAL", "VIRTUAL", "PROF"])
def test_an_alarm_that_is_left_does_not_go_off(run, where, timer):
    run(border_args("LeavesAnAlarm", env_kwargs={"where": where, "timer": timer}, eval_frequency=100, episode_replay="auto"))
    assert signal.getitimer(getattr(signal, f"ITIMER_{timer}"))[0] == 0


@pytest.mark.parametrize("timer", [signal.ITIMER_VIRTUAL, signal.ITIMER_PROF])
def test_a_timer_of_the_user_goes_on(timer):
    """As that of a profiler."""
    signal.setitimer(timer, 1000)
    try:
        with closing(environments.make_replayable_env(border_args("Tame"))) as env:
            env.reset(seed=0)
            env.step(np.zeros(2, np.float32))
        assert signal.getitimer(timer)[0] > 900
    finally:
        signal.setitimer(timer, 0)


@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize("what", ["device", "autocast", "gradients", "inference", "precision", "words", "recursion"])
def test_settings_that_an_environment_changes(run, what, where):
    """In training and in evaluations: the networks end with the bits of a run in a tame environment."""
    models = []
    for name, kwargs in (("Tame", {}), ("Sets", {"what": what, "where": where})):
        args = border_args(name, td3, env_kwargs=kwargs, eval_frequency=100, learning_starts=100, episode_replay="auto")
        models.append(torch.load(run(args).run_dir / "model.pt", weights_only=True))
    first, second = ({f"{name}.{key}": value for name, net in model.items() for key, value in net.items()} for model in models)
    assert first.keys() == second.keys() and all(value.equal(second[key]) for key, value in first.items())


def test_what_python_collects_of_the_environments_of_a_check_changes_no_setting():
    gc.disable()
    try:
        checks.check(border_args("IsAGenerator", episode_replay="auto"))
        gc.collect()
        assert not torch.is_autocast_enabled("cpu")
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["constructor", "close"])
def test_the_default_dtype_that_an_environment_changes_outside_training(run, tmp_path, where):
    """What is made after the environment has float32 networks too."""
    args = border_args("Sets", env_kwargs={"what": "dtype", "where": where}, eval_frequency=100, eval_episodes=2)
    folder = run(args).run_dir.absolute()
    torch.set_default_dtype(torch.float32)
    agent, env = policies.load_agent(folder)
    assert agent.act(env.reset(seed=0)[0]).shape == (2,)
    for words in (["--evaluate", str(folder)], [*SHORT.split(), "--env-id", args.env_id, "--init-from", str(folder)]):
        torch.set_default_dtype(torch.float32)
        words += ["--hidden-sizes", "32", "32"] if "--init-from" in words else []
        kwargs = ["--env-kwargs", json.dumps(args.env_kwargs)] if "--init-from" in words else []
        done = main_in_this_process(*words, *kwargs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_settings_that_a_reward_for_other_goals_changes(tmp_path):
    flags = f"--env-id toys:ReachSets-v0 {SHORT} --replay hindsight".split()
    assert main_in_this_process(*flags, cwd=tmp_path).returncode == 0


def test_a_clock_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # restored afterwards, as the other
    monkeypatch.setattr(time, "monotonic", time.monotonic)
    assert script("Sets", "--learning-starts", "50", cwd=tmp_path, what="clock").returncode == 0


def test_a_signal_that_each_step_blocks(tmp_path):
    flags = ["--env-id", "border_toys:Blocks-v0", *SHORT.split()]
    done = run_killed(tmp_path, "step", 260, *flags, signals="TERM")
    assert done.returncode == 143 and "stopped at step 260" in done.stdout


def test_a_generator_that_all_instances_share(capsys):
    """An evaluation would change the start of the next training episode. Several training environments are allowed."""
    args = border_args("SharesItsGenerator", episode_replay="auto", num_envs=3)
    assert checks.check(args) == ("plain", True)
    assert "draw from one generator" in (printed := capsys.readouterr().out) and "a resumed run may differ" in printed
    assert checks.check(border_args("Tame", episode_replay="auto", num_envs=3)) == ("plain", False)


@pytest.mark.parametrize("name", ["HasNoGenerator", "HidesItsGenerator", "DrawsFromOwnBits"])
def test_a_generator_that_cannot_be_restored(name):
    assert checks.check(border_args(name, episode_replay="auto")).replay == "cut"


def test_discrete_actions_have_the_dtype_of_their_space(run):
    """The random ones and the greedy ones."""
    made = []

    class Watched(border_toys.ByteActions):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append(self)

    gym.register("Watched-v0", Watched)
    run(quick_args(dqn, env_id="Watched-v0", eval_frequency=100))
    assert set.union(*(env.kinds for env in made)) == {np.uint8}


@pytest.mark.parametrize(
    ("info", "success"),
    [
        ({}, None),
        (collections.Counter(), None),
        (collections.defaultdict(float), None),
        ({"is_success": None}, None),
        ({"is_success": float("nan")}, None),
        ({"is_success": "yes"}, None),
        ({"is_success": 10**400}, None),
        ({"is_success": True}, 1.0),
        ({"is_success": [np.bool_(False)]}, 0.0),
        ({"is_success": torch.tensor([1.0], requires_grad=True)}, 1.0),
    ],
)
def test_the_success_of_an_episode(info, success):
    assert spaces.success_of(info) == ({} if success is None else {"is_success": success})


def test_an_environment_that_makes_errors_of_warnings(tmp_path):
    with pytest.warns(UserWarning, match="could not be closed"):
        assert script("WantsErrors", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("what", ["thread", "process", "handler", "pool of threads", "pool of processes"])
@pytest.mark.parametrize(("words", "status"), [("", 0), ("--buffer-size 999999999999", 2)])
def test_what_an_environment_leaves_behind_does_not_keep_the_process(tmp_path, what, words, status):
    """A pool ends with Python, and so does what is to be done at its end."""
    flags = [*f"--env-id border_toys:KeepsAThread-v0 {SHORT} {words}".split(), "--env-kwargs", json.dumps({"what": what})]
    code = "import atexit, steadyrl.command_line as line; atexit.register(print, 'the end'); "
    code += f"line.PATIENCE = {100 if 'pool' in what else 0.1}; from ddpg_continuous_action import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == status and ("the end" in done.stdout or "pool" not in what)
    left = "handlers of atexit" if what == "handler" else "threads or processes"
    assert (f"{left} that do not end" in done.stdout) == ("pool" not in what)


def test_a_generator_that_cannot_be_set():
    assert checks.check(border_args("OwnsItsGenerator", episode_replay="auto")).replay == "plain"


def test_structured_observations_are_stored_as_they_came(run):
    """Not cast to whole numbers, and in the order of their space."""
    assert (run(border_args("Inexact")).rb.observations[:300] == np.float32([473.5, -5, 2.5])).all()


@pytest.mark.parametrize("where", ["constructor", "step", "close"])
@pytest.mark.parametrize("exits", [True, False])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_child_of_an_environment_is_not_the_run(tmp_path, where, exits, vectorization):
    """It would save a checkpoint, and print an error, of a run that goes on; or train a second one."""
    words = ["--env-id", "border_toys:LeavesAChild-v0", *SHORT.split(), "--vectorization", vectorization]
    words += ["--env-kwargs", json.dumps({"where": where, "exits": exits}), "--episode-replay", "plain"]
    words += ["--eval-frequency", "100"]
    done = run_script(ROOT / "ddpg_continuous_action.py", *words, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0 and "error" not in done.stderr and "checkpoint" not in done.stdout
    assert "Traceback" not in done.stderr and done.stdout.count("step 300: evaluation") == 1
    only_run(tmp_path)


def test_an_environment_that_empties_the_command_line(tmp_path):
    """With --init-from, its constructor runs before there is a run."""
    assert script("Tame", cwd=tmp_path).returncode == 0
    for words in ([], ["--init-from", str(only_run(tmp_path))]):
        done = script("Emptied", *words, cwd=tmp_path)
        assert done.returncode == 0 and "to go on: python ddpg_continuous_action.py --resume" in done.stdout


@pytest.mark.parametrize("where", ["init", "step"])
def test_an_environment_that_keeps_signals(run, where):
    """Neither in training nor after it. Before a run, what it does must not be taken for what the user wants."""

    class Looks(ddpg.DDPG):
        def update(self, batch, update_policy):
            seen.append((signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGHUP).__name__, blocked()))
            return super().update(batch, update_policy)

    def blocked() -> bool:
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    seen: list[tuple] = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    checks.check(border_args("KeepsSignals", env_kwargs={"where": where}))
    assert (signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGPIPE)) == (signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL and not blocked()
    run(border_args("KeepsSignals", env_kwargs={"where": where}), Looks)
    assert set(seen) == {(signal.SIG_IGN, "receive", False)}
    assert (signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGPIPE)) == (signal.SIG_DFL, signal.SIG_IGN)


def test_ctrl_c_ends_an_evaluation_whatever_the_environment_set(tmp_path):
    words = [*SHORT.split(), "--env-id", "border_toys:TakesOver-v0", "--env-kwargs", '{"where": "step"}']
    assert main_in_this_process(*words, cwd=tmp_path).returncode == 0
    done = run_killed(tmp_path, "episode", 1, "--evaluate", str(only_run(tmp_path)), signals="INT")
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_signals_before_a_run_that_starts_from_another_one(tmp_path):
    assert script("Tame", cwd=tmp_path).returncode == 0
    words = [*SHORT.split(), "--env-id", "border_toys:KeepsSignals-v0", "--init-from", str(only_run(tmp_path))]
    done = run_killed(tmp_path, "step", 260, *words, signals="TERM")
    assert done.returncode == 143 and "stopped at step 260" in done.stdout


def test_the_command_to_go_on_is_one_for_the_users_folder(tmp_path):
    words = [*SHORT.split(), "--env-id", "border_toys:GoesElsewhere-v0", "--env-kwargs", '{"where": "step"}']
    done = run_killed(tmp_path, "step", 260, *words, signals="TERM")
    assert f"to go on: python killed.py --resume runs/{only_run(tmp_path).name}" in done.stdout.replace(f"{ROOT}/tests/", "")


def test_after_a_stop_no_evaluation_begins(run, monkeypatch):
    """Its environment may take long to be made. A resume makes the evaluation first."""

    class Stops(ddpg.DDPG):
        def update(self, batch, update_policy):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().update(batch, update_policy)

    monkeypatch.setattr("steadyrl.run.evaluate", lambda *_, **__: crash())
    with pytest.raises(errors.Stopped):
        run(quick_args(eval_frequency=251), Stops)


def test_a_long_episode_is_replayed_in_the_time_of_its_steps(run):
    """Each step may take the --worker-timeout; a replay makes many steps in one exchange."""
    args = border_args("Slow", vectorization="async", num_envs=2, worker_timeout=1, env_kwargs={"pause": 0.05, "length": 100})
    with closing(environments.make_envs(args, "")) as envs:
        envs.reset(seed=0)
        for _ in range(30):
            envs.step(np.zeros((2, 2), np.float32))
        state = envs.state_dict()
    with closing(environments.make_envs(args, "")) as envs:
        envs.load_state_dict(state)
        assert not envs.cut_off.any()


@pytest.mark.parametrize(("dtype", "high"), [(np.longdouble, 1), (np.float16, 40_000)])
def test_dtypes_of_actions(dtype, high):
    """Torch has no long double; the range of these float16 bounds is more than a float16 holds."""
    space = gym.spaces.Box(-high, high, (2,), dtype)

    class Env(border_toys.Tame):
        action_space = space

    noise = ExplorationNoise("gaussian", spaces.flatten_actions(Env()).action_space, np.random.RandomState(0), 0.1)
    assert np.isfinite(noise.half_range).all() and spaces.flatten_actions(Env()).action_space.dtype in (np.float64, np.float16)


@pytest.mark.parametrize("value", [[1, 2j], ["1", "b"], [10**400, 1]])
def test_observations_that_are_no_numbers(value):
    with pytest.raises(spaces.Misfit, match="must be numbers"):
        spaces.to_float32(value)


def test_numpy_errors_that_an_environment_asked_for():
    with np.errstate(all="raise"):
        assert (spaces.to_float32([1e-60, 1e300]) == np.float32([0, np.inf])).all()
