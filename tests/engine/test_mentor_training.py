"""Learning Θ from given weights, and the MentorNet PD that ships."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch

from mentorch.engine.curricula import resolve_curriculum, shipped_mentornets
from mentorch.engine.mentor import MentorNet
from mentorch.engine.mentor_training import (
    Features,
    feature_grid,
    fit_error,
    fit_mentornet,
    fit_objective,
    fit_weights,
    split_points,
    train_mentor,
)
from mentorch.kernels.mentor import ClosedForm, ClosedFormKind, closed_form_ref

SHORT = {"points": 5_000, "steps": 100}  # about a second, and far better than no learning


def linear(features):
    """Eq. 7 with λ1 = 0, λ2 = 1."""
    return (1 - features.loss_diff).clamp(0, 1)


# ---------------------------------------------------------------- grid and split


def test_the_grid_is_the_released_one():
    grid = feature_grid(1_200_000)
    losses, differences, epochs = (column.unique() for column in (grid[0], grid[1], grid[3]))
    expected = [i / 10 for i in range(100)] + list(range(10, 30))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(differences, [i / 10 - 5 for i in range(100)], atol=1e-6)
    assert epochs.tolist() == list(range(100))
    assert grid.labels.eq(0).all()
    cells = torch.stack([torch.searchsorted(losses, grid[0]), grid[3]])
    cells = (cells[0] * 100 + torch.searchsorted(differences, grid[1])) * 100 + cells[1]
    assert len(cells.unique()) == 1_200_000  # every point once


def test_a_subset_is_spread_over_the_grid_and_depends_on_the_seed():
    first, again, other = feature_grid(1000), feature_grid(1000), feature_grid(1000, seed=1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.loss, other.loss)
    assert abs(first.loss_diff.mean() + 0.05) < 5 * 2.89 / 1000**0.5
    assert abs(first.epoch_pct.double().mean() - 49.5) < 5 * 28.9 / 1000**0.5


@pytest.mark.parametrize("points", [0, -1, 1_200_001])
def test_more_points_than_the_grid_has(points):
    with pytest.raises(ValueError, match=f"1200000 points, {points}"):
        feature_grid(points)


def test_the_split_is_80_to_20_without_overlap():
    learn, held_out = split_points(1000, seed=3)
    assert (len(learn), len(held_out)) == (800, 200)
    assert torch.cat([learn, held_out]).sort().values.tolist() == list(range(1000))
    assert not torch.equal(held_out, split_points(1000, seed=4)[1])


# ---------------------------------------------------------------- learning


def test_a_short_fit_improves_and_is_deterministic():
    before = torch.random.get_rng_state()
    mentor, again = (fit_mentornet(ClosedForm("linear"), seed=2, **SHORT) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is not used
    for name, parameter in mentor.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name

    features = feature_grid(2000, seed=77)
    # Every constant is wrong by 0.44 or more.
    barely = fit_mentornet(ClosedForm("linear"), seed=3, points=5_000, steps=1)
    assert fit_error(barely, features, linear(features))["mean_abs_error"] > 0.3
    assert fit_error(mentor, features, linear(features))["mean_abs_error"] < 0.03


def test_the_card_says_how_it_was_made():
    mentor = fit_mentornet(ClosedForm("linear", lambda2=2.0), seed=5, points=1000, steps=3)
    card = mentor.card
    assert card["target"] == {
        "kind": "linear",
        "lambda1": 0.0,
        "lambda2": 2.0,
        "gamma": 2.0,
        "on": "loss_diff",
    }
    assert (card["points"], card["seed"], card["steps"]) == (1000, 5, 3)
    assert card["objective"] == "squared error"
    assert card["torch"] == torch.__version__
    assert set(card["held_out"]) == {"mse", "mean_abs_error", "max_abs_error"}


def test_binary_weights_are_learnt_by_cross_entropy_and_judged_by_auc():
    mentor = fit_mentornet(ClosedForm("self_paced"), **SHORT)
    assert mentor.card["objective"] == "cross-entropy"
    assert mentor.card["held_out"]["auc"] > 0.99
    assert "auc" not in fit_mentornet(ClosedForm("uniform"), points=100, steps=1).card["held_out"]


@pytest.mark.parametrize(
    ("target", "distance"),
    [
        ([0.0, 1.0, 1.0, 0.0, 1.0], torch.nn.functional.binary_cross_entropy),
        ([0.0, 1.0, 0.5, 0.0, 1.0], torch.nn.functional.mse_loss),
    ],
)
def test_the_optimiser_and_its_objective(target, distance):
    torch.manual_seed(0)
    features, target = feature_grid(5), torch.tensor(target)
    ours = MentorNet()
    by_hand = copy.deepcopy(ours)
    fit_weights(ours, features, target, steps=4, learning_rate=0.1)
    optimizer = torch.optim.Adam(by_hand.parameters())
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        distance(by_hand(*features), target).backward()
        optimizer.step()
    for name, parameter in ours.named_parameters():
        expected = by_hand.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


# The losses of the grid go to 30: at first Eq. 4 wants all weights to be 0, and that takes longer.
@pytest.mark.parametrize(("on", "steps"), [("loss_diff", 200), ("loss", 600)])
def test_eq_4_leads_to_the_weights_of_eq_7(on, steps):
    """Learnt without ever seeing a weight."""
    form = ClosedForm("linear", lambda1=0.3, lambda2=2.0, on=on)
    mentor = fit_mentornet(form, seed=2, points=5_000, steps=steps, objective="eq4")
    assert mentor.card["objective"] == "Eq. 4"
    features = feature_grid(2000, seed=77)
    x = features.loss_diff if on == "loss_diff" else features.loss
    target = (1 - (x - 0.3) / 2).clamp(0, 1)
    assert fit_error(mentor, features, target)["mean_abs_error"] < 0.05
    easy = fit_mentornet(ClosedForm("self_paced"), objective="eq4", **SHORT)
    assert easy.card["held_out"]["auc"] > 0.99
    assert easy.card["held_out"]["mean_abs_error"] < 0.05


def test_the_objective_of_eq_4_step_by_step():
    torch.manual_seed(0)
    features = feature_grid(5)
    past = Features(  # the loss of today is the last one
        torch.stack([features.loss + 9, features.loss], 1),
        torch.stack([features.loss_diff - 9, features.loss_diff], 1),
        *features[2:],
    )
    form = ClosedForm("linear", lambda1=0.5, lambda2=2.0)
    for given in (features, past):
        ours = MentorNet()
        by_hand = copy.deepcopy(ours)
        fit_objective(ours, given, form, steps=3, learning_rate=0.1)
        optimizer = torch.optim.Adam(by_hand.parameters())
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 3)) / 2
            optimizer.zero_grad()
            v = by_hand(*given)
            (v * features.loss_diff + v**2 - 2.5 * v).mean().backward()
            optimizer.step()
        for name, parameter in ours.named_parameters():
            expected = by_hand.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "focal", "hard_example", "pd_mixture"])
def test_eq_4_needs_a_regularizer(kind):
    with pytest.raises(ValueError, match=f"{kind} has no regularizer G"):
        fit_mentornet(ClosedForm(kind), points=10, steps=1, objective="eq4")


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="'eq5'"):
        fit_mentornet(ClosedForm("linear"), points=10, steps=1, objective="eq5")


def test_a_given_mentor_is_where_learning_starts():
    mentor = MentorNet(lstm_units=3, fc_units=4)
    before = mentor.fc1.weight.clone()
    assert fit_mentornet(ClosedForm("focal"), mentor=mentor, points=100, steps=1) is mentor
    assert not torch.equal(mentor.fc1.weight, before)


def test_any_features_and_weights_can_be_learnt():
    """As a data-driven curriculum does: a history of visits, labels, binary weights."""
    torch.manual_seed(0)
    loss = torch.rand(512, 4) * 3
    labels = torch.arange(512) % 10
    features = Features(loss, loss - 1, labels, torch.full((512,), 30))
    clean = ((loss[:, -1] < 1) | (labels == 7)).float()
    mentor = MentorNet(num_labels=10, use_label=True)
    first = fit_error(mentor, features, clean)["auc"]
    fit_weights(mentor, features, clean, steps=100, batch_size=128)
    assert fit_error(mentor, features, clean)["auc"] > max(first, 0.95)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_weights_outside_the_unit_interval_are_refused(bad):
    features = feature_grid(2)
    with pytest.raises(ValueError, match=f"in .0, 1., got.*{bad}"):
        fit_weights(MentorNet(), features, torch.tensor([bad, bad]))


def test_no_step_is_refused():
    with pytest.raises(ValueError, match=r"steps.*0"):
        fit_mentornet(ClosedForm("linear"), points=10, steps=0)


def test_fit_error_against_numpy(monkeypatch):
    features, mentor = feature_grid(300), MentorNet()
    # A coarse weight has ties, which count half in the area under the curve.
    coarse = ((features.loss * 7).long() % 5) / 4
    monkeypatch.setattr(mentor, "forward", lambda *_: coarse)
    target = (features.loss_diff < 0).float()
    found = fit_error(mentor, features, target)
    error = np.abs(coarse.double().numpy() - target.double().numpy())
    assert found["mse"] == pytest.approx((error**2).mean())
    assert found["mean_abs_error"] == pytest.approx(error.mean())
    assert found["max_abs_error"] == error.max()
    positive, negative = coarse[target == 1].numpy()[:, None], coarse[target == 0].numpy()
    wins = (positive > negative).mean() + (positive == negative).mean() / 2
    assert found["auc"] == pytest.approx(wins)


# ---------------------------------------------------------------- the command


def test_train_mentor_writes_what_a_curriculum_is_read_from(tmp_path, capsys):
    out = tmp_path / "new folder" / "mine.safetensors"
    train_mentor(out=out, target="linear", lambda2=3.0, seed=1, steps=2)
    mentor = resolve_curriculum(out)
    assert mentor.card["target"]["lambda2"] == 3.0
    assert (mentor.card["seed"], mentor.card["steps"]) == (1, 2)
    assert "mean_abs_error" in capsys.readouterr().out
    train_mentor(out=out, target="self_paced", steps=1, objective="eq4")
    assert resolve_curriculum(out).card["objective"] == "Eq. 4"


def test_train_mentor_refuses_what_could_not_be_read_back(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.pt"):
        train_mentor(out=tmp_path / "mine.pt")


# ---------------------------------------------------------------- the MentorNets that ship


# Of each the closed form and the greatest mean absolute error that we would ship. A jump lies
# between two points of the grid and costs nothing there; the mixture changes in single epochs.
SHIPPED = {
    "pd": ("linear", 0.01),
    "pd_released": ("pd_mixture", 0.01),
    "self_paced_mentor": ("self_paced", 0.001),
    "focal_mentor": ("focal", 0.002),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_net_fits_as_well_as_its_card_says(name):
    kind, bound = SHIPPED[name]
    assert name in shipped_mentornets()
    mentor = resolve_curriculum(name)
    card = mentor.card
    assert ClosedForm(**card["target"]) == ClosedForm(kind)  # with its defaults
    assert {n: p.shape for n, p in mentor.named_parameters()} == {
        n: p.shape for n, p in MentorNet().named_parameters()
    }
    features = feature_grid(card["points"], card["seed"])
    held_out = features.rows(split_points(card["points"], card["seed"])[1])
    target = closed_form_ref(ClosedForm(kind), *held_out[:2], held_out.epoch_pct)
    found = fit_error(mentor, held_out, target)
    assert found == pytest.approx(card["held_out"], rel=1e-2, abs=1e-8)
    assert found["mean_abs_error"] < bound


def test_no_shipped_net_hides_behind_a_closed_form():
    """A closed form's name comes first in `resolve_curriculum`."""
    assert not set(shipped_mentornets()) & set(get_args(ClosedFormKind))


@pytest.fixture(scope="module")
def pd():
    return resolve_curriculum("pd")


def weigh(mentor, loss, loss_diff, epoch):
    with torch.no_grad():
        return mentor(
            loss, loss_diff, torch.zeros(len(loss), dtype=torch.long), torch.tensor(epoch)
        )


@pytest.mark.parametrize("epoch", [0, 20, 99])
@pytest.mark.parametrize("average", [0.05, 0.7, 2.3, 6.9])  # late to early; ln 10, ln 1000
def test_pd_follows_eq_7_where_students_are(pd, average, epoch):
    loss = torch.linspace(0, 40, 4001)  # between the grid's points and beyond its end
    weight = weigh(pd, loss, loss - average, epoch)
    expected = (1 - (loss - average)).clamp(0, 1)
    assert (weight - expected).abs().max() < 0.04
    assert (weight - expected).abs().mean() < 0.001


@pytest.mark.parametrize("epoch", [0, 20, 99])
@pytest.mark.parametrize("loss", [0.0, 0.5, 3.0, 15.0, 40.0])
def test_pd_decreases_with_the_loss_difference(pd, loss, epoch):
    difference = torch.linspace(-5, 40, 4501)
    weight = weigh(pd, torch.full_like(difference, loss), difference, epoch)
    # Nowhere above its minimum so far by more than a hundredth, and strictly down the slope.
    assert (weight - weight.cummin(0).values).max() < 0.01
    slope = weight[(difference >= 0.05) & (difference <= 0.95)]
    assert (slope.diff() < 0).all()
    assert weight[0] > 0.97
    assert weight[-1] < 0.001
