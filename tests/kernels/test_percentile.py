"""The "nearest" order statistic against Python's own sort and round-half-even."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mentorch.kernels.percentile import moving_average_ref, percentile_ref

PERCENTILES = (0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 1.0)


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double()


def ascending_index(n, p):
    return n - 1 - round((n - 1) * (1 - p))  # Python rounds half to even


@pytest.mark.parametrize(("p", "index"), [(0.5, 63), (0.6, 76), (0.7, 89), (0.75, 95), (0.8, 102)])
def test_released_order_statistics_of_128_losses(p, index):
    assert percentile_ref(shuffled(128), p) == index  # of the losses 0..127


def test_every_size_up_to_130_rounds_half_to_even():
    # Up to a batch of 128 and just past it: every tie (n−1)(1−p) = k + 1/2 of p = .5, .75, .25, .9.
    for n in range(1, 131):
        losses = shuffled(n, seed=n)
        for p in PERCENTILES:
            assert percentile_ref(losses, p) == ascending_index(n, p), (n, p)


@pytest.mark.parametrize("n", [1000, 4099])  # beyond a warp, a block and a power of two
def test_large_batches(n):
    for p in PERCENTILES:
        assert percentile_ref(shuffled(n), p) == ascending_index(n, p)


@settings(deadline=None, max_examples=100)
@given(
    losses=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40),
    p=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_is_one_of_the_losses_whatever_their_order(losses, p, seed):
    tensor = torch.tensor(losses)
    order = shuffled(len(losses), seed).long()
    found = percentile_ref(tensor[order], p)
    assert found == np.sort(np.float32(losses))[ascending_index(len(losses), p)]


def test_absent_losses_do_not_count():
    losses = shuffled(100)
    with_absent = torch.cat([losses[:40], torch.full((37,), math.nan), losses[40:]])
    for p in PERCENTILES:
        assert percentile_ref(with_absent, p) == percentile_ref(losses, p)


def test_infinite_losses_count_and_sort_last():
    losses = torch.tensor([math.inf, 1.0, math.inf, 0.0, 2.0])
    assert [percentile_ref(losses, p).item() for p in (0.0, 0.5, 1.0)] == [0.0, 2.0, math.inf]


def test_none_present_gives_nan():
    assert percentile_ref(torch.full((3,), math.nan), 0.75).isnan()


def test_ties_and_a_single_loss():
    assert percentile_ref(torch.full((9,), 1.25), 0.3) == 1.25
    assert percentile_ref(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.5) == 2.0
    for p in PERCENTILES:
        assert percentile_ref(torch.tensor([0.5]), p) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_and_dtype_of_the_loss_are_kept(dtype):
    losses = torch.rand(64, dtype=dtype)
    found = percentile_ref(losses, 0.75)
    assert found.dtype == dtype
    assert found.shape == ()
    assert (losses == found).any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])  # no memory, the released one, the paper's
def test_moving_average_is_the_weighted_sum_of_the_past(decay):
    rng = np.random.default_rng(0)
    seen = rng.uniform(0, 7, 60)
    average = torch.tensor(0.0, dtype=torch.float64)
    for q in seen:
        average = moving_average_ref(average, torch.tensor(q), decay)
    ages = np.arange(len(seen))[::-1]
    np.testing.assert_allclose(average, ((1 - decay) * decay**ages * seen).sum(), rtol=1e-12)


@pytest.mark.parametrize("q", [math.nan, math.inf, -math.inf])
def test_a_percentile_that_is_not_finite_leaves_the_average(q):
    before = torch.tensor(1.5)
    assert moving_average_ref(before, torch.tensor(q), 0.95) == 1.5


def test_moving_average_keeps_its_dtype_and_its_argument():
    before = torch.tensor(1.0, dtype=torch.float32)
    after = moving_average_ref(before, torch.tensor(3.0, dtype=torch.float64), 0.5)
    assert after.dtype == torch.float32
    assert (before.item(), after.item()) == (1.0, 2.0)
