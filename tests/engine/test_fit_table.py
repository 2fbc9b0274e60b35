"""The synthetic histories, the curriculum that reads them, and the table of fits."""

import json
import math

import numpy as np
import pytest
import torch

from mentorch.engine import fit_table as module
from mentorch.engine.fit_table import (
    ARCHITECTURES,
    CURRICULA,
    VARIANCE,
    as_markdown,
    fit_table,
    history_features,
    mentor_table,
    prediction_variance,
)

QUICK = {"steps": 2, "points": 200}


def test_the_trajectories_are_the_documented_process():
    features = history_features(40_000, 5, seed=1)
    loss = features.loss.double()
    assert loss.shape == features.loss_diff.shape == (40_000, 5)
    assert loss.max() <= 30
    averages = (features.loss - features.loss_diff).double()
    assert (averages - averages[:, :1]).abs().max() < 1e-5  # one ℓ_pt a sample
    assert averages.min() > 0.049
    assert averages.max() < 3.001
    log = loss.log()[loss.max(1).values < 30]
    # Over samples: the level is uniform; within one: AR(1) of variance E[s²] = 1.5²/3, φ = 0.5,
    # of whose five values the sample variance takes the correlated share away.
    level = math.log(0.01) + math.log(5 / 0.01) / 2
    assert log.mean().item() == pytest.approx(level, abs=0.05)
    lags = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    variance = 1.5**2 / 3 * (1 - (0.5**lags).mean())
    assert log.var(1, correction=0).mean().item() == pytest.approx(variance, rel=0.04)
    assert set(features.epoch_pct.tolist()) == set(range(100))


def test_the_trajectories_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    first, again, other = (history_features(50, 3, seed) for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.loss, other.loss)


@pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
def test_a_history_of_one_visit_has_no_variance(shape):
    with pytest.raises(ValueError, match=f"got {shape[0]}, {shape[1]}"):
        history_features(*shape)


@pytest.mark.parametrize("visits", [2, 5, 8])
def test_prediction_variance_against_numpy(visits):
    loss = history_features(200, visits).loss.double()
    variance = np.exp(-loss.numpy()).var(axis=1)
    found = prediction_variance(loss).numpy()
    expected = np.sqrt(variance + variance**2 / (visits - 1))
    expected /= np.sqrt(0.25 + 0.25**2 / (visits - 1))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert 0 <= found.min() < 0.1 < 0.6 < found.max() <= 1


def test_prediction_variance_at_its_ends():
    certain, wrong = [0.0] * 4, [0.0, math.inf] * 2
    assert prediction_variance(torch.tensor([certain, wrong])).tolist() == [0.0, 1.0]


def test_the_table_has_every_fit_that_makes_sense():
    errors = fit_table(**QUICK)
    assert list(errors) == [*CURRICULA, VARIANCE]
    for row, found in errors.items():
        columns = list(ARCHITECTURES) if row == VARIANCE else list(ARCHITECTURES)[:-1]
        assert list(found) == columns
        assert all(0 < error["mse"] < 1 for error in found.values())
    assert errors == fit_table(**QUICK)  # a function of its arguments


def test_the_architectures_are_what_they_are_called():
    mentors = {name: a.build(5, seed=0) for name, a in ARCHITECTURES.items()}
    assert mentors["logistic"].fc1.weight.shape == (1, 2 + 5 + 10)
    assert mentors["logistic"].activation == "linear"
    assert mentors["perceptron"].fc1.weight.shape == (20, 2 + 5 + 10)
    assert mentors["perceptron"].forward_lstm is None
    assert mentors["lstm T=1"].fc1.weight.shape == (20, 9)  # the released net


def test_how_many_visits_each_architecture_reads(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "fit_weights", lambda _, z, *rest, **more: seen.append(z.loss.shape)
    )
    fit_table(**QUICK)
    assert seen == [(160,)] * 15 + [(160, 5), (160, 5), (160, 1), (160, 5)]


def test_an_architecture_that_reads_the_history_does_better(monkeypatch):
    """Or the table would compare columns that see the same."""
    monkeypatch.setattr(module, "CURRICULA", {})
    error = fit_table(steps=150, points=4_000)[VARIANCE]
    assert error["lstm T=5"]["mse"] < 0.8 * error["lstm T=1"]["mse"]


def test_the_command_writes_json_and_prints_the_table(tmp_path, capsys):
    out = tmp_path / "new folder" / "fit.json"
    mentor_table(out=out, seed=3, **QUICK)
    written = json.loads(out.read_text())
    assert (written["seed"], written["steps"], written["points"]) == (3, 2, 200)
    assert written["torch"] == torch.__version__
    printed = capsys.readouterr().out
    table = as_markdown(written["held_out"])
    assert table in printed
    assert len(table.splitlines()) == 2 + len(CURRICULA) + 1
    assert {line.count("|") for line in table.splitlines()} == {len(ARCHITECTURES) + 2}
    with pytest.raises(ValueError, match=r"fit\.csv"):
        mentor_table(out=tmp_path / "fit.csv")
