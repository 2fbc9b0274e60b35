"""Metrics are means over the rows that count, however they are summed."""

import pytest
import torch

from mentorch.engine.criteria import IGNORED
from mentorch.engine.distributed import World
from mentorch.engine.tally import Tally, sum_of_weights
from mentorch.kernels.reweight import Reweighted
from mentorch.kernels.tally import USED

WORLD = World()
# loss, weight, given label, clean label: every kind of row.
ROWS = [
    (1.0, 0.5, 3, 3),  # right
    (2.0, 0.0, 3, 4),  # wrong, not used
    (4.0, 0.25, 2, 1),  # wrong
    (8.0, USED / 2, 2, -1),  # nobody knows, and hardly used
    (16.0, 1.0, IGNORED, 5),  # no image
    (float("nan"), 1.0, 1, 1),  # spoilt
    (float("inf"), float("nan"), 1, 2),
]


def _batch(rows):
    loss, weight, given, clean = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Reweighted(loss.sum(), loss, weight, torch.zeros(())), given, clean


def test_means_are_over_the_rows_that_count():
    tally = Tally(torch.device("cpu"))
    for part in (ROWS[:3], ROWS[3:]):
        tally.add_batch(*_batch(part))
    found = tally.read(WORLD)
    assert found == pytest.approx(
        {
            "loss": 15 / 4,
            "weighted_loss": (0.5 + 1.0 + 4 * USED) / 4,
            "mean_weight": (0.75 + USED / 2) / 4,
            "data_utilization": 2 / 4,
            "weight_right": 0.5,
            "weight_wrong": 0.25 / 2,
            "grad_norm": 0.0,
            "rows": 7,
            "unusable": 1 / 7,
            "skipped": 0,
        }
    )


def test_a_reading_begins_anew():
    tally = Tally(torch.device("cpu"))
    tally.add_batch(*_batch(ROWS))
    tally.read(WORLD)
    tally.add_batch(*_batch(ROWS[3:4]))
    found = tally.read(WORLD)
    assert (found["loss"], found["rows"]) == (8.0, 1)
    assert "weight_right" not in found, "no clean label is known"
    assert "weight_wrong" not in found


def test_skipped_steps_have_no_norm():
    tally = Tally(torch.device("cpu"))
    for norm in (2.0, float("nan"), 4.0):
        value = torch.tensor(norm)
        tally.add_step(value)
    found = tally.read(WORLD)
    assert (found["grad_norm"], found["skipped"]) == (3.0, 1.0)


def test_trust_is_over_the_rows_with_an_image():
    out, labels, _ = _batch(ROWS[:5])
    out = out._replace(sample_weight=out.sample_weight * (labels != IGNORED))
    assert sum_of_weights(out, labels).tolist() == pytest.approx([0.75 + USED / 2, 4.0])


def test_a_checkpoint_within_an_interval_keeps_its_part():
    one, other = Tally(torch.device("cpu")), Tally(torch.device("cpu"))
    for norm in (1.0, float("inf"), 5.0):
        one.add_step(torch.tensor(norm))
    one.add_batch(*_batch(ROWS))
    other.add_step(torch.tensor(7.0))
    other.load(one.sums, one.of_steps())
    assert other.read(WORLD) == one.read(WORLD)
