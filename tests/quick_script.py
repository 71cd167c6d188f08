"""Stands in for a training script where the sweep is tested and not the training: it starts in no time.

    python quick_script.py ARGUMENTS         # as JSON: the "args" of its args.json
    python quick_script.py --resume FOLDER

"does" of the arguments says what it does: "finish", "fail", "die" (by SIGKILL), or "wait" for SIGTERM, which a resumed run
does not. "hang" is a "wait" that leaves without a checkpoint and does so also when it is resumed. It writes its process
number to `started` and, if it waits, goes on from SIGTERM only when there is a file `go`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import filelock

if sys.argv[1] == "--resume":
    folder = Path(sys.argv[2])
    args = json.loads((folder / "args.json").read_text())["args"]
else:
    args = json.loads(sys.argv[1])
    folder = Path("runs", f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{time.time_ns()}")
    (folder / "checkpoints").mkdir(parents=True)
resumed = sys.argv[1] == "--resume"
does = args["does"]
stops: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
with filelock.FileLock(folder / ".lock"), open("started", "a") as started:
    (folder / "args.json").write_text(json.dumps({"args": args}))
    print(f"{os.getpid()}", file=started, flush=True)
    print("a line before the end", flush=True)
    if does == "fail":
        sys.exit("error: it failed")
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "hang" or (does == "wait" and not resumed):
        while not (stops and Path("go").exists()):
            time.sleep(0.01)
        if does == "wait":
            (folder / "checkpoints" / f"{len(stops):012d}.{'0' * 64}.pt").touch()
        sys.exit(143)
    (folder / "evaluation.json").write_text(json.dumps({"mean": 1.5, "global_step": args["total_timesteps"], "date": ""}))
