"""`--profile N`: N steps of a run traced, and what the trace says in a table anyone can read.

Into the run folder's ``profile``: trace.json.gz (opens in Perfetto or chrome://tracing), summary.md
and summary.json. On a GPU the table counts the device's time by kernel, without one the main
thread's time by operator, each without what it calls. docs/throughput.md says how to read it.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from mentorch.engine.files import replace_text
from mentorch.engine.kernel_families import FAMILIES, family
from mentorch.engine.profile_summary import WAITING, Summary, busy_share, summarise
from mentorch.engine.spade import Spade
from mentorch.engine.watchdog import Progress

__all__ = ["FAMILIES", "Summary", "Tracer", "Window", "busy_share", "family", "summarise", "window"]

WARM_UP = 10  # steps: compilation, capture and autotuning are over by then

T = TypeVar("T")


class Window(NamedTuple):
    """Which steps are traced: those after ``start`` up to ``end``, counted from the first."""

    start: int
    end: int


def window(wanted: int, done: int, total_steps: int, steps_per_epoch: int) -> Window:
    """The steps to trace: in one epoch, because evaluations and checkpoints stand between epochs.

    Args:
        wanted: how many; an epoch at most, or what is left of the run.
        done: steps taken when the run started, or started again.
        total_steps: of training, a multiple of steps_per_epoch.
        steps_per_epoch: of the loader.
    """
    left = total_steps - done
    count = min(wanted, steps_per_epoch, left)
    start = done + min(WARM_UP, left - count)
    if start % steps_per_epoch + count > steps_per_epoch:
        start += -start % steps_per_epoch  # the next epoch; there is one, or left were shorter
    return Window(start, start + count)


class Tracer:
    """Traces some steps of a run on its main rank; without ``steps``, or elsewhere, does nothing.

    Args:
        steps: how many.
        spade: the training, at the step it starts from.
        folder: the run folder.
        say: prints a line.
        progress: told while the trace is written, which may take long.
    """

    def __init__(
        self, steps: int, spade: Spade, folder: Path, say: Callable[[str], None], progress: Progress
    ) -> None:
        world, self.done = spade.world, spade.step_count
        self.device, self.folder = world.device, folder / "profile"
        self.say, self.progress = say, progress
        self.window = window(steps, self.done, spade.total_steps, spade.steps_per_epoch)
        self.enabled = world.is_main and self.window.end > self.window.start
        self._profiler: profile | None = None
        self._started = 0.0

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; waiting for one is marked in the trace."""
        return self._marked(batches) if self.enabled else batches

    @staticmethod
    def _marked(batches: Iterator[T]) -> Iterator[T]:
        while True:
            with record_function(WAITING):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    def steps(self, steps: Iterator[int]) -> Iterator[int]:
        """The steps as they are taken, those of the window traced.

        Args:
            steps: takes a step when it is asked for one; yields the number taken so far.
        """
        return self._traced(steps) if self.enabled else steps

    def _traced(self, steps: Iterator[int]) -> Iterator[int]:
        taken, (start, end) = self.done, self.window
        while True:
            # Its first step under the profiler is slower than the later ones, and does not count.
            if taken == max(start - 1, self.done):
                self._begin(warm_up=start - taken)
            if taken == start:
                self._record()
            step = next(steps, None)
            if step is None:
                return
            taken = step
            if taken == end:
                self._finish()
            yield step

    def _begin(self, warm_up: int) -> None:
        start, end = self.window
        self.say(f"tracing steps {start + 1:,} to {end:,}{self._cut_short()}")
        gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        # To the profiler the whole window is one step: it needs no marks between ours.
        plan = schedule(wait=0, warmup=warm_up, active=1, repeat=1)
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu], schedule=plan)
        self._profiler.start()

    def _cut_short(self) -> str:
        warm = self.window.start - self.done
        return "" if warm >= WARM_UP else f" after {warm} of warm-up only, for the run is short"

    def _record(self) -> None:
        assert self._profiler is not None
        self._wait_for_device()
        if self.window.start > self.done:
            self._profiler.step()
        self._started = time.perf_counter()

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish(self) -> None:
        assert self._profiler is not None
        self._wait_for_device()
        wall_s = time.perf_counter() - self._started
        done, self._profiler = self._profiler, None
        with self.progress.during("writing the profile"):
            done.stop()
            summary = summarise(done, self.window.end - self.window.start, self.device, wall_s)
            try:
                self._write(done, summary)
            except OSError as error:  # a full disk: training goes on
                self.say(f"the profile could not be written: {error}")

    def _write(self, done: profile, summary: Summary) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**asdict(summary), "window": list(self.window)}, indent=2)
        replace_text(self.folder / "summary.json", text + "\n")
        replace_text(self.folder / "summary.md", summary.markdown())
        done.export_chrome_trace(str(self.folder / "trace.json.gz"))
        for line in (*summary.sentences(), f"profile: {self.folder / 'summary.md'}"):
            self.say(line)

    def close(self) -> None:
        """Ends a trace that the run's end has cut off; nothing is written of it."""
        if self._profiler is None:
            return
        cut_off, self._profiler = self._profiler, None
        with contextlib.suppress(RuntimeError):  # an error that ended the run is to be seen
            cut_off.stop()
        self.say("the run ended before all steps to trace were taken: no profile")
