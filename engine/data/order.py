"""Which sample comes when: a pure function of (seed, epoch), the same for any number of ranks.

The order of an epoch is the samples sorted by a random key each, so it can be recomputed from
anywhere: nothing about it is in a checkpoint. Global batch k is the k-th slice of that order and
rank r takes the r-th part of the slice: a run goes on with the same global batches when the number
of ranks changes.

Samples in shards come in another order, in which storage is read in long runs (`streamed`); what is
said above holds for it too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mentorch.kernels.philox import Stream, philox, to_uniform

PADDING = -1
"""Id of a row that is no sample: it fills up a last batch or stands for an unreadable file."""

Ids = NDArray[np.int64]


def shuffled(sample_ids: Ids, seed: int, epoch: int, stream: Stream = Stream.ORDER) -> Ids:
    """The samples in the order of an epoch."""
    high, low, _, _ = philox(seed, epoch, torch.from_numpy(sample_ids), stream)
    key = (high << 31) | (low >> 1)  # 63 random bits; equal keys keep the order of the ids
    order: Ids = sample_ids[key.argsort(stable=True).numpy()]
    return order


@dataclass(frozen=True)
class Streams:
    """How shards are read: several streams side by side, each through one shard after another.

    Attributes:
        batch: samples of a global batch.
        count: streams; the largest divisor of ``batch`` up to this is taken, so that every stream
            gives equally many samples to every batch.
        window: samples among which a stream is shuffled.
    """

    batch: int
    count: int
    window: int

    @property
    def used(self) -> int:
        """The number of streams."""
        return next(s for s in range(min(self.count, self.batch), 0, -1) if self.batch % s == 0)


def tar_order(sample_ids: Ids, shard: NDArray[np.int32], offset: NDArray[np.int64]) -> Ids:
    """The samples as they lie in the shards.

    Args:
        sample_ids: [n].
        shard: of every row of the index, [N].
        offset: likewise, bytes.
    """
    order: Ids = sample_ids[np.lexsort((offset[sample_ids], shard[sample_ids]))]
    return order


def streamed(
    sample_ids: Ids, shard: NDArray[np.int32], streams: Streams, seed: int, epoch: int
) -> Ids:
    """The samples in an order that reads shards in long runs, and still mixes them anew each epoch.

    The shards are shuffled and their samples laid end to end, from a random place on and round to
    it again. Whole batches of that line are cut into equal streams; each is shuffled within its
    window: every sample moves by fewer than ``window`` places. A batch takes as many samples from
    each stream, streams in order. The rest of the line, less than a batch, comes last.

    Args:
        sample_ids: [n], in the order of their shards (`tar_order`).
        shard: of every row of the index, [N].
        streams: how many, and how well they are mixed.
        seed: of the run.
        epoch: another epoch, another order.
    """
    line = _line(sample_ids, shard[sample_ids], seed, epoch)
    count = streams.used
    length = len(line) // streams.batch * (streams.batch // count)
    whole = line[: count * length].reshape(count, length)
    words = philox(seed, epoch, torch.from_numpy(whole), Stream.ORDER)
    place = np.arange(length) + streams.window * to_uniform(words[0]).numpy().astype(np.float64)
    mixed = np.take_along_axis(whole, place.argsort(axis=1, kind="stable"), axis=1)
    batches = mixed.reshape(count, -1, streams.batch // count).swapaxes(0, 1)
    return np.concatenate([batches.reshape(-1), line[count * length :]])


def _line(sample_ids: Ids, shard: NDArray[np.int32], seed: int, epoch: int) -> Ids:
    """The samples shard by shard, the shards shuffled, from a random place on.

    Without that place the samples left over would always be the last ones of some shard.
    """
    numbers = np.unique(shard).astype(np.int64)
    place = np.empty(numbers.max(initial=0) + 1, np.int64)
    place[shuffled(numbers, seed, epoch, Stream.SHARD_ORDER)] = np.arange(len(numbers))
    line: Ids = sample_ids[place[shard].argsort(kind="stable")]
    word = philox(seed, epoch, torch.tensor([-1]), Stream.SHARD_ORDER)[0]  # −1: no shard's number
    return np.roll(line, -((int(word) * len(line)) >> 32))


def batches_in(samples: int, global_batch: int, drop_last: bool) -> int:
    """Steps of an epoch.

    Raises:
        ValueError: fewer samples than one global batch, with ``drop_last``; or none.
    """
    steps = samples // global_batch if drop_last else -(-samples // global_batch)
    if steps == 0:
        raise ValueError(
            f"{samples} samples do not fill one batch of {global_batch}; use a smaller batch"
        )
    return steps


def rank_batches(
    order: Ids, batch_size: int, rank: int, world_size: int, drop_last: bool, parts: int = 1
) -> Ids:
    """A rank's batches of an epoch.

    Args:
        order: [n] sample ids in the epoch's order.
        batch_size: rows a rank a step.
        rank: this rank.
        world_size: number of ranks.
        drop_last: leave out the samples that do not fill a global batch; otherwise the last one is
            filled up with `PADDING`, so that every rank has equally many steps and no sample comes
            twice.
        parts: that a step takes its batch in, one after another: each is a slice of the order, of
            which a rank has its part.

    Returns:
        [steps, batch_size] sample ids.

    Raises:
        ValueError: fewer samples than one global batch, with ``drop_last``.
    """
    global_batch = batch_size * world_size
    steps = batches_in(len(order), global_batch, drop_last)
    padded = np.full(steps * global_batch, PADDING, dtype=np.int64)
    taken = min(len(order), len(padded))
    padded[:taken] = order[:taken]
    of_ranks = padded.reshape(steps, parts, world_size, batch_size // parts)
    return of_ranks[:, :, rank].reshape(steps, batch_size)
