"""compare.py: the statistics against sums done by hand, folders of every kind read back, and what it writes."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, quick_args
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from steadyrl import compare, hub

STEPS = (100, 200, 300, 400, 500, 600)


def write_run(folder: Path, returns, steps=STEPS, **args) -> Path:
    """A run folder of this repository with these evaluations."""
    folder.mkdir(parents=True)
    settings = {"env_id": "Hopper-v4", "exp_name": "ddpg", "seed": 1, "target_return": None, **args}
    (folder / "args.json").write_text(json.dumps({"args": settings, "versions": {}, "device": "cpu"}))
    (folder / "evaluation.json").write_text(json.dumps({"global_step": int(steps[-1]), "mean": 0, "date": ""}))
    with open(folder / "evaluations.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("global_step", "mean", "std", "min", "max", "length", "q_bias"))
        rows.writerows((step, value, 0, 0, 0, 0, 0) for step, value in zip(steps, returns, strict=True))
    return folder


def write_events(folder: Path, **scalars) -> Path:
    """A TensorBoard folder; each tag's (step, value) pairs, "__" for "/" in its name."""
    with SummaryWriter(str(folder)) as writer:
        for tag, points in scalars.items():
            for step, value in points:
                writer.add_scalar(tag.replace("__", "/"), value, step)
    return folder


def load(*patterns: str, task: str | None = None) -> tuple[dict[str, compare.Task], list[str]]:
    """What the folders come to, and the notes about it."""
    notes: list[str] = []
    read = [compare.read_run(folder, name, task, notes) for folder, name in compare.find_folders(patterns).items()]
    runs = compare.name_groups(read, notes)
    names = dict.fromkeys(run.settings["env_id"] for run in runs)
    return {name: compare.align(name, [run for run in runs if run.settings["env_id"] == name], notes) for name in names}, notes


def cell(text: str, task: str, group: str, column: int) -> str:
    """A cell of the table."""
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return next(row[column] for row in rows if row[:2] == [task, group])


# Statistics


def test_interquartile_mean():
    assert compare.iqm(np.array([9.0, 1, 2, 3, 4, 100, -50, 5]), axis=-1) == (2 + 3 + 4 + 5) / 4
    assert compare.iqm(np.array([9.0, 1, 3, 100, -50]), axis=-1) == (9 + 1 + 3) / 3  # a quarter of five: one a side
    assert compare.iqm(np.array([0.0, 30, 300]), axis=-1) == 110  # of three runs: their mean
    pooled = compare.iqm(np.array([0.0, 1, 2, 3]), np.array([10.0, 11, 12, 13]), axis=-1)
    assert pooled == (2 + 3 + 10 + 11) / 4


@pytest.mark.parametrize("statistic", [compare.iqm, compare.mean])
def test_the_interval_is_that_of_all_resamples_within_tasks(statistic):
    """Against the exact distribution: every way to draw 4 and 3 runs again, each from its own task."""
    tasks = [np.array([1.0, 2, 4, 8]), np.array([100.0, 103, 109])]
    draws = itertools.product(itertools.product(tasks[0], repeat=4), itertools.product(tasks[1], repeat=3))
    exact = []
    for first, second in draws:
        values = sorted([*first, *second])
        exact.append(np.mean(values[1:-1] if statistic is compare.iqm else values))
    value, low, high = compare.estimate(tasks, statistic)
    assert value == pytest.approx(np.mean(sorted([*tasks[0], *tasks[1]])[1:-1]) if statistic is compare.iqm else 327 / 7)
    np.testing.assert_allclose([low, high], np.quantile(exact, [0.025, 0.975]), rtol=0.01)


def test_the_interval_of_three_runs_is_the_lowest_to_the_highest():
    np.testing.assert_allclose(compare.estimate([np.array([3.0, 7, 5])], compare.iqm), [5, 3, 7])


def test_a_single_run_has_no_interval():
    value, low, high = compare.estimate([np.array([[1.0, 2]]), np.array([[3.0, 4], [5, 6]])], compare.mean)
    np.testing.assert_allclose(value, [3, 4])
    assert np.isnan([low, high]).all()


def test_the_runs_of_a_curve_are_drawn_whole():
    """Both steps of every run add up to 10, and those of the resampled ones too if a run is drawn for all steps at once."""

    def statistic(*tasks, axis):
        means = tasks[0].mean(axis)  # (steps, ...)
        return means + means[::-1]

    runs = np.array([[0.0, 10], [4, 6], [5, 5]])
    np.testing.assert_allclose(compare.estimate([runs], statistic), np.full((3, 2), 10.0))


def test_probability_of_improvement():
    """Pairs counted one by one, ties one half, then the mean over the tasks."""
    tasks_x, tasks_y = ([1.0, 5, 5], [2.0, 0]), ([5.0, 3, 1, 0], [1.0, 1])
    by_task = []
    for xs, ys in zip(tasks_x, tasks_y, strict=True):
        wins = sum((x > y) + 0.5 * (x == y) for x in xs for y in ys)
        by_task.append(wins / (len(xs) * len(ys)))
    samples = [np.array(scores) for scores in (*tasks_x, *tasks_y)]
    assert compare.estimate(samples, compare.probability_of_improvement)[0] == pytest.approx(np.mean(by_task))


def test_statistics_are_those_of_rliable():
    """What rliable 1.2.0 gives for these scores, intervals with 50,000 resamples."""
    x = np.array([[0.9, 1.4, 0.2], [0.1, 1.1, 0.6], [1.3, 0.7, 0.5], [0.8, 1.9, 0.4], [0.5, 1.2, -0.3]])
    y = np.array([[0.6, 1.0, 0.3], [0.4, 1.3, 0.1], [0.2, 0.8, 0.7], [0.7, 0.9, -0.1]])
    scores = list(x.T)
    np.testing.assert_allclose(compare.estimate(scores, compare.iqm), [0.744444, 0.533333, 0.933333], atol=0.01)
    np.testing.assert_allclose(compare.estimate(scores, compare.mean), [0.753333, 0.566667, 0.94], atol=0.01)
    improvement = compare.estimate([*scores, *y.T], compare.probability_of_improvement)
    np.testing.assert_allclose(improvement, [0.65, 0.416667, 0.866667], atol=1 / 60 + 1e-6)  # one pair of runs in one task


# Bringing runs together


def test_a_score_is_the_mean_of_the_last_five_evaluations(tmp_path):
    write_run(tmp_path / "a", [900, 1, 2, 3, 4, 5])
    tasks, notes = load(str(tmp_path / "a"))
    assert tasks["Hopper-v4"].scores["ddpg"] == [3] and not notes
    np.testing.assert_array_equal(tasks["Hopper-v4"].grid, STEPS)


def test_runs_are_cut_at_the_shortest_one(tmp_path):
    write_run(tmp_path / "long", [0, 1, 2, 3, 4, 5, 600, 700], range(100, 900, 100))
    write_run(tmp_path / "short", [0, 10, 20, 30, 40, 50], seed=2)
    tasks, notes = load(str(tmp_path / "*"))
    np.testing.assert_array_equal(tasks["Hopper-v4"].scores["ddpg"], [3, 30])
    assert len(notes) == 1 and "cut at 600 steps" in notes[0] and "short" in notes[0]


def test_a_run_that_reached_its_target_cuts_no_other_off(tmp_path):
    """It stays at the mean of its own last five evaluations, not at the last one, which is chosen for being high."""
    write_run(tmp_path / "early", [0, 10, 20, 30, 40, 90], target_return=90.0)
    write_run(tmp_path / "late", range(8), range(100, 900, 100), seed=2, target_return=90.0)
    tasks, notes = load(str(tmp_path / "*"))
    task = tasks["Hopper-v4"]
    np.testing.assert_array_equal(task.curves["ddpg"][0], [0, 10, 20, 30, 40, 90, 38, 38])
    np.testing.assert_array_equal(task.scores["ddpg"], [38, 5])
    assert len(notes) == 1 and "1 of the runs stopped early" in notes[0]


def test_when_all_runs_reached_their_target_the_longest_says_where_the_curves_end(tmp_path):
    write_run(tmp_path / "a", [0, 90], (100, 200), target_return=90)
    write_run(tmp_path / "b", [0, 0, 0, 0, 0, 95], seed=2, target_return=90)
    task = load(str(tmp_path / "*"))[0]["Hopper-v4"]
    np.testing.assert_array_equal(task.curves["ddpg"], [[0, 90, 45, 45, 45, 45], [0, 0, 0, 0, 0, 95]])


def test_steps_may_differ_by_a_few(tmp_path):
    """32 environments evaluate at 600,016 steps: nothing is cut, no evaluation left out."""
    write_run(tmp_path / "one", [0, 1, 2, 3, 4, 5], [step * 1000 for step in STEPS])
    write_run(tmp_path / "many", [0, 1, 2, 3, 4, 5], [step * 1000 + 16 for step in STEPS], seed=2)
    tasks, notes = load(str(tmp_path / "*"))
    np.testing.assert_allclose(tasks["Hopper-v4"].curves["ddpg"], [range(6)] * 2, atol=1e-3)
    assert not notes


def test_the_run_with_the_fewest_evaluations_gives_the_steps(tmp_path):
    write_run(tmp_path / "fine", range(1, 13), range(50, 650, 50))
    write_run(tmp_path / "coarse", [5, 5, 5], (200, 400, 600), seed=2)
    tasks, notes = load(str(tmp_path / "*"))
    np.testing.assert_array_equal(tasks["Hopper-v4"].curves["ddpg"], [[5, 5, 5], [4, 8, 12]])
    np.testing.assert_array_equal(tasks["Hopper-v4"].scores["ddpg"], [5, 10])  # of its own last five
    assert any("mean of 3 evaluations" in note for note in notes)
    assert any("span the last 200 steps of some runs, 400 of others" in note for note in notes)


def test_tasks_are_pooled_in_fixed_ranges():
    """Random policy 0, reference 1; over shares of the steps, since these differ."""
    hopper = compare.Task(np.array([50.0, 100]), {"ddpg": np.array([[18.791, 3226]])}, {"ddpg": np.array([3226.0])})
    other = compare.Task(np.array([5.0, 10, 15, 20]), {"ddpg": np.array([[0.0, 10, 20, 40]])}, {"ddpg": np.array([30.0])})
    notes: list[str] = []
    ranges = compare.RANGES | {"Other-v0": (0.0, 20.0)}
    pooled = compare.pool({"Hopper-v4": hopper, "Other-v0": other}, ranges, notes)
    np.testing.assert_allclose([part.grid for part in pooled], [[0.5, 1]] * 2)
    np.testing.assert_allclose([part.curves["ddpg"][0] for part in pooled], [[0, 1], [0.5, 2]])
    np.testing.assert_allclose([part.scores["ddpg"][0] for part in pooled], [1, 1.5])
    assert compare.pool({"Hopper-v4": hopper, "Other-v0": other}, compare.RANGES, notes) == []
    assert sum("Other-v0 is not pooled" in note for note in notes) == 1
    less = other._replace(scores={"sac": np.array([1.0])})
    assert compare.pool({"Hopper-v4": hopper, "Other-v0": less}, ranges, notes) == []


def test_runs_are_grouped_by_what_they_learn_with(tmp_path):
    """Flags that differ are named, unless they are of the machine; a run of an older script may lack some."""
    flags = {"gamma": 0.99, "num_threads": 1, "final_episodes": 20, "env_kwargs": {}}
    machine = {"num_threads": 2, "final_episodes": 50}
    for seed, changes in enumerate(({}, machine, {"gamma": 0.98}, {"gamma": 0.98, "noise": "ou"})):
        write_run(tmp_path / str(seed), range(6), seed=seed, **(flags | changes))
    tasks, notes = load(str(tmp_path / "*"))
    scores = tasks["Hopper-v4"].scores
    assert {group: len(values) for group, values in scores.items()} == {"ddpg gamma=0.99": 2, "ddpg gamma=0.98": 2}
    assert len(notes) == 1 and "noise" in notes[0] and "gamma" not in notes[0]


def test_groups_named_by_the_user(tmp_path, monkeypatch):
    """A name counts more than a pattern without one, and a folder with "=" in its name is no group."""
    for seed, name in enumerate(("plain", "strong", "gamma=1")):
        write_run(tmp_path / name, range(6), seed=seed, gamma=seed)
    monkeypatch.chdir(tmp_path)
    for patterns in (("*", "mine=s*"), ("mine=s*", "*")):
        assert set(load(*patterns)[0]["Hopper-v4"].scores) == {"ddpg gamma=2", "ddpg gamma=0", "mine"}
    assert list(load("all=*")[0]["Hopper-v4"].scores) == ["all"]
    assert compare.find_folders(["gamma=1"]) == {Path("gamma=1"): None}


# Folders of others


def test_cleanrl_folders(tmp_path):
    """Its flags, and training returns in bins; the episodes after training, at "steps" 0 to 9, are no part of the curve."""
    folder = write_events(
        tmp_path / "Hopper-v4__td3__3__1700000000",
        charts__episodic_return=[(step, step / 100) for step in range(50, 20_000, 100)],
        eval__episodic_return=[(episode, 5000) for episode in range(10)],
    )
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|exp_name|td3|\n|gamma|0.99|\n|seed|3|\n|wandb_entity|None|")
    run = compare.read_run(folder, None, None, [])
    assert run.training and run.settings["env_id"] == "Hopper-v4" and run.settings["seed"] == "3"
    assert run.settings["gamma"] == "0.99" and "param" not in run.settings
    np.testing.assert_array_equal(run.steps, [*range(1000, 20_000, 1000), 19_950])
    np.testing.assert_allclose(run.returns, np.arange(5, 200, 10))  # the middle of each bin, by a hundred
    assert list(load(str(folder))[0]["Hopper-v4"].scores) == ["td3 (training returns)"]


def test_stable_baselines3_folders(tmp_path):
    """Greedy evaluations where there are any; the environment from the folder above, or from --task."""
    greedy = {"eval__mean_reward": [(step, step / 10) for step in STEPS], "rollout__ep_rew_mean": [(600, 7)]}
    write_events(tmp_path / "Hopper-v4" / "TD3_1", **greedy)
    write_events(tmp_path / "Hopper-v4" / "TD3_2", **greedy)
    write_events(tmp_path / "SAC_1", rollout__ep_rew_mean=[(step, step / 10) for step in STEPS])
    task = load(str(tmp_path / "Hopper-v4" / "*"))[0]["Hopper-v4"]
    np.testing.assert_array_equal(task.scores["TD3"], [40, 40])
    tasks, _ = load(str(tmp_path / "**" / "*_1"), task="Walker2d-v4")
    assert {name: list(task.scores) for name, task in tasks.items()} == {
        "Hopper-v4": ["TD3"],
        "Walker2d-v4": ["SAC (training returns)"],
    }
    with pytest.raises(compare.UsageError, match="--task"):
        load(str(tmp_path / "SAC_1"))


def test_bins_of_runs_that_end_at_other_steps_are_the_same():
    ends = [
        compare.bin_returns(np.arange(100.0, last, 100), np.ones(len(np.arange(100.0, last, 100))))[0]
        for last in (99_801, 100_001)
    ]
    np.testing.assert_array_equal(ends[0][:-1], ends[1][:-1])
    assert len(ends[0]) == 20 and ends[0][-1] == 99_800


# The command


@pytest.mark.slow
def test_training_runs_are_compared(run, tmp_path, capsys):
    """Two seeds of the script itself: one group, its scores, a PNG a column wide, a PDF with its fonts."""
    flags = {"eval_frequency": 100, "eval_episodes": 1, "exp_name": "short"}
    folders = [run(quick_args(seed=seed, **flags)).run_dir for seed in (1, 2)]
    assert compare.main([*map(str, folders), "-o", "out/comparison.png"]) == 0
    png, pdf, text = (Path("out/comparison" + ending) for ending in (".png", ".pdf", ".md"))
    assert png.read_bytes().startswith(b"\x89PNG") and int.from_bytes(png.read_bytes()[16:20]) == 3.4 * 300
    assert pdf.read_bytes().startswith(b"%PDF") and b"/FontFile2" in pdf.read_bytes()
    means = []
    for folder in folders:
        with open(folder / "evaluations.csv", newline="") as file:
            means.append(np.mean([float(row["mean"]) for row in csv.DictReader(file)]))
    assert cell(text.read_text(), "Pendulum-like-v0", "short", 4).startswith(f"{np.mean(means):,.1f} +- ")
    assert text.read_text() in capsys.readouterr().out
    assert "better" not in text.read_text()  # there is one group


@pytest.mark.slow
def test_three_groups_on_three_tasks(tmp_path, monkeypatch):
    """One curve for each task, then what is over the two tasks that can be pooled; numbers by hand."""
    for name, gain in {"plain": 0.0, "strong": 1000.0, "same": 0.0}.items():
        for task in ("Hopper-v4", "Walker2d-v4", "Mine-v0"):
            for seed in (1, 2, 3):
                write_run(tmp_path / f"{name}-{task}-{seed}", [seed + gain] * 6, env_id=task, exp_name=name, seed=seed)
    drawn = []
    draw = compare.draw
    monkeypatch.setattr(compare, "draw", lambda panels, *others: (drawn.extend(panels), draw(panels, *others)))
    output = tmp_path / "comparison"
    assert compare.main([f"{tmp_path}/*-*-*", "--baseline", "plain", "-o", str(output)]) == 0
    panels = {panel.title: panel for panel in drawn}
    tasks = ["Hopper-v4", "Mine-v0", "Walker2d-v4"]
    assert list(panels) == [*tasks, "sample efficiency", "performance profile", "probability of improvement"]
    assert panels["sample efficiency"].xlabel == "environment steps"
    np.testing.assert_allclose(panels["Mine-v0"].estimates["strong"][0], [1002] * 6)
    np.testing.assert_allclose(panels["Mine-v0"].estimates["strong"][1], [1001] * 6)
    hopper, walker = ((1000 + np.array([1, 2, 3]) - low) / (high - low) for low, high in ((18.791, 3226), (2.791, 3946)))
    middle = sorted([*hopper, *walker])[1:-1]
    np.testing.assert_allclose(panels["sample efficiency"].estimates["strong"][0], [np.mean(middle)] * 6)
    profile = panels["performance profile"]
    above = [np.mean([score > x for score in (*hopper, *walker)]) for x in profile.x]
    np.testing.assert_allclose(profile.estimates["strong"][0], above)
    better = panels["probability of improvement"].estimates
    assert list(better) == ["same", "strong"]
    assert better["strong"].tolist() == [1, 1, 1] and better["same"][0] == 0.5
    text = output.with_suffix(".md").read_text()
    assert cell(text, "2 tasks, normalised", "strong", 5).startswith(f"{np.mean(middle):.2f} [")
    assert cell(text, "2 tasks, normalised", "strong", 6) == "1.00 [1.00, 1.00]"
    assert cell(text, "Mine-v0", "plain", 5) == "2.0 [1.0, 3.0]" and "Mine-v0 is not pooled" in text


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the drawing out, which takes longest."""
    monkeypatch.setattr(compare, "draw", lambda panels, labels, caption, files: [file.write_text("drawn") for file in files])


def test_the_mean_instead_of_the_interquartile_mean(tmp_path, undrawn):
    for seed, value in enumerate((0, 0, 0, 100)):
        write_run(tmp_path / "runs" / str(seed), [value] * 6, seed=seed)
    for name, start in (("iqm", "0.0 ["), ("mean", "25.0 [")):
        assert compare.main([f"{tmp_path}/runs/*", "--aggregate", name, "-o", f"{tmp_path}/{name}"]) == 0
        assert cell((tmp_path / f"{name}.md").read_text(), "Hopper-v4", "ddpg", 5).startswith(start)


def test_a_range_of_the_users_own(tmp_path, undrawn):
    """It pools a task that has none, and replaces a known one."""
    for task, value in (("Mine-v0", 1.0), ("Hopper-v4", 30.0)):
        write_run(tmp_path / "runs" / task, [value] * 6, env_id=task)
    ranges = ["--range", "Mine-v0", "0", "4", "Hopper-v4", "0", "40"]
    assert compare.main([f"{tmp_path}/runs/*", "-o", f"{tmp_path}/out", *ranges]) == 0
    assert cell((tmp_path / "out.md").read_text(), "2 tasks, normalised", "ddpg", 4) == "0.50"


def test_files_of_the_user_are_kept(tmp_path, capsys, undrawn):
    write_run(tmp_path / "run", range(6))
    (tmp_path / "mine.pdf").write_text("mine")
    arguments = [str(tmp_path / "run"), "-o", str(tmp_path / "mine")]
    assert compare.main(arguments) == 2 and "mine.pdf" in capsys.readouterr().err
    assert (tmp_path / "mine.pdf").read_text() == "mine" and not (tmp_path / "mine.png").exists()
    assert compare.main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "mine.pdf").read_text() == "drawn"


def damage(folder: Path, what: str) -> None:
    """Spoil a run folder."""
    evaluations = folder / "evaluations.csv"
    if what == "missing":
        shutil.rmtree(folder)
    elif what == "no run":
        (folder / "args.json").unlink()
        evaluations.unlink()
    elif what == "args":
        (folder / "args.json").write_text('{"args": {"env_id"')
    elif what == "no arguments":
        (folder / "args.json").write_text("[]")
    elif what == "half a row":
        evaluations.write_text(evaluations.read_text() + "70")
    elif what == "nan":
        evaluations.write_text(evaluations.read_text().replace("3,0", "nan,0"))
    elif what == "other columns":
        evaluations.write_text("step,return\n1,2\n")
    elif what == "events":
        evaluations.unlink()
        (folder / "events.out.tfevents.1.x").write_bytes(bytes(range(256)) * 4)


@pytest.mark.parametrize("what", "missing no_run args no_arguments half_a_row nan other_columns events".split())
def test_a_damaged_folder_is_one_line_and_nothing_is_written(tmp_path, capsys, what):
    write_run(tmp_path / "runs" / "whole", range(6))
    write_run(tmp_path / "runs" / "damaged", range(6), seed=2)
    damage(tmp_path / "runs" / "damaged", what.replace("_", " "))
    folders = [str(tmp_path / "runs" / name) for name in ("whole", "damaged")]
    assert compare.main([*folders, "-o", str(tmp_path / "out" / "comparison")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "damaged" in printed.err
    assert printed.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["same/*"], "the same group, task and seed"),
        (["apart/*"], "ends at 300 steps, before"),
        (["whole", "--baseline", "sac"], "--baseline sac: no such group, there are: ddpg"),
        (["whole", "--range", "Hopper-v4", "3", "3"], "--range Hopper-v4"),
        (["whole", "--range", "Hopper-v4", "nan", "3"], "--range Hopper-v4"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("whole"), range(6))
    write_run(Path("same/a"), range(6))
    write_run(Path("same/b"), range(6))
    write_run(Path("apart/a"), range(3), STEPS[:3])
    write_run(Path("apart/b"), range(3), STEPS[3:], seed=2)
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("comparison*"))


def test_what_a_restart_gave_up_is_left_out(tmp_path):
    """A later event file begins at an earlier step: its returns count, and a note says so."""
    folder = tmp_path / "Hopper-v4" / "TD3_1"
    for second, points in enumerate(([(step, step / 10) for step in STEPS], [(step, 1000) for step in STEPS[2:]])):
        (file,) = write_events(tmp_path / "new", eval__mean_reward=points).glob("*")
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / f"events.out.tfevents.{second}.host")
    notes: list[str] = []
    run = compare.read_run(folder, None, None, notes)
    assert dict(zip(run.steps, run.returns, strict=True)) == {100: 10, 200: 20, 300: 1000, 400: 1000, 500: 1000, 600: 1000}
    assert notes == [f"{folder}: was started again at step 300; 4 later returns are left out."]


def test_what_tensorboard_would_ignore_is_left_out(tmp_path):
    """The start of a session at step 250, as a resumed run writes it, drops what is there from then on."""
    for points, purge in (([(step, 10) for step in STEPS], 0), ([(500, 20), (600, 20)], 250)):
        with SummaryWriter(str(tmp_path / "new"), purge_step=purge) as writer:
            for step, value in points:
                writer.add_scalar("eval/mean_reward", value, step)
        (file,) = (tmp_path / "new").glob("*")
        (tmp_path / "Hopper-v4" / "a").mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / "Hopper-v4" / "a" / f"events.out.tfevents.{purge}.host")
    run = compare.read_run(tmp_path / "Hopper-v4" / "a", None, None, [])
    assert list(run.steps) == [100, 200, 500, 600]


def test_runs_that_are_not_finished_are_named(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), range(6), seed=seed, total_timesteps=600)
    (tmp_path / "2" / "evaluation.json").unlink()
    _, notes = load(str(tmp_path / "*"))
    assert notes == [f"Hopper-v4: 1 of the runs are not finished, for example {tmp_path / '2'}."]


def record(data: bytes) -> bytes:
    """A record of an event file, with the right sums."""
    length = len(data).to_bytes(8, "little")
    sums = [masked_crc32c(part).to_bytes(4, "little") for part in (length, data)]
    return length + sums[0] + data + sums[1]


@pytest.mark.parametrize("what", ["garbage events", "steps", "field", "target_return", "nested", "no args"])
def test_what_no_run_has_is_one_line(tmp_path, capsys, what):
    folder = write_run(tmp_path / "run", range(6))
    if what == "garbage events":
        (folder / "evaluations.csv").unlink()
        (folder / "events.out.tfevents.1.x").write_bytes(record(b"\xff\xff garbage"))
    elif what == "steps":
        (folder / "evaluations.csv").write_text("global_step,mean\n1e300,1\n")
    elif what == "field":
        (folder / "evaluations.csv").write_text(f"global_step,mean\n1,{'1' * 200_000}\n")
    elif what == "no args":
        (folder / "args.json").write_text("{}")
    elif what == "nested":
        (folder / "args.json").write_text('{"args": ' + "[" * 100_000 + "]" * 100_000 + "}")
    else:
        write_args(folder, target_return="abc")
    assert compare.main([str(folder), "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {folder}: damaged") and printed.err.count("\n") == 1 and printed.out == ""


def write_args(folder: Path, **changes) -> None:
    """Change the arguments of a run folder."""
    settings = json.loads((folder / "args.json").read_text())
    settings["args"] |= changes
    (folder / "args.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_names_are_drawn_and_written_as_they_are(tmp_path, capsys):
    write_run(tmp_path / "run", range(6), exp_name="$x_{$ a|b")
    write_run(tmp_path / "other", range(6), exp_name="other")
    assert compare.main([f"{tmp_path}/run", f"{tmp_path}/other", "-o", str(tmp_path / "out")]) == 0
    assert "| $x_{$ a\\|b |" in (tmp_path / "out.md").read_text() and (tmp_path / "out.pdf").exists()


def test_an_unknown_flag_is_one_line(capsys, monkeypatch):
    """Of this tool and of the one for the hub."""
    monkeypatch.setattr(sys, "argv", ["hub.py", "--bogus"])
    assert compare.main(["--bogus"]) == hub.main() == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == printed.err.count("error: ") == 2 and "--bogus" in printed.err


@pytest.mark.slow
def test_a_reader_who_leaves_is_no_error(tmp_path):
    write_run(tmp_path / "run", range(6))
    words = ["sh", "-c", '("$@"; echo $? >status) | head -0', "sh", sys.executable, "-m", "steadyrl.compare", "run"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stderr == "" and (tmp_path / "status").read_text() == "0\n" and (tmp_path / "comparison.md").exists()


def test_success_is_compared_where_it_is_told(tmp_path, capsys, monkeypatch):
    """The mean of the last five shares; tasks are pooled as they are; a run without the column is refused."""
    monkeypatch.chdir(tmp_path)
    for task, shares in (("A-v0", (0, 0.2, 0.4, 0.6, 0.8, 1.0)), ("B-v0", (0, 1, 1, 1, 1, 1))):
        for seed in (1, 2):
            folder = write_run(tmp_path / f"{task}__x__{seed}__0", [-50.0] * 6, env_id=task, seed=seed)
            rows = list(csv.DictReader((folder / "evaluations.csv").read_text().splitlines()))
            with open(folder / "evaluations.csv", "w", newline="") as file:
                table = csv.DictWriter(file, [*rows[0], "success"])
                table.writeheader()
                table.writerows(row | {"success": share} for row, share in zip(rows, shares, strict=True))
    assert compare.main(["*__0", "--metric", "success"]) == 0
    text = (tmp_path / "comparison.md").read_text()
    assert cell(text, "A-v0", "ddpg", 4) == "0.60 +- 0.00" and cell(text, "B-v0", "ddpg", 4) == "1.00 +- 0.00"
    assert cell(text, "2 tasks, normalised", "ddpg", 4) == "0.80"
    write_run(tmp_path / "C-v0__x__1__0", [1.0] * 6, env_id="C-v0")
    assert compare.main(["*__0", "--metric", "success", "--overwrite"]) == 2
    assert "its evaluations.csv has no column 'success'" in capsys.readouterr().err
    assert compare.main(["*__0", "--overwrite"]) == 0


@pytest.mark.parametrize("target", [50.0, -60.0])
def test_a_target_is_a_return_also_where_success_is_compared(tmp_path, target):
    """Without it one run is unfinished. With -60 every share of successes would be above it."""
    short = write_run(tmp_path / "short", [-80.0, -70.0, -65.0], STEPS[:3], target_return=target)
    write_run(tmp_path / "long", [-80.0, -70.0, 0.0, 0.0, 0.0, 60.0], seed=2, target_return=target)
    for folder in (short, tmp_path / "long"):
        lines = (folder / "evaluations.csv").read_text().splitlines()
        text = [f"{lines[0]},success", *(f"{line},1.0" for line in lines[1:])]
        (folder / "evaluations.csv").write_text("\n".join(text) + "\n")
    for metric in ("return", "success"):
        notes: list[str] = []
        runs = [compare.read_run(tmp_path / name, "a", None, notes, metric) for name in ("short", "long")]
        assert [run.at_target for run in runs] == [False, True]
        assert list(compare.align("Hopper-v4", runs, notes).grid) == [100, 200, 300]
        assert not any("stopped early" in note for note in notes)


def test_a_run_that_was_evaluated_later_is_not_newer(tmp_path):
    for name, time in (("old", 1000), ("new", 2000)):
        os.utime(write_run(tmp_path / name, range(6)) / "args.json", (time, time))
        os.utime(tmp_path / name, (time, time))
    (tmp_path / "old" / "evaluate.json").write_text("{}")
    runs = [compare.read_run(tmp_path / name, None, None, []) for name in ("old", "new")]
    assert [run.folder.name for run in compare.name_groups(runs, [], newest=True)] == ["new"]


def test_a_folder_far_above_is_no_environment(tmp_path):
    folder = tmp_path / "myproject-v2" / "logs" / "TD3_1"
    write_events(folder, eval__mean_reward=[(step, 1) for step in STEPS])
    assert list(load(str(folder), task="Hopper-v4")[0]) == ["Hopper-v4"]


def test_a_pattern_skips_a_run_that_never_began(tmp_path):
    run = write_run(tmp_path / "runs" / "begun", [1.0] * len(STEPS))
    (empty := tmp_path / "runs" / "empty").mkdir()
    (empty / ".lock").touch()
    assert [*compare.find_folders([f"{tmp_path}/runs/*"])] == [run]
    assert [*compare.find_folders([str(empty)])] == [empty]


def test_a_run_that_was_not_evaluated_yet_is_left_out(tmp_path, capsys, undrawn):
    """It trains still. Its training returns are no substitute."""
    write_run(tmp_path / "old", range(6))
    young = write_run(tmp_path / "young", range(6), seed=2, total_timesteps=900)
    (young / "evaluations.csv").unlink(), (young / "evaluation.json").unlink()
    out = str(tmp_path / "out")
    assert compare.main([str(tmp_path / "old"), str(young), "-o", out]) == 0
    assert f"{young} is left out: it has no evaluation yet." in capsys.readouterr().out
    assert compare.main([str(young), "-o", out, "--overwrite"]) == 2
    assert "no run has an evaluation yet" in capsys.readouterr().err


def test_evaluations_without_a_row_are_damaged(tmp_path, capsys, undrawn):
    for total in (600, 900):  # finished, and not
        folder = write_run(tmp_path / str(total), range(6), total_timesteps=total)
        (folder / "evaluations.csv").write_text("")
        assert compare.main([str(folder), "-o", str(tmp_path / "out")]) == 2
        assert "its evaluations.csv has no row" in capsys.readouterr().err


def test_training_returns_and_greedy_ones_get_no_probability(tmp_path, undrawn):
    write_run(tmp_path / "Hopper-v4__ours__1__0", range(6))
    for name in ("a", "b"):
        folder = tmp_path / f"Hopper-v4__{name}__1__0"
        write_events(folder, charts__episodic_return=[(step, 1.0) for step in STEPS])
    out = tmp_path / "out"
    folders = [str(tmp_path / f"Hopper-v4__{name}__1__0") for name in ("ours", "a", "b")]
    for words, expected in (([], ["", "", ""]), (["--baseline", "a (training returns)"], ["", "", "0.50"])):
        assert compare.main([*folders, "-o", str(out), "--overwrite", *words]) == 0
        rows = [line.split(" | ") for line in out.with_suffix(".md").read_text().splitlines() if line.startswith("| Hopper")]
        assert [row[1] for row in rows] == ["ddpg", "a (training returns)", "b (training returns)"]
        assert [row[6].strip(" |") for row in rows] == expected


@pytest.mark.parametrize(
    ("main", "words"), [(compare.main, "scipy and matplotlib"), (hub.main, "huggingface_hub and safetensors")]
)
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, main, words):
    monkeypatch.setattr(sys, "argv", ["hub.py", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main() == 2
    assert f"needs {words}, install with: pip install {words.replace(' and', '')}" in capsys.readouterr().err
