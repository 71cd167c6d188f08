"""Scripts in processes of their own, which do not spend two seconds on importing PyTorch: forks of one that has imported it.

A fork becomes what `python SCRIPT ARGUMENTS` would be: with the working directory, the environment variables and the files
that it was told, it runs the script as the main module and ends as an interpreter does. Only what is imported here, and what
an interpreter does before it runs a script, is not done again.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


@functools.cache
def server() -> subprocess.Popen:
    """The process that is forked. It ends with this one, which closes its standard input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_script(
    script: Path, *arguments: str, cwd: Path, new_session: bool = False, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script until it ends, with the environment variables of this process and these.

    Args:
        new_session: signals to its group do not reach the tests.
        fresh: in an interpreter that was started for it.
    """
    command = [str(script), *arguments]
    if fresh:
        options: dict[str, Any] = {"cwd": cwd, "env": os.environ | environment, "start_new_session": new_session}
        return subprocess.run([sys.executable, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.devnull, f"{folder}/stdout", f"{folder}/stderr"]
        request = {"argv": command, "cwd": str(cwd), "files": files, "new_session": new_session}
        process = server()
        assert process.stdout is not None
        print(json.dumps(request | {"environment": os.environ | environment}), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(Path(file).read_text() for file in files[1:]))


def serve() -> dict:
    """Answer each request with the exit status of a fork. The fork returns, with its request."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    for name in ("stable_baselines3.common.buffers", "torch._inductor.compile_fx", "torch.utils.tensorboard", "tyro"):
        importlib.import_module(name)
    gc.freeze()
    request = serve()
    if request["new_session"]:
        os.setsid()
    for number, file in enumerate(request["files"]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(sys.argv[0], run_name="__main__")
