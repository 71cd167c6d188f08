"""Everything about a run that is not its algorithm: its folder, its clock, its logs, and how it stops and resumes."""

import contextlib
import copy
import os
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from steadyrl.acceleration import accelerate, check_mode, choose_mode
from steadyrl.agent import Agent, AnyAgent
from steadyrl.arguments import READ_FLAGS, RunArgs
from steadyrl.checkpoints import Stateful, load_checkpoint, save_checkpoint
from steadyrl.checks import check, check_goals, initial_model_of
from steadyrl.device import Defaults, generator_states, restore_generators, set_up_device
from steadyrl.environments import check_finite, make_envs, seed_generators
from steadyrl.episodes import TrainingEnvs
from steadyrl.errors import EnvError, Stopped, TrainingError, UsageError, in_one_line
from steadyrl.evaluation import EVALUATION_SEED, Evaluation, evaluate, final_evaluation
from steadyrl.files import WriteOrWarn, replace_file, sha256, shown, write_csv, write_json
from steadyrl.hindsight_replay import HindsightSampling
from steadyrl.logs import Log, start_wandb
from steadyrl.models import (
    Weights,
    bounds_of,
    check_bounds,
    check_weights,
    load_initial_model,
    save_model,
    save_weights,
    weights_of,
)
from steadyrl.noise import RandomNumbers
from steadyrl.output import open_standard_files, say
from steadyrl.prioritized_replay import PrioritizedSampling
from steadyrl.record import changes, keep_script, record_of, refuse_changes, say_if_exploration_rises
from steadyrl.replay_buffer import ReplayBuffer, Sampling
from steadyrl.run_folder import lock_folder, make_run_folder, remove_unfinished, results_of, start_again
from steadyrl.signals import Signals

LOG_FREQUENCY = 100  # environment steps between two rows of losses in TensorBoard
CHECKPOINT_ATTEMPTS = 3  # checkpoints in a row that may fail (a full disk) before the run stops
CLOCK = ("global_step", "updates", "last_training_step", "evaluations", "evaluation_due", "target_reached")  # saved as they are


class Run:
    """A training run, from its first check to its final evaluation. Use it in a `with`, and call its methods in their order.

    Args:
        args: the arguments of the run.

    Attributes:
        folder: the run's folder.
        device: where the networks live and learn.
        random: the generator of all random numbers of training, with two exceptions. torch draws the initial networks, from the
            seed. The action space draws random actions.
        global_step: environment steps so far, over all environments: the clock of everything periodic.
        charts: further numbers to log, by name.

    Raises:
        TypeError: if the arguments lack a flag that every algorithm has.
        UsageError: before anything is created, if the arguments or the environment do not fit.
        EnvError: if the environment fails later.
        TrainingError: if a loss or a weight is not finite, or if the disk stays full.
        Stopped: if a signal asked for a stop.
    """

    def __init__(self, args: RunArgs):
        if missing := [name for name in READ_FLAGS if not hasattr(args, name)]:
            raise TypeError(f"{type(args).__name__} lacks {', '.join(missing)}, which this package reads")
        self.args, self.home, self.output = args, Path.cwd(), Path(args.output).absolute()  # before an environment changes it
        self.script = shlex.quote(sys.argv[0])
        self.signals = Signals()
        self.found = check(args)
        if getattr(args, "replay", None) == "hindsight":  # not every script has this flag
            self.goals = check_goals(args)
        open_standard_files()  # before the lock, which must not be what an environment closes
        self.device = set_up_device(args)
        self.defaults = Defaults()
        check_mode(args, self.device)
        self.random = RandomNumbers(args.seed)
        self.global_step = self.updates = 0
        self.charts: dict[str, float] = {}
        self.elapsed = 0.0  # seconds of training before this process
        self.last_training_step = args.learning_starts
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # since the last row in TensorBoard, on the device
        self.evaluations: list[dict[str, float]] = []
        self.evaluation_due = self.target_reached = False
        self.best_model: dict[str, Any] | None = None  # its weights, and the SHA-256 of best_model.pt
        self.failed_checkpoints: set[int] = set()  # their steps, in a row
        self.write_or_warn = WriteOrWarn()
        self.parts: dict[str, Stateful] = {}
        self.others: dict[str, Stateful] = {}
        self.before_acting: list[tuple[Stateful, dict[str, Any]]] = []

    def __enter__(self) -> "Run":
        args = self.args
        self.folder = args.resume.absolute() if args.resume else make_run_folder(args, self.output)
        self.videos = self.output / "videos" / self.folder.resolve().name  # it may be named by a link, or by ..
        with contextlib.ExitStack() as stack:
            self.check_folder = stack.enter_context(lock_folder(self.folder, new=args.resume is None))
            # Not before: a process that was still training would have written newer ones.
            self.checkpoint = load_checkpoint(self.folder / "checkpoints") if args.resume else None
            if self.checkpoint:
                saved, step = refuse_changes(args, self.checkpoint.get("run", {}), str(shown(self.folder)))
                say_if_exploration_rises(args, saved, step)
            remove_unfinished(self.folder)
            if self.checkpoint:
                self.load_state_dict(self.checkpoint["run"])
            elif args.resume:
                start_again(self.folder)
            began_with = self.checkpoint["run"]["settings"]["accelerate"] if self.checkpoint else None
            self.settings = record_of(args, self.device)
            self.settings["accelerate"] = choose_mode(args, self.device, self.global_step, began_with)
            if args.track:
                start_wandb(args, self.folder)
            if self.checkpoint is None:  # otherwise not before everything is restored
                self.write_settings()
            if not (self.folder / "args.json").exists():
                if args.resume is None:  # nothing is in it
                    shutil.rmtree(self.folder)
                raise TrainingError(f"{self.folder}: without its args.json, this run could not be resumed")
            videos = f", videos are in {shown(self.videos)}" if args.capture_video else ""
            say(f"training on {args.env_id} ({self.device}), the run's folder is {shown(self.folder)}{videos}")
            if args.learning_starts >= args.total_timesteps:
                say(
                    f"warning: --learning-starts {args.learning_starts} is not below --total-timesteps "
                    f"{args.total_timesteps}: nothing will be learned"
                )
            stack.enter_context(self.signals)
            self.log = stack.enter_context(contextlib.closing(Log(args, self.folder, self.global_step, self.write_or_warn)))
            if self.checkpoint is None:
                self.log.hyperparameters()
            if self.evaluations:
                self.log.status["evaluation"] = f"{self.evaluations[-1]['mean']:.1f}"
            self.start_time = time.perf_counter() - self.elapsed
            self.exits = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self.exits:
            self.defaults.hold()
            if isinstance(error, EnvError) and self.signals.stop:  # the waiting for a worker was given up
                raise Stopped(self.signals.stop) from error
        if self.args.track and error is None:
            import wandb

            wandb.finish()

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to train. Raises a RuntimeError if `resume` was forgotten: nothing could be saved."""
        if not self.parts:
            raise RuntimeError("call run.resume(agent, envs, rb) before the loop: its arguments are the parts of a checkpoint")
        return self.global_step < self.args.total_timesteps and not self.target_reached

    def due(self, every: int) -> bool:
        """Whether a multiple of `every` was passed with the latest step of the environments; never if `every` is 0."""
        return every > 0 and self.global_step // every > (self.global_step - self.args.num_envs) // every

    @property
    def evaluates_here(self) -> bool:
        """Whether an evaluation belongs to this step."""
        return self.args.eval_frequency > 0 and (self.due(self.args.eval_frequency) or not self.unfinished)

    def make_envs(self) -> TrainingEnvs:
        """The training environments, at their first observations. Afterwards networks are initialised from the run's seed.

        Raises:
            UsageError: if a new run cannot have them; its folder is removed.
        """
        # For environments that draw from the global generators; training itself does not. A resume draws other numbers.
        seed_generators(self.args.seed)
        try:
            envs = make_envs(self.args, str(self.videos), self.found.replay, self.signals, self.global_step)
            with contextlib.ExitStack() as stack:
                stack.callback(envs.close)
                if self.global_step:
                    seed_generators(self.args.seed + self.global_step)
                envs.reset(seed=self.args.seed)
                stack.pop_all()
        except EnvError as error:
            if self.args.resume or self.signals.stop:
                raise
            self.take_back()
            self.log.close()  # it has a thread that writes
            for folder in (self.folder, self.videos):  # nothing was trained
                shutil.rmtree(folder, ignore_errors=True)
            raise UsageError(f"--env-id {self.args.env_id} --num-envs {self.args.num_envs}: {error}") from error
        self.take_back()
        envs.hold, envs.before_close = self.hold, self.save_after_error
        torch.manual_seed(self.args.seed)  # whatever the environments drew
        return envs

    def replay(self, agent: Agent, envs: TrainingEnvs) -> dict[str, Any]:
        """The arguments of ReplayBuffer that --replay and --normalize-observations set."""
        sampling: Sampling | None = None
        if self.args.replay == "prioritized":
            sampling = PrioritizedSampling()
        if self.args.replay == "hindsight":
            self.goals.ask = envs.compute
            sampling = HindsightSampling(self.goals, self.args.reward_scale)
        return {
            "random": self.random,
            "gamma": self.args.gamma,
            "normalizer": agent.observation_normalizer,
            "sampling": sampling,
        }

    def take_back(self) -> None:
        """Do what `hold` does, and what would take too long at every step."""
        with contextlib.suppress(OSError):  # it was removed
            os.chdir(self.home)
        self.signals.take()
        open_standard_files()
        self.hold()

    def hold(self) -> None:
        """Restore the run's settings of this process, which an environment may have changed."""
        self.signals.hold()
        self.defaults.hold()

    def save_after_error(self) -> None:
        """If an environment failed, save the rest of the run, before anything is closed: closing may fail or hang as well."""
        if isinstance(sys.exception(), EnvError) and self.parts and not self.signals.leaving:
            self.take_back()
            for part, state in self.before_acting:
                part.load_state_dict(state)
            saved = self.write_or_warn(self.folder / "checkpoints", self.write_checkpoint)
            self.signals.leave()  # before the message: whoever reads it may send a signal
            if saved:
                say(f"a checkpoint of step {self.global_step} is saved, {self.how_to_go_on}")
        self.signals.leave()

    def resume(self, agent: Agent, envs: TrainingEnvs, rb: ReplayBuffer, **others: Stateful) -> None:
        """Define what a checkpoint consists of; if the run is resumed, restore each part.

        Args:
            others: further parts that have a state, under names of their own.

        Raises:
            TypeError: if the agent has a part that no checkpoint would hold.
            UsageError: if the checkpoint does not fit a part, or if --init-from does not fit the agent.
            EnvError, TrainingError, Stopped: as the class says.
        """
        agent.check_parts()
        parts: dict[str, Stateful] = {"agent": agent, "environments": envs, "replay_buffer": rb, "random": self.random}
        if self.checkpoint is not None:
            bounds = bounds_of(agent)
            for name, part in (parts | others).items():
                try:
                    part.load_state_dict(self.checkpoint[name] if name in parts else self.checkpoint["others"][name])
                except (EnvError, Stopped):
                    raise
                except Exception as error:  # of a network of another shape, or of a part that the checkpoint lacks: many types
                    what = f"--resume {shown(self.folder)}: its checkpoint does not fit this {name}"
                    raise UsageError(f"{what} ({in_one_line(error)[:300]})") from error
            self.take_back()  # the environments have played
            check_bounds(agent, bounds, f"--resume {shown(self.folder)}")
            rb.cut_off(envs.cut_off)
            if "generators" in self.checkpoint["run"]:  # not in older ones
                restore_generators(self.device, self.checkpoint["run"]["generators"])
        self.agent, self.envs, self.rb = agent, envs, rb
        self.parts, self.others = parts, others  # whole now: from here on, something can be saved after an error
        if self.checkpoint is None:
            if self.args.init_from:
                self.start_from(self.args.init_from)
            return
        say(f"resumed at step {self.global_step}")
        if "initial_model" in self.checkpoint["run"]["settings"]:
            self.settings["initial_model"] = self.checkpoint["run"]["settings"]["initial_model"]
        if changed := changes(self.checkpoint["run"]["settings"], self.settings):
            say(f"results may differ: {changed}")
        self.write_settings()
        self.write_evaluations()
        if "best_model" in self.checkpoint["run"] and not self.write_or_warn(self.folder, self.put_best_model_back):
            raise TrainingError(f"{shown(self.folder)}: a model could not be moved there ({self.write_or_warn.reason})")
        self.checkpoint = None  # lets go of the file

    def start_from(self, run_dir: str) -> None:
        """Load the networks of another run into the agent. A copy of its model stays in the folder. With it, a run that is
        killed before its first checkpoint starts again in the same way.

        Raises:
            UsageError: if there is no model, or if it does not fit.
            TrainingError: if the copy cannot be written.
        """
        copy = self.folder / "initial_model.pt"
        if not copy.exists():
            content = initial_model_of(self.args).read_bytes()
            if not self.write_or_warn(copy, replace_file, copy, lambda file: file.write(content)):
                raise TrainingError(f"{shown(copy)} could not be written ({self.write_or_warn.reason})")
        load_initial_model(self.agent, run_dir, copy)
        self.settings["initial_model"] = sha256(copy)
        self.write_settings()
        say(f"the networks are those of {run_dir}")

    def put_best_model_back(self) -> None:
        """Make best_model.pt the best model of the checkpoint. A model of a later evaluation is kept under another name: that
        evaluation is made again or never."""
        place = self.folder / "best_model.pt"
        known = self.best_model["sha256"] if self.best_model else None
        found = sha256(place) if place.is_file() else None
        if found and found == known:
            return
        if place.exists() and (known or not self.best_model):  # otherwise it is older: the disk was full at the best one
            aside = self.folder / f"best_model-{(found or 'no-file')[:16]}.pt"
            place.replace(aside)
            say(f"best_model.pt is not the one of the checkpoint, it is kept as {shown(aside)}")
        if self.best_model:
            self.write_best_model(self.best_model["weights"])

    def write_best_model(self, weights: Weights) -> None:
        """Write best_model.pt, and remember what is in it."""
        place = self.folder / "best_model.pt"
        written = self.write_or_warn(place, save_weights, weights, place)
        self.best_model = {"weights": weights, "sha256": sha256(place) if written else None}

    def accelerated(self, agent: AnyAgent) -> AnyAgent:
        """The agent to train with: its `act` and `update` are compiled or captured at their first calls, if it is accelerated.

        An evaluation that a signal interrupted before a resume is made first.
        """
        if not self.unfinished and self.has_final_evaluation:
            return agent
        check_finite(self.global_step, observation=self.envs.observations)
        fast = accelerate(agent, self.settings["accelerate"], self.args.accelerate != "auto", self.fell_back, self.log.paused)
        self.agent = self.parts["agent"] = fast
        self.evaluation_due &= self.evaluates_here  # a resume may have changed --eval-frequency
        if self.evaluation_due:
            self.log.find_evaluation()
            self.evaluate_and_save(fast, save_due=False)
        self.keep_state_before_acting()
        self.log.row_time = time.perf_counter()
        return fast

    def fell_back(self) -> None:
        """Note in args.json that the rest of the run is eager."""
        self.settings["accelerate"] = "eager"
        self.write_settings()

    def updates_due(self) -> Iterator[int]:
        """The numbers, from 1, of the updates to make now."""
        if self.global_step > self.args.learning_starts and self.due(self.args.train_frequency):
            steps = self.global_step - self.last_training_step
            for _ in range(self.args.gradient_steps if self.args.gradient_steps > 0 else steps):
                self.updates += 1
                yield self.updates
            self.last_training_step = self.global_step

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Keep the losses of an update on the device: reading a value waits for the device, so only the logging does it.

        "td_errors" are not a loss: the replay buffer may need them.
        """
        for name, loss in losses.items():
            if name == "td_errors":
                self.rb.sampling.prioritize(loss)
            else:
                self.losses[name].append(loss)

    def end_step(self, agent: Agent, infos: dict[str, Any]) -> None:
        """Log, evaluate and save whatever is due after a step of the environments.

        Raises:
            EnvError, TrainingError: as the class says.
            Stopped: after a checkpoint, if a signal asked for a stop.
        """
        self.before_acting = []
        self.log.step(self.global_step, infos)
        self.evaluation_due = self.evaluates_here
        save_due = (
            self.due(self.args.checkpoint_frequency) or bool(self.signals.save or self.signals.stop) or not self.unfinished
        )
        log_due = self.due(LOG_FREQUENCY) or not self.unfinished
        if log_due or self.evaluation_due or save_due:
            self.check_losses()
        if log_due:
            self.signals.take()  # the first step of an environment may have installed handlers from C
            self.charts |= {"updates": self.updates, "replay_size": self.rb.size() * self.args.num_envs}
            self.log.row(self.global_step, {name: values[-1].item() for name, values in self.losses.items()}, self.charts)
            self.losses.clear()
        if self.evaluation_due or save_due:
            with self.log.paused():
                self.evaluate_and_save(agent, save_due)
        self.keep_state_before_acting()

    def keep_state_before_acting(self) -> None:
        """Keep the states that actions are drawn from. If a worker fails in the next step, the state before it is saved.

        This is only done where environments have workers, because it takes 0.05 ms. An environment in this process that raises
        an error would raise it again after a resume if the same actions followed.
        """
        if self.args.vectorization == "async":
            self.before_acting = [(part, part.state_dict()) for part in (self.random, *self.others.values())]

    def evaluate_and_save(self, agent: Agent, save_due: bool) -> None:
        """Evaluate if that is due, then save if that is due or if it ends the training, then stop if a signal asked for it."""
        self.take_back()  # messages name paths as they are from the user's folder
        self.check_folder()
        if self.args.save_model and (self.evaluation_due or not self.unfinished):
            self.write_or_warn(self.folder / "model.pt", save_model, agent, self.folder / "model.pt")
        if self.evaluation_due and not self.signals.stop:
            if save_due:  # whatever happens in the evaluation
                self.save()
            in_worker = self.found.disturbed and self.args.vectorization == "sync"
            with contextlib.suppress(Stopped):  # the evaluation stays due, and is made first after a resume
                episodes = self.args.eval_episodes
                try:
                    evaluation = evaluate(
                        agent, self.args, episodes, EVALUATION_SEED, signals=self.signals, in_worker=in_worker
                    )
                finally:
                    self.take_back()
                self.record_evaluation(agent, evaluation)
        saved: bool | None = None
        if save_due or not self.unfinished:
            saved = self.save()
            self.signals.save = 0
        if self.signals.stop:  # it may have come while that was saved, or just now
            saved = self.save() if saved is None else saved
            self.stop(f"stopped at step {self.global_step}" + (", which could not be saved" if not saved else ""))

    def record_evaluation(self, agent: Agent, evaluation: Evaluation) -> None:
        """Log an evaluation, keep the model if it is the best one, and end the training if it reaches --target-return."""
        row = {"global_step": self.global_step} | evaluation.summary()
        self.evaluations.append(row)
        self.log.evaluation(row, len(evaluation.returns))
        if self.args.save_model and row["mean"] == max(row["mean"] for row in self.evaluations):
            self.write_best_model(weights_of(agent))
        self.write_evaluations()
        self.evaluation_due = False
        if self.args.target_return is not None and row["mean"] >= self.args.target_return:
            say(f"step {self.global_step}: --target-return {self.args.target_return} is reached, training ends")
            self.target_reached = True

    def write_evaluations(self) -> None:
        """Write evaluations.csv. After a kill it may have rows of a future that a resume gives up."""
        place = self.folder / "evaluations.csv"
        if self.evaluations:
            self.write_or_warn(place, write_csv, place, self.evaluations)
        elif place.exists():
            self.write_or_warn(place, place.unlink)

    def check_losses(self) -> None:
        """Stop if any loss since the last row in TensorBoard is not finite, even if later ones are finite again."""
        for name, values in self.losses.items():
            if not torch.stack(values).isfinite().all():
                raise TrainingError(f"step {self.global_step}: {name} is not finite")

    def save(self) -> bool:
        """Write a checkpoint, and the best model if that was not possible before; returns whether the checkpoint was written.

        Raises:
            TrainingError: if it was not written three times in a row, or at the end of the training.
        """
        if self.best_model and self.best_model["sha256"] is None:
            self.write_best_model(self.best_model["weights"])
        if self.write_or_warn(self.folder / "checkpoints", self.write_checkpoint):
            self.failed_checkpoints.clear()
            return True
        self.failed_checkpoints.add(self.global_step)  # before an evaluation and after it: that is one
        if len(self.failed_checkpoints) == CHECKPOINT_ATTEMPTS:
            what = f"{CHECKPOINT_ATTEMPTS} checkpoints in a row"
            raise TrainingError(f"{what} could not be written ({self.write_or_warn.reason}), {self.how_to_go_on}")
        if not self.unfinished:
            raise TrainingError(f"the last checkpoint could not be written ({self.write_or_warn.reason}), {self.how_to_go_on}")
        return False

    def write_checkpoint(self) -> None:
        """Write a checkpoint of all parts and of the run itself."""
        self.log.writer.sync()  # before the checkpoint, which its events belong to
        self.agent.check_parts()  # once more: a network may have been replaced
        check_weights(self.agent)
        state: dict[str, Any] = {name: part.state_dict() for name, part in (self.parts | {"run": self}).items()}
        state["others"] = {name: part.state_dict() for name, part in self.others.items()}
        save_checkpoint(self.folder / "checkpoints", self.global_step, state, self.args.keep_checkpoints)

    @property
    def how_to_go_on(self) -> str:
        """The command that resumes this run."""
        return f"to go on: python {self.script} --resume {shlex.quote(str(shown(self.folder)))}"

    def stop(self, what: str) -> None:
        """Print how to resume the run, then raise Stopped."""
        say(f"{what}, {self.how_to_go_on}")
        raise Stopped(self.signals.stop)

    @property
    def has_final_evaluation(self) -> bool:
        """Whether the final evaluation of this very step was made."""
        return any(result["global_step"] == self.global_step for result in results_of(self.folder))

    def finish(self, agent: Agent) -> None:
        """Evaluate the best model of a finished training, unless that was done before."""
        if not self.has_final_evaluation:
            self.check_models(agent)
            # The last checkpoint is written. No other may follow, since the agent becomes the best model.
            self.envs.before_close = self.signals.leave
            self.envs.close()  # of some environments there can be only one
            self.take_back()
            self.signals.stay()
            try:
                evaluation = final_evaluation(agent, self.args, self.folder, self.global_step, self.signals)
            except Stopped:
                self.stop("stopped in the final evaluation")
            except EnvError:
                say(f"a checkpoint of step {self.global_step} is saved, {self.how_to_go_on}")
                raise
            best = max((row["mean"] for row in self.evaluations), default=None)
            self.log.result(self.global_step, float(evaluation.returns.mean()), best)
            self.say_what_next()
        else:
            goal = "" if self.target_reached else f"; a --total-timesteps above {self.args.total_timesteps} would continue it"
            say(f"{shown(self.folder)} is finished at step {self.global_step}{goal}")

    def check_models(self, agent: Agent) -> None:
        """Write the models of this training before one is evaluated. The disk may have been full when they were due.

        Raises:
            TrainingError: if they cannot be written.
        """
        if not self.args.save_model:
            return
        place = self.folder / "model.pt"
        if self.best_model and self.best_model["sha256"] is None:
            self.write_best_model(self.best_model["weights"])
        unwritten = self.best_model is not None and self.best_model["sha256"] is None
        if unwritten or not self.write_or_warn(place, save_model, agent, place):
            reason = self.write_or_warn.reason
            raise TrainingError(f"the models could not be written ({reason}) and are not evaluated, {self.how_to_go_on}")

    def say_what_next(self) -> None:
        """The commands that a user may want after a training."""
        script, folder = self.script, shlex.quote(str(shown(self.folder)))
        say(f"to watch: tensorboard --logdir {shlex.quote(str(shown(self.folder.parent)))}")
        say(f"to film:  python {script} --evaluate {folder} --capture-video")
        if not self.target_reached:
            say(f"to go on: python {script} --resume {folder} --total-timesteps {2 * self.args.total_timesteps}")

    def state_dict(self) -> dict[str, Any]:
        """The clock, the losses and evaluations so far, and the settings."""
        return {name: getattr(self, name) for name in CLOCK} | {
            "losses": {name: torch.stack(values).cpu() for name, values in self.losses.items()},
            "elapsed": time.perf_counter() - self.start_time,
            "settings": self.settings,
            "best_model": self.best_model,
            "generators": generator_states(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        vars(self).update({name: state[name] for name in (*CLOCK, "elapsed")})
        self.best_model = copy.deepcopy(state.get("best_model"))  # not of the checkpoint's file, which is removed one day
        self.losses |= {name: list(values.clone().to(self.device)) for name, values in state["losses"].items()}

    def write_settings(self) -> None:
        """Write args.json, so that it holds the settings of this run as they are now, and keep the script."""
        self.write_or_warn(self.folder / "args.json", write_json, self.folder / "args.json", self.settings)
        self.write_or_warn(self.folder, keep_script, self.folder, type(self.args))
