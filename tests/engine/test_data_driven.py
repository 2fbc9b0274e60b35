"""MentorNet DD: what is logged, what is learned from it, and when."""

import pytest
import torch

from mentorch.engine.criteria import choose_trusted
from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.data_driven import (
    DataDriven,
    Trusted,
    VisitLog,
    features_of,
    fit_visits,
    sharpen,
)
from mentorch.engine.mentor import MentorNet
from mentorch.engine.mentor_training import Features

N = 20


def _trusted():
    return Trusted(torch.tensor([3, 7, 11]), torch.tensor([True, False, True]))


def _record(log, ids, losses, step):
    losses = torch.tensor(losses)
    log.record(torch.tensor(ids), losses, losses - 1, torch.tensor(step), torch.tensor(step))


def test_the_log_keeps_the_last_visits_of_d_prime_only():
    log = VisitLog(_trusted(), N, visits=2)
    _record(log, [3, 4, 7], [0.1, 9.0, 0.2], 0)
    _record(log, [7, 3, -1], [0.3, 0.4, 9.0], 1)
    _record(log, [19, 3, 0], [9.0, 0.5, 9.0], 2)
    latest = log.latest()
    assert latest[0, :, 0].tolist() == pytest.approx([0.4, 0.5])  # oldest first
    assert latest[1, :, 0].tolist() == pytest.approx([0.2, 0.3])
    assert latest[2].isnan().all()  # never visited
    assert latest[0, :, 1].tolist() == pytest.approx([-0.6, -0.5])
    assert latest[0, :, 3].tolist() == [1, 2]


def test_features_are_the_visits_there_were():
    log = VisitLog(_trusted(), N, visits=2)
    _record(log, [3, 7], [0.1, 0.2], 5)
    _record(log, [3], [0.3], 6)
    features, target = features_of(log.latest(), _trusted().is_right)
    assert features.loss.tolist() == pytest.approx([0.1, 0.3, 0.2])
    assert features.loss_diff.tolist() == pytest.approx([-0.9, -0.7, -0.8])
    assert features.epoch_pct.tolist() == [5, 6, 5]
    assert target.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="nothing to learn from"):
        features_of(VisitLog(_trusted(), N, 1).latest(), _trusted().is_right)


@pytest.mark.parametrize(
    ("ids", "visits", "message"),
    [([3, 3], 1, "twice"), ([20], 1, r"\[0, 20\)"), ([-1], 1, r"\[0, 20\)"), ([3], 0, "visit")],
)
def test_a_bad_d_prime_is_refused(ids, visits, message):
    with pytest.raises(ValueError, match=message):
        VisitLog(Trusted(torch.tensor(ids), torch.ones(len(ids)).bool()), N, visits)


def _points(count=2000, seed=0):
    """Losses of right labels around 0.3 nats, of wrong ones around 3."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(count, generator=generator) < 0.6
    noise = torch.randn(count, generator=generator)
    loss = (torch.where(right, 0.3, 3.0) + 0.5 * noise).clamp(min=0)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Features(loss, loss - 0.5, zeros, zeros + 30), right.float()


def test_learns_to_tell_right_from_wrong():
    features, right = _points()
    mentor = fit_visits(features, right, steps=300)
    held_out = mentor.card["held_out"]
    assert held_out["auc"] > 0.99
    other, truth = _points(seed=1)
    weight = mentor(*other)
    assert weight[truth == 1].mean() > 0.95
    assert weight[truth == 0].mean() < 0.05
    elsewhen = other._replace(epoch_pct=other.epoch_pct + 50)
    assert torch.equal(mentor(*elsewhen), weight), "without the epoch it is the same throughout"


def test_reads_the_epoch_only_where_asked():
    features, right = _points(500)
    late = features._replace(epoch_pct=features.epoch_pct + 40)
    both = Features(*(torch.cat(pair) for pair in zip(features, late, strict=True)))
    # Late in training the meaning is turned round: only the epoch can tell.
    mentor = fit_visits(both, torch.cat([right, 1 - right]), steps=600, use_epoch=True)
    assert (mentor(*features)[right == 1]).mean() > 0.9
    assert (mentor(*late)[right == 1]).mean() < 0.1


def test_reads_the_label_only_where_asked():
    """All labels of class 1 are wrong, at the same losses: only the label can tell."""
    generator = torch.Generator().manual_seed(0)
    loss, labels = torch.rand(600, generator=generator), torch.arange(600) % 3
    features = Features(loss, loss - 0.5, labels, torch.zeros_like(labels))
    right = (labels != 1).float()
    reading = fit_visits(features, right, steps=400, num_labels=3)(*features)
    assert reading[right == 1].mean() > 0.95
    assert reading[right == 0].mean() < 0.05
    blind = fit_visits(features, right, steps=400)(*features)
    assert (blind[right == 1].mean() - blind[right == 0].mean()).abs() < 0.1


def test_a_run_learns_by_label():
    """Labels are 0 in even and 1 in odd samples, all losses alike; odd ones are wrong."""
    ids = torch.arange(32)
    trusted = Trusted(ids, ids % 2 == 0, ids % 2)
    criterion = DataDriven(
        trusted, num_samples=32, total_steps=20, learn_at=(0.2,), fit_steps=300, num_labels=2
    )
    for step in range(8):
        criterion.update_curriculum(step)
        out = criterion.weigh(torch.zeros(32, 2), ids % 2, ids)
    assert (out.sample_weight[::2] > 0.9).all()
    assert (out.sample_weight[1::2] < 0.1).all()
    with pytest.raises(ValueError, match="labels"):
        DataDriven(trusted._replace(labels=None), num_samples=32, total_steps=20, num_labels=2)


def test_reads_the_difference_only_unless_asked():
    """At one ℓ_pt loss and difference say the same; at another only the difference still does."""
    features, right = _points()
    by_diff = fit_visits(features, right, steps=300)
    elsewhere = features._replace(loss=features.loss + 7)
    assert torch.equal(by_diff(*elsewhere), by_diff(*features))
    by_both = fit_visits(features, right, steps=300, use_loss=True)
    assert not torch.equal(by_both(*elsewhere), by_both(*features))


def test_sharpening_keeps_the_order_and_the_half():
    features, right = _points(300)
    mentor = fit_visits(features, right, steps=100)
    plain = mentor(*features)
    sharp = sharpen(mentor, 8.0)(*features)
    assert torch.allclose(sharp, (8 * plain.logit()).sigmoid(), atol=1e-5)
    assert torch.equal(sharp > 0.5, plain > 0.5)


def test_one_sided_d_prime_is_refused():
    features, right = _points(100)
    with pytest.raises(ValueError, match="both right and wrong"):
        fit_visits(features, torch.ones_like(right))


def _run(criterion, steps, seed=0):
    """Steps over 32 samples, of which every other has a wrong label and a great loss."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        criterion.update_curriculum(step)
        index = torch.randperm(32, generator=generator)[:16]
        loss = torch.where(index % 2 == 0, 0.2, 4.0) + 0.1 * torch.rand(16, generator=generator)
        # Two classes: the logit that gives this loss on label 0.
        logits = torch.stack([torch.zeros(16), torch.log(torch.expm1(loss))], 1)
        out = criterion.weigh(logits, torch.zeros(16, dtype=torch.int64), index)
    return index, out


def _criterion(**options):
    ids = torch.arange(32)
    settings = {"num_samples": 32, "total_steps": 20, "learn_at": (0.2, 0.5), "fit_steps": 200}
    return DataDriven(Trusted(ids, ids % 2 == 0), **settings | options)


def test_learns_at_the_given_steps_and_weighs_accordingly():
    criterion = _criterion()
    place = criterion.mentor.fc1.weight.data_ptr()
    index, out = _run(criterion, 15)
    assert sorted(criterion.learned) == [4, 10]
    assert (out.sample_weight[index % 2 == 0] > 0.9).all()
    assert (out.sample_weight[index % 2 == 1] < 0.1).all()
    assert criterion.mentor.fc1.weight.data_ptr() == place, "a captured step reads the old place"


def test_resumes_exactly():
    whole = _criterion()
    _run(whole, 15)
    first = _criterion()
    generator_state_steps = 12
    _run(first, generator_state_steps)
    second = _criterion()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.log.table.nan_to_num(-1), first.log.table.nan_to_num(-1))
    assert torch.equal(second.mentor.fc1.weight, first.mentor.fc1.weight)
    assert second.step == generator_state_steps
    second.learn_steps = first.learn_steps = {12}
    second.update_curriculum(12)
    first.update_curriculum(12)
    for ours, theirs in zip(second.mentor.parameters(), first.mentor.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_at": (0.4,)}, "none in between"),
        ({"learn_at": ()}, "learn_at"),
        ({"learn_at": (0.2, 1.0)}, "learn_at"),
    ],
)
def test_points_of_learning_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _criterion(**options)


def test_ids_are_needed():
    with pytest.raises(ValueError, match="index"):
        _criterion()(torch.randn(2, 3), torch.tensor([0, 1]))


def test_d_prime_is_drawn_from_known_labels_by_the_seed():
    labels = torch.arange(100) % 5
    clean = torch.where(
        torch.arange(100) % 3 == 0, -1, (torch.arange(100) + (torch.arange(100) > 50)) % 5
    )
    trusted = choose_trusted(labels, clean, torch.arange(90), 0.2, seed=1)
    assert len(trusted.sample_ids.unique()) == 18
    assert (clean[trusted.sample_ids] >= 0).all()
    assert (trusted.sample_ids < 90).all()
    assert torch.equal(trusted.is_right, trusted.sample_ids <= 50)
    again = choose_trusted(labels, clean, torch.arange(90).flip(0), 0.2, seed=1)
    assert torch.equal(again.sample_ids, trusted.sample_ids)
    other = choose_trusted(labels, clean, torch.arange(90), 0.2, seed=2)
    assert not torch.equal(other.sample_ids, trusted.sample_ids)
    with pytest.raises(ValueError, match="have a known clean label"):
        choose_trusted(labels, clean, torch.arange(90), 0.9, seed=1)


def test_the_shipped_one_has_a_robust_objective():
    """Proposition 1 asks for a weight that falls with the loss; nothing else is read."""
    mentor = resolve_curriculum("dd")
    diff, zeros = torch.linspace(-10, 30, 401), torch.zeros(401, dtype=torch.int64)
    weight = mentor(diff + 2, diff, zeros, torch.tensor(50))
    assert (weight.diff() <= 1e-6).all()
    assert weight[0] > 0.95
    assert weight[-1] < 0.05
    assert torch.equal(weight, mentor(diff + 9, diff, zeros, torch.tensor(99)))


def test_a_learned_mentornet_is_like_any_other(tmp_path):
    features, right = _points(300)
    mentor = fit_visits(features, right, steps=50, sharpness=3.0)
    mentor.save(tmp_path / "dd.safetensors")
    loaded = MentorNet.load(tmp_path / "dd.safetensors")
    assert torch.equal(loaded(*features), mentor(*features))
    assert loaded.card["sharpness"] == 3.0
