"""--init-from: the networks of another run, and nothing else of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint
from helpers import AGENTS, dqn, idle, quick_args, sac, td3
from test_arguments import main_in_this_process
from test_resume import SHORT, only_run, run_killed

from steadyrl.errors import UsageError
from steadyrl.files import sha256
from steadyrl.hub import build_folder
from steadyrl.models import choose_model
from steadyrl.run import Run


@pytest.mark.parametrize("script", AGENTS)
def test_a_run_begins_with_the_networks_of_another(run, script):
    """All of them; with optimisers, a replay buffer, a clock and random numbers of its own."""
    env_id = "CartPole-v1" if script is dqn else "Pendulum-like-v0"
    source = run(quick_args(script, env_id=env_id, eval_frequency=100)).run_dir
    model = choose_model(source, None)
    assert model is not None and model.name == "best_model.pt"
    saved = torch.load(model, weights_only=True)
    begun = []

    class Looking(idle(script)):
        def act(self, obs, *others):
            if not begun:
                begun.append(
                    {
                        name: {key: tensor.clone() for key, tensor in part.state_dict().items()}
                        for name, part in self.saved_modules.items()
                    }
                )
            return super().act(obs, *others)

    args = quick_args(script, env_id=env_id, init_from=str(source), learning_starts=0, seed=2)
    parts = run(args, Looking)
    assert begun[0].keys() == saved.keys()
    for name, tensors in saved.items():
        for key, tensor in tensors.items():
            assert torch.equal(begun[0][name][key], tensor), (name, key)
    assert not any(part.state for part in parts.agent.optimizers.values()) and parts.rb.pos == 300
    record = json.loads((parts.run_dir / "args.json").read_text())
    assert record["args"]["init_from"] == str(source)
    assert record["initial_model"] == sha256(model) == sha256(parts.run_dir / "initial_model.pt")


@pytest.mark.parametrize("model", ["model.pt", None])
def test_the_latest_model_where_there_is_no_best(run, tmp_path, model):
    source = run(quick_args(), idle()).run_dir
    assert not (source / "best_model.pt").exists()
    if model is None:
        (source / "model.pt").unlink()
    done = main_in_this_process(
        *f"{SHORT} --env-id Pendulum-like-v0 --init-from {source} --total-timesteps 20".split(), cwd=tmp_path
    )
    assert done.returncode == (2 if model is None else 0)
    assert ("must hold a best_model.pt or a model.pt" in done.stderr) == (model is None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hidden-sizes 16 16", "not a complete model for this environment and network size"),
        ("--env-id Hopper-v4 --hidden-sizes 32 32", "not a complete model for this environment and network size"),
        ("--normalize-observations --hidden-sizes 32 32", "must hold actor, critic, target_actor, target_critic, normalizer"),
        ("--hidden-sizes 32 32 --activation tanh", "--activation tanh: must be that of --init-from"),
        ("--init-from nowhere", "--init-from nowhere: must hold a best_model.pt or a model.pt"),
        ("--hidden-sizes 0", "--hidden-sizes 0: must be"),
        ("--env-id Nonsense-v0", "Nonsense-v0"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_created(run, tmp_path, words, message):
    source = run(quick_args(), idle()).run_dir
    command = f"--env-id Pendulum-like-v0 --no-cuda --init-from {source} {words}".split()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    done = main_in_this_process(*command, cwd=elsewhere)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not list(elsewhere.iterdir())


def test_a_run_from_python_creates_nothing_for_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="--init-from nowhere: must hold a best_model"):
        Run(quick_args(output=str(tmp_path), init_from="nowhere")).__enter__()
    assert not list(tmp_path.iterdir())


def test_another_algorithms_model_does_not_fit(run, tmp_path):
    source = run(quick_args(), idle()).run_dir
    done = main_in_this_process(
        *f"--env-id Pendulum-like-v0 --no-cuda --init-from {source}".split(), cwd=tmp_path, script=sac.__name__
    )
    words = "it holds actor, critic, target_actor, target_critic, must hold "
    assert done.returncode == 2 and f"{words}actor, critics" in done.stderr
    done = main_in_this_process(
        *f"--env-id Pendulum-like-v0 --no-cuda --init-from {source}".split(), cwd=tmp_path, script=td3.__name__
    )
    assert done.returncode == 2 and f"{words}actor, critics, target_actor, target_critics" in done.stderr


@pytest.mark.parametrize(("script", "env_id"), [(sac, "CartPole-v1"), (dqn, "Pendulum-v1")])
def test_actions_of_another_kind_are_one_line(run, tmp_path, script, env_id):
    source = run(quick_args(), idle()).run_dir
    words = f"--env-id {env_id} --no-cuda --init-from {source}"
    done = main_in_this_process(*words.split(), cwd=tmp_path, script=script.__name__)
    assert done.returncode == 2 and f"--env-id {env_id}: its actions are" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("step", [60, 277])  # before the first checkpoint, and after two
def test_a_killed_run_that_began_so_ends_like_one_left_alone(tmp_path, step):
    """Also where the other run is gone by then."""
    for folder in ("source", "whole", "killed"):
        (tmp_path / folder).mkdir()
    done = main_in_this_process(*f"{SHORT} --env-id Pendulum-v1 --seed 5".split(), cwd=tmp_path / "source")
    assert done.returncode == 0, done.stderr
    arguments = f"{SHORT} --env-id Pendulum-v1 --init-from {only_run(tmp_path / 'source')}".split()
    assert main_in_this_process(*arguments, cwd=tmp_path / "whole").returncode == 0
    assert run_killed(tmp_path / "killed", "step", step, *arguments).returncode == -9
    shutil.rmtree(tmp_path / "source")
    killed: Path = only_run(tmp_path / "killed")
    assert main_in_this_process("--resume", str(killed), cwd=tmp_path).returncode == 0
    assert fingerprint(killed) == fingerprint(only_run(tmp_path / "whole"))
    record = json.loads((killed / "args.json").read_text())
    assert record["initial_model"] == sha256(killed / "initial_model.pt")


def test_other_bounds_of_the_actions_do_not_fit(run, tmp_path):
    """They are buffers of the networks: with the other run's, the policy would act inside the wrong bounds."""
    source = run(quick_args(env_id="Pendulum-like-v0"), idle()).run_dir
    (elsewhere := tmp_path / "elsewhere").mkdir()
    done = main_in_this_process(
        *f"--env-id toys:WidePendulum-v0 --no-cuda --hidden-sizes 32 32 --init-from {source}".split(), cwd=elsewhere
    )
    assert done.returncode == 2 and "its actions have other bounds" in done.stderr and not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "a-file/x"])
def test_a_path_that_cannot_be_read_is_one_line(tmp_path, name):
    (tmp_path / "a-file").touch()
    done = main_in_this_process("--env-id", "Pendulum-like-v0", "--init-from", name, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--init-from" in done.stderr


def test_what_is_published_does_not_tell_where_the_other_run_is(run, tmp_path):
    source = run(quick_args(), idle()).run_dir
    args = quick_args(init_from=str(source), seed=2)
    folder = run(args, idle()).run_dir
    (tmp_path / "hub").mkdir()
    build_folder(args, "DDPG", folder, "a/b", tmp_path / "hub")
    files = [path for path in (tmp_path / "hub").iterdir() if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not any(bytes(source.parent) in path.read_bytes() for path in files)
    assert f"--init-from {source.name}" in (tmp_path / "hub" / "README.md").read_text()
