"""Nodes on one machine: each with its own network, host name, processes and sshd, as Linux namespaces give them.

    python tests/support/namespaces.py FOLDER [--nodes 2]

starts them, prints how to run a command on one, and stops them at Ctrl-C. The nodes node1, node2, … have the addresses
10.77.0.1, 10.77.0.2, … on eth0, joined by a bridge, and share the machine's files. Every one knows the others by name,
and root logs in from one to another by ssh without a password. What a node runs ends with it, as when its power fails.
Needs root; Debian's packages openssh-server and iproute2; pdsh for DeepSpeed's own launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.clean_environment import without_ranks

SECONDS = 180.0  # to wait for what takes one on a quiet machine
PROGRAMS = ("ip", "ssh", "sshd", "ssh-keygen", "unshare", "nsenter", "hostname")
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
ISOLATED = ("unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
_SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 100
"""
_SSH = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
# What the first process of a node does. Its own files lie over those of the machine, which stay as they are.
_INIT = """set -e
mount --make-rprivate /
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mkdir -p /run/sshd ~/.ssh
mount -t tmpfs ssh ~/.ssh
cp {folder}/ssh_config ~/.ssh/config
ip link set lo up
echo ready
exec "$(command -v sshd)" -D -e -f {folder}/sshd_config
"""


def why_not(*programs: str) -> str | None:
    """Why no nodes can be made here, or None where they can; `programs` must be installed as well."""
    missing = [name for name in (*PROGRAMS, *programs) if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}; apt-get install pdsh openssh-server openssh-client iproute2 openmpi-bin"
    if os.geteuid() != 0:
        return "namespaces need root"
    link = "ip link add name probe type veth peer name probe2"
    done = subprocess.run([*ISOLATED, "sh", "-c", link], env=environment(), capture_output=True, text=True)
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


def environment(**more: str) -> dict[str, str]:
    """Of a command on a node."""
    return without_ranks(**{"PATH": PATH, "OMP_NUM_THREADS": "1", **more})


@dataclass
class Node:
    """One node.

    Args:
        name: its host name.
        address: of eth0.
        holder: its unshare process.
        log: what its sshd says.
    """

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    log: Path

    @property
    def init(self) -> int:
        """The first process of the node, as it is numbered outside."""
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        _wait_until(lambda: bool(children.read_text()), self.log)
        return int(children.read_text().split()[0])

    def command(self, *command: str) -> list[str]:
        """A command line that runs a command on this node, in the current folder."""
        where = ["nsenter", f"--target={self.init}", "--net", "--uts", "--pid", "--mount", f"--wd={os.getcwd()}"]
        return [*where, *command]

    def run(self, *command: str, timeout: float = 900, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this node."""
        return subprocess.run(
            self.command(*command), env=environment(**more), capture_output=True, text=True, timeout=timeout
        )

    def unplug(self) -> None:
        """Take its network away: the others get no goodbye, as when power or a switch fails."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Give it back."""
        self.run("ip", "link", "set", "eth0", "up")

    def clear(self) -> None:
        """End all that runs on the node but its sshd."""
        self.run("sh", "-c", "kill -KILL -1")  # in this node's process namespace

    def wait_until_gone(self, word: str) -> None:
        """Until no process here has the word in its command line."""
        _wait_until(lambda: self.run("pgrep", "-f", "--", word).stdout == "", self.log)

    def stop(self) -> None:
        """End the node and all that runs on it, at once."""
        if self.holder.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self.holder.wait(timeout=SECONDS)


@contextlib.contextmanager
def nodes(folder: Path, count: int = 2) -> Iterator[list[Node]]:
    """Nodes node1, node2, …, stopped at the end with all that they run.

    Args:
        folder: made: keys, configuration, logs.
        count: of nodes.
    """
    folder.mkdir(parents=True)
    _write_files(folder, count)
    with contextlib.ExitStack() as stack:
        switch = _start(stack, folder, "switch", "", "echo ready; exec sleep infinity")
        found = []
        for number in range(1, count + 1):
            name = f"node{number}"
            script = _INIT.format(name=name, folder=folder)
            found.append(_start(stack, folder, name, f"10.77.0.{number}", script))
        _connect(switch, found)
        _wait_for_sshd(found)
        yield found


def _write_files(folder: Path, count: int) -> None:
    hosts = [f"10.77.0.{n} node{n}" for n in range(1, count + 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)


def _start(stack: contextlib.ExitStack, folder: Path, name: str, address: str, script: str) -> Node:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        command = [*ISOLATED, "bash", "-c", script]
        holder = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    node = Node(name, address, holder, log)
    stack.callback(node.stop)
    _wait_until(lambda: "ready" in log.read_text().split(), log)
    return node


def _connect(switch: Node, found: list[Node]) -> None:
    """A bridge in a namespace of its own, and a cable from every node to it."""
    _ip(switch, "link add name br0 type bridge")
    _ip(switch, "link set br0 up")
    for number, node in enumerate(found):
        port = f"port{number}"
        _ip(switch, f"link add name {port} type veth peer name eth0 netns {node.init}")
        _ip(switch, f"link set {port} master br0 up")
        _ip(node, f"addr add {node.address}/24 dev eth0")
        _ip(node, "link set eth0 up")


def _ip(node: Node, command: str) -> None:
    """Only in the node's network: process numbers are those of outside."""
    where = ["nsenter", f"--target={node.init}", "--net", "ip", *command.split()]
    done = subprocess.run(where, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{node.name}: ip {command}: {done.stderr}"


def _wait_for_sshd(found: list[Node]) -> None:
    for node in found:
        for other in found:
            _wait_until(lambda a=node, b=other: a.run("ssh", b.name, "hostname").stdout.strip() == b.name, node.log)


def _wait_until(ready: Callable[[], bool], log: Path) -> None:
    limit = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < limit, f"a node is not ready after {SECONDS:.0f} s: {log.read_text()}"
        time.sleep(0.1)


def port_on(node: Node) -> int:
    """A port that nobody listens on there, and that no connection gets: free_port is for this machine's network."""
    text = "import socket; s = socket.socket(); s.bind(('', {})); print('free')"
    ports = (random.randrange(10_000, 20_000) for _ in range(100))
    return next(port for port in ports if node.run(sys.executable, "-c", text.format(port)).stdout == "free\n")


def main() -> int:
    """Run nodes until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with nodes(options.folder.resolve(), options.nodes) as found, contextlib.suppress(KeyboardInterrupt):
        print(*(" ".join(node.command("COMMAND")) for node in found), sep="\n", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
