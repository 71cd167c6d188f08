"""A run on the Hugging Face Hub: a self-contained folder, and its upload.

python -m steadyrl.hub runs/<run name> --to FOLDER              # fill a new folder; no network
python -m steadyrl.hub runs/<run name> --hf-entity ENTITY       # upload an existing run
"""

import dataclasses
import importlib.metadata
import inspect
import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
import tyro

from steadyrl.arguments import (
    OF_A_CALL,
    OPTIONAL_PACKAGES,
    PRIVATE,
    RunArgs,
    check_args,
    check_packages,
    parse_command_line,
    script_name,
)
from steadyrl.errors import UploadError, UsageError, in_one_line
from steadyrl.family import SCRIPTS
from steadyrl.models import saved_models
from steadyrl.output import guard, report, say
from steadyrl.policies import classes_of
from steadyrl.record import load_args, load_record, pins
from steadyrl.run_folder import MODEL, RESULTS, final_result, ours, results_of

# Of a run's folder: regular files of these names. Checkpoints and a user's own files are not uploaded.
UPLOADED = re.compile(
    rf"{MODEL.pattern}|(best_)?model(-\d+)?\.onnx|{RESULTS.pattern}|evaluate(-\d+)?\.json|events\.out\.tfevents\.\d{{10}}\.[\w.-]+\.\d+\.\d+"
)
REPLACED = ("args.json", "*.pt", "*.onnx", "evaluat*.json", "evaluations.csv", "events.out.tfevents.*")  # of an earlier upload
CODE = ("*.py", "*.toml", "py.typed")  # of this package: a downloaded folder can thus evaluate its own model
NOT_IN_COMMAND = OF_A_CALL | PRIVATE - {"init_from"} | {"upload_model", "track"}  # they tell where a run went, not what it is


def repo_id_of(args: RunArgs) -> str:
    """CleanRL's name of a run's repository, [entity/]env_id-exp_name-seed, without what the Hub does not allow in a name."""
    name = re.sub(r"[^\w.]+", "-", f"{args.env_id}-{args.exp_name}-seed{args.seed}")
    return f"{args.hf_entity}/{name}" if args.hf_entity else name


def check_upload(args: RunArgs, what: str = "--upload-model") -> None:
    """Refuse what cannot be uploaded, before training starts. `what` asked for it.

    Raises:
        UsageError: if a package or the token is missing, no model is kept, or the repository's name is not allowed.
    """
    check_args(args)
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id_of(args))
    except HFValidationError as error:
        raise UsageError(f"{what}: {error}") from None
    if get_token() is None:
        raise UsageError(f"{what}: needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def check_finished(run_dir: Path, args: RunArgs) -> None:
    """Raise a UsageError if a run has no model of its own, or if its final evaluation is not that of its models."""
    if not [model for model in saved_models(run_dir) if not model.is_symlink()] or not results_of(run_dir):
        raise UsageError(f"{run_dir}: must hold a model and a final evaluation; a link does not count")
    if final_result(run_dir, vars(args)) is None:
        raise UsageError(f"{run_dir}: has trained on since its final evaluation, must be finished with --resume first")


def command_of(args: RunArgs) -> str:
    """The command that trains this run: every flag that is not at its default."""
    words = ["python", f"{script_name(type(args))}.py"]
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), getattr(type(args)(), field.name)
        flag = field.name.replace("_", "-")
        if field.name in NOT_IN_COMMAND or value == default:
            continue
        elif field.name == "init_from":
            words += [f"--{flag}", Path(value).name]  # not where it is on this machine
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            words += [f"--{flag}", json.dumps(value)]
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def model_card(args: RunArgs, agent_name: str, run_dir: Path, repo_id: str) -> str:
    """README.md of the repository. Its head gives the last final evaluation, in the form that the Hub's leaderboards read."""
    from huggingface_hub import EvalResult, ModelCardData

    settings, result, script = load_record(run_dir), results_of(run_dir)[-1], script_name(type(args))
    reward = f"{result['mean']:.2f} +/- {result['std']:.2f}"
    metadata = ModelCardData(
        model_name=agent_name,
        pipeline_tag="reinforcement-learning",
        tags=[args.env_id, "deep-reinforcement-learning", "reinforcement-learning", "custom-implementation"],
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=args.env_id,
                dataset_name=args.env_id,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=reward,
            )
        ],
    )
    own = "" if script in SCRIPTS else f', script="{script}.py"'
    module = args.env_id.rpartition(":")[0]
    also = (
        f"\nIt also needs the module `{module}`, which registers the environment and is not in this folder.\n" if module else ""
    )
    versions = "\n".join(f"| {name} | {version} |" for name, version in settings["versions"].items())
    return f"""---
{metadata.to_yaml()}
---

# {agent_name} on {args.env_id}

Mean return **{reward}** over {result["episodes"]} greedy episodes of `{result["model"]}`, which was chosen on other starts
(`evaluation*.json`; the evaluations while training are in `evaluations.csv` and in the TensorBoard file).

## Use it

```bash
hf download {repo_id if "/" in repo_id else f"OWNER/{repo_id}"} --local-dir policy
cd policy
pip install -r requirements.txt
python {script}.py --evaluate .
```
{also}
```python
from steadyrl.policies import load_agent

agent, env = load_agent("."{own})
obs, _ = env.reset()
action = agent.act(obs[None])[0]
```

## Train it again

```bash
{command_of(args)}
```

| | version |
|---|---|
{versions}

Trained on {settings["device"]} with {settings["num_threads"]} CPU threads; all settings are in `args.json`.
"""


def licence() -> str:
    """The text of this project's licence: next to the package in a clone, in its metadata where it is installed."""
    beside = Path(__file__).parent.parent / "LICENSE"
    if beside.with_name("pyproject.toml").exists():  # other packages put a LICENSE into site-packages
        return beside.read_text()
    return next(file for file in importlib.metadata.files("steadyrl") or () if file.name == "LICENSE").read_text()


def build_folder(args: RunArgs, agent_name: str, run_dir: Path, repo_id: str, folder: Path) -> None:
    """Fill an empty folder with what is uploaded: the run, its model as safetensors too, a video, the code, a model card."""
    from safetensors.torch import save

    for path in (path for path in ours(run_dir, UPLOADED) if not path.is_symlink()):  # a link may lead anywhere
        shutil.copy(path, folder)
    record = load_record(run_dir)
    public = {name: value for name, value in record["args"].items() if name not in PRIVATE}
    (folder / "args.json").write_text(json.dumps(record | {"args": public}, indent=2) + "\n")
    model = saved_models(folder)[0]
    networks = torch.load(model, map_location="cpu", weights_only=True)
    tensors = {f"{name}.{key}": value for name, network in networks.items() for key, value in network.items()}
    (folder / model.with_suffix(".safetensors").name).write_bytes(save(tensors, {"format": "pt"}))
    places = {Path(args.output).resolve(), run_dir.resolve().parent.parent}
    videos = [path for place in places for path in (place / "videos" / run_dir.resolve().name).glob("*.mp4")]
    videos = [path for path in videos if not path.is_symlink()]
    if videos:  # the latest of an evaluation, or of training if there is none
        latest = max(videos, key=lambda path: (path.name.startswith("evaluat"), path.stat().st_mtime))
        shutil.copy(latest, folder / "replay.mp4")
    shutil.copy(inspect.getfile(type(args)), folder)
    package = Path(__file__).parent
    (folder / package.name).mkdir()
    for path in (path for pattern in CODE for path in package.glob(pattern)):
        shutil.copy(path, folder / package.name)
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins()))
    (folder / "LICENSE").write_text(licence())
    (folder / "README.md").write_text(model_card(args, agent_name, run_dir, repo_id))


def upload(args: RunArgs, agent_name: str, run_dir: Path) -> None:
    """Make the repository, if it is not there, and upload a run to it. Its files replace those of an earlier upload.

    Raises:
        UploadError: if it fails; the run's folder stays as it is.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        repo_id = api.create_repo(repo_id_of(args), exist_ok=True).repo_id  # with the user's name where no entity was given
        with tempfile.TemporaryDirectory() as folder:
            build_folder(args, agent_name, run_dir, repo_id, Path(folder))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=f"Upload {run_dir.resolve().name}",
                delete_patterns=[*REPLACED, "*.safetensors", "replay.mp4"],
            )
    except Exception as error:  # no network, no permission, a full disk: many types
        again = ["python", "-m", "steadyrl.hub", str(run_dir)]
        again += ["--hf-entity", args.hf_entity] if args.hf_entity else []
        again += ["--script", inspect.getfile(type(args))] if script_name(type(args)) not in SCRIPTS else []
        raise UploadError(
            f"{run_dir} is complete but was not uploaded ({in_one_line(error)}), to try again: {shlex.join(again)}"
        ) from error
    say(f"{run_dir} is uploaded: {commit.commit_url}")


@dataclasses.dataclass
class Options:
    """Fill a folder with all that a run needs to be used elsewhere, or upload it to the Hugging Face Hub."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    to: Path | None = None
    """a new folder to make and fill; then nothing is uploaded"""
    hf_entity: str = ""
    """the user or organisation on the Hugging Face Hub (empty: that of your token)"""
    script: Path | None = None
    """the training script, if it is one of your own"""


def main() -> int:
    """The command line; an expected error is one line and its status."""
    guard()
    try:
        options = parse_command_line(Options)
        check_packages("", OPTIONAL_PACKAGES["upload_model"])
        args_class, agent_class = classes_of(options.run, options.script, "--script ")
        args = dataclasses.replace(load_args(options.run, args_class), hf_entity=options.hf_entity, track=False)
        check_finished(options.run, args)
        if options.to is None:
            check_upload(args, f"--hf-entity {args.hf_entity}" if args.hf_entity else str(options.run))
            upload(args, agent_class.__name__, options.run)
            return 0
        try:
            options.to.mkdir()
        except OSError as error:
            raise UsageError(f"--to {options.to}: must be a folder that can be made ({error.strerror})") from None
        try:
            build_folder(args, agent_class.__name__, options.run, repo_id_of(args), options.to)
        except Exception as error:  # a damaged model or record, a full disk: many types
            shutil.rmtree(options.to)
            raise UsageError(f"{options.run}: could not be copied to {options.to} ({in_one_line(error)})") from error
        say(f"{options.run} is copied to {options.to}")
    except (UsageError, UploadError) as error:
        report(error)
        return 1 if isinstance(error, UploadError) else 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
