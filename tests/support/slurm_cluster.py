"""A whole Slurm cluster on this machine: munged, slurmctld, and a slurmd per virtual node, in a folder of its own.

    python tests/support/slurm_cluster.py FOLDER [--nodes 2]

starts one, prints the variable that Slurm's commands need, and stops it at Ctrl-C. Every slurmd lives in a process
namespace of its own, so that stopping it ends all that its jobs started, as a machine does that loses its power.
Needs root, and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.clean_environment import without_ranks
from titans_ds.zero.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "unshare")
IN_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_CONFIG = """ClusterName=titans
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def why_not() -> str | None:
    """Why no cluster can run here, or None where one can."""
    if os.environ.get("CI") and not os.environ.get("TITANS_SLURM"):
        return (
            "its daemons and deadlines are too much beside other tests on two cores; TITANS_SLURM=1 runs it in CI, too"
        )
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}; apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    allowed = subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, text=True)
    return None if allowed.returncode == 0 else f"no process namespaces here: {allowed.stderr.strip()}"


@dataclass
class Cluster:
    """A cluster that runs.

    Args:
        folder: of its configuration, logs and state.
        daemons: by name: munged, slurmctld, node1, node2, …
    """

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need beside their own environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """A command of Slurm's (or any other) against this cluster; what it prints."""
        done = subprocess.run(
            command, cwd=cwd, env={**without_ranks(), **self.environment, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows about a job: JobState, Restarts, Reason, …"""
        text = self.run("scontrol", "show", "job", number)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """The job, once it is in one of the states."""
        limit = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < limit, f"job {number} is {job['JobState']} ({job['Reason']}), not {states}"
            time.sleep(0.2)
        return job

    def wait_idle(self, count: int, seconds: float = 180) -> None:
        """Until so many nodes are idle: nothing of a job that has ended is left on them."""
        self._wait_until(lambda: self._idle() == count, "an idle node", seconds)

    def stop_node(self, name: str) -> None:
        """End a node (node1, node2, …) and all that runs on it, at once."""
        daemon = self.daemons.pop(name)
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        for child in children:  # the first process of the namespace: all others go with it
            os.kill(int(child), signal.SIGKILL)
        daemon.wait(timeout=180)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
            given = {**without_ranks(), **self.environment, "PATH": path}
            self.daemons[name] = subprocess.Popen(
                command, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def _start_all(self, nodes: int) -> None:
        munge = self.folder / "munge"
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self._wait_until(lambda: (munge / "socket").exists(), "munged")
        self._start("slurmctld", "slurmctld", "-D")
        for number in range(1, nodes + 1):
            self._start(f"node{number}", *IN_NAMESPACE, "slurmd", "-D", "-N", f"node{number}")
        self._wait_until(lambda: self._idle() == nodes, "slurmctld")

    def _idle(self) -> int:
        given = {**without_ranks(), **self.environment}
        done = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=given, capture_output=True, text=True)
        return int(done.stdout.strip() or 0) if done.returncode == 0 else 0

    def _wait_until(self, ready: Callable[[], bool], name: str, seconds: float = 180) -> None:
        limit = time.monotonic() + seconds
        while not ready():
            logs = "".join(p.read_text()[-1500:] for p in self.folder.glob("*.out"))
            assert time.monotonic() < limit, f"no {name} in {seconds:.0f} s: {logs}"
            time.sleep(0.1)

    def _stop_all(self) -> None:
        for name in list(self.daemons):
            if name.startswith("node"):
                self.stop_node(name)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            daemon.wait(timeout=180)


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """A cluster of virtual nodes node1, node2, … on this machine, stopped at the end with all its jobs.

    Slurm's commands find it through the variables in `Cluster.environment`. There is no accounting, hence no sacct.

    Args:
        folder: made; a short path, since it holds a socket.
        nodes: virtual nodes.
        cpus: that each of them claims to have.
    """
    for name in ("state", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    host, ports = socket.gethostname(), [free_port() for _ in range(nodes + 1)]
    lines = [
        f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs={cpus}"
        for n in range(1, nodes + 1)
    ]
    text = _CONFIG.format(host=host, control_port=ports[0], folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(text)
    cluster = Cluster(folder)
    try:
        cluster._start_all(nodes)
        yield cluster
    finally:
        cluster._stop_all()


def main() -> int:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with slurm_cluster(options.folder.resolve(), options.nodes) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(*(f"export {k}={v}" for k, v in cluster.environment.items()), sep="\n", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
