"""status.json: how a run stands, for whoever started it.

Launchers do not tell: torchrun ends with 1 after a clean stop, and a preempted job's exit status
depends on who was faster. The file says, in whole sentences where people read it:

    state        "running"; "stopped": asked to, can go on; "finished"; "failed"
    reason       why it stopped or failed
    step         training steps taken, as of `updated`
    total_steps  of training
    checkpoint   the last complete checkpoint's step, null if there is none
    resume       the command that goes on with it
    launch       torchrun's run id, null without one
    world_size, host, pid, updated (seconds since 1970)

After a power cut or a kill −9 of everything it still says "running", with an old `updated`.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from mentorch.engine.files import replace_text

State = Literal["running", "stopped", "finished", "failed"]
_EVERY_S = 5.0


class Status:
    """Keeps the file; on other ranks than the main one every method does nothing.

    Args:
        folder: the run's.
        enabled: True on the main rank.
        fields: what stays the same.
    """

    def __init__(self, folder: Path, enabled: bool, **fields: Any) -> None:
        self.path, self.enabled = folder / "status.json", enabled
        self._fields = fields | {"host": socket.gethostname(), "pid": os.getpid()}
        self._written = -_EVERY_S

    def running(self, step: int, checkpoint: int | None) -> None:
        """Notes progress, every few seconds at most."""
        if time.monotonic() - self._written >= _EVERY_S:
            self.write("running", step=step, checkpoint=checkpoint)

    def write(self, state: State, reason: str = "", **fields: Any) -> None:
        """Notes a state. That a disk is full is no reason to end a run."""
        self._fields |= fields
        if not self.enabled:
            return
        self._written = time.monotonic()
        text = {"state": state, "reason": reason} | self._fields | {"updated": time.time()}
        try:
            replace_text(self.path, json.dumps(text, indent=2) + "\n")
        except OSError:
            return  # what is there is older, not wrong: it says when it was written


def read_status(folder: Path) -> dict[str, Any]:
    """A run's status; empty where there is none, or none that can be read."""
    try:
        found = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
