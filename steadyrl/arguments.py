"""The flags that every run has, whatever its algorithm; how flags are parsed, and the check of each. Imports no PyTorch."""

import contextlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import gymnasium as gym
import tyro

from steadyrl.errors import UsageError
from steadyrl.family import removed

# Flags of one call of a script, not of a run.
OF_A_CALL = {"resume", "evaluate", "model", "eval_seed", "render", "export"}
PRIVATE = {"output", "init_from", "hf_entity", "wandb_project_name", "wandb_entity"}  # folders and names of a user
# What `--evaluate` and `--resume` take on top of the saved arguments. Anything else would make it another run.
EVALUATE_MAY_CHANGE = {"final_episodes", "capture_video", "cuda", "output", "upload_model", "hf_entity"}
EVALUATE_MAY_CHANGE |= OF_A_CALL - {"resume"}
RESUME_MAY_CHANGE = {"resume", "total_timesteps", "eval_frequency", "checkpoint_frequency", "keep_checkpoints"}
RESUME_MAY_CHANGE |= {"final_episodes", "track", "capture_video", "num_threads", "accelerate"}
RESUME_MAY_CHANGE |= {"output", "upload_model", "hf_entity"}


class Must(NamedTuple):
    """What the value of a flag must be. Each test is written so that NaN, which compares false with everything, fails."""

    be: str
    test: Callable[[Any], bool]


LARGEST = 10**15  # of which a float64 still knows each whole number
Count = Annotated[int, Must("a whole number, 1 or more and at most 10^15", lambda n: 1 <= n <= LARGEST)]
CountOrZero = Annotated[int, Must("a whole number, 0 or more and at most 10^15", lambda n: 0 <= n <= LARGEST)]
Threads = Annotated[int, Must("a whole number, 1 to 1024", lambda n: 1 <= n <= 1024)]  # of a billion PyTorch dies
FLOAT32 = 3.4028234e38  # the largest that PyTorch calculates with
Positive = Annotated[float, Must("above 0 and finite as float32", lambda x: 0 < x <= FLOAT32)]
Seconds = Annotated[float, Must("above 0 and at most 1,000,000", lambda x: 0 < x <= 1e6)]  # a clock cannot count to 1e300
NonNegative = Annotated[float, Must("0 or more and finite as float32", lambda x: 0 <= x <= FLOAT32)]
Finite = Annotated[float, Must("finite as float32", lambda x: abs(x) <= FLOAT32)]
Fraction = Annotated[float, Must("above 0 and at most 1", lambda x: 0 < x <= 1)]
Probability = Annotated[float, Must("between 0 and 1", lambda x: 0 <= x <= 1)]
Discount = Probability
Seed = Annotated[int, Must("between 0 and 4294967295", lambda seed: 0 <= seed < 2**32)]
Name = Annotated[
    str,
    Must("letters, digits and any of . _ + -", lambda name: re.fullmatch(r"[\w.+-]+", name)),
    Must("without tfevents: TensorBoard would take the run's folder for a file", lambda name: "tfevents" not in name),
]
PathText = Annotated[str, Must("a path in UTF-8", lambda path: "\0" not in path and is_text(path))]
Sizes = Annotated[
    tuple[int, ...],
    Must("one or more whole numbers, each 1 or more", lambda sizes: sizes and min(sizes) >= 1),
    Must(
        "layers of at most 100,000 units, with at most 100,000,000 weights between two of them",
        lambda sizes: max(sizes) <= 100_000 and all(a * b <= 100_000_000 for a, b in itertools.pairwise(sizes)),
    ),
]
CountOrAll = Annotated[int, Must("a whole number, 1 or more, or -1", lambda n: 1 <= n <= LARGEST or n == -1)]


def is_text(path: str | Path) -> bool:
    """Whether a path is UTF-8. Linux allows any bytes, which Python then has as lone surrogates."""
    return not re.search("[\ud800-\udfff]", str(path))


def infinity_of(name: str) -> float:
    """A constant that Python reads in JSON. NaN is refused: it is not equal to itself, so no resumed run would have the same
    arguments."""
    if name == "NaN":
        raise ValueError("NaN is not allowed")
    return float(name)


def parse_json(texts: list[str]) -> dict[str, Any]:
    """The value of a flag given as JSON."""
    try:
        value = json.loads(texts[0], parse_constant=infinity_of)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{texts[0][:100]!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{texts[0][:100]!r} must be a JSON object")
    return value


def depth(value: Any) -> int:
    """How deeply a value of JSON is nested: 0 for a number."""
    deepest, level = 0, [value]
    while containers := [part for part in level if isinstance(part, dict | list)]:
        deepest += 1
        level = [part for one in containers for part in (one.values() if isinstance(one, dict) else one)]
    return deepest


JSON = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=parse_json,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)

Kwargs = Annotated[
    dict[str, Any],
    JSON,
    Must("a JSON object, nested at most 100 deep", lambda kwargs: isinstance(kwargs, dict) and depth(kwargs) <= 100),
]

# The groups below are the boxes of --help. A script's `Args` joins them, and groups of its own, into one flat dataclass.


@dataclass
class Environment:
    """The task."""

    env_id: str = "Hopper-v4"
    """the Gymnasium environment; module:EnvId first imports the module that registers it"""
    env_kwargs: Kwargs = field(default_factory=dict)
    """arguments for gymnasium.make, as in '{"reset_noise_scale": 0.2}'"""
    max_episode_steps: Count | None = None
    """time limit of an episode, in steps (None: the environment's own)"""
    num_envs: Count = 1
    """number of environments that are stepped together"""
    vectorization: Literal["sync", "async"] = "sync"
    """sync: step the environments one after the other in this process. async: step each in its own process"""

    def wrap(self, env: gym.Env) -> gym.Env:
        """Wrap an environment as the algorithm needs it. This is called for each environment that is made. A Box of actions is
        already a vector here; observations are flattened afterwards."""
        return env

    def check_spaces(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        """Raise a UsageError if the algorithm cannot take these spaces, which are those of a wrapped environment.

        By default it takes continuous actions: a Box, which is already flat and has finite bounds.
        """
        if not isinstance(action_space, gym.spaces.Box):
            raise UsageError(f"--env-id {self.env_id}: its actions are {action_space}, must be a Box")


@dataclass
class Replay:
    """Which transitions the networks learn from, and how they see observations."""

    replay: Literal["uniform", "prioritized", "hindsight"] = "uniform"
    """uniform: all stored transitions are equally likely. prioritized: those with large TD errors are more likely; the loss is
    Huber, so that no importance weights are needed (arXiv:2007.06049). hindsight, only for environments with goals: four of
    five transitions get a goal that their episode reached later (arXiv:1707.01495)"""
    normalize_observations: bool = False
    """the networks see observations minus their mean, divided by their standard deviation, and clipped at 10"""


@dataclass
class Evaluating:
    """Greedy evaluation, on separate environments."""

    eval_frequency: CountOrZero = 50_000
    """environment steps between two evaluations (0: only the final one)"""
    eval_episodes: Count = 10
    """episodes in each of these evaluations"""
    final_episodes: Annotated[Count, tyro.conf.arg(aliases=["--episodes"])] = 20
    """episodes of the final evaluation, and of --evaluate"""
    target_return: Finite | None = None
    """training ends as soon as the mean return of an evaluation reaches this value"""
    evaluate: Path | None = None
    """a run folder: evaluate one of its models instead of training"""
    model: str | None = None
    """with --evaluate: the model to use: best, latest, or a file (None: best, or latest if there is no best)"""
    eval_seed: Seed | None = None
    """with --evaluate: seed of the first episode; each further one has the next (None: 20000, as in the final evaluation)"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""
    export: Literal["onnx"] | None = None
    """with --evaluate: also write the greedy policy of this model as an ONNX file, next to it"""


@dataclass
class Checkpoints:
    """What a run needs to continue after it was stopped or killed, as if nothing had happened."""

    checkpoint_frequency: CountOrZero = 50_000
    """environment steps between two checkpoints (0: only after a signal or an error of an environment, and at the end)"""
    keep_checkpoints: Count = 2
    """number of checkpoints to keep; older ones are removed"""
    resume: Path | None = None
    """a run folder: continue that run from its newest undamaged checkpoint, with its saved arguments"""
    episode_replay: Literal["auto", "plain", "rebuild", "cut"] = "auto"
    """how --resume restores running episodes. plain: their actions are played again. rebuild: the same, in an environment that
    is built again for each episode. cut: they are cut off. auto: a test before training chooses one of these"""
    worker_timeout: Seconds = 60.0
    """seconds that an asynchronous environment may take for one step before the run saves and stops"""


READ_FLAGS = "total_timesteps learning_starts train_frequency gradient_steps gamma reward_scale buffer_size batch_size".split()

if TYPE_CHECKING:  # the type checker is told that a script's Args, whose first base is Experiment, joins all of these groups

    class OtherFlags(Environment, Evaluating, Checkpoints):
        """The other groups that every run has, and the eight flags of an algorithm that this package reads."""

        total_timesteps: int
        learning_starts: int
        train_frequency: int
        gradient_steps: int
        gamma: float
        reward_scale: float
        buffer_size: int
        batch_size: int
        replay: Literal["uniform", "prioritized", "hindsight"]  # if it calls `run.replay`
else:
    OtherFlags = object


@dataclass
class Experiment(OtherFlags):
    """What is run, on which device, and what is saved."""

    exp_name: Name = "run"
    """the name of this experiment"""
    seed: Seed = 1
    """seed of the networks, the exploration, the replay and the training environments"""
    init_from: PathText | None = None
    """a run folder: start with the networks of its best model (the latest if there is no best). All else starts from scratch"""
    torch_deterministic: bool = True
    """use only deterministic PyTorch kernels, so that the same seed gives the same run"""
    cuda: bool = True
    """train on a CUDA device if there is one"""
    accelerate: Literal["auto", "eager", "compile", "cudagraph"] = "auto"
    """how to run updates and actions. eager: the code as it is written. compile: compiled code. cudagraph: captured CUDA
    graphs (on CUDA, compile does both). auto: cudagraph on CUDA; compile on a CPU if the run is long enough, otherwise eager"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """precision of float32 matrix products: high allows TF32, medium bfloat16, where the hardware has them"""
    num_threads: Threads | None = None
    """CPU threads for PyTorch (None: OMP_NUM_THREADS or the number of cores, but at most 2)"""
    track: bool = False
    """also send everything to Weights and Biases"""
    wandb_project_name: str = "cleanRL"
    """the Weights and Biases project"""
    wandb_entity: str | None = None
    """the Weights and Biases team (None: your default)"""
    capture_video: bool = False
    """film the first and every 20th training episode of the first environment, and of the final evaluation"""
    output: PathText = "."
    """the folder in which runs/ and videos/ are"""
    save_model: bool = True
    """keep the networks in the run folder: the latest in model.pt, those of the best evaluation in best_model.pt"""
    upload_model: bool = False
    """upload the finished run, with its models and a model card, to the Hugging Face Hub"""
    hf_entity: str = ""
    """the user or organisation on the Hugging Face Hub (empty: that of your token)"""


RunArgs = Experiment  # what this package knows of a script's Args
# The flags of every run that do not change what is learned, apart from the seed.
UNLEARNED = {flag.name for group in (Experiment, Evaluating, Checkpoints) for flag in fields(group)} - {"init_from"}
A = TypeVar("A", bound=RunArgs)
T = TypeVar("T")
OPTIONAL_PACKAGES = {  # what a flag needs beyond requirements.txt
    "track": ["wandb"],
    "export": ["onnx", "onnxscript"],
    "upload_model": ["huggingface_hub", "safetensors"],
}


def script_name(args_class: type) -> str:
    """The name of the script that these arguments belong to, without ".py"."""
    return Path(inspect.getfile(args_class)).stem


def requirements(hint: Any) -> Iterator[Must]:
    """The `Must`s in a type such as `Annotated[int, Must(...)] | None`."""
    yield from (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Must))
    for part in typing.get_args(hint):
        yield from requirements(part)


def as_typed(hint: Any, value: Any) -> Any:
    """A value, maybe of a saved JSON file, converted to the type of its flag. For types not known here it stays as it is.

    Raises:
        TypeError: if it has another type.
    """
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return as_typed(kinds[0], value)
    if origin in (typing.Union, types.UnionType):
        for kind in kinds:
            with contextlib.suppress(TypeError):
                return as_typed(kind, value)
    elif origin is Literal:
        if any(type(value) is type(kind) and value == kind for kind in kinds):
            return value
        raise TypeError(f"must be one of: {', '.join(map(str, kinds))}")
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            return origin(as_typed(kinds[0], part) for part in value)
    elif origin is dict or isinstance(value, dict):
        if origin is dict and isinstance(value, dict):
            return value
    elif hint is float and type(value) in (int, float):
        return float(value) if isinstance(value, float) or abs(value) < 10**300 else math.inf
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint not in (bool, int, float, str, Path, types.NoneType) or type(value) is hint:
        return value
    raise TypeError(f"must be of the type {hint.__name__ if isinstance(hint, type) else hint}")


def require(args: RunArgs, name: str, be: str, allowed: Callable[[Any], bool]) -> None:
    """Raise a UsageError if a flag has a value that is not allowed."""
    value = getattr(args, name)
    if value is not None and not allowed(value):
        typed = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UsageError(f"--{name.replace('_', '-')} {str(typed)[:200]}: must be {be}")


def check_each(args: RunArgs) -> None:
    """Check every flag by itself. Raises a UsageError that names the flag, its value and what is allowed."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        try:
            as_typed(hint, getattr(args, name))  # tyro has done it, but arguments may be made in Python
        except TypeError as error:
            raise UsageError(f"--{name.replace('_', '-')} {str(getattr(args, name))[:200]}: {error}") from None
        for must in requirements(hint):
            require(args, name, must.be, must.test)


def check_args(args: RunArgs) -> None:
    """Check every flag by itself and against the others.

    Raises:
        UsageError: naming the flag, its value and what is allowed.
    """
    check_each(args)
    require(args, "buffer_size", f"at least --batch-size {args.batch_size}", lambda n: n >= args.batch_size)
    for name in ("normalization", "critic_normalization"):  # not every script has these flags
        if getattr(args, name, "none") == "batch":
            least = f"2 or more with --{name.replace('_', '-')} batch"  # one value has no deviation
            require(args, "batch_size", least, lambda n: n >= 2)
    require(args, "buffer_size", f"at least --num-envs {args.num_envs}", lambda n: n >= args.num_envs)
    for name in ("export", "model", "eval_seed"):
        require(args, name, "left out without --evaluate", lambda _: args.evaluate is not None)
    require(args, "render", "left out without --evaluate", lambda render: args.evaluate is not None or not render)
    require(args, "render", "left out with --capture-video", lambda render: not (render and args.capture_video))
    if getattr(args, "replay", None) == "hindsight" and hasattr(args, "n_steps"):
        require(args, "n_steps", "1 with --replay hindsight: a sum of rewards belongs to one goal", lambda n: n == 1)
    require(args, "target_return", "left out with --eval-frequency 0", lambda _: args.eval_frequency > 0)
    require(args, "upload_model", "left out with --no-save-model", lambda upload: args.save_model or not upload)
    for name, packages in OPTIONAL_PACKAGES.items():
        if value := getattr(args, name):
            check_packages(f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}: ", packages)


def check_packages(what: str, packages: list[str]) -> None:
    """Raise a UsageError, which begins with `what`, if one of these packages is not installed."""
    if not all(map(importlib.util.find_spec, packages)):
        raise UsageError(f"{what}needs {' and '.join(packages)}, install with: pip install {' '.join(packages)}")


def refuse_removed_flags(args_class: type, argv: list[str]) -> None:
    """Raise a UsageError for a flag that the script no longer has. It says where the flag is now."""
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and (gone := removed(script_name(args_class), name, value or following)):
            raise UsageError(f"{flag} {value or following}: {gone.went}")


def parse_command_line(kind: type[T], argv: Sequence[str] | None = None, **how: Any) -> T:
    """What tyro makes of a command line (None: that of this process).

    Raises:
        UsageError: with the text of tyro's error, on one line.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, **how)
    except SystemExit as exit:
        if exit.code in (0, None):  # --help
            raise
        lines = [line.strip("│╭╮╰╯─| ") for line in errors.getvalue().splitlines()[1:]]
        text = " ".join(line for line in lines if line.strip("-+"))  # of these is the box where there is no Unicode
        text = text.replace("Argument helptext:", "-- expected").split(" For full helptext")[0]
        raise UsageError(f"{text} (see --help)") from None


def parse_args(args_class: type[A], argv: list[str], default: A) -> A:
    """The arguments that a command line gives.

    Raises:
        UsageError: with the text of tyro's error, on one line.
    """
    refuse_removed_flags(args_class, argv)
    # tyro prints a box of help for each nested dataclass: nest the bases of Args for it, and flatten what comes back.
    groups = args_class.__bases__
    values = asdict(default)
    defaults = [base(**{field.name: values[field.name] for field in fields(base)}) for base in groups]
    nested = make_dataclass("Args", [(base.__name__.lower(), base) for base in groups])
    config = tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff  # looking for comments takes long
    parsed: Any = parse_command_line(nested, argv, default=nested(*defaults), description=args_class.__doc__, config=config)
    return args_class(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
