"""The checks before a run creates anything: whether its flags, its environment and this machine fit together."""

import contextlib
import difflib
import gc
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from steadyrl.arguments import RunArgs, check_args
from steadyrl.device import Defaults
from steadyrl.environments import EPISODE_LIMIT, WorkerEnv, coming_back, has_display, make_replayable_env
from steadyrl.episodes import ReplayableEnv, find_company, find_replay, random_actions
from steadyrl.errors import EnvError, UsageError
from steadyrl.hindsight_replay import Goals, find_goals
from steadyrl.models import choose_model
from steadyrl.output import say
from steadyrl.record import load_record
from steadyrl.replay_buffer import available_memory, buffer_bytes
from steadyrl.spaces import Spaces, changes

RENDERING_HINT = "; on Debian and Ubuntu try: apt-get install libegl1 libgl1"
KNOWN_REPLAYS = {"BipedalWalkerHardcore-v3": "rebuild"}  # a few short episodes do not show the difference
REPLAYS = {
    "rebuild": "carries state from one episode to the next, or fails if it is reset in the middle of one. So each episode gets "
    "a new instance, and --resume can replay it. Noise that its constructor seeds is then the same in each episode: "
    "--episode-replay cut would keep one instance",
    "cut": "warning: a replayed episode is not the same as before (it ignores its seed, keeps state over resets, or has "
    "another source of random numbers). Two runs with the same seed may differ, and --resume cuts off the running episode",
}


class Findings(NamedTuple):
    """What `check` found out about an environment, for the run."""

    replay: str  # how a running episode comes back: plain, rebuild or cut
    disturbed: bool  # a second instance in the same process would disturb it, or what it draws


def check(args: RunArgs) -> Findings:
    """Refuse what cannot be run, before anything is created: check the flags, then try the environment.

    Raises:
        UsageError: if a flag is wrong, or if the environment does not exist or raises an error. Also if it has spaces that the
            algorithm cannot take, cannot be filmed, or does not work in a worker. Also if it disturbs other instances of it
            that the run would make, or needs a replay buffer that does not fit into memory.
    """
    check_args(args)
    if args.init_from and not (args.resume or args.evaluate):
        initial_model_of(args)
    with coming_back(), Defaults():
        return check_environment(args)


def check_environment(args: RunArgs) -> Findings:
    """The part of `check` that tries the environment."""
    what = f"--env-id {args.env_id}" + (f" --env-kwargs {json.dumps(args.env_kwargs)}" if args.env_kwargs else "")
    try:
        with contextlib.closing(make_replayable_env(args, render_mode="rgb_array" if args.capture_video else None)) as env:
            check_spaces(args, env)
            spaces = env.observation_space, env.action_space
        return Findings("plain", False) if args.evaluate else probe(args, what, spaces, env.spec.id if env.spec else "")
    except EnvError as error:
        if isinstance(error.__cause__, gym.error.Error):
            raise UsageError(f"{what}: {without_nonsense(args.env_id, error.__cause__)}") from error
        hint = RENDERING_HINT if "OpenGL" in str(error) else ""  # importing MuJoCo without libEGL fails inside PyOpenGL
        raise UsageError(f"{what}: {error}{hint}") from error


def check_spaces(args: RunArgs, env: ReplayableEnv) -> None:
    """Check that the algorithm, the memory and, if it is filmed, the renderer can take an environment."""
    obs_space, action_space = env.observation_space, env.action_space
    args.check_spaces(obs_space, action_space)
    needed = buffer_bytes(math.prod(obs_space.shape or ()), math.prod(action_space.shape or ()), args.buffer_size)
    kind = getattr(args, "replay", "uniform")  # not every script has this flag
    needed += {"prioritized": 16 << (args.buffer_size - 1).bit_length(), "hindsight": 8 * args.buffer_size}.get(kind, 0)
    available = available_memory()
    if needed > available and not args.evaluate:
        raise UsageError(
            f"--buffer-size {args.buffer_size}: needs {needed / 1e9:.1f} GB of memory, "
            f"must be at most {available // (needed // args.buffer_size)} for the {available / 1e9:.1f} GB available"
        )
    learns = getattr(args, "autotune", False) and not args.evaluate  # not every script has this flag
    if learns and isinstance(action_space, gym.spaces.Box):
        widths = (action_space.high - action_space.low)[action_space.high > action_space.low].astype(np.float64)
        most, target = np.log(widths).sum(), -math.prod(action_space.shape)  # the uniform distribution has the most entropy
        if most < target:
            say(
                f"warning: --autotune: {args.env_id} has actions in so small a range that their entropy is at most {most:.1f}. "
                f"It never reaches the target, {target}, and the temperature grows without end. Rescale the actions to -1..1 "
                "with gymnasium.wrappers.RescaleAction, or give --no-autotune and --alpha"
            )
    if args.capture_video:
        check_rendering(env)
    if args.render and sys.platform == "linux" and not has_display():
        raise UsageError("--render: needs a display, but DISPLAY and WAYLAND_DISPLAY are not set; --capture-video needs none")
    for change in changes(env.given_spaces, (obs_space, action_space)):
        say(f"{args.env_id}: {change}")
    for wrapper in wrappers_of(env):
        if isinstance(wrapper, gym.wrappers.NormalizeObservation | gym.wrappers.NormalizeReward):
            say(
                f"warning: {args.env_id}: its wrapper {type(wrapper).__name__} keeps statistics that no model or checkpoint "
                "holds. Evaluations and a resumed run begin with new ones: --normalize-observations or --reward-scale do better"
            )


def initial_model_of(args: RunArgs) -> Path:
    """The model that --init-from means.

    Raises:
        UsageError: if there is none, or if its networks have another --activation, which no weight shows.
    """
    run_dir = str(args.init_from)
    try:
        path = choose_model(Path(run_dir), None)
    except OSError as error:
        raise UsageError(f"--init-from {run_dir[:200]}: cannot be read ({error.strerror})") from error
    if path is None:
        raise UsageError(f"--init-from {run_dir}: must hold a best_model.pt or a model.pt")
    if hasattr(args, "activation"):  # not every script has this flag
        other = load_record(Path(run_dir))["args"].get("activation", args.activation)
        if args.activation != other:
            raise UsageError(f"--activation {args.activation}: must be that of --init-from {run_dir}, {other}")
    return path


def check_goals(args: RunArgs) -> Goals:
    """What --replay hindsight needs to know of an environment.

    Raises:
        UsageError: if its goals cannot be used.
    """
    what = f"--replay hindsight: --env-id {args.env_id} does not fit it"
    try:
        # Built anew for each episode: some fail if they are reset in the middle of one, some change from one to the next.
        with coming_back(), Defaults(), contextlib.closing(make_replayable_env(args, rebuild=True)) as env:
            goals = find_goals(env)
    except (UsageError, EnvError) as error:
        raise UsageError(f"{what}: {error}") from error
    for name in goals.one_by_one:
        say(f"{args.env_id}: its {name} takes one goal at a time; if it took arrays of goals, training would be faster")
    return goals


def probe(args: RunArgs, what: str, spaces: Spaces, env_id: str) -> Findings:
    """Play a few short episodes to find out what a run must know about its environment. Messages say what is unusual.

    Args:
        what: the environment as the user named it.
        spaces: of the environment.
        env_id: Gymnasium's own name of it, which has a version.
    """
    replay: str = args.episode_replay
    if replay == "auto":
        replay = KNOWN_REPLAYS.get(env_id) or find_replay(
            lambda rebuild: make_replayable_env(args, rebuild=rebuild, finite=True)
        )
    if replay in REPLAYS:
        say(f"{args.env_id}: {REPLAYS[replay]}")
    plays = args.episode_replay == "auto"  # otherwise the user knows the environment
    company = find_company(lambda: make_replayable_env(args, rebuild=replay == "rebuild"), plays)
    if plays:
        gc.collect()  # now and not in an update: a generator that these instances leave may change a setting when it is deleted
    else:
        say(
            f"{args.env_id}: with --episode-replay {replay} no episode is played before training, so it is not known whether "
            "instances disturb each other, or whether episodes end"
        )
    if company.alone and (args.num_envs > 1 or args.eval_frequency > 0):
        raise UsageError(
            f"{what}: there can be only one instance at a time, since a second one failed ({company.alone}): train it with "
            "--num-envs 1 --eval-frequency 0, which evaluates it after training"
        )
    if company.disturbed and args.vectorization == "sync":
        if args.num_envs > 1:
            raise UsageError(
                f"{what} --num-envs {args.num_envs}: instances in one process disturb each other, use --vectorization async"
            )
        say(f"{args.env_id}: two instances in one process disturb each other, so evaluations have a process of their own")
    elif company.mixed and args.vectorization == "sync":
        say(f"{args.env_id}: all instances in one process draw from one generator, so evaluations have a process of their own")
        if args.num_envs > 1:
            say(
                f"warning: --num-envs {args.num_envs}: so a resumed run may differ; --vectorization async would keep them apart"
            )
    say_when_episodes_end(args, company.ended)
    if args.vectorization == "async":
        with contextlib.closing(WorkerEnv(partial(make_replayable_env, args), spaces, args.worker_timeout)) as env:
            env.reset(seed=0)
            env.step(random_actions(env, 0)[0])
    return Findings(replay, company.disturbed or company.mixed)


def wrappers_of(env: gym.Env) -> Iterator[gym.Wrapper]:
    """The wrappers of an environment, from the outermost."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def say_when_episodes_end(args: RunArgs, ended: bool) -> None:
    """Print a message if episodes may never end, or if they end before --max-episode-steps.

    Args:
        ended: whether an episode was seen that ended.
    """
    with contextlib.closing(make_replayable_env(args)) as env:
        limits = [wrapper._max_episode_steps for wrapper in wrappers_of(env) if isinstance(wrapper, gym.wrappers.TimeLimit)]
    if not limits and not ended:
        say(
            f"{args.env_id}: has no time limit, an episode may never end: --max-episode-steps 1000 would give it one. "
            f"Evaluations cut an episode off after {EPISODE_LIMIT:,} steps"
        )
    if args.max_episode_steps and limits and min(limits) < args.max_episode_steps:
        say(f"{args.env_id}: has a time limit of its own, {min(limits)}, below --max-episode-steps {args.max_episode_steps}")


def without_nonsense(env_id: str, error: gym.error.Error) -> str:
    """Gymnasium's message. For an unknown id, it suggests another name only if that name is similar."""
    if isinstance(error, gym.error.DeprecatedEnv) or not isinstance(error, gym.error.UnregisteredEnv):
        return str(error)
    ids = {known.lower(): known for known in gym.registry}
    close = difflib.get_close_matches(env_id.rpartition(":")[2].lower(), ids, n=1, cutoff=0.8)
    hint = f" Did you mean {ids[close[0]]}?" if close and not isinstance(error, gym.error.VersionNotFound) else ""
    what = str(error).partition(" Did you mean")[0]
    return f"{what}{hint} (--env-id module:EnvId first imports the module that registers your own)"


def check_rendering(env: gym.Env) -> None:
    """Render a frame, so that a missing library is found now and not after an hour.

    Raises:
        UsageError: naming what to install.
    """
    try:
        import moviepy  # noqa: F401
    except ImportError:
        raise UsageError("--capture-video: needs moviepy, install it with: pip install moviepy") from None
    if env.render_mode in (None, "human", "ansi"):
        what = (
            f"{env.spec and env.spec.id} has the render_mode {env.render_mode}, must be the one that its constructor is given"
        )
        raise UsageError(f"--capture-video: {what}, rgb_array")
    try:
        env.reset()
        env.render()
    except Exception as error:  # each renderer fails in its own way, down to an AttributeError inside OpenGL
        hint = "" if "install" in str(error) else RENDERING_HINT
        cause: BaseException | None = error
        while cause is not None:  # Gymnasium names an extra that pip does not know
            if isinstance(cause, ModuleNotFoundError) and cause.name:
                missing = f"--capture-video: {env.spec and env.spec.id} needs {cause.name} to be rendered"
                raise UsageError(f"{missing}, install it with: pip install {cause.name}") from error
            cause = cause.__cause__ or cause.__context__
        raise UsageError(f"--capture-video: {env.spec and env.spec.id} cannot be rendered ({error}){hint}") from error
