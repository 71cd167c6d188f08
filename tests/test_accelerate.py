"""Compiled and captured agents: the same algorithm, the same bits in each run and after a resume; building trains nothing.

CUDA graphs are tested twice: everywhere with a stand-in for the capture that calls the captured function again, and, where
there is a CUDA device, for what they are.
"""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import AGENTS, ROOT, agent_of, drop_biases, quick_args, spaces_of
from processes import run_script
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from test_train import digest

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import steadyrl.run
import td3_continuous_action as td3
from steadyrl import acceleration, device, errors
from steadyrl.noise import standard_normal
from steadyrl.replay_buffer import ReplayBuffer

# As of the runs that test_resume.py compiles: what one test compiled, the next finds in torch's cache.
COMPILED_ONCE = {"env_id": "Pendulum-v1", "hidden_sizes": (32,), "batch_size": 32}
HOLDS = {"critic_loss": "huber", "n_steps": 3, "critic_normalization": "layer"}
FIRST_MILESTONE = {"num_critics": 1, "alpha": 0.0, "autotune": False, "policy_frequency": 1, "target_network_frequency": 2}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def filled_buffer(script, args, on: str = "cpu", num_actions: int = 1) -> ReplayBuffer:
    """Always with the same transitions; it draws the same samples from the start."""
    steps: dict[str, Any] = {"n_steps": getattr(args, "n_steps", 1), "gamma": 0.99}
    rb = ReplayBuffer(200, *spaces_of(script, num_actions), torch.device(on), random=np.random.RandomState(0), **steps)
    rng = np.random.default_rng(0)
    rb.transitions[:] = rng.normal(size=rb.transitions.shape)
    if script is dqn:
        rb.actions[:] = rng.integers(0, 2, rb.actions.shape)
    rb.dones[:], rb.timeouts[:] = rng.random((2, *rb.dones.shape)) < 0.1
    rb.full = True
    return rb


def update_of(agent, rb: ReplayBuffer, number: int) -> dict[str, Any]:
    """The arguments of an agent's update of this number, as its script gives them."""
    names, args, batch = inspect.signature(type(agent).update).parameters, agent.args, rb.sample(32)
    named: dict[str, Any] = {"update_policy": number % getattr(args, "policy_frequency", 1) == 0}
    if "noise" in names:
        rows = (1 + args.policy_frequency,) if "update_targets" in names else ()
        named["noise"] = standard_normal(rb.random, (*rows, *batch.actions.shape), rb.device)
    if "update_targets" in names:
        named["update_targets"] = number % args.target_network_frequency == 0
    return {"batch": batch} | named


def trained(mode: str, on: str = "cpu", updates: int = 12, num_actions: int = 1, script=ddpg, **changes):
    """An agent after some updates, what these returned, and its buffer; the same seeds for all."""
    agent = agent_of(script, num_actions, on, **(COMPILED_ONCE | {"cuda": on == "cuda"} | changes))
    device.set_up_device(agent.args)  # as a run does: its settings are part of the key in torch's cache
    rb, fast = filled_buffer(script, agent.args, on, num_actions), acceleration.accelerate(agent, mode)
    losses = [fast.update(**update_of(agent, rb, number)) for number in range(1, 1 + updates)]
    return fast, losses, rb


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
        result.fill_(torch.nan if result.is_floating_point() else -1)  # a capture computes nothing

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


def same_algorithm(mode: str, tolerance: dict, on: str = "cpu", **changes) -> None:
    eager, eager_losses, _ = trained("eager", on, **changes)
    fast, losses, _ = trained(mode, on, **changes)
    assert "update" in vars(fast)  # it is a stand-in, not the agent itself
    assert_same(eager.state_dict(), fast.state_dict(), **tolerance)
    for one, other in zip(eager_losses, losses, strict=True):
        assert one.keys() == other.keys()
        for name, loss in one.items():  # captured together, the losses get the widest of their dtypes
            assert_same(loss.double(), other[name].double(), **tolerance)
    obs = np.random.default_rng(2).normal(size=(3, *eager.observation_space.shape))
    built_once = mode == "compile" and changes  # compiling for another number of rows is slow: once will do
    for rows in (obs[:1], obs[1:2]) if built_once else (obs, obs[:1], obs):
        np.testing.assert_allclose(fast.act(rows), eager.act(rows), **(tolerance or {"rtol": 0}))
    np.testing.assert_array_equal(fast.act(obs[0]), fast.act(obs[:1])[0])


def trains_nothing(mode: str, on: str = "cpu") -> None:
    """Neither a fresh agent nor one with a past changes, and no random stream."""
    for updates in (0, 5):
        agent, _, rb = trained("eager", on, updates)
        before, arguments = copy.deepcopy(agent.state_dict()), update_of(agent, rb, 6)
        random = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
        stand_in = acceleration.accelerate(agent, mode)
        assert stand_in is not agent and "update" not in vars(agent)
        kind, tensors_of_update = acceleration.flatten((), arguments)
        stand_in.update.__self__.build_update(kind, tensors_of_update, (), arguments)
        stand_in.act(np.zeros((1, 3)))
        assert_same(before["networks"], agent.state_dict()["networks"])
        if updates:
            assert_same(before, agent.state_dict())
        else:
            assert not any(tensor.any() for tensor in tensors(agent.state_dict()["optimizers"]))
        assert torch.equal(random[0], torch.get_rng_state())
        assert (random[1] == np.random.get_state(legacy=False)["state"]["key"]).all()


def restores(mode: str, on: str = "cpu") -> None:
    """Another agent's state loaded after building: from there on it learns as that agent does, and so it is saved."""
    other, _, rb = trained("eager", on, 7)
    agent, _, _ = trained(mode, on, 3)
    agent.load_state_dict(copy.deepcopy(other.state_dict()))
    assert_same(other.state_dict(), agent.state_dict())
    for update_policy in (False, True, False):
        batch = rb.sample(32)
        batch = ReplayBufferSamples(*torch.cat(batch[:5], dim=1).split(rb.widths, dim=1))  # in another place
        other.update(batch, update_policy), agent.update(batch=batch, update_policy=update_policy)
    assert_same(other.state_dict(), agent.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "changes", "atol"),
    [
        (ddpg, {}, 1e-6),  # other orders of summation
        (ddpg, HOLDS | {"normalization": "layer", "weight_decay": 1.0, "num_actions": 2}, 1e-5),
        (ddpg, {"normalization": "batch", "num_actions": 2}, 1e-5),
        (td3, {"n_steps": 3, "num_actions": 2}, 1e-5),
        (sac, {}, 1e-5),
        (sac, FIRST_MILESTONE | {"weight_decay": 0.1, "normalization": "batch", "num_actions": 2}, 1e-5),
        (dqn, {"double_q": True}, 1e-5),
    ],
)
def test_compiled_is_the_same_algorithm(monkeypatch, script, changes, atol):
    if changes.get("normalization") == "batch":
        drop_biases(monkeypatch, script)
    same_algorithm("compile", {"rtol": 1e-4, "atol": atol}, script=script, **changes)


@pytest.mark.slow
def test_compiling_trains_nothing():
    trains_nothing("compile")


@pytest.mark.slow
def test_compiled_restores():
    restores("compile")


def test_a_state_can_be_loaded_before_the_first_update(stand_in):
    """The optimisers' states too, which are then not yet there to be filled."""
    other, _, rb = trained("eager", updates=3)
    agent, _, _ = trained("cudagraph", updates=0)
    agent.load_state_dict(other.state_dict())
    for number in (4, 5):
        arguments = update_of(other, rb, number)
        other.update(**arguments), agent.update(**arguments)
    assert_same(other.state_dict(), agent.state_dict())


@pytest.mark.slow
def test_compiled_code_is_given_what_it_was_built_for():
    """A tensor of another stride or type is never read as if it were of the first one."""
    (fast, _, rb), (eager, _, _) = trained("compile", updates=2), trained("eager", updates=2)
    batch = rb.sample(32)
    batch = ReplayBufferSamples(*(None if part is None else part.contiguous() for part in batch))
    for agent in (fast, eager):
        agent.update(batch=batch, update_policy=True)
    assert_same(eager.state_dict(), fast.state_dict(), rtol=1e-4, atol=1e-6)
    obs = np.random.default_rng(0).normal(size=(5, 3))
    for same in (obs, np.asfortranarray(obs, np.float32), obs[::-1][::-1]):
        np.testing.assert_allclose(fast.act(same), eager.act(same), atol=1e-6)
    (fast, _, _), (eager, _, _) = trained("compile", updates=0, script=sac), trained("eager", updates=0, script=sac)
    noise = np.random.default_rng(0).normal(size=(5, 1))
    for same in (noise.astype(np.float32), noise, np.asfortranarray(noise)):
        np.testing.assert_allclose(fast.act(obs, same), eager.act(obs, same), atol=1e-5)


@pytest.mark.slow
def test_compiled_code_takes_each_tensor_once(monkeypatch):
    """One that was an attribute as well would count as two that share memory: twice the code, and 15% slower."""
    build, seen = torch._inductor.standalone_compile, []

    def watched(graph, inputs, **named):
        seen.append((list(graph.state_dict()), len(inputs) - len({tensor.data_ptr() for tensor in inputs})))
        return build(graph, inputs, **named)

    monkeypatch.setattr(torch._inductor, "standalone_compile", watched)
    agent, _, _ = trained("compile", updates=2)
    agent.act(np.zeros((1, 3)))
    assert seen == [([], 0)] * 3


@pytest.mark.slow
def test_compiled_runs_are_the_same_twice(run, capsys):
    args = quick_args(accelerate="compile", **COMPILED_ONCE)
    assert digest(run(args)) == digest(run(args))
    out = capsys.readouterr().out
    for what in ("act of 1", "update(update_policy=False)", "update(update_policy=True)"):
        assert out.count(f"--accelerate compile: {what} built in") == 2


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
        assert run() == once and not library.exists()  # with a cache of its own
        assert run() == once and library.stat().st_size > 0


@pytest.mark.slow  # touching the compiler imports it, which takes three seconds
@pytest.mark.parametrize("folder", ["cache", "site-packages"])
def test_what_cannot_be_loaded_is_compiled_once_more_and_only_the_cache_loses_files(tmp_path, monkeypatch, folder):
    """With an empty cache: this one may be on a file system that forbids to execute. Or an import elsewhere fails."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file, caches = tmp_path / folder / "library.so", []
    file.parent.mkdir()
    file.touch()

    def fail(*_, **__):
        caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        error = RuntimeError()
        error.inner_exception = ImportError(path=str(file))
        raise error

    monkeypatch.setattr(torch._inductor, "standalone_compile", fail)
    with pytest.raises(RuntimeError):
        acceleration.compile_function(torch.sin, [torch.zeros(2)])
    assert len(caches) == 2 and caches[0] != caches[1]
    assert file.exists() == (folder == "site-packages") and os.environ["TORCHINDUCTOR_CACHE_DIR"] == caches[0]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["broken", "a file", "unwritable"])
def test_a_cache_that_is_of_no_use_is_replaced(tmp_path, damage):
    """Libraries that are no libraries; a file where the folder would be; a folder that cannot be made."""
    cache = tmp_path / "cache"
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom steadyrl.device import set_up_cache\nset_up_cache()\n"
        "from steadyrl.acceleration import compile_function\n"
        "print(compile_function(lambda x: x.exp(), [torch.zeros(3)])(torch.ones(3)))\n"
    )

    def run(place: Path) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(place)}
        return subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)

    if damage == "broken":
        assert run(cache).returncode == 0
        for library in cache.rglob("*.so"):
            library.write_bytes(b"no library")
    elif damage == "a file":
        cache.touch()
    done = run(Path("/proc/none") if damage == "unwritable" else cache)
    assert done.returncode == 0 and "2.7183" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert damage == "broken" or "so this run uses a new one" in done.stdout


@pytest.mark.parametrize(
    ("script", "changes", "policy_updates"),
    [
        (ddpg, {}, 6),
        (ddpg, {"normalization": "batch"}, 6),
        (ddpg, HOLDS | {"num_actions": 2, "policy_frequency": 3}, 4),
        (td3, {"n_steps": 3, "num_actions": 2}, 6),
        (sac, {}, 6),
        (sac, FIRST_MILESTONE, 12),
        (dqn, {"double_q": True}, 12),
    ],
)
def test_captured_is_the_same_algorithm_bit_for_bit(stand_in, script, changes, policy_updates):
    same_algorithm("cudagraph", {}, script=script, **changes)
    assert len(stand_in.replays) == 12 + 5
    assert len(stand_in.records) == 1 + policy_updates  # `act` waits for each of the policy's updates


def test_capturing_trains_nothing(stand_in):
    trains_nothing("cudagraph")


def test_each_kind_of_call_is_built_once_at_its_first_call(stand_in, capsys):
    """One kind has the same shapes and flags. Evaluation acts on one observation, training on one of each environment."""
    agent, _, rb = trained("cudagraph", updates=0)
    built: list[str] = []
    for rows, number in ((3, 1), (3, 3), (1, 2), (3, 4), (1, 5)):
        agent.act(np.zeros((rows, 3)))
        agent.update(**update_of(agent, rb, number))
        built += [line.split(": ")[1].split(" built")[0] for line in capsys.readouterr().out.splitlines()]
        if number == 1:
            assert built == ["act of 3", "update(update_policy=False)"]
    assert built == ["act of 3", "update(update_policy=False)", "act of 1", "update(update_policy=True)"]
    assert len(set(stand_in.replays)) == 4 and len(stand_in.replays) == 10


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


@pytest.fixture
def breaks(monkeypatch, stand_in):
    """`breaks(mode, built)`: after so many functions, no more can be built."""

    def breaks(mode: str, built: int) -> None:
        owner, name = (torch._inductor, "standalone_compile") if mode == "compile" else (acceleration, "capture")
        build, calls = getattr(owner, name), iter(range(100))

        def broken(*values, **named):
            if next(calls) < built:
                return build(*values, **named)
            raise RuntimeError("no such thing on this machine\nand more about it")

        monkeypatch.setattr(owner, name, broken)

    return breaks


# Compiled functions, which round in another way, are not compared: there the first one breaks.
BREAKS = [pytest.param("compile", 0, marks=pytest.mark.slow), ("cudagraph", 0), ("cudagraph", 2)]


@pytest.mark.parametrize(("mode", "built"), BREAKS)
def test_what_auto_chose_and_cannot_be_built_falls_back_to_eager(run, monkeypatch, capsys, breaks, mode, built):
    eager = digest(run(quick_args(accelerate="eager", **COMPILED_ONCE)))
    capsys.readouterr()
    breaks(mode, built)
    monkeypatch.setattr(steadyrl.run, "choose_mode", lambda *_: mode)
    parts = run(quick_args(accelerate="auto", **COMPILED_ONCE))
    assert digest(parts) == eager
    line = f"--accelerate {mode} does not work here (no such thing on this machine), training goes on in eager mode\n"
    assert capsys.readouterr().out.count(line) == 1
    assert json.loads((parts.run_dir / "args.json").read_text())["accelerate"] == "eager"


@pytest.mark.parametrize(("mode", "built"), BREAKS)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(run, capsys, breaks, mode, built):
    breaks(mode, built)
    line = rf"--accelerate {mode} does not work here \(no such thing on this machine\); --accelerate auto would go on in eager"
    with pytest.raises(errors.TrainingError, match=f"^{line} mode$"):
        run(quick_args(accelerate=mode, **COMPILED_ONCE))
    assert "goes on in eager mode" not in capsys.readouterr().out


def test_what_was_asked_for_and_is_not_here_is_refused_at_the_start(run, monkeypatch, tmp_path):
    def broken():
        raise AssertionError("Torch not compiled with CUDA enabled\nand more about it")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    with pytest.raises(errors.UsageError, match=r"^--accelerate cudagraph: needs a CUDA device \(Torch not .* enabled\)$"):
        run(quick_args(accelerate="cudagraph"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(errors.UsageError, match=r"^--accelerate compile: needs a C\+\+ compiler, and g\+\+ was not found$"):
        run(quick_args(accelerate="compile"))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_trains_nothing_either(monkeypatch, capsys):
    (agent, _, rb), (other, _, _) = (trained("eager", updates=5) for _ in range(2))
    random, fell_back, paused = torch.get_rng_state(), [], []

    def fails(function, tensors):
        function(*tensors), torch.rand(1)
        raise RuntimeError("half way")

    @contextlib.contextmanager
    def pause():
        paused.append("begin")
        yield
        paused.append("end")

    monkeypatch.setattr(acceleration, "compile_function", fails)
    fast = acceleration.accelerate(agent, "compile", False, lambda: fell_back.append(True), pause)
    assert not fell_back
    for number in (6, 7):
        arguments = update_of(agent, rb, number)
        assert_same(other.update(**arguments), fast.update(**arguments))
    assert_same(other.state_dict(), agent.state_dict())
    np.testing.assert_array_equal(fast.act(np.ones((2, 3))), other.act(np.ones((2, 3))))
    assert capsys.readouterr().out.count("(half way)") == len(fell_back) == 1 and paused == ["begin", "end"]
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
def test_a_mistake_in_an_agent_is_its_own_traceback(stand_in, capsys, mode, explicit):
    """It is no reason to go on in eager mode, nor one to say that a mode does not work here."""

    class Mistaken(ddpg.DDPG):
        def critic_loss(self, batch):
            return super().critic_loss(batch._replace(rewards=self.rewards))

        def policy(self, obs):
            return self.actor(obs)[:, 99]

    agent = Mistaken(*spaces_of(ddpg), quick_args(), torch.device("cpu"))
    fast = acceleration.accelerate(agent, mode, explicit)
    with pytest.raises(AttributeError, match="no attribute 'rewards'") as error:
        fast.update(filled_buffer(ddpg, agent.args).sample(32), update_policy=True)
    assert error.traceback[-1].name == "critic_loss" and error.value.__cause__ is None
    with pytest.raises(IndexError) as error:
        fast.act(np.zeros((2, 3)))
    assert error.traceback[-1].name == "policy" and error.value.__cause__ is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
@pytest.mark.parametrize(
    "value", [0.5, 3, "fast", np.ones(2, np.float32), [True], np.bool_(True)], ids=lambda value: type(value).__name__
)
def test_an_argument_that_would_keep_its_first_value_is_refused_by_name(stand_in, mode, value):
    class Weighted(ddpg.DDPG):
        def update(self, batch, update_policy, weight=None):
            return super().update(batch, update_policy)

    agent = Weighted(*spaces_of(ddpg), quick_args(), torch.device("cpu"))
    batch, fast = filled_buffer(ddpg, agent.args).sample(32), acceleration.accelerate(agent, mode)
    words = rf"\(update's weight is of type {type(value).__name__}, must be a tensor, a bool or None\)"
    with pytest.raises(errors.TrainingError, match=words):
        fast.update(batch, True, value)
    with pytest.raises(errors.TrainingError, match=words):
        fast.update(batch, update_policy=True, weight=value)
    if mode == "cudagraph":  # what is allowed
        for allowed in (None, True, torch.ones(2)):
            fast.update(batch, True, allowed)


class Weighted(ddpg.DDPG):
    """A DDPG with a number of its own."""

    def __init__(self, *values):
        super().__init__(*values)
        self.weight = 1.0

    def actor_loss(self, batch):
        return self.weight * super().actor_loss(batch)


def set_weight(agent, value):
    agent.weight = value


def set_tau(agent, value):
    agent.args.tau = value


def set_lr(agent, value):
    agent.actor_optimizer.param_groups[0]["lr"] = value


def set_critic(agent, value):
    agent.critic = copy.deepcopy(agent.critic)


CHANGES = [(set_weight, "weight"), (set_tau, "tau"), (set_lr, "lr"), (set_critic, "critic")]


@pytest.mark.parametrize("mode", ["compile", "cudagraph"])
@pytest.mark.parametrize(("change", "name"), CHANGES, ids=["weight", "tau", "lr", "critic"])
def test_what_is_replaced_after_a_build_is_never_ignored(stand_in, monkeypatch, capsys, mode, change, name):
    monkeypatch.setattr(acceleration, "compile_function", lambda function, tensors: function)
    agents = [Weighted(*spaces_of(ddpg), quick_args(), torch.device("cpu")) for _ in range(3)]
    for agent in agents[1:]:
        agent.load_state_dict(agents[0].state_dict())
    (eager, *others), fell_back = agents, []
    asked_for = acceleration.accelerate(others[0], mode)
    fast = acceleration.accelerate(others[1], mode, False, lambda: fell_back.append(True))
    rb = filled_buffer(ddpg, eager.args)
    for number, value in enumerate([None, 0.5, 0.25]):
        batch = rb.sample(16)
        for agent in (eager, fast):
            if value:
                change(agent, value)
            agent.update(batch, update_policy=True)
        assert len(fell_back) == (number > 0)
    assert_same(eager.critic.state_dict() | eager.actor.state_dict(), fast.critic.state_dict() | fast.actor.state_dict())
    assert f"({name} was replaced: only what is in a tensor can change, in place)" in capsys.readouterr().out
    asked_for.act(np.zeros((2, 3)))
    change(asked_for, 0.5)
    for call in (lambda: asked_for.act(np.zeros((2, 3))), lambda: asked_for.update(batch, update_policy=True)):
        with pytest.raises(errors.TrainingError, match=rf"\({name} was replaced"):
            call()


@pytest.mark.slow
def test_a_learning_rate_in_a_tensor_may_change():
    agents = []
    for mode in ("eager", "compile"):
        agent, _, rb = trained(mode, updates=0)
        (group,) = agent.actor_optimizer.param_groups
        group["lr"] = torch.tensor(group["lr"])
        for number in range(1, 8):
            group["lr"].fill_(1e-3 * number)
            agent.update(**update_of(agent, rb, number))
        agents.append(agent)
    assert_same(agents[0].state_dict(), agents[1].state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("effect", "words"),
    [
        ("count", "it changes count, which no checkpoint holds"),
        ("draw", "it draws random numbers, which must be drawn before"),
    ],
)
def test_an_update_with_other_effects_is_refused_by_name(stand_in, capsys, effect, words, explicit):
    class Other(ddpg.DDPG):
        def __init__(self, *values):
            super().__init__(*values)
            self.count = 0

        def update(self, batch, update_policy):
            if effect == "count":
                self.count += 1
                return super().update(batch, self.count % 2 == 0)
            return super().update(batch._replace(rewards=batch.rewards + torch.randn_like(batch.rewards)), update_policy)

    agents = [Other(*spaces_of(ddpg), quick_args(), torch.device("cpu")) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    batch, fast = filled_buffer(ddpg, agents[0].args).sample(16), acceleration.accelerate(agents[1], "cudagraph", explicit)
    if explicit:
        with pytest.raises(errors.TrainingError, match=rf"\({words}"):
            fast.update(batch, update_policy=True)
        return
    for agent in (agents[0], fast):
        torch.manual_seed(0)
        for _ in range(4):
            agent.update(batch, update_policy=True)
    assert_same(agents[0].state_dict(), fast.state_dict())
    assert capsys.readouterr().out.count(f"({words}") == 1


OTHER_OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "maximize": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, maximize=True),
    "two groups": lambda parameters: torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1),
}


@pytest.mark.parametrize("make", OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS)
def test_an_optimizer_that_is_no_plain_adamw_is_refused_by_name_where_it_is_compiled(stand_in, make):
    class Other(ddpg.DDPG):
        def __init__(self, *values):
            super().__init__(*values)
            self.critic_optimizer = self.optimizers["critic"] = make(list(self.critic.parameters()))

    agents = [Other(*spaces_of(ddpg), quick_args(), torch.device("cpu")) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    batch = filled_buffer(ddpg, agents[0].args).sample(32)
    with pytest.raises(
        errors.TrainingError, match=r"\(the optimizer critic must be a plain AdamW with one group of parameters\)"
    ):
        acceleration.accelerate(agents[0], "compile").update(batch, update_policy=True)
    captured = acceleration.accelerate(agents[0], "cudagraph")  # which takes any optimiser
    for update_policy in (False, True):
        agents[1].update(batch, update_policy), captured.update(batch, update_policy)
    assert_same(agents[0].state_dict()["networks"], agents[1].state_dict()["networks"])


def test_threads_and_precision(monkeypatch):
    """Two threads at most if none are asked for, whatever the machine has."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        device.set_up_device(quick_args(num_threads=3, matmul_precision="high"))
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "high")
        device.set_up_device(quick_args())
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (device.THREADS, "highest")
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


LONG = {"total_timesteps": 1_000_000, "learning_starts": 25_000}


@pytest.mark.parametrize(
    ("changes", "began_with", "compiler", "mode", "words"),
    [
        (LONG, None, "g++", "compile", "compile, since it saves more time in 975,000 updates than it costs"),
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
@pytest.mark.parametrize("script", AGENTS)
@pytest.mark.parametrize("changes", [{}, {"normalization": "batch"}, {"hidden_sizes": (256, 256)}])
def test_cuda_graphs_are_the_same_algorithm_bit_for_bit(script, changes):
    if "normalization" in changes and script in (td3, dqn):
        pytest.skip("has no such flag")
    same_algorithm("cudagraph", {}, "cuda", script=script, **changes)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(("script", "changes"), [(ddpg, {}), (ddpg, HOLDS | {"num_actions": 2}), (td3, {"num_actions": 2})])
def test_compiled_on_cuda_is_the_same_algorithm(script, changes):
    same_algorithm("compile", {"rtol": 1e-3, "atol": 1e-5}, "cuda", script=script, **changes)


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
    on_cuda, _, _ = trained("cudagraph", "cuda", updates=6)
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
