"""The recipes of docs/results.md: tasks, the one command that solves each, and what it reached over seeds.

    python benchmarks/recipes.py --task pendulum --seeds 1 2 3 --workers 2   # run what has no result yet, by steadyrl.sweep
    python benchmarks/recipes.py --docs                                      # write the tables of docs/results.md

The results of finished runs go to benchmarks/results/recipes.csv, a row per seed, and their evaluations to
benchmarks/results/curves/, where the pictures are drawn from. On SLURM the runs end later: the same command again collects
them. To run a seed again, delete its row and its run folder.

What a row holds:
- mean, std: the final evaluation of the best model, greedy episodes on fresh starts
- last_five, q_bias: the mean of the run's last five evaluations, and q_bias of the last one
- training_return: the mean of its last 100 training episodes, exploration included
- goal_step, goal_seconds: when an evaluation first reached the goal
- commit: with ~ it was not recorded, and is the last one before the run began
"""

import csv
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from steadyrl import sweep  # noqa: E402
from steadyrl.checkpoints import load_checkpoint  # noqa: E402
from steadyrl.errors import UsageError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "recipes.csv"
PAGE = ROOT / "docs" / "results.md"
CURVES = ROOT / "benchmarks" / "results" / "curves"
MARKS = "<!-- recipes: written by benchmarks/recipes.py --docs -->\n", "<!-- end of recipes -->\n"
COLUMNS = (
    *("task", "seed", "steps", "wall_seconds", "mean", "std", "returns", "model_step", "last_five", "q_bias"),
    *("training_return", "goal_step", "goal_seconds", "date", "versions", "command", "success", "commit", "processor"),
)


class Recipe(NamedTuple):
    """A task: its environment, the flags that solve it, the greedy mean that the best model must reach on every seed, what
    has to be installed for it, which algorithm it is, of which script; and where episodes succeed or fail, the share of them
    that must succeed instead."""

    env_id: str
    flags: str
    goal: float | None
    install: str = ""
    algorithm: str = "DDPG"
    script: str = "ddpg_continuous_action.py"
    success: float | None = None

    @property
    def aim(self) -> tuple[str, float | None]:
        """The column of evaluations.csv that counts, and what it must reach."""
        return ("mean", self.goal) if self.success is None else ("success", self.success)


TD3, SAC, DQN = "td3_continuous_action.py", "sac_continuous_action.py", "dqn.py"
INVERTED_PENDULUM = (  # what the recipes for it share
    """--env-kwargs '{"reset_noise_scale": 0.2}' --total-timesteps 150000 --learning-starts 5000 --eval-frequency 5000 """
    "--eval-episodes 20 --target-return 990 --num-envs 32 --gradient-steps 8 --batch-size 128 --hidden-sizes 64 64 "
    "--buffer-size 150000"
)
# SAC's third step reached 1,000 in 20 episodes (seed 21) with a model that fell in 2 of 20 others: 50 tell more.
INVERTED_PENDULUM_SAC = (
    INVERTED_PENDULUM.replace("--eval-episodes 20 --target-return 990", "--eval-episodes 50 --target-return 1000")
    + " --policy-lr 1e-3 --accelerate compile"
)
# It hovers for some 300,000 steps and then lands. With more updates for each step it landed earlier, but then overestimated
# more and more and fell again (benchmarks/results/tried.csv).
LUNAR_LANDER_DQN = (
    "--learning-starts 10000 --eval-frequency 20000 --eval-episodes 50 --target-return 240 "
    "--train-frequency 4 --target-network-frequency 1000 --learning-rate 5e-4 --hidden-sizes 128 128 "
    "--exploration-fraction 0.2 --buffer-size 200000"
)
TWO_CRITICS = (  # for MuJoCo's tasks
    "--critic-learning-rate 1e-3 --learning-starts 10000 --batch-size 128 --eval-frequency 25000"
)
GOALS = (  # for tasks whose reward is -1 until a goal is reached
    "--replay hindsight --learning-starts 1000 --eval-frequency 2000 --eval-episodes 20 --final-episodes 50 --gamma 0.95 "
    "--learning-rate 1e-3 --tau 0.05 --policy-frequency 1 --exploration-noise 0.2 --buffer-size 20000"
)
# On seed 21, smaller networks and half as many updates of the actor learned no worse. They ran nearly twice as fast. An update
# for each step was no better than one for two steps, and one for four was worse (benchmarks/results/tried.csv).
PUSH = (
    "--replay hindsight --normalize-observations --total-timesteps 500000 --learning-starts 2000 --eval-frequency 20000 "
    "--eval-episodes 100 --final-episodes 50 --gamma 0.95 --learning-rate 1e-3 --tau 0.05 --train-frequency 2 "
    "--exploration-noise 0.2"
)
FETCH = "pip install gymnasium-robotics==1.4.2 mujoco==3.3.7  # which does not work with MuJoCo 4: in an environment of its own"
PANDA = "pip install panda-gym==3.0.7"
BOX2D = 'pip install "gymnasium[box2d]==1.4.0"'
RECIPES = {
    "pendulum": Recipe(
        "Pendulum-v1",
        "--total-timesteps 30000 --learning-starts 1000 --eval-frequency 2000 "
        "--noise ou --exploration-noise 0.3 --critic-loss huber --actor-learning-rate 5e-4 --critic-learning-rate 1e-3 "
        "--gamma 0.98 --batch-size 128 --buffer-size 30000",
        -200,
    ),
    "mountain_car": Recipe(
        "MountainCarContinuous-v0",
        "--total-timesteps 100000 --learning-starts 1000 --eval-frequency 5000 "
        "--noise ou --exploration-noise 0.5 --learning-rate 1e-3 --batch-size 128 --hidden-sizes 64 64 --buffer-size 100000",
        90,
    ),
    # Its flags were found on seeds 21 to 24 (benchmarks/results/tried.csv).
    "lunar_lander": Recipe(
        "LunarLanderContinuous-v3",
        "--total-timesteps 300000 --learning-starts 5000 --eval-frequency 10000 --eval-episodes 100 --final-episodes 100 "
        "--target-return 260 --n-steps 3 --critic-loss huber --normalization layer --learning-rate 1e-3 "
        "--exploration-noise 0.2 --batch-size 128 --hidden-sizes 128 128 --buffer-size 300000",
        230,
        BOX2D,
    ),
    "inverted_pendulum": Recipe(
        "InvertedPendulum-v5",
        """--env-kwargs '{"reset_noise_scale": 0.2}' --total-timesteps 150000 """
        "--learning-starts 5000 --eval-frequency 10000 --eval-episodes 20 --num-envs 32 --gradient-steps 8 "
        "--reward-scale 0.1 --exploration-noise 0.3 --exploration-noise-end 0.05 --exploration-fraction 0.5 "
        "--learning-rate 1e-3 --batch-size 128 --hidden-sizes 64 64 --buffer-size 150000",
        950,
    ),
    "inverted_pendulum_dqn": Recipe(
        "InvertedPendulum-v5",
        f"{INVERTED_PENDULUM} --reward-scale 0.1 --learning-rate 1e-3 --bins 2 --train-frequency 32 --exploration-fraction 0.2",
        950,
        algorithm="DQN",
        script=DQN,
    ),
    "inverted_pendulum_m1": Recipe(
        "InvertedPendulum-v5",
        f"{INVERTED_PENDULUM_SAC} --reward-scale 0.1 --num-critics 1 --alpha 0 --no-autotune",
        950,
        algorithm="SAC M1",
        script=SAC,
    ),
    "inverted_pendulum_m2": Recipe(
        "InvertedPendulum-v5",
        f"{INVERTED_PENDULUM_SAC} --reward-scale 0.1 --num-critics 2 --alpha 0 --no-autotune",
        950,
        algorithm="SAC M2",
        script=SAC,
    ),
    "inverted_pendulum_m3": Recipe("InvertedPendulum-v5", INVERTED_PENDULUM_SAC, 950, algorithm="SAC M3", script=SAC),
    "cart_pole_dqn": Recipe(
        "CartPole-v1",
        "--total-timesteps 50000 --learning-starts 1000 --eval-frequency 2500 --eval-episodes 20 --target-return 500 "
        "--train-frequency 256 --gradient-steps 128 --target-network-frequency 10 --learning-rate 2.3e-3 --batch-size 64 "
        "--hidden-sizes 256 256 --exploration-fraction 0.16 --end-e 0.04 --buffer-size 50000",
        475,
        algorithm="DQN",
        script=DQN,
    ),
    "lunar_lander_dqn": Recipe("LunarLander-v3", LUNAR_LANDER_DQN, 200, BOX2D, algorithm="DQN", script=DQN),
    "lunar_lander_double_dqn": Recipe(
        "LunarLander-v3", f"{LUNAR_LANDER_DQN} --double-q", 200, BOX2D, algorithm="Double DQN", script=DQN
    ),
    "pendulum_sac": Recipe(
        "Pendulum-v1",
        "--total-timesteps 20000 --learning-starts 1000 --eval-frequency 2000 "
        "--policy-lr 1e-3 --batch-size 128 --hidden-sizes 64 64 --buffer-size 20000",
        -200,
        algorithm="SAC",
        script=SAC,
    ),
    "panda_reach": Recipe(
        "panda_gym:PandaReach-v3", f"--total-timesteps 20000 {GOALS}", None, PANDA, "DDPG, hindsight", success=1.0
    ),
    "fetch_reach": Recipe(
        "gymnasium_robotics:FetchReach-v4", f"--total-timesteps 20000 {GOALS}", None, FETCH, "DDPG, hindsight", success=1.0
    ),
    "panda_push": Recipe("panda_gym:PandaPush-v3", PUSH, None, PANDA, "DDPG, hindsight", success=0.9),
    "hopper_sac": Recipe("Hopper-v4", "", None, algorithm="SAC", script=SAC),
    "half_cheetah_sac": Recipe("HalfCheetah-v4", "", None, algorithm="SAC", script=SAC),
    "walker2d_sac": Recipe("Walker2d-v4", "", None, algorithm="SAC", script=SAC),
    "hopper_td3_cleanrl": Recipe("Hopper-v4", "", None, algorithm="TD3, CleanRL's defaults", script=TD3),
    "half_cheetah_td3_cleanrl": Recipe("HalfCheetah-v4", "", None, algorithm="TD3, CleanRL's defaults", script=TD3),
    "walker2d_td3_cleanrl": Recipe("Walker2d-v4", "", None, algorithm="TD3, CleanRL's defaults", script=TD3),
    "hopper_td3_prioritized": Recipe(
        "Hopper-v4", f"{TWO_CRITICS} --replay prioritized --total-timesteps 300000", None, "", "TD3, prioritised", TD3
    ),
    "lunar_lander_dqn_prioritized": Recipe(
        "LunarLander-v3", f"{LUNAR_LANDER_DQN} --replay prioritized", 200, BOX2D, "DQN, prioritised", DQN
    ),
    "hopper_td3": Recipe("Hopper-v4", TWO_CRITICS, None, algorithm="TD3", script=TD3),
    "half_cheetah_td3": Recipe("HalfCheetah-v4", TWO_CRITICS, None, algorithm="TD3", script=TD3),
    "walker2d_td3": Recipe("Walker2d-v4", TWO_CRITICS, None, algorithm="TD3", script=TD3),
    "hopper": Recipe("Hopper-v4", "", None),
    "half_cheetah": Recipe("HalfCheetah-v4", "", None),
    "walker2d": Recipe("Walker2d-v4", "", None),
}
STEPS = 100_000, 300_000, 500_000, 1_000_000
PUBLISHED = {  # greedy returns at these steps, means of ten seeds: SAC in SimbaV2's data (MuJoCo v4), TD3 in Tianshou's (v3)
    "Hopper-v4": {"SAC": "1,103 | 2,160 +- 981 | 2,887 | 2,787", "TD3": "569 | 1,616 | 2,953 | 3,241"},
    "HalfCheetah-v4": {"SAC": "6,156 | 8,593 +- 964 | 9,838 | 11,321", "TD3": "5,283 | 7,653 | 8,820 | 10,183"},
    "Walker2d-v4": {"SAC": "690 | 2,470 +- 1,571 | 3,603 | 4,536", "TD3": "416 | 1,622 | 2,718 | 3,959"},
}
# Returns of the last 100 training episodes of CleanRL's DDPG (three seeds, MuJoCo v4), whose settings are our defaults.
CLEANRL = {"Hopper-v4": "1,577 +- 819", "HalfCheetah-v4": "10,374 +- 157", "Walker2d-v4": "1,240 +- 390"}


@dataclass
class Options:
    """Run the recipes."""

    task: Literal["all", *RECIPES] = "all"  # type: ignore[valid-type]  # known at run time only; tyro lists them
    """which of them"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds to run"""
    workers: int = 2
    """runs side by side, one thread each"""
    engine: Literal["auto", "local", "slurm"] = "auto"
    """this machine or SLURM, as in steadyrl.sweep"""
    status: bool = False
    """show where each run is, and start nothing"""
    docs: bool = False
    """write the tables of docs/results.md from the results, and run nothing"""


def command(recipe: Recipe) -> str:
    """The command as docs/results.md prints it."""
    return f"python {recipe.script} --env-id {recipe.env_id} {recipe.flags}".rstrip()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_results() -> list[dict[str, str]]:
    """The rows of recipes.csv whose command is still the recipe's command."""
    if not RESULTS.exists():
        return []
    return [row for row in read_csv(RESULTS) if row["command"] == command(RECIPES[row["task"]])]


def read_events(folder: Path) -> EventAccumulator:
    """What a run logged for TensorBoard, every scalar of it."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def training_return(events: EventAccumulator) -> float:
    """The mean return of a run's last 100 training episodes, exploration included, as CleanRL reports it."""
    return statistics.mean(event.value for event in events.Scalars("charts/episodic_return")[-100:])


def first_at(goal: float | None, folder: Path, events: EventAccumulator, column: str = "mean") -> tuple[int | str, int | str]:
    """Step of the first evaluation of a run that reached the goal, and the seconds to its end, with interruptions; or ""."""
    times = {event.step: event.wall_time for event in events.Scalars("eval/episodic_return")}
    for row in read_csv(folder / "evaluations.csv"):
        if goal is not None and float(row[column]) >= goal:
            step = int(row["global_step"])
            return step, round(times[step] - events.FirstEventTimestamp())
    return "", ""


def collect(task: str, folder: Path) -> None:
    """Add the row of a finished run to recipes.csv, and copy its evaluations."""
    record = json.loads((folder / "args.json").read_text())
    seed = record["args"]["seed"]
    result = json.loads((folder / "evaluation.json").read_text())
    checkpoint = load_checkpoint(folder / "checkpoints")  # none, if somebody deleted them
    evaluations = read_csv(folder / "evaluations.csv")
    curve = CURVES / f"{task}-{seed}"
    curve.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", "evaluations.csv", "evaluation.json"):
        shutil.copy(folder / name, curve)
    events = read_events(folder)
    column, goal = RECIPES[task].aim
    goal_step, goal_seconds = first_at(goal, folder, events, column)
    row = {
        "task": task,
        "seed": seed,
        "steps": evaluations[-1]["global_step"],
        "wall_seconds": round(checkpoint["run"]["elapsed"]) if checkpoint else "",  # goes on over interruptions
        "mean": round(result["mean"], 2),
        "std": round(result["std"], 2),
        "returns": " ".join(f"{value:.1f}" for value in result["returns"]),
        "model_step": max(reversed(evaluations), key=lambda row: float(row["mean"]))["global_step"],  # of equal ones the latest
        "last_five": round(statistics.mean(float(row["mean"]) for row in evaluations[-5:]), 2),
        "q_bias": round(float(evaluations[-1]["q_bias"]), 2),
        "training_return": round(training_return(events), 2),
        "goal_step": goal_step,
        "goal_seconds": goal_seconds,
        "date": result["date"],
        "versions": " ".join(f"{name}={version}" for name, version in result["versions"].items()),
        "command": command(RECIPES[task]),
        "success": result.get("success", ""),
        "commit": (record["code"]["commit"] or "")[:7],  # none without git
        "processor": record["processor"],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            rows.writeheader()
        rows.writerow(row)


def run_all(options: Options) -> int:
    """Run what is asked for and has no result, and collect what is finished; returns the exit status of the sweep."""
    common = sweep.Options(engine=options.engine, workers=options.workers, status=options.status)
    results = {(row["task"], int(row["seed"])) for row in read_results()}
    jobs: dict[sweep.Job, str] = {}
    for task in list(RECIPES) if options.task == "all" else [options.task]:
        seeds = tuple(seed for seed in options.seeds if (task, seed) not in results)
        recipe = RECIPES[task]
        runs = replace(common, script=ROOT / recipe.script, env_ids=(recipe.env_id,), settings=(f"={recipe.flags}",))
        jobs |= dict.fromkeys(sweep.plan(replace(runs, seeds=seeds)), task) if seeds else {}
    if not jobs:
        print(f"every seed has its row in {RESULTS.name}: to run one again, delete its row and its run folder")
    status = sweep.sweep(list(jobs), common) if jobs else 0
    for job, task in jobs.items():
        if job.status({})[0] == "finished" and (folder := job.folder()):
            collect(task, folder)
    return status


def table() -> str:
    """The section of docs/results.md: a row per seed of each task that was run, and its command and learning curve."""
    columns = "task|algorithm|goal|seed|steps|minutes|greedy mean +- std|last five|q_bias|commit|processor".split("|")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    commands = []
    for task, recipe in RECIPES.items():
        results = sorted((row for row in read_results() if row["task"] == task), key=lambda row: int(row["seed"]))
        if not results:
            continue
        goal = "none" if recipe.goal is None else str(recipe.goal)
        goal = goal if recipe.success is None else f"success {recipe.success}"
        for row in results:
            success = f", success {float(row['success']):.2f}" if row["success"] else ""
            minutes = f"{float(row['wall_seconds']) / 60:.1f}" if row["wall_seconds"] else ""
            rows.append(
                f"| {recipe.env_id} | {recipe.algorithm} | {goal} | {row['seed']} | {int(row['steps']):,} "
                f"| {minutes} | {float(row['mean']):.1f} +- {float(row['std']):.1f}{success} "
                f"| {float(row['last_five']):.1f} | {float(row['q_bias']):+.1f} "
                f"| {row['commit']} | {row['processor']} |"
            )
        install = f"{recipe.install}\n" if recipe.install else ""
        commands.append(f"### {recipe.env_id}, {recipe.algorithm}\n\n```bash\n{install}{command(recipe)}\n```\n")
        for picture, what in ((f"{task}.png", "learning curves"), (f"{task}.gif", "an episode of the final evaluation")):
            if (RESULTS.parent / picture).exists():
                commands.append(f"![{what}](../benchmarks/results/{picture})\n")
    return "\n".join([*rows, "", *beside_published(), "", *commands])


def beside_published() -> list[str]:
    """A table of the greedy returns of single evaluations, means over seeds, and of training returns, beside published ones."""
    rows = [f"| task | algorithm | seeds | {' | '.join(f'{step:,} steps' for step in STEPS)} |", "|---" * 7 + "|"]
    results = read_results()
    for env_id, others in PUBLISHED.items():
        for task, recipe in RECIPES.items():
            seeds = [row["seed"] for row in results if row["task"] == task]
            if recipe.env_id != env_id or not seeds:
                continue
            files = [CURVES / f"{task}-{seed}" / "evaluations.csv" for seed in seeds]
            curves = [{int(row["global_step"]): float(row["mean"]) for row in read_csv(file)} for file in files]
            known = [[curve[step] for curve in curves if step in curve] for step in STEPS]
            means = " | ".join(f"{statistics.mean(returns):,.0f}" if returns else "" for returns in known)
            rows.append(f"| {env_id} | {recipe.algorithm} | {len(seeds)} | {means} |")
        rows += [f"| {env_id} | {algorithm}, published | 10 | {means} |" for algorithm, means in others.items()]
        defaults = [row["training_return"] for row in results if RECIPES[row["task"]] == Recipe(env_id, "", None)]
        training = [float(value) for value in defaults if value]  # of older runs it is not known
        if training:
            spread = f" +- {statistics.stdev(training):,.0f}" if len(training) > 1 else ""
            rows.append(f"| {env_id} | DDPG, training | {len(training)} |  |  |  | {statistics.mean(training):,.0f}{spread} |")
        rows.append(f"| {env_id} | DDPG, training, published | 3 |  |  |  | {CLEANRL[env_id]} |")
    return rows


def write_between(marks: tuple[str, str], text: str) -> None:
    """Replace the text between two marks in docs/results.md."""
    before, rest = PAGE.read_text().split(marks[0])
    PAGE.write_text(f"{before}{marks[0]}{text}{marks[1]}{rest.split(marks[1])[1]}")


if __name__ == "__main__":
    options = tyro.cli(Options)
    os.chdir(ROOT)
    if options.docs:
        write_between(MARKS, table())
        sys.exit()
    try:
        sys.exit(run_all(options))
    except UsageError as error:
        sys.exit(f"error: {error}")
