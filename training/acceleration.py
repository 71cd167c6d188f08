"""Stand-ins for an agent that compute the same, faster. The eager agent is the specification.

An agent has `update(batch, update_policy, ...)`, with further tensors and flags by name, and `policy(*tensors)`, which computes
the actions that `act` returns. Of an update, a stand-in needs to know only whether it changes the policy.
"""

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm

from training.arguments import Args

# Compiling takes some 30 seconds the first time (5 when torch finds it in its cache) and saves over a millisecond an update:
# after some 20,000 updates (4,000) it has paid. `benchmarks/speed.py --break-even` measures it.
UPDATES_WORTH_COMPILING = 20_000


def choose_mode(args: Args, device: torch.device, global_step: int, began_with: str | None) -> str:
    """The mode that `--accelerate` means for this run. Where the user could not know the reason, one line says it.

    Args:
        global_step: where the run is.
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
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        print(f"--accelerate auto: eager, since no C++ compiler ({compiler}) was found; with one, this run would be faster")
        return "eager"
    print(f"--accelerate auto: compile, since {updates:,} updates gain more than the building costs")
    return "compile"


def accelerate(agent, mode: str, acting: Sequence[np.ndarray], learning: Sequence[dict[str, Any]]) -> Any:
    """A stand-in for `agent` with a faster `update` and `act`, or the agent itself: if none can be built, one line says why.

    The stand-in shares the agent's networks and optimisers. Building it trains nothing. Afterwards, load a state with the
    stand-in's `load_state_dict`: it fills the tensors that are there, because the fast functions refer to those.

    Args:
        mode: eager, compile or cudagraph; on CUDA, what is compiled is also captured.
        acting: arguments of `act` in training, with the shapes that training will use: first the observations. (Evaluation
            acts on one observation.)
        learning: arguments of `update` by name, with the shapes that training will use: a set for each combination of its
            flags. Captured graphs will read their input from the memory of these tensors.
    """
    if mode == "eager":
        return agent
    before, start_time = copy.deepcopy(agent.state_dict()), time.perf_counter()
    try:
        with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
            for arguments in learning:
                agent.update(**arguments)  # makes the optimisers allocate their state
            stand_in = compile_agent(agent, learning) if mode == "compile" else agent
            if mode == "cudagraph" or agent.device.type == "cuda":  # launching compiled kernels one by one is slow
                stand_in = capture_agent(stand_in, learning)
            stand_in.load_state_dict = partial(restore, stand_in)
            for arrays in (acting, (acting[0][:1],)):
                stand_in.act(*arrays)
        tqdm.write(f"--accelerate {mode}: built in {time.perf_counter() - start_time:.1f} seconds")
        return stand_in
    except Exception as error:  # no compiler, no device, an operation that cannot be captured: many types
        reason = next(iter(str(error).splitlines()), repr(error))
        tqdm.write(f"--accelerate {mode} does not work here ({reason}), training goes on in eager mode")
        return agent
    finally:
        restore(agent, before)


def split_arguments(arguments: dict[str, Any]) -> tuple[tuple[bool, ...], list[torch.Tensor]]:
    """The flags and the tensors, the batch's first, among the arguments of an update, in the order of their names."""
    others = [arguments[name] for name in sorted(arguments) if name != "batch"]
    tensors = [value for value in others if isinstance(value, torch.Tensor)]
    batch = [part for part in arguments["batch"] if part is not None]
    return tuple(value for value in others if isinstance(value, bool)), [*batch, *tensors]


def restore(agent, state: dict[str, Any]) -> None:
    """Do what `agent.load_state_dict` does, but copy into the tensors that exist: the fast functions refer to those."""
    fill(agent.state_dict(), state)
    if agent.device.type == "cuda":
        torch.cuda.synchronize()  # a captured `act` reads on a stream of its own


@torch.no_grad()
def fill(tensors: dict[Any, Any], values: dict[Any, Any]) -> None:
    """Copy nested values into nested tensors. Without values (an optimiser before its first step) the tensors become zero."""
    for name, tensor in tensors.items():
        if isinstance(tensor, dict):
            fill(tensor, values[name] if values else {})
        elif isinstance(tensor, torch.Tensor):
            tensor.copy_(values[name] if values else torch.zeros_like(tensor))


def compile_agent(agent, learning: Sequence[dict[str, Any]]) -> Any:
    """A stand-in with a compiled function for each combination of `update`'s flags, and one of `policy` for each shape."""
    traced, stand_in = copy.copy(agent), copy.copy(agent)
    for name, part in vars(agent).items():
        if isinstance(part, torch.optim.Optimizer):
            setattr(traced, name, TraceableAdamW(part))  # the compiler cannot fuse anything with its own step
    updates = {}
    for arguments in learning:
        names = sorted(name for name, value in arguments.items() if isinstance(value, torch.Tensor))

        def update(*tensors: torch.Tensor, arguments: dict = arguments, names: list = names) -> dict[str, torch.Tensor]:
            parts = len(tensors) - len(names)
            named = dict(zip(names, tensors[parts:], strict=True))
            return traced.update(**arguments | named | {"batch": ReplayBufferSamples(*tensors[:parts])})

        flags, tensors = split_arguments(arguments)
        updates[flags] = compile_function(update, tensors)

    @cache
    def policy_for(*shapes: torch.Size) -> Callable:
        return compile_function(lambda *tensors: agent.policy(*tensors), [torch.zeros(s, device=agent.device) for s in shapes])

    def fast_update(batch: ReplayBufferSamples, **named: Any) -> dict[str, torch.Tensor]:
        flags, tensors = split_arguments(named | {"batch": batch})
        return updates[flags](*tensors)

    stand_in.update = fast_update
    stand_in.policy = lambda *tensors: policy_for(*(tensor.shape for tensor in tensors))(*tensors)
    return stand_in


def compile_function(function: Callable, inputs: list[torch.Tensor], again: bool = True) -> Callable:
    """Compile a function for inputs with these shapes. Other tensors that it reads or writes are used in their own memory.

    Not `torch.compile`: its checks before each call take a tenth of a millisecond, and it breaks its graph at an optimiser's
    step. This records the operations once: what `function` decides in Python stays decided.

    A process that was killed while it compiled leaves half a library in torch's cache, which torch would try to load for
    ever: if `again`, what cannot be loaded is deleted there and compiled once more.
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
    # On a CPU, calling from C++ saves a tenth of a millisecond, and a calling part of its own is quicker to compile. On CUDA,
    # kernels chosen by timing them could differ from run to run, and with them the rounding.
    cpu = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    cuda = {"deterministic": True, "triton.autotune_at_compile_time": False}
    options = {"config_patches": cpu if inputs[0].device.type == "cpu" else cuda}
    try:
        # A cache may be shared by machines: the code in it is for one kind of vector instructions, which its key leaves out.
        with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=torch.backends.cpu.get_cpu_capability()):
            compiled = torch._inductor.standalone_compile(
                torch.fx.GraphModule({}, graph),  # without the attributes, which would be inputs once more
                [*inputs, *others.values()],
                dynamic_shapes="from_example_inputs",
                options=options,
                donate_graph_module=True,
            )
        return lambda *tensors: compiled(*tensors, *others.values())
    except Exception as error:  # an ImportError, or torch's InductorError of one, whose module takes a second to import
        path = getattr(getattr(error, "inner_exception", error), "path", None)  # it may be of any module
        if not again or path is None or not Path(path).is_relative_to(torch._inductor.runtime.cache_dir_utils.cache_dir()):
            raise
        Path(path).unlink(missing_ok=True)
        return compile_function(function, inputs, again=False)


class TraceableAdamW:
    """What an AdamW optimiser does (Loshchilov and Hutter, 2019, algorithm 2), in operations that a compiler can fuse."""

    def __init__(self, optimizer: torch.optim.AdamW):
        self.optimizer, self.param_groups, self.zero_grad = optimizer, optimizer.param_groups, optimizer.zero_grad

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        (beta1, beta2), lr = group["betas"], group["lr"]
        steps = [state["step"].add_(1) for state in self.optimizer.state.values()]
        step = steps[0].double()  # float32 would leave four digits of 1 - beta2**step
        # beta**step as an exponential function: the compiler computes that once, but a power again for every few parameters.
        power1, power2 = (step * math.log(beta1)).exp(), (step * math.log(beta2)).exp()
        step_size, correction = (lr / (1 - power1)).float(), (1 - power2).sqrt().float()
        for parameter, state in self.optimizer.state.items():
            exp_avg = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / correction + group["eps"]))


def capture_agent(agent, learning: Sequence[dict[str, Any]]) -> Any:
    """A stand-in with a CUDA graph for each combination of `update`'s flags, and one of `policy` for each shape.

    `act` runs on a stream of its own that waits for the last update of the policy, no more: while the device still trains
    the critic, the environments step.
    """
    stand_in, names, updates = copy.copy(agent), {}, {}
    acting, policy_ready = torch.cuda.Stream(), torch.cuda.Event()
    for arguments in learning:
        flags, places = split_arguments(arguments)

        def learn(arguments: dict = arguments, flags: tuple = flags) -> torch.Tensor:
            losses = agent.update(**arguments)
            names[flags] = tuple(losses)
            return torch.stack(tuple(losses.values()))

        updates[flags] = capture(learn), places
    policy_ready.record()

    def update(batch: ReplayBufferSamples, update_policy: bool, **named: Any) -> dict[str, torch.Tensor]:
        flags, tensors = split_arguments(named | {"batch": batch, "update_policy": update_policy})
        (replay, losses), places = updates[flags]
        for place, values in zip(places, tensors, strict=True):
            if place.data_ptr() != values.data_ptr():  # the replay buffer samples into that place already
                place.copy_(values)
        replay()
        if update_policy:
            policy_ready.record()
        return dict(zip(names[flags], losses.clone(), strict=True))  # the next replay overwrites `losses`

    @cache
    def policy_for(*shapes: torch.Size) -> tuple[list[torch.Tensor], Callable[[], None], torch.Tensor]:
        places = [torch.zeros(shape, device=agent.device) for shape in shapes]
        return places, *capture(lambda: agent.policy(*places))

    def act(*arrays: np.ndarray) -> np.ndarray:
        places, replay, actions = policy_for(*(array.shape for array in arrays))
        with torch.cuda.stream(acting):
            acting.wait_event(policy_ready)
            for place, array in zip(places, arrays, strict=True):
                place.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)  # asynchronous from pinned memory only
            replay()
            return actions.cpu().numpy()  # waits for this stream alone

    stand_in.update, stand_in.act = update, act
    return stand_in


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
