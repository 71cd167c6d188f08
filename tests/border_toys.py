"""Environments with bad manners, one habit each. A script started by a test reaches them as --env-id border_toys:NAME.

All play the same task: a counter. Its observation is (start of the episode, steps of the episode), a step pays 1. So a stored
transition is true if the second number of the successor is one more, and the first is the same.
"""

import atexit
import concurrent.futures
import ctypes
import io
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch

RECEIVED: list[np.ndarray] = []  # a copy of each action, in this process


class Tame(gym.Env):
    """Without any habit."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012  as gymnasium declares it
    observation_space: gym.Space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: gym.Space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, length: int = 7, ends: str = "truncated", render_mode: str | None = None):
        self.length, self.ends, self.render_mode = length, ends, render_mode
        self.total = 0  # steps over all episodes

    def look(self):
        return np.array([self.start, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.start = 0, int(self.np_random.integers(1000))
        return self.look(), {}

    def step(self, action):
        RECEIVED.append(np.array(action))
        self.t, self.total = self.t + 1, self.total + 1
        over = self.t >= self.length
        return self.look(), 1.0, over and self.ends == "terminated", over and self.ends == "truncated", {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class ReusesItsArray(Tame):
    """One array for all observations."""

    def look(self):
        self.array = vars(self).get("array", np.zeros(2, np.float32))
        self.array[:] = self.start, self.t
        return self.array


class WritesIntoActions(Tame):
    def step(self, action):
        result = super().step(action)
        action *= 0
        return result


class Seeds(Tame):
    """Seeds the global generators of Python, NumPy and torch. where: init, reset or step."""

    def __init__(self, where="reset", **kwargs):
        super().__init__(**kwargs)
        self.where = where
        self.seed("init")

    def seed(self, where):
        if where == self.where:
            random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def reset(self, **kwargs):
        self.seed("reset")
        return super().reset(**kwargs)

    def step(self, action):
        self.seed("step")
        return super().step(action)


WORLD = {"start": 0, "t": 0}


class SharesItsWorld(Tame):
    """Its state belongs to the process: a second instance disturbs the first."""

    def look(self):
        WORLD.update(start=self.start, t=self.t)
        return super().look()

    def step(self, action):
        self.start, self.t = WORLD["start"], WORLD["t"]
        return super().step(action)


class Misfit(Tame):
    """From its step `late` on, a value does not fit. what: shape, last shape, reward, nothing, flag."""

    def __init__(self, what="shape", late=270, **kwargs):
        super().__init__(**kwargs)
        self.what, self.late = what, late

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.total >= self.late:
            if self.what == "shape" or (self.what == "last shape" and truncated):
                obs = obs[:1]
            if self.what == "reward":
                reward = np.array([1.0, 2.0])
            if self.what == "nothing":
                reward = None
            if self.what == "flag":
                terminated = np.array([False, True])
        return obs, reward, terminated, truncated, info


class DislikesLargeActions(Tame):
    """An action above 0.95 is an error."""

    def step(self, action):
        if action[0] > 0.95:
            raise ValueError(f"{action[0]} is too large")
        return super().step(action)


class Leaves(Tame):
    """At its step 270 it raises what is no Exception. where: step, reset, evaluation (in one of a second instance)."""

    instances = 0

    def __init__(self, what="SystemExit", where="step", **kwargs):
        super().__init__(**kwargs)
        self.error, self.where = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[what], where
        self.evaluations = 0

    def reset(self, *, seed=None, options=None):
        if (self.where == "reset" and self.total >= 270) or (self.where == "evaluation" and seed == 10_001):
            raise self.error
        return super().reset(seed=seed)

    def step(self, action):
        if self.where == "step" and self.total == 270:
            raise self.error
        return super().step(action)


class Single(Tame):
    """There can be only one on a machine."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", int(os.environ.get("SINGLE_PORT", "45673"))))

    def close(self):
        self.socket.close()


class DoesNotClose(Tame):
    def close(self):
        raise AttributeError("no viewer")


class Strict(Tame):
    """Takes only actions that its space contains."""

    def __init__(self, low=-0.1, high=0.1, dtype="float64", **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(low, high, (2,), np.dtype(dtype).type)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class Endless(Tame):
    def __init__(self, **kwargs):
        super().__init__(length=10**9, **kwargs)


MAIN = "BORDER_TOYS_MAIN"  # the process in which it does not fail


class FailsInWorkers(Tame):
    """Fails in a process that is not the main one. where: constructor, reset, step, close; how: raise, die, hang. From the
    step `late` on."""

    def __init__(self, where="constructor", how="raise", late=0, **kwargs):
        super().__init__(**kwargs)
        self.where, self.how, self.late = where, how, late
        self.main = os.environ.setdefault(MAIN, str(os.getpid()))
        self.fail("constructor")

    def fail(self, where):
        if where == self.where and str(os.getpid()) != self.main and self.total >= self.late:
            if self.how == "raise":
                raise RuntimeError("no graphics here")
            if self.how == "die":
                os._exit(7)
            time.sleep(10**6)

    def reset(self, **kwargs):
        self.fail("reset")
        return super().reset(**kwargs)

    def step(self, action):
        self.fail("step")
        return super().step(action)

    def close(self):
        self.fail("close")


class HasAChild(Tame):
    """Starts a process, as a simulator does, and forgets it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "child of a toy"])


class SharesOddly(Tame):
    """Its state belongs to the process, and is disturbed by what a second instance does. by: init, reset, close, del."""

    def __init__(self, by="init", raises=False, **kwargs):
        super().__init__(**kwargs)
        self.by, self.raises, self.me = by, raises, object()
        self.disturb("init")

    def disturb(self, by):
        if by == self.by:
            WORLD.update(owner=self.me)

    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self.disturb("reset")
        self.running = WORLD["owner"] = self.me if self.by == "reset" else WORLD.get("owner")
        return result

    def step(self, action):
        if WORLD.get("owner") is not self.running:
            if self.raises:
                raise RuntimeError("no such body")
            self.start, self.running = -1, WORLD["owner"]
        return super().step(action)

    def close(self):
        self.disturb("close")

    def __del__(self):
        self.disturb("del")


class DrawsItsStart(Tame):
    """Where an episode starts is drawn from NumPy's global generator."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.start = int(np.random.randint(1000))
        return self.look(), {}


class Unequal(Tame):
    """Each instance has other bounds of its actions. With a file, they are what that says."""

    instances = 0

    def __init__(self, file=None, **kwargs):
        super().__init__(**kwargs)
        Unequal.instances += 1
        bound = 1 / Unequal.instances if file is None else float(pathlib.Path(file).read_text())
        self.action_space = gym.spaces.Box(-bound, bound, (2,), np.float32)


class SpeaksElsewhere(Tame):
    """Replaces the standard streams. how: a logger without flush, none at all, a file of bytes. where: init, step, close."""

    def __init__(self, how="logger", where="init", **kwargs):
        super().__init__(**kwargs)
        self.how, self.where = how, where
        self.replace("init")

    def replace(self, where):
        if where == self.where:
            streams = {"logger": types.SimpleNamespace(write=lambda text: len(text)), "none": None, "bytes": io.BytesIO()}
            sys.stdout = sys.stderr = streams[self.how]

    def step(self, action):
        self.replace("step")
        return super().step(action)

    def close(self):
        self.replace("close")


class HandlesInC(Tame):
    """Its first step installs C's default handler of SIGTERM, as a simulator does that starts late."""

    def step(self, action):
        if self.total == 0:
            libc = ctypes.CDLL(None)
            libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
            libc.signal(signal.SIGTERM, None)
        return super().step(action)


class OldGenerator(Tame):
    """Makes its own generator in reset(seed), as code for older versions of Gym does."""

    def __init__(self, kind="RandomState", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            kind = getattr(np.random, self.kind)
            self.np_random = kind(seed) if self.kind == "RandomState" else np.random.Generator(kind(seed))
        self.t, self.start = 0, int(1000 * self.np_random.uniform())
        return self.look(), {}


class Lazy(Single):
    """There can be only one, and that is found out when it starts."""

    def __init__(self, **kwargs):
        Tame.__init__(self, **kwargs)
        self.socket = None

    def reset(self, **kwargs):
        if self.socket is None:
            self.socket = socket.socket()
            self.socket.bind(("127.0.0.1", 45674))
        return super().reset(**kwargs)

    def close(self):
        if self.socket is not None:
            self.socket.close()


class Structured(Tame):
    """A Dict of observations whose parts change their shapes at step 270."""

    observation_space = gym.spaces.Dict(a=gym.spaces.Box(-9, 9, (1,)), b=gym.spaces.Box(-9, 9, (3,)))

    def look(self):
        a, b = np.zeros(1, np.float32), np.zeros(3, np.float32)
        return {"a": b, "b": a} if self.total >= 270 else {"a": a, "b": b}


class Unclosable(Tame):
    """Raises in its step 270; closing it then hangs, or ends the process. where: any process, or workers alone."""

    def __init__(self, how="hang", workers=False, **kwargs):
        super().__init__(**kwargs)
        self.how, self.workers, self.main = how, workers, os.environ.setdefault(MAIN, str(os.getpid()))

    def step(self, action):
        if self.total == 269 and not (self.workers and str(os.getpid()) == self.main):
            raise RuntimeError("lost the simulator")
        return super().step(action)

    def close(self):
        if self.total >= 269:
            time.sleep(10**6) if self.how == "hang" else os._exit(7)


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Strange(Tame):
    """At its step 270. what: nan, over (float32), gradient, huge, message, observation."""

    def __init__(self, what="nan", late=270, **kwargs):
        super().__init__(**kwargs)
        self.what, self.late = what, late

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.total >= self.late:
            if self.what == "message":
                raise Speechless
            if self.what == "observation":
                obs = obs * np.float32(np.nan)
            rewards = {"nan": np.nan, "over": 1e39, "gradient": torch.tensor(1.0, requires_grad=True), "huge": 10**400}
            reward = rewards.get(self.what, reward)
        return obs, reward, *rest


class GoesElsewhere(Tame):
    """Changes the working directory. where: init, reset, step, close."""

    def __init__(self, where="init", **kwargs):
        super().__init__(**kwargs)
        self.where = where
        self.go("init")

    def go(self, where):
        if where == self.where:
            os.chdir(tempfile.gettempdir())

    def reset(self, **kwargs):
        self.go("reset")
        return super().reset(**kwargs)

    def step(self, action):
        self.go("step")
        return super().step(action)

    def close(self):
        self.go("close")


class TakesOver(Tame):
    """Sets what belongs to the process. where: init, reset, step."""

    def __init__(self, where="init", **kwargs):
        super().__init__(**kwargs)
        self.where = where
        self.take("init")

    def take(self, where):
        if where == self.where:
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            np.seterr(all="raise")

    def reset(self, **kwargs):
        self.take("reset")
        return super().reset(**kwargs)

    def step(self, action):
        self.take("step")
        return super().step(action)


class Odd(Tame):
    """Spaces that are legal for Gymnasium. kind: largest, huge, narrow, locked, wide."""

    def __init__(self, kind="locked", **kwargs):
        super().__init__(**kwargs)
        largest, widest = np.finfo(np.float32).max, np.finfo(np.float64).max
        box = gym.spaces.Box
        if kind == "wide":
            self.observation_space = box(-widest, widest, (2,), np.float64)
        else:
            self.action_space = {
                "largest": box(-largest, largest, (2,), np.float32),
                "huge": box(-1e300, 1e300, (2,), np.float64),
                "narrow": box(1 + 1e-12, 1 + 2e-12, (2,), np.float64),
                "locked": box(np.array([-1, 0.5], np.float32), np.array([1, 0.5], np.float32)),
            }[kind]


class ChangesItsArguments(Tame):
    """Takes its length out of a nested argument."""

    def __init__(self, config: dict[str, int] | None = None, **kwargs):
        super().__init__(length=(config or {}).pop("length", 7), **kwargs)


class EndsItsChild(Tame):
    """Forks a simulator, or starts one, and ends it by SIGTERM."""

    def __init__(self, how="fork", when="close", **kwargs):
        super().__init__(**kwargs)
        self.how, self.when = how, when
        self.begin()

    def begin(self):
        if self.how == "fork":
            self.child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
            self.child.start()
        else:
            self.child = subprocess.Popen(["sleep", "1000"])

    def end(self):
        self.child.terminate()
        self.child.join() if self.how == "fork" else self.child.wait()

    def reset(self, **kwargs):
        if self.when == "reset":
            self.end()
            self.begin()
        return super().reset(**kwargs)

    def close(self):
        self.end()


class WantsOptions(Tame):
    """Reads options if there are any, and does not come back to the same state."""

    def reset(self, *, seed=None, options=None):
        if options is not None:
            options["goal"]
        super().reset(seed=seed)
        self.start = random.SystemRandom().randrange(1000)
        return self.look(), {}


class FailsInEvaluations(Tame):
    """A reward that is not a number, in episodes with the seeds of evaluations, or only of the final one.

    Each instance can be worse than the one before.
    """

    instances = 0

    def __init__(self, first=10_000, worse=False, **kwargs):
        super().__init__(**kwargs)
        FailsInEvaluations.instances += worse
        self.first, self.length = first, 50 - self.instances if worse else self.length

    def reset(self, *, seed=None, options=None):
        self.bad = seed is not None and seed >= self.first
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, float("nan") if self.bad and self.t == 3 else reward, *rest


class ForgetsItsMode(Tame):
    """Renders, but its attribute does not say so."""

    def __init__(self, render_mode=None, **kwargs):
        super().__init__(**kwargs)


class DrawsIntoItsFrame(Tame):
    """One array for all frames."""

    def render(self):
        self.frame = vars(self).get("frame", np.zeros((16, 16, 3), np.uint8))
        self.frame[:] = 30 * self.t
        return self.frame


class LeavesAnAlarm(Tame):
    """Watches its simulator and forgets to switch the alarm off."""

    def __init__(self, where="step", timer="REAL", **kwargs):
        super().__init__(**kwargs)
        self.where, self.timer = where, timer

    def wake(self):
        def late(*_):
            raise TimeoutError("the simulator hangs")

        number = {"REAL": signal.SIGALRM, "VIRTUAL": signal.SIGVTALRM, "PROF": signal.SIGPROF}[self.timer]
        signal.signal(number, late)
        signal.setitimer(getattr(signal, f"ITIMER_{self.timer}"), 0.05)

    def step(self, action):
        if self.where == "step":
            self.wake()
        return super().step(action)

    def close(self):
        if self.where == "close":
            self.wake()


class WantsErrors(Tame):
    """Makes errors of warnings, and cannot be closed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        warnings.simplefilter("error")

    def close(self):
        raise RuntimeError("no viewer")


class KeepsAThread(Tame):
    """Leaves a thread, a process or a handler of atexit that does not end; or a pool, which ends with Python."""

    def __init__(self, what="thread", **kwargs):
        super().__init__(**kwargs)
        if what == "thread":
            threading.Thread(target=time.sleep, args=(1000,)).start()
        elif what.startswith("pool"):
            kind = "ThreadPoolExecutor" if what == "pool of threads" else "ProcessPoolExecutor"
            self.pool = getattr(concurrent.futures, kind)(1)
            self.pool.submit(time.sleep, 0).result()
        elif what == "handler":
            atexit.register(time.sleep, 1000)
        else:
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,)).start()


class IsAGenerator(Tame):
    """A game as a generator, which is open when the environment is deleted."""

    def game(self):
        with torch.autocast("cpu"):
            while True:
                yield self  # so they keep each other until Python collects them

    def step(self, action):
        if self.total == 0:
            self.running = self.game()
        next(self.running)
        return super().step(action)


class HidesItsGenerator(Tame):
    """Has a property that raises what is no AttributeError."""

    def __init__(self, **kwargs):
        self.rng = np.random.default_rng(0)
        super().__init__(**kwargs)

    @property  # type: ignore[misc]  # the habit
    def np_random(self):
        raise NotImplementedError("use self.rng")

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.t, self.start = 0, int(self.rng.integers(1000))
        return self.look(), {}


class OwnsItsGenerator(Tame):
    """Its generator is a property that cannot be set."""

    def __init__(self, **kwargs):
        self.generator = np.random.default_rng(0)
        super().__init__(**kwargs)

    @property  # type: ignore[misc]  # the habit
    def np_random(self):
        return self.generator

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        return super().reset()


class Inexact(Tame):
    """Structured observations with other numbers than its spaces have."""

    observation_space = gym.spaces.Dict(
        {"b": gym.spaces.Box(0, 255, (1, 2), np.uint8), "a": gym.spaces.Box(-9, 9, (1,), np.int64)}, sort_keys=False
    )

    def look(self):
        return {"a": [2.5], "b": [[473.5, -5.0]]}


class LeavesAChild(Tame):
    """Forks in one of its methods, the third time. The child leaves by sys.exit, or goes on."""

    calls = 0

    def __init__(self, where="step", exits=True, **kwargs):
        super().__init__(**kwargs)
        self.where, self.exits = where, exits
        self.fork("constructor")

    def fork(self, where):
        LeavesAChild.calls += where == self.where
        if where == self.where and LeavesAChild.calls == 3 and os.fork() == 0 and self.exits:
            sys.exit(0)

    def step(self, action):
        self.fork("step")
        return super().step(action)

    def close(self):
        self.fork("close")


class Sets(Tame):
    """Changes settings of PyTorch, or of the clock, in one of its methods."""

    def __init__(self, what="device", where="step", **kwargs):
        super().__init__(**kwargs)
        self.what, self.where = what, where
        if where == "constructor":
            self.change()

    def close(self):
        if self.where == "close":
            self.change()

    def change(self):
        if self.what == "device":
            torch.set_default_device("meta")
        elif self.what == "dtype":
            torch.set_default_dtype(torch.float64)
        elif self.what == "autocast":
            torch.set_autocast_enabled("cpu", True)
        elif self.what == "gradients":
            torch.set_grad_enabled(False)
        elif self.what == "inference":
            self.mode = torch.inference_mode()
            self.mode.__enter__()
        elif self.what == "precision":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        elif self.what == "words":
            sys.argv = None
        elif self.what == "recursion":
            sys.setrecursionlimit(200)
        elif self.what == "clock":
            time.perf_counter = time.monotonic = lambda: 1000.0

    def reset(self, **kwargs):
        if self.where == "reset":
            self.change()
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step":
            self.change()
        return super().step(action)


class Blocks(Tame):
    """Blocks SIGTERM in each step."""

    def step(self, action):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        return super().step(action)


class KeepsSignals(TakesOver):
    """Has the output end the process if nobody reads it, ignores SIGHUP and the end of children, and blocks SIGTERM."""

    def take(self, where):
        if where == self.where:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


class Few(Tame):
    """There can be two at a time."""

    open = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if Few.open == 2:
            raise ValueError("no more licences")
        Few.open += 1
        self.mine = 1

    def close(self):
        Few.open -= self.mine
        self.mine = 0


class SharesItsGenerator(Tame):
    """All instances draw their starts from one generator."""

    generator = np.random.default_rng(0)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            SharesItsGenerator.generator = np.random.default_rng(seed)
        self.np_random = SharesItsGenerator.generator
        return super().reset()


class HasNoGenerator(Tame):
    """As simulators that are no gymnasium.Env inside."""

    simulator = types.SimpleNamespace(spec=None)

    @property
    def unwrapped(self):
        return self.simulator

    @property
    def spec(self):
        return self.simulator.spec


class OwnBits(np.random.PCG64):
    """A bit generator of somebody's own."""


class DrawsFromOwnBits(Tame):
    """Its generator has that type."""

    def reset(self, *, seed=None, options=None):
        if seed is not None or not isinstance(self.np_random.bit_generator, OwnBits):
            self.np_random = np.random.Generator(OwnBits(seed))
        return super().reset()


class ByteActions(Tame):
    """Counts with its actions as they are."""

    action_space: gym.Space = gym.spaces.Discrete(3, dtype=np.uint8)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.kinds = set()

    def step(self, action):
        self.kinds.add(type(action))
        return super().step(np.zeros(2))


class Slow(Tame):
    """Takes its time."""

    def __init__(self, pause=0.05, **kwargs):
        super().__init__(**kwargs)
        self.pause = pause

    def step(self, action):
        time.sleep(self.pause)
        return super().step(action)


class Emptied(Tame):
    """Leaves no command line."""

    def __init__(self, **kwargs):
        sys.argv = []
        super().__init__(**kwargs)


register: Any = gym.register  # its own type wants constructors that take any arguments
for kind in list(globals().values()):
    if isinstance(kind, type) and issubclass(kind, Tame):
        register(f"{kind.__name__}-v0", kind)
register("Normalizing-v0", lambda **kwargs: gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(Tame(**kwargs))))
register("InnerLimit-v0", lambda **kwargs: gym.wrappers.TimeLimit(Endless(**kwargs), 20))
