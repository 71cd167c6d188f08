"""DQN, DDPG and SAC in its three steps on InvertedPendulum-v5: environment steps and minutes to a greedy return of 950.

    python benchmarks/family.py     # writes its table in docs/results.md, and benchmarks/results/family.png

Both come from the results of `python benchmarks/recipes.py --task inverted_pendulum` and of the other recipes
for that task: the first evaluation of each seed that reached the goal, and the time from the start of training to its end.
"""

import statistics

import recipes
from matplotlib.figure import Figure

MARKS = "<!-- family: written by benchmarks/family.py -->\n", "<!-- end of family -->\n"
FIGURE = recipes.ROOT / "benchmarks" / "results" / "family.png"
TASKS = ("inverted_pendulum_dqn", "inverted_pendulum", *(f"inverted_pendulum_m{number}" for number in (1, 2, 3)))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # Okabe and Ito, 2008


def results() -> dict[str, list[dict[str, str]]]:
    """Of each task that was run the rows of its seeds, in their order."""
    rows = sorted(recipes.read_results(), key=lambda row: int(row["seed"]))
    found = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    return {task: rows for task, rows in found.items() if rows}


def table() -> str:
    """A row for each algorithm."""
    lines = ["| algorithm | environment steps, seeds 1, 2, 3 | median | minutes, seeds 1, 2, 3 | median |", "|---" * 5 + "|"]
    for task, rows in results().items():
        cells = [recipes.RECIPES[task].algorithm]
        for name, unit, form in (("goal_step", 1, "{:,.0f}"), ("goal_seconds", 60, "{:.1f}")):
            values = [float(row[name] or ("nan" if row["goal_step"] else "inf")) / unit for row in rows]
            cells += ["; ".join(map(form.format, values)), form.format(statistics.median(values))]
        lines.append("| " + " | ".join(cells).replace("inf", "not reached").replace("nan", "not measured") + " |")
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Each seed's greedy returns over environment steps; a dot where 950 was reached."""
    tasks = results()
    figure = Figure(figsize=(7, 1 + len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (task, rows), colour in zip(panels, tasks.items(), COLOURS, strict=False):
        for row in rows:
            evaluations = recipes.read_csv(recipes.CURVES / f"{task}-{row['seed']}" / "evaluations.csv")
            steps, means = ([float(evaluation[name]) for evaluation in evaluations] for name in ("global_step", "mean"))
            axes.plot(steps, means, color=colour, linewidth=1, marker=".", markersize=3)
            if row["goal_step"]:
                reached = steps.index(float(row["goal_step"]))
                axes.plot(steps[reached], means[reached], "o", color=colour, markersize=7)
        axes.axhline(recipes.RECIPES[task].goal, color="grey", linewidth=0.8, linestyle=":")
        axes.set(ylabel=recipes.RECIPES[task].algorithm, ylim=(-30, 1080), yticks=(0, 500, 1000))
        axes.grid(alpha=0.3, linewidth=0.5)
    panels[-1].set_xlabel("environment steps")
    figure.suptitle("InvertedPendulum-v5, mean greedy return: a line for each seed, a dot at 950", fontsize=9)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    """Write the figure, and the table between the marks in docs/results.md."""
    draw()
    recipes.write_between(MARKS, table())


if __name__ == "__main__":
    main()
