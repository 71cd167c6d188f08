"""From the command line to a run: train, resume or evaluate; an expected error is one line."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from tqdm import tqdm

from steadyrl.acceleration import check_mode
from steadyrl.agent import Agent
from steadyrl.arguments import EVALUATE_MAY_CHANGE, RESUME_MAY_CHANGE, A, RunArgs, check_args, parse_args
from steadyrl.checks import check, check_goals, initial_model_of
from steadyrl.device import Defaults, device_of, set_up_device
from steadyrl.environments import coming_back, make_env
from steadyrl.errors import EnvError, Stopped, TrainingError, UploadError, UsageError
from steadyrl.evaluation import Evaluation, final_evaluation
from steadyrl.hub import check_finished, check_upload, upload
from steadyrl.models import choose_model, load_initial_model
from steadyrl.output import guard, report, say
from steadyrl.policies import export_onnx
from steadyrl.record import load_args
from steadyrl.signals import PATIENCE, SAVE_SIGNALS, end, raise_interrupt


def parse_saved_args(args_class: type[A], argv: list[str], flag: str, run_dir: Path, may_change: set[str]) -> A:
    """The arguments of the saved run that `flag` names, with the changes that the command line makes to them.

    Raises:
        UsageError: for a change that would make it another run, with the saved and the requested value.
    """
    try:
        saved = load_args(run_dir, args_class, env_id=parse_args(args_class, argv, args_class()).env_id)
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from None
    saved.evaluate = saved.resume = None  # which no run has, but an edited file
    if flag == "--evaluate":
        saved.capture_video = saved.upload_model = saved.track = False  # only when asked now
        saved.export = saved.model = saved.eval_seed = None
    args = parse_args(args_class, argv, saved)
    for name in vars(args):
        if name not in may_change and getattr(args, name) != getattr(saved, name):
            change = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"{change}: must be {getattr(saved, name)}, as saved in {run_dir}, or left out")
    return args


def agent_for(args: RunArgs, agent_class: type[Agent], device: torch.device) -> tuple[Agent, gym.Env]:
    """A new agent for the environment of these arguments, and that environment, closed. A UsageError if it has other spaces."""
    with coming_back(), Defaults():  # both its constructor and its close may change them
        with Defaults():
            env = make_env(args)
        with contextlib.closing(env):
            args.check_spaces(env.observation_space, env.action_space)
            return agent_class(env.observation_space, env.action_space, args, device), env


def evaluate_run(args: RunArgs, agent_class: type[Agent]) -> Evaluation:
    """Evaluate the saved model of the run `args.evaluate`, as at the end of training, and export it if asked."""
    check(args)
    run_dir = Path(args.evaluate or "")
    model = choose_model(run_dir, args.model)
    if model is None:
        raise UsageError(f"--evaluate {run_dir}: must hold a best_model.pt or a model.pt")
    agent, env = agent_for(args, agent_class, set_up_device(args))
    evaluation = final_evaluation(agent, args, run_dir)
    if args.export:
        try:
            export_onnx(agent, env, model)
        except OSError as error:
            raise TrainingError(f"--export {args.export}: the file could not be written ({error.strerror})") from error
    return evaluation


def check_initial_model(args: RunArgs, agent_class: type[Agent]) -> None:
    """Refuse an --init-from whose model does not fit, before anything is created."""
    if args.init_from is None or args.resume is not None:
        return
    check_args(args)
    with contextlib.suppress(EnvError):  # the training says more of it
        agent, _ = agent_for(args, agent_class, torch.device("cpu"))
        load_initial_model(agent, args.init_from, initial_model_of(args))


def check_further(args: RunArgs, agent_class: type[Agent] | None, on_this_machine: bool) -> None:
    """Refuse what `checks.check` does not look at, but a new run of these arguments would refuse. Raises a UsageError.

    Args:
        on_this_machine: the run will be here, not on a node with other devices.
    """
    if args.upload_model:
        check_upload(args)
    if agent_class:
        check_initial_model(args, agent_class)
    if getattr(args, "replay", None) == "hindsight":  # not every script has this flag
        check_goals(args)
    if on_this_machine:
        check_mode(args, device_of(args))


def show_once(showwarning: Callable) -> Callable:
    """A `warnings.showwarning` that shows each text once, however many environments are made.

    Python's own "once" filter forgets what it has shown whenever a library changes the filters.
    """
    shown = set()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if (str(message), category) not in shown:
            shown.add((str(message), category))
            with tqdm.external_write_mode(sys.stderr):  # clears a progress bar, and draws it again
                showwarning(message, category, *where)

    return show


def company() -> set[Any]:
    """The threads and processes that Python waits for before this process ends."""
    everyone: list[Any] = [*threading.enumerate(), *multiprocessing.active_children()]
    return {other for other in everyone if not other.daemon}


def leave_behind(before: set[Any], status: Any, program: bool) -> None:
    """End this process even if threads, processes or handlers of `atexit` that an environment left do not end.

    Python first ends the threads and processes that only wait for it, as idle pools do. Then they have some seconds, and after
    them the handlers.

    Args:
        before: the `company` before the environment was made.
        status: with which this process ends.
        program: it ends now. Otherwise its handlers may be those of a program that called the script.
    """
    others = company() - before

    def watch() -> None:
        threading.main_thread().join()
        for other in others:
            other.join(PATIENCE / len(others))
        left = "threads or processes"
        if not any(other.is_alive() for other in others):
            if not program:
                return
            time.sleep(PATIENCE)  # Python calls the handlers. When they have returned, it ends, and this thread with it
            left = "handlers of atexit"
        say(f"the environment left {left} that do not end: this process ends without them")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        end(status if isinstance(status, int) else 1)

    if others or program:
        threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass
class Script:
    """The parts of a script. Calling it runs the command line; `load_agent` makes the agent of a saved run with it.

    Args:
        args_class: its flags, a dataclass that joins groups of them.
        agent_class: called as `agent_class(observation_space, action_space, args, device)`.
        train: called with the arguments; returns the run's folder.
    """

    args_class: type[RunArgs]
    agent_class: type[Agent]
    train: Callable[[Any], Path]

    def __call__(self) -> None:
        """Train, resume, or evaluate a saved run, as the command line says; expected failures become one line on stderr."""
        before, program = company(), getattr(sys.modules["__main__"], "main", None) is self
        try:
            self.run()
        except SystemExit as exit:
            leave_behind(before, exit.code, program)
            raise
        leave_behind(before, 0, program)

    def run(self) -> None:
        """What a call does, without the end of the process."""
        guard()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, raise_interrupt)
        for number in SAVE_SIGNALS:  # before training and after it there is nothing to save
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.SIG_IGN)
        warnings.showwarning = show_once(warnings.showwarning)
        warnings.filterwarnings("ignore", ".*is out of date")  # as Hopper-v4 is, the default: CleanRL's results are of it
        warnings.filterwarnings("ignore", ".*31mERROR: ")  # in red, by Gymnasium, of a worker: a line of ours says it
        try:
            args = parse_args(self.args_class, sys.argv[1:], self.args_class())
            if args.evaluate and args.resume:
                raise UsageError(f"--evaluate {args.evaluate}: must be left out with --resume {args.resume}")
            saved = args.evaluate or args.resume
            if not (saved and Path.cwd().is_relative_to(saved.resolve())):  # a folder from elsewhere must not bring modules
                sys.path.append(os.getcwd())  # where the module of --env-id module:EnvId may be
            if args.evaluate:
                args = parse_saved_args(self.args_class, sys.argv[1:], "--evaluate", args.evaluate, EVALUATE_MAY_CHANGE)
            elif args.resume:
                args = parse_saved_args(self.args_class, sys.argv[1:], "--resume", args.resume, RESUME_MAY_CHANGE)
            if args.upload_model:
                check_upload(args)
            if args.evaluate:
                run_dir = args.evaluate
                if args.upload_model:
                    check_finished(run_dir, args)
                evaluate_run(args, self.agent_class)
            else:
                check_initial_model(args, self.agent_class)
                run_dir = self.train(args)
            if args.upload_model:
                upload(args, self.agent_class.__name__, run_dir)
        except Stopped as stop:
            sys.exit(128 + stop.args[0])
        except KeyboardInterrupt:  # before a training begins, in an evaluation of a saved run, or in an upload
            sys.exit(128 + signal.SIGINT)
        except (UsageError, TrainingError, UploadError) as error:
            sys.unraisablehook = lambda _: None  # a renderer that failed to open prints another error when it is deleted
            report(error)
            sys.exit(2 if isinstance(error, UsageError) else 1)
