"""Saved models: a run's networks, written completely or not at all, and read without running code."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steadyrl.agent import Agent
from steadyrl.errors import TrainingError, UsageError
from steadyrl.files import replace_file

Weights = dict[str, dict[str, Any]]  # the state of each network, by its name


def saved_models(folder: Path) -> list[Path]:
    """The models in a run folder, the best before the latest."""
    return [path for path in (folder / "best_model.pt", folder / "model.pt") if path.exists()]


def choose_model(folder: Path, choice: str | None) -> Path | None:
    """The model in a run folder that --model names: best, latest, or a file; the best before the latest if it is None.

    Raises:
        UsageError: if there is none of this name.
    """
    if choice is None:
        return next(iter(saved_models(folder)), None)
    place = {"best": folder / "best_model.pt", "latest": folder / "model.pt"}.get(choice, Path(choice))
    if not place.is_file():
        raise UsageError(f"--model {choice}: must be best, latest or a file, and there is no file {place}")
    return place


def not_finite(agent: Agent) -> str | None:
    """The name of a network with a weight that is not finite, if there is one."""
    for name, network in agent.saved_modules.items():
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            return name
    return None


def check_weights(agent: Agent) -> None:
    """Raise a TrainingError if a weight is not finite, before anything good is overwritten."""
    if name := not_finite(agent):
        raise TrainingError(f"the weights of {name} are not finite: the models saved before are kept")


def weights_of(agent: Agent) -> Weights:
    """A copy of the weights of all networks.

    Raises:
        TrainingError: if one is not finite.
    """
    check_weights(agent)
    return {name: copy.deepcopy(network.state_dict()) for name, network in agent.saved_modules.items()}


def save_weights(weights: Weights, path: Path) -> None:
    """Write a model so that a reader finds the old file or the whole new one, never a part."""
    replace_file(path, partial(torch.save, weights))


def save_model(agent: Agent, path: Path) -> None:
    """Write an agent's model. Raises a TrainingError if a weight is not finite; the file stays as it was."""
    save_weights(weights_of(agent), path)


def load_initial_model(agent: Agent, run_dir: str, model: Path) -> None:
    """Load the model of the run that --init-from names.

    Raises:
        UsageError: as `load_model`.
    """
    try:
        load_model(agent, model)
    except UsageError as error:
        raise UsageError(f"--init-from {run_dir}: {error}") from error


def bounds_of(agent: Agent) -> dict[str, torch.Tensor]:
    """Copies of the buffers of an agent's networks that hold the bounds of its actions."""
    buffers = {f"{part}.{name}": tensor for part, net in agent.networks.items() for name, tensor in net.named_buffers()}
    return {name: tensor.clone() for name, tensor in buffers.items() if name.endswith(("action_scale", "action_bias"))}


def check_bounds(agent: Agent, bounds: dict[str, torch.Tensor], what: object) -> None:
    """Refuse networks that were loaded if they are of an environment whose actions have other bounds.

    Args:
        bounds: `bounds_of` the agent as it was made.
        what: where the networks come from.

    Raises:
        UsageError: naming it.
    """
    # Older versions computed them in float32: the last bit may differ.
    if not all(torch.allclose(tensor, bounds[name]) for name, tensor in bounds_of(agent).items()):
        raise UsageError(f"{what}: its actions have other bounds, must have those of this environment")


def load_model(agent: Agent, path: Path) -> None:
    """Load what `save_model` wrote; `weights_only` keeps a forged file from running code.

    Raises:
        UsageError: if the file is damaged, or holds other networks than the agent's, or for actions with other bounds.
    """
    bounds = bounds_of(agent)
    try:
        # To the CPU first: copying from there waits until it is done. A captured `act` reads the networks on another stream.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if set(saved) != set(agent.saved_modules):  # with a normaliser and without it, for example
            raise KeyError(f"it holds {', '.join(saved)}, must hold {', '.join(agent.saved_modules)}")
        for name, network in agent.saved_modules.items():
            network.load_state_dict(saved[name])
    except Exception as error:  # zip, pickle, key and shape errors, depending on where the damage is
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a complete model for this environment and network size ({reason})") from error
    if weights := not_finite(agent):
        raise UsageError(f"{path}: must hold finite weights, those of {weights} are not")
    check_bounds(agent, bounds, path)
