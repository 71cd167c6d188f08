"""Environment steps a second of the script and of stable-baselines3 doing the same work, in alternating pairs.

    python benchmarks/speed.py --env-id Hopper-v4 --threads 2

Each figure is the median over the steps after warm-up of one process, training included; stable-baselines3 is its TD3 with
one critic, a policy delay of 2 and no target noise, which is DDPG with delayed updates. Beside it stands the share of the
limit that the matrix products alone set, at the float32 rate that torch.mm reaches at the same number of threads. The rows
are appended to benchmarks/results/speed.csv.
"""

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass
class Options:
    """Measure speed."""

    env_id: str = "Hopper-v4"
    """the environment"""
    num_envs: int = 1
    """environments side by side"""
    pairs: int = 3
    """alternating pairs"""
    steps: int = 6000
    """environment steps of each process; the last two thirds are measured"""
    threads: int = 2
    """threads of each process"""
    side: str = ""
    """used by the benchmark itself: measure this side in this process"""


def ours(options: Options) -> float:
    """Steps a second of the script, from the charts/SPS that it logs itself."""
    from conftest import scalars

    import ddpg_continuous_action as ddpg

    args = ddpg.Args(
        env_id=options.env_id,
        num_envs=options.num_envs,
        total_timesteps=options.steps,
        learning_starts=1000,
        eval_frequency=0,
        checkpoint_frequency=0,
        save_model=False,
        cuda=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ddpg.FINAL_EVALUATION_EPISODES = 1
        run_dir = ddpg.train(args)
        return statistics.median(value for step, value in scalars(run_dir)["charts/SPS"] if step > options.steps / 3)


def stable_baselines3(options: Options) -> float:
    """Steps a second of stable-baselines3's TD3 set to the same work, over windows of 100 steps as the script's."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3 import TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    class Clock(BaseCallback):
        rates: list[float] = []  # noqa: RUF012
        last = (0, 0.0)

        def _on_step(self) -> bool:
            if self.num_timesteps // 100 > self.last[0] // 100:
                now = time.perf_counter()
                if self.last[0] > options.steps / 3:
                    self.rates.append((self.num_timesteps - self.last[0]) / (now - self.last[1]))
                self.last = (self.num_timesteps, now)
            return True

    actions = gym.make(options.env_id).action_space.shape
    model = TD3(
        "MlpPolicy",
        make_vec_env(options.env_id, n_envs=options.num_envs),
        learning_rate=3e-4,
        learning_starts=1000,
        gradient_steps=1,
        train_freq=1,
        policy_delay=2,
        target_policy_noise=0.0,
        target_noise_clip=0.0,
        action_noise=NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions)),
        policy_kwargs={"n_critics": 1, "net_arch": [256, 256]},
        device="cpu",
    )
    clock = Clock()
    model.learn(options.steps, callback=clock)
    return statistics.median(clock.rates)


def matrix_limit(options: Options) -> float:
    """Steps a second if the matrix products of an average update were all there is, at the rate torch.mm reaches."""
    import gymnasium as gym
    import torch

    env = gym.make(options.env_id)
    inputs, actions = env.observation_space.shape[0], env.action_space.shape[0]

    def products(first: int, last: int) -> int:  # multiply-adds of one row through one network
        return first * 256 + 256 * 256 + 256 * last

    actor, critic = products(inputs, actions), products(inputs + actions, 1)
    no_first = 256 * 256 + 256  # backward to the inputs of the layers after the first
    critic_update = (actor + critic) + critic + critic + no_first
    actor_update = (actor + critic) + (critic - (inputs * 256)) + (actor + no_first)
    operations = 2 * 256 * (critic_update + actor_update / 2)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    seconds = []
    for _ in range(200):
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds.append((time.perf_counter() - begin) / 10)
    return options.num_envs * 2 * 256**3 / statistics.median(seconds) / operations


SIDES = {"ours": ours, "stable-baselines3": stable_baselines3, "limit": matrix_limit}


def measure(side: str, options: Options) -> float:
    """Measure one side in a process of its own."""
    flags = f"--env-id {options.env_id} --num-envs {options.num_envs} --steps {options.steps} --side {side}"
    command = [sys.executable, __file__, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    """Measure all sides in alternation, print the table and append it to the results."""
    rates = {side: [] for side in SIDES}
    for pair in range(options.pairs):
        for side in SIDES:
            rates[side].append(measure(side, options))
            print(f"pair {pair + 1}: {side} {rates[side][-1]:.0f}", flush=True)
    ratios = [a / b for a, b in zip(rates["ours"], rates["stable-baselines3"], strict=True)]
    shares = [a / b for a, b in zip(rates["ours"], rates["limit"], strict=True)]
    print("| | steps a second | minimum | maximum |\n|---|---|---|---|")
    for side, values in rates.items():
        print(f"| {side} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    print(f"| ratio to stable-baselines3 | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    print(f"| share of the matrix-product limit | {statistics.median(shares):.2f} | {min(shares):.2f} | {max(shares):.2f} |")
    import ddpg_continuous_action as ddpg

    row = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "env_id": options.env_id,
        "num_envs": options.num_envs,
        "threads": options.threads,
        "ours": round(statistics.median(rates["ours"])),
        "stable_baselines3": round(statistics.median(rates["stable-baselines3"])),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "matrix_limit_share": round(statistics.median(shares), 3),
        "versions": " ".join(f"{name}={version}" for name, version in ddpg.versions().items()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a", newline="") as file:
        table = csv.DictWriter(file, row)
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.side:
        print(SIDES[options.side](options))
    else:
        main(options)
