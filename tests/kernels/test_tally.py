"""Every kind of row in every sum, and only there."""

import pytest
import torch

from mentorch.kernels.backend import INTERPRETED
from mentorch.kernels.tally import SUMS, USED, tally, tally_ref

NAN, INF = float("nan"), float("inf")
# loss, weight, given label, clean label
ROWS = [
    (1.0, 0.5, 3, 3),  # right
    (2.0, 0.0, 3, 4),  # wrong, not used
    (4.0, 0.25, 2, 1),  # wrong
    (8.0, USED / 2, 2, -1),  # nobody knows; hardly used is not used
    (16.0, 1.0, -100, 5),  # no image
    (NAN, 1.0, 1, 1),  # spoilt
    (1.0, INF, 1, 2),
    (-INF, NAN, 1, 2),
]


@pytest.fixture
def where():
    """The kernel's device where there is one; else the CPU, where all take the reference."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def _columns(rows, where):
    loss, weight, given, clean = (torch.tensor(c, device=where) for c in zip(*rows, strict=True))
    return loss, weight, given, clean


def _sums(where):
    return torch.zeros(len(SUMS), dtype=torch.float64, device=where)


def test_every_row_counts_where_it_belongs(where):
    sums = _sums(where)
    tally(sums, *_columns(ROWS, where))
    found = dict(zip(SUMS, sums.tolist(), strict=True))
    assert found == pytest.approx(
        {
            "loss": 15.0,
            "weighted_loss": 0.5 + 1.0 + 4 * USED,
            "weight": 0.75 + USED / 2,
            "used": 2.0,
            "weight_right": 0.5,
            "weight_wrong": 0.25,
            "valid": 4.0,
            "right": 1.0,
            "wrong": 2.0,
            "labelled": 7.0,
            "rows": 8.0,
        }
    )


@pytest.mark.parametrize("batch", [1, 255, 256, 257, 1000])  # around one tile, and several
def test_the_kernel_is_its_definition(batch, where):
    generator = torch.Generator().manual_seed(batch)
    pick = torch.randint(0, len(ROWS), (batch,), generator=generator).tolist()
    columns = _columns([ROWS[i] for i in pick], where)
    sums, expected = _sums(where) + 3, _sums(where) + 3
    for _ in range(2):  # they go on from where they were
        tally(sums, *columns)
        tally_ref(expected, *columns, -100)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)


def test_small_losses_are_not_lost_beside_large_sums(where):
    """After 2 million samples float32 would swallow a thousandth."""
    sums = _sums(where) + 2.0**24
    tally(sums, *_columns([(1e-3, 1.0, 0, 0)], where))
    assert sums[0].item() - 2.0**24 == pytest.approx(1e-3, rel=1e-4)


def test_what_does_not_fit_is_named(where):
    columns = _columns(ROWS, where)
    with pytest.raises(ValueError, match=r"sums must be \[11\] float64"):
        tally(_sums(where).float(), *columns)
    with pytest.raises(ValueError, match=r"\[8\].*\[7\]"):
        tally(_sums(where), *columns[:3], columns[3][:7])
