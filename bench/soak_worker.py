"""What a rank of `soak.py` does: the run, and beside it a note of every step.

    torchrun … bench/soak_worker.py CONFIG NOTES

A note is a line of NOTES/rank-R.jsonl with the attempt, the process, the time (`time.monotonic`,
one clock for all processes of a host) and what happened:

    alive      the process runs
    resumed    with the checkpoint that it goes on from, or null, and what it says of others
    taken      with a step and the ids of its samples: they are about to be trained on
    done       with a step: it is complete
"""

import time

ALIVE = time.monotonic()  # before the imports, which take seconds

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

from mentorch.engine import job  # noqa: E402
from mentorch.engine.checkpoint_choice import choose_checkpoint  # noqa: E402
from mentorch.engine.config import RunConfig  # noqa: E402
from mentorch.engine.config_files import load_config  # noqa: E402
from mentorch.engine.data.pipelines import Batch  # noqa: E402
from mentorch.engine.distributed import World  # noqa: E402
from mentorch.engine.spade import Spade  # noqa: E402


class Notes:
    """The notes of a rank in one attempt of a run.

    Args:
        folder: of the notes.
        attempt: its number, from 0.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self._path = folder / f"rank-{os.environ.get('RANK', '0')}.jsonl"
        self._who = {"attempt": attempt, "pid": os.getpid()}

    def add(self, what: str, at: float | None = None, **more: Any) -> None:
        """Appends a line, in one write. Should a kill cut it, the next one begins a line anew."""
        note = {**self._who, "time": time.monotonic() if at is None else at, "what": what, **more}
        with self._path.open("ab", buffering=0) as file:
            file.write(b"\n" + json.dumps(note).encode())


def train(config: RunConfig, notes: Notes) -> int:
    """Runs the job on this rank and notes what it does.

    Returns:
        The process's exit status.
    """
    steps = Spade.train

    def noted_choice(folder: Path, world: World) -> tuple[Path | None, list[str]]:
        found, said = choose_checkpoint(folder, world)
        notes.add("resumed", checkpoint=found and found.name, said=said)
        return found, said

    def noted_batches(spade: Spade, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            notes.add("taken", step=spade.step_count + 1, ids=batch.sample_ids.tolist())
            yield batch

    def noted_steps(spade: Spade, batches: Iterator[Batch]) -> Iterator[int]:
        for step in steps(spade, noted_batches(spade, batches)):
            notes.add("done", step=step)
            yield step

    with (
        mock.patch.object(job, "choose_checkpoint", noted_choice),
        mock.patch.object(Spade, "train", noted_steps),
    ):
        return job.run(config)


def main() -> int:
    """A worker of torchrun."""
    config, folder = map(Path, sys.argv[1:])
    notes = Notes(folder, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    notes.add("alive", at=ALIVE)
    return train(load_config(config, RunConfig), notes)


if __name__ == "__main__":
    sys.exit(main())
