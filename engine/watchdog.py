"""Ends a rank that no longer makes progress, and says which rank holds the others up.

A rank may hang in its loader, in a kernel, in a collective whose other side is gone. Backends know
of the last only, end in different ways, and cannot tell the waiting from the one waited for. Here
every rank notes what it is doing (`Progress`); a thread of its own leaves that where the others can
read it, and ends the process when a phase takes longer than it may.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch._C._distributed_c10d import Store

from mentorch.engine.distributed import World
from mentorch.engine.stop import StopRequest

HUNG = 124  # exit status, as that of timeout(1)
_TELL_EVERY_S = 2.0
_ASK_AT_MOST_S = 10.0
_GRACE_S = 15.0

T = TypeVar("T")


class Phase(NamedTuple):
    """What a rank does, since when (`time.monotonic`), and for how long it may (0: for ever)."""

    what: str
    since: float
    limit_s: float
    slow: bool


class Progress:
    """What this rank is doing. Costs a tuple a note.

    Args:
        first_step_timeout: seconds for what may take long: the first step, the first batch of an
            evaluation, learning a curriculum, a checkpoint.
        step_timeout: seconds for everything else.
    """

    def __init__(self, first_step_timeout: float = 0.0, step_timeout: float = 0.0) -> None:
        self.first_step_timeout, self.step_timeout = first_step_timeout, step_timeout
        self.step = 0
        self.step_s = 0.0  # how long the last step took
        self._warm: set[str] = set()
        self.phase = Phase("starting", time.monotonic(), 0.0, slow=True)

    def at(self, what: str, slow: bool = False) -> None:
        """A new phase begins; the first of a kind may take longer than the later ones."""
        slow = slow or what not in self._warm
        self._warm.add(what)
        limit = self.first_step_timeout if slow else self.step_timeout
        self.phase = Phase(what, time.monotonic(), limit, slow)

    def batches(self, batches: Iterable[T], what: str) -> Iterator[T]:
        """The batches, noting when they are waited for and when they are worked on."""
        source, ended = iter(batches), object()
        while True:
            self.at(f"waiting for images ({what})")
            batch: Any = next(source, ended)
            if batch is ended:
                return
            self.at(what)
            started = time.monotonic()
            yield batch
            self.step_s = time.monotonic() - started

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """A slow phase within another one, which begins anew after it."""
        before = self.phase.what
        self.at(what, slow=True)
        yield
        self.at(before)


@dataclass
class Notice:
    """What a rank last said of itself."""

    host: str
    pid: int
    step: int
    what: str
    beat: int


class Watchdog:
    """Watches this rank's `Progress` from a thread.

    Args:
        progress: of this rank.
        stop: a stop that no step answers ends the process too; one is asked for when the launcher
            that started this process is gone.
        world: the ranks.
        on_end: called with the report before the process ends.
        folder: for the stacks, ``hang-rank-3.txt``.
        end: ends the process with a status.
    """

    def __init__(
        self,
        progress: Progress,
        stop: StopRequest,
        world: World,
        on_end: Callable[[str], None],
        folder: Path,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.progress, self.stop, self.world = progress, stop, world
        self.on_end, self.folder, self.end = on_end, folder, end
        self._closed = threading.Event()
        self._beat = 0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches inside the block."""
        threads = [threading.Thread(target=self._watch, daemon=True)]
        if self.world.notices is not None:  # its own thread: a connection may block for ever
            tell = self._tell, (self.world.notices,)
            threads.append(threading.Thread(target=tell[0], args=tell[1], daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._closed.set()
            for thread in threads:  # one that is inside torch when Python ends aborts the process
                thread.join(_ASK_AT_MOST_S)

    def _watch(self) -> None:
        limits = self.progress.first_step_timeout, self.progress.step_timeout
        tick = min([1.0, *(limit / 4 for limit in limits if limit)])
        while not self._closed.wait(tick):
            if self._launcher is not None and os.getppid() != self._launcher:
                self.stop.ask("the launcher that started this rank is gone")
            trouble = self._trouble()
            if trouble:
                self._end(trouble)
                return

    def _trouble(self) -> str | None:
        """What is wrong, in words."""
        phase, step = self.progress.phase, self.progress.step
        here = f"rank {self.world.rank} of {self.world.world_size} (host {socket.gethostname()})"
        elapsed = time.monotonic() - phase.since
        if phase.limit_s and elapsed > phase.limit_s:
            return f"{here} made no progress for {elapsed:.0f} s: {phase.what}, step {step:,}"
        grace = _GRACE_S + 3 * self.progress.step_s
        waited = self.stop.pending()  # asked in any phase: it reads what signals have noted
        if phase.limit_s and not phase.slow and min(elapsed, waited) > grace:
            return (
                f"{here} was asked to stop and for {elapsed:.0f} s could not: {phase.what}, step "
                f"{step:,}; other ranks are probably gone"
            )
        return None

    def _end(self, trouble: str) -> None:
        report = "\n".join([trouble, *self._others()])
        print(f"error: {report}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk must not keep this rank alive
            path = self.folder / f"hang-rank-{self.world.rank}.txt"
            with path.open("w") as file:
                file.write(f"{report}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            print(f"the stacks of this rank's threads are in {path}", file=sys.stderr, flush=True)
            self.on_end(report)
        self.end(HUNG)

    # ---- What ranks tell each other -------------------------------------------------------------

    def _tell(self, notices: Store) -> None:
        host, pid = socket.gethostname(), os.getpid()
        while True:
            self._beat += 1
            progress = self.progress
            notice = [host, pid, progress.step, progress.phase.what, self._beat]
            try:
                notices.set(str(self.world.rank), json.dumps(notice))
            except RuntimeError:  # the host of the store is gone, and this run with it
                return
            if self._closed.wait(_TELL_EVERY_S):
                return

    def _others(self) -> list[str]:
        """A line for every rank that is behind this one or gives no sign of life."""
        if self.world.notices is None:
            return []
        first = self._ask(self.world.notices)
        time.sleep(_TELL_EVERY_S + 0.5 if first else 0)
        second = first and self._ask(self.world.notices)
        if not second:
            address = os.environ.get("MASTER_ADDR")
            return [f"what the others do is not known: {address}, where they meet, is silent"]
        lines = []
        furthest = max(notice.step for notice in second.values())
        for rank in range(self.world.world_size):
            notice = second.get(rank)
            if rank == self.world.rank:
                continue
            if notice is None:
                lines.append(f"  rank {rank} has not begun to train")
            elif notice.beat == first.get(rank, notice).beat:
                lines.append(f"  rank {rank} gives no sign of life; it was {_place(notice)}")
            elif notice.step < furthest or "waiting for images" in notice.what:
                lines.append(f"  rank {rank} is behind: {_place(notice)}")
        return lines or ["  the other ranks are where this one is: a collective does not end"]

    def _ask(self, notices: Store) -> dict[int, Notice]:
        """What the ranks last said; empty if the store does not answer."""
        found: dict[int, Notice] = {}

        def ask() -> None:
            for rank in range(self.world.world_size):
                if notices.check([str(rank)]):
                    found[rank] = Notice(*json.loads(notices.get(str(rank))))

        thread = threading.Thread(target=_without_error, args=(ask,), daemon=True)
        thread.start()
        thread.join(_ASK_AT_MOST_S)
        return {} if thread.is_alive() else found


def _place(notice: Notice) -> str:
    return f"{notice.what}, step {notice.step:,} (host {notice.host}, pid {notice.pid})"


def _without_error(function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):
        function()
