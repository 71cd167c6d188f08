"""The loop around the learner: reproducibility, logs, what a run folder holds, and stops for values not finite."""

import csv
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick_args

import ddpg_continuous_action as ddpg
import steadyrl.run
from steadyrl import environments, errors, evaluation, models, record, run_folder


def digest(parts) -> str:
    """SHA-256 of the weights, both optimisers and the replay buffer."""
    sha = hashlib.sha256()
    agent, rb = parts.agent, parts.rb
    for network in agent.networks.values():
        for tensor in network.state_dict().values():
            sha.update(tensor.numpy().tobytes())
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        for state in optimizer.state_dict()["state"].values():
            for tensor in state.values():
                sha.update(tensor.numpy().tobytes())
    for array in (rb.observations, rb.next_observations, rb.actions, rb.rewards, rb.dones):
        sha.update(array.tobytes())
    return sha.hexdigest()


def training_scalars(parts) -> dict:
    return {tag: rows for tag, rows in parts.scalars.items() if not tag.startswith("eval/") and tag != "charts/SPS"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_with_and_without_evaluation_and_video(run):
    """(save_model=False: the final evaluation loads the best networks, and here the last ones are compared.)"""
    base = quick_args(num_envs=2, save_model=False)
    reference = run(base)
    changes = (
        {},
        {"eval_frequency": 70, "eval_episodes": 3},
        {"capture_video": True},
        {"eval_frequency": 1, "eval_episodes": 1},
    )
    for change in changes:
        again = run(quick_args(num_envs=2, save_model=False, **change))
        assert digest(again) == digest(reference), change
        assert training_scalars(again) == training_scalars(reference), change
    assert digest(run(quick_args(num_envs=2, save_model=False, seed=2))) != digest(reference)


def test_every_episode_is_logged_also_when_two_end_on_one_step(run):
    """Three counters in step with one another: episodes of 5 steps that pay 1 each, three at a time."""
    parts = run(quick_args(env_id="Counter-v0", num_envs=3))
    steps = [step for step in range(15, 301, 15) for _ in range(3)]
    assert parts.scalars["charts/episodic_return"] == [(step, 5.0) for step in steps]
    assert parts.scalars["charts/episodic_length"] == [(step, 5.0) for step in steps]


def test_logged_returns_are_the_sums_of_the_stored_rewards(run):
    parts = run(quick_args(num_envs=2))
    rewards = parts.rb.rewards[: parts.rb.pos]
    lengths = [length for _, length in parts.scalars["charts/episodic_length"]]
    returns = [value for _, value in parts.scalars["charts/episodic_return"]]
    ends = {0: 0, 1: 0}  # where the running episode of each environment began
    for (step, length), total in zip(parts.scalars["charts/episodic_length"], returns, strict=True):
        end = step // 2
        (index,) = [
            i for i in ends if end - ends[i] == length and rewards[ends[i] : end, i].sum() == pytest.approx(total, rel=1e-4)
        ]
        ends[index] = end
    assert len(lengths) > 20


@pytest.mark.parametrize(
    ("policy_frequency", "steps"), [(1, [200, 300, 400, 500]), (3, [200, 300, 400, 500]), (150, [300, 400]), (1000, [])]
)
def test_an_actor_loss_is_logged_only_if_it_is_new(run, policy_frequency, steps):
    """(An update of the actor is the 150th and the 300th, at steps 250 and 400.)"""

    class Telling(ddpg.DDPG):
        def update(self, batch, update_policy):
            return dict.fromkeys(("q_loss", "q_est", "actor_loss") if update_policy else ("q_loss", "q_est"), torch.zeros(()))

    parts = run(quick_args(policy_frequency=policy_frequency, total_timesteps=500, learning_starts=100), Telling)
    assert [step for step, _ in parts.scalars.get("losses/actor_loss", [])] == steps
    assert [step for step, _ in parts.scalars["losses/q_loss"]] == [200, 300, 400, 500]
    assert [step for step, _ in parts.scalars["losses/q_est"]] == [200, 300, 400, 500]


def test_the_clock_counts_all_environments(run):
    parts = run(quick_args(num_envs=7, eval_frequency=100, eval_episodes=1, learning_starts=100))
    assert [step for step, _ in parts.scalars["eval/episodic_return"]] == [105, 203, 301]
    assert [step for step, _ in parts.scalars["losses/q_loss"]] == [105, 203, 301]
    assert [step for step, _ in parts.scalars["charts/SPS"]] == [105, 203, 301]


@dataclasses.dataclass
class WithPath(ddpg.Args):
    """A script of one's own may have such a flag."""

    data: Path = Path("x")


def test_a_path_is_saved_as_text_and_comes_back_as_a_path():
    saved = json.loads(json.dumps(record.record_of(WithPath(data=Path("a/b")), torch.device("cpu"))))["args"]
    assert saved["data"] == "a/b" and record.as_args(WithPath, saved).data == Path("a/b")


def test_the_run_folder(run):
    args = quick_args(eval_frequency=120, eval_episodes=4, final_episodes=6, gamma=0.9)
    parts = run(args)
    folder = parts.run_dir
    assert folder.parent.name == "runs" and folder.name.startswith("Pendulum-like-v0__ddpg_continuous_action__1__")
    saved = json.loads((folder / "args.json").read_text())
    assert saved["args"]["gamma"] == 0.9 and saved["device"] == "cpu"
    assert torch.__version__.startswith(saved["versions"]["torch"])  # which may add how it was built, as in 2.13.0+cu130
    assert record.load_args(folder, ddpg.Args) == args

    rows = list(csv.DictReader((folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [120, 240, 300]
    assert list(rows[0]) == ["global_step", "mean", "std", "min", "max", "length", "q_bias"]
    for row in rows:
        assert float(row["min"]) <= float(row["mean"]) <= float(row["max"])
        for column, tag in (
            ("mean", "episodic_return"),
            ("std", "episodic_return_std"),
            ("length", "episodic_length"),
            ("q_bias",) * 2,
        ):
            logged = dict(parts.scalars[f"eval/{tag}"])[int(row["global_step"])]
            assert logged == pytest.approx(float(row[column]), rel=1e-5)

    result = json.loads((folder / "evaluation.json").read_text())
    assert result["env_id"] == "Pendulum-like-v0" and result["episodes"] == len(result["returns"]) == len(result["seeds"]) == 6
    assert result["mean"] == pytest.approx(np.mean(result["returns"])) and result["std"] == pytest.approx(
        np.std(result["returns"])
    )
    assert {"date", "versions", "model"} <= result.keys()

    for name in ("model.pt", "best_model.pt"):
        assert torch.load(folder / name, weights_only=True).keys() == {"actor", "critic", "target_actor", "target_critic"}
    (events,) = folder.glob("events.out.tfevents.*")
    assert b"|gamma|0.9|" in events.read_bytes()


def test_the_best_model_is_that_of_the_best_evaluation(run, monkeypatch):
    """Evaluations return 1, 3, 2: the weights kept are those of the second, and the final evaluation is theirs."""
    seen = []

    def evaluate(agent, *_, **__):
        seen.append(agent.actor.hidden[0].weight.detach().clone())
        return evaluation.Evaluation(np.array([(1.0, 3.0, 2.0, 0.0)[len(seen) - 1]]), np.array([1]), 0.0)

    monkeypatch.setattr(steadyrl.run, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    parts = run(quick_args(eval_frequency=100, learning_starts=50))
    best = torch.load(parts.run_dir / "best_model.pt", weights_only=True)["actor"]["hidden.0.weight"]
    latest = torch.load(parts.run_dir / "model.pt", weights_only=True)["actor"]["hidden.0.weight"]
    assert torch.equal(best, seen[1]) and torch.equal(latest, seen[2]) and torch.equal(seen[3], best)
    assert not torch.equal(best, latest)


def test_two_runs_of_one_second_have_folders_of_their_own(run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    folders = {run_folder.make_run_folder(quick_args()) for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


def test_without_save_model_no_model_is_kept(run):
    folder = run(quick_args(save_model=False, eval_frequency=100)).run_dir
    assert not list(folder.glob("*.pt")) and (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("env_id", "field"),
    [("NaNObservation-v0", "observation"), ("HugeObservation-v0", "observation"), ("NaNReward-v0", "reward")],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_value_not_finite_stops_training_before_it_is_stored(run, env_id, field, tmp_path):
    with pytest.raises(errors.TrainingError, match=rf"step 150: {field} of environment 0 is not finite"):
        run(quick_args(env_id=env_id, eval_frequency=120, eval_episodes=1))
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "model.pt").exists() and (folder / "best_model.pt").exists()  # those of step 120


def test_the_environment_with_the_value_is_named():
    with pytest.raises(errors.TrainingError, match="step 7: reward of environment 2 is not finite: nan"):
        environments.check_finite(7, observation=np.zeros((3, 2)), reward=np.array([0, 1, np.nan]))


def test_a_loss_not_finite_stops_training_and_keeps_the_last_good_model(run, tmp_path):
    """A reward of 1e30 is finite, its squared error is not."""
    with pytest.raises(errors.TrainingError, match=r"step \d+: q_loss is not finite"):
        run(quick_args(env_id="HugeReward-v0", eval_frequency=130, eval_episodes=1, total_timesteps=2000))
    (folder,) = (tmp_path / "runs").iterdir()
    for name in ("model.pt", "best_model.pt"):
        weights = torch.load(folder / name, weights_only=True)
        assert all(tensor.isfinite().all() for network in weights.values() for tensor in network.values())


def test_a_model_not_finite_is_not_saved(run, tmp_path):
    agent = run(quick_args()).agent
    models.save_model(agent, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    torch.nn.init.constant_(agent.critic.hidden[0].bias, math.nan)
    with pytest.raises(errors.TrainingError, match="critic are not finite"):
        models.save_model(agent, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_nan_action_stops_training(run):
    class Broken(ddpg.DDPG):
        def act(self, obs):
            return super().act(obs) * np.float32(math.nan)

    with pytest.raises(errors.TrainingError, match="step 250: action of environment 0 is not finite"):
        run(quick_args(), Broken)
