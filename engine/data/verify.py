"""Checks every image of a data set in parallel, and survives what it finds.

Results go to a journal as they come, so an interrupted run goes on where it stopped. A worker
process that dies (out of memory, a crash in a decoder) costs the file that killed it and nothing
else. Workers import only `probe.py` and Pillow, whatever the main program is.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from mentorch.engine.data.index import STATUSES
from mentorch.engine.data.journal import Journal, Known
from mentorch.engine.data.probe import Probe, probe_images

CHUNK = 64  # images a task: about a tenth of a second, and what a dying worker costs again
SMALL = 512  # fewer images than this are checked in this process: starting workers takes longer

Check = Callable[[str, list[str], list[Probe | None]], list[Probe]]


@dataclass
class Verified:
    """The result for N images, in the order of their paths.

    Attributes:
        status: position in `STATUSES`, uint8 [N].
        bytes: file sizes, int64 [N].
        width: of the displayed image, int32 [N]; 0 when not ok.
        height: of the displayed image, int32 [N]; 0 when not ok.
        reasons: why an image is not ok, by row.
    """

    status: npt.NDArray[np.uint8]
    bytes: npt.NDArray[np.int64]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, n: int) -> "Verified":
        """Room for n results."""
        size = np.zeros(n, np.int64)
        return cls(np.zeros(n, np.uint8), size, np.zeros(n, np.int32), np.zeros(n, np.int32))

    def put(self, start: int, probes: list[Probe]) -> None:
        """Stores the results of the rows from ``start``."""
        for row, probe in enumerate(probes, start):
            self.status[row] = STATUSES.index(probe.status)
            self.bytes[row], self.width[row], self.height[row] = probe[1:4]
            if probe.reason:
                self.reasons[row] = probe.reason


def verify_images(
    root: Path,
    paths: pa.Array | pa.ChunkedArray,
    *,
    known: Known | None = None,
    journal: Journal | None = None,
    workers: int | None = None,
    check: Check | None = None,
) -> Verified:
    """Checks that every image exists and decodes.

    Args:
        root: the folder that the paths are relative to.
        paths: Arrow strings, [N].
        known: results of an earlier run; a file whose size is still the same is not decoded again.
        journal: where results are noted as they come.
        workers: processes; None is one a core (none below 512 images), 0 checks in this process.
        check: the function that checks a chunk, importable by name (`probe_images` unless testing).

    Returns:
        Status, size and reason of each image.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the journal keeps what was done so far.
    """
    if workers is None:
        workers = _cores() if len(paths) >= SMALL else 0
    if workers < 0:
        raise ValueError(f"workers is {workers}; give 0 (check in this process) or more")
    chunks = _Chunks(str(root), paths, known, check or probe_images)
    verified = Verified.empty(len(paths))
    results = _in_pool(chunks, workers) if workers else _in_this_process(chunks)
    every = 0.5 if sys.stderr.isatty() else 30.0  # s; a log file gets a line every half minute
    with tqdm(total=len(paths), desc="verifying", unit=" images", mininterval=every) as bar:
        for start, probes in results:
            verified.put(start, probes)
            if journal is not None:
                journal.append(chunks.paths_of(start), probes)
            bar.update(len(probes))
    return verified


@dataclass
class _Chunks:
    """The work, cut into pieces that are made when they are asked for."""

    root: str
    paths: pa.Array | pa.ChunkedArray
    known: Known | None
    check: Check

    def starts(self) -> range:
        return range(0, len(self.paths), CHUNK)

    def paths_of(self, start: int, length: int = CHUNK) -> list[str]:
        return list(self.paths.slice(start, length).to_pylist())

    def task(self, start: int, length: int = CHUNK) -> tuple[str, list[str], list[Probe | None]]:
        paths = self.paths_of(start, length)
        known = [self.known.get(start + i) if self.known else None for i in range(len(paths))]
        return self.root, paths, known


def _in_this_process(chunks: _Chunks) -> Iterator[tuple[int, list[Probe]]]:
    for start in chunks.starts():
        yield start, chunks.check(*chunks.task(start))


def _in_pool(chunks: _Chunks, workers: int) -> Iterator[tuple[int, list[Probe]]]:
    """Results of chunks in the order they are done, with new workers whenever one has died."""
    waiting = iter(chunks.starts())
    while True:
        suspects: list[int] = []  # what was under way when a worker died
        with _pool(workers) as pool:
            yield from _until_one_dies(chunks, pool, waiting, 2 * workers, suspects)
        if not suspects:
            return
        for start in suspects:
            yield start, _one_chunk_alone(chunks, start)


def _until_one_dies(
    chunks: _Chunks,
    pool: ProcessPoolExecutor,
    waiting: Iterator[int],
    depth: int,
    suspects: list[int],
) -> Iterator[tuple[int, list[Probe]]]:
    """Keeps ``depth`` chunks under way; those lost to a dead worker end up in ``suspects``."""
    running: dict[Future[list[Probe]], int] = {}
    while not suspects:
        try:
            while len(running) < depth and (start := next(waiting, None)) is not None:
                suspects.append(start)  # until it is known to be submitted
                running[_submit(pool, chunks, start)] = suspects.pop()
        except BrokenProcessPool:
            pass
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            start = running.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                suspects.append(start)
            else:
                yield start, future.result()
    for future, start in running.items():
        if future.exception() is None:
            yield start, future.result()
        else:
            suspects.append(start)


def _one_chunk_alone(chunks: _Chunks, start: int) -> list[Probe]:
    """Repeats a chunk by itself, and its files one by one if that kills the worker again."""
    try:
        with _pool(1) as pool:
            return _submit(pool, chunks, start).result()
    except BrokenProcessPool:
        n = len(chunks.paths_of(start))
        return _one_file_at_a_time(chunks, start, n)


def _one_file_at_a_time(chunks: _Chunks, start: int, n: int) -> list[Probe]:
    probes: list[Probe] = []
    while len(probes) < n:
        try:
            with _pool(1) as pool:
                while len(probes) < n:
                    probes += _submit(pool, chunks, start + len(probes), 1).result()
        except BrokenProcessPool:
            probes.append(Probe("broken", 0, 0, 0, "decoding it kills the process"))
    return probes


def _submit(
    pool: ProcessPoolExecutor, chunks: _Chunks, start: int, length: int = CHUNK
) -> Future[list[Probe]]:
    with _hidden_main():
        return pool.submit(chunks.check, *chunks.task(start, length))


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes: no fork of a program that has threads, CUDA or much memory."""
    context = multiprocessing.get_context("spawn")
    leave_ctrl_c_to_us = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, signal.signal, leave_ctrl_c_to_us)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keeps workers from importing the main program again (torch and all, an unguarded script)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
