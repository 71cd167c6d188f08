"""The logs of a run while it trains: TensorBoard, and a progress bar or, without a terminal, one line per minute."""

import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from steadyrl.arguments import OF_A_CALL, PRIVATE, UNLEARNED, RunArgs
from steadyrl.errors import UsageError
from steadyrl.files import WARNING_INTERVAL, WriteOrWarn, sync_folder
from steadyrl.output import say

METRICS = ("eval/final_return", "eval/best_return")
SILENCE = 60.0  # seconds between two lines where no progress bar is shown


class Log:
    """The log of a run.

    Args:
        args: the arguments of the run.
        folder: its folder.
        global_step: the step at which it goes on.
        write_or_warn: warns of a write that failed.

    Attributes:
        status: the latest return and evaluation, as the progress bar shows them.
    """

    def __init__(self, args: RunArgs, folder: Path, global_step: int, write_or_warn: WriteOrWarn):
        self.args = args
        self.writer = EventWriter(folder, global_step, write_or_warn)
        self.bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, disable=None)
        self.status = {"return": "-", "evaluation": "-"}
        self.evaluation_before = -1  # step of an evaluation that was logged before the process was killed, and is made again
        self.row_step = self.line_step = global_step
        self.row_time = self.line_time = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        self.writer.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of every speed, because it is not training."""
        begin = time.perf_counter()
        yield
        pause = time.perf_counter() - begin
        self.row_time, self.line_time = self.row_time + pause, self.line_time + pause
        if not self.bar.disable:
            self.bar.start_t, self.bar.last_print_t = self.bar.start_t + pause, self.bar.last_print_t + pause

    def find_evaluation(self) -> None:
        """Find out whether the evaluation of this step was logged: it is made again, and must not be logged twice. TensorBoard
        ignores what was logged of later steps."""
        events, tag = EventAccumulator(str(self.writer.log_dir), size_guidance={"scalars": 0}).Reload(), "eval/episodic_return"
        if tag in events.Tags()["scalars"] and any(event.step == self.row_step for event in events.Scalars(tag)):
            self.evaluation_before = self.row_step

    def hyperparameters(self) -> None:
        """Log the arguments: as a table, and for TensorBoard's page HParams, where `result` gives them their metrics."""
        values = dataclasses.asdict(self.args)
        groups = type(self.args).__bases__  # in their order the table reads as --help does
        names = ["env_id", "seed", *(field.name for group in groups for field in dataclasses.fields(group)), *values]
        private = PRIVATE - {"init_from"} | OF_A_CALL
        values = {name: values[name] for name in names if name not in private}
        values["init_from"] = self.args.init_from and Path(self.args.init_from).name  # not where it is on this machine
        table = "\n".join(f"|{name}|{value}|" for name, value in values.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        learning = {name: value for name, value in values.items() if name not in UNLEARNED - {"seed"}}
        plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in learning.items()}
        self.writer.add_summaries(*hparams(plain, dict.fromkeys(METRICS, 0.0))[:2])

    def result(self, global_step: int, final: float, best: float | None) -> None:
        """Log the final evaluation, and the mean of the best one before it."""
        for name, value in zip(METRICS, (final, best), strict=True):
            if value is not None:
                self.writer.add_scalar(name, value, global_step)
        self.writer.add_summaries(hparams({}, {})[2])

    def step(self, global_step: int, infos: dict[str, Any]) -> None:
        """Log the episodes that ended with this step of the environments, and show how far the run is."""
        for index in np.flatnonzero(infos.get("_episode", ())):
            episode_return, episode_length = infos["episode"]["r"][index], infos["episode"]["l"][index]
            self.writer.add_scalar("charts/episodic_return", episode_return, global_step)
            self.writer.add_scalar("charts/episodic_length", episode_length, global_step)
            self.status["return"] = f"{episode_return:.1f}"
            self.bar.set_postfix(self.status, refresh=False)
        self.bar.update(self.args.num_envs)
        if self.bar.disable and (now := time.perf_counter()) >= self.line_time + SILENCE:
            speed, total = (global_step - self.line_step) / (now - self.line_time), self.args.total_timesteps
            left = tqdm.format_interval((total - global_step) / speed)
            last = self.status["return"]
            say(f"step {global_step:,} of {total:,}, {speed:.0f} steps/s, last return {last}, {left} left")
            self.line_step, self.line_time = global_step, now

    def row(self, global_step: int, losses: dict[str, float], charts: dict[str, float]) -> None:
        """Log losses, other numbers and, once there were updates, the steps per second since the last row."""
        now = time.perf_counter()
        if charts["updates"] and now > self.row_time:  # an environment may have stopped the clock
            charts = charts | {"SPS": (global_step - self.row_step) / (now - self.row_time)}
        for group, values in (("losses", losses), ("charts", charts)):
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, global_step)
        self.row_step, self.row_time = global_step, now

    def evaluation(self, row: dict[str, float], episodes: int) -> None:
        """Log an evaluation, a row of evaluations.csv, and print it."""
        step, mean, std = int(row["global_step"]), row["mean"], row["std"]
        scalars = {
            "episodic_return": mean,
            "episodic_return_std": std,
            "episodic_length": row["length"],
            "q_bias": row["q_bias"],
        } | ({"success_rate": row["success"]} if "success" in row else {})
        for name, value in scalars.items() if step != self.evaluation_before else ():
            self.writer.add_scalar(f"eval/{name}", value, step)
        say(
            f"step {step}: evaluation {mean:.1f} +- {std:.1f} over {episodes} episodes "
            f"of mean length {row['length']:.0f}, q_bias {row['q_bias']:+.2f}"
            + (f", success {row['success']:.2f}" if "success" in row else "")
        )
        self.status["evaluation"] = f"{mean:.1f}"


class EventWriter(SummaryWriter):
    """TensorBoard's writer. It opens its file at the first event. If the disk is full, it warns, and goes on with a new file
    as soon as it can.

    Args:
        folder: the run's folder.
        global_step: TensorBoard is to ignore events after this step: a process that was killed may have left some.
        write_or_warn: warns.
    """

    def __init__(self, folder: Path, global_step: int, write_or_warn: WriteOrWarn):
        self.write_or_warn, self.again = write_or_warn, math.inf  # the time before which nothing is written
        # When TensorBoard's thread cannot write, its error appears twice. In the thread it would print a traceback. In the main
        # thread we handle it.
        self.excepthook = threading.excepthook
        threading.excepthook = lambda failure: issubclass(failure.exc_type, OSError) or self.excepthook(failure)
        # TensorBoard respects the purge step of a later file only if the first file of the folder had one too.
        super().__init__(folder, purge_step=global_step + 1)
        self.again = 0.0

    def _get_file_writer(self) -> Any:
        """Open a file if none is open. TensorBoard reads the files of a folder in the order of their names, which begin with
        the second of the clock. So this one gets a later second than all others, whatever the clock says."""
        if self.file_writer is None and self.again < math.inf:
            names = os.listdir(self.log_dir)  # an error if the folder is gone; TensorBoard would make it again
            seconds = (name.split(".")[3] for name in names if name.startswith("events.out.tfevents."))
            last = max((int(second) for second in seconds if second.isdecimal() and second.isascii()), default=0)
            times = itertools.chain([max(time.time(), last + 1)], iter(time.time, None))  # TensorBoard's first call names it
            with unittest.mock.patch.object(event_file_writer, "time", SimpleNamespace(time=lambda: next(times))):
                super()._get_file_writer()
        return self.file_writer

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:  # type: ignore[override]  # its others are not used
        self.attempt(super().add_scalar, tag, value, global_step)

    def add_text(self, tag: str, text: str) -> None:  # type: ignore[override]
        self.attempt(super().add_text, tag, text)

    def add_summaries(self, *summaries: Any) -> None:
        """Log summaries that are already made."""
        for summary in summaries:
            self.attempt(lambda summary=summary: self._get_file_writer().add_summary(summary))

    def sync(self) -> None:
        """Flush what was logged to the disk: what a later checkpoint belongs to must not be lost in a power cut."""
        if self.file_writer is not None:
            self.attempt(self._sync, self.file_writer.event_writer._file_name)

    def _sync(self, name: str) -> None:
        self.flush()
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        sync_folder(Path(self.log_dir))

    def attempt(self, write: Callable, *values: Any) -> None:
        """Write something to the log. After a failure, the next write opens a new file."""
        if time.perf_counter() < self.again:
            return
        was_open = self.file_writer is not None
        if not self.write_or_warn(Path(self.log_dir, "events.out.tfevents"), write, *values):
            self.file_writer = self.all_writers = self.purge_step = None
            if not was_open:  # the disk is still full
                self.again = time.perf_counter() + WARNING_INTERVAL
                for path in Path(self.log_dir).glob("events.out.tfevents.*"):
                    with contextlib.suppress(OSError):
                        if path.stat().st_size == 0:
                            path.unlink()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
        threading.excepthook = self.excepthook


def start_wandb(args: RunArgs, folder: Path) -> None:
    """Start Weights and Biases, before our TensorBoard writer is made: it patches TensorBoard to receive what is logged there.

    Raises:
        UsageError: if it does not start; a new run's folder is removed.
    """
    import wandb

    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=args.output,
            config=dataclasses.asdict(args),
            sync_tensorboard=True,
            save_code=True,
        )
    except wandb.Error as error:
        if args.resume is None:
            shutil.rmtree(folder)
        raise UsageError(f"--track: Weights and Biases did not start: {error}") from error
