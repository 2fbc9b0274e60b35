"""Functions that run in a process of their own, and what a process has used.

DALI's threads, DataLoader's workers and the memory of one measurement must not reach the next, so
each is one process: ``call("loader_peers", "measure", provider="pil")`` runs
``loader_peers.measure(provider="pil")`` there and gives back what it returned, as JSON.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_S = 220.0  # less than pytest's faulthandler_timeout, which would end the whole run


class Failed(Exception):
    """A measurement's process ended badly; the message is the last thing it wrote."""


class TooLong(Failed):
    """It took longer than it may."""


def call(module: str, function: str, limit_s: float = LIMIT_S, **arguments: Any) -> Any:
    """What a function of a bench file returns in a fresh process.

    Args:
        module: a file of this folder, without ``.py``.
        function: its name there; takes and returns what JSON can hold.
        limit_s: seconds it may take.

    Raises:
        Failed: it raised or was killed.
        TooLong: it took longer than that.
    """
    try:
        done = subprocess.run(
            [sys.executable, __file__, module, function],
            input=json.dumps(arguments),
            # One OpenMP thread, as torchrun gives a rank; each peer has its own pool besides.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TooLong(f"{module}.{function} took longer than {limit_s:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
        raise Failed(f"{module}.{function} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_s() -> float:
    """CPU time of this process and of its workers, those at work included, seconds."""
    ended = os.times()
    own = ended.user + ended.system + ended.children_user + ended.children_system
    return own + sum(_cpu_s(child.pid) for child in multiprocessing.active_children() if child.pid)


def _cpu_s(pid: int) -> float:
    # The second field is a name in brackets, which may hold blanks; utime is the 14th, stime next.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(*, peak: bool = False) -> int:
    """This process's memory, now or at its most (shared libraries included).

    Not ``ru_maxrss``: that starts with what the parent had when it forked.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """From here on `resident_bytes` counts the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """``python fresh.py MODULE FUNCTION`` with the arguments as JSON on standard input."""
    module, function = sys.argv[1:]
    sys.path.insert(0, str(HERE))
    result = getattr(import_module(module), function)(**json.load(sys.stdin))
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
