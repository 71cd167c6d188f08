"""What is set once in a process before networks are made: the device, threads, precision and determinism of PyTorch."""

import os

import numpy as np
import torch

from steadyrl.arguments import RunArgs


def set_up_device(args: RunArgs) -> torch.device:
    """Set the process up as the flags say. Returns the device, and says so if there is no CUDA device."""
    set_defaults(args)
    if args.cuda and not torch.cuda.is_available():
        print("no CUDA device found, using the CPU")
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def set_defaults(args: RunArgs) -> None:
    """What holds for the whole process, and what an environment may have changed."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")
    torch.set_num_threads(args.num_threads or min(2, torch.get_num_threads()))
    torch.set_float32_matmul_precision(args.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a workspace of fixed size for the next line
    torch.use_deterministic_algorithms(args.torch_deterministic)
    # Filling new memory costs time, and all memory is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch sets it on the module's class
