"""Tune the flags of a script with Optuna: trials of several seeds, in parallel on this machine or as SLURM jobs.

    pip install optuna==5.0.0
    python -m steadyrl.tune --env-ids Hopper-v4 --settings short="--total-timesteps 200000" --trials 50
    python -m steadyrl.tune (the same) --engine slurm --workers 10 --time 240              # ten trials in parallel

It takes the flags of steadyrl.sweep. A trial trains a setting on all seeds at once. Its value is the mean over seeds and the
last five evaluations. It is pruned if its best mean so far is below the median of the complete trials. The first trial has the
script's own setting. The search space is in tune.toml. The same command again continues the study: a trial whose worker was
killed goes on from its run folders. The journal and the logs are in runs/.sweep/.
"""

import os
import shlex
import sys
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import filelock

from steadyrl import sweep
from steadyrl.errors import UsageError, in_one_line
from steadyrl.files import shown, write_csv
from steadyrl.output import say, show
from steadyrl.run_folder import list_checkpoints, read_evaluations, step_of


@dataclass
class Tuning:
    """What is tried, and how often."""

    space: Path = Path(__file__).parent / "tune.toml"  # the search space: a file with a table for the script
    trials: int = 50  # number of trials in total
    worker: bool = False  # only for the tuner itself: be one of its workers


@dataclass
class Options(Tuning, sweep.Runs, sweep.Slurm):
    """Tune the flags of a script. The same command again continues the study. --workers is the number of parallel trials."""

    start_seed: int = 11  # not 1, 2 or 3, on which results are reported


class Worker(sweep.Job):
    """A process that works on one trial after the other. For a sweep it is a run; its steps are those of all trials."""

    def command(self, folder: Path | None) -> list[str]:
        return [sys.executable, "-m", "steadyrl.tune", *self.flags]

    def last_lines(self, number: int = 6) -> str:
        """Not the line in which a stopped worker names its own command."""
        return "\n".join(line for line in super().last_lines(number).splitlines() if "--worker" not in line)

    def status(self, queue: dict[str, str]) -> sweep.Status:
        folders = Path("runs").glob(f"{self.name.rpartition('__')[0]}-*/checkpoints")
        steps = [step_of(checkpoint) for folder in folders for checkpoint in list_checkpoints(folder)[:1]]
        return sweep.Status(super().status(queue).state, sum(steps))


class Tuner:
    """A study of Optuna. Its name is a hash of all that its values depend on. Raises a UsageError for wrong options."""

    def __init__(self, options: Options):
        import optuna
        from optuna.storages import JournalStorage, journal

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.options, self.optuna, runs = options, optuna, sweep.plan(options)
        self.script = runs[0].script
        self.args, self.seeds = runs[0].args | {"seed": None}, [job.args["seed"] for job in runs]
        if any(job.args | {"seed": None} != self.args for job in runs):
            raise UsageError("--env-ids, --settings: must be one environment and one setting")
        if {1, 2, 3} & {*self.seeds}:
            raise UsageError(f"--seeds {self.seeds}: must be none of 1 to 3, which are for reporting")
        if self.args["eval_frequency"] == 0:
            raise UsageError("--eval-frequency 0: must be 1 or more, because a trial's value is a mean of evaluations")
        if self.args["target_return"] is not None:
            what = "must be left out, because the runs of a trial must end at the same step"
            raise UsageError(f"--target-return {self.args['target_return']}: {what}")
        try:
            tables, kinds = tomllib.loads(options.space.read_text()), optuna.distributions
            if options.script.stem not in tables:
                raise UsageError("is missing, must list the values to try for this script")
            table = tables[options.script.stem]
            table = {name.replace("-", "_"): choice for name, choice in table.items()}
            make: dict[type, Callable[[Any], kinds.CategoricalDistribution | kinds.FloatDistribution]]
            make = {list: kinds.CategoricalDistribution, dict: lambda ends: kinds.FloatDistribution(**ends)}
            if not table:
                raise UsageError("is empty, must list the values to try")
            if odd := [name for name, choice in table.items() if type(choice) not in make]:
                raise UsageError(f"{odd[0]} must be a list of values, or a table with low and high")
            self.space = {name: make[type(choice)](choice) for name, choice in table.items()}
            for name, kind in self.space.items():
                if name not in self.args:
                    raise UsageError(f"--{name.replace('_', '-')} must be a flag of this script")
                if name in ("seed", "eval_frequency", "target_return"):
                    raise UsageError(f"{name} must be left out: each setting has the same seeds and the same evaluations")
                for value in (kind.low, kind.high) if isinstance(kind, kinds.FloatDistribution) else kind.choices:
                    self.jobs("tune", {name: value})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
            raise UsageError(f"--space {options.space}, table [{options.script.stem}]: {error}") from None
        self.name = f"tune-{zlib.crc32(repr([options.script.stem, self.args, self.seeds, table]).encode()):08x}"
        sweep.LOGS.mkdir(parents=True, exist_ok=True)
        self.journal = Path(f"{sweep.LOGS / self.name}.journal").absolute()
        # Not Optuna's own lock, a link that outlives a killed worker and that the others then wait for.
        lock: Any = filelock.FileLock(f"{self.journal}.write")
        with lock:
            self.drop_cut_line()
        try:
            storage = JournalStorage(journal.JournalFileBackend(str(self.journal), lock))
            self.study = optuna.create_study(storage=storage, study_name=self.name, direction="maximize", load_if_exists=True)
        except Exception as error:  # of a damaged line: many types
            raise UsageError(f"{shown(self.journal)}: a line of it cannot be read ({in_one_line(error)})") from None
        # None means the value of a more general flag: for --critic-learning-rate, that of --learning-rate.
        general = {name: self.args.get(name.partition("_")[2]) for name in table}
        own = {name: general[name] if self.args[name] is None else self.args[name] for name in table}
        own = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in own.items()}
        outside = [  # so is a flag without a value: None is in no space
            f"--{name.replace('_', '-')} {value}"
            for name, value in own.items()
            if value is None or not contains(self.space[name], value)
        ]
        if not outside:
            self.study.enqueue_trial(own, skip_if_exists=True)
        elif not options.worker:
            say(
                f"--space {options.space}: does not contain the script's own {', '.join(outside)}, so no trial has this setting"
            )
        self.study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=self.args["total_timesteps"] // 5)

    def drop_cut_line(self) -> None:
        """Cut off the end of a line that a worker could not write whole: it was killed, or the disk was full."""
        text = self.journal.read_bytes() if self.journal.exists() else b""
        if (whole := text.rfind(b"\n") + 1) < len(text):
            os.truncate(self.journal, whole)
            say(f"{shown(self.journal)}: its last line was incomplete and is removed")

    def jobs(self, name: str, params: dict[str, Any], **others: Any) -> list[sweep.Job]:
        """The runs of a setting, by default on the seeds of a trial. (The environment was checked before.)"""
        flags = [self.options.settings[0].partition("=")[2]]
        for flag, value in params.items():
            flags.append(f"--{'no-' * (value is False)}{flag.replace('_', '-')}{f' {value}' * (not isinstance(value, bool))}")
        return sweep.plan(replace(self.options, settings=(f"{name}={' '.join(flags)}",), status=True, **others))

    def take(self) -> Any:
        """A trial to work on, locked: one whose worker has ended, otherwise a new one; None at the end."""
        with filelock.FileLock(f"{self.journal}.claim"):
            while True:
                for trial in (trials := [one for one in self.study.get_trials(deepcopy=False) if one.state.name != "WAITING"]):
                    self.lock = filelock.FileLock(f"{self.journal}.{trial.number}")  # lets go of the last one
                    if trial.state.name == "RUNNING" and not sweep.is_locked(Path(self.lock.lock_file)):
                        self.lock.acquire()
                        return self.optuna.trial.Trial(self.study, trial._trial_id)
                if len(trials) >= self.options.trials:
                    return None
                self.study.ask()

    def train(self, trial: Any) -> int:
        """Train a trial and, if it ends, report its value to the study; returns the exit status."""
        params = {name: trial._suggest(name, kind) for name, kind in self.space.items()}
        try:
            jobs = self.jobs(f"{self.name}-{trial.number}", params)
        except UsageError as error:  # these values do not fit together
            say(f"trial {trial.number} cannot be run: {error}")
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            return 1
        means = dict(self.study.trials[trial.number].intermediate_values)
        self.pruned = bool(means) and trial.should_prune()  # a worker may have been killed before it was

        def enough() -> bool:
            for rows in zip(*(read_evaluations(job.folder()) for job in jobs), strict=False):
                if (step := rows[0][0]) not in means:
                    means[step] = mean(value for _, value in rows)
                    trial.report(means[step], step)
                    self.pruned = self.pruned or trial.should_prune()
            return self.pruned or any(job.status({}).state == "failed" for job in jobs)

        status, states = sweep.run_here(jobs, jobs, len(jobs), enough), {job.status({}).state for job in jobs}
        if states == {"finished"}:
            enough()
            self.study.tell(trial, mean([*means.values()][-5:]))  # five, as in compare.py
        elif self.pruned or "failed" in states:
            self.study.tell(trial, state=self.optuna.trial.TrialState["PRUNED" if self.pruned else "FAIL"])
        with filelock.FileLock(f"{self.journal}.claim"):
            write_csv(self.journal.with_suffix(".csv"), self.table())
        return status

    def table(self) -> list[dict[str, Any]]:
        """A row for each trial: its number, state, value, the seeds, the steps of its last evaluation, and the flags tried."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            steps = max(trial.intermediate_values, default=0)
            value = "" if trial.value is None else f"{trial.value:.6g}"
            flags = {f"--{name.replace('_', '-')}": trial.params.get(name, "") for name in self.space}
            flags = {name: f"{tried:.4g}" if isinstance(tried, float) else tried for name, tried in flags.items()}
            row = {"trial": trial.number, "state": trial.state.name.lower(), "value": value}
            rows.append(row | {"seeds": " ".join(map(str, self.seeds)), "steps": steps} | flags)
        return rows


def contains(kind: Any, value: Any) -> bool:
    """Whether a distribution of Optuna can give a value."""
    try:
        return bool(kind._contains(kind.to_internal_repr(value)))
    except (ValueError, TypeError):  # it is none of the choices, or no number
        return False


def tune(options: Options) -> int:
    """Be a worker, or start the workers, here or on SLURM, and show the trials. Returns the exit status."""
    tuner, status = Tuner(options), 0
    if options.worker:
        while trial := tuner.take():
            if (status := tuner.train(trial)) > 1:  # stopped
                return status
        return 0  # the table names the trials that failed
    if sum(trial.state.is_finished() for trial in tuner.study.trials) < options.trials:
        workers = options.workers or max(1, (os.cpu_count() or 1) // len(tuner.seeds))
        steps = {"total_timesteps": options.trials * len(tuner.seeds) * tuner.args["total_timesteps"]}
        jobs = tuner.jobs(tuner.name, {}, seeds=tuple(range(workers)))
        engine = "slurm" if sweep.uses_slurm(options) else "local"  # on a node there may be no sbatch
        words = [*sys.argv[1:], "--engine", engine, "--worker"]
        jobs = [Worker(job.script, words, job.args | steps) for job in jobs]
        os.environ.setdefault("OMP_NUM_THREADS", str(options.cpus))
        status = sweep.sweep(jobs, replace(options, workers=workers, cpus=options.cpus * len(tuner.seeds)))
    if rows := tuner.table():
        write_csv(tuner.journal.with_suffix(".csv"), rows)
        table = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        show("\n".join([*lines, f"this table is in {shown(tuner.journal.with_suffix('.csv'))}"]))
    states = [trial.state.name.lower() for trial in tuner.study.trials]
    show(f"{options.trials} trials: {', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))}")
    if "complete" in states:
        best = tuner.study.best_trial
        flags = shlex.join(tuner.jobs("tuned", best.params, seeds=(1,))[0].flags)
        show(f"the best one, {best.value:.6g}, is trial {best.number}; to train it:")
        show(f"python {shlex.quote(str(shown(tuner.script)))} {flags}")
    over = sum(trial.state.is_finished() for trial in tuner.study.trials) >= options.trials
    return status or int(over and "complete" not in states)


if __name__ == "__main__":
    from steadyrl import tune as imported  # as in steadyrl.sweep

    sys.exit(sweep.main(imported.Options, imported.tune))
