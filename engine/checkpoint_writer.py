"""Writes checkpoints in a thread, so that whatever happens while it does, older ones stay usable.

A checkpoint is written into a hidden folder, flushed to the disk, read back and renamed; then
``latest``, a text file beside it, names it; only then are older ones deleted.
"""

import errno
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mentorch.engine.checkpoint import Snapshot, Tensors, pack
from mentorch.engine.checkpoint_files import (
    BEST,
    LATEST,
    SUMS,
    DamagedCheckpoint,
    checkpoint_name,
    checkpoints,
    file_sha256,
    hidden,
    hide,
    point,
    pointed,
    remove,
    step_of,
    to_disk,
    verify,
)


class CheckpointWriter:
    """Writes the checkpoints of a run, one after another, in the background; main rank only.

    A write that fails (a full disk, storage that is gone) is not raised: `problem` says it, and
    `latest` and all older checkpoints stay as they are.

    Attributes:
        failures: writes that failed since the last one that did not.
        last: step of the checkpoint that ``latest`` names; None where there is none.

    Args:
        folder: the run's checkpoints; made by the first write.
        keep: how many are kept, the newest; the best one is kept besides.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        assert keep >= 1
        self.folder, self.keep = folder, keep
        self.failures = 0
        name, _ = pointed(folder, LATEST)
        self.last = step_of(name) if name else None
        self._problem: str | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._asked: Future[None] | None = None  # the last thing: all others are done before it

    def save(self, snapshot: Snapshot, best: bool = False) -> None:
        """Waits for the write before it, then writes in the background.

        Args:
            snapshot: what to write. If the checkpoint of its step exists and is not damaged, it is
                taken for the same.
            best: it is the best one so far.
        """
        self.wait()  # no more than two snapshots, the writer's and the caller's, fill the memory
        self._asked = self._thread.submit(self._save, snapshot, best)

    def mark_best(self, step: int) -> None:
        """Makes the checkpoint of a step the best one so far, once it is complete.

        Does nothing where there is none in the end, because its write failed or it is deleted.
        """
        self._asked = self._thread.submit(self._mark_best, checkpoint_name(step))

    @property
    def writing(self) -> bool:
        """True while something that was asked for is not yet done."""
        return self._asked is not None and not self._asked.done()

    def problem(self) -> str | None:
        """What went wrong in the last write that failed; None when one has succeeded since."""
        return self._problem

    def wait(self) -> None:
        """Waits until everything asked for is on the disk, or has failed."""
        if self._asked:
            wait([self._asked])

    def close(self) -> None:
        """Waits, and ends the thread."""
        self._thread.shutdown()

    def _save(self, snapshot: Snapshot, best: bool) -> None:
        name = checkpoint_name(snapshot.step)
        task = str(self.folder / name)
        try:
            self._complete(snapshot, name)
            point(self.folder, LATEST, name)
            self.last = snapshot.step
            if best:
                point(self.folder, BEST, name)
            task = f"deleting old checkpoints in {self.folder}"
            self._prune()
        except Exception as error:  # whatever it is, training goes on, and the run says it
            self._note_failure(task, error)
        else:
            self.failures, self._problem = 0, None

    def _mark_best(self, name: str) -> None:
        try:
            if (self.folder / name).is_dir():
                point(self.folder, BEST, name)
                self._prune()
        except OSError as error:
            self._note_failure(f"marking {self.folder / name} as the best", error)

    def _note_failure(self, task: str, error: Exception) -> None:
        self.failures += 1
        self._problem = f"{task}: {type(error).__name__}: {error}"

    def _complete(self, snapshot: Snapshot, name: str) -> None:
        """Sees to it that the checkpoint is there under its name, whole and on the disk."""
        final, temporary = self.folder / name, self.folder / f".{name}.tmp"
        if os.path.lexists(final) and _is_whole(final):
            return
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                to_disk(self.folder.parent)
            remove(temporary)
            write_files(temporary, snapshot)
            if os.path.lexists(final):
                hide(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # its space is needed
            raise
        to_disk(self.folder)
        remove(hidden(final))

    def _prune(self) -> None:
        kept = {pointed(self.folder, pointer)[0] for pointer in (LATEST, BEST)}
        for path in checkpoints(self.folder)[: -self.keep]:
            if path.name not in kept:
                hide(path)  # half deleted, it must not pass for a checkpoint
                remove(hidden(path))


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except DamagedCheckpoint:
        return False
    return True


# Files


def write_files(folder: Path, snapshot: Snapshot) -> None:
    """Writes a checkpoint's files into a new folder and flushes them to the disk.

    Raises:
        OSError, safetensors.SafetensorError: they could not be written, or read otherwise.
    """
    folder.mkdir()
    of_state: Tensors = {}
    skeleton = json.dumps(pack(snapshot.state, of_state)).encode()
    of_ranks = {f"{i}/{k}": v for i, rank in enumerate(snapshot.ranks) for k, v in rank.items()}
    contents = snapshot.models | {"state": of_state, "ranks": of_ranks}
    (folder / "state.json").write_bytes(skeleton)
    for name, tensors in contents.items():
        save_file(tensors, folder / f"{name}.safetensors")
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        to_disk(folder / name)
    for name, tensors in contents.items():
        _compare(folder / f"{name}.safetensors", tensors)
    if (folder / "state.json").read_bytes() != skeleton:
        raise _differs(folder / "state.json")
    sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(sums, encoding="ascii")
    to_disk(folder / SUMS)
    to_disk(folder)


def _compare(path: Path, tensors: Tensors) -> None:
    """A disk that loses what it was given shall be noticed while there is an older checkpoint."""
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name).reshape(-1).view(torch.uint8)
            if not torch.equal(found, tensor.reshape(-1).view(torch.uint8)):  # NaN equals itself
                raise _differs(path)


def _differs(path: Path) -> OSError:
    return OSError(errno.EIO, "what is read is not what was written", str(path))
