"""What the tests share: the toy environments' ids, and runs of `train` whose parts can be looked at afterwards."""

import functools
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, and so do the scripts they start
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import toys  # noqa: E402  registers the toy environments
from one_node_slurm import missing, one_node_slurm  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import ddpg_continuous_action as ddpg  # noqa: E402
import dqn  # noqa: E402
import sac_continuous_action as sac  # noqa: E402

AGENTS = {ddpg: "DDPG", sac: "SAC", dqn: "DQN"}  # the scripts and the names of their agents

# Under pytest, tyro reads the sources of dataclasses again and again, to check its cache: a tenth of the tests' time.
inspect.getsource = functools.cache(inspect.getsource)

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def same_threads():
    """Put the number of PyTorch's threads back: a run of a test may change it, and rounding depends on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick_args(script=ddpg, **changes):
    """Arguments of a run of a script that takes a second."""
    values = {
        "env_id": "Pendulum-like-v0",
        "total_timesteps": 300,
        "learning_starts": 250,
        "buffer_size": 1000,
        "batch_size": 16,
        "hidden_sizes": (32, 32),
        "eval_frequency": 0,
        "cuda": False,
        "episode_replay": "plain",  # not found out anew for each run
    }
    return script.Args(**(values | changes))


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each scalar in a run's event file."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Train in an empty working directory: of any script: `run(args, agent_class)` gives .run_dir, .rb, .agent, .scalars."""
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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real SLURM of one node, which takes arrays of three jobs at most."""
    if missing():
        pytest.skip(f"{', '.join(missing())} not found: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit")
    with one_node_slurm(tmp_path_factory.mktemp("slurm"), array_size=3):
        yield
