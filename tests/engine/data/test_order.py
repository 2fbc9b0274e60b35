import numpy as np
import pytest

from mentorch.engine.data.order import PADDING, rank_batches, shuffled

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
