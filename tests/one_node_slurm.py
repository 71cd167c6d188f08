"""A real SLURM of one node for the tests, on this machine: python tests/one_node_slurm.py FOLDER

Debian and Ubuntu: apt-get install slurm-wlm munge. It keeps to its folder and to free ports, so it disturbs no other SLURM,
and accepts more cores than there are. Partition "low" is the default; jobs of "high" preempt its jobs, which have ten
seconds to leave and are queued again. Without the packages it says "skipped".
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off State=UP
"""


def missing() -> list[str]:
    """The programs of SLURM that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_daemon(*command: str | Path) -> None:
    """Start a daemon, which puts itself in the background.

    Raises:
        RuntimeError: with what it printed, if it does not start.
    """
    path = f"{os.environ['PATH']}:/usr/sbin"
    done = subprocess.run(command, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr}")


def wait_for(condition, seconds: float = 300) -> None:
    """Wait until `condition()` is true.

    Raises:
        TimeoutError: after that many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} is not true after {seconds} seconds")
        time.sleep(0.1)


def stop_daemon(pid_file: Path, number: int = signal.SIGTERM) -> None:
    """End the daemon of this pid file, and wait until it is gone."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, number)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())


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
        wait_for(lambda: b"idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True).stdout)
        yield
    finally:
        subprocess.run(["scancel", "--me", "--signal=KILL"], capture_output=True)
        subprocess.run(["scancel", "--me"], capture_output=True)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout)
        for name in ("slurmd", "slurmctld", "munge"):
            stop_daemon(folder / f"{name}.pid")
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
