"""The loader: a data set's batches for one rank, uint8 images and sample ids on the device.

One DALI graph serves training and evaluation, CPU and GPU: decode a window, resize it, mirror it.
Which window is decided outside (`crops`), which sample comes when too (`order`), so the loader has
no state but the position: a run resumes by asking for the batches from there on, and one that DALI
has let down goes on in the same way.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from mentorch.engine.config import DataConfig
from mentorch.engine.data import crops
from mentorch.engine.data.graph import build_graph, refused_rows, to_torch
from mentorch.engine.data.index import Index
from mentorch.engine.data.order import (
    Ids,
    Streams,
    batches_in,
    rank_batches,
    shuffled,
    streamed,
    tar_order,
)
from mentorch.engine.data.quarantine import Unusable
from mentorch.engine.data.source import BatchSource, EncodedBatch
from mentorch.engine.distributed import World


class Batch(NamedTuple):
    """One step's images on the device."""

    images: Tensor  # [B, H, W, 3] uint8
    sample_ids: Tensor  # [B] int64, row of the index; PADDING (-1) where the row is no sample


class Loader:
    """Batches of a data set for one rank, from any position of training.

    Args:
        index: the data set.
        sample_ids: the samples to use, rows of the index.
        batch_size: rows a rank a step.
        config: cutting and prefetching.
        train: random crops, shuffled, the samples that do not fill a global batch left to another
            epoch; or centre crops, in order, each sample exactly once.
        seed: of order and crops.
        world: which rank this is, and its device.
        name: of the set, for the list of files that are left out.
        refused: samples that DALI is known to refuse, and why.
        parts: that every batch is used in, one after another.

    Raises:
        ValueError: fewer samples than one global batch.
    """

    def __init__(
        self,
        index: Index,
        sample_ids: Ids,
        *,
        batch_size: int,
        config: DataConfig,
        train: bool,
        seed: int = 0,
        world: World | None = None,
        name: str = "train",
        refused: Mapping[int, str] | None = None,
        parts: int = 1,
    ) -> None:
        self.index, self.sample_ids = index, sample_ids
        self.name = name
        self.batch_size = batch_size
        self.config = config
        self.train = train
        self.seed = seed
        self.parts = parts
        self.world = world or World()
        samples, size = len(sample_ids), batch_size * self.world.world_size
        self.steps_per_epoch = batches_in(samples, size, drop_last=train)
        self._source = BatchSource(index, self._cut, config.read_threads, config.read_ahead)
        self._source.refused |= refused or {}

    def _epoch(self, epoch: int) -> Ids:
        """This rank's batches of an epoch, [steps, B] sample ids."""
        world = self.world
        order = self._order(epoch)
        size, rank, ranks = self.batch_size, world.rank, world.world_size
        return rank_batches(order, size, rank, ranks, self.train, self.parts)

    def _order(self, epoch: int) -> Ids:
        """The samples of an epoch over all ranks, in order."""
        if not self.index.shards:
            return shuffled(self.sample_ids, self.seed, epoch) if self.train else self.sample_ids
        shard, offset = self.index.places()
        ids = tar_order(self.sample_ids, shard, offset)
        if not self.train:
            return ids
        global_batch = self.batch_size * self.world.world_size
        streams = Streams(global_batch, self.config.shard_streams, self.config.shard_window)
        return streamed(ids, shard, streams, self.seed, epoch)

    def _cut(self, sizes: crops.Sizes, sample_ids: Ids, epoch: int) -> crops.Windows:
        if not self.train:
            return crops.centre(sizes, self.config.image_size / self.config.resize)
        scale, ratio = self.config.crop_scale, self.config.crop_ratio
        windows = crops.random_resized(sizes, sample_ids, self.seed, epoch, scale, ratio)
        return windows if self.config.mirror else windows._replace(flip=windows.flip * 0)

    def batches(self, start_step: int = 0, epochs: int = 1) -> Iterator[Batch]:
        """Batches from a step of training up to the end of the last epoch.

        A batch with a file that DALI refuses comes all the same, without it.

        Args:
            start_step: steps already taken, counted from the start of training.
            epochs: epochs of training in all.

        Raises:
            RuntimeError: DALI fails, and no file is to blame.
        """
        step, end = start_step, epochs * self.steps_per_epoch
        while step < end:
            in_flight: deque[EncodedBatch] = deque()
            encoded = _noted(self._source.batches(self._plan(step, epochs)), in_flight)
            device = self.world.device
            pipe = build_graph(encoded, self.batch_size, self._threads(), self.config, device)
            while step < end:
                try:
                    images, sample_ids = pipe.run()
                except RuntimeError as error:
                    self._refuse(in_flight, error)
                    break  # a pipeline that has failed is done for: another, from here on
                in_flight.popleft()
                step += 1
                yield Batch(to_torch(images, device), to_torch(sample_ids, device))

    def _plan(self, start_step: int, epochs: int) -> Iterator[tuple[Ids, int]]:
        """Sample ids and epoch of every batch from a step on."""
        first_epoch, skip = divmod(start_step, self.steps_per_epoch)
        return chain.from_iterable(
            ((ids, epoch) for ids in self._epoch(epoch)[skip if epoch == first_epoch else 0 :])
            for epoch in range(first_epoch, epochs)
        )

    def _refuse(self, in_flight: Iterable[EncodedBatch], error: RuntimeError) -> None:
        """Finds the files behind an error, so that they are not handed to DALI again."""
        for batch in in_flight:  # the first has failed, unless DALI tells of a later one early
            refused = refused_rows(batch, self.config, self.world.device)
            for row, reason in refused:
                self._source.refuse(int(batch.sample_ids[row]), reason)
            if refused:
                return
        raise RuntimeError(
            f"DALI fails, and no file of the batch fails by itself to explain it: {error}"
        ) from error

    def _threads(self) -> int:
        # The affinity, not cpu_count: containers are given fewer cores than the machine has.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.config.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)

    def fingerprint(self) -> dict[str, str | int | bool]:
        """What the batches at a position follow from, by name; the number of ranks is none of it.

        It belongs into a checkpoint with the position: a loader that differs in any of it would go
        on with other samples, or other pixels, and nobody would notice.
        """
        index, config = self.index, self.config
        return {
            "training samples": digest(self.sample_ids),
            "training images": digest(index.sizes(), *_buffers(index.paths())),
            "order": self._order_in_words(),
            "data.image_size": config.image_size,
            "data.crop_scale": str(tuple(config.crop_scale)),
            "data.crop_ratio": str(tuple(config.crop_ratio)),
            "data.mirror": config.mirror,
        }

    def _order_in_words(self) -> str:
        if not self.index.shards:
            return "shuffled files"
        places, config = digest(*self.index.places()), self.config
        return f"shards {places}, {config.shard_streams} streams, window {config.shard_window}"

    def unusable_count(self) -> int:
        """The number of files that were left out so far."""
        return len(self._source.unreadable.keys() | self._source.refused.keys())

    def unusable(self) -> list[Unusable]:
        """The files that were left out so far, and why."""
        return [
            Unusable(self.name, i, self.index.path(i), reason, i in self._source.refused)
            for i, reason in (self._source.unreadable | self._source.refused).items()
        ]

    def close(self) -> None:
        """Stops the reading threads."""
        self._source.close()


def _noted(
    encoded: Iterator[EncodedBatch], in_flight: deque[EncodedBatch]
) -> Iterator[EncodedBatch]:
    """Notes what DALI has been handed and has not given back."""
    for batch in encoded:
        in_flight.append(batch)
        yield batch


def digest(*arrays: Any) -> str:
    """A short hash of arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(memoryview(array))
    return found.hexdigest()[:16]


def _buffers(strings: pa.ChunkedArray) -> list[pa.Buffer]:
    """Offsets and characters of a column without nulls.

    As large strings: plain ones hold 2 GiB of text in one piece, which is some 70 million paths.
    """
    buffers: list[pa.Buffer] = strings.cast(pa.large_string()).combine_chunks().buffers()
    return buffers[1:]


class Normalise(nn.Module):
    """Raw pixels to what a student takes: (x/255 − mean)/std, in float32.

    Args:
        mean: per channel, for pixels in [0, 1].
        std: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # Buffers, so that no step copies them to the device and waits for it.
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift", torch.tensor([m / s for m, s in zip(mean, std, strict=True)]))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, 3, H, W] in channels-last memory order, as the pixels came: no transposition.
        """
        return (images * self.scale - self.shift).permute(0, 3, 1, 2)
