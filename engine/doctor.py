"""`mentorch doctor`: what works on this machine, and what to do about what does not.

Every check runs in a forked process of its own, all of them at once, each with a time limit: one
that raises, crashes or hangs is a row of the table like any other. What they compile goes into a
temporary folder; nothing else is changed.
"""

import argparse
import faulthandler
import json as json_format
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from mentorch.engine import doctor_checks as checks
from mentorch.engine import doctor_gpu as gpu
from mentorch.engine import doctor_trials as trials
from mentorch.engine.doctor_checks import SETUP, Finding, first_line

_GRACE_S = 10  # after which a process ends by itself whose parent was killed


@dataclass(frozen=True)
class Check:
    """Something to find out: one row or some."""

    name: str
    """Of the row that stands for all, if it fails."""
    run: Callable[[], list[Finding]]
    way_out: str
    """If it raises, crashes or hangs."""
    limit_s: float = 120.0


def basics(out: Path) -> list[Check]:
    """What can be looked at without torch; ``out`` as in `doctor`."""
    again = f"{SETUP}; if it stays, send us this table"
    compiler = "apt-get install g++, or point CXX and CC to one"
    return [
        Check("python", checks.python, again),
        Check("packages", checks.packages, again),
        Check("mentorch", checks.installation, again),
        Check("import kernels", checks.kernels_name, again),
        Check("C++ compiler", checks.compiler, compiler),
        Check("cores", checks.cores, again),
        Check("memory", checks.memory, again),
        Check("/dev/shm", checks.shared_memory, "mount a tmpfs there: docker run --shm-size=1g"),
        Check(f"--out {out}", partial(checks.out_folder, out), "name another folder with --out"),
        Check("driver", gpu.driver, "look at nvidia-smi; reinstall NVIDIA's driver"),
    ]


def tries(full: bool) -> list[Check]:
    """What is tried out with torch; ``full`` as in `doctor`."""
    again = "pip install --force-reinstall it, in the release that constraints.txt names"
    see = "see C++ compiler and Python.h"
    found = [
        Check("GPU", gpu.cuda, "look at nvidia-smi; CUDA_VISIBLE_DEVICES= does without GPUs"),
        Check("Triton kernel", gpu.triton_kernel, f"{see}; {again}"),
        Check("fused loss", gpu.reweight_kernel, "run pytest -m gpu, and send us what it says"),
        Check("DALI", trials.dali, f"{again}, for this machine's CUDA"),
        Check("apex", trials.apex, "pip uninstall apex, or --optim.implementation torch"),
        Check("import torchvision", trials.vision, again),
        Check("gloo", trials.backends, again),
        Check("process group", trials.process_group, "docs/clusters.md: network, trouble"),
    ]
    if full:
        way_out = f"{see}; --train.engine eager or graph does without"
        found.append(Check("torch.compile", trials.compiled_function, way_out, limit_s=180.0))
    return found


def examine(out: Path, full: bool) -> list[Finding]:
    """All rows; arguments as `doctor`.

    Where torch imports, and does not crash, it is imported here as well: once, and not in every
    process. Where it does not, what needs it is not tried.
    """
    way_out = f"{SETUP}; the ordinary torch of the registry works without a GPU too"
    rows = run_checks([Check("import torch", trials.import_torch, way_out)])
    if rows[0].status == "ok":
        import torch  # noqa: F401

        return rows + run_checks([*basics(out), *tries(full)])
    why, see = "not tried: torch does not import", "see import torch"
    untried = [Finding(check.name, "absent", why, see) for check in tries(full)]
    return rows + run_checks(basics(out)) + untried


# ---- Running ------------------------------------------------------------------------------------


def guarded(check: Check) -> list[Finding]:
    """What a check finds; an error becomes its row."""
    try:
        return check.run()
    except BaseException as error:  # SystemExit too: this is all that this process is for
        return [Finding(check.name, "bad", first_line(error), check.way_out)]


def _in_child(check: Check, sender: Connection, log: Path) -> None:
    os.setsid()  # whatever it starts can be ended with it
    signal.alarm(int(check.limit_s) + _GRACE_S)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # the row says it
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stderr.fileno(), stream)
    sys.dont_write_bytecode = True
    for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        os.environ[cache] = str(log.parent)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    sender.send_bytes(json_format.dumps([asdict(row) for row in guarded(check)]).encode())
    os._exit(0)  # what libraries do at their end is not asked for


class _Started:
    """A check that is under way in its process."""

    def __init__(self, check: Check, log: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.check, self.log = check, log
        self.end = time.monotonic() + check.limit_s
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_in_child, args=(check, sender, log))
        self.process.start()
        sender.close()  # so that the child's end is seen

    def findings(self) -> list[Finding]:
        """Its rows, or the one that says how it failed."""
        if not self.receiver.poll(max(0.0, self.end - time.monotonic())):
            found = f"did not end within {self.check.limit_s:g} s"
            return [Finding(self.check.name, "bad", found, self.check.way_out)]
        try:
            rows = json_format.loads(self.receiver.recv_bytes())
        except EOFError:
            return [Finding(self.check.name, "bad", self._death(), self.check.way_out)]
        return [Finding(**row) for row in rows]

    def _death(self) -> str:
        self.process.join(1.0)
        status = self.process.exitcode
        how = signal.Signals(-status).name if status and status < 0 else f"exit status {status}"
        said = self.log.read_text(errors="replace").strip() if self.log.is_file() else ""
        return f"its process died: {how}. {said.splitlines()[-1][:150] if said else ''}".rstrip()

    def stop(self) -> None:
        """Ends it, and what it has started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it had no time to become a group's leader
        self.process.join()
        self.receiver.close()


def run_checks(wanted: Sequence[Check]) -> list[Finding]:
    """Runs all checks side by side; their rows in order. Takes as long as the longest."""
    started: list[_Started] = []
    with tempfile.TemporaryDirectory(prefix="mentorch-doctor-") as folder:
        try:
            for number, check in enumerate(wanted):
                (Path(folder) / str(number)).mkdir()
                started.append(_Started(check, Path(folder) / str(number) / "log"))
            return [row for one in started for row in one.findings()]
        finally:
            for one in started:
                one.stop()


# ---- Telling ------------------------------------------------------------------------------------


def table(findings: Sequence[Finding], seconds: float) -> str:
    """The table for people: a row a finding, its way out below it, and a sum."""
    width = max(len(row.name) for row in findings)
    lines = []
    for row in findings:
        lines.append(f"{row.status:<6}  {row.name:<{width}}  {row.found}")
        if row.way_out:
            lines.append(f"{'':6}  {'':{width}}  -> {row.way_out}")
    counts = Counter(row.status for row in findings)
    said = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "bad", "absent"))
    return "\n".join([*lines, f"{said}; {seconds:.1f} s"])


def doctor(out: Path = Path("runs"), json: bool = False, full: bool = False) -> int:
    """Says what works on this machine, and what to do about what does not.

    Args:
        out: folder that runs will be written to; it is tried and not made.
        json: print JSON in place of the table.
        full: also compile a function with torch.compile, which takes longer.

    Returns:
        The exit status: 0 when nothing is bad, else 1.
    """
    started = time.monotonic()
    findings = examine(out, full)
    seconds = time.monotonic() - started
    bad = any(row.status == "bad" for row in findings)
    if json:
        rows = [asdict(row) for row in findings]
        print(json_format.dumps({"ok": not bad, "seconds": seconds, "rows": rows}, indent=2))
    else:
        print(table(findings, seconds))
    return int(bad)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mentorch.engine.doctor`: for where the command line's libraries are missing."""
    parser = argparse.ArgumentParser("mentorch doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--full", action="store_true")
    return doctor(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder it was started in: nobody else has that on the path
    sys.exit(main())
