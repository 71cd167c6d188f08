"""Greedy evaluation and the over-estimation monitor."""

import datetime
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from steadyrl.agent import Agent
from steadyrl.arguments import RunArgs
from steadyrl.device import Defaults
from steadyrl.environments import EPISODE_LIMIT, WorkerEnv, coming_back, make_env
from steadyrl.errors import EnvError, Stopped, TrainingError, UsageError
from steadyrl.files import json_of, shown, take_name, write_json, write_new
from steadyrl.models import choose_model, load_model
from steadyrl.output import say
from steadyrl.record import versions
from steadyrl.run_folder import read_evaluations, results_of
from steadyrl.signals import Signals

EVALUATION_SEED = 10_000  # first seed of the evaluations while training: the same starts each time, so rows compare
FINAL_EVALUATION_SEED = 20_000  # fresh starts for the reported result: the best model was chosen on the others


class Evaluation(NamedTuple):
    """The result of `evaluate`: returns and lengths with an entry per episode, and one q_bias over all of them. If the
    environment reports the success of its episodes, that too."""

    returns: np.ndarray
    lengths: np.ndarray
    q_bias: float
    successes: np.ndarray | None = None

    def summary(self) -> dict[str, float]:
        """The values for a row of evaluations.csv."""
        returns = {name: float(getattr(self.returns, name)()) for name in ("mean", "std", "min", "max")}
        success = {} if self.successes is None else {"success": float(self.successes.mean())}
        return returns | {"length": float(self.lengths.mean()), "q_bias": self.q_bias} | success


def evaluate(
    agent: Agent,
    args: RunArgs,
    episodes: int,
    seed: int,
    video_folder: Path | None = None,
    video_name: str = "evaluation",
    signals: Signals | None = None,
    in_worker: bool = False,
    render_mode: str | None = None,
) -> Evaluation:
    """Play greedy episodes on a new environment; the i-th starts from seed `seed + i`.

    Nothing here draws from the random streams of training. `q_bias` is the mean, over all states visited, of the
    critic's value of acting greedily minus the discounted return that followed. Above zero, the critic overestimates. If a
    time limit cut an episode off, its return is completed with the critic's own value of the last observation. Close to such
    an end the return contains the critic's error, so q_bias shows less of it.

    A critic's value may include more than the rewards of a greedy episode (its policy's noise, a bonus). So the difference
    between the agent's `state_value` and its `value` is added to each return that follows. q_bias is zero for a correct critic.

    Returns:
        undiscounted returns (episodes,), lengths in steps (episodes,), q_bias and, maybe, successes (episodes,).

    Args:
        signals: their handlers stay installed while the environment plays, even if it installs others.
        in_worker: run the environment in its own process.
        render_mode: of the environment, as for gymnasium.make; a video folder needs none.

    Raises:
        EnvError: if the environment fails, or if an observation, a reward or a return is not finite.
        Stopped: before the next step, if a signal asked for a stop.
    """
    defaults = Defaults()
    build = partial(make_env, args, render_mode=render_mode, video_folder=video_folder, video_name=video_name)
    spaces = agent.observation_space, agent.action_space
    # The environment may change the working directory, to which relative paths refer.
    with (
        coming_back() as restore_signals,
        defaults,
        closing(WorkerEnv(build, spaces, args.worker_timeout, signals) if in_worker else build()) as env,
    ):
        found = env.observation_space, env.action_space
        if found[0].shape != spaces[0].shape or found[1] != spaces[1]:  # the bounds of observations do not matter
            raise EnvError(f"an instance made for an evaluation has other spaces, {found}, than training's, {spaces}")

        def hold() -> None:
            defaults.hold()
            (signals.hold if signals is not None else restore_signals)()

        return play_episodes(env, agent, args, episodes, seed, signals, hold)


def play_episodes(
    env: gym.Env, agent: Agent, args: RunArgs, episodes: int, seed: int, signals: Signals | None, hold: Callable[[], None]
) -> Evaluation:
    """The episodes of `evaluate`. The environment may change the settings of the process: `hold` restores them."""
    returns, lengths, q_errors, successes = [], [], [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        if not np.isfinite(obs).all():
            raise EnvError(f"evaluation: episode {episode} is not finite: it starts with the observation {obs}")
        visited, terminated, truncated = [obs], False, False
        rewards: list[float] = []
        while not (terminated or truncated):
            hold()
            if signals is not None and signals.stop:
                raise Stopped(signals.stop)
            if len(rewards) == EPISODE_LIMIT:
                say(f"evaluation: episode {episode} is cut off after {EPISODE_LIMIT:,} steps")
                break
            obs, reward, terminated, truncated, info = env.step(agent.act(obs[None])[0])
            visited.append(obs)
            rewards.append(float(reward))
            if not (math.isfinite(reward) and np.isfinite(obs).all()):
                what = f"episode {episode} is not finite: step {len(rewards)} has the reward {reward} and the observation {obs}"
                raise EnvError(f"evaluation: {what}")
        hold()
        observations = np.stack(visited)
        values = agent.value(observations) / args.reward_scale  # in units of the rewards themselves
        expected = agent.state_value(observations) / args.reward_scale
        surplus = (expected - values).tolist()
        discounted_return = 0.0 if terminated else float(expected[-1])
        for step in reversed(range(len(rewards))):
            discounted_return = rewards[step] + args.gamma * discounted_return
            q_errors.append(values[step] - discounted_return)
            discounted_return += surplus[step]
        if not math.isfinite(sum(rewards)):
            raise EnvError(f"evaluation: the return of episode {episode} is not finite")
        returns.append(sum(rewards))
        lengths.append(len(rewards))
        successes += [info["is_success"]] if "is_success" in info else []
    successful = np.array(successes) if len(successes) == episodes else None
    return Evaluation(np.array(returns), np.array(lengths), float(np.mean(q_errors)), successful)


def final_evaluation(
    agent: Agent, args: RunArgs, folder: Path, global_step: int | None = None, signals: Signals | None = None
) -> Evaluation:
    """Evaluate the run's best model on fresh starts, print the result and write it to the folder. The model is the latest if
    no best one was kept, or the one that --model names.

    Args:
        global_step: the run's last step, if this ends a training. The result is then evaluation.json; an older one is renamed.

    Raises:
        Stopped: if a signal asked for a stop; nothing is written then.
        TrainingError: if the result cannot be written; the message contains it.
    """
    model = choose_model(folder, args.model)
    if model:
        load_model(agent, model)
    model_name = name_of_model(folder, model)
    video_folder = Path(args.output, "videos", folder.resolve().name).absolute() if args.capture_video else None
    place = folder / ("evaluate.json" if global_step is None else "evaluation.json")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--evaluate {folder}: must be a folder that a result can be written to")
    name = place.stem  # of no other film
    if global_step is None:
        name += f"-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    elif place.exists():
        name += f"-{global_step}"
    seed = FINAL_EVALUATION_SEED if args.eval_seed is None else args.eval_seed
    mode = "human" if args.render else None
    evaluation = evaluate(agent, args, args.final_episodes, seed, video_folder, name, signals, render_mode=mode)
    mean, std = evaluation.returns.mean(), evaluation.returns.std()
    result = {
        "env_id": args.env_id,
        "mean": mean,
        "std": std,
        "episodes": args.final_episodes,
        "seeds": list(range(seed, seed + args.final_episodes)),
        "returns": evaluation.returns.tolist(),
        "lengths": evaluation.lengths.tolist(),
        "q_bias": evaluation.q_bias,
        "model": model_name,
        "model_step": step_of_model(folder, model_name, global_step),
        "global_step": global_step,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(args.env_id),
    }
    success = ""
    if evaluation.successes is not None:
        result["success"] = float(evaluation.successes.mean())
        success = f", success {result['success']:.2f}"
    what = (
        f"final evaluation: {mean:.1f} +- {std:.1f}{success} over {args.final_episodes} episodes of {args.env_id} "
        f"({model_name or 'latest networks'})"
    )
    try:
        if global_step is not None:
            keep_result(place)
            write_json(place, result)
        else:
            place = write_new(place, lambda file: file.write(json_of(result)))
    except OSError as error:
        raise TrainingError(f"{what}, but {shown(place)} could not be written: {error.strerror}") from error
    films = list(video_folder.glob(f"{name}-episode-*.mp4")) if video_folder else []  # if there are none, a warning said why
    say(f"{what}, written to {shown(place)}" + (f", filmed in {shown(films[0].parent)}" if films else ""))
    return evaluation


def name_of_model(folder: Path, model: Path | None) -> str | None:
    """The name of a model's file. If it is not in the run's folder, the name of its own folder is before it."""
    if model is None:
        return None
    if model.parent.resolve() == folder.resolve():
        return model.name
    return f"{model.resolve().parent.name}/{model.name}"


def step_of_model(folder: Path, model: str | None, global_step: int | None) -> int | None:
    """The training step of a model with this `name_of_model`, as far as the run's folder shows it."""
    evaluations = read_evaluations(folder)
    if model == "best_model.pt":
        return max(evaluations, key=lambda row: (row[1], row[0]))[0] if evaluations else None
    if model is None or model == "model.pt":
        ends = [global_step or 0, *(result["global_step"] for result in results_of(folder)), *(step for step, _ in evaluations)]
        return max(ends) or None
    return None


def keep_result(place: Path) -> None:
    """Rename an earlier result of a training that was then extended: its new name contains its step."""
    if place.exists():
        step = re.search(r'"global_step": (\d+)', place.read_text(errors="replace"))
        place.replace(take_name(place.with_stem(f"evaluation-{step[1] if step else 0}")))
