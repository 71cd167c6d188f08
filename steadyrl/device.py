"""What is set once in a process before networks are made: the device, threads, precision and determinism of PyTorch."""

import atexit
import getpass
import os
import re
import shutil
import sys
import tempfile
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils import _device

from steadyrl.arguments import RunArgs
from steadyrl.output import say

THREADS = min(2, torch.get_num_threads())  # as OMP_NUM_THREADS and the cores say, before a run sets another number


def set_up_device(args: RunArgs) -> torch.device:
    """Set the process up as the flags say. Returns the device. Prints a message if there is no CUDA device."""
    torch.set_num_threads(args.num_threads or THREADS)
    torch.set_float32_matmul_precision(args.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for the next line
    set_up_cache()
    torch.use_deterministic_algorithms(args.torch_deterministic)
    # Filling new memory costs time, and all memory is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is an attribute of the module
    if args.cuda and not torch.cuda.is_available():
        say("no CUDA device found, using the CPU")
    return device_of(args)


def device_of(args: RunArgs) -> torch.device:
    """The device that the flags and this machine mean."""
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def set_up_cache() -> None:
    """If PyTorch's folder for compiled code cannot be written, use another one. Parts of PyTorch make it on import."""
    try:
        user = re.sub(r"[\\/:*?\"<>|]", "_", getpass.getuser())
        place = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
        os.makedirs(place, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except (OSError, KeyError) as error:  # KeyError: this user has no name
        try:
            place = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")
        except OSError:  # eager code needs none
            return
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        say(f"PyTorch cannot keep compiled code in its cache ({error}), so this run uses a new one")


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """The states of PyTorch's generators. Our algorithms do not draw from them in training. One with dropout does."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_generators(device: torch.device, states: list[torch.Tensor]) -> None:
    """Restore what `generator_states` returned, maybe on another device."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def matmul_precision() -> str | None:
    """That of float32, None if it was set in PyTorch's newer way: `torch.get_float32_matmul_precision` then raises an error."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


class Defaults:
    """Settings of the whole process, as they are when this is made. An environment may change them; `hold` restores them.

    Used in a `with`, it restores them at the end.
    """

    inference_modes: ClassVar[list[torch.inference_mode]] = []  # kept: PyTorch leaves a mode that is deleted

    def __init__(self) -> None:
        self.values = self.read()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.hold()

    @staticmethod
    def read() -> tuple[Any, ...]:
        """The current settings. Reading them takes some microseconds, so every step can do it."""
        device = _device.CURRENT_DEVICE  # torch.get_default_device takes three microseconds
        defaults = torch.get_default_dtype(), device, torch.is_grad_enabled()
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        precision = matmul_precision(), torch.are_deterministic_algorithms_enabled()
        argv = tuple(sys.argv) if isinstance(sys.argv, list) else sys.argv
        process = sys.stdout, sys.stderr, argv, sys.getrecursionlimit(), torch.get_num_threads()
        return *process, torch.is_inference_mode_enabled(), *defaults, *autocast, *precision, np.geterr()

    def hold(self) -> None:
        """Restore the settings that have changed."""
        if self.read() != self.values:
            output, errors, argv, recursion, threads, inference, dtype, device, gradients, *others = self.values
            cpu, cuda, precision, deterministic, numpy_errors = others
            sys.stdout, sys.stderr, sys.argv = output, errors, list(argv)
            sys.setrecursionlimit(recursion)
            if torch.is_inference_mode_enabled() != inference:  # before gradients, which it switches too
                self.inference_modes.append(torch.inference_mode(inference))
                self.inference_modes[-1].__enter__()
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            torch.set_grad_enabled(gradients)
            torch.set_autocast_enabled("cpu", cpu)
            torch.set_autocast_enabled("cuda", cuda)
            if precision is not None:
                torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic)
            np.seterr(**numpy_errors)
