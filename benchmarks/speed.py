"""Environment steps a second of the script and of stable-baselines3 doing the same work, in alternating pairs.

    python benchmarks/speed.py                                                   # Hopper-v4, one environment
    python benchmarks/speed.py --num-envs 1 8 32 --env-id Humanoid-v4 --fill 0 1000000
    python benchmarks/speed.py --profile                                         # microseconds by part of the loop
    python benchmarks/speed.py --readme                                          # write the README's table from the results

Each figure is the median over the steps after warm-up of a process of its own, training included; stable-baselines3 is its
TD3 with one critic, a policy delay of 2 and no target noise, which is DDPG with delayed updates. Beside it stands the share
of the limit that the matrix products alone set, at the float32 rate that torch.mm reaches at the same number of threads in
the same minutes. With several environments all of them step, and one update follows, on both sides. The rows are appended
to benchmarks/results/speed.csv.
"""

import csv
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
MARKS = "<!-- speed: written by benchmarks/speed.py --readme -->\n", "<!-- end of speed -->\n"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass
class Options:
    """Measure speed."""

    env_id: str = "Hopper-v4"
    """the environment"""
    num_envs: tuple[int, ...] = (1,)
    """environments side by side"""
    fill: tuple[int, ...] = (0,)
    """transitions in the script's replay buffer at the start, of 1,000,000"""
    sides: tuple[str, ...] = ("eager", "compile", "stable-baselines3")
    """what is compared: stable-baselines3, and values of the script's --accelerate"""
    matmul_precision: str = "highest"
    """--matmul-precision of the script"""
    cuda: bool = False
    """measure on the CUDA device"""
    pairs: int = 3
    """rounds in which each side is measured once"""
    steps: int = 4500
    """steps of all environments in each process; the last two thirds are measured"""
    threads: int = 2
    """threads of each process"""
    profile: bool = False
    """print microseconds by part of the loop instead, of the first side"""
    readme: bool = False
    """write the README's table from the results instead of measuring"""
    side: str = ""
    """used by the benchmark itself: measure this side in this process"""


def arguments(side: str, options: Options):
    """The script's, for `steps` steps with nothing but training in them."""
    import ddpg_continuous_action as ddpg

    return ddpg.Args(
        env_id=options.env_id,
        num_envs=options.num_envs[0],
        total_timesteps=options.steps * options.num_envs[0],
        learning_starts=1000,
        eval_frequency=0,
        checkpoint_frequency=0,
        save_model=False,
        cuda=options.cuda,
        accelerate=side,
        matmul_precision=options.matmul_precision,
        num_threads=options.threads,
    )


def script(side: str, options: Options) -> dict[str, float]:
    """Steps a second of the script, from the charts/SPS that it logs itself, and megabytes but for the replay buffer."""
    import numpy as np
    from conftest import scalars

    import ddpg_continuous_action as ddpg

    class FilledBuffer(ddpg.ReplayBuffer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            rows = min(options.fill[0] // self.n_envs, self.buffer_size)
            self.transitions[:rows] = np.random.default_rng(0).random((rows, *self.transitions.shape[1:]), np.float32)
            self.pos, self.full = rows % self.buffer_size, rows == self.buffer_size
            buffers.append(self)

    buffers: list[ddpg.ReplayBuffer] = []
    ddpg.ReplayBuffer, ddpg.FINAL_EVALUATION_EPISODES = FilledBuffer, 1
    args = arguments(side, options)
    run_dir = ddpg.train(args)
    (rb,) = buffers
    resident = rb.transitions[: rb.size()].nbytes
    return {
        "rate": statistics.median(value for step, value in scalars(run_dir)["charts/SPS"] if step > args.total_timesteps / 3),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident) / 1e6,
        "bytes_per_transition": rb.transitions.nbytes / args.buffer_size,
    }


def stable_baselines3(options: Options) -> dict[str, float]:
    """Steps a second of stable-baselines3's TD3 set to the same work, over windows of 100 steps as the script's."""
    import gymnasium as gym
    import numpy as np
    import torch
    from stable_baselines3 import TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise

    (num_envs,), total = options.num_envs, options.steps * options.num_envs[0]

    class Clock(BaseCallback):
        rates: list[float] = []  # noqa: RUF012
        last = (0, 0.0)

        def _on_step(self) -> bool:
            if self.num_timesteps // 100 > self.last[0] // 100:
                now = time.perf_counter()
                if self.last[0] > total / 3:
                    self.rates.append((self.num_timesteps - self.last[0]) / (now - self.last[1]))
                self.last = (self.num_timesteps, now)
            return True

    torch.set_num_threads(options.threads)
    actions = gym.make(options.env_id).action_space.shape
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions)), num_envs)
    model = TD3(
        "MlpPolicy",
        make_vec_env(options.env_id, n_envs=num_envs),
        learning_rate=3e-4,
        learning_starts=1000,
        gradient_steps=1,
        train_freq=1,
        policy_delay=2,
        target_policy_noise=0.0,
        target_noise_clip=0.0,
        action_noise=noise,
        policy_kwargs={"n_critics": 1, "net_arch": [256, 256]},
        device="cuda" if options.cuda else "cpu",
    )
    clock = Clock()
    model.learn(total, callback=clock)
    return {"rate": statistics.median(clock.rates)}


def matrix_limit(options: Options) -> dict[str, float]:
    """Steps a second if the matrix products of an average update were all there is, at the rate torch.mm reaches."""
    import gymnasium as gym
    import torch

    torch.set_num_threads(options.threads)
    env = gym.make(options.env_id)
    inputs, actions = env.observation_space.shape[0], env.action_space.shape[0]

    def products(first: int, last: int) -> int:  # multiply-adds of one row through one network
        return first * 256 + 256 * 256 + 256 * last

    actor, critic = products(inputs, actions), products(inputs + actions, 1)
    no_first = 256 * 256 + 256  # backward to the inputs of the layers after the first
    critic_update = (actor + critic) + critic + critic + no_first
    actor_update = (actor + critic) + (critic - (inputs * 256)) + (actor + no_first)
    operations = 2 * 256 * (critic_update + actor_update / 2)
    a, b = torch.randn(2, 256, 256)
    seconds = []
    for _ in range(200):
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds.append((time.perf_counter() - begin) / 10)
    return {"rate": options.num_envs[0] * 2 * 256**3 / statistics.median(seconds) / operations}


def profile(options: Options) -> None:
    """Print the microseconds that each part of the loop takes, per call and per step, inner parts indented."""
    import ddpg_continuous_action as ddpg

    args = arguments(options.sides[0], options)
    parts = {
        "act": (ddpg.DDPG, "act"),
        "environments": (ddpg.gym.wrappers.vector.RecordEpisodeStatistics, "step"),
        "check of finiteness": (ddpg, "check_finite"),
        "store": (ddpg.ReplayBuffer, "add"),
        "sample": (ddpg.ReplayBuffer, "sample"),
        "update": (ddpg.DDPG, "update"),
        "  critic's loss and gradients": (ddpg.DDPG, "critic_gradients"),
        "  actor's loss and gradients": (ddpg.DDPG, "actor_gradients"),
        "  Adam": (ddpg.DDPG, "descend"),
        "  Polyak": (ddpg.DDPG, "update_targets"),
    }
    if args.accelerate != "eager":  # what is inside one compiled function has no time of its own
        parts = {name: part for name, part in parts.items() if not name.startswith(" ")}
    times = defaultdict(list)

    def timed(name: str, function):
        @functools.wraps(function)
        def call(*values, **named):
            begin = time.perf_counter()
            result = function(*values, **named)
            times[name].append(time.perf_counter() - begin)
            return result

        return call

    def accelerate(agent, *rest) -> None:  # a fast update stands in the instance, and is timed there
        build(agent, *rest)
        agent.update = timed("update", agent.update)

    for name, (owner, attribute) in parts.items():
        if name != "update":
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    build, ddpg.accelerate, ddpg.FINAL_EVALUATION_EPISODES = ddpg.accelerate, accelerate, 1
    begin = time.perf_counter()
    ddpg.train(args)
    whole = 1e6 * (time.perf_counter() - begin) / options.steps
    measured = options.steps * 2 // 3
    print("| part | microseconds a call | microseconds a step |\n|---|---|---|")
    for name in parts:
        calls = times[name][-int(len(times[name]) * 2 / 3) :]
        each = statistics.median(calls) * 1e6
        print(f"| {name} | {each:.0f} | {each * len(calls) / measured:.0f} |")
    print(f"the run, with its start and its end: {whole:.0f} microseconds a step")


def measure(side: str, num_envs: int, fill: int, options: Options) -> dict[str, float]:
    """Measure one side in a process of its own."""
    flags = f"--env-id {options.env_id} --num-envs {num_envs} --steps {options.steps} --threads {options.threads} --fill {fill}"
    flags += f" --matmul-precision {options.matmul_precision} --side {side} --{'' if options.cuda else 'no-'}cuda"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), *flags.split()]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or "does not work here" in done.stdout:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def machine(options: Options) -> str:
    """The processor, or the CUDA device."""
    if options.cuda:
        import torch

        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
    return f"{cpu}, {os.cpu_count()} cores"


def compare(num_envs: int, fill: int, options: Options) -> None:
    """Measure all sides in alternation, print the table and append it to the results."""
    import ddpg_continuous_action as ddpg

    found = defaultdict(list)
    sides = (*options.sides, "limit") if not options.cuda else options.sides
    for pair in range(options.pairs):
        for side in sides:
            found[side].append(measure(side, num_envs, fill, options))
            print(f"round {pair + 1}, {side}: {found[side][-1]['rate']:.0f} steps a second", flush=True)
    rates = {side: [one["rate"] for one in ones] for side, ones in found.items()}
    print(f"\n{options.env_id}, environments: {num_envs}, transitions in the buffer: {fill}, threads: {options.threads}")
    print("| | steps a second | ratio to the last side | share of the matrix-product limit | MB without the buffer |")
    print("|---|---|---|---|---|")
    for side in options.sides:
        ratios = [a / b for a, b in zip(rates[side], rates[options.sides[-1]], strict=True)]
        shares = [a / b for a, b in zip(rates[side], rates.get("limit", ()), strict=False)]
        row = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(options),
            "env_id": options.env_id,
            "num_envs": num_envs,
            "fill": fill,
            "threads": options.threads,
            "matmul_precision": options.matmul_precision,
            "pairs": options.pairs,
            "side": side,
            "rate": round(statistics.median(rates[side])),
            "rate_min": round(min(rates[side])),
            "rate_max": round(max(rates[side])),
            "compared_with": options.sides[-1],
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "matrix_limit_share": round(statistics.median(shares), 2) if shares else "",
            "megabytes": round(max(one.get("megabytes", 0) for one in found[side])) or "",
            "bytes_per_transition": found[side][0].get("bytes_per_transition", ""),
            "versions": " ".join(f"{name}={version}" for name, version in ddpg.versions().items()),
        }
        print("| {side} | {rate} ({rate_min} to {rate_max}) | {ratio} ({ratio_min} to {ratio_max}) | ".format(**row), end="")
        print("{matrix_limit_share} | {megabytes} |".format(**row))
        with open(RESULTS, "a", newline="") as file:
            results = csv.DictWriter(file, row)
            if file.tell() == 0:
                results.writeheader()
            results.writerow(row)


def table() -> str:
    """The README's section: the latest row of each thing measured."""
    latest = {}
    with open(RESULTS, newline="") as file:
        for row in csv.DictReader(file):
            key = [row[name] for name in ("machine", "env_id", "num_envs", "fill", "threads", "matmul_precision", "side")]
            latest[tuple(key)] = row
    rows = ["| environment | environments | in the buffer | threads | side | steps a second | ratio | limit | MB |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for row in latest.values():
        row["side"] += f" ({row['matmul_precision']})" if row["matmul_precision"] != "highest" else ""
        row["fill"] = f"{int(row['fill']):,}"
        cells = "{env_id} | {num_envs} | {fill} | {threads} | {side} | {rate} ({rate_min} to {rate_max}) | "
        cells += "{ratio} ({ratio_min} to {ratio_max}) | {matrix_limit_share} | {megabytes}"
        rows.append(f"| {cells.format(**row)} |")
    machines = sorted({row["machine"] for row in latest.values()})
    return "\n".join(rows) + f"\n\nMeasured on: {'; '.join(machines)}.\n"


def main(options: Options) -> None:
    """Do what the options ask for."""
    if options.side:
        sides = {"stable-baselines3": stable_baselines3, "limit": matrix_limit}
        print(json.dumps(sides.get(options.side, functools.partial(script, options.side))(options)))
    elif options.profile:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            profile(options)
    elif options.readme:
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        readme.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{rest.split(MARKS[1])[1]}")
    else:
        for num_envs in options.num_envs:
            for fill in options.fill:
                compare(num_envs, fill, options)


if __name__ == "__main__":
    main(tyro.cli(Options))
