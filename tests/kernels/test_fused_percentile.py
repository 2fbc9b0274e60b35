"""The percentile kernel, bit-exact against sorting, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from mentorch.kernels import percentile as module
from mentorch.kernels.percentile import (
    moving_average_ref,
    percentile,
    percentile_moving_average,
    percentile_ref,
)

pytestmark = pytest.mark.usefixtures("device")
PERCENTILES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0)


def same(found, expected):
    """Equal bit by bit, NaN included."""
    return torch.equal(found.cpu().view(torch.int32), expected.cpu().view(torch.int32))


def check(losses, p, device):
    found = percentile(losses.to(device), p)
    expected = percentile_ref(losses, p)
    if expected.isnan():
        assert found.isnan()
    else:
        assert same(found, expected), (len(losses), p, found, expected)


@pytest.mark.parametrize("p", PERCENTILES)
def test_ties_of_the_rank_fall_as_in_float64(p, device):
    # (n − 1)(1 − p) ends in ½ for many n, and 5 · 0.1 only because the product is rounded.
    for n in (1, 2, 3, 6, 11, 16, 31, 51, 101, 126):
        check(torch.randperm(n, generator=torch.Generator().manual_seed(n)).float(), p, device)


@pytest.mark.parametrize(
    "n",
    [
        127,  # padding in the block
        1000,
        16384,  # the largest block that stays in registers
        16385,  # one key in a second round of loads
        65536,  # several blocks
    ],
)
def test_sizes(n, device):
    generator = torch.Generator().manual_seed(n)
    losses = torch.randn(n, generator=generator).exp()
    losses[:: max(n // 7, 1)] = math.nan
    check(losses, 0.75, device)
    check(losses.round(), 0.1, device)  # many ties


@pytest.mark.parametrize(
    "losses",
    [
        [0.0, -0.0, 0.0, -0.0, -1e-45],  # −0 counts as +0; a denormal
        [math.inf, 1.0, -math.inf, 2.0, math.inf],
        [math.nan, math.nan, 3.0],
        [math.nan],
        [3.4e38, -3.4e38, 1.2e-38, -1.2e-38],
        [2.0] * 9,
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0])
def test_special_values(losses, p, device):
    check(torch.tensor(losses), p, device)


@settings(deadline=None, max_examples=60)
@given(
    losses=st.lists(st.floats(width=32), min_size=1, max_size=40),
    p=st.floats(0, 1),
)
def test_any_floats(losses, p):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(torch.tensor(losses), p, device)


def test_strided_losses(device):
    losses = torch.arange(20.0, device=device)[::3]
    assert percentile(losses, 1.0) == 18


@pytest.mark.parametrize("q", [2.0, math.inf, math.nan])
def test_moving_average(q, device):
    avg = torch.tensor(0.5, device=device)
    found, new_avg = percentile_moving_average(torch.tensor([q], device=device), avg, 0.75, 0.9)
    torch.testing.assert_close(found.cpu(), torch.tensor(q), equal_nan=True)
    expected = moving_average_ref(avg.cpu(), torch.tensor(q), 0.9)
    torch.testing.assert_close(new_avg.cpu(), expected)
    assert avg == 0.5


def test_opcheck(device):
    losses = torch.rand(10, device=device)
    library.opcheck(module._percentile, (losses, torch.zeros((), device=device), 0.75, 0.95))


@pytest.mark.parametrize(
    ("shape", "p", "message"), [((0,), 0.5, r"\[0\]"), ((2, 2), 0.5, r"\[2, 2\]"), ((3,), 75, "75")]
)
def test_bad_arguments(shape, p, message, device):
    with pytest.raises(ValueError, match=message):
        percentile(torch.zeros(shape, device=device), p)
