"""What is found out before a run creates anything: whether its flags, its environment and this machine fit."""

import contextlib
import difflib
import json
import math

import gymnasium as gym

from steadyrl.arguments import RunArgs, check_args
from steadyrl.environments import make_replayable_env
from steadyrl.episodes import find_replay
from steadyrl.errors import EnvError, UsageError, in_one_line
from steadyrl.replay_buffer import available_memory, buffer_bytes
from steadyrl.spaces import changes

RENDERING_HINT = "; on Debian and Ubuntu try: apt-get install libegl1 libgl1"
KNOWN_REPLAYS = {"BipedalWalkerHardcore-v3": "rebuild"}  # it differs too seldom to be found out by a few short episodes
REPLAYS = {
    "rebuild": "carries state from one episode to the next, so it is built anew for each one: a replay then brings it back",
    "cut": "warning: a replayed episode is not the same one (it ignores its seed, keeps state over resets, or draws from "
    "elsewhere), so two runs with one seed may differ, and --resume cuts off the running episode",
}


def check(args: RunArgs) -> str:
    """Refuse what cannot be run, before anything is created: check the flags, then build the environment and close it.

    Returns:
        how a running episode comes back: plain, rebuild or cut. (auto, where nothing is trained.)

    Raises:
        UsageError: if a flag is wrong, or if the environment does not exist, raises an error, has spaces that the algorithm
            cannot take, cannot be filmed, or needs a replay buffer that does not fit into memory.
    """
    check_args(args)
    what = f"--env-id {args.env_id}" + (f" --env-kwargs {json.dumps(args.env_kwargs)}" if args.env_kwargs else "")
    try:
        env = make_replayable_env(args, render_mode="rgb_array" if args.capture_video else None)
    except UsageError:  # of the algorithm's wrapper
        raise
    except gym.error.Error as error:
        raise UsageError(f"{what}: {without_nonsense(args.env_id, error)}") from error
    except Exception as error:  # whatever the environment's own code raises
        line = in_one_line(error)  # importing MuJoCo without libEGL is an AttributeError inside PyOpenGL
        raise UsageError(f"{what}: {line}{RENDERING_HINT if 'OpenGL' in line else ''}") from error
    try:
        obs_space, action_space = env.observation_space, env.action_space
        args.check_spaces(obs_space, action_space)
        needed = buffer_bytes(math.prod(obs_space.shape or ()), math.prod(action_space.shape or ()), args.buffer_size)
        available = available_memory()
        if needed > available:
            raise UsageError(
                f"--buffer-size {args.buffer_size}: needs {needed / 1e9:.1f} GB of memory, "
                f"must be at most {available // (needed // args.buffer_size)} for the {available / 1e9:.1f} GB available"
            )
        if args.capture_video:
            check_rendering(env)
        for change in changes(env.given_spaces, (obs_space, action_space)):
            print(f"{args.env_id}: {change}")
        replay: str = args.episode_replay
        if args.evaluate is not None:
            return replay
        if replay == "auto":
            replay = KNOWN_REPLAYS.get(args.env_id) or find_replay(lambda rebuild: make_replayable_env(args, rebuild=rebuild))
        if replay in REPLAYS:
            print(f"{args.env_id}: {REPLAYS[replay]}")
        return replay
    except EnvError as error:
        raise UsageError(f"{what}: {error}") from error
    finally:
        with contextlib.suppress(Exception):  # a renderer that failed to open may also fail to close
            env.close()


def without_nonsense(env_id: str, error: gym.error.Error) -> str:
    """What Gymnasium says; of an id that it does not know, with another suggestion: only a name that is close to it."""
    if isinstance(error, gym.error.DeprecatedEnv) or not isinstance(error, gym.error.UnregisteredEnv):
        return str(error)
    ids = {known.lower(): known for known in gym.registry}
    close = difflib.get_close_matches(env_id.rpartition(":")[2].lower(), ids, n=1, cutoff=0.8)
    hint = f" Did you mean {ids[close[0]]}?" if close and not isinstance(error, gym.error.VersionNotFound) else ""
    what = str(error).partition(" Did you mean")[0]
    return f"{what}{hint} (--env-id module:EnvId imports first the module that registers your own)"


def check_rendering(env: gym.Env) -> None:
    """Render a frame, so that a missing library is found now and not after an hour.

    Raises:
        UsageError: naming what to install.
    """
    try:
        import moviepy  # noqa: F401
    except ImportError:
        raise UsageError("--capture-video: needs moviepy, install it with: pip install moviepy") from None
    try:
        env.reset()
        env.render()
    except Exception as error:  # each renderer fails in its own way, down to an AttributeError inside OpenGL
        hint = "" if "install" in str(error) else RENDERING_HINT
        raise UsageError(f"--capture-video: {env.spec and env.spec.id} cannot be rendered ({error!r}){hint}") from error
