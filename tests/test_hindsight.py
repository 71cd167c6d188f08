"""Hindsight replay: which goals a transition gets, what follows from them, and what is refused."""

import json
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys
from helpers import dqn, idle, quick_args
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from test_arguments import main_in_this_process
from test_resume import only_run, run_killed

from steadyrl import checks
from steadyrl.environments import make_replayable_env
from steadyrl.errors import UsageError
from steadyrl.hindsight_replay import Goals, HindsightSampling, find_goals
from steadyrl.replay_buffer import ReplayBuffer
from steadyrl.run_folder import list_checkpoints, results_of

GOAL = gym.spaces.Box(-1e6, 1e6, (1,), np.float32)
SPACE = gym.spaces.Dict(achieved_goal=GOAL, desired_goal=GOAL, observation=GOAL)
WANTED = -7.0  # the goal of every episode, which none of them reaches


def distance(name: str, achieved: np.ndarray, desired: np.ndarray, each: bool) -> np.ndarray:
    """A reward that tells how many steps lie between, and a termination that tells whether any does."""
    assert achieved.dtype == desired.dtype == np.float32 and achieved.shape == desired.shape and not each
    return (achieved != desired if name == "compute_terminated" else achieved - desired)[..., 0]


def numbered(ends: str, size: int = 20, num_envs: int = 1, terminates: bool = False, scale: float = 1.0) -> ReplayBuffer:
    """A buffer whose step n achieves the goal n + 1 (10,000 more in the second environment). Each letter of `ends` is a step:
    T terminates the episode, C cuts it off."""
    goals = Goals(SPACE, distance)
    goals.terminates = terminates
    flat, box = gym.spaces.Box(-1e6, 1e6, (3,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
    sampling = HindsightSampling(goals, scale)
    rb = ReplayBuffer(size, flat, box, "cpu", num_envs, random=np.random.RandomState(0), sampling=sampling)
    for number, end in enumerate(ends):
        step(rb, number, end)
    return rb


def step(rb: ReplayBuffer, number: int, end: str) -> None:
    own = number + 10_000.0 * np.arange(rb.n_envs)[:, None]
    obs, next_obs = (np.hstack([where, np.full_like(own, WANTED), where]) for where in (own, own + 1))
    flags = [np.full(rb.n_envs, end == which) for which in "TC"]
    rb.add(obs, next_obs, np.zeros((rb.n_envs, 1)), np.full(rb.n_envs, 0.5), *flags)


def drawn(rb: ReplayBuffer, size: int = 50_000) -> dict[int, dict[Any, float]]:
    """For each transition that is drawn, by its number: the share of each goal that it gets."""
    batch = rb.sample(size)
    numbers, goals = batch.observations[:, 0].int().tolist(), batch.observations[:, 1].tolist()
    found: dict[int, dict[Any, float]] = {}
    for number, goal in zip(numbers, goals, strict=True):
        shares = found.setdefault(number, {})
        shares[goal] = shares.get(goal, 0) + 1
    return {number: {goal: n / sum(shares.values()) for goal, n in shares.items()} for number, shares in sorted(found.items())}


@pytest.mark.parametrize(
    ("ends", "last"),  # by the number of a transition, that of its episode's last one that is known
    [
        ("....C..T....", [4, 4, 4, 4, 4, 7, 7, 7, 11, 11, 11, 11]),  # the last episode is still running
        ("....C", [4] * 5),
        ("TTCC.", [0, 1, 2, 3, 4]),
        ("...C.......C..........C..", [11] * 7 + [22] * 11 + [24] * 2),  # it wrapped: 5 to 24 are in it
        ("." * 33, [32] * 20),  # one episode, longer than the buffer
        ("." * 25 + "C" + ".." + "C.....", [25] * 12 + [28] * 3 + [33] * 5),
    ],
)
@pytest.mark.parametrize("restored", [False, True])
def test_goals_are_what_the_episode_achieves_from_this_step_on(ends, last, restored):
    """One in five keeps its own goal; the others get those of later steps, each equally often."""
    rb = numbered(ends)
    if restored:
        before, rb = rb, numbered("")
        rb.load_state_dict(before.state_dict())
    first, found = len(ends) - len(last), drawn(rb)
    assert list(found) == list(range(first, len(ends)))
    for number, end in zip(found, last, strict=True):
        expected = {number + 1.0 + later: 0.8 / (end - number + 1) for later in range(end - number + 1)} | {WANTED: 0.2}
        assert found[number].keys() <= expected.keys()
        for goal, share in expected.items():
            assert abs(found[number].get(goal, 0) - share) < 0.05


def test_a_restored_buffer_goes_on_the_same():
    """Its running episode ends later; then it wraps."""
    rb, restored = numbered("...C....", size=12), numbered("", size=12)
    restored.load_state_dict(rb.state_dict())
    for number, end in enumerate("..C.....T..C", 8):
        for one in (rb, restored):
            one.random.seed(1)
            step(one, number, end)
        for a, b in zip(rb.sample(200)[:5], restored.sample(200)[:5], strict=True):
            assert torch.equal(a, b)


def test_an_episode_that_did_not_come_back_ends_at_its_newest_step():
    rb = numbered("..C...")
    rb.cut_off(np.array([True]))
    step(rb, 6, ".")
    assert max(drawn(rb)[4]) == 6.0 and max(drawn(rb)[6]) == 7.0
    rb.cut_off(np.array([True])), rb.cut_off(np.array([True]))
    assert max(drawn(rb)[4]) == 6.0


@pytest.mark.parametrize("terminates", [False, True])
def test_rewards_and_terminations_follow_from_the_goal(terminates):
    """Against the same by hand, for each transition; what is stored stays as it is."""
    rb = numbered("....C..T....", num_envs=2, size=40, terminates=terminates, scale=3.0)
    before = rb.transitions.copy()
    batch = rb.sample(5_000)
    obs, next_obs = batch.observations.numpy(), batch.next_observations.numpy()
    own = obs[:, 1] == WANTED
    np.testing.assert_array_equal(obs[:, 1], next_obs[:, 1])
    np.testing.assert_array_equal(obs[:, [0, 2]] + 1, next_obs[:, [0, 2]])
    assert ((next_obs[:, 1] >= 10_000) == (obs[:, 0] >= 10_000))[~own].all()  # of its own environment
    np.testing.assert_array_equal(batch.rewards[:, 0], np.where(own, 0.5, 3.0 * (next_obs[:, 0] - next_obs[:, 1])))
    stored = obs[:, 0] % 10_000 == 7  # the one that terminated
    relabelled = next_obs[:, 0] != next_obs[:, 1] if terminates else stored
    np.testing.assert_array_equal(batch.dones[:, 0], np.where(own, stored, relabelled))
    np.testing.assert_array_equal(rb.transitions, before)


def test_it_is_stable_baselines3s_in_distribution():
    """The same steps in both: each reward, a distance, is drawn as often."""
    env = gym.make("toys:Reach-v0")
    theirs = HerReplayBuffer(400, env.observation_space, env.action_space, DummyVecEnv([lambda: env]), "cpu")
    goals = find_goals(make_replayable_env(quick_args(env_id="toys:Reach-v0")))
    flat = gym.spaces.flatten_space(env.observation_space)
    sampling = HindsightSampling(goals)
    ours = ReplayBuffer(400, flat, env.action_space, "cpu", random=np.random.RandomState(0), sampling=sampling)
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(400):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, info = env.step(action)
        batch = [{name: np.asarray(value)[None] for name, value in one.items()} for one in (obs, next_obs)]
        theirs.add(*batch, action[None], np.array([reward]), np.array([terminated or truncated]), [info])
        rows = [gym.spaces.flatten(env.observation_space, one)[None] for one in (obs, next_obs)]
        ours.add(*rows, action[None], np.array([reward]), np.array([terminated]), np.array([truncated]))
        obs = env.reset()[0] if terminated or truncated else next_obs
    np.random.seed(0)
    expected, found = theirs.sample(100_000), ours.sample(100_000)
    goal = expected.observations["desired_goal"].numpy()
    np.testing.assert_allclose(found.rewards.mean(), expected.rewards.mean(), atol=0.01)
    np.testing.assert_allclose(found.observations[:, 2:4].mean(dim=0), goal.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(found.observations[:, 2:4].std(dim=0), goal.std(axis=0), atol=0.01)
    place = expected.next_observations["achieved_goal"].numpy()
    missed = place - goal, (found.next_observations[:, :2] - found.observations[:, 2:4]).numpy()
    far = (np.quantile(np.linalg.norm(one, axis=1), np.linspace(0.02, 0.98, 25)) for one in missed)
    np.testing.assert_allclose(*far, atol=0.03)
    assert -0.9 < expected.rewards.mean() < -0.1


@pytest.mark.parametrize("env_id", ["Reach-v0", "ReachEnding-v0", "ReachNever-v0", "ReachSlow-v0", "ReachMatrix-v0"])
@pytest.mark.parametrize("words", [{}, {"num_envs": 3, "vectorization": "async"}])
def test_what_a_run_samples_is_what_the_environment_says(run, capsys, env_id, words):
    seen = []

    class Looking(idle()):
        def update(self, batch, update_policy):
            seen.append(batch)
            return {}

    run(quick_args(env_id=f"toys:{env_id}", replay="hindsight", reward_scale=2.0, **words), Looking)
    env: Any = gym.make(f"toys:{env_id}").unwrapped
    for batch in seen:
        goals = batch.next_observations[:, :4].numpy().astype(np.float64).reshape(-1, 2, *env.shape)
        for (achieved, desired), reward, done in zip(goals, batch.rewards[:, 0], batch.dones[:, 0], strict=True):
            if abs(np.linalg.norm(achieved - desired) - 0.2) > 1e-5:  # a goal is float32 in the buffer
                assert reward == 2 * env.compute_reward(achieved, desired, {})
                assert done == (env_id in ("ReachEnding-v0", "ReachSlow-v0") and env.is_reached(achieved, desired))
    assert len(seen) > 10 and torch.cat([batch.rewards for batch in seen]).unique().tolist() == [-2, 0]
    assert ("takes one goal at a time" in capsys.readouterr().out) == (env_id == "ReachSlow-v0")


class Late(toys.Reach):
    """Its `compute_reward` goes wrong after a while. `how` says in which way; it always counts its calls in place."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how, self.calls = how, 0

    def compute_reward(self, achieved, desired, info):
        self.calls += 1
        rewards = super().compute_reward(achieved, desired, info)
        if self.calls > 70 and np.ndim(rewards) and self.how != "changes its arguments":
            return (
                {"shape": rewards[:1], "nan": rewards * np.nan, "number": -1.0}.get(self.how)
                if self.how != "exit"
                else sys.exit()
            )
        if np.ndim(achieved) == 2:
            achieved[:], desired[:] = 0, 9
        return rewards


toys.register("Late-v0", Late)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shape", "its compute_reward gives the shape (1,) for"),
        ("nan", "its compute_reward gives nan, must be finite"),
        ("number", "its compute_reward gives the shape () for"),
        ("exit", "SystemExit"),
    ],
)
def test_rewards_that_go_wrong_late_end_the_run_in_one_line(tmp_path, how, said):
    kwargs = json.dumps({"how": how})
    words = "--env-id Late-v0 --replay hindsight --no-cuda --total-timesteps 400 --learning-starts 100 --hidden-sizes 8".split()
    done = main_in_this_process(*words, "--env-kwargs", kwargs, cwd=tmp_path)
    assert done.returncode == 1 and "--replay hindsight: rewards could not be computed" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr


def test_what_compute_reward_does_to_its_arguments_is_its_own_affair(run):
    args = {"replay": "hindsight", "learning_starts": 100}
    late, plain = (
        run(quick_args(env_id=env_id, env_kwargs=kwargs, **args), idle()).rb.sample(500)
        for env_id, kwargs in (("Late-v0", {"how": "changes its arguments"}), ("toys:Reach-v0", {}))
    )
    for one, other in zip(late[:5], plain[:5], strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_another_goal(run):
    """Of a single transition it comes in a fifth of all cases."""
    args = quick_args(env_id="toys:Reach-v0", replay="hindsight", learning_starts=100, batch_size=1, buffer_size=300)
    assert run(args).rb.full


@pytest.mark.slow
def test_a_stop_while_a_worker_computes_rewards_saves(tmp_path):
    """The step ends first, however long the rewards take."""
    words = "--env-id toys:ReachTardy-v0 --replay hindsight --no-cuda --num-envs 2 --vectorization async --hidden-sizes 8"
    done = run_killed(tmp_path, "update", 5, *words.split(), "--learning-starts", "100", signals="TERM")
    assert done.returncode == 143, done.stdout + done.stderr
    assert list_checkpoints(only_run(tmp_path) / "checkpoints")


class OddGoals(toys.Reach):
    """Environments whose goals cannot be used. `how` says why."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how
        if how == "shapes":
            self.observation_space["achieved_goal"] = gym.spaces.Box(-2, 2, (3,))

    def compute_reward(self, achieved, desired, info):
        if self.how == "needs info":
            return info["distance"]
        return super().compute_reward(achieved, desired, info)


class NoMethod(toys.Reach):
    compute_reward: Any = property()


toys.register("OddGoals-v0", OddGoals)
toys.register("NoMethod-v0", NoMethod)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--env-id Pendulum-v1", "Box([-1. -1. -8.]"),
        ("--env-id toys:DictSpaces-v0", "must be a Dict with observation, achieved_goal and desired_goal"),
        ("--env-id toys:ReachBonus-v0", "its compute_reward gives -1.0 where its step gave -0.5, must be the same"),
        (
            '--env-id OddGoals-v0 --env-kwargs {"how":"needs-info"}',
            "its compute_reward fails for single goals (KeyError: 'distance'",
        ),
        ("--env-id toys:ReachCounts-v0", "its compute_reward changes the episode that runs, must only compute"),
        ("--env-id toys:Reach-v0 --n-steps 3", "--n-steps 3: must be 1 with --replay hindsight"),
        ("--env-id NoMethod-v0", "it has no method compute_reward"),
    ],
)
def test_what_has_no_goals_is_refused_in_one_line(tmp_path, words, message):
    words = words.replace("needs-info", "needs info")
    command = [part for word in words.split(" --") for part in (("--" + word.removeprefix("--")).split(" ", 1))]
    done = main_in_this_process("--replay", "hindsight", *command, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_goals_that_are_no_vectors_are_refused():
    env = make_replayable_env(quick_args(env_id="OddGoals-v0", env_kwargs={"how": "shapes"}))
    with pytest.raises(UsageError, match="must be a Box or MultiBinary"):
        find_goals(env)


def test_goals_of_an_environment_that_must_be_built_anew(tmp_path):
    words = (
        "--env-id toys:ReachStrict-v0 --replay hindsight --total-timesteps 100 --learning-starts 50 --batch-size 16 --no-cuda"
    )
    done = main_in_this_process(*words.split(), "--eval-frequency", "0", "--final-episodes", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_evaluating_needs_no_goals_to_be_computed():
    """A run that was trained in hindsight can be evaluated where its rewards cannot be computed."""
    args = quick_args(env_id="toys:Reach-v0", replay="hindsight")
    assert checks.check(args) == ("plain", False)
    goals = checks.check_goals(args)
    assert goals.one_by_one == set() and not goals.terminates


@pytest.mark.slow
@pytest.mark.parametrize(("replay", "reaches"), [("hindsight", True), ("uniform", False)])
def test_reaching_is_learned_in_hindsight_alone(run, replay, reaches):
    """Within 1,500 steps; a random policy hits a goal in some 3% of its steps."""
    args = quick_args(env_id="toys:Reach-v0", replay=replay, total_timesteps=1_500, learning_starts=200, gamma=0.9)
    args.learning_rate, args.final_episodes, args.batch_size, args.tau, args.exploration_noise = 1e-3, 50, 64, 0.05, 0.3
    (result,) = results_of(run(args).run_dir)
    assert result["success"] > 0.95 if reaches else result["success"] < 0.75


class BitFlip(gym.Env):
    """Bits to be flipped one by one until they are those of the goal (the paper's section 3.1)."""

    def __init__(self, bits=12):
        space = gym.spaces.MultiBinary(bits)
        self.observation_space = gym.spaces.Dict(achieved_goal=space, desired_goal=space, observation=space)
        self.action_space, self.bits = gym.spaces.Discrete(bits), bits

    def compute_terminated(self, achieved, desired, info):
        return (np.asarray(achieved) == desired).all(axis=-1)

    def compute_reward(self, achieved, desired, info):
        return self.compute_terminated(achieved, desired, info) - 1.0

    def observe(self):
        return {"achieved_goal": self.state.copy(), "desired_goal": self.goal.copy(), "observation": self.state.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.state, self.goal = self.np_random.integers(0, 2, (2, self.bits)).astype(np.int8)
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.state[action] ^= 1
        reached = self.compute_terminated(self.state, self.goal, {})
        return self.observe(), reached - 1.0, reached, self.steps == self.bits, {"is_success": reached}


toys.register("BitFlip-v0", BitFlip)


@pytest.mark.slow
def test_bits_are_flipped_by_dqn(run):
    """With discrete actions and goals: twelve bits, of which a random policy finds the goal once in four thousand episodes."""
    args = quick_args(dqn, env_id="BitFlip-v0", replay="hindsight", total_timesteps=10_000, learning_starts=500)
    args.train_frequency, args.batch_size, args.learning_rate, args.buffer_size = 1, 64, 1e-3, 10_000
    args.gamma, args.target_network_frequency, args.hidden_sizes, args.final_episodes = 0.95, 200, (128,), 50
    args.exploration_fraction = 0.3
    (result,) = results_of(run(args).run_dir)
    assert result["success"] > 0.8
