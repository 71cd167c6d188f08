"""Run the script and signal it from within at an exact moment: python killed.py FUNCTION N SIGNALS [its arguments].

FUNCTION is one of the names in `MOMENTS`; at its N-th call, counted from 1, each of SIGNALS ("KILL", "TERM,TERM") is
sent to this process, or to its group ("GROUP-INT", as Ctrl-C does). With N = 0 nothing happens. The environment variable
SCRIPT names another script than DDPG's.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from steadyrl import checkpoints, evaluation, run  # noqa: E402

script = importlib.import_module(os.environ.get("SCRIPT", "ddpg_continuous_action"))
MOMENTS = {
    "step": (script.ReplayBuffer, "add"),
    "update": (script.main.agent_class, "update"),
    "write": (checkpoints, "new_file"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "evaluate": (run, "evaluate"),
    "final": (evaluation, "load_model"),
    "episode": (script.main.agent_class, "value"),
}


def signal_at_call(owner: object, name: str, number: int, signals: str) -> None:
    function, calls = getattr(owner, name), 0

    def counted(*values, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            for sent in signals.split(","):
                target = -os.getpgrp() if sent.startswith("GROUP-") else os.getpid()
                os.kill(target, getattr(signal, f"SIG{sent.removeprefix('GROUP-')}"))
        return function(*values, **named)

    setattr(owner, name, counted)


if __name__ == "__main__":
    moment, number, signals = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    signal_at_call(*MOMENTS[moment], number, signals)
    sys.argv[1:] = sys.argv[4:]
    script.main()
