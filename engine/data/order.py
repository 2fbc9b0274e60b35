"""Which sample comes when: a pure function of (seed, epoch), the same for any number of ranks.

The order of an epoch is the samples sorted by a random key each, so it can be recomputed from
anywhere: nothing about it is in a checkpoint. Global batch k is the k-th slice of that order and
rank r takes the r-th part of the slice: a run goes on with the same global batches when the number
of ranks changes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from mentorch.kernels.philox import Stream, philox

PADDING = -1
"""Id of a row that is no sample: it fills up a last batch or stands for an unreadable file."""

Ids = NDArray[np.int64]


def shuffled(sample_ids: Ids, seed: int, epoch: int) -> Ids:
    """The samples in the order of an epoch."""
    high, low, _, _ = philox(seed, epoch, torch.from_numpy(sample_ids), Stream.ORDER)
    key = (high << 31) | (low >> 1)  # 63 random bits; equal keys keep the order of the ids
    order: Ids = sample_ids[key.argsort(stable=True).numpy()]
    return order


def rank_batches(order: Ids, batch_size: int, rank: int, world_size: int, drop_last: bool) -> Ids:
    """A rank's batches of an epoch.

    Args:
        order: [n] sample ids in the epoch's order.
        batch_size: rows a rank a step.
        rank: this rank.
        world_size: number of ranks.
        drop_last: leave out the samples that do not fill a global batch; otherwise the last one is
            filled up with `PADDING`, so that every rank has equally many steps and no sample comes
            twice.

    Returns:
        [steps, batch_size] sample ids.

    Raises:
        ValueError: fewer samples than one global batch, with ``drop_last``.
    """
    global_batch = batch_size * world_size
    steps = len(order) // global_batch if drop_last else -(-len(order) // global_batch)
    if steps == 0:
        raise ValueError(
            f"{len(order)} samples do not fill one batch of {global_batch}; use a smaller batch"
        )
    padded = np.full(steps * global_batch, PADDING, dtype=np.int64)
    taken = min(len(order), len(padded))
    padded[:taken] = order[:taken]
    return padded.reshape(steps, world_size, batch_size)[:, rank]
