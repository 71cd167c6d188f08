"""A trained policy outside its run: in your own code, or as an ONNX file."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from steadyrl.agent import Agent
from steadyrl.arguments import RunArgs
from steadyrl.device import Defaults
from steadyrl.environments import make_replayable_env
from steadyrl.errors import UsageError, in_one_line
from steadyrl.family import FOLDER, SCRIPTS, find_script, import_script
from steadyrl.files import write_new
from steadyrl.models import load_model, saved_models
from steadyrl.output import say
from steadyrl.record import load_args, load_record


def classes_of(run_dir: Path, script: str | Path | None, option: str) -> tuple[type[RunArgs], type[Agent]]:
    """The classes of a run's arguments and of its agent.

    Args:
        script: the training script, if it is one of the user's own.
        option: how the caller's user gives that script.

    Raises:
        UsageError: if it is not given and not known, or is not a training script.
    """
    name = load_record(run_dir).get("script")
    if script is None and name not in SCRIPTS:  # a forged args.json must not run other code
        known = ", ".join(SCRIPTS)
        raise UsageError(f"{run_dir}: its args.json names the script {name!r}, must be one of {known}, or give {option}PATH")
    try:
        main = import_script(find_script(Path(script)) if script else FOLDER / f"{name}.py").main
        return main.args_class, main.agent_class
    except (Exception, SystemExit) as error:  # whatever is in the file
        raise UsageError(f"{option}{script or name}: must be a training script ({in_one_line(error)})") from error


def load_agent(
    run_dir: str | Path,
    device: str | torch.device = "cpu",
    render_mode: str | None = None,
    script: str | Path | None = None,
) -> tuple[Agent, gym.Env]:
    """The agent of a run, and a new environment of the kind that it was trained on.

    `agent.act(obs)` takes (N, O) observations, or a single one, and gives greedy actions. It has the networks of the best
    evaluation, or the latest where there was none. The environment has the wrappers of training: its observations and
    actions are vectors, as the agent's are.

    Args:
        run_dir: the run's folder.
        device: where the networks live.
        render_mode: of the environment, as for gymnasium.make.
        script: the training script, if it is one of your own. It is executed like a program.

    Raises:
        UsageError: if the folder is not a run's, or holds no complete model, or the script is not known.
        EnvError: if the environment cannot be made.
    """
    run_dir = Path(run_dir)
    args_class, agent_class = classes_of(run_dir, script, "script=")
    args = load_args(run_dir, args_class)
    with Defaults():
        env = make_replayable_env(args, render_mode=render_mode).env  # without the wrapper that resumes, which drops the infos
    agent = agent_class(env.observation_space, env.action_space, args, torch.device(device))
    models = saved_models(run_dir)
    if not models:
        raise UsageError(f"{run_dir}: must hold a best_model.pt or a model.pt")
    load_model(agent, models[0])
    return agent, env


class GreedyPolicy(torch.nn.Module):
    """What `agent.act` computes, in a form for torch's exporter. Actions never leave the bounds of a Box.

    (The agent's own bounds hold in torch: in onnxruntime, a tanh can be above 1 by a rounding error.)
    """

    bounds: torch.Tensor

    def __init__(self, agent: Agent, action_space: gym.Space):
        super().__init__()
        self.networks = torch.nn.ModuleDict(agent.saved_modules)  # gives their parameters names
        self.normalizer = agent.observation_normalizer
        self.policy, bounds = agent.policy, np.empty(0)
        if isinstance(action_space, gym.spaces.Box):
            bounds = np.stack([action_space.low, action_space.high]).astype(np.float32)
        self.register_buffer("bounds", torch.as_tensor(bounds, device=agent.device))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        action = self.policy(self.normalizer(observation) if self.normalizer else observation)
        return action.clamp(*self.bounds) if len(self.bounds) else action


def export_onnx(agent: Agent, env: gym.Env, model: Path) -> Path:
    """Write the greedy policy as an ONNX file next to the model that the agent has loaded, and say so.

    Its input, "observation", is (batch, O) float32, for any batch; its output, "action", is what `agent.act` gives for it.

    Returns:
        the file, a new one.
    """
    observations = torch.zeros(2, *(env.observation_space.shape or ()), device=agent.device)
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
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    content = program.model_proto.SerializeToString()
    place = write_new(model.with_suffix(".onnx"), lambda file: file.write(content))
    say(f"{model.name} is exported to {place}")
    return place


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide what torch's exporter prints about itself: torchvision is not installed, something of its own is deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
