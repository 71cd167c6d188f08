"""A trained policy outside its run: in your own code, or as an ONNX file."""

import contextlib
import dataclasses
import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from training.arguments import Args
from training.environments import make_env
from training.errors import UsageError
from training.files import replace_file, unused
from training.models import load_model, saved_models
from training.setup import script_name

SCRIPTS = Path(__file__).parent.parent  # the folder that training/ and the scripts are in


def load_settings(run_dir: Path) -> dict[str, Any]:
    """What args.json of a run holds.

    Raises:
        UsageError: if the folder is not a run's.
    """
    try:
        settings = json.loads((run_dir / "args.json").read_text())
        return settings | {"args": dict(settings["args"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run_dir}: must be the folder of a run, with a readable args.json ({error!r})") from None


def load_args(run_dir: Path, args_class: type) -> Args:
    """The arguments a run was started with.

    Raises:
        UsageError: if the folder is not a run's, or is one of another script.
    """
    settings, script = load_settings(run_dir), script_name(args_class)
    if settings.get("script", script) != script:
        raise UsageError(f"{run_dir}: is a run of {settings['script']}.py, must be one of {script}.py")
    names = {field.name for field in dataclasses.fields(args_class)}
    for name in sorted(settings["args"].keys() - names):
        print(f"{run_dir}: this version of {script}.py has no --{name.replace('_', '-')}; it was {settings['args'][name]}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings["args"].items()}
    return args_class(**{name: value for name, value in values.items() if name in names})


def load_agent(run_dir: str | Path, device: str | torch.device = "cpu", render_mode: str | None = None) -> tuple[Any, gym.Env]:
    """The agent of a run, and a new environment of the kind that it was trained on.

    `agent.act(obs)` takes (N, O) float32 observations and gives N greedy actions. It has the networks of the best
    evaluation, or the latest where there was none. The environment has the wrappers of training: its observations and
    actions are vectors, as the agent's are.

    Args:
        run_dir: the run's folder.
        device: where the networks shall live.
        render_mode: of the environment, as for gymnasium.make.

    Raises:
        UsageError: if the folder is not a run's, or holds no whole model.
    """
    run_dir = Path(run_dir)
    name = load_settings(run_dir).get("script")
    if name not in [path.stem for path in SCRIPTS.glob("*.py")]:  # a forged args.json shall not run other code
        raise UsageError(f'{run_dir}: its args.json must name a script of {SCRIPTS} as "script", and it says {name!r}')
    script = importlib.import_module(name).main
    args = load_args(run_dir, script.args_class)
    env = make_env(args, render_mode=render_mode).env  # without the wrapper that resumes, which drops the infos
    agent = script.agent_class(env.observation_space, env.action_space, args, torch.device(device))
    models = saved_models(run_dir)
    if not models:
        raise UsageError(f"{run_dir}: must hold a best_model.pt or a model.pt")
    load_model(agent, models[0])
    return agent, env


class GreedyPolicy(torch.nn.Module):
    """What `agent.act` computes, as torch's exporter takes it; a Box of actions is never left.

    (The agent's own bounds hold in torch: in onnxruntime, a tanh can be above 1 by a rounding error.)
    """

    def __init__(self, agent: Any, action_space: gym.Space):
        super().__init__()
        self.networks = torch.nn.ModuleDict(agent.networks)  # gives their parameters names
        self.policy, self.bounded = agent.policy, isinstance(action_space, gym.spaces.Box)
        if self.bounded:
            self.register_buffer("low", torch.as_tensor(action_space.low, dtype=torch.float32, device=agent.device))
            self.register_buffer("high", torch.as_tensor(action_space.high, dtype=torch.float32, device=agent.device))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        action = self.policy(observation)
        return action.clamp(self.low, self.high) if self.bounded else action


def export_onnx(agent: Any, env: gym.Env, model: Path) -> Path:
    """Write the greedy policy as an ONNX file beside the model that the agent has loaded, and say so.

    Its input, "observation", is (batch, O) float32, for any batch; its output, "action", is what `agent.act` gives for it.

    Returns:
        the file, a new one.
    """
    observations = torch.zeros(2, *env.observation_space.shape, device=agent.device)
    with quiet_exporter():
        program = torch.onnx.export(
            GreedyPolicy(agent, env.action_space).eval(),
            (observations,),
            dynamo=True,
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    place = unused(model.with_suffix(".onnx"))
    replace_file(place, lambda file: file.write(program.model_proto.SerializeToString()))
    print(f"{model.name} is exported to {place}")
    return place


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what torch's exporter says of itself: torchvision is not installed, something of its own is deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
