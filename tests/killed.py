"""Run the script and SIGKILL it from within at an exact moment: python killed.py FUNCTION N [the script's arguments].

FUNCTION is one of the names in `MOMENTS`; the N-th call of it, counted from 1, does not return. With N = 0 nothing dies.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import ddpg_continuous_action as ddpg  # noqa: E402

MOMENTS = {
    "step": (ddpg.ReplayBuffer, "add"),
    "update": (ddpg.DDPG, "update"),
    "write": (ddpg, "write_array"),
    "fsync": (ddpg.os, "fsync"),
    "rename": (ddpg.Path, "rename"),
    "evaluate": (ddpg, "evaluate"),
}


def die_at_call(owner: object, name: str, number: int) -> None:
    function, calls = getattr(owner, name), 0

    def counted(*values, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*values, **named)

    setattr(owner, name, counted)


if __name__ == "__main__":
    moment, number = sys.argv[1], int(sys.argv[2])
    die_at_call(*MOMENTS[moment], number)
    sys.argv[1:] = sys.argv[3:]
    ddpg.main()
