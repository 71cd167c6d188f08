"""What the tests share: quick runs of the scripts, and the toy environments, which importing this registers."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import toys  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpg_continuous_action as ddpg
import dqn
import sac_continuous_action as sac
import td3_continuous_action as td3

ROOT = Path(__file__).parent.parent
AGENTS = {ddpg: "DDPG", td3: "TD3", sac: "SAC", dqn: "DQN"}  # the scripts and the names of their agents


class Crash(Exception):
    """What ends a run of this process as SIGKILL would: nothing is saved."""


def crash() -> None:
    raise Crash


def quick_args(script=ddpg, **changes):
    """Arguments of a run of a script that takes a second."""
    values = {
        "env_id": "Pendulum-like-v0",
        "total_timesteps": 300,
        "learning_starts": 250,
        "buffer_size": 1000,
        "batch_size": 16,
        "hidden_sizes": (32, 32),
        "eval_frequency": 0,
        "final_episodes": 2,
        "cuda": False,
        "episode_replay": "plain",  # not found out anew for each run
    }
    return script.Args(**(values | changes))


def spaces_of(script, num_actions: int = 1) -> tuple[gym.Space, gym.Space]:
    """Pendulum-v1's, or CartPole-v1's for discrete actions: what one test compiled, others find in torch's cache."""
    observations = gym.spaces.Box(-np.inf, np.inf, (4 if script is dqn else 3,), np.float32)
    return observations, gym.spaces.Discrete(2) if script is dqn else gym.spaces.Box(-2, 2, (num_actions,), np.float32)


def agent_of(script, num_actions: int = 1, device: str = "cpu", **changes):
    """The agent of a script, always with the same networks."""
    torch.manual_seed(0)
    args, spaces = quick_args(script, **changes), spaces_of(script, num_actions)
    return script.main.agent_class(*spaces, args, torch.device(device))


def idle(script=ddpg) -> type:
    """The agent of a script, that acts and never learns."""
    return type("Idle", (script.main.agent_class,), {"update": lambda self, *values, **named: {}})


def drop_biases(monkeypatch, script) -> None:
    """Give a script's networks no biases before their normalisation. Before batch normalisation a bias has no effect; its
    gradient is rounding, of which Adam makes full steps, so that two ways of computing the same would differ."""

    def without_biases(*args):
        layers = hidden_layers(*args)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.bias = None
        return layers

    hidden_layers = script.hidden_layers
    monkeypatch.setattr(script, "hidden_layers", without_biases)


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each scalar in a run's event file."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
