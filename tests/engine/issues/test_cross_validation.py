"""Students judge what they have not seen, and the curriculum gets the share of right labels."""

import numpy as np
import pytest
import torch
from torch import nn

from mentorch.engine.issues import cross_validation
from mentorch.engine.issues.cross_validation import check_classes, fold_ids, judge
from mentorch.engine.issues.recipe import Recipe, with_epochs
from mentorch.engine.reweight import Reweight
from mentorch.engine.tally import Tally

from .blobs import blobs

CPU = torch.device("cpu")


def test_every_sample_is_judged_once_and_by_nobody_trained_on_it():
    labels = np.array([0] * 50 + [1] * 12)
    seen = np.zeros(len(labels), int)
    for train, held_out in fold_ids(labels, 5, seed=0):
        assert not set(train) & set(held_out)
        assert len(train) + len(held_out) == len(labels)
        assert (labels[held_out] == 1).sum() in (2, 3)
        seen[held_out] += 1
    assert (seen == 1).all()
    again = [held_out for _, held_out in fold_ids(labels, 5, seed=0)]
    other = [held_out for _, held_out in fold_ids(labels, 5, seed=1)]
    first = [held_out for _, held_out in fold_ids(labels, 5, seed=0)]
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [
        ([1, 1, 1], 2, "one class only"),
        ([0, 0, 1, 1], 5, "too few for 5 folds"),
        ([0, 0, 1, 1, 2, 2], 3, "too few for 3 folds"),
        ([0] * 9 + [1], 3, "1 classes have a single sample, such as cat"),
    ],
)
def test_too_few_samples_are_refused(labels, folds, message):
    with pytest.raises(ValueError, match=message):
        check_classes(np.array(labels), ["dog", "cat", "cow"], folds)


class Memory(nn.Module):
    """Knows by heart the label of every feature it was trained on, and nothing else."""

    def __init__(self, num_classes):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(60, num_classes))

    def forward(self, features):
        return self.table[features[:, 0].long()]


def test_what_was_learnt_by_heart_is_no_judgement():
    features = torch.arange(60.0)[:, None]
    labels = torch.arange(60) % 2
    recipe = Recipe(epochs=5, lr=5.0, curriculum="uniform", folds=3, batch_size=8)
    students = []

    def make(num_classes):
        students.append(Memory(num_classes))
        return students[-1]

    found = judge(features, labels, 2, recipe, CPU, make_student=make)
    np.testing.assert_allclose(found.probabilities, 0.5, atol=1e-6)
    for student, (train, _) in zip(students, fold_ids(labels.numpy(), 3, 0), strict=True):
        known = student.table.argmax(1)[train] == labels[train]
        assert known.float().mean() > 0.9  # but what it was trained on it knows
    assert found.percentiles == []  # there is no curriculum that would ask for one


def test_a_student_that_comes_again_is_refused():
    """It was trained on what it would judge."""
    features, labels = torch.randn(40, 3), torch.arange(40) % 2
    model = nn.Linear(3, 2)
    recipe = Recipe(epochs=1, folds=2, batch_size=8)
    with pytest.raises(ValueError, match="same module twice"):
        judge(features, labels, 2, recipe, CPU, make_student=lambda classes: model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda classes: nn.Linear(3, classes - 1), r"gives \[2, 1\].*\[2, 2\]"),
        (lambda classes: nn.Linear(4, classes), r"cannot take samples of \[3\]"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(make, message):
    features, labels = torch.randn(40, 3), torch.arange(40) % 2
    with pytest.raises(ValueError, match=message):
        judge(features, labels, 2, Recipe(epochs=1, batch_size=8), CPU, make_student=make)


def test_students_that_do_not_train_end_it():
    """Most steps are skipped: infinite gradients. Nothing that such students say may count."""
    features, labels = 1e30 * torch.randn(60, 3), torch.arange(60) % 2
    recipe = Recipe(epochs=3, folds=2, batch_size=8, lr=0.5)
    with pytest.raises(ValueError, match=r"[5-9] of its first 9 steps.*lower lr than 0\.5"):
        judge(features, labels, 2, recipe, CPU, make_student=lambda c: nn.Linear(3, c))


def test_what_is_noted_of_steps_is_let_go(monkeypatch):
    """Or the order of every epoch stays on the device; also where some steps are skipped."""
    kept, read = [], Tally.read
    predict = cross_validation._Fold.predict
    monkeypatch.setattr(Tally, "read", lambda *a: read(*a) | {"skipped": 1.0})
    monkeypatch.setattr(
        cross_validation._Fold,
        "predict",
        lambda fold: kept.append(len(fold.spade.guard._norms)) or predict(fold),
    )
    recipe = Recipe(epochs=3, folds=2, batch_size=8)
    judge(torch.randn(60, 3), torch.arange(60) % 2, 2, recipe, CPU)
    assert kept == [0] * 6


def test_samples_that_no_batch_had_do_not_count_as_weights():
    """One epoch of one batch: each student visits 30 of the 40 samples that it is trained on."""
    features, labels = torch.randn(60, 3), torch.arange(60) % 2
    recipe = Recipe(epochs=1, folds=3, batch_size=30, curriculum="uniform")
    found = judge(features, labels, 2, recipe, CPU)
    # 1 whether one or both of a sample's two students have visited it.
    assert set(found.weight_mean.tolist()) <= {0.0, 1.0}
    assert (found.weight_mean == 1).sum() > 45


@pytest.fixture(scope="module")
def judged(data):
    features, given, _ = data
    recipe = Recipe(epochs=12, batch_size=32, lr=0.05)
    return judge(torch.from_numpy(features), torch.from_numpy(given), 3, recipe, CPU)


def test_students_that_have_not_seen_the_samples_know_their_classes(judged, data):
    _, given, clean = data
    np.testing.assert_allclose(judged.probabilities.sum(1), 1, atol=1e-5)
    assert (judged.probabilities.argmax(1) == clean).mean() > 0.97
    agreement = np.mean([fold[-1] for fold in judged.agreement])
    assert agreement == pytest.approx((given == clean).mean(), abs=0.05)
    assert [len(fold) for fold in judged.agreement] == [12] * 5


def test_the_curriculums_percentile_is_the_estimated_share_of_right_labels(judged, data):
    _, given, clean = data
    right = (given == clean).mean()
    assert len(judged.percentiles) == 5
    # Each of 80 held-out samples, some 50 of them anchors.
    assert np.mean(judged.percentiles) == pytest.approx(right, abs=0.06)


def test_every_class_has_the_percentile_of_its_labels(monkeypatch):
    """Class 1 has a tenth of the samples; half of what is labelled with it is wrong."""
    features, _, clean = blobs(n=600, classes=2, rate=0.0)
    keep = (clean == 0) | (np.arange(600) % 20 == 1)
    features, clean = features[keep], clean[keep]
    given = clean.copy()
    given[np.flatnonzero(clean == 0)[::10]] = 1
    asked = []
    monkeypatch.setattr(Reweight, "set_class_percentiles", lambda self, p: asked.append(p))
    recipe = Recipe(epochs=6, batch_size=16)
    judge(torch.from_numpy(features), torch.from_numpy(given), 2, recipe, CPU)
    found = torch.stack(asked).mean(0)
    wanted = [(clean == given)[given == y].mean() for y in range(2)]
    # Of two classes each is all others; the rate is counted on few samples.
    np.testing.assert_allclose(found, np.minimum(wanted, 0.98), atol=0.15)
    assert found[1] < 0.8 < 0.9 < found[0]


def test_weights_are_of_training(judged, data):
    _, given, clean = data
    wrong = given != clean
    assert judged.weight[~wrong].mean() > 0.9
    assert judged.weight[wrong].mean() < 0.2
    assert ((judged.weight_mean >= 0) & (judged.weight_mean <= 1)).all()
    assert judged.loss_var.max() > 0


def test_a_given_rate_is_not_estimated_again(data):
    features, given, _ = data
    recipe = Recipe(epochs=2, batch_size=32, noise_rate=0.45)
    found = judge(torch.from_numpy(features), torch.from_numpy(given), 3, recipe, CPU)
    assert found.percentiles == [pytest.approx(0.55)] * 5


def test_the_seed_decides(data):
    features, given, _ = (torch.from_numpy(column) for column in data)
    recipe = Recipe(epochs=2, batch_size=32, seed=3)
    one, same = (judge(features, given, 3, recipe, CPU) for _ in range(2))
    other = judge(features, given, 3, Recipe(epochs=2, batch_size=32, seed=4), CPU)
    np.testing.assert_array_equal(one.probabilities, same.probabilities)
    assert not np.array_equal(one.probabilities, other.probabilities)


def test_no_class_is_dropped_as_a_whole():
    """By batch the hard threshold loses a class in some folds of these, and never learns it."""
    features, given, clean = blobs(rate=0.4, seed=0)
    found = {}
    for of in ("batch", "class"):
        recipe = Recipe(epochs=12, batch_size=32, percentile_of=of)
        judged = judge(torch.from_numpy(features), torch.from_numpy(given), 3, recipe, CPU)
        found[of] = (judged.last.argmax(1) == clean).mean()
    assert found["class"] > 0.9 > 0.8 > found["batch"]


def test_small_data_gets_more_epochs():
    assert with_epochs(Recipe(), 1_000_000).epochs == 16
    assert with_epochs(Recipe(), 1250).epochs == 72  # 1,000 of them trained on: 7 steps an epoch
    assert with_epochs(Recipe(epochs=3), 1250).epochs == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds is 1"),
        ({"epochs": -1}, "-1"),
        ({"batch_size": 1}, "batch_size 2, got 0 and 1"),
        ({"noise_rate": 1.0}, r"noise_rate.*1\.0"),
    ],
)
def test_bad_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
