"""Checksums that are the same for two runs that ended with the same bits."""

import hashlib
import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steadyrl import checkpoints


def sha(value) -> str:
    """SHA-256 of a nested structure of tensors, arrays and plain values."""
    digest = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, dict):
            for name in sorted(value, key=str):
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(value.cpu().numpy().tobytes())
        elif hasattr(value, "tobytes"):
            digest.update(value.tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of the parts of a finished run: weights, optimisers, replay, environments, scalars, evaluations, results."""
    state = checkpoints.load_checkpoint(run_dir / "checkpoints")
    assert state is not None
    run = {name: value for name, value in state["run"].items() if name not in ("elapsed", "settings")}
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS"
    }
    parts = {
        "weights": state["agent"]["networks"],
        "optimizers": state["agent"]["optimizers"],
        "replay": state["replay_buffer"],
        "random": [state["random"], state["others"].get("noise")],
        "environments": state["environments"],
        "run": run,
        "scalars": scalars,
        "evaluations": (run_dir / "evaluations.csv").read_text(),
        "result": json.loads((run_dir / "evaluation.json").read_text())["returns"],
        "models": [torch.load(run_dir / name, weights_only=True) for name in ("model.pt", "best_model.pt")],
    }
    return {name: sha(part) for name, part in parts.items()}
