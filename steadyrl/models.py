"""Saved models: a run's networks, written whole or not at all, and read without running code."""

from functools import partial
from pathlib import Path

import torch

from steadyrl.agent import Agent
from steadyrl.errors import TrainingError, UsageError
from steadyrl.files import replace_file


def saved_models(folder: Path) -> list[Path]:
    """The models in a run folder, the best before the latest."""
    return [path for path in (folder / "best_model.pt", folder / "model.pt") if path.exists()]


def check_weights(agent: Agent) -> None:
    """Raise a TrainingError if a weight is not finite, before anything good is overwritten."""
    for name, network in agent.networks.items():
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise TrainingError(f"the weights of {name} are not finite: the models saved before are kept")


def save_model(agent: Agent, path: Path) -> None:
    """Write the networks so that a reader finds the old file or the whole new one, never a part.

    Raises:
        TrainingError: if a weight is not finite; the file stays as it was.
    """
    check_weights(agent)
    replace_file(path, partial(torch.save, {name: network.state_dict() for name, network in agent.networks.items()}))


def load_model(agent: Agent, path: Path) -> None:
    """Load what `save_model` wrote; `weights_only` keeps a forged file from running code.

    Raises:
        UsageError: if the file is damaged or of other networks than the agent's.
    """
    try:
        # To the CPU first: copying from there waits until it is done. A captured `act` reads the networks on another stream.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, network in agent.networks.items():
            network.load_state_dict(saved[name])
    except Exception as error:  # zip, pickle, key and shape errors, depending on where the damage is
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a whole model of this environment and network size ({reason})") from error
