"""A run's checkpoints, seen from all ranks: the main one writes them while training goes on."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mentorch.engine.checkpoint import Tensors, take_snapshot
from mentorch.engine.checkpoint_writer import CheckpointWriter
from mentorch.engine.distributed import World
from mentorch.engine.failure import RunFailed

_FAILURES_IN_A_ROW = 2


class Saver:
    """Takes checkpoints; one that cannot be written is told of, two in a row end the run.

    Args:
        folder: of the checkpoints.
        keep: how many, besides the best.
        world: the ranks.
        before: called on the main rank before a checkpoint is written, for what it relies on.
    """

    def __init__(self, folder: Path, keep: int, world: World, before: Callable[[], None]) -> None:
        self.world, self._before = world, before
        self._writer = CheckpointWriter(folder, keep) if world.is_main else None
        self._told: str | None = None

    @property
    def last(self) -> int | None:
        """Step of the last complete checkpoint; the main rank knows it."""
        return self._writer.last if self._writer else None

    def save(
        self, step: int, models: dict[str, Tensors], state: dict[str, Any], own: Tensors
    ) -> None:
        """Copies everything, on every rank, and leaves the writing to a thread."""
        if self._writer:
            self._writer.wait()
        self.world.wait()  # all ranks, here: not in a step, which must not take as long
        snapshot = take_snapshot(step, models, state, own, self.world)
        if self._writer:
            with contextlib.suppress(OSError):  # a full disk: the checkpoint will tell
                self._before()
            self._writer.save(snapshot)

    def mark_best(self, step: int) -> None:
        """The checkpoint of this step is the best so far, and stays."""
        if self._writer:
            self._writer.mark_best(step)

    def news(self) -> str | None:
        """What went wrong since the last call, for the main rank to say."""
        problem = self._writer.problem() if self._writer else None
        news = problem if problem != self._told else None
        self._told = problem
        return news and (
            f"a checkpoint could not be written: {news}. The last good one is of step {self.last}; "
            "the next one is tried as planned"
        )

    def has_given_up(self) -> bool:
        """Whether it is time to end the run; the main rank knows."""
        return self._writer is not None and self._writer.failures >= _FAILURES_IN_A_ROW

    def fail(self, go_on: str) -> None:
        """Ends the run on every rank."""
        problem = self.world.from_main(self._writer.problem() if self._writer else None)
        raise RunFailed(
            f"checkpoints cannot be written: {problem}. Those before are as they were. Mend that "
            f"and go on with\n    {go_on}"
        )

    def settle(self, go_on: str) -> None:
        """Waits, on every rank, until everything is on the disk.

        Args:
            go_on: the command that goes on with the run.

        Raises:
            RunFailed: the last checkpoint could not be written.
        """
        if self._writer:
            self._writer.wait()
        if self.world.from_main(self._writer is not None and self._writer.problem() is not None):
            self.fail(go_on)

    def close(self) -> None:
        """Ends the thread, after what it is writing."""
        if self._writer:
            self._writer.close()
