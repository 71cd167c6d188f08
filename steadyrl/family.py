"""The scripts: where they are, and which flags were removed from them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

SCRIPTS = ("ddpg_continuous_action", "td3_continuous_action", "sac_continuous_action", "dqn")
FOLDER = Path(__file__).resolve().parent.parent  # where they are, in a clone as where they are installed


class Removed(NamedTuple):
    """A flag that a script no longer has, or one value of a flag."""

    went: str  # where it is now
    harmless: tuple[Any, ...] | None = ()  # saved values with which a run of the version before goes on (None: any)


TD3 = "it is now a flag of td3_continuous_action.py"
EXPECTILE = {
    "critic_loss expectile": Removed("it was an experiment: two critics, in td3_continuous_action.py, do better"),
    "expectile": Removed("it was an experiment: two critics, in td3_continuous_action.py, do better", harmless=None),
}
REMOVED = {
    "ddpg_continuous_action": EXPECTILE
    | {
        "num_critics": Removed("two critics are in td3_continuous_action.py", harmless=(1,)),
        "policy_noise": Removed(TD3, harmless=(0,)),
        "noise_clip": Removed(TD3, harmless=None),
    },
    "sac_continuous_action": EXPECTILE,
}


def removed(script: str, flag: str, value: Any) -> Removed | None:
    """What is known of a flag with this value, if the script no longer has it."""
    flags = REMOVED.get(script, {})
    return flags.get(f"{flag} {value}") or flags.get(flag)


def is_harmless(script: str, flag: str, value: Any) -> bool:
    """Whether this is a value of a removed flag that did not change what the script did."""
    gone = removed(script, flag, value)
    return gone is not None and (gone.harmless is None or value in gone.harmless)


def find_script(script: Path) -> Path:
    """The absolute path of a script: one that exists, or the one of this project that has its name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if not script.exists() and script.stem in SCRIPTS and script.parent == Path("."):
        script = FOLDER / f"{script.stem}.py"
    return script.resolve(strict=True)


def import_script(path: Path) -> ModuleType:
    """A script as a module, under its own name. As when it is run, it can import modules from its folder."""
    loaded = sys.modules.get(path.stem)
    if loaded is not None and loaded.__file__ and Path(loaded.__file__).resolve() == path:
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(path.stem, None)  # half of a module would hide this error the next time
        raise
    return module
