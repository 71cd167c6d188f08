"""A real SLURM of one node for the tests, on this machine: python tests/one_node_slurm.py FOLDER

Debian and Ubuntu: apt-get install slurm-wlm munge. It keeps to its folder and to free ports, so several can run beside one
another, and accepts more cores than there are. Partition "low" is the default; jobs of "high" preempt its jobs, which have
ten seconds to leave and are queued again. Nothing of it outlives it. Without the packages it says "skipped".
"""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MaxArraySize={array_size}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=100000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off State=UP
"""


def missing() -> list[str]:
    """The programs of SLURM that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on; none that the kernel gives to connections, which could be taken before they are used."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < number:
            port, one = random.randrange(20_000, 30_000), stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def start_daemon(*command: str | Path) -> None:
    """Start a daemon, which puts itself in the background.

    Raises:
        RuntimeError: with what it printed, if it does not start.
    """
    path = f"{os.environ['PATH']}:/usr/sbin"
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open for as long as the daemon lives
        files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, env=os.environ | {"PATH": path}, timeout=60, **files)
        if done.returncode:
            output.seek(0)
            raise RuntimeError(f"{command[0]}: {output.read()}")


def ask_slurm(*command: str) -> str:
    """What a command of SLURM prints; nothing, if SLURM does not answer."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    return ""


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until `condition()` is true.

    Raises:
        TimeoutError: after that many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} is not true after {seconds} seconds")
        time.sleep(0.1)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, even if nobody has asked for its status yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def stop_daemon(pid_file: Path, number: int = signal.SIGTERM) -> None:
    """End the daemon of this pid file, and wait until it is gone; after half a minute it is killed."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int(pid_file.read_text()))
        process.send_signal(number)
        try:
            wait_for(lambda: is_gone(process), 30)
        except TimeoutError:
            process.kill()


def jobs_of_slurm(state: str = "all") -> list[str]:
    """The numbers of the jobs that SLURM has in a state."""
    words = ["squeue", "--noheader", "--array", f"--states={state}" if state != "all" else "--me", "--format=%i"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.split()


def kill_the_rest(configuration: Path) -> None:
    """Kill the processes of jobs that SLURM no longer knows: those that have its configuration in their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(configuration):
                process.kill()


def start_slurmd(folder: Path) -> None:
    """Start the node's daemon, also again after it was killed."""
    start_daemon("slurmd", "-f", folder / "slurm.conf")


@contextlib.contextmanager
def one_node_slurm(folder: Path, cpus: int = 4, array_size: int = 1001) -> Iterator[None]:
    """SLURM for as long as the context lasts, found by its commands through SLURM_CONF. Its jobs end with it."""
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged refuses a folder that others may write to
    host = socket.gethostname().split(".")[0]
    values = {"folder": folder, "host": host, "user": getpass.getuser(), "cpus": cpus, "array_size": array_size}
    text = CONFIGURATION.format(**values, ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    previous = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    try:
        start_daemon("munged", "--force", f"--socket={folder}/munge.socket", *files)
        start_daemon("slurmctld", "-f", folder / "slurm.conf")
        start_slurmd(folder)
        wait_for(lambda: "idle" in ask_slurm("sinfo", "-h", "-o", "%T"))
        yield
    finally:
        ask_slurm("scancel", "--me", "--signal=KILL")
        ask_slurm("scancel", "--me")
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not ask_slurm("squeue", "-h"), 60)
        for name in ("slurmd", "slurmctld", "munge"):
            stop_daemon(folder / f"{name}.pid")
        kill_the_rest(folder / "slurm.conf")
        os.environ.pop("SLURM_CONF")
        if previous is not None:
            os.environ["SLURM_CONF"] = previous


if __name__ == "__main__":
    if missing():
        print(f"skipped: {', '.join(missing())} not found, install slurm-wlm and munge")
        sys.exit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_node_slurm(Path(sys.argv[1])):
        print(f"SLURM runs until Ctrl-C; export SLURM_CONF={Path(sys.argv[1]).resolve()}/slurm.conf", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
