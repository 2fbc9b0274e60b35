"""Reads the files of batches ahead of time, and never fails for what is in a file.

The bytes are ours before they are DALI's: a file that is gone or is no image becomes a tiny valid
JPEG under the sample id `PADDING`, so no batch is lost, ranks stay in step and the row counts
nowhere.
"""

import io
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mentorch.engine.data.crops import Sizes, Windows
from mentorch.engine.data.index import Index
from mentorch.engine.data.order import PADDING, Ids
from mentorch.engine.data.readers import Bytes, open_reader

log = logging.getLogger(__name__)

Cut = Callable[[Sizes, Ids, int], Windows]  # sizes [B, 2], sample ids [B], epoch


class EncodedBatch(NamedTuple):
    """What goes into the DALI graph: files, windows and ids of one batch."""

    files: list[Bytes]  # encoded, as on disk
    start: NDArray[np.float32]  # [B, 2] window start, relative, height first
    shape: NDArray[np.float32]  # [B, 2]
    flip: NDArray[np.int32]  # [B]
    sample_ids: Ids  # [B]; PADDING where the row is no sample


def _placeholder() -> Bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


PLACEHOLDER = _placeholder()


class BatchSource:
    """Yields encoded batches in order, with the next ones being read in the background.

    Args:
        index: where the files are.
        cut: from image sizes, sample ids and epoch to windows.
        threads: files read at the same time.
        read_ahead: batches being read while one is handed out.
    """

    def __init__(self, index: Index, cut: Cut, threads: int, read_ahead: int) -> None:
        self.index, self.sizes = index, index.sizes()
        self.reader = open_reader(index)
        self.cut = cut
        self.read_ahead = read_ahead
        # Sample id → reason: what could not be read so far, and what the decoder does not take.
        self.unreadable: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mentorch-read")

    def batches(self, plan: Iterator[tuple[Ids, int]]) -> Iterator[EncodedBatch]:
        """The batches of a plan.

        Args:
            plan: sample ids [B] and epoch of each batch.
        """
        waiting: deque[tuple[Ids, int, list[Future[Bytes | str]]]] = deque()
        for sample_ids, epoch in plan:
            waiting.append((sample_ids, epoch, self._start_reading(sample_ids)))
            if len(waiting) > self.read_ahead:
                yield self._assemble(*waiting.popleft())
        while waiting:
            yield self._assemble(*waiting.popleft())

    def _start_reading(self, sample_ids: Ids) -> list[Future[Bytes | str]]:
        real = sample_ids[sample_ids != PADDING]
        return [self._pool.submit(self._read, int(sample_id)) for sample_id in real]

    def _read(self, sample_id: int) -> Bytes | str:
        return self.refused.get(sample_id) or self.reader.read(sample_id)

    def _assemble(
        self, sample_ids: Ids, epoch: int, reads: list[Future[Bytes | str]]
    ) -> EncodedBatch:
        sample_ids = sample_ids.copy()
        sizes = np.where((sample_ids == PADDING)[:, None], 1, self.sizes[sample_ids])
        windows = self.cut(sizes.astype(np.int32), sample_ids, epoch)
        files = [PLACEHOLDER] * len(sample_ids)
        for row, read in zip(np.flatnonzero(sample_ids != PADDING), reads, strict=True):
            data = read.result()
            if isinstance(data, str):
                self._note(int(sample_ids[row]), data)
                sample_ids[row] = PADDING  # the whole placeholder: a thin window of it is empty
                windows.start_HW[row], windows.shape_HW[row] = 0, 1
            else:
                files[row] = data
        return EncodedBatch(files, windows.start_HW, windows.shape_HW, windows.flip, sample_ids)

    def refuse(self, sample_id: int, reason: str) -> None:
        """Leaves a sample out from now on, because the decoder does not take its file."""
        self._note(sample_id, reason)
        self.refused[sample_id] = reason

    def _note(self, sample_id: int, reason: str) -> None:
        if sample_id not in self.unreadable and sample_id not in self.refused:
            path = self.index.root / self.index.path(sample_id)
            log.warning("skipping %s: %s", path, reason)
            self.unreadable[sample_id] = reason

    def close(self) -> None:
        """Stops the reading threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
