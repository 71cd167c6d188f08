"""Environment steps a second of a script and of other libraries that do the same work, in alternating slices.

    python benchmarks/speed.py                                                   # DDPG on Hopper-v4, one environment
    python benchmarks/speed.py --script td3_continuous_action                    # TD3 on Hopper-v4
    python benchmarks/speed.py --script sac_continuous_action                    # SAC on Hopper-v4
    python benchmarks/speed.py --script dqn                                      # DQN on CartPole-v1
    python benchmarks/speed.py --num-envs 1 8 32 --env-id Humanoid-v4 --fill 0 1000000
    python benchmarks/speed.py --sides eager@2 eager@1                           # two threads against one
    python benchmarks/speed.py --sides eager ../before:eager                     # against another checkout of the script
    python benchmarks/speed.py --sides compile sbx stable-baselines3             # pip install sbx-rl==0.28.0
    python benchmarks/speed.py --sides "compile --n-steps 3" compile             # with flags of the script against without
    python benchmarks/speed.py --profile                                         # microseconds by part of the loop
    python benchmarks/speed.py --break-even                                      # how long a run must be to compile it
    python benchmarks/speed.py --docs                                            # write the tables of docs/speed.md

Each side trains in a process of its own. After its warm-up it is stopped. Then the sides go on in turns, a few seconds each. So
what slows the machine down for a minute slows all of them. A figure is the median over the rounds. A ratio is taken round by
round. One more side only multiplies matrices of 256 x 256 in float32, with the same number of threads. That is the limit which
the matrix products of the updates alone would set. With several environments, all of them step and one update follows, on each
side. The rows are appended to benchmarks/results/speed.csv.

What stable-baselines3 runs, and sbx, which is stable-baselines3 with the learning in JAX:
- for DDPG its TD3 with one critic, a policy delay of 2 and no target noise, which is DDPG with delayed updates;
- for TD3 its TD3;
- for SAC its SAC, which updates the actor at each step. The script makes two updates at each second step, so as many;
- for DQN its DQN with the script's sizes and rhythm. Both explore at 5%, so that the network chooses nearly every action.
  stable-baselines3 clips gradients, which cannot be turned off, at infinity. sbx has two hidden layers of the first size.
"""

import csv
import datetime
import functools
import importlib
import itertools
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
PAGE = ROOT / "docs" / "speed.md"
MARKS = "<!-- speed: written by benchmarks/speed.py --docs -->\n", "<!-- end of speed -->\n"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass
class Options:
    """Measure speed."""

    script: Literal["ddpg_continuous_action", "td3_continuous_action", "sac_continuous_action", "dqn"] = (
        "ddpg_continuous_action"
    )
    """what is measured"""
    env_id: str = ""
    """the environment (empty: the default of the script)"""
    num_envs: tuple[int, ...] = (1,)
    """environments side by side"""
    fill: tuple[int, ...] = (0,)
    """transitions in the script's replay buffer at the start"""
    sides: tuple[str, ...] = ("eager", "compile", "stable-baselines3")
    """what is compared: stable-baselines3, sbx, or a value of the script's --accelerate; eager@1 runs with one thread,
    ../before:eager runs the script of another folder,
    "compile --n-steps 3" trains with flags of the script"""
    matmul_precision: str = "highest"
    """--matmul-precision of the script"""
    cuda: bool = False
    """measure on the CUDA device"""
    rounds: int = 40
    """slices of each side (the default takes six minutes)"""
    seconds: float = 2.0
    """length of a slice"""
    threads: int = 2
    """threads of each side that does not name its own"""
    profile: bool = False
    """print microseconds by part of the loop instead, of the first side"""
    break_even: bool = False
    """print instead after how many updates the compiled agent of ddpg_continuous_action.py has saved what its building took"""
    docs: bool = False
    """write the tables of docs/speed.md from the results, and measure nothing"""
    side: str = ""
    """used by the benchmark itself: be this side"""
    counter: Path = Path("counter")
    """used by the benchmark itself: where that side counts its steps"""


AGENTS = {"ddpg_continuous_action": "DDPG", "td3_continuous_action": "TD3", "sac_continuous_action": "SAC", "dqn": "DQN"}
LIBRARIES = {"stable-baselines3": "stable_baselines3", "sbx": "sbx"}  # sides that are not the script, and how to import them
Counter = Callable[[int], None]  # told how many steps were made
LEARNING_STARTS = 1000
EPSILON = 0.05  # share of random actions of DQN
PROFILED_STEPS = 4500


def arguments(side: str, steps: int, options: Options) -> Any:
    """The script's arguments for that many steps of training, without evaluations or checkpoints."""
    script: Any = importlib.import_module(options.script)
    mode, *flags = side.split()
    exploration = {"start_e": EPSILON, "end_e": EPSILON} if options.script == "dqn" else {}
    args = script.Args(
        **exploration,
        env_id=options.env_id or script.Args().env_id,
        num_envs=options.num_envs[0],
        total_timesteps=steps,
        learning_starts=LEARNING_STARTS,
        eval_frequency=0,
        checkpoint_frequency=0,
        save_model=False,
        cuda=options.cuda,
        accelerate=mode,
        matmul_precision=options.matmul_precision,
        num_threads=options.threads,
    )
    # By the script's own package, which has another name in older checkouts.
    package: Any = sys.modules[script.Experiment.__module__]
    return package.parse_args(script.Args, flags, args) if flags else args


def train(side: str, count: Counter, options: Options) -> None:
    """Train with the script until killed, in a buffer that holds `fill` transitions already."""
    import numpy as np

    folder, _, mode = side.rpartition(":")
    sys.path[0] = folder or str(ROOT)  # in ROOT's place: a script that the folder lacks must not be found in ROOT
    script: Any = importlib.import_module(options.script)
    replay_buffer: Any = script.ReplayBuffer

    class CountingBuffer(replay_buffer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            rows = min(options.fill[0] // self.n_envs, self.buffer_size)
            for row in range(rows):  # no second array of that size, which would count as memory of the process
                self.transitions[row] = np.random.default_rng(row).random(self.transitions.shape[1:], np.float32)
            self.pos, self.full = rows % self.buffer_size, rows == self.buffer_size

        def add(self, *values):
            super().add(*values)
            count(self.n_envs)

    script.ReplayBuffer = CountingBuffer
    script.train(arguments(mode, 10**9, options))


def train_library(name: str, count: Counter, options: Options) -> None:
    """Train with stable-baselines3 or sbx, set to the same work, until killed."""
    if name == "sbx":  # before JAX is imported: it makes a thread for each processor that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        os.environ["JAX_PLATFORMS"] = "cuda" if options.cuda else "cpu"
    import numpy as np
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise

    args, agent = arguments("eager", 10**9, options), AGENTS[options.script]
    envs = make_vec_env(args.env_id, n_envs=args.num_envs)
    flags: dict[str, Any] = {"env": envs, "learning_starts": LEARNING_STARTS, "gradient_steps": 1, "gamma": args.gamma}
    flags |= {"batch_size": args.batch_size, "buffer_size": args.buffer_size, "tau": args.tau}
    flags |= {"device": "cuda" if options.cuda else "cpu", "policy_kwargs": {"net_arch": list(args.hidden_sizes)}}
    if agent == "DQN":
        flags |= {"train_freq": max(1, args.train_frequency // args.num_envs)}
        flags |= {"target_update_interval": args.target_network_frequency}
        flags |= {"exploration_initial_eps": EPSILON, "exploration_final_eps": EPSILON}
        flags |= {} if name == "sbx" else {"max_grad_norm": np.inf}
    elif agent != "SAC":
        mean = np.zeros(envs.action_space.shape or ())
        flags |= {"action_noise": VectorizedActionNoise(NormalActionNoise(mean, mean + 0.1), args.num_envs), "policy_delay": 2}
    if agent == "DDPG":
        flags |= {"target_policy_noise": 0.0, "target_noise_clip": 0.0}
        flags["policy_kwargs"] |= {"n_critics": 1}

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            count(args.num_envs)
            return True

    torch.set_num_threads(options.threads)
    algorithm = getattr(importlib.import_module(LIBRARIES[name]), "TD3" if agent == "DDPG" else agent)
    algorithm("MlpPolicy", **flags).learn(10**9, callback=Count())


def matrix_products(count: Counter, options: Options) -> None:
    """Multiply matrices until killed."""
    import torch

    torch.set_num_threads(options.threads)
    a, b = torch.randn(2, 256, 256)
    while True:
        a @ b
        count(1)


def sizes_of(env_id: str) -> tuple[int, int]:
    """Observations of an environment, and dimensions of its actions or how many there are."""
    import gymnasium as gym

    env = gym.make(env_id)
    return gym.spaces.flatdim(env.observation_space), gym.spaces.flatdim(env.action_space)


def steps_a_product(num_envs: int, options: Options) -> float:
    """How many environment steps, with their updates, are as much work as one product of matrices of 256 x 256."""
    args, (inputs, actions) = arguments("eager", 10**9, options), sizes_of(options.env_id)

    def products(first: int, last: int) -> tuple[int, int]:  # multiply-adds of a row through a network; of its first layer
        layers = [a * b for a, b in itertools.pairwise((first, *args.hidden_sizes, last))]
        return sum(layers), layers[0]

    agent = AGENTS[options.script]
    if agent == "DQN":  # forwards through both networks, then to the weights of the one and back to its hidden layers
        network, first = products(inputs, actions)
        work = min(1, num_envs / args.train_frequency) * (4 * network - first)
    else:
        number = {"DDPG": 1, "TD3": 2}.get(agent) or args.num_critics
        judges = number if agent == "SAC" else 1  # critics in the actor's loss
        actor, actor_first = products(inputs, 2 * actions if agent == "SAC" else actions)
        critic, critic_first = products(inputs + actions, 1)
        critic_update = actor + number * critic + number * (3 * critic - critic_first)
        actor_update = actor + judges * (critic + critic - inputs * args.hidden_sizes[0]) + (2 * actor - actor_first)
        work = critic_update + (actor_update if agent == "SAC" else actor_update / 2)
    return num_envs * 256**3 / (work * args.batch_size)


def profile(options: Options) -> None:
    """Print the microseconds that each part of the loop takes, per call and per step, inner parts indented."""
    import steadyrl.episodes
    import steadyrl.run

    script: Any = importlib.import_module(options.script)
    agent = getattr(script, AGENTS[options.script])
    args = arguments(options.sides[0], PROFILED_STEPS, options)
    args.final_episodes = 1
    parts: dict[str, tuple[Any, str]] = {
        "act": (agent, "act"),
        "environments": (steadyrl.episodes.TrainingEnvs, "step"),
        "check of finiteness": (script, "check_finite"),
        "store": (script.ReplayBuffer, "add"),
        "sample": (script.ReplayBuffer, "sample"),
        "draw noise": (script, "standard_normal"),
        "update": (agent, "update"),
        "  critic's loss": (agent, "critic_loss"),
        "  actor's loss": (agent, "actor_loss"),
        "  loss": (agent, "q_loss"),
        "  gradients and Adam": (script, "descend"),
        "  Polyak": (script, "move"),
        "copy to the target network": (agent, "update_target"),
        "log": (steadyrl.run.Run, "end_step"),
    }
    parts = {name: part for name, part in parts.items() if hasattr(*part)}
    if args.accelerate != "eager":  # what is inside one compiled function has no time of its own
        parts = {name: part for name, part in parts.items() if not name.startswith(" ")}
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = function(*values, **named)
            times[name].append(time.perf_counter() - begin)
            return result

        return call

    def accelerate(agent: Any, *rest: Any) -> Any:  # what is fast is an attribute of the stand-in, and is timed there
        agent = build(agent, *rest)
        agent.act, agent.update = timed("act", agent.act), timed("update", agent.update)
        return agent

    for name, (owner, attribute) in parts.items():
        if name not in ("act", "update"):
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    room: Any = steadyrl.run
    build, room.accelerate = room.accelerate, accelerate
    begin = time.perf_counter()
    script.train(args)
    whole = 1e6 * (time.perf_counter() - begin) / PROFILED_STEPS
    measured = PROFILED_STEPS * 2 // 3
    print("| part | microseconds a call | microseconds a step |\n|---|---|---|")
    for name in parts:
        calls = times[name][-math.ceil(len(times[name]) * 2 / 3) :]
        each = statistics.median(calls) * 1e6
        print(f"| {name} | {each:.0f} | {each * len(calls) / measured:.0f} |")
    print(f"the run, with its start and its end: {whole:.0f} microseconds a step")


def break_even(options: Options) -> None:
    """Build the compiled agent, then let the eager one and it act and learn in turns, a hundred updates each."""
    import numpy as np

    from steadyrl.acceleration import accelerate
    from steadyrl.device import set_up_device
    from steadyrl.environments import make_env

    ddpg: Any = importlib.import_module("ddpg_continuous_action")
    args = arguments("compile", 10**9, options)
    device, env = set_up_device(args), make_env(args)
    agent = ddpg.DDPG(env.observation_space, env.action_space, args, device)
    rb = ddpg.ReplayBuffer(1000, env.observation_space, env.action_space, device)
    rb.transitions[:], rb.full = np.random.random(rb.transitions.shape), True
    obs, batch = rb.observations[0], rb.sample(args.batch_size)
    fast = accelerate(agent, "compile")
    begin = time.perf_counter()
    fast.act(obs)  # the first call of each kind builds
    for update_policy in (True, False):
        fast.update(batch, update_policy=update_policy)
    built = time.perf_counter() - begin
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(options.rounds):
        for each, taken in zip((agent, fast), times.values(), strict=True):
            begin = time.perf_counter()
            for update in range(100):
                each.act(obs)
                each.update(batch, update_policy=update % args.policy_frequency == 0)
            taken.append((time.perf_counter() - begin) / 100)
    eager, compiled = map(statistics.median, times.values())
    gain = statistics.median(a - b for a, b in zip(*times.values(), strict=True))
    print(
        f"built in {built:.1f} s; {1000 * eager:.2f} ms an update eager, {1000 * compiled:.2f} compiled: "
        f"even after {built / gain:,.0f} updates",
        flush=True,
    )


def split(side: str, options: Options) -> tuple[str, str]:
    """What a side runs, and its threads."""
    name, _, threads = side.partition("@")
    folder, colon, mode = name.rpartition(":")
    return (f"{Path(folder).resolve()}:" if colon else "") + mode, threads or str(options.threads)


class Side:
    """A process that trains until it is killed; between its slices it is stopped by SIGSTOP."""

    def __init__(self, side: str, num_envs: int, fill: int, options: Options, folder: Path):
        import numpy as np

        self.name, (accelerate, threads) = side, split(side, options)
        stem = side.replace("/", "-")
        counter, self.log = folder / f"{stem}.counter", folder / f"{stem}.log"
        self.count = np.memmap(counter, np.int64, "w+", shape=(1,))
        flags = f"--script {options.script} --env-id {options.env_id} --num-envs {num_envs} --fill {fill}"
        flags += f" --matmul-precision {options.matmul_precision} --{'' if options.cuda else 'no-'}cuda --threads {threads}"
        with open(self.log, "w") as log:
            command = [sys.executable, str(Path(__file__).resolve()), *flags.split()]
            command += ["--counter", str(counter), "--side", accelerate]
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while self.count[0] < LEARNING_STARTS + 300 * num_envs:
            self.check()
            time.sleep(0.1)
        self.process.send_signal(signal.SIGSTOP)

    def check(self) -> None:
        if self.process.poll() is not None or "does not work here" in self.log.read_text():
            self.process.kill()
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-2000:]}")

    def run(self, seconds: float) -> float:
        """Let it train for a while; returns how many steps it made a second."""
        begin, count = time.perf_counter(), int(self.count[0])
        self.process.send_signal(signal.SIGCONT)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGSTOP)
        rate = (int(self.count[0]) - count) / (time.perf_counter() - begin)
        self.check()
        return rate

    def peak_memory(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


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
    from steadyrl.record import versions

    rates: dict[str, list[float]] = defaultdict(list)
    jax = ("sbx-rl", "jax") if any(side.startswith("sbx") for side in options.sides) else ()
    installed = versions(options.env_id) | {package: version(package) for package in jax}
    names = options.sides if options.cuda else (*options.sides, "limit")
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Side] = []
        try:
            for name in names:
                sides.append(Side(name, num_envs, fill, options, Path(folder)))
            for _ in tqdm(range(options.rounds), unit="round", disable=None):
                for side in sides:
                    rates[side.name].append(side.run(options.seconds))
            counts = {side.name: int(side.count[0]) for side in sides}
            memory = {side.name: side.peak_memory() for side in sides}
        finally:
            for side in sides:
                side.process.kill()
                side.process.wait()
    rates["limit"] = [rate * steps_a_product(num_envs, options) for rate in rates["limit"]]
    observations, actions = sizes_of(options.env_id)
    transition = 4 * (2 * observations + (1 if AGENTS[options.script] == "DQN" else actions) + 2)
    capacity = arguments("eager", 10**9, options).buffer_size
    print(f"\n{AGENTS[options.script]}, {options.env_id}, environments: {num_envs}, threads: {options.threads}", end=", ")
    print(f"transitions in the buffer: {fill}")
    print("| | steps a second | ratio to the last side | share of the matrix-product limit | MB without the buffer |")
    print("|---|---|---|---|---|")
    for name in options.sides:
        ratios = [a / b for a, b in zip(rates[name], rates[options.sides[-1]], strict=True)]
        shares = [a / b for a, b in zip(rates[name], rates["limit"], strict=False)]
        what, threads = split(name, options)
        megabytes = round((memory[name] - transition * min(capacity, fill + counts[name])) / 1e6)
        row: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(options),
            "script": options.script,
            "env_id": options.env_id,
            "num_envs": num_envs,
            "fill": fill,
            "threads": threads,
            "matmul_precision": options.matmul_precision,
            "rounds": options.rounds,
            "side": what,
            "rate": round(statistics.median(rates[name])),
            "rate_min": round(min(rates[name])),
            "rate_max": round(max(rates[name])),
            "compared_with": options.sides[-1],
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "matrix_limit_share": round(statistics.median(shares), 2) if shares else "",
            "megabytes": "" if what in LIBRARIES else megabytes,
            "versions": " ".join(f"{package}={number}" for package, number in installed.items()),
        }
        cells = "{rate} ({rate_min} to {rate_max}) | {ratio} ({ratio_min} to {ratio_max}) | {matrix_limit_share} | {megabytes}"
        print(f"| {name} | {cells.format(**row)} |")
        with open(RESULTS, "a", newline="") as file:
            results = csv.DictWriter(file, row)
            if file.tell() == 0:
                results.writeheader()
            results.writerow(row)


def table() -> str:
    """The section of docs/speed.md: a table per machine with the latest measurement of each thing. The rest is in the CSV."""
    latest = {}
    with open(RESULTS, newline="") as file:
        for row in csv.DictReader(file):
            what = ("machine", "script", "env_id", "num_envs", "fill", "threads", "matmul_precision")
            key = (*what, "side", "compared_with")
            latest[tuple(row[name] for name in key)] = row

    def order(row: dict[str, str]) -> tuple:
        among_ourselves = row["compared_with"] != "stable-baselines3"
        algorithm, precision = list(AGENTS).index(row["script"]), row["matmul_precision"]
        size = int(row["num_envs"]), int(row["fill"])
        return row["machine"], algorithm, among_ourselves, precision, row["env_id"], *size

    lines: list[str] = []
    for name, rows in itertools.groupby(sorted(latest.values(), key=order), key=lambda row: row["machine"]):
        columns = ("algorithm", "environment", "environments", "side", "steps a second", "ratio", "to")
        lines += [""] * bool(lines) + [f"### {name}", "", "| " + " | ".join(columns) + " |", "|---" * 7 + "|"]
        for row in rows:
            if row["compared_with"] in (row["side"], f"{row['side']}@{row['threads']}"):
                continue  # what the others are compared with: a ratio of 1
            if row["matmul_precision"] != "highest":
                row["side"] += f" ({row['matmul_precision']})"
            if row["threads"] != "2":
                row["side"] += f" ({row['threads']} threads)"
            if row["fill"] != "0":
                row["env_id"] += f", {int(row['fill']):,} stored"
            cells = "{script} | {env_id} | {num_envs} | {side} | {rate} ({rate_min} to {rate_max}) | "
            cells += "{ratio} ({ratio_min} to {ratio_max}) | {compared_with}"
            lines.append(f"| {cells.format(**row | {'script': AGENTS[row['script']]})} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Do what the options ask for."""
    options.env_id = options.env_id or arguments("eager", 10**9, options).env_id
    if options.side == "break-even":
        break_even(options)
    elif options.side:
        import numpy as np

        counter = np.memmap(options.counter, np.int64, "r+", shape=(1,))

        def count(steps: int) -> None:
            counter[0] += steps

        if options.side == "limit":
            matrix_products(count, options)
        else:
            (train_library if options.side in LIBRARIES else train)(options.side, count, options)
    elif options.break_even:  # in processes of their own: one with an empty cache of compiled code, then one that finds it
        with tempfile.TemporaryDirectory() as cache:
            flags = f"--side break-even --env-id {options.env_id} --threads {options.threads} --rounds {options.rounds}"
            for _ in range(2):
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(options.threads)}
                subprocess.run([sys.executable, __file__, *flags.split()], env=environment, check=True)
    elif options.profile:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            profile(options)
    elif options.docs:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{rest.split(MARKS[1])[1]}")
    else:
        for num_envs in options.num_envs:
            for fill in options.fill:
                compare(num_envs, fill, options)


if __name__ == "__main__":
    main(tyro.cli(Options))
