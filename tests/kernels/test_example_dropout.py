"""Burn-in and example dropout: coins that belong to the sample, rates, exact counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mentorch.kernels.example_dropout import ExampleDropout, example_dropout_ref

BURNING, AFTER = torch.tensor(19), torch.tensor(20)  # each side of the default 20%


def drop(dropout, weight, ids, *, epoch=AFTER, seed=0, step=0, valid=None):
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    return example_dropout_ref(dropout, weight, valid, epoch, seed, step, ids)


def test_burn_in_ends_at_its_percentage_and_replaces_the_weight():
    weight = torch.tensor([0.0, 0.25, 1.0])
    dropout = ExampleDropout(burn_in_pct=20, burn_in_rate=0.0, rate=0.0)
    ids = torch.arange(3)
    assert drop(dropout, weight, ids, epoch=BURNING).tolist() == [1.0, 1.0, 1.0]
    assert drop(dropout, weight, ids, epoch=AFTER).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(("pct", "burns"), [(0, []), (100, range(100)), (1, [0])])
def test_burn_in_of_none_all_and_one_percent(pct, burns):
    dropout = ExampleDropout(burn_in_pct=pct, burn_in_rate=0.0)
    half, ids = torch.tensor([0.5]), torch.tensor([0])
    found = [e for e in range(100) if drop(dropout, half, ids, epoch=torch.tensor(e)) == 1.0]
    assert found == list(burns)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])  # the released two, and a heavy one
@pytest.mark.parametrize("epoch", [BURNING, AFTER])
def test_bernoulli_rate(rate, epoch):
    n = 40_000
    dropout = (
        ExampleDropout(burn_in_rate=rate)
        if epoch is BURNING
        else ExampleDropout(burn_in_rate=0.0, rate=rate)
    )
    weight = torch.full((n,), 0.75)
    found = drop(dropout, weight, torch.arange(n), epoch=epoch)
    kept = found > 0
    # Kept weights are not rescaled.
    assert found[kept].unique().tolist() == [1.0 if epoch is BURNING else 0.75]
    assert abs(kept.double().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    shuffle=st.integers(0, 99),
    cut=st.integers(1, 63),
)
def test_a_samples_coin_does_not_depend_on_its_batch(seed, step, shuffle, cut):
    dropout = ExampleDropout(rate=0.5)
    ids = torch.arange(64) * 7 + 2**40  # beyond 32 bits
    whole = drop(dropout, torch.ones(64), ids, seed=seed, step=step)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(shuffle))
    permuted = drop(dropout, torch.ones(64), ids[order], seed=seed, step=step)
    assert torch.equal(permuted, whole[order])
    parts = [
        drop(dropout, torch.ones(len(i)), i, seed=seed, step=step) for i in (ids[:cut], ids[cut:])
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_coins_change_with_the_step_and_the_seed():
    dropout, ids = ExampleDropout(rate=0.5), torch.arange(256)
    runs = [
        drop(dropout, torch.ones(256), ids, seed=seed, step=step)
        for seed in (0, 1)
        for step in (0, 1)
    ]
    for i, first in enumerate(runs):
        for second in runs[:i]:
            assert 64 < (first != second).sum() < 192  # 128 ± 8 standard deviations


@pytest.mark.parametrize(
    ("batch", "rate", "kept"),
    [  # ⌊B(1 − rate)⌋ in exact arithmetic
        (128, 0.05, 121),  # as released
        (128, 0.5, 64),
        (8000, 0.05, 7600),  # float32's 0.05 is above 1/20: 7599
        (10, 0.3, 7),
        (100, 0.07, 93),  # float64's 100 · (1 − 0.07) is below 93
        (10, 0.9, 1),
        (1, 0.5, 0),  # everything may go
        (7, 0.0, 7),
    ],
)
def test_exact_count(batch, rate, kept):
    dropout = ExampleDropout(burn_in_rate=rate, rate=rate, exact=True)
    for step, epoch in [(0, BURNING), (1, BURNING), (2, AFTER), (3, AFTER)]:
        found = drop(dropout, torch.ones(batch), torch.arange(batch), epoch=epoch, step=step)
        assert found.sum() == kept


def test_exact_count_is_of_the_valid_rows():
    valid = torch.arange(60) % 3 > 0  # 40 rows
    dropout = ExampleDropout(rate=0.25, exact=True)
    found = drop(dropout, torch.ones(60), torch.arange(60), valid=valid)
    assert found[valid].sum() == 30
    assert found[~valid].sum() == 0


def test_exact_dropout_takes_every_sample_equally_often():
    dropout, ids = ExampleDropout(rate=0.25, exact=True), torch.arange(16)
    kept = sum(drop(dropout, torch.ones(16), ids, step=step) for step in range(400))
    assert (kept - 300).abs().max() < 5 * (400 * 0.75 * 0.25) ** 0.5


def test_a_dropped_nan_weight_is_zero():
    dropout = ExampleDropout(rate=0.5)
    found = drop(dropout, torch.full((64,), math.nan), torch.arange(64))
    kept = drop(dropout, torch.ones(64), torch.arange(64)) == 1
    assert found[~kept].eq(0).all()
    assert found[kept].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_dtype_is_kept(dtype, exact):
    weight = torch.ones(4, dtype=dtype)
    assert drop(ExampleDropout(rate=0.5, exact=exact), weight, torch.arange(4)).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, "rate must be.*1.0"),
        ({"rate": -0.1}, "-0.1"),
        ({"burn_in_rate": math.nan}, "burn_in_rate.*nan"),
        ({"burn_in_pct": 101}, "101"),
        ({"burn_in_pct": -1}, "-1"),
        ({"late_rate": 1.0}, "late_rate.*1.0"),
        ({"late_pct": 101}, "late_pct.*101"),
        ({"burn_in_rate_pct": -1}, "burn_in_rate_pct.*-1"),
    ],
)
def test_bad_rates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExampleDropout(**arguments)


@pytest.mark.parametrize("exact", [False, True])
def test_the_released_schedule(exact):
    """ "0.5,17,0.05,78,0.9,5" with v = 1 before 18%: three rates, and a burn-in of its own."""
    dropout = ExampleDropout(18, 0.5, 0.05, exact, burn_in_rate_pct=17, late_pct=95, late_rate=0.9)
    n = 2000
    for epoch in range(100):
        weight = torch.full((n,), 0.25)
        found = drop(dropout, weight, torch.arange(n), epoch=torch.tensor(epoch), step=epoch)
        rate = 0.5 if epoch < 17 else 0.05 if epoch < 95 else 0.9
        kept = int((found > 0).sum())
        assert kept == round(n * (1 - rate)) if exact else abs(kept - n * (1 - rate)) < 120
        assert set(found.tolist()) == {0.0, 1.0 if epoch < 18 else 0.25}


def test_a_rate_that_never_rules_costs_no_coins():
    never = ExampleDropout(burn_in_pct=0, burn_in_rate=0.5, late_rate=0.3)
    assert not any(never.rates)
    assert any(ExampleDropout(burn_in_pct=1, burn_in_rate=0.5).rates)
    assert any(ExampleDropout(burn_in_pct=0, burn_in_rate_pct=1, burn_in_rate=0.5).rates)
    assert any(ExampleDropout(burn_in_rate=0.0, late_pct=99, late_rate=0.3).rates)
