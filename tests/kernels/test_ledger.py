"""The ledger's definition against float64 statistics written out in numpy, and by hand."""

import math

import numpy as np
import pytest
import torch

from mentorch.kernels.ledger import FIELDS, ROW_BYTES, fields, new_ledger, record, record_ref

N, C = 7, 5
NOTHING = {"predicted": -1, "visits": 0, "forgetting": 0}  # of a sample never visited; else NaN


def visit(table, *, ids, loss, weight=None, logits=None, labels=None, **options):
    """One batch; what is not given does not matter."""
    ids, loss = torch.tensor(ids), torch.tensor(loss)
    weight = torch.full_like(loss, 0.5) if weight is None else torch.tensor(weight)
    logits = torch.zeros(len(ids), C) if logits is None else logits
    labels = torch.zeros(len(ids), dtype=torch.int64) if labels is None else torch.tensor(labels)
    record_ref(table, logits, labels, ids, loss, weight, **options)


def seen(table, sample):
    return {name: column[sample].item() for name, column in fields(table).items()}


def test_a_row_is_24_bytes_without_gap_or_overlap():
    taken = sorted((first, dtype.itemsize) for dtype, first in FIELDS.values())
    assert [first for first, _ in taken] == [sum(s for _, s in taken[:i]) for i in range(10)]
    assert sum(size for _, size in taken) == ROW_BYTES == 24
    assert new_ledger(N).shape == (N + 1, 24)


def test_a_new_ledger_knows_nothing():
    for name, column in fields(new_ledger(N)).items():
        assert column.shape == (N + 1,)
        if name in NOTHING:
            assert (column == NOTHING[name]).all()
        else:
            assert column.isnan().all()


@pytest.mark.parametrize("visits", [1, 2, 255])  # no variance yet; the first one; the last exact n
def test_means_and_variances_are_those_of_all_visits(visits):
    rng = np.random.default_rng(visits)
    losses = rng.gamma(2.0, 1.5, (visits, N)).astype(np.float32)
    weights = rng.uniform(0, 1, (visits, N)).astype(np.float32)
    table = new_ledger(N)
    for loss, weight in zip(losses, weights, strict=True):
        order = rng.permutation(N)
        visit(table, ids=order.tolist(), loss=loss[order].tolist(), weight=weight[order].tolist())
    found = {name: column[:N].double().numpy() for name, column in fields(table).items()}
    for name, values in (("loss", losses), ("weight", weights)):
        values = values.astype(np.float64)
        np.testing.assert_allclose(found[f"{name}_mean"], values.mean(0), rtol=1e-5)
        # Rounded to half precision at each visit: errors up to 2^-11, which partly cancel.
        rtol = 6e-4 * math.sqrt(visits)
        np.testing.assert_allclose(found[f"{name}_var"], values.var(0), rtol=rtol, atol=1e-6)
        np.testing.assert_array_equal(found[name], values[-1].astype(np.float16))
    assert (found["visits"] == visits).all()


def test_after_255_visits_the_oldest_fade():
    table, rng = new_ledger(1), np.random.default_rng(0)
    losses = rng.uniform(0, 4, 400)
    mean = losses[:255].mean()
    for loss in losses[255:]:
        mean += (loss - mean) / 255
    for loss in losses:
        visit(table, ids=[0], loss=[float(loss)])
    found = seen(table, 0)
    assert found["visits"] == 255
    assert found["loss_mean"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["loss", "weight"])
def test_a_visit_that_is_not_finite_shows_but_does_not_stay(of, wrong):
    table = new_ledger(2)
    values = [(wrong, 2.0), (1.0, 3.0), (wrong, 4.0), (3.0, 8.0)]  # of samples 0 and 1
    other = "weight" if of == "loss" else "loss"
    for pair in values:
        visit(table, ids=[0, 1], **{of: list(pair), other: [0.25, 0.5]})
        last = seen(table, 0)[of]
        assert last == pair[0] or (math.isnan(last) and math.isnan(pair[0]))
    first, second = seen(table, 0), seen(table, 1)
    assert (first["visits"], first[f"{of}_mean"], first[f"{of}_var"]) == (2, 2.0, 1.0)
    assert (first[f"{other}_mean"], first[f"{other}_var"]) == (0.25, 0)
    assert (second["visits"], second[f"{of}_mean"]) == (4, 4.25)


def test_values_beyond_half_precision_are_cut():
    table = new_ledger(1)
    for loss in (1e30, -1e30):
        visit(table, ids=[0], loss=[loss])
        assert seen(table, 0)["loss"] == math.copysign(65504, loss)
    visit(table, ids=[0], loss=[1e5])
    assert seen(table, 0)["loss_var"] == 65504
    assert math.isfinite(seen(table, 0)["loss_mean"])


def test_a_sample_is_forgotten_when_it_was_right_and_no_longer_is():
    label, other, third = 2, 0, 1
    # The student's class, visit by visit, and how often the sample has been forgotten by then.
    story = [
        (other, 0),  # wrong at first: nothing to forget
        (label, 0),  # learnt
        (label, 0),
        (third, 1),  # forgotten
        (other, 1),  # still wrong: not again
        (label, 1),
        (other, 2),
    ]
    table = new_ledger(N)
    for predicted, forgetting in story:
        logits = torch.zeros(1, C)
        logits[0, predicted] = 1.0
        visit(table, ids=[3], loss=[1.0], labels=[label], logits=logits)
        assert (seen(table, 3)["predicted"], seen(table, 3)["forgetting"]) == (
            predicted,
            forgetting,
        )


def test_forgetting_stays_at_255():
    table = new_ledger(1)
    for step in range(2 * 258):
        logits = torch.zeros(1, C)
        logits[0, step % 2] = 1.0
        visit(table, ids=[0], loss=[1.0], logits=logits)
        assert seen(table, 0)["forgetting"] == min((step + 1) // 2, 255)


def test_prediction_and_its_probability():
    inf, nan = math.inf, math.nan
    rows = {  # logits: (first of the largest, its probability)
        (0.0, 0.0, 0.0, 0.0, 0.0): (0, 0.2),  # all tie
        (1.0, 3.0, 3.0, -inf, 0.0): (1, math.e**3 / (2 * math.e**3 + math.e + 1)),
        (-9e4, 9e4, 0.0, 0.0, 0.0): (1, 1.0),  # would overflow
        (-inf,) * 5: (-1, nan),
        (0.0, inf, 0.0, 0.0, 0.0): (-1, nan),
        (0.0, 0.0, nan, 9.0, 0.0): (-1, nan),
    }
    table = new_ledger(N)
    visit(table, ids=list(range(6)), loss=[1.0] * 6, logits=torch.tensor(list(rows)))
    for sample, (predicted, probability) in enumerate(rows.values()):
        found = seen(table, sample)
        assert found["predicted"] == predicted
        assert found["probability"] == pytest.approx(probability, rel=1e-3, nan_ok=True)


def test_rows_that_are_no_sample_leave_no_trace():
    table, before = new_ledger(N), new_ledger(N)
    labels = [0, 0, 0, -100, 3]
    visit(table, ids=[-1, N, 2**40, 2, 4], loss=[1.0] * 5, labels=labels)
    assert seen(table, 4)["visits"] == 1
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(table[others], before[others])
    visit(table, ids=[2, 5], loss=[1.0] * 2, labels=[7, -100], ignore_index=7)
    assert (seen(table, 2)["visits"], seen(table, 5)["visits"]) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_strided_rows(dtype):
    torch.manual_seed(0)
    wide = (3 * torch.randn(N, 2 * C)).to(dtype)
    logits, table = wide[:, 2 : 2 + C], new_ledger(N)
    loss = torch.rand(N, dtype=torch.float64)
    labels, ids = torch.zeros(N, dtype=torch.int32), torch.arange(N)
    record_ref(table, logits, labels, ids, loss, loss.to(torch.bfloat16))
    probability, predicted = logits.double().softmax(1).max(1)
    found = fields(table[:N])
    assert torch.equal(found["predicted"], predicted.int())
    torch.testing.assert_close(found["probability"].double(), probability, rtol=1e-3, atol=0)
    assert torch.equal(found["loss"], loss.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(4, 23, dtype=torch.uint8)}, r"\[N \+ 1, 24\] uint8.*\[4, 23\]"),
        ({"table": torch.zeros(4, 24)}, "float32"),
        ({"table": torch.zeros(4, 48, dtype=torch.uint8)[:, ::2]}, "contiguous"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"must be \[2\].*got \[3\]"),
        ({"sample_loss": torch.zeros(2, 1)}, r"\[2, 1\]"),
        ({"logits": torch.zeros(2, 0)}, "no classes"),
        ({"labels": torch.zeros(2)}, "labels must be integers"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "table": new_ledger(3),
        "logits": torch.zeros(2, C),
        "labels": torch.zeros(2, dtype=torch.int64),
        "sample_ids": torch.arange(2),
        "sample_loss": torch.zeros(2),
        "sample_weight": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        record(**arguments | change)


def test_a_ledger_needs_samples():
    with pytest.raises(ValueError, match="got 0"):
        new_ledger(0)
