"""Compare runs over seeds and tasks, as Agarwal et al. (2021) recommend.

    python -m steadyrl.compare "runs/Hopper-v4__*" -o comparison                    # grouped by experiment and settings
    python -m steadyrl.compare plain="runs/*plain*" strong="runs/*strong*" --baseline plain -o comparison

It reads this repository's run folders (args.json, evaluations.csv) and the TensorBoard folders of CleanRL and of
stable-baselines3, and writes comparison.png, comparison.pdf and comparison.md.

- Score of a run: the mean of its last five evaluations, never its best one. With `--metric success`, of their success rates.
- Interquartile mean (IQM): the mean without the lowest and the highest quarter of the scores, rounded down.
- Interval: the 95% percentile interval of the stratified bootstrap, which resamples runs within each task.
- Performance profile: the share of runs whose score is above x.
- Probability of improvement: P(X > Y) for a run of each group on the same task, averaged over tasks.
- Sample efficiency: the learning curve of the normalised score over all tasks.

Paper: "Deep reinforcement learning at the edge of the statistical precipice", arXiv:2108.13264.
"""

import csv
import json
import os
import re
import signal
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from steadyrl.arguments import UNLEARNED, check_packages, parse_command_line
from steadyrl.errors import UsageError
from steadyrl.output import guard, report, show
from steadyrl.run_folder import final_result

LAST = 5  # evaluations in a run's score
BINS = 20  # points, about, that the training returns of a run become
RESAMPLES = 5_000  # of the bootstrap
STEPS = "environment steps"
TRAINING = " (training returns)"  # ends the name of a group of them

# The returns that count as 0 and as 1 when tasks are pooled, fixed so that scores of different comparisons agree.
RANGES = {
    # Random policy and TD3 after 1,000,000 steps: Fujimoto et al., 2023, arXiv:2306.02451.
    "Ant-v4": (-70.288, 3942.0),
    "HalfCheetah-v4": (-289.415, 10574.0),
    "Hopper-v4": (18.791, 3226.0),
    "Humanoid-v4": (120.423, 5165.0),
    "Walker2d-v4": (2.791, 3946.0),
    # Random policy: mean of 1,000 episodes, Gymnasium 1.4. Good policy: SAC in rl-baselines3-zoo's benchmark.md
    # (of LunarLanderContinuous-v2); for InvertedPendulum the highest return there is.
    "InvertedPendulum-v4": (6.1, 1000.0),
    "InvertedPendulum-v5": (5.1, 1000.0),
    "LunarLanderContinuous-v3": (-209.8, 260.4),
    "MountainCarContinuous-v0": (-33.3, 94.7),
    "Pendulum-v1": (-1230.7, -157.0),
}
# TensorBoard's names of the returns, the best first, and whether they are those of training episodes. CleanRL's
# eval/episodic_return is no curve: its steps are numbers of episodes.
TAGS = {"eval/mean_reward": False, "charts/episodic_return": True, "rollout/ep_rew_mean": True}
# Runs that differ in nothing but these flags are one group. (--total-timesteps may change what is learned, since exploration
# can fall over a share of it. Runs of other lengths are still one group.)
NO_SETTINGS = UNLEARNED | {"env_id", "total_timesteps", "vectorization"}
COVERAGE = "with 3, 5 and 10 seeds of one task they hold the true value in 75, 89 and 93% of cases"
READING = f"""\
- A score is the mean of a run's last {LAST} evaluations. The interquartile mean of fewer than four runs is their mean.
- Few seeds prove little. Intervals are called 95%, but {COVERAGE}, of five tasks in 87, 91 and 93% (simulated, normal scores).
- With 3 seeds of one task, an interval is just from the lowest to the highest run. A single run has none.
- Where two groups do not differ at all, all 3 runs of the first beat all 3 of the second in 1 of 20 cases.
- Training returns include exploration: do not compare them with greedy evaluations.
- Where tasks are pooled, those with more runs have more weight.
"""


@dataclass
class Args:
    """Compare runs over seeds and tasks: learning curves, table, performance profile, probability of improvement."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/*",)
    """run folders, patterns of them, or NAME=PATTERN to name a group; the others are grouped by experiment and settings"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("comparison")
    """the files to write, without their endings .png, .pdf and .md"""
    overwrite: bool = False
    """replace these files if they exist, instead of stopping"""
    metric: Literal["return", "success"] = "return"
    """what a score measures: returns, or the share of successful episodes, if the environment reports success"""
    aggregate: Literal["iqm", "mean"] = "iqm"
    """the interquartile mean over runs, or the mean"""
    baseline: str | None = None
    """the group that the others are compared with (None: the first)"""
    range: dict[str, tuple[float, float]] = field(default_factory=dict)
    """returns that count as 0 and as 1 when tasks are pooled, as in: --range Hopper-v5 20 3200"""
    task: str | None = None
    """the environment of runs whose folders do not name it"""
    newest: bool = False
    """if several runs have the same group, task and seed, take the newest instead of stopping"""


class TooYoung(Exception):
    """A run of this repository was not yet evaluated."""


class Run(NamedTuple):
    """The returns of one run."""

    folder: Path
    group: str  # empty until `name_groups`, if the user has not named it
    settings: dict[str, str]  # at least env_id, exp_name and seed
    training: bool  # whether the returns are those of training episodes
    finished: bool  # as far as the folder tells
    at_target: bool  # whether its last evaluation reached --target-return
    steps: np.ndarray  # (E,) environment steps, ascending
    returns: np.ndarray  # (E,)


class Task(NamedTuple):
    """The runs of a task at the same steps."""

    grid: np.ndarray  # (G,) environment steps or, of pooled tasks, maybe shares of them
    curves: dict[str, np.ndarray]  # of each group: (runs, G)
    scores: dict[str, np.ndarray]  # of each group: (runs,)


class Panel(NamedTuple):
    """A picture: of each group a value with its interval, (3, X) along x or, where x is None, (3,)."""

    title: str
    xlabel: str
    ylabel: str
    x: np.ndarray | None
    estimates: dict[str, np.ndarray]


def find_folders(patterns: Sequence[str]) -> dict[Path, str | None]:
    """The folders that the patterns name, each with the name of its group, if it was given one (the last, if several).

    A pattern skips folders with nothing in them: somebody pressed Ctrl-C when a run began.

    Raises:
        UsageError: if a pattern matches no folder.
    """
    folders: dict[Path, str | None] = {}
    for pattern in patterns:
        named = None if Path(pattern).exists() else re.fullmatch(r"([^=/]+)=(.+)", pattern)
        name, paths = named.groups() if named else (None, pattern)
        matches = [paths] if Path(paths).exists() else sorted(glob(paths, recursive=True))
        found = [
            path for path in map(Path, matches) if path.is_dir() and (paths == str(path) or {*os.listdir(path)} - {".lock"})
        ]
        if not found:
            raise UsageError(f"{paths}: no such folder")
        folders |= {folder: name or folders.get(folder) for folder in found}
    return folders


def bin_returns(steps: np.ndarray, returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of (N,) episodes' returns over about 20 bins of equal length, each at its last step."""
    width = float(f"{steps[-1] / BINS:.0e}")  # one digit: runs that end at 999,873 and 1,000,000 steps share their bins
    ends, numbers = np.unique(np.ceil(steps / width) * width, return_inverse=True)
    return np.minimum(ends, steps[-1]), np.bincount(numbers, returns) / np.bincount(numbers)


def read_events(folder: Path, notes: list[str]) -> tuple[dict[str, str], bool, np.ndarray]:
    """The settings, whether the returns are those of training, and (E, 2) steps and returns of a TensorBoard folder.

    If a run was started again, a later file begins at an earlier step. Points of the earlier files from that step on are left
    out.

    Raises:
        ValueError: if it holds no returns.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    settings: dict[str, str] = {}
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for file in sorted(folder.glob("*tfevents*")):  # TensorBoard's order: the names begin with the second
        begun = set()
        for event in EventFileLoader(str(file)).Load():
            if event.session_log.status == event.session_log.START and event.HasField("session_log"):
                points |= {tag: [point for point in old if point[0] < event.step] for tag, old in points.items()}
            for value in event.summary.value:
                if value.tag == "hyperparameters/text_summary" and not settings:  # CleanRL's table of its flags
                    text = value.tensor.string_val[0].decode()
                    settings = dict(re.findall(r"^\|(\w+)\|(.*)\|$", text, re.MULTILINE)[1:])  # without its header
                if value.tag not in TAGS:
                    continue
                if value.tag not in begun:
                    begun.add(value.tag)
                    kept = [point for point in points[value.tag] if point[0] < event.step]
                    if given_up := len(points[value.tag]) - len(kept):
                        again = f"was started again at step {event.step:,}; {given_up} later returns are left out."
                        notes.append(f"{folder}: {again}")
                    points[value.tag] = kept
                points[value.tag].append((event.step, float(make_ndarray(value.tensor))))
    tag = next((tag for tag in TAGS if points[tag]), None)
    if tag is None:
        raise ValueError(f"neither evaluations.csv nor TensorBoard events of {', '.join(TAGS)}")
    return settings, TAGS[tag], np.array(points[tag])


def read_run(folder: Path, group: str | None, task: str | None, notes: list[str], metric: str = "return") -> Run:
    """Read a run folder of this repository, of CleanRL or of stable-baselines3.

    Args:
        folder: the run folder
        group: the name that the user gave to its group
        task: its environment, if the folder does not say it
        notes: a list, to which remarks about the run are added
        metric: return, or success, which only evaluations.csv has

    Raises:
        TooYoung: if it was not yet evaluated.
        UsageError: if the folder is damaged, holds nothing of this metric, or does not say its environment.
    """
    column = "mean" if metric == "return" else metric
    settings: dict[str, str] = {}
    points, training, finished, at_target = np.empty((0, 2)), False, True, False
    try:
        if (folder / "args.json").exists():
            recorded = json.loads((folder / "args.json").read_text()).get("args")
            if recorded is None:
                raise ValueError("its args.json has no args")
            settings = {flag: str(value) for flag, value in recorded.items()}
            finished = "total_timesteps" not in recorded or final_result(folder, recorded) is not None
        if (folder / "evaluations.csv").exists():
            with open(folder / "evaluations.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows:
                raise ValueError("its evaluations.csv has no row")
            if missing := [name for name in ("global_step", "mean", column) if name not in rows[0]]:
                raise ValueError(f"its evaluations.csv has no column {missing[0]!r}")
            points = np.array([(float(row["global_step"]), float(row[column])) for row in rows])
            target = settings.get("target_return", "None")  # a return, whatever a score measures
            at_target = float(rows[-1]["mean"]) >= float(target.replace("None", "inf"))
        if not len(points) and not finished and settings.get("eval_frequency") != "0":
            raise TooYoung
        if not len(points) and metric != "return":
            raise ValueError(f"no evaluations.csv, which --metric {metric} needs")
        if not len(points):
            summary, training, points = read_events(folder, notes)
            settings = settings or summary
        steps, returns = points[np.argsort(points[:, 0], kind="stable")].T
        if not np.isfinite([steps, returns]).all() or not (steps[0] >= 0 and steps[-1] < 2**53):
            raise ValueError("a step or a return is not a valid number")
        if training:
            steps, returns = bin_returns(steps, returns)
    except TooYoung:
        raise
    except Exception as error:  # of damaged CSV, JSON or protocol buffers: many types
        raise UsageError(f"{folder}: damaged, or not a run folder: {error}") from error

    path = folder.resolve()
    parts = path.name.split("__")
    if len(parts) == 4:  # CleanRL's names and ours: environment, experiment, seed, time
        names = {"env_id": parts[0], "exp_name": parts[1], "seed": parts[2]}
    else:  # stable-baselines3's: Hopper-v4/TD3_1
        env_ids = [task or "", *re.findall(r"[A-Za-z0-9]+-v\d+", f"{path.parent.name}/{path.name}")]
        names = {"env_id": env_ids[-1], "exp_name": re.sub(r"_\d+$", "", path.name), "seed": str(path)}
    if not (names | settings)["env_id"]:
        raise UsageError(f"{folder}: does not say its environment, name it with --task")
    return Run(folder, group or "", names | settings, training, finished, at_target, steps, returns)


def name_groups(runs: Sequence[Run], notes: list[str], newest: bool = False) -> list[Run]:
    """The runs with their groups' names: the user's, otherwise the experiment and the flags that differ within a task.

    Args:
        newest: if several runs of a group have the same task and seed, take the newest.

    Raises:
        UsageError: if there are several, and `newest` is false.
    """
    recorded: dict[tuple[str, str, bool], list[dict[str, str]]] = defaultdict(list)
    differing: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for run in runs:
        recorded[run.settings["env_id"], run.group or run.settings["exp_name"], run.training].append(run.settings)
    for (task, name, training), settings in recorded.items():
        flags = set[str]().union(*settings) - NO_SETTINGS
        differing[name, training] |= {flag for flag in flags if len({one[flag] for one in settings if flag in one}) > 1}
        if missing := sorted(flag for flag in flags if any(flag not in one for one in settings)):
            some = textwrap.shorten(", ".join(missing), 60, placeholder=" and others")
            notes.append(f"{task}: some runs of {name} do not record {some}: assumed to be the same in all of them.")

    named: dict[tuple[str, str, str], Run] = {}
    for run in runs:
        group = run.group or run.settings["exp_name"]
        if not run.group:
            differ = sorted(differing[group, run.training] & run.settings.keys())
            group += "".join(f" {flag}={run.settings[flag]}" for flag in differ)
        group += TRAINING * run.training
        key = group, run.settings["env_id"], run.settings["seed"]
        other = named.get(key, run)
        if other.folder != run.folder:
            if not newest:
                ways = "leave one out, name two groups, or use --newest"
                raise UsageError(f"{run.folder} and {other.folder}: the same group, task and seed; {ways}")
            older, run = sorted((other, run), key=started)
            notes.append(f"{older.folder} is left out: {run.folder} is newer.")
        named[key] = run._replace(group=group)
    return list(named.values())


def started(run: Run) -> float:
    """When a run was started or resumed. A later --evaluate changes its folder, but not its args.json."""
    record = run.folder / "args.json"
    return (record if record.exists() else run.folder).stat().st_mtime


def align(task: str, runs: Sequence[Run], notes: list[str]) -> Task:
    """Bring the runs of a task to the same steps: those of the run with the fewest, up to the end of the shortest.

    A run that stopped at its target return does not cut the others: after its end, its curve stays at its score.

    Raises:
        UsageError: if one of them ends before the evaluations of another begin.
    """
    going = [run for run in runs if not run.at_target]
    shortest = min(going, key=lambda run: run.steps[-1]) if going else max(runs, key=lambda run: run.steps[-1])
    end = shortest.steps[-1]
    steps = min((run.steps for run in runs if run.steps[-1] >= end), key=lambda steps: np.sum(steps <= end))
    tolerance = 0.1 * np.median(np.diff(steps)) if len(steps) > 1 else 0.0  # steps may differ by a few
    start = max(run.steps[0] for run in runs)
    grid = steps[(steps >= start - tolerance) & (steps <= end + tolerance)]
    if not grid.size:
        raise UsageError(f"{shortest.folder}: ends at {end:,.0f} steps, before the first evaluation of another run of {task}")
    curves, scores, scored, stopped = defaultdict(list), defaultdict(list), [], 0  # scored: the steps of a score's evaluations
    for run in runs:
        curve, after = np.interp(grid, run.steps, run.returns), grid > run.steps[-1] + tolerance
        last = np.flatnonzero(run.steps <= grid[-1] + tolerance)[-LAST:]
        score = run.returns[last].mean()
        scored.append(run.steps[last])
        curves[run.group].append(np.where(after, score, curve))
        scores[run.group].append(score)
        stopped += after.any()
    if unfinished := [run for run in runs if not run.finished]:
        notes.append(f"{task}: {len(unfinished)} of the runs are not finished, for example {unfinished[0].folder}.")
    if stopped:
        notes.append(f"{task}: {stopped} of the runs stopped early at their target; their curves stay at their scores.")
    if max(run.steps[-1] for run in runs) > end + tolerance:
        notes.append(f"{task}: all runs are cut at {end:,.0f} steps, where {shortest.folder} ends.")
    if (fewest := min(map(len, scored))) < LAST:
        notes.append(f"{task}: a score is the mean of {fewest} evaluations, there are no more.")
    spans = [np.ptp(steps) for steps in scored]
    if max(spans) > 1.5 * min(spans):
        notes.append(f"{task}: scores span the last {min(spans):,.0f} steps of some runs, {max(spans):,.0f} of others.")
    return Task(grid, *({group: np.array(rows) for group, rows in values.items()} for values in (curves, scores)))


def pool(tasks: dict[str, Task], ranges: dict[str, tuple[float, float]], notes: list[str]) -> list[Task]:
    """The tasks of known range that every group has run, normalised, on one grid; none if these are fewer than two."""
    groups = {group for task in tasks.values() for group in task.scores}
    for name, task in tasks.items():
        if name not in ranges:
            notes.append(f"{name} is not pooled with other tasks, its range is unknown: --range {name} LOW HIGH")
        elif task.scores.keys() != groups:
            notes.append(f"{name} is not pooled with other tasks, not every group has run it.")
    known = {name: task for name, task in tasks.items() if name in ranges and task.scores.keys() == groups}
    if len(known) < 2:
        return []
    used = ", ".join(f"{ranges[name][0]:g} and {ranges[name][1]:g} ({name})" for name in known)
    notes.append(f"Where tasks are pooled, scores of 0 and 1 are returns of {used}.")
    shares = min((task.grid / task.grid[-1] for task in known.values()), key=len)
    shares = shares[shares >= max(task.grid[0] / task.grid[-1] for task in known.values()) - 1e-9]
    same_end = len({task.grid[-1] for task in known.values()}) == 1
    pooled = []
    for name, (grid, curves, scores) in known.items():
        low, high = ranges[name]
        x = shares * grid[-1]
        curves = {group: np.array([np.interp(x, grid, curve) for curve in rows]) for group, rows in curves.items()}
        curves, scores = ({g: (v - low) / (high - low) for g, v in values.items()} for values in (curves, scores))
        pooled.append(Task(x if same_end else shares, curves, scores))
    return pooled


def iqm(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """The interquartile mean over the runs (the last axis) of all tasks, with rliable's trimming: 25% a side, rounded down."""
    from scipy import stats  # type: ignore[import-untyped]  # its types are a package of their own, scipy-stubs

    return stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis=axis)


def mean(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """The mean over the runs (the last axis) of all tasks."""
    return np.concatenate(tasks, axis).mean(axis)


def probability_of_improvement(*tasks: np.ndarray, axis: int) -> np.ndarray:
    """P(X > Y), ties counting half, averaged over tasks: the scores (..., runs) of X on each task, then those of Y."""
    pairs = zip(tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :], strict=True)
    return np.mean([np.heaviside(x[..., :, None] - y[..., None, :], 0.5).mean((-2, -1)) for x, y in pairs], axis=0)


def comparable(group: str, baseline: str) -> bool:
    """Whether a probability of improvement means anything: training returns include exploration, greedy ones do not."""
    return group != baseline and group.endswith(TRAINING) == baseline.endswith(TRAINING)


def estimate(tasks: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> np.ndarray:
    """A statistic with its 95% stratified bootstrap interval, (3, ...): value, low, high; the last two are NaN for single runs.

    Args:
        tasks: of each task (runs, ...); runs are drawn whole, each task's from its own
        statistic: of all tasks, along their last axis
    """
    from scipy import stats

    samples = [np.moveaxis(task, 0, -1) for task in tasks]
    value = statistic(*samples, axis=-1)
    if min(len(task) for task in tasks) == 1:
        return np.array([value, value * np.nan, value * np.nan])
    interval = stats.bootstrap(
        samples, statistic, axis=-1, vectorized=True, method="percentile", n_resamples=RESAMPLES, batch=500, rng=0
    ).confidence_interval
    return np.array([value, interval.low, interval.high])


STATISTICS = {"iqm": ("interquartile mean", iqm), "mean": ("mean", mean)}


def make_panels(
    tasks: dict[str, Task],
    pooled: Sequence[Task],
    baseline: str,
    statistic: Callable[..., np.ndarray],
    metric: str = "return",
) -> list[Panel]:
    """The pictures: a learning curve for each task and, where there is more to compare, those over all tasks."""

    def curve(title: str, ylabel: str, parts: Sequence[Task]) -> Panel:
        xlabel = STEPS if parts[0].grid[-1] > 1 else "share of each task's steps"
        curves = {group: estimate([part.curves[group] for part in parts], statistic) for group in parts[0].curves}
        return Panel(title, xlabel, ylabel, parts[0].grid, curves)

    panels = []
    for name, task in tasks.items():
        training = [group.endswith(TRAINING) for group in task.curves]
        kind = f"training {metric}" if all(training) else f"greedy {metric}" if not any(training) else metric
        panels.append(curve(name, kind, [task]))
    unit = "normalised score" if len(pooled) > 1 else "score"
    if len(pooled) > 1:
        panels.append(curve("sample efficiency", unit, pooled))
    scores = {group: [part.scores[group] for part in pooled] for group in (pooled[0].scores if pooled else ())}
    if len(pooled) > 1 or len(scores) > 1:
        every = np.concatenate([sample for samples in scores.values() for sample in samples])
        margin = 0.05 * (np.ptp(every) or 1.0)
        x = np.linspace(every.min() - margin, every.max() + margin, 200)
        above = {group: estimate([sample[:, None] > x for sample in samples], mean) for group, samples in scores.items()}
        panels.append(Panel("performance profile", f"{unit} x", "share of runs above x", x, above))
    others = {group: [*samples, *scores[baseline]] for group, samples in scores.items() if comparable(group, baseline)}
    if others:
        better = {group: estimate(samples, probability_of_improvement) for group, samples in others.items()}
        panels.append(Panel("probability of improvement", f"P(better than {baseline})", "", None, better))
    return panels


def make_table(
    tasks: dict[str, Task],
    pooled: Sequence[Task],
    baseline: str,
    name: str,
    statistic: Callable[..., np.ndarray],
    digits: int = 1,
) -> str:
    """Markdown: a row for each task and group, and one for each group over all tasks that are pooled.

    Args:
        digits: after the point, of scores that are not normalised
    """
    rows = [["task", "group", "runs", "steps", "mean +- std over runs", f"{name} [95% interval]", f"P(better than {baseline})"]]
    rows.append(["---"] * len(rows[0]))
    sections: list[tuple[str, Sequence[Task], str, int]]
    sections = [(task, [part], f"{part.grid[-1]:,.0f}", digits) for task, part in tasks.items()]
    if len(pooled) > 1:
        sections.append((f"{len(pooled)} tasks, normalised", pooled, "", 2))
    for title, parts, steps, digits in sections:
        for group in parts[0].scores:
            scores = [part.scores[group] for part in parts]
            every = np.concatenate(scores)
            spread = f"{every.mean():,.{digits}f}" + (
                f" +- {every.std(ddof=1):,.{digits}f}" if len(scores[0]) == len(every) > 1 else ""
            )
            value = "{0:,.{3}f} [{1:,.{3}f}, {2:,.{3}f}]".format(*estimate(scores, statistic), digits)
            better = ""
            if comparable(group, baseline) and baseline in parts[0].scores:
                others = [part.scores[baseline] for part in parts]
                better = "{:.2f} [{:.2f}, {:.2f}]".format(*estimate([*scores, *others], probability_of_improvement))
            rows.append([title, group, str(len(every)), steps, spread, value, better])
    columns = 7 if any(task.scores.keys() != {baseline} for task in tasks.values()) else 6
    lines = [" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row[:columns]) for row in rows]
    return "\n".join(f"| {line} |" for line in lines).replace(" [nan, nan]", "")


def plain(text: str) -> str:
    """A text as matplotlib draws it: without mathematics between dollars."""
    return text.replace("$", r"\$")


def draw(panels: Sequence[Panel], labels: dict[str, str], caption: str, files: Sequence[Path]) -> None:
    """Draw the panels, each group in a colour, a line style and a marker that differ in grey too, and write the files."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
    dashes = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
    styles: dict[str, dict[str, Any]] = {
        group: {"color": colours[i % 7], "linestyle": dashes[i % 7], "marker": "os^DvPX<>"[i % 9], "markersize": 3.5}
        for i, group in enumerate(labels)
    }
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    width = 3.4 if columns == 1 else 7.0  # inches: a column or the whole width of a page
    caption = textwrap.fill(caption, int(18 * width))
    legend = [plain(textwrap.fill(label, 50)) for label in labels.values()]
    height = 2.1 * rows + 0.15 * (sum(label.count("\n") + 1 for label in legend) + caption.count("\n") + 1)
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8, "lines.linewidth": 1.2, "pdf.fonttype": 42}):
        figure = Figure(figsize=(width, height), layout="constrained")
        all_axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axes in zip(panels, all_axes, strict=False):
            for i, (group, (value, low, high)) in enumerate(panel.estimates.items()):
                if panel.x is None:
                    style = styles[group] | {"markersize": 7, "linewidth": 2}
                    axes.errorbar(value, -i, xerr=[[value - low], [high - value]], capsize=4, **style)
                else:
                    axes.plot(panel.x, value, markevery=max(1, len(panel.x) // 8), **styles[group])
                    axes.fill_between(panel.x, low, high, color=styles[group]["color"], alpha=0.2, linewidth=0)
            if panel.x is None:
                axes.axvline(0.5, color="grey", linewidth=0.8)
                names = [plain(textwrap.shorten(group, 24, placeholder="...")) for group in panel.estimates]
                axes.set(xlim=(-0.03, 1.03), ylim=(0.5 - len(names), 0.5))
                axes.set_yticks([-number for number in range(len(names))], names)
            elif panel.xlabel == STEPS:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.locator_params(axis="x", nbins=5)
            axes.set(title=plain(panel.title), xlabel=plain(textwrap.fill(panel.xlabel, 36)), ylabel=panel.ylabel)
            axes.grid(alpha=0.3, linewidth=0.5)
        for axes in list(all_axes):  # what the panels left of the iterator
            axes.remove()
        lines = [Line2D([], [], **styles[group]) for group in labels]
        figure.legend(lines, legend, loc="outside upper center", frameon=False, handlelength=3.5)
        figure.supxlabel(caption, fontsize=6.5)
        for file in files:
            figure.savefig(file, dpi=300)


def compare(args: Args) -> None:
    """Read the runs, print the table, and write it and the pictures.

    Raises:
        UsageError: before anything is written.
    """
    check_packages("", ["scipy", "matplotlib"])
    stem = args.output.with_suffix("") if args.output.suffix in (".png", ".pdf", ".md") else args.output
    if not stem.name:
        raise UsageError(f"--output {args.output}: must be the name of files, without their endings")
    files = [stem.with_name(stem.name + ending) for ending in (".png", ".pdf", ".md")]
    for file in files:
        if file.exists() and not args.overwrite:
            raise UsageError(f"{file}: exists; choose another --output, or --overwrite")
    for task, (low, high) in args.range.items():
        if not 0 < high - low < np.inf:
            raise UsageError(f"--range {task} {low} {high}: must be two returns, the lower one first")
    notes: list[str] = []
    found = []
    for folder, group in find_folders(args.runs).items():
        try:
            found.append(read_run(folder, group, args.task, notes, args.metric))
        except TooYoung:
            notes.append(f"{folder} is left out: it has no evaluation yet.")
    if not found:
        raise UsageError(f"{' '.join(args.runs)}: no run has an evaluation yet")
    runs = name_groups(found, notes, args.newest)
    groups = list(dict.fromkeys(run.group for run in runs))
    baseline = args.baseline or groups[0]
    if baseline not in groups:
        raise UsageError(f"--baseline {baseline}: no such group, there are: {', '.join(groups)}")
    by_task = defaultdict(list)
    for run in runs:
        by_task[run.settings["env_id"]].append(run)
    tasks = {task: align(task, same, notes) for task, same in by_task.items()}
    ranges = RANGES if args.metric == "return" else dict.fromkeys(tasks, (0.0, 1.0))
    pooled = pool(tasks, ranges | args.range, notes) if len(tasks) > 1 else list(tasks.values())

    name, statistic = STATISTICS[args.aggregate]
    table = make_table(tasks, pooled, baseline, name, statistic, 1 if args.metric == "return" else 2)
    text = "\n".join([table, "", *(f"- {' '.join(note.split())}" for note in notes), READING])
    panels = make_panels(tasks, pooled, baseline, statistic, args.metric)
    counts = {group: [len(task.scores[group]) for task in tasks.values() if group in task.scores] for group in groups}
    labels = {group: f"{group} (n = {' to '.join(map(str, sorted({min(n), max(n)})))})" for group, n in counts.items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, labels, f"{name.capitalize()} with 95% stratified bootstrap intervals over runs; {COVERAGE}.", files[:2])
    files[2].write_text(text, encoding="utf-8", errors="backslashreplace")
    show(f"{text}wrote {', '.join(map(str, files))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names; returns the exit status."""
    guard()
    try:
        compare(parse_command_line(Args, arguments))
    except (UsageError, OSError) as error:
        report(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
