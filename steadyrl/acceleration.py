"""An agent that computes the same results faster. The eager agent is the specification.

`accelerate` returns a stand-in that shares the agent's networks and optimisers. At the first real call of `update` or `act`
with arguments of a new kind, it builds a fast function for this kind. On a CPU the operations are compiled. On CUDA they are
captured as a graph, and compiled before that if asked. Building does not train the agent.
"""

import copy
import inspect
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from steadyrl.agent import Agent, AnyAgent
from steadyrl.arguments import RunArgs
from steadyrl.device import generator_states
from steadyrl.errors import TrainingError, UsageError
from steadyrl.output import say

# Compiling takes some 30 seconds the first time, and 5 when torch finds the code in its cache. It saves over a millisecond for
# each update. So it pays after some 20,000 updates, or 4,000. `benchmarks/speed.py --break-even` measures it.
UPDATES_WORTH_COMPILING = 20_000


def compiler_of(device: torch.device) -> str | None:
    """The missing C++ compiler that compiling for a CPU needs; None if nothing is missing."""
    compiler = os.environ.get("CXX", "g++")
    return None if device.type == "cuda" or shutil.which(compiler) else compiler


def check_mode(args: RunArgs, device: torch.device) -> None:
    """Refuse a mode that the user named and that does not work on this machine.

    Raises:
        UsageError: naming what is missing.
    """
    if args.accelerate == "compile" and (missing := compiler_of(device)):
        raise UsageError(f"--accelerate compile: needs a C++ compiler, and {missing} was not found")
    if args.accelerate == "cudagraph":
        if device.type == "cpu" and torch.cuda.is_available():
            raise UsageError("--accelerate cudagraph: needs --cuda")
        try:
            torch.cuda.Stream()
        except Exception as error:  # RuntimeError or AssertionError, by torch's build
            raise UsageError(f"--accelerate cudagraph: needs a CUDA device ({first_line(error)})") from error


def choose_mode(args: RunArgs, device: torch.device, global_step: int, began_with: str | None) -> str:
    """The mode that `--accelerate` means for this run. If the user cannot know the reason, a message gives it.

    Args:
        global_step: the current step of the run.
        began_with: the mode of a run that is resumed.
    """
    if args.accelerate != "auto":
        return args.accelerate
    if began_with:
        return began_with
    if device.type == "cuda":
        return "cudagraph"
    points = (args.total_timesteps - max(global_step, args.learning_starts)) // max(args.train_frequency, args.num_envs)
    updates = points * args.gradient_steps if args.gradient_steps > 0 else args.total_timesteps - args.learning_starts
    if updates < UPDATES_WORTH_COMPILING:
        return "eager"
    if missing := compiler_of(device):
        say(f"--accelerate auto: eager, since no C++ compiler ({missing}) was found; with one, this run would be faster")
        return "eager"
    say(f"--accelerate auto: compile, since it saves more time in {updates:,} updates than it costs")
    return "compile"


class CannotBuild(Exception):
    """The fast functions cannot handle an agent; the message names the part."""


def accelerate(
    agent: AnyAgent,
    mode: str,
    explicit: bool = True,
    on_fall_back: Callable[[], None] = lambda: None,
    paused: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AnyAgent:
    """A stand-in for `agent` with a faster `update` and `act`.

    It shares the agent's networks and optimisers. The fast functions refer to these, and keep the numbers of the agent, of its
    arguments and of its optimisers, such as a learning rate. If one of them is replaced, that counts as what cannot be built.

    Args:
        mode: eager (the agent itself), compile or cudagraph; on CUDA, what is compiled is also captured.
        explicit: raise an error if something cannot be built. Otherwise all functions are the agent's own from then on.
        on_fall_back: called in that case.
        paused: a context around each building.

    Raises:
        TrainingError: from `update` and `act`, if something cannot be built and `explicit` is true.
    """
    if mode == "eager":
        return agent
    stand_in = copy.copy(agent)
    fast = FastFunctions(stand_in, mode, explicit, on_fall_back, paused)
    vars(stand_in).update(update=fast.update, compute=fast.compute)
    return stand_in


class Constants:
    """What a built function keeps of an agent, as it is now: networks, optimisers and numbers, also those of its arguments and
    of its optimisers."""

    KINDS = int, float, np.number, torch.nn.Module, torch.optim.Optimizer

    def __init__(self, agent: Agent):
        groups = [group for optimizer in agent.optimizers.values() for group in optimizer.param_groups]
        self.kept: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        for holder in (vars(agent), vars(agent.args), *groups):
            names = [name for name, value in holder.items() if isinstance(value, self.KINDS)]
            self.kept.append((holder, names, [holder[name] for name in names]))

    @property
    def same(self) -> bool:
        """Whether they still are as they were. This takes two microseconds."""
        return all([*map(holder.get, names)] == values for holder, names, values in self.kept)

    def changed(self) -> list[str]:
        """The names of those that have changed. NaN is not equal to itself."""
        parts = [zip(names, values, map(holder.get, names), strict=True) for holder, names, values in self.kept]
        return [name for part in parts for name, old, new in part if old is not new and old != new]

    def put_back(self) -> None:
        """Make them what they were."""
        for holder, names, values in self.kept:
            holder.update(zip(names, values, strict=True))


class FastFunctions:
    """The `update` and `compute` of an agent, built at the first call with arguments of each kind.

    Args:
        agent: the stand-in itself, so that what the training loop sets on it is seen here. It still has its own two methods.
    """

    def __init__(self, agent: Agent, mode: str, explicit: bool, on_fall_back: Callable, paused: Callable):
        self.agent, self.mode, self.explicit, self.on_fall_back, self.paused = agent, mode, explicit, on_fall_back, paused
        self.own_update, self.own_compute = agent.update, agent.compute
        self.constants: Constants | None = None  # as they were when the first function was built
        self.captures = mode == "cudagraph" or agent.device.type == "cuda"  # launching compiled kernels one by one is slow
        self.updates: dict[tuple, Callable[..., dict[str, torch.Tensor]]] = {}
        self.policies: dict[tuple, Callable[..., np.ndarray]] = {}
        self.eager = self.announced = False
        if self.captures:
            # `act` runs on a stream of its own. It waits only for the last update of the policy. So the environments step while
            # the device still trains the critic.
            self.acting, self.policy_ready = torch.cuda.Stream(), torch.cuda.Event()
            self.policy_ready.record()

    def update(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The agent's `update`."""
        kind, tensors = flatten(args, kwargs)
        if not self.eager and self.must_build(kind in self.updates):
            self.build_update(kind, tensors, args, kwargs)
        return self.own_update(*args, **kwargs) if self.eager else self.updates[kind](*tensors)

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        """The agent's `compute`, which `act` calls."""
        kind = tuple((array.shape, array.dtype) for array in arrays)
        if not self.eager and self.must_build(kind in self.policies):
            self.build_policy(kind, arrays)
        return self.own_compute(*arrays) if self.eager else self.policies[kind](*arrays)

    def must_build(self, built: bool) -> bool:
        """Whether a function must be built before it is called, or cannot be any more."""
        return not (built and self.constants and self.constants.same)

    def build_update(self, kind: tuple, tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
        """Build the function for updates of this kind. The agent's state stays the same."""
        before = copy.deepcopy(self.agent.state_dict())
        with self.undone(before) as effects:  # this call also makes the optimisers allocate their state
            self.own_update(*args, **kwargs)
        named = inspect.signature(self.own_update).bind(*args, **kwargs).arguments

        def function(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            places = iter(tensors)
            positional = [fill_in(value, places) for value in args]
            return self.own_update(*positional, **{name: fill_in(kwargs[name], places) for name in sorted(kwargs)})

        flags = ", ".join(f"{name}={value}" for name, value in named.items() if isinstance(value, bool))
        with self.building(f"update({flags})", before):
            self.refuse_effects(effects)
            self.refuse_arguments(named)
            self.refuse_optimizers()
            fast = self.compiled(function, tensors) if self.mode == "compile" else function
            if self.captures:
                # A batch is read where it is: the replay buffer puts each sample into the same memory.
                batch = {id(part) for value in named.values() if isinstance(value, tuple) for part in value}
                places = [tensor if id(tensor) in batch else tensor.clone() for tensor in tensors]
                fast = self.captured_update(fast, places, named.get("update_policy", True))
            self.updates[kind] = fast

    def build_policy(self, kind: tuple, arrays: tuple[np.ndarray, ...]) -> None:
        """Build the function for actions of this kind."""
        with self.undone() as effects:
            self.own_compute(*arrays)
        with self.building(f"act of {len(arrays[0])}", None):
            self.refuse_effects(effects)
            places = [torch.as_tensor(array, device=self.agent.device).clone() for array in arrays]
            policy: Callable = lambda *tensors: self.agent.policy(*tensors)  # noqa: E731  # make_fx counts arguments, self too
            policy = self.compiled(policy, places) if self.mode == "compile" else policy
            self.policies[kind] = self.captured_policy(policy, places) if self.captures else on_the_host(policy)

    @contextmanager
    def undone(self, before: dict[str, Any] | None = None) -> Iterator[list[str]]:
        """Around the first call of a method of the agent: restore its state `before`, its constants and PyTorch's generators.

        This is outside the code that falls back, so a mistake in the method has a normal traceback.

        Yields:
            a list to which are added, at the end, the effects that a built function would not repeat.
        """
        effects: list[str] = []
        constants = Constants(self.agent)
        self.constants = self.constants or constants
        with self.forked_generators():
            generators = generator_states(self.agent.device)
            yield effects
            if not all(map(torch.equal, generators, generator_states(self.agent.device))):
                effects.append("it draws random numbers, which must be drawn before and passed to it")
        effects += [f"it changes {name}, which no checkpoint holds" for name in constants.changed()]
        constants.put_back()
        if before is not None:
            self.agent.load_state_dict(before)

    def forked_generators(self) -> AbstractContextManager[None]:
        """Around what must not change PyTorch's generators."""
        return torch.random.fork_rng([self.agent.device] if self.agent.device.type == "cuda" else [])

    @contextmanager
    def building(self, what: str, before: dict[str, Any] | None) -> Iterator[None]:
        """Announce what is built, restore the agent to `before`, and fall back or raise an error if building fails."""
        begin = time.perf_counter()
        if not self.announced and self.mode == "compile":
            say("--accelerate compile: compiling, about 30 seconds the first time")
        self.announced = True
        with self.paused():
            try:
                with self.forked_generators():
                    yield
                say(f"--accelerate {self.mode}: {what} built in {time.perf_counter() - begin:.1f} seconds")
            except Exception as error:  # no compiler, no device, an operation that cannot be captured: many types
                line = f"--accelerate {self.mode} does not work here ({first_line(error)})"
                if self.explicit:
                    raise TrainingError(f"{line}; --accelerate auto would go on in eager mode") from error
                say(f"{line}, training goes on in eager mode")
                self.eager = True
                self.on_fall_back()
            finally:
                if before is not None:
                    self.agent.load_state_dict(before)

    def refuse_effects(self, effects: list[str]) -> None:
        """Raise CannotBuild for effects of a first call, and for a constant that has changed since the first build."""
        changed = self.constants.changed() if self.constants else []
        if effects := effects + [f"{name} was replaced: only what is in a tensor can change, in place" for name in changed]:
            raise CannotBuild(effects[0])

    def refuse_arguments(self, named: dict[str, Any]) -> None:
        """Raise CannotBuild for an argument of an update that would keep its first value for ever."""
        for name, value in named.items():
            parts = value if hasattr(value, "_fields") else (value,)  # a batch is a named tuple
            if not all(isinstance(part, torch.Tensor | bool | None) for part in parts):
                raise CannotBuild(f"update's {name} is of type {type(value).__name__}, must be a tensor, a bool or None")

    def refuse_optimizers(self) -> None:
        """Raise CannotBuild for an optimiser whose steps cannot be compiled or captured."""
        for name, optimizer in self.agent.optimizers.items():
            (group, *others), kind = optimizer.param_groups, type(optimizer).__name__
            if self.mode == "compile" and (kind != "AdamW" or others or group["amsgrad"] or group["maximize"]):
                raise CannotBuild(f"the optimizer {name} must be a plain AdamW with one group of parameters")
            if self.captures and not group.get("capturable", False) and self.agent.device.type == "cuda":
                raise CannotBuild(f"the optimizer {name} must be made with capturable=True")

    def compiled(self, function: Callable, tensors: list[torch.Tensor]) -> Callable:
        """The function, compiled for tensors of these shapes."""
        with ExitStack() as stack:
            for optimizer in self.agent.optimizers.values():  # the compiler cannot fuse anything with its own step
                stack.enter_context(mock.patch.object(optimizer, "step", partial(traceable_step, optimizer)))
            return compile_function(function, tensors)

    def captured_update(self, function: Callable, places: list[torch.Tensor], changes_policy: bool) -> Callable:
        """A function that copies its tensors into `places`, where they are not there already, and replays a CUDA graph."""
        shapes: dict[str, torch.Size] = {}

        def learn() -> torch.Tensor:
            losses = function(*places)
            shapes.update((name, loss.shape) for name, loss in losses.items())
            return torch.cat([loss.flatten() for loss in losses.values()])

        replay, result = capture(learn)

        def update(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            for place, values in zip(places, tensors, strict=True):
                if place.data_ptr() != values.data_ptr():
                    place.copy_(values)
            replay()
            if changes_policy:
                self.policy_ready.record()
            parts = result.clone().split([shape.numel() for shape in shapes.values()])  # the next replay overwrites `result`
            return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

        return update

    def captured_policy(self, policy: Callable, places: list[torch.Tensor]) -> Callable[..., np.ndarray]:
        """A function that copies arrays into `places` and replays a CUDA graph."""
        replay, actions = capture(lambda: policy(*places))

        def compute(*arrays: np.ndarray) -> np.ndarray:
            with torch.cuda.stream(self.acting):
                self.acting.wait_event(self.policy_ready)
                for place, array in zip(places, arrays, strict=True):
                    place.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
                replay()
                return actions.cpu().numpy()  # waits for this stream alone

        return compute


def flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, list[torch.Tensor]]:
    """The kind of a call, and its tensors in order. One fast function handles all calls of the same kind: compiled code reads a
    tensor of another stride or type wrongly."""
    kind: list[Any] = []
    tensors: list[torch.Tensor] = []
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, torch.Tensor):
                tensors.append(part)
                kind.append((name, part.shape, part.stride(), part.dtype))
            else:
                kind.append((name, part if isinstance(part, bool | None) else type(part)))
    return tuple(kind), tensors


def fill_in(value: Any, places: Iterator[torch.Tensor]) -> Any:
    """An argument of an update, with its tensors replaced by the next ones of `places`."""
    if isinstance(value, tuple):  # a batch is a named one
        return type(value)(*(next(places) if isinstance(part, torch.Tensor) else part for part in value))
    return next(places) if isinstance(value, torch.Tensor) else value


def on_the_host(policy: Callable) -> Callable[..., np.ndarray]:
    """A policy from arrays to arrays, on a CPU."""
    return lambda *arrays: policy(*map(torch.from_numpy, arrays)).numpy()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), repr(error))


def compile_function(function: Callable, inputs: list[torch.Tensor], again: bool = True) -> Callable:
    """Compile a function for inputs with these shapes. Other tensors that it reads or writes are used in their own memory.

    Not `torch.compile`: its checks before each call take a tenth of a millisecond, and it breaks its graph at an optimiser's
    step. This records the operations once: what `function` decides in Python stays decided.

    A process that was killed while it compiled leaves half a library in torch's cache, which torch would try to load for
    ever. If `again`, what cannot be loaded is deleted there, and everything is compiled once more with an empty cache.
    """
    recorded = make_fx(function)(*inputs)
    graph, attributes = recorded.graph, recorded.graph.find_nodes(op="get_attr")
    # The other tensors are attributes, and their values would be part of the cache's key. As inputs only their shapes are.
    others = {node.target: getattr(recorded, node.target).detach() for node in attributes}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        places = {name: graph.placeholder(name) for name in others}
    for node in attributes:
        node.replace_all_uses_with(places[node.target])
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta.clear()  # shapes recorded one by one, which the compiler wants to find out together
    try:
        compiled = compile_graph(graph, [*inputs, *others.values()])
        return lambda *tensors: compiled(*tensors, *others.values())
    except Exception as error:  # an ImportError or an OSError, or torch's InductorError of one, or of the C++ compiler
        if not again:
            raise
        path = getattr(getattr(error, "inner_exception", error), "path", None)  # it may be of any module
        if path is not None and Path(path).is_relative_to(torch._inductor.runtime.cache_dir_utils.cache_dir()):
            Path(path).unlink(missing_ok=True)
        torch._inductor.utils.clear_caches()
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"),
        ):
            return compile_function(function, inputs, again=False)


def compile_graph(graph: torch.fx.Graph, inputs: list[Any]) -> Callable:
    """Compile recorded operations for inputs with these shapes, or load them from torch's cache."""
    # On a CPU, calling from C++ saves a tenth of a millisecond, and a calling part of its own is quicker to compile. On CUDA,
    # kernels chosen by timing them could differ from run to run, and with them the rounding.
    cpu = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    cuda = {"deterministic": True, "triton.autotune_at_compile_time": False}
    # A cache may be shared by machines: the code in it is for one kind of vector instructions, which its key leaves out.
    machine = torch.backends.cpu.get_cpu_capability()
    tag = torch.compiler.config.patch(cache_key_tag=machine)  # type: ignore[attr-defined]  # torch adds `patch` at import
    with torch.no_grad(), tag:
        return torch._inductor.standalone_compile(
            torch.fx.GraphModule({}, graph),  # without the attributes, which would be inputs once more
            inputs,
            dynamic_shapes="from_example_inputs",
            options={"config_patches": cpu if inputs[0].device.type == "cpu" else cuda},
            donate_graph_module=True,
        )


@torch.no_grad()
def traceable_step(optimizer: torch.optim.Optimizer) -> None:
    """What a step of AdamW does (Loshchilov and Hutter, 2019, algorithm 2), in operations that a compiler can fuse."""
    (group,) = optimizer.param_groups
    (beta1, beta2), lr = group["betas"], group["lr"]
    steps = [state["step"].add_(1) for state in optimizer.state.values()]
    step = steps[0].double()  # float32 would leave four digits of 1 - beta2**step
    # beta**step as an exponential function: the compiler computes that once, but a power again for every few parameters.
    power1, power2 = (step * math.log(beta1)).exp(), (step * math.log(beta2)).exp()
    step_size, correction = (lr / (1 - power1)).float(), (1 - power2).sqrt().float()
    for parameter, state in optimizer.state.items():
        exp_avg = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / correction + group["eps"]))


def capture(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record what the device does for `function`; returns a function that repeats it, and the tensor with the result."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuBLAS, autograd and compiled code prepare in their first calls what a capture forbids
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
