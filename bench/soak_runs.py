"""The small runs that `soak.py` breaks off: their configuration, data, processes and notes."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from soak_worker import Notes, train

from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.data.embedded import write_embedded
from mentorch.engine.data.imagenet import index_imagenet
from mentorch.engine.data.webvision import index_webvision

STEPS_PER_EPOCH = 12
LIMIT_S = 300.0  # of an attempt, on a busy machine
POLL_S = 0.001
_FORK = multiprocessing.get_context("fork")  # what is imported here need not be imported again


class SoakFailed(Exception):
    """A run did not survive what was done to it; the message says where to look."""


def say(text: str) -> None:
    """Prints a line, at once even into a file."""
    print(text, flush=True)


def config(digits: Path, epochs: int, seed: int, **where: Any) -> RunConfig:
    """A run with everything in it that could go on wrongly.

    Args:
        digits: what `make_digits` made.
        epochs: of STEPS_PER_EPOCH steps.
        seed: of the run.
        where: ``folder``, or ``out`` for a run that finds its folder by itself.
    """
    return RunConfig(
        name="soak",
        device="cpu",
        seed=seed,
        data=DataConfig(
            train=digits,
            evaluate={"webvision": digits, "imagenet": digits / "ilsvrc"},
            sources=("flickr",),
            max_label=50,
            image_size=32,
            resize=36,
            threads=1,
        ),
        student=StudentConfig(name="test_resnet", drop_rate=0.2),
        curriculum=CurriculumConfig(name="linear", burn_in=0.3, example_dropout=0.1),
        optim=OptimConfig(lr=0.05, average_decay=0.9, clip_norm=5.0, warmup_epochs=0.5),
        train=TrainConfig(
            epochs=epochs,
            batch_size=16,
            eval_batch_size=64,
            precision="fp32",
            log_every=5,
            checkpoint_steps=3,
            keep_checkpoints=2,
        ),
        **where,
    )


def import_ahead() -> None:
    """Imports what a run imports late, so that forked ranks have it; starts no threads."""
    with contextlib.suppress(ImportError):
        import_module("pandas")  # by pyarrow, where it is installed
    for name in ("fn", "plugin.pytorch"):
        import_module(f"nvidia.dali.{name}")


def make_digits(root: Path) -> Path:
    """The embedded digits, indexed; in a process of its own, which takes its threads with it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    process = _FORK.Process(target=_make_digits, args=(root,))
    process.start()
    process.join()
    if process.exitcode:
        raise SoakFailed(f"the data set could not be made in {root}")
    return root


def _make_digits(root: Path) -> None:
    _print_to(root.with_name(f"{root.name}.log"))
    write_embedded(root)
    index_webvision(root, workers=0)
    index_imagenet(root / "ilsvrc", workers=0)


class Place(NamedTuple):
    """Where an attempt of a run leaves what it says.

    Attributes:
        notes: folder of `soak_worker.Notes`.
        log: file of its output; attempts append to it.
    """

    notes: Path
    log: Path

    @classmethod
    def make(cls, folder: Path) -> "Place":
        """In a folder that is made."""
        folder.mkdir(parents=True)
        return cls(folder, folder / "log.txt")

    def read(self, ranks: int) -> list[list[dict[str, Any]]]:
        """The notes of each rank, over all attempts."""
        paths = [self.notes / f"rank-{rank}.jsonl" for rank in range(ranks)]
        texts = [path.read_text() if path.exists() else "" for path in paths]
        lines = [[li for li in text.splitlines() if li.endswith("}")] for text in texts]  # not cut
        return [list(map(json.loads, of_rank)) for of_rank in lines]

    def all(self, ranks: int) -> list[dict[str, Any]]:
        """The notes of all ranks."""
        return list(chain.from_iterable(self.read(ranks)))


class Ranks:
    """One attempt of a run: ranks forked from this process, so that they start at once.

    Args:
        run: their configuration.
        place: for their notes and output.
        attempt: its number.
        ranks: how many.
    """

    def __init__(self, run: RunConfig, place: Place, attempt: int, ranks: int) -> None:
        self.place, self.started = place, time.monotonic()
        self.noted = self._bytes()
        shared = ranks, _free_port(), run, place, attempt
        self.processes: list[BaseProcess] = [
            _FORK.Process(target=_be_a_rank, args=(rank, *shared), daemon=True)
            for rank in range(ranks)
        ]
        import_ahead()
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(range(len(self.processes)))

    def _bytes(self) -> int:
        path = self.place.notes / "rank-0.jsonl"
        return path.stat().st_size if path.exists() else 0

    def until(self, condition: Callable[[], object], limit_s: float = LIMIT_S) -> bool:
        """Waits for something; False if all ranks have ended before, or the time is up."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if not self.alive() or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def sleep(self, seconds: float) -> bool:
        """Waits for some time; False if all ranks have ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() > end)

    def has_begun(self) -> bool:
        """Whether the main rank has been given its first batch."""
        if self._bytes() <= self.noted:
            return False
        with (self.place.notes / "rank-0.jsonl").open("rb") as file:
            file.seek(self.noted)
            return b'"taken"' in file.read()

    def alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, ranks: Iterable[int]) -> None:
        """SIGKILL; waits for their ends."""
        chosen = [self.processes[rank] for rank in ranks]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def end(self, limit_s: float = LIMIT_S) -> bool:
        """Waits for all to end by themselves; those that do not are killed. Whether all did."""
        self.until(lambda: False, limit_s)
        late = self.alive()
        self.kill(range(len(self.processes)))
        return not late

    @property
    def statuses(self) -> list[int | None]:
        """Exit statuses, minus the number of a signal."""
        return [process.exitcode for process in self.processes]


def _be_a_rank(
    rank: int, ranks: int, port: int, run: RunConfig, place: Place, attempt: int
) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (here | there).items()}
    _print_to(place.log)
    torch.set_num_threads(1)
    torch.seed()  # nothing may depend on where the generator happens to be
    sys.exit(train(run, Notes(place.notes, attempt)))


def _print_to(path: Path) -> None:
    """From here on this process prints to a file, C and Python alike."""
    output = path.open("a")
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout = sys.stderr = output


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def undisturbed(run: RunConfig, place: Place, ranks: int) -> tuple[float, float]:
    """A run that nothing happens to.

    Returns:
        Seconds to its first batch, and from there to its end.
    """
    with Ranks(run, place, 0, ranks) as attempt:
        attempt.until(attempt.has_begun)
        begun = time.monotonic()
        if not attempt.end() or any(attempt.statuses):
            raise SoakFailed(f"the undisturbed run ended with {attempt.statuses}: {place.log}")
        return begun - attempt.started, time.monotonic() - begun
