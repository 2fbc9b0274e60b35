"""Fills the kernel caches on disk with many processes, before one process measures.

Compiling takes longer than measuring, and one process compiles on one core. Every worker runs its
share of the rows once; Triton and torch.compile keep what they made on disk, where the process that
measures finds it. A worker that fails costs time only: what it left is compiled later.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module

import rows
import torch
from rows import Row

MOST_WORKERS = 15  # each holds a CUDA context and the inputs of one row


def workers() -> int:
    """One core is left to whatever else runs."""
    return min(max(len(os.sched_getaffinity(0)) - 1, 1), MOST_WORKERS)


def compile_rows(wanted: Sequence[Row], limit_s: float) -> None:
    """Compiles what ``wanted`` needs, for at most ``limit_s`` seconds."""
    needed = [asdict(row) for row in rows.compilations(wanted)]
    started, end = [], time.monotonic() + limit_s
    for share in range(min(workers(), len(needed))):
        process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        with process.stdin as pipe:
            json.dump(needed[share :: workers()], pipe)
        started.append(process)
    for process in started:
        try:
            process.wait(timeout=max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"bench: compiled in {limit_s - (end - time.monotonic()):.0f} s", file=sys.stderr)


def run_once(row: Row, device: torch.device) -> None:
    """What makes a row's kernels: one step."""
    subject = import_module(f"bench_{row.subject}")
    subject.setup(row, subject.inputs(row, device, seed=0)).run()


def main() -> None:
    """A worker: rows as JSON on standard input."""
    # What torch.compile compiles in is itself many processes; one each is enough here.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for columns in json.load(sys.stdin):
        row = Row(**columns)
        try:
            run_once(row, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception as problem:
            print(f"compile_ahead: {row}: {type(problem).__name__}: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
