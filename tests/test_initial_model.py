"""--init-from: the networks of another run, and nothing else of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fingerprint import fingerprint
from helpers import AGENTS, dqn, idle, quick_args, sac
from test_arguments import main_in_this_process
from test_resume import SHORT, only_run, run_killed

from steadyrl.files import sha256
from steadyrl.models import choose_model


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
                        for name, part in self.model.items()
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
    assert record["initial_model"] == {"file": str(model.absolute()), "sha256": sha256(model)}


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
        ("--hidden-sizes 16 16", "not a whole model of this environment and network size"),
        ("--env-id Hopper-v4 --hidden-sizes 32 32", "not a whole model of this environment and network size"),
        ("--normalize-observations --hidden-sizes 32 32", "must hold actor, critic, target_actor, target_critic, normalizer"),
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


def test_another_algorithms_model_does_not_fit(run, tmp_path):
    source = run(quick_args(), idle()).run_dir
    done = main_in_this_process(
        *f"--env-id Pendulum-like-v0 --no-cuda --init-from {source}".split(), cwd=tmp_path, script=sac.__name__
    )
    assert (
        done.returncode == 2 and "it holds actor, critic, target_actor, target_critic, must hold actor, critics" in done.stderr
    )


@pytest.mark.slow
def test_a_killed_run_that_began_so_ends_like_one_left_alone(tmp_path):
    """Also where the other run is gone by then."""
    for folder in ("source", "whole", "killed"):
        (tmp_path / folder).mkdir()
    done = main_in_this_process(*f"{SHORT} --env-id Pendulum-v1 --seed 5".split(), cwd=tmp_path / "source")
    assert done.returncode == 0, done.stderr
    arguments = f"{SHORT} --env-id Pendulum-v1 --init-from {only_run(tmp_path / 'source')}".split()
    assert main_in_this_process(*arguments, cwd=tmp_path / "whole").returncode == 0
    assert run_killed(tmp_path / "killed", "step", 277, *arguments).returncode == -9
    shutil.rmtree(tmp_path / "source")
    killed: Path = only_run(tmp_path / "killed")
    assert main_in_this_process("--resume", str(killed), cwd=tmp_path).returncode == 0
    assert fingerprint(killed) == fingerprint(only_run(tmp_path / "whole"))
