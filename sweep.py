"""Many runs of one script, environments x settings x seeds: side by side on this machine, or as an array of SLURM jobs.

    python sweep.py --env-ids Hopper-v4 Walker2d-v4 --settings plain= strong="--critic-loss huber" --seeds 1 2 3
    python sweep.py (the same) --status                                  # a table of the runs; starts nothing
    python sweep.py (the same) --engine slurm --partition long --time 240 --sbatch account=lab

The same command again goes on with the runs that are not finished and that nobody works on; the run folders are the only
record. A run that was stopped, preempted, killed or out of time ends as it would have without that, bit for bit. What the
runs print is in runs/.sweep/, a file for each; what submitit keeps of SLURM's jobs is in runs/.sweep/slurm/.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
from tqdm import tqdm

from ddpg_continuous_action import UsageError, check_args, check_environment, parse_args

RUNS = Path("runs")
LOGS = RUNS / ".sweep"
SLURM_FOLDER = LOGS / "slurm"
STOPPED = {
    status for stop in (signal.SIGINT, signal.SIGTERM) for status in (128 + stop, -stop)
}  # with a save; too early for one
FRUITLESS_STARTS = 3  # in a row, each ended by the time limit before its first step, and a job is not queued again
FAILED = "sweep: failed"  # begins the last line in the log of a failed run


@dataclass
class Runs:
    """What is run."""

    script: Path = Path("ddpg_continuous_action.py")
    """the training script"""
    env_ids: tuple[str, ...] = ()
    """the environments"""
    settings: tuple[str, ...] = ("=",)
    """NAME=FLAGS, as in strong="--critic-loss huber": flags of the script; its --exp-name becomes <script>-NAME"""
    seeds: tuple[int, ...] = ()
    """the seeds (none: those that --num-seeds and --start-seed give)"""
    num_seeds: int = 3
    """how many seeds, if --seeds does not name them"""
    start_seed: int = 1
    """the first of these"""


@dataclass
class Engine:
    """Where it runs."""

    status: bool = False
    """show where each run is, and start nothing"""
    engine: Literal["auto", "local", "slurm"] = "auto"
    """this machine, or SLURM (auto: SLURM where sbatch is found)"""
    workers: int | None = None
    """runs side by side (None: one for each core; with SLURM as many as it allows)"""
    cpus: int = 1
    """threads of a run, and cores of its SLURM job (OMP_NUM_THREADS, if set, is the number of threads)"""


@dataclass
class Slurm:
    """What a job asks of SLURM."""

    partition: str | None = None
    """the partition"""
    time: int = 240
    """time limit of a job in minutes; a run that takes longer is saved, queued again and goes on"""
    memory: int | None = None
    """memory of a job in GB"""
    gpus: int | None = None
    """GPUs of a job"""
    constraint: str | None = None
    """features of the node; a resumed run is exact only on the type of processor that it began on"""
    sbatch: tuple[str, ...] = ()
    """any other option of sbatch, as in account=lab nice=100"""


@dataclass
class Options(Runs, Engine, Slurm):
    """Run a script for environments x settings x seeds; the same command again goes on with what is not finished."""


class Progress(NamedTuple):
    """How far a run is."""

    step: int = 0  # the last that is on the disk
    evaluation: float = math.nan  # the last mean return
    seconds_left: float = math.nan


@dataclass
class Job:
    """One run, started or resumed as its folders tell. SLURM calls it, and its `checkpoint` before the time limit."""

    script: str
    flags: list[str]
    args: dict[str, Any]  # as args.json holds them
    threads: int
    fruitless_starts: int = 0
    process: subprocess.Popen | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """What the names of its folders begin with."""
        env_name = re.sub(r"[^\w.+-]", "-", self.args["env_id"])
        return f"{env_name}__{self.args['exp_name']}__{self.args['seed']}"

    @property
    def log(self) -> Path:
        """The file for what all its starts print. It is locked for as long as the script lives."""
        digest = hashlib.sha256(json.dumps(self.args, sort_keys=True).encode()).hexdigest()
        return LOGS / f"{self.name}__{digest[:8]}.log"

    def folder(self, folders: dict[str, list[Path]]) -> Path | None:
        """The newest run folder with exactly these arguments among those of `list_folders`."""
        found = []
        for folder in folders[self.name]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no args.json, or a damaged one
                if json.loads((folder / "args.json").read_text())["args"] == self.args:
                    found.append(folder)
        return max(found, key=lambda folder: (folder / "args.json").stat().st_mtime, default=None)

    def progress(self, folder: Path | None) -> Progress:
        """How far the run in this folder is, by its checkpoints and evaluations."""
        if folder is None:
            return Progress()
        saved = [path for path in folder.glob("checkpoints/*") if re.fullmatch(r"\d+(\.pt)?", path.name)]
        marks = sorted((int(path.stem), path.stat().st_mtime) for path in saved)
        step, evaluation, seconds_left = marks[-1][0] if marks else 0, math.nan, math.nan
        with contextlib.suppress(OSError, IndexError), open(folder / "evaluations.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
            step, evaluation = max(step, int(last["global_step"])), float(last["mean"])
        with contextlib.suppress(OSError):
            evaluation = json.loads((folder / "evaluation.json").read_text())["mean"]
        # The pace is that between the last two checkpoints, without the time in which the run did not run.
        started = (folder / "args.json").stat().st_mtime
        (step1, time1), (step2, time2) = [(0, started), (0, started), *marks][-2:]
        if time2 > max(time1, started) and step2 > step1:
            pace = (step2 - step1) / (time2 - max(time1, started))
            seconds_left = max(0.0, (self.args["total_timesteps"] - step2) / pace - (time.time() - time2))
        return Progress(step, evaluation, seconds_left)

    def state(self, folder: Path | None, queue: dict[str, str]) -> str:
        """One of finished, running, queued, failed, interrupted and new; `queue` is that of `read_queue`."""
        if folder and (folder / "evaluation.json").exists():
            return "finished"
        if self.log.name in queue:
            return queue[self.log.name]
        if is_locked(self.log) or (folder and is_locked(folder / ".lock")):
            return "running"
        if self.last_lines(1).startswith(FAILED):
            return "failed"
        return "interrupted" if folder else "new"

    def start(self) -> Literal["started", "finished", "busy"]:
        """Start the run or resume it, unless it is finished or another process trains it (busy)."""
        LOGS.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as unless_started:
            self.log_file = unless_started.enter_context(open(self.log, "ab", buffering=0))
            locked = filelock.lock_descriptor(self.log_file.fileno(), blocking=False)
            folder = self.folder(list_folders())
            if folder and (folder / "evaluation.json").exists():
                return "finished"
            if not locked or (folder and is_locked(folder / ".lock")):
                return "busy"
            self.first_step = self.progress(folder).step
            command = [sys.executable, self.script, *(["--resume", str(folder)] if folder else self.flags)]
            self.log_file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            # SLURM sends SIGUSR2 to every process of a job, also to a script too young to take it; blocked signals are
            # inherited.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log_file,  # inherited with its lock, so a script whose sweep was killed still holds it
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                    start_new_session=True,  # Ctrl-C is for the sweep, which sends one SIGTERM
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            unless_started.pop_all()
            return "started"

    def end(self) -> Literal["finished", "interrupted", "failed"]:
        """Wait for the end of the script, and say what it was."""
        status = self.process.wait()
        state = "finished" if status == 0 else "interrupted" if status in STOPPED else "failed"
        if state == "failed":
            cause = f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
            self.log_file.write(f"{FAILED}, {cause}\n".encode())
        self.log_file.close()
        return state

    def last_lines(self, number: int = 6) -> str:
        """The last lines of the log."""
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            return "\n".join(file.read().decode(errors="replace").strip().splitlines()[-number:])
        return ""

    def __call__(self) -> None:
        """Train to the end, as a SLURM job.

        Raises:
            RuntimeError: if the script fails.
        """
        while (state := self.start()) != "finished":
            if state == "busy":  # perhaps the script of a job before this one, whose node was given up
                time.sleep(1)
                continue
            # Not Popen.wait: `checkpoint` interrupts this line, and would wait for its lock forever.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            if self.end() == "failed":
                raise RuntimeError(self.last_lines())
            if self.process.returncode in STOPPED:
                # Preempted or cancelled: SLURM ends this job too, and knows whether to queue it again. If it does not, a
                # person stopped the script.
                time.sleep(600)

    def checkpoint(self) -> Any:
        """Have the run saved before the time limit ends it; submitit calls this inside its handler of SIGUSR2.

        Returns:
            what submitit queues again, None for nothing.
        """
        import submitit

        if self.process and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            stepped = self.progress(self.folder(list_folders())).step > self.first_step
            again = dataclasses.replace(self, fruitless_starts=0 if stepped else self.fruitless_starts + 1)
            if again.fruitless_starts == FRUITLESS_STARTS:
                self.log_file.write(f"{FAILED}, {FRUITLESS_STARTS} times without a step: needs a longer --time\n".encode())
                return None
            return submitit.helpers.DelayedSubmission(again)
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self))


def list_folders() -> dict[str, list[Path]]:
    """The run folders, by their names without the time."""
    folders = defaultdict(list)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(RUNS):
            folders[name.rpartition("__")[0]].append(RUNS / name)
    return folders


def is_locked(path: Path) -> bool:
    """Whether a process has locked this file."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        return not filelock.lock_descriptor(file.fileno(), blocking=False)
    return False


def load_args_class(script: Path) -> type:
    """The `Args` of a training script."""
    sys.path.insert(0, str(script.resolve().parent))
    try:
        return importlib.import_module(script.stem).Args
    except (ImportError, SyntaxError, AttributeError) as error:
        raise UsageError(f"--script {script}: must be a training script ({error})") from None


def plan(options: Options) -> list[Job]:
    """The runs that are asked for. All flags are checked and, unless it is for --status, each environment once a setting.

    Raises:
        UsageError: naming the first mistake.
    """
    for name in ("num_seeds", "workers", "cpus", "time", "memory", "gpus"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be a whole number, 1 or more")
    if not options.env_ids:
        raise UsageError("--env-ids: must name one environment or more")
    names = Counter(setting.partition("=")[0] for setting in options.settings)
    if names.most_common(1)[0][1] > 1:
        raise UsageError(f"--settings {names.most_common(1)[0][0]}=: must have a name of its own")
    args_class = load_args_class(options.script)
    default = args_class()
    seeds = options.seeds or range(options.start_seed, options.start_seed + options.num_seeds)
    threads = int(os.environ.get("OMP_NUM_THREADS", options.cpus))
    jobs = []
    for setting in options.settings:
        name, separator, text = setting.partition("=")
        try:
            if not separator:
                raise UsageError("must be NAME=FLAGS")
            flags = shlex.split(text)
            common = parse_args(args_class, flags, default)
            for own in ("env_id", "exp_name", "seed", "resume", "evaluate"):
                if getattr(common, own) != getattr(default, own):
                    raise UsageError(f"--{own.replace('_', '-')} is not for a setting")
            exp_name = f"{default.exp_name}-{name}" if name else default.exp_name
            for env_id in dict.fromkeys(options.env_ids):
                for seed in dict.fromkeys(seeds):
                    args = dataclasses.replace(common, env_id=env_id, exp_name=exp_name, seed=seed)
                    check_args(args)
                    own_flags = ["--env-id", env_id, "--exp-name", exp_name, "--seed", str(seed)]
                    as_saved = json.loads(json.dumps(dataclasses.asdict(args), default=str))
                    jobs.append(Job(str(options.script), [*flags, *own_flags], as_saved, threads))
                if not options.status:
                    check_environment(args)
        except (UsageError, ValueError) as error:
            raise UsageError(f"--settings {setting}: {error}" if setting != "=" else str(error)) from None
    return jobs


def show(rows: list[tuple[Job, str, Progress]]) -> None:
    """Print a table of the runs, the last lines of those that failed, and a summary."""
    width = max(len(job.name) for job, _, _ in rows)
    print(f"{'run':{width}}  {'state':11} {'steps':>21} {'evaluation':>11} {'time left':>10}")
    for job, state, progress in rows:
        steps = f"{progress.step:,}/{job.args['total_timesteps']:,}"
        evaluation = "-" if math.isnan(progress.evaluation) else f"{progress.evaluation:.1f}"
        seconds = progress.seconds_left
        left = "-" if state != "running" or math.isnan(seconds) else tqdm.format_interval(seconds)
        print(f"{job.name:{width}}  {state:11} {steps:>21} {evaluation:>11} {left:>10}")
    for job in (job for job, state, _ in rows if state == "failed"):
        print(f"\n{job.name} failed, its log is {job.log}:\n{job.last_lines()}")
    counts = Counter(state for _, state, _ in rows)
    print(f"\n{len(rows)} runs: {', '.join(f'{number} {state}' for state, number in counts.most_common())}")


def run_here(rows: list[tuple[Job, str, Progress]], workers: int) -> int:
    """Run as processes of this machine, `workers` side by side, what nobody works on.

    Returns:
        the exit status: 128 plus the number of a signal that stopped the sweep, 1 if a run failed, or 0.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))  # raises nothing: no run slips through its start
    waiting = deque(job for job, state, _ in rows if state in ("new", "interrupted", "failed"))
    steps = {job.log: job.args["total_timesteps"] if state == "finished" else progress.step for job, state, progress in rows}
    total = sum(job.args["total_timesteps"] for job, _, _ in rows)
    running, ends, stopping, shown = [], Counter(), False, time.monotonic()
    with tqdm(total=total, initial=sum(steps.values()), unit="step", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        while running or (waiting and not signals):
            for _ in range(len(waiting)):
                if len(running) == workers or signals:
                    break
                job = waiting.popleft()
                state = job.start()
                if state == "started":
                    running.append(job)
                elif state == "busy":  # another sweep was faster: wait, it may be stopped
                    waiting.append(job)
            if signals and not stopping:
                stopping = True
                tqdm.write(f"stopping: {len(running)} runs save and leave, a second Ctrl-C does not wait for them")
                for job in running:
                    job.process.terminate()
            if signals.count(signal.SIGINT) > 1:
                break
            time.sleep(0.05 if running else 1)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                state = job.end()
                ends[state] += 1
                progress = job.progress(job.folder(list_folders()))
                steps[job.log] = job.args["total_timesteps"] if state == "finished" else progress.step
                what = (
                    f":\n{job.last_lines()}" if state == "failed" else f" at {progress.evaluation:.1f}, step {progress.step:,}"
                )
                tqdm.write(f"{job.name} {state}{what}")
            if not bar.disable and time.monotonic() > shown + 5:
                folders, shown = list_folders(), time.monotonic()
                steps |= {job.log: job.progress(job.folder(folders)).step for job in running}
                bar.n = sum(steps.values())
                bar.refresh()
    if signals:
        print(f"stopped, to go on: python {shlex.join(sys.argv)}")
        return 128 + signals[0]
    return 1 if ends["failed"] else 0


def ask_slurm(*command: str) -> str:
    """What a command of SLURM prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"--engine slurm: {getattr(error, 'stderr', '') or error}") from None


def read_queue(patience: float) -> dict[str, str]:
    """What SLURM has queued or running of the sweeps in this folder: "queued" or "running" by name of the log.

    Args:
        patience: seconds to wait for jobs that are about to end, or to be queued again.
    """
    import submitit

    queue, deadline = {}, time.monotonic() + patience
    command = ("squeue", "--me", "--noheader", "--array", "--format=%i %T")
    while "COMPLETING" in (listed := ask_slurm(*command)) and time.monotonic() < deadline:
        time.sleep(1)
    for number, state in map(str.split, listed.splitlines()):
        with contextlib.suppress(AssertionError, OSError):  # a job of something else
            job = submitit.SlurmJob(SLURM_FOLDER, number).submission().function
            queue[job.log.name] = "queued" if state == "PENDING" else "running"
    return queue


def submit(jobs: list[Job], options: Options) -> None:
    """Submit the jobs as an array, or several if SLURM's limit asks for it."""
    import cloudpickle
    import submitit

    cloudpickle.register_pickle_by_value(sys.modules[Job.__module__])  # the job does not import this file again
    executor = submitit.SlurmExecutor(SLURM_FOLDER, max_num_timeout=1_000_000)
    limit = int(re.search(r"MaxArraySize\s*=\s*(\d+)", ask_slurm("scontrol", "show", "config"))[1])
    other = {name: value if separator else True for name, separator, value in (text.partition("=") for text in options.sbatch)}
    executor.update_parameters(
        job_name=options.script.stem,
        partition=options.partition,
        time=options.time,
        mem=f"{options.memory}GB" if options.memory else None,
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus,
        constraint=options.constraint,
        signal_delay_s=min(90, 15 * options.time),  # a short limit needs a part of it for the training
        array_parallelism=options.workers or len(jobs),
        srun_args=[f"--cpus-per-task={options.cpus}"],  # which srun no longer takes from sbatch
        stderr_to_stdout=True,
        additional_parameters=other,
    )
    for first in range(0, len(jobs), limit):
        try:
            submitted = executor.submit_array(jobs[first : first + limit])
        except RuntimeError as error:
            raise UsageError(f"--engine slurm: {error}") from None
        print(f"submitted {len(submitted)} jobs, {submitted[0].job_id.split('_')[0]}; --status shows them, scancel stops them")


def sweep(jobs: list[Job], options: Options) -> int:
    """Show the runs and, without --status, go on with those that nobody works on; returns the exit status."""
    engine = options.engine
    if engine == "auto":
        engine = "slurm" if shutil.which("sbatch") else "local"
    for option in dataclasses.fields(Slurm):
        if engine == "local" and getattr(options, option.name) != option.default:
            raise UsageError(f"--{option.name}: needs SLURM, and this is --engine local")
    if engine == "slurm":
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UsageError("--engine slurm: needs submitit, install it with: pip install submitit") from None
    LOGS.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(LOGS / ".lock") if engine == "slurm" else contextlib.nullcontext():  # no job is submitted twice
        queue = read_queue(patience=0 if options.status else 60) if engine == "slurm" else {}
        folders, rows = list_folders(), []
        for job in jobs:
            folder = job.folder(folders)
            rows.append((job, job.state(folder, queue), job.progress(folder)))
        todo = [job for job, state, _ in rows if state in ("new", "interrupted", "failed")]
        if options.status or any(state != "new" for _, state, _ in rows):
            show(rows)
        if engine == "slurm" and todo and not options.status:
            submit(todo, options)
    if engine == "slurm" or options.status:
        return 0
    return run_here(rows, options.workers or os.cpu_count())


def main() -> int:
    """The command line."""
    try:
        options = parse_args(Options, sys.argv[1:], Options())
        return sweep(plan(options), options)
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
