"""Stopping a run so that it can go on: signals as requests instead of ends."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what torchrun and Kubernetes send, and what Slurm is usually told to send."""


class StopRequest:
    """Set by the first of `SIGNALS`; a later Ctrl-C interrupts at once.

    Python calls a handler only between two bytecodes of the main thread, which may never come if it
    waits for ranks that are gone. `pending` therefore reads what the C part has noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self.reason = ""
        self._since: float | None = None
        self._noted, self._notes = os.pipe()
        for end in (self._noted, self._notes):
            os.set_blocking(end, False)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listens for the signals inside the block."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(self._notes, warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._noted)
            os.close(self._notes)

    def ask(self, reason: str) -> None:
        """Asks for a stop; any thread may."""
        self.reason = self.reason or reason
        self.asked = True

    def pending(self) -> float:
        """Seconds since a stop was first asked for, 0 if it was not; for one watching thread."""
        try:
            noted = os.read(self._noted, 4096)
        except BlockingIOError:
            noted = b""
        if self._since is None and (self.asked or any(number in SIGNALS for number in noted)):
            self._since = time.monotonic()
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and os.environ.get("RANK", "0") == "0":
            again = " (Ctrl-C once more to stop without)" if number == signal.SIGINT else ""
            print(f"stopping: a checkpoint first{again}", file=sys.stderr)
        self.ask(signal.Signals(number).name)
