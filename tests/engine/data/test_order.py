import numpy as np
import pytest

from mentorch.engine.data.order import (
    PADDING,
    Streams,
    rank_batches,
    shuffled,
    streamed,
    tar_order,
)

IDS = np.arange(5, 108)  # 103 samples: a prime, so nothing divides it


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    first, second = shuffled(IDS, 0, 0), shuffled(IDS, 0, 1)
    assert sorted(first) == sorted(second) == sorted(IDS)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, shuffled(IDS, 1, 0)), "the seed changes nothing"
    assert np.array_equal(first, shuffled(IDS, 0, 0))


def test_the_order_is_uniform():
    """Each of 20 samples is at each place about 1 time in 20: χ² over 4,000 epochs."""
    counts = np.zeros((20, 20))
    for epoch in range(4000):
        counts[np.arange(20), shuffled(np.arange(20), 7, epoch)] += 1
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi2 - 361) < 5 * (2 * 361) ** 0.5  # 19² degrees of freedom, five deviations


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_an_epoch_out(world_size, drop_last):
    order = shuffled(IDS, 0, 3)
    ranks = [rank_batches(order, 6, r, world_size, drop_last) for r in range(world_size)]
    assert len({batches.shape for batches in ranks}) == 1, "ranks differ in their steps"
    real = np.concatenate([b.ravel() for b in ranks])
    real = real[real != PADDING]
    assert len(set(real)) == len(real), "a sample comes twice"
    expected = len(IDS) // (6 * world_size) * 6 * world_size if drop_last else len(IDS)
    assert len(real) == expected


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    order = shuffled(IDS, 0, 3)
    alone = rank_batches(order, 12, 0, 1, True)
    halves = [rank_batches(order, 6, rank, 2, True) for rank in range(2)]
    assert np.array_equal(alone, np.concatenate(halves, axis=1))


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match=r"103 samples do not fill one batch of 200"):
        rank_batches(IDS, 100, 0, 2, True)


# Of a sharded index: 103 samples in 7 shards, whose rows are spread over the index.
ROWS = np.random.default_rng(0).permutation(200)[:103].astype(np.int64)
SHARD, OFFSET = np.full(200, -1, np.int32), np.full(200, -1, np.int64)
SHARD[ROWS] = np.sort(np.random.default_rng(1).integers(0, 7, 103))
OFFSET[ROWS] = np.arange(103) * 512
STREAMS = Streams(batch=12, count=5, window=6)  # 12 is not a multiple of 5: 4 streams, 3 a batch


def _lines(order):
    """What each stream gives over the epoch, [4, 24], of 8 batches."""
    return order[:96].reshape(8, 4, 3).swapaxes(0, 1).reshape(4, 24)


@pytest.mark.parametrize(("batch", "count", "used"), [(12, 5, 4), (7, 16, 7), (7, 6, 1), (8, 1, 1)])
def test_streams_divide_the_batch(batch, count, used):
    assert Streams(batch, count, 0).used == used


def test_tar_order_is_that_of_the_shards():
    assert np.array_equal(tar_order(np.sort(ROWS), SHARD, OFFSET), ROWS)


@pytest.mark.parametrize("window", [0, 6, 1000])  # none, within a stream, more than a stream
@pytest.mark.parametrize("n", [103, 96, 12, 11, 1])  # a rest, none, one batch, less, one sample
def test_an_epoch_of_shards_holds_every_sample_once(window, n):
    order = streamed(ROWS[:n], SHARD, Streams(12, 5, window), 0, 0)
    assert sorted(order) == sorted(ROWS[:n])
    assert np.array_equal(order, streamed(ROWS[:n], SHARD, Streams(12, 5, window), 0, 0))


def test_epochs_of_shards_differ():
    orders = {
        streamed(ROWS, SHARD, STREAMS, *which).tobytes() for which in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3


def test_a_stream_reads_shards_one_after_another():
    """Without a window: the same shard goes on at the next offset; at most 3 cuts and a start."""
    order = streamed(ROWS, SHARD, Streams(12, 5, 0), 3, 1)
    place = np.empty(200, np.int64)
    place[ROWS] = np.arange(103)
    for line in _lines(order):
        steps, changes = np.diff(place[line]), np.diff(SHARD[line]) != 0
        begins = np.isin(place[line][1:], np.flatnonzero(np.diff(SHARD[ROWS], prepend=-1)))
        assert ((steps == 1) | (changes & begins) | (place[line][:-1] == 102)).all()


def test_a_window_moves_no_sample_further():
    still = _lines(streamed(ROWS, SHARD, Streams(12, 5, 0), 3, 1))
    mixed = _lines(streamed(ROWS, SHARD, STREAMS, 3, 1))
    moves = []
    for line, again in zip(still, mixed, strict=True):
        assert sorted(line) == sorted(again), "a sample has left its stream"
        moves += [abs(int(np.flatnonzero(again == i)[0]) - at) for at, i in enumerate(line)]
    assert max(moves) < 6
    assert np.mean(np.array(moves) > 0) > 0.5, "hardly anything is shuffled"


def test_every_sample_is_left_over_at_times():
    """7 of 103 an epoch; over 150 epochs each about 10 times."""
    left = np.zeros(200)
    for epoch in range(150):
        left[streamed(ROWS, SHARD, STREAMS, 5, epoch)[96:]] += 1
    assert left.sum() == 1050
    assert left[ROWS].min() > 0
    assert left[ROWS].max() < 35


def test_global_batches_of_shards_do_not_depend_on_the_number_of_ranks():
    order = streamed(ROWS, SHARD, STREAMS, 0, 3)
    alone = rank_batches(order, 12, 0, 1, True)
    assert len(alone) == 8
    thirds = [rank_batches(order, 4, rank, 3, True) for rank in range(3)]
    assert np.array_equal(alone, np.concatenate(thirds, axis=1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_parts_of_a_batch_do_not_depend_on_the_ranks(world_size):
    """Where gradients accumulate, part i of all ranks together is the i-th part of the batch."""
    parts, order = 2, np.arange(48)
    batch_size = 16 // world_size
    ranks = [rank_batches(order, batch_size, r, world_size, True, parts) for r in range(world_size)]
    for step in range(3):
        for part, ids in enumerate(order[16 * step : 16 * (step + 1)].reshape(parts, 8)):
            share = slice(part * batch_size // parts, (part + 1) * batch_size // parts)
            together = np.concatenate([of_rank[step, share] for of_rank in ranks])
            assert together.tolist() == ids.tolist()
