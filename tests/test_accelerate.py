"""Compiled and captured agents: the same algorithm, the same bits in each run and after a resume; building trains nothing.

CUDA graphs are tested twice: everywhere with a stand-in for the capture that calls the captured function again, and, where
there is a CUDA device, for what they are.
"""

import contextlib
import copy
import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, drop_biases, quick_args
from processes import run_script
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from test_train import digest

import ddpg_continuous_action as ddpg
from steadyrl import acceleration, setup
from steadyrl.replay_buffer import standard_normal

# As of the runs that test_resume.py compiles: what one test compiled, the next finds in torch's cache.
COMPILED_ONCE = {"env_id": "Pendulum-v1", "hidden_sizes": (32,), "batch_size": 32}
HOLDS = {"critic_loss": "expectile", "policy_noise": 0.2, "n_steps": 3, "critic_normalization": "layer", "num_critics": 2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def filled_buffer(device: torch.device, spaces: tuple[gym.Space, gym.Space], n_steps: int) -> ddpg.ReplayBuffer:
    rb = ddpg.ReplayBuffer(200, *spaces, device, handle_timeout_termination=False, n_steps=n_steps, gamma=0.99)
    rb.transitions[:] = np.random.default_rng(0).normal(size=rb.transitions.shape)
    rb.observations[1::2] = rb.next_observations[::2]
    rb.dones[:] = np.random.default_rng(1).random(rb.dones.shape) < 0.1
    rb.full = True
    return rb


def smoothing(agent, rb: ddpg.ReplayBuffer) -> torch.Tensor | None:
    """Noise for the target actions of a batch, if the agent takes any."""
    return standard_normal((32, rb.actions.shape[-1]), rb.device) if agent.args.policy_noise else None


def accelerated(agent, mode: str, rb: ddpg.ReplayBuffer, num_envs: int = 1):
    """The agent that a run would train with."""
    batch, noise = rb.example_batch(32), smoothing(agent, rb)
    examples = [{"batch": batch, "noise": noise, "update_policy": flag} for flag in (True, False)]
    return acceleration.accelerate(agent, mode, (np.zeros((num_envs, 3), np.float32),), examples)


def trained(accelerate: str, device: str = "cpu", updates: int = 12, num_actions: int = 1, **changes):
    """An agent after some updates and what these returned; the same seeds for all."""
    torch.manual_seed(0), np.random.seed(0)
    spaces = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(-2, 2, (num_actions,), np.float32)
    args = quick_args(accelerate=accelerate, cuda=device == "cuda", **(COMPILED_ONCE | changes))
    setup.set_up_device(args)  # as a run does: its settings are part of the key in torch's cache
    agent, rb = ddpg.DDPG(*spaces, args, torch.device(device)), filled_buffer(torch.device(device), spaces, args.n_steps)
    agent = accelerated(agent, args.accelerate, rb)
    np.random.seed(0)
    losses = []
    for update in range(updates):
        losses.append(agent.update(rb.sample(32), update_policy=update % 3 == 2, noise=smoothing(agent, rb)))
    return agent, losses, rb


def tensors(state) -> list[torch.Tensor]:
    """The tensors in a nested state, in order."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def assert_same(a, b, **tolerance) -> None:
    """Equal, bit for bit if no tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for one, other in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture
def stand_in(monkeypatch):
    """CUDA graphs without CUDA: a replay calls the function again and puts the result where the capture had it."""

    class Stream:
        def wait_stream(self, other): ...

        def wait_event(self, event):
            assert event.recorded

    class Event:
        recorded = 0

        def record(self):
            self.recorded += 1
            records.append(self)

    def capture(function):
        result = function()
        result.fill_(torch.nan)  # a capture computes nothing

        def replay():
            result.copy_(function())
            replays.append(function)

        return replay, result

    replays, records = [], []
    monkeypatch.setattr(acceleration, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return SimpleNamespace(replays=replays, records=records)


def same_algorithm(accelerate: str, tolerance: dict, device: str = "cpu", **changes) -> None:
    eager, eager_losses, _ = trained("eager", device, **changes)
    fast, losses, _ = trained(accelerate, device, **changes)
    assert "update" in vars(fast)  # it is a stand-in, not the fallback
    assert_same(eager.state_dict(), fast.state_dict(), **tolerance)
    for one, other in zip(eager_losses, losses, strict=True):
        assert_same(one, other, **tolerance)
    obs = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    built_once = accelerate == "compile" and changes  # compiling for another number of rows is slow: once will do
    for rows in (obs[:1], obs[1:2]) if built_once else (obs, obs[:1], obs):
        np.testing.assert_allclose(fast.act(rows), eager.act(rows), **(tolerance or {"rtol": 0}))


def trains_nothing(accelerate: str, device: str = "cpu") -> None:
    """Neither a fresh agent nor one with a past changes, and no random stream."""
    for updates in (0, 5):
        agent, _, rb = trained("eager", device, updates)
        before = copy.deepcopy(agent.state_dict())
        random = torch.get_rng_state(), np.random.get_state()[1].copy()
        stand_in = accelerated(agent, accelerate, rb)
        assert stand_in is not agent and "update" not in vars(agent)
        assert_same(before["networks"], agent.state_dict()["networks"])
        if updates:
            assert_same(before, agent.state_dict())
        else:
            assert not any(tensor.any() for tensor in tensors(agent.state_dict()["optimizers"]))
        assert torch.equal(random[0], torch.get_rng_state()) and (random[1] == np.random.get_state()[1]).all()


def restores(accelerate: str, device: str = "cpu") -> None:
    """Another agent's state loaded after building: from there on it learns as that agent does, and so it is saved."""
    other, _, rb = trained("eager", device, 7)
    agent, _, _ = trained(accelerate, device, 3)
    agent.load_state_dict(copy.deepcopy(other.state_dict()))
    assert_same(other.state_dict(), agent.state_dict())
    for update_policy in (False, True, False):
        batch = rb.sample(32)
        batch = ReplayBufferSamples(*torch.cat(batch[:5], dim=1).split(rb.widths, dim=1))  # in another place
        other.update(batch, update_policy), agent.update(batch, update_policy=update_policy)
    assert_same(other.state_dict(), agent.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "atol"),
    [
        ({}, 1e-6),  # other orders of summation
        (HOLDS | {"normalization": "layer", "critic_loss": "huber", "weight_decay": 1.0, "num_actions": 2}, 1e-5),
        ({"normalization": "batch", "critic_loss": "expectile", "num_actions": 2}, 1e-5),
    ],
)
def test_compiled_is_the_same_algorithm(monkeypatch, changes, atol):
    if changes.get("normalization") == "batch":
        drop_biases(monkeypatch, ddpg)
    same_algorithm("compile", {"rtol": 1e-4, "atol": atol}, **changes)


@pytest.mark.slow
def test_compiling_trains_nothing():
    trains_nothing("compile")


@pytest.mark.slow
def test_compiled_restores():
    restores("compile")


@pytest.mark.slow
def test_compiled_code_takes_each_tensor_once(monkeypatch):
    """One that was an attribute as well would count as two that share memory: twice the code, and 15% slower."""
    build, seen = torch._inductor.standalone_compile, []

    def watched(graph, inputs, **named):
        seen.append((list(graph.state_dict()), len(inputs) - len({tensor.data_ptr() for tensor in inputs})))
        return build(graph, inputs, **named)

    monkeypatch.setattr(torch._inductor, "standalone_compile", watched)
    trained("compile", updates=0)
    assert seen == [([], 0)] * 3


@pytest.mark.slow
def test_compiled_runs_are_the_same_twice(run, capsys):
    args = quick_args(accelerate="compile", **COMPILED_ONCE)
    assert digest(run(args)) == digest(run(args))
    assert capsys.readouterr().out.count("--accelerate compile: built in") == 2


@pytest.mark.slow
def test_compiled_code_is_found_again_for_other_weights_but_not_for_another_processor(monkeypatch):
    """Which torch's own key leaves out, though the code is for its vector instructions."""
    counters, x = torch._dynamo.utils.counters["aot_autograd"], torch.arange(3.0)

    def times_found(weight: float) -> int:
        before, weights = counters["autograd_cache_hit"], torch.full((3,), weight)
        assert torch.equal(acceleration.compile_function(lambda x: x * weights, [x])(x), x * weight)
        return counters["autograd_cache_hit"] - before

    times_found(1.0)
    assert times_found(2.0) == 1
    processor = f"processor {random.SystemRandom().random()}"  # whose code is in no cache
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    assert (times_found(3.0), times_found(4.0)) == (0, 1)


@pytest.mark.slow
def test_what_a_killed_compilation_left_is_compiled_again(tmp_path):
    """A process killed while the C++ compiler writes leaves an empty library, which torch would try to load for ever; also
    before anything is in its caches of graphs."""
    program, cache = tmp_path / "program.py", tmp_path / "cache"
    program.write_text(
        "import torch\n"
        "from steadyrl.acceleration import compile_function\n"
        "torch._inductor.config.cpp_cache_precompile_headers = False\n"
        "x = torch.ones(3)\n"
        "print(compile_function(lambda x: x.exp(), [x])(x))\n"
    )

    def run() -> str:
        done = run_script(program, cwd=tmp_path, PYTHONPATH=str(ROOT), TORCHINDUCTOR_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        return done.stdout

    once = run()
    (library,) = cache.rglob("*.main.so")
    for lost in ([], ["aotautograd", "fxgraph"]):
        library.write_bytes(b"")
        for name in lost:
            shutil.rmtree(cache / name)
        assert run() == once and library.stat().st_size > 0


@pytest.mark.slow  # touching the compiler imports it, which takes three seconds
@pytest.mark.parametrize(("folder", "calls"), [("cache", 2), ("site-packages", 1)])
def test_what_can_never_be_loaded_is_compiled_twice_and_only_the_cache_loses_files(tmp_path, monkeypatch, folder, calls):
    """As where the cache is on a file system that forbids to execute; or where an import elsewhere fails."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file, errors = tmp_path / folder / "library.so", []

    def fail(*_, **__):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        errors.append(RuntimeError())
        errors[-1].inner_exception = ImportError(path=str(file))
        raise errors[-1]

    monkeypatch.setattr(torch._inductor, "standalone_compile", fail)
    with pytest.raises(RuntimeError):
        acceleration.compile_function(torch.sin, [torch.zeros(2)])
    assert len(errors) == calls and file.exists()


@pytest.mark.parametrize("changes", [{}, {"normalization": "batch"}, HOLDS | {"num_actions": 2}])
def test_captured_is_the_same_algorithm_bit_for_bit(stand_in, changes):
    same_algorithm("cudagraph", {}, **changes)
    assert len(stand_in.replays) == 2 + 12 + 3  # the first two in building: training's and evaluation's
    assert len(stand_in.records) == 1 + 4  # `act` waits for each of the actor's updates


def test_capturing_trains_nothing(stand_in):
    trains_nothing("cudagraph")


def test_acting_is_built_at_the_start_for_training_and_for_evaluation(stand_in):
    """What cannot be built then falls back to eager mode at the start, not in the middle of a run."""
    agent, _, rb = trained("eager", updates=0)
    accelerated(agent, "cudagraph", rb, num_envs=3)
    built = len(stand_in.replays)
    assert built == len(set(stand_in.replays)) == 2


def test_captured_restores(stand_in):
    restores("cudagraph")


def test_losses_of_a_replay_outlive_the_next(stand_in):
    _, losses, _ = trained("cudagraph", updates=4)
    assert len({loss["q_loss"].item() for loss in losses}) == 4


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_captured_run_is_the_eager_one(run, stand_in, num_envs):
    """With evaluations in between, whose `act` has another shape than that of three environments."""
    eager, captured = (
        run(quick_args(accelerate=accelerate, num_envs=num_envs, eval_frequency=100)) for accelerate in ("eager", "cudagraph")
    )
    assert stand_in.replays and digest(eager) == digest(captured)


@pytest.mark.parametrize("accelerate", [pytest.param("compile", marks=pytest.mark.slow), "cudagraph"])
def test_what_cannot_be_built_falls_back_to_eager(run, monkeypatch, capsys, accelerate):
    eager = digest(run(quick_args(accelerate="eager", **COMPILED_ONCE)))
    capsys.readouterr()

    def broken(*_, **__):
        raise RuntimeError("no such thing on this machine\nand more about it")

    if accelerate == "compile":
        build, calls = torch._inductor.standalone_compile, iter(range(100))
        monkeypatch.setattr(
            torch._inductor, "standalone_compile", lambda *a, **k: (build if next(calls) < 2 else broken)(*a, **k)
        )
    monkeypatch.setattr(torch.cuda, "Stream", broken)
    assert digest(run(quick_args(accelerate=accelerate, **COMPILED_ONCE))) == eager
    line = f"--accelerate {accelerate} does not work here (no such thing on this machine), training goes on in eager mode\n"
    assert line in capsys.readouterr().out


def test_a_failed_build_trains_nothing_either(monkeypatch, capsys):
    agent, _, rb = trained("eager", updates=5)
    before, random = copy.deepcopy(agent.state_dict()), torch.get_rng_state()

    def fails(agent, learning):
        agent.update(**learning[0]), torch.rand(1)
        raise RuntimeError("half way")

    monkeypatch.setattr(acceleration, "compile_agent", fails)
    assert accelerated(agent, "compile", rb) is agent
    assert "(half way)" in capsys.readouterr().out
    assert_same(before, agent.state_dict())
    assert torch.equal(random, torch.get_rng_state())


def test_threads_and_precision(monkeypatch):
    """Two threads at most if none are asked for, whatever the machine has."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        setup.set_up_device(quick_args(num_threads=3, matmul_precision="high"))
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "high")
        setup.set_up_device(quick_args())
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "highest")
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


LONG = {"total_timesteps": 1_000_000, "learning_starts": 25_000}


@pytest.mark.parametrize(
    ("changes", "began_with", "compiler", "mode", "words"),
    [
        (LONG, None, "g++", "compile", "975,000 updates gain more than the building costs"),
        (LONG, None, None, "eager", "no C++ compiler"),
        (LONG, "eager", "g++", "eager", ""),  # a resumed run keeps its mode
        (LONG | {"accelerate": "eager"}, "compile", "g++", "eager", ""),  # unless it is told otherwise
        ({"total_timesteps": 20_000}, None, "g++", "eager", ""),
        ({"total_timesteps": 20_000}, "compile", "g++", "compile", ""),
        (LONG | {"num_envs": 64}, None, "g++", "eager", ""),  # 15,234 updates
        (LONG | {"num_envs": 32, "gradient_steps": 8}, None, "g++", "compile", "243,744 updates"),
        (LONG | {"train_frequency": 50, "gradient_steps": -1}, None, "g++", "compile", "975,000 updates"),
    ],
)
def test_auto_compiles_what_is_worth_it(monkeypatch, capsys, changes, began_with, compiler, mode, words):
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    args = quick_args(**({"accelerate": "auto"} | changes))
    assert acceleration.choose_mode(args, torch.device("cpu"), 0, began_with) == mode
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_args_json_says_how_the_run_was_accelerated(run, monkeypatch):
    """Also where `auto` chose, and where what was chosen could not be built."""
    monkeypatch.setattr(acceleration, "UPDATES_WORTH_COMPILING", 40)
    chosen = run(quick_args(accelerate="auto", **COMPILED_ONCE))
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda *_, **__: 1 / 0)
    failed = run(quick_args(accelerate="auto"))
    settings = [json.loads((parts.run_dir / "args.json").read_text()) for parts in (chosen, failed)]
    assert [saved["accelerate"] for saved in settings] == ["compile", "eager"]
    assert [saved["args"]["accelerate"] for saved in settings] == ["auto", "auto"]


# With a CUDA device


@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"normalization": "batch"}, {"hidden_sizes": (256, 256)}])
def test_cuda_graphs_are_the_same_algorithm_bit_for_bit(changes):
    same_algorithm("cudagraph", {}, "cuda", **changes)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, HOLDS | {"num_actions": 2}])
def test_compiled_on_cuda_is_the_same_algorithm(changes):
    same_algorithm("compile", {"rtol": 1e-3, "atol": 1e-5}, "cuda", **changes)


@needs_cuda
@pytest.mark.parametrize("accelerate", ["cudagraph", pytest.param("compile", marks=pytest.mark.slow)])
def test_building_on_cuda_trains_nothing(accelerate):
    trains_nothing(accelerate, "cuda")


@needs_cuda
@pytest.mark.parametrize("accelerate", ["cudagraph", pytest.param("compile", marks=pytest.mark.slow)])
def test_what_is_built_on_cuda_restores(accelerate):
    restores(accelerate, "cuda")


@needs_cuda
def test_cuda_and_cpu_learn_the_same():
    """Over a few updates, but for rounding."""
    on_cuda, _, _ = trained("auto", "cuda", updates=6)
    on_cpu, _, _ = trained("eager", updates=6)
    for one, other in zip(tensors(on_cuda.state_dict()["networks"]), tensors(on_cpu.state_dict()["networks"]), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)


@needs_cuda
def test_a_run_on_cuda_graphs_is_the_eager_one(run):
    runs = [run(quick_args(accelerate=accelerate, cuda=True, eval_frequency=100)) for accelerate in ("eager", "auto", "auto")]
    states = [copy.deepcopy(parts.agent.state_dict()) for parts in runs]
    assert_same(states[0], states[1])
    assert_same(states[1], states[2])


@needs_cuda
@pytest.mark.parametrize("accelerate", ["auto", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_resumed_run_on_cuda_is_the_uninterrupted_one(run, capsys, accelerate):
    args = quick_args(cuda=True, accelerate=accelerate, checkpoint_frequency=150)
    whole = run(args)
    cut = run(dataclasses.replace(args, total_timesteps=200))
    resumed = run(dataclasses.replace(args, resume=cut.run_dir))
    assert_same(whole.agent.state_dict(), resumed.agent.state_dict())
    assert "does not work here" not in capsys.readouterr().out
