"""A run under torchrun, one of whose workers is killed after every start."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import soak_runs as runs
from soak_compare import difference, order_difference
from soak_runs import Place, SoakFailed

from mentorch.engine.config_files import save_config

MOST_STEPS = 6  # that an attempt is left
_EXPECTED_S = 300.0  # for an attempt to make its steps, on a busy machine
_SHARING = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With it torchrun gives every attempt a store of its own; we do without."""

Note = dict[str, Any]


@dataclass
class Restarts:
    """Kills a random worker after every start, and waits for torchrun to start all again.

    Args:
        out: for everything; empty, or not there yet.
        kills: how many, all in one run.
        ranks: of the run.
        seed: of the moments, and of the run.
        end: when it has failed (`time.monotonic`).
        say: told of every kill.
    """

    out: Path
    kills: int
    ranks: int
    seed: int
    end: float
    say: Callable[[str], None] = runs.say
    alive_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """All of it; returns what is to be reported.

        Raises:
            SoakFailed: an attempt did not come back, or the end is another.
        """
        digits = runs.make_digits(self.out / "digits")
        # So many that the run is not finished before the last kill, wherever that may be.
        epochs = math.ceil((self.kills + 1) * (MOST_STEPS + 2) / runs.STEPS_PER_EPOCH)
        whole, place = (Place.make(self.out / f"notes-{name}") for name in ("whole", "killed"))
        undisturbed = runs.config(digits, epochs, self.seed, folder=self.out / "undisturbed")
        runs.undisturbed(undisturbed, whole, self.ranks)
        killed = runs.config(digits, epochs, self.seed, out=self.out / "killed")
        save_config(killed, self.out / "config.json")
        self._under_fire(place)
        folders = list((self.out / "killed").iterdir())
        if len(folders) != 1:
            raise SoakFailed(f"not one run folder, but {len(folders)} in {self.out / 'killed'}")
        found = difference(self.out / "undisturbed", folders[0], self.ranks) or order_difference(
            whole.read(self.ranks), place.read(self.ranks), self.ranks
        )
        if found:
            raise SoakFailed(f"{folders[0]} differs from {self.out / 'undisturbed'}: {found}")
        return self._report(epochs)

    def _under_fire(self, place: Place) -> None:
        randomly = random.Random(self.seed)
        with place.log.open("wb") as log:
            torchrun = subprocess.Popen(
                self._command(place),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours
            )
        try:
            for attempt in range(self.kills):
                self._kill(torchrun, place, attempt, randomly)
            self._wait(torchrun, place, lambda: torchrun.poll() is not None, self.end)
            if torchrun.returncode:
                raise SoakFailed(f"torchrun ended with {torchrun.returncode}: {place.log}")
        finally:
            _end(torchrun, _pids(place, self.ranks))

    def _environment(self) -> dict[str, str]:
        away = _SHARING, "PYTHONDONTWRITEBYTECODE"
        kept = {name: value for name, value in os.environ.items() if name not in away}
        # Imports are compiled once, by the first start, as those of a usual installation are.
        return kept | {"PYTHONPYCACHEPREFIX": str(self.out / "bytecode"), "OMP_NUM_THREADS": "1"}

    def _command(self, place: Place) -> list[str]:
        options = ["--standalone", "--nproc-per-node", str(self.ranks)]
        options += ["--max-restarts", str(self.kills), "--local-addr", "127.0.0.1"]
        worker = Path(__file__).with_name("soak_worker.py")
        arguments = [str(worker), str(self.out / "config.json"), str(place.notes)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]

    def _kill(
        self, torchrun: subprocess.Popen[bytes], place: Place, attempt: int, randomly: random.Random
    ) -> None:
        """Kills a worker once the attempt has made some steps; then waits for the next one."""
        steps = randomly.randint(2, MOST_STEPS)
        self._wait(torchrun, place, lambda: len(self._done(place, attempt)) >= steps)
        time.sleep(randomly.uniform(0, 0.05))  # a step or so
        rank = randomly.randrange(self.ranks)
        pid = next(n["pid"] for n in place.read(self.ranks)[rank] if n["attempt"] == attempt)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._wait(torchrun, place, lambda: self._done(place, attempt + 1))
        again = [n for n in place.all(self.ranks) if n["attempt"] == attempt + 1]
        for what, seconds in (("alive", self.alive_s), ("resumed", self.resumed_s)):
            seconds.append(max(n["time"] for n in again if n["what"] == what) - killed)
        self.step_s.append(self._done(place, attempt + 1)[0]["time"] - killed)
        self.say(
            f"kill {attempt + 1:3d}  rank {rank} after {steps} steps: processes again after "
            f"{self.alive_s[-1]:.1f} s, checkpoint chosen after {self.resumed_s[-1]:.1f} s, the "
            f"next step complete after {self.step_s[-1]:.1f} s"
        )

    def _done(self, place: Place, attempt: int) -> list[Note]:
        """The steps that all ranks have completed in an attempt, as noted by the last of them."""
        steps: dict[int, list[Note]] = {}
        for note in place.all(self.ranks):
            if note["attempt"] == attempt and note["what"] == "done":
                steps.setdefault(note["step"], []).append(note)
        whole = [notes for _, notes in sorted(steps.items()) if len(notes) == self.ranks]
        return [max(notes, key=lambda note: note["time"]) for notes in whole]

    def _wait(
        self,
        torchrun: subprocess.Popen[bytes],
        place: Place,
        condition: Callable[[], object],
        until: float | None = None,
    ) -> None:
        until = until or min(time.monotonic() + _EXPECTED_S, self.end)
        while not condition():
            if torchrun.poll() is not None or time.monotonic() > until:
                attempt = max((note["attempt"] for note in place.all(self.ranks)), default=0)
                how = "too slow" if torchrun.poll() is None else f"torchrun: {torchrun.returncode}"
                raise SoakFailed(
                    f"{len(self.step_s)} of {self.kills} restarts came back; attempt {attempt} did "
                    f"not get on ({how}): {place.log}"
                )
            time.sleep(0.02)

    def _report(self, epochs: int) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "ranks": self.ranks,
            "seed": self.seed,
            "came_back": len(self.step_s),
            "identical_to_the_undisturbed_run": True,
            "steps_of_the_run": epochs * runs.STEPS_PER_EPOCH,
            "kill_to_processes_s_median": median(self.alive_s),
            "kill_to_processes_s_max": max(self.alive_s),
            "kill_to_checkpoint_chosen_s_median": median(self.resumed_s),
            "kill_to_checkpoint_chosen_s_max": max(self.resumed_s),
            "kill_to_step_s_median": median(self.step_s),
            "kill_to_step_s_max": max(self.step_s),
        }


def _pids(place: Place, ranks: int) -> set[int]:
    """The workers of the last attempt."""
    notes = place.all(ranks)
    last = max((note["attempt"] for note in notes), default=0)
    return {note["pid"] for note in notes if note["attempt"] == last}


def _end(torchrun: subprocess.Popen[bytes], workers: set[int]) -> None:
    """Ends torchrun and what it has left."""
    if torchrun.poll() is not None:
        return
    torchrun.terminate()  # it ends its workers, which may take a checkpoint first
    with contextlib.suppress(subprocess.TimeoutExpired):
        torchrun.wait(30)
        return
    for pid in workers:  # children of torchrun, which has not ended: nobody else has their ids
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    torchrun.kill()
    torchrun.wait()
