"""Fixtures. They import late: pytest-xdist's main process, which runs no test, need not wait for PyTorch."""

import functools
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, and so do the scripts they start
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # each process would ask the C++ compiler for seconds what it can do
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import hypothesis  # noqa: E402
import pytest  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore Ctrl-C
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup has it ignore this

# Under pytest, tyro reads the sources of dataclasses again and again, to check its cache: a tenth of the tests' time.
vars(inspect)["getsource"] = functools.cache(inspect.getsource)

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since some tests wait for what they started."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def same_threads():
    """Put the number of PyTorch's threads back: a run of a test may change it, and rounding depends on it."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Train with any script in an empty working directory: `run(args, agent_class)` gives .run_dir, .rb, .agent, .scalars."""
    import toys
    from helpers import AGENTS, scalars

    monkeypatch.chdir(tmp_path)

    def run(args, agent_class: type | None = None) -> SimpleNamespace:
        parts, script = SimpleNamespace(), sys.modules[type(args).__module__]

        def keep(name: str, make: type):
            def made(*values, **named):
                setattr(parts, name, make(*values, **named))
                return getattr(parts, name)

            return made

        toys.RECEIVED.clear()
        with monkeypatch.context() as patch:
            patch.setattr(script, "ReplayBuffer", keep("rb", script.ReplayBuffer))
            patch.setattr(script, AGENTS[script], keep("agent", agent_class or getattr(script, AGENTS[script])))
            parts.run_dir = script.train(args)
        parts.scalars = scalars(parts.run_dir)
        return parts

    return run


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(number, action)`: do something at that step of a run of DDPG in this process, counted from 1."""
    from helpers import ddpg

    def at_step(number: int, action: Callable[[], None]) -> None:
        add, calls = ddpg.ReplayBuffer.add, itertools.count(1)

        def counted(*values):
            if next(calls) == number:
                action()
            return add(*values)

        monkeypatch.setattr(ddpg.ReplayBuffer, "add", counted)

    return at_step


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real SLURM of one node, which takes arrays of three jobs at most."""
    from one_node_slurm import missing, one_node_slurm

    if missing():
        pytest.skip(f"{', '.join(missing())} not found: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit")
    with one_node_slurm(tmp_path_factory.mktemp("slurm"), array_size=3):
        yield
