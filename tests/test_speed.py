"""The speed benchmark measures what it says, and the tables of docs/speed.md say what it measured."""

import csv
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from helpers import ROOT

from steadyrl import family

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed


def test_the_page_and_the_results_agree():
    """Its tables have seven columns at most: wider ones cannot be read."""
    _, rest = speed.PAGE.read_text().split(speed.MARKS[0])
    assert rest.split(speed.MARKS[1])[0] == speed.table()
    assert all(line.count("|") <= 8 for line in speed.table().splitlines())


class Rates:
    """A side whose slices have given rates; its process made 500 steps and took 100 MB at most."""

    def __init__(self, name, *_):
        self.name, self.count, self.process = name, [500], SimpleNamespace(kill=lambda: None, wait=lambda: None)
        self.rates = iter({"eager": (100, 300, 90), "stable-baselines3": (50, 100, 90), "limit": (4000, 2000, 1000)}[name])

    def run(self, seconds):
        return next(self.rates)

    def peak_memory(self):
        return 100_000_000


@pytest.fixture
def results(tmp_path, monkeypatch) -> Callable[[], list[dict[str, str]]]:
    """What `compare` wrote: its rows."""
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.csv")
    return lambda: list(csv.DictReader(speed.RESULTS.open(newline="")))


def test_rates_ratios_and_shares(results, monkeypatch):
    """Medians over the rounds, of ratios (2, 3 and 1) and shares of the limit (0.05, 0.3 and 0.18) taken round by round."""
    monkeypatch.setattr(speed, "Side", Rates)
    monkeypatch.setattr(speed, "steps_a_product", lambda num_envs, options: 0.5)
    speed.compare(1, 0, speed.Options(env_id="Pendulum-v1", sides=("eager", "stable-baselines3"), rounds=3))
    ours, theirs = results()
    assert [float(ours[name]) for name in ("rate", "rate_min", "rate_max")] == [100, 90, 300]
    assert [float(ours[name]) for name in ("ratio", "ratio_min", "ratio_max")] == [2, 1, 3]
    assert float(ours["matrix_limit_share"]) == 0.18  # 100 / 2000, 300 / 1000, 90 / 500
    assert float(theirs["ratio"]) == 1 and float(theirs["rate"]) == 90
    assert ours["megabytes"] == "100" and theirs["megabytes"] == ""


def test_the_work_of_an_update_in_products():
    """By hand: an update of the critic is 5 passes through a network forwards or backwards, and so is one of the actor, made
    at every second step. Each pass is one product of 256 x 256 matrices, first and last layers left out: 7.5 a step."""
    assert speed.steps_a_product(1, speed.Options(env_id="Pendulum-v1")) == pytest.approx(1 / 7.5, rel=0.1)
    assert speed.steps_a_product(8, speed.Options(env_id="Pendulum-v1")) == pytest.approx(8 / 7.5, rel=0.1)


def test_the_work_of_td3_sac_and_dqn_in_products():
    """TD3's critics: a pass of the actor, 2 of the targets, 2 forwards, 4 backwards; its actor, as DDPG's, 2.5 a step. SAC's
    critics: the same 9; its actor: 1 + 2 forwards, 2 back through the critics, 2 backwards. DQN: 128 rows of 120 x 84 through
    two networks forwards and one backwards, twice, in ten steps."""
    td3 = speed.Options(script="td3_continuous_action", env_id="Pendulum-v1")
    assert speed.steps_a_product(1, td3) == pytest.approx(1 / 11.5, rel=0.1)
    sac = speed.Options(script="sac_continuous_action", env_id="Pendulum-v1")
    assert speed.steps_a_product(1, sac) == pytest.approx(1 / 16, rel=0.1)
    dqn = speed.Options(script="dqn", env_id="CartPole-v1")
    assert speed.steps_a_product(1, dqn) == pytest.approx(10 * 256**3 / (128 * 4 * 120 * 84), rel=0.1)
    assert speed.steps_a_product(32, dqn) == pytest.approx(32 * 256**3 / (128 * 4 * 120 * 84), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "env_id"),
    [(script, "CartPole-v1" if script == "dqn" else "Pendulum-v1") for script in family.SCRIPTS],
)
def test_it_measures_side_by_side(results, monkeypatch, script, env_id):
    """Real processes, in short slices; without its buffer of 1,000,000 transitions the script stays below 700 MB."""
    run = speed.Side.run

    def run_until_it_moved(side, seconds):
        """(On a busy machine a process may get no time at all in half a second.)"""
        while (rate := run(side, seconds)) < 1:
            pass
        return rate

    monkeypatch.setattr(speed.Side, "run", run_until_it_moved)
    monkeypatch.setattr(speed, "LEARNING_STARTS", speed.LEARNING_STARTS - 250)  # do not wait for 300 updates first, but for 50
    sides = {"sides": ("eager", "stable-baselines3"), "rounds": 2, "seconds": 0.5, "threads": 1}
    speed.compare(1, 50_000, speed.Options(script=script, env_id=env_id, **sides))
    ours, theirs = results()
    assert (ours["script"], ours["side"]) == (script, "eager")
    assert theirs["side"] == ours["compared_with"] == "stable-baselines3"
    assert float(ours["rate_max"]) > 0 < float(theirs["rate_max"]) and float(theirs["ratio"]) == 1
    assert ours["matrix_limit_share"] != ""
    assert 100 < float(ours["megabytes"]) < 700


def test_a_side_may_have_flags_of_the_script():
    args = speed.arguments("compile --critic-loss huber --n-steps 3", 1000, speed.Options(env_id="Pendulum-v1"))
    assert (args.accelerate, args.critic_loss, args.n_steps, args.total_timesteps) == ("compile", "huber", 3, 1000)


@pytest.mark.slow
def test_a_side_that_fails_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA"):  # which the flags reached
        speed.Side("cudagraph --n-steps 3", 1, 0, speed.Options(env_id="Pendulum-v1", cuda=False), tmp_path)
