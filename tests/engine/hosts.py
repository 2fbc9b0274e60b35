"""Two hosts on one machine: network namespaces joined by a cable that can be pulled.

A host here is a name, an address, a loopback and the processes started in it; files are shared, as
on a cluster with common storage. It needs root, iproute2 and util-linux.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HOSTS = {"host0": "10.77.0.1", "host1": "10.77.0.2"}
"""Their names and addresses, which exist inside the namespaces only."""

TOOLS = ("ip", "unshare", "mount", "hostname")

_pairs = itertools.count()  # one process may have several pairs at a time

# Inside `ip netns exec`, whose mounts are its own: a name, and what resolves names. Without the
# second, every look-up of an address would wait for a name server that is out of reach.
MOVE_IN = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
shift 2
exec "$@"
"""


def why_not() -> str:
    """Why two hosts cannot be made here; empty where they can."""
    if sys.platform != "linux" or not all(map(shutil.which, TOOLS)):
        return f"needs Linux and the commands {', '.join(TOOLS)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Hosts(Path(folder)) as hosts:
                started = hosts.start(0, ["true"], {})
                failed = started.wait() != 0
                return f"needs root to set a host up: {started.output.strip()}" if failed else ""
        except OSError as error:
            return f"needs root to make network namespaces: {error}"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> float:
    """Waits until a condition holds; returns the seconds that took.

    Raises:
        TimeoutError: it does not hold in time.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"after {seconds} s still not: {what}")
        time.sleep(0.05)
    return time.monotonic() - start


@dataclass
class Started:
    """A process on a host, and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 30) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it does not end in time.
        """
        return self.process.wait(seconds)


class Hosts:
    """Two hosts and the cable between them; a context manager that leaves nothing behind.

    Args:
        folder: where the output of what they run is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pair = next(_pairs)
        self.names = [f"mentorch-{os.getpid()}-{pair}-{host}" for host in HOSTS]
        self.started: list[Started] = []

    def __enter__(self) -> "Hosts":
        known = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + known)
        (self.folder / "resolv.conf").write_text("")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            one, two = self.names
            _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "eth0", "netns", two)
            for name, address in zip(self.names, HOSTS.values(), strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(host)
                _ip("netns", "del", name)

    def start(self, host: int, command: Sequence[str], env: dict[str, str]) -> Started:
        """Starts a command on a host (0 or 1), with these variables besides the environment's."""
        log = self.folder / f"host{host}-{len(self.started)}.log"
        move_in = ["unshare", "--uts", "sh", "-c", MOVE_IN, "sh", f"host{host}", str(self.folder)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *move_in, *command],
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Started(process, log))
        return self.started[-1]

    def cut(self) -> None:
        """Pulls the cable: what is sent is lost, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Plugs the cable in again."""
        _ip("-n", self.names[0], "link", "set", "eth0", "up")

    def kill(self, host: int) -> None:
        """Kills everything that runs on a host, at once."""
        while pids := _ip("netns", "pids", self.names[host]).split():
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
