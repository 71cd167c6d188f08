"""Many runs of a script, environments x settings x seeds: in parallel on this machine, or as an array of SLURM jobs.

    python -m steadyrl.sweep --env-ids Hopper-v4 Walker2d-v4 --settings plain= strong="--critic-loss huber" --seeds 1 2 3
    python -m steadyrl.sweep (the same) --status                                  # a table of the runs; starts nothing
    python -m steadyrl.sweep (the same) --engine slurm --partition long --time 240 --sbatch account=lab

The same command again continues the runs that are not finished and that no process works on. Run folders and logs are the only
record. A run that was stopped, preempted, killed or out of time gives the same result as without that, bit for bit. The output
of each run is in a file in runs/.sweep/. What submitit needs for SLURM jobs is in runs/.sweep/slurm/. SLURM jobs import this
package: it must be installed on the nodes, or be in the folder where the sweep is started.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError, Popen, check_output
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import filelock
from tqdm import tqdm

from steadyrl import arguments
from steadyrl.arguments import RESUME_MAY_CHANGE, Experiment, check_args, parse_args
from steadyrl.errors import UsageError, in_one_line
from steadyrl.family import FOLDER, find_script, import_script, is_harmless
from steadyrl.output import guard, printable, report, say, show
from steadyrl.run_folder import final_result, list_checkpoints, read_evaluations, step_of

LOGS = Path("runs/.sweep")
SLURM_FOLDER, PLAN = LOGS / "slurm", LOGS / "plan.json"
# Exit statuses after a stop: the run was saved, or it was too early for that.
STOPPED = {129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FRUITLESS_STARTS = 3  # in a row, each ended by the time limit before its first step: the job is not queued again
DAMAGES = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError  # of reading a damaged args.json
FAILED = "sweep: failed"  # begins the last line in the log of a failed run


@dataclass
class Slurm:
    """What a job requests from SLURM."""

    partition: str | None = None  # the partition
    time: int = 240  # time limit of a job in minutes; a run that takes longer is saved, queued again and goes on
    memory: int | None = None  # memory of a job in GB
    gpus: int | None = None  # GPUs of a job
    constraint: str | None = None  # features of the node; a resumed run is bit-identical only on the same type of processor
    sbatch: tuple[str, ...] = ()  # any other options of sbatch, as in account=lab nice=100 exclusive


if TYPE_CHECKING:  # the type checker is told that whatever has the flags of Runs has these too: Options, here and in tune.py
    OtherFlags = Slurm
else:
    OtherFlags = object


@dataclass
class Runs(OtherFlags):
    """What is run, and where."""

    script: Path = Path("ddpg_continuous_action.py")  # the training script: one of this project, or the path of your own
    env_ids: tuple[str, ...] = ()  # the environments (none: the default of the script)
    settings: tuple[str, ...] = ("",)  # NAME=FLAGS, as in strong="--tau 0.01"; --exp-name becomes <script>-NAME
    seeds: tuple[int, ...] = ()  # the seeds (none: those of --num-seeds and --start-seed)
    num_seeds: int = 3  # how many seeds, if --seeds does not name them
    start_seed: int = 1  # the first of these seeds
    status: bool = False  # show the state of each run, and start nothing
    engine: Literal["auto", "local", "slurm"] = "auto"  # this machine, or SLURM (auto: SLURM if there is a command sbatch)
    workers: int | None = None  # runs in parallel (None: one for each core; on SLURM all; for tune, cores divided by seeds)
    cpus: int = 1  # cores of a run's SLURM job. A run has as many threads, 2 at most; --num-threads in a setting allows more


@dataclass
class Options(Runs, Slurm):
    """Run a script for environments x settings x seeds. The same command again continues the runs that are not finished."""


class Status(NamedTuple):
    """The state of a run."""

    state: str  # new, queued, running, interrupted, failed or finished
    step: int  # the last one on the disk
    evaluation: float | None = None  # the last mean return
    seconds_left: float | None = None


@dataclass(eq=False)
class Job:
    """One run, started or resumed, depending on its folders. SLURM calls it, and its `checkpoint` before the time limit."""

    script: Path
    flags: list[str]
    args: dict[str, Any]  # as args.json holds them
    defaults: dict[str, Any] = field(default_factory=dict)  # of the script's flags, which a run of an older version may lack
    fruitless_starts: int = 0
    process: Popen | None = field(default=None, init=False)  # the script, from `start` to `end`

    @property
    def name(self) -> str:
        """What the names of its folders begin with."""
        env_name = re.sub(r"[^\w.+-]", "-", self.args["env_id"])
        return f"{env_name}__{self.args['exp_name']}__{self.args['seed']}"

    @property
    def log(self) -> Path:
        """The file with the output of all its starts. It is locked for as long as the script runs."""
        return LOGS / f"{self.name}__{zlib.crc32(json.dumps(self.args, sort_keys=True).encode()):08x}.log"

    def last_lines(self, number: int = 6) -> str:
        """The last lines of the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([printable(line) for line in text.splitlines() if line][-number:])

    def folder(self) -> Path | None:
        """The newest run folder with these arguments, also if an older version of the script made it.

        If there is none, a run also counts that differs only in flags that --resume may change: a user may have resumed it.
        """
        exact, alike, script = [], [], self.script.stem
        kept = RESUME_MAY_CHANGE - {"total_timesteps", "eval_frequency"}  # with others of these it is another result
        ours = re.compile(rf"{re.escape(self.name)}__\d+(-\d+)?")  # not a copy, which a user gave another name
        for path in Path("runs").glob(f"{self.name}__*/args.json"):
            if not ours.fullmatch(path.parent.name):
                continue
            with contextlib.suppress(*DAMAGES):
                recorded = json.loads(path.read_text())["args"].items()
                saved = self.defaults | {name: value for name, value in recorded if not is_harmless(script, name, value)}
                if saved == self.args:
                    exact.append(path)
                elif saved | {name: self.args[name] for name in kept & self.args.keys()} == self.args:
                    alike.append(path)
        return max(exact or alike, key=lambda path: path.stat().st_mtime).parent if exact or alike else None

    def status(self, queue: dict[str, str]) -> Status:
        """The state of the run, from its folder, the locks, the end of the log and SLURM's queue (see `read_queue`)."""
        folder, step, evaluation, seconds_left = self.folder(), 0, None, None
        if folder:
            with contextlib.suppress(OSError, ValueError):  # a file that is not there yet, or was just replaced
                marks = {step_of(path): path.stat().st_mtime for path in list_checkpoints(folder / "checkpoints")}
                (step1, time1), (step, time2) = [(0, 0.0), (0, 0.0), *sorted(marks.items())][-2:]
                if time1 > (folder / "args.json").stat().st_mtime:  # which is written at each start
                    seconds_left = (self.args["total_timesteps"] - step) / (step - step1) * (time2 - time1)
                    seconds_left -= time.time() - time2
            if rows := read_evaluations(folder):
                step, evaluation = max(step, rows[-1][0]), rows[-1][1]
        if folder and (result := final_result(folder, self.args)):
            state, evaluation = "finished", result["mean"]
        elif self.log.name in queue:
            state = queue[self.log.name]
        elif self.process or is_locked(self.log) or (folder and is_locked(folder / ".lock")):
            state = "running"
        else:
            state = "failed" if self.last_lines(1).startswith(FAILED) else "interrupted" if folder else "new"
        return Status(state, step, evaluation, seconds_left)

    def command(self, folder: Path | None) -> list[str]:
        """What starts the run, or resumes it in its folder."""
        return [sys.executable, str(self.script), *(["--resume", str(folder)] if folder else self.flags)]

    def start(self) -> Literal["started", "finished", "busy"]:
        """Start the run or resume it, unless it is finished or another process trains it (busy)."""
        with open(self.log, "ab", buffering=0) as log:
            if not filelock.lock_descriptor(log.fileno(), blocking=False):
                return "busy"
            folder = self.folder()
            if folder and final_result(folder, self.args):
                return "finished"
            if folder and is_locked(folder / ".lock"):
                return "busy"
            self.first_step = self.status({self.log.name: "running"}).step
            command = self.command(folder)
            with contextlib.suppress(OSError):  # a full disk
                log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            paths = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
            paths += [str(FOLDER)] if (FOLDER / "pyproject.toml").exists() else []  # in a clone, for a script of one's own
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
            # SLURM sends SIGUSR2 to every process of a job, also to a script too young to handle it. A block is inherited.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            # So is the log with its lock: a script that outlives its sweep still holds it. In a session of its own Ctrl-C
            # does not reach the script, only the one SIGTERM that the sweep sends.
            self.process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True, env=environment)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return "started"

    @property
    def started(self) -> Popen:
        """The script, between `start` and `end`."""
        if self.process is None:
            raise RuntimeError(f"{self.name} is not started")
        return self.process

    def end(self) -> Literal["finished", "interrupted", "failed"]:
        """Wait for the end of the script; returns how it ended."""
        status, self.process = self.started.wait(), None
        if status == 0 or status in STOPPED:
            return "interrupted" if status else "finished"
        self.log_failure(f"with status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}")
        return "failed"

    def log_failure(self, cause: str) -> None:
        """End the log with the line by which `status` recognises a failed run."""
        with contextlib.suppress(OSError), open(self.log, "a") as log:
            log.write(f"\n{FAILED}, {cause}\n")

    def __call__(self) -> None:
        """Train to the end, as a SLURM job; raises a RuntimeError if the script fails."""
        state: str = "new"
        while state != "finished":
            if (state := self.start()) == "started":
                # Not Popen.wait: `checkpoint` interrupts this line, and would wait for its lock forever.
                os.waitid(os.P_PID, self.started.pid, os.WEXITED | os.WNOWAIT)
                if (state := self.end()) == "failed":
                    raise RuntimeError(self.last_lines())
            # Busy: with the script of an earlier job, whose node was given up. Interrupted: by SLURM, which will end this
            # job too and knows whether to queue it again; or else by a person.
            time.sleep({"finished": 0, "busy": 1, "interrupted": 600}[state])

    def checkpoint(self) -> Any:
        """Have the run saved before the time limit, inside submitit's handler of SIGUSR2; returns what is queued again."""
        import submitit

        again = replace(self)
        if self.process and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            stepped = self.status({}).step > self.first_step
            again.fruitless_starts = 0 if stepped else self.fruitless_starts + 1
        if again.fruitless_starts < FRUITLESS_STARTS:
            return submitit.helpers.DelayedSubmission(again)
        self.log_failure(f"stopped by the time limit before a step, {FRUITLESS_STARTS} times in a row: needs a longer --time")


def say_what_cannot_be_read(jobs: list[Job]) -> None:
    """Name the folders of these runs whose args.json is damaged: they are not counted."""
    beginnings = tuple({f"{job.name}__" for job in jobs})
    for path in Path("runs").glob("*/args.json"):
        if path.parent.name.startswith(beginnings):
            try:
                json.loads(path.read_text())["args"].items()
            except DAMAGES as error:
                say(f"warning: {path} cannot be read, so this run is not counted ({in_one_line(error)[:100]})")


def is_locked(path: Path) -> bool:
    """Whether a process has locked this file."""
    with contextlib.suppress(OSError), open(path, "r+b") as file:  # there is none, or it can only be read
        return not filelock.lock_descriptor(file.fileno(), blocking=False)
    return False


def uses_slurm(options: Runs) -> bool:
    """Whether the runs are for SLURM. Raises a UsageError for a flag of SLURM if they are not."""
    slurm = options.engine == "slurm" or (options.engine == "auto" and shutil.which("sbatch") is not None)
    for option in fields(Slurm):
        value = getattr(options, option.name)
        if not slurm and value != option.default:
            typed = " ".join(value) if isinstance(value, tuple) else value
            raise UsageError(f"--{option.name} {typed}: is for SLURM only, must be left out here")
    return slurm


def plan(options: Runs) -> list[Job]:
    """The runs that the options ask for. Raises a UsageError for a wrong flag and, without --status, a wrong environment."""
    for name in ("num_seeds", "workers", "cpus", "time", "memory", "gpus", "trials"):  # the last one is tune.py's
        if (value := getattr(options, name, None)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be a whole number, 1 or more")
    slurm = uses_slurm(options)
    if not options.settings:
        raise UsageError("--settings: must name at least one, as in strong='--tau 0.01', or be left out")
    if unnamed := [setting for setting in options.settings if setting and "=" not in setting]:
        raise UsageError(f"--settings {unnamed[0]}: must be NAME=FLAGS, as in strong='--tau 0.01'")
    if len({setting.partition("=")[0] for setting in options.settings}) < len(options.settings):
        raise UsageError("--settings: each must have a different name")
    try:
        script = find_script(options.script)
        module: Any = import_script(script)
        args_class: Any = module.Args
        if not (isinstance(args_class, type) and issubclass(args_class, Experiment)):
            raise TypeError("its Args is not a dataclass that joins the groups of steadyrl.arguments")
        default, jobs = args_class(), []
        check_args(parse_args(args_class, [], default))
    except UsageError:  # of its defaults
        raise
    except (Exception, SystemExit) as error:  # whatever is in the file
        raise UsageError(f"--script {options.script}: must be a training script ({in_one_line(error)})") from None
    defaults, agent_class = as_saved(default), getattr(getattr(module, "main", None), "agent_class", None)
    for setting in options.settings:
        name, _, text = setting.partition("=")
        try:
            flags = shlex.split(text)
            common = parse_args(args_class, flags, default)
            for own in ("env_id", "exp_name", "seed", "resume", "evaluate", "output"):
                if getattr(common, own) != getattr(default, own):
                    raise UsageError(f"--{own.replace('_', '-')} is not for a setting")
            exp_name = f"{default.exp_name}-{name}" if name else default.exp_name
            for env_id in dict.fromkeys(options.env_ids or [default.env_id]):
                for seed in dict.fromkeys(options.seeds or range(options.start_seed, options.start_seed + options.num_seeds)):
                    args = replace(common, env_id=env_id, exp_name=exp_name, seed=seed)
                    check_args(args)
                    own_flags = ["--env-id", env_id, "--exp-name", exp_name, "--seed", str(seed)]
                    jobs.append(Job(script, [*flags, *own_flags], as_saved(args), defaults))
                if not options.status:
                    from steadyrl.checks import check  # imports PyTorch, which the table does without
                    from steadyrl.command_line import check_further

                    check(args)
                    check_further(args, agent_class, on_this_machine=not slurm)
        except (UsageError, ValueError) as error:
            raise UsageError(f"--settings {setting}: {error}" if setting else str(error)) from None
    return jobs


def as_saved(args: arguments.RunArgs) -> dict[str, Any]:
    """Arguments as args.json holds them."""
    return dict(json.loads(json.dumps(asdict(args), default=str)))


def planned(options: Options) -> list[Job]:
    """The jobs of `plan`. For --status they come from a file if the last plan in this folder had the same options and flags.
    Importing the script, and PyTorch with it, takes seconds."""
    sources = (FOLDER / f"{options.script.stem}.py", options.script, Path(__file__), Path(arguments.__file__))
    asked = repr((replace(options, status=False, workers=None), [path.stat().st_mtime_ns for path in sources if path.exists()]))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or one of an older version
        saved = json.loads(PLAN.read_text())
        if options.status and saved["asked"] == asked:
            return [Job(Path(script), flags, args, defaults) for script, flags, args, defaults in saved["jobs"]]
    jobs = plan(options)
    found = {"asked": asked, "jobs": [(str(job.script), job.flags, job.args, job.defaults) for job in jobs]}
    with contextlib.suppress(OSError):  # a full disk, or --status in a folder without runs: it is found out again
        PLAN.parent.mkdir(parents=not options.status, exist_ok=True)
        PLAN.write_text(json.dumps(found))
    return jobs


def show_table(rows: list[tuple[Job, Status]]) -> None:
    """Print a table of the runs, a summary, and the last lines of those that failed."""
    width = max(len(job.name) for job, _ in rows)
    show(f"{'run':{width}}  {'state':11} {'steps':>21} {'evaluation':>11} {'time left':>10}")
    for job, (state, step, evaluation, seconds_left) in rows:
        left = tqdm.format_interval(max(0, seconds_left)) if state == "running" and seconds_left is not None else "-"
        steps, mean = f"{step:,}/{job.args['total_timesteps']:,}", "-" if evaluation is None else f"{evaluation:.1f}"
        show(f"{job.name:{width}}  {state:11} {steps:>21} {mean:>11} {left:>10}")
    states = [status.state for _, status in rows]
    show(f"\n{len(rows)} runs: {', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))}")
    for job in (job for job, status in rows if status.state == "failed"):
        show(f"\n{job.name} failed, its log is {job.log}:\n{job.last_lines()}")


def run_here(jobs: list[Job], todo: list[Job], workers: int, enough: Callable[[], bool] = lambda: False) -> int:
    """Run `todo` on this machine, `workers` in parallel, with one progress bar for all jobs; returns the exit status.

    Args:
        enough: called once a second; if it returns true, the runs are stopped as by a signal.
    """
    signals: list[int] = []
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    # The handler raises nothing, so no start is torn apart.
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in handled}
    waiting, failures, stopping, asked, shown = list(todo), 0, False, 0.0, 0.0
    running: list[Job] = []
    again: dict[str, float] = {}  # when to look again at a run that was busy

    def steps() -> int:
        rows = [(job.status({}), job.args["total_timesteps"]) for job in jobs]
        return sum(most if status.state == "finished" else status.step for status, most in rows)

    most = sum(job.args["total_timesteps"] for job in jobs)
    with tqdm(total=most, initial=steps(), unit="step", unit_scale=True, disable=None) as bar:
        while (running and signals.count(signal.SIGINT) < 2) or (waiting and not (signals or stopping)):
            for job in [job for job in waiting if time.monotonic() >= again.get(job.name, 0)]:
                if signals or stopping or len(running) == workers:
                    break
                if (state := job.start()) == "busy":  # another sweep has it, and may be stopped
                    again[job.name] = time.monotonic() + 1
                else:
                    waiting.remove(job)
                if state == "started":
                    running.append(job)
            if not stopping and (signals or time.monotonic() > asked + 1):
                asked, stopping = time.monotonic(), bool(signals) or enough()
                for job in running if stopping else ():
                    job.started.terminate()
                if stopping and signals:
                    say(f"stopping: {len(running)} runs save and exit; a second Ctrl-C does not wait for them")
            if not bar.disable and time.monotonic() > shown + 15:
                shown = time.monotonic()
                bar.update(steps() - bar.n)
            time.sleep(0.02 if running else 1)
            for job in [job for job in running if job.started.poll() is not None]:
                running.remove(job)
                end = job.end()
                failures += end == "failed" or (end == "interrupted" and not stopping)  # by somebody else
                lines = job.last_lines(6).splitlines()
                if end != "failed":  # after the result come commands
                    lines = [line for line in lines if not line.startswith("to ")][-1:]
                show(f"{job.name} {end}: " + "\n".join(lines))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if signals:
        module = sys.modules["__main__"].__spec__  # none, if a file was started
        program = f"-m {module.name}" if module else shlex.quote(sys.argv[0])
        say(f"stopped, to go on: python {program} {shlex.join(sys.argv[1:])}")
    return 128 + signals[0] if signals else min(failures, 1)


def read_queue(patience: float) -> dict[str, str]:
    """SLURM's runs: "queued" or "running", by the name of the log. Waits at most `patience` seconds for jobs to end.

    Raises:
        UsageError: if SLURM does not answer.
    """
    import submitit

    queue, deadline = {}, time.monotonic() + patience
    squeue = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    try:
        while "COMPLETING" in (listed := check_output(squeue, text=True, stderr=PIPE)) and time.monotonic() < deadline:
            time.sleep(1)
    except (CalledProcessError, FileNotFoundError) as error:
        reason = getattr(error, "stderr", error)
        raise UsageError(f"SLURM does not answer; --engine local would use this machine ({reason})") from None
    for number, state in map(str.split, listed.splitlines()):
        with contextlib.suppress(AssertionError, OSError):  # a job of something else, which has no file here
            # It is a Job. The types of submitit know it as a function only.
            job: Any = submitit.SlurmJob(SLURM_FOLDER, number).submission().function
            queue[job.log.name] = "queued" if state == "PENDING" else "running"
    return queue


def submit(jobs: list[Job], options: Runs) -> None:
    """Submit the jobs as an array, or as several where SLURM limits its size."""
    import submitit

    executor = submitit.SlurmExecutor(SLURM_FOLDER, max_num_timeout=1_000_000)
    executor.update_parameters(job_name=options.script.stem, partition=options.partition, constraint=options.constraint)
    memory = options.memory and f"{options.memory}GB"
    srun_args = [f"--cpus-per-task={options.cpus}"]  # srun does not take it over from sbatch
    executor.update_parameters(mem=memory, cpus_per_task=options.cpus, gpus_per_node=options.gpus, srun_args=srun_args)
    parallel, delay = options.workers or len(jobs), min(90, 15 * options.time)  # seconds: a short limit leaves less to save in
    executor.update_parameters(time=options.time, signal_delay_s=delay, array_parallelism=parallel, stderr_to_stdout=True)
    other = [text.partition("=") for text in options.sbatch]
    executor.update_parameters(additional_parameters={name: value if equals else True for name, equals, value in other})
    config = check_output(["scontrol", "show", "config"], text=True, stderr=PIPE)
    limit = int(re.findall(r"MaxArraySize\s*=\s*(\d+)", config)[0])
    for first in range(0, len(jobs), limit):
        try:
            submitted = executor.submit_array(jobs[first : first + limit])
        except submitit.core.utils.FailedJobError as error:
            raise UsageError(f"sbatch: {error}") from None
        say(f"submitted {len(submitted)} jobs, {submitted[0].job_id.split('_')[0]}; --status shows them, scancel stops them")


def sweep(jobs: list[Job], options: Runs) -> int:
    """Show the runs. Without --status, also continue those that no process works on. Returns the exit status."""
    slurm = uses_slurm(options)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.cpus))
    say_what_cannot_be_read(jobs)
    if not options.status:
        LOGS.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if options.status else filelock.FileLock(LOGS / ".lock"):  # two must not submit the same job
        queue = read_queue(patience=0 if options.status else 60) if slurm else {}
        rows = [(job, job.status(queue)) for job in jobs]
        todo = [job for job, status in rows if status.state in ("new", "interrupted", "failed")]
        show_table(rows)
        if slurm and todo and not options.status:
            submit(todo, options)
    return 0 if slurm or options.status else run_here(jobs, todo, options.workers or os.cpu_count() or 1)


def main(options_class: type = Options, work: Callable[[Any], int] = lambda options: sweep(planned(options), options)) -> int:
    """The command line: parse it and work; an expected error is one line and status 2."""
    guard()
    sys.path.append(os.getcwd())  # where the module of --env-ids module:EnvId may be
    warnings.filterwarnings("ignore", ".*is out of date")  # as Hopper-v4 is, the default
    try:
        return work(parse_args(options_class, sys.argv[1:], options_class()))
    except (UsageError, CalledProcessError, ModuleNotFoundError, OSError) as error:  # the second: scontrol
        missing = f"{error}, install it with: pip install {error.name}" if isinstance(error, ModuleNotFoundError) else error
        report(getattr(error, "stderr", None) or missing)
        return 2
    except KeyboardInterrupt:  # while nothing runs here
        return 128 + signal.SIGINT


if __name__ == "__main__":
    from steadyrl import sweep as imported  # jobs are pickled by reference, and no other process has this __main__

    sys.exit(imported.main())
