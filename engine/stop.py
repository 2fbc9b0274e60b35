"""Stopping a run so that it can go on: Ctrl-C and SIGTERM as requests instead of ends."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one interrupts at once."""

    asked: bool = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listens for the signals inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            print("stopping: a checkpoint first (once more to stop without)", file=sys.stderr)
