"""Draw learning curves over seeds from run folders: the mean of the greedy evaluations and their spread.

    python benchmarks/plot.py runs/Pendulum-v1__* -o curve.png

Runs of one environment and experiment are one curve: the line is the mean over the runs, the band their standard deviation,
and a run that stopped early stays at its last value.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter


def load(run: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """The name of a run's curve, the steps of its evaluations and their mean returns."""
    args = json.loads((run / "args.json").read_text())["args"]
    with open(run / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = (np.array([float(row[name]) for row in rows]) for name in ("global_step", "mean"))
    return f"{args['env_id']} ({args['exp_name']})", *columns


def draw(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curve.png"),
) -> None:
    """Draw the learning curves of run folders.

    Args:
        runs: the run folders
        output: the picture to write
    """
    curves = defaultdict(list)
    for run in runs:
        name, steps, means = load(run)
        curves[name].append((steps, means))
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, runs_of_curve in curves.items():
        grid = np.unique(np.concatenate([steps for steps, _ in runs_of_curve]))
        returns = np.array([np.interp(grid, steps, means) for steps, means in runs_of_curve])
        mean, spread = returns.mean(axis=0), returns.std(axis=0)
        axes.plot(grid, mean, label=f"{name}, {len(returns)} run{'s' if len(returns) > 1 else ''}")
        axes.fill_between(grid, mean - spread, mean + spread, alpha=0.25)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="environment steps", ylabel="greedy return")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    tyro.cli(draw)
