"""The noise rate from out-of-sample probabilities: from ones made up, so that it is known."""

import numpy as np
import pytest

from mentorch.engine.issues.noise_rate import FEWEST, estimate_noise, right_by_label


def made_up(n, transition, prior, error, seed=0):
    """A student that is right where it is sure, and wrong in ``error`` of all cases elsewhere."""
    random = np.random.default_rng(seed)
    classes = len(prior)
    clean = random.choice(classes, n, p=prior)
    given = np.array([random.choice(classes, p=transition[c]) for c in clean])
    sureness = random.random(n)
    confused = random.random(n) < 2 * error * (1 - sureness)
    predicted = np.where(confused, (clean + 1) % classes, clean)
    probabilities = np.full((n, classes), 0.0)
    top = 1 / classes + (1 - 1 / classes) * np.where(confused, sureness / 2, sureness)
    probabilities[:] = ((1 - top) / (classes - 1))[:, None]
    probabilities[np.arange(n), predicted] = top
    return probabilities, given, clean


def symmetric(rate, classes):
    return (1 - rate) * np.eye(classes) + rate / classes


# Rates as in the issue; a student that is never wrong, and one that is in 15% of all cases.
@pytest.mark.parametrize("error", [0.0, 0.15])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6])
def test_the_rate_is_found(rate, error):
    prior = np.array([0.5, 0.3, 0.15, 0.05])
    probabilities, given, clean = made_up(20_000, symmetric(rate, 4), prior, error)
    found = estimate_noise(probabilities, given)
    wrong = (given != clean).mean()
    # Where it is surest, a tenth, the student still errs in 2 · error · 0.05 of all cases.
    assert abs(found.rate - wrong) < 3 * found.standard_error + 0.1 * error + 0.002


def test_the_transition_is_found():
    wanted = np.array([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]])
    probabilities, given, _ = made_up(30_000, wanted, np.full(3, 1 / 3), 0.0)
    found = estimate_noise(probabilities, given)
    np.testing.assert_allclose(found.transition, wanted, atol=0.04)
    np.testing.assert_allclose(found.transition.sum(1), 1)
    np.testing.assert_allclose(found.prior, 1 / 3, atol=0.02)


def test_labels_of_rare_classes_are_wrong_more_often():
    """They come from frequent ones: more than half of what has the rarest label is wrong."""
    prior = np.array([0.6, 0.37, 0.03])
    _, given, clean = made_up(40_000, symmetric(0.15, 3), prior, 0.0)
    found = right_by_label(float((given != clean).mean()), given, 4)
    wanted = [(clean == given)[given == y].mean() for y in range(3)]
    np.testing.assert_allclose(found[:3], wanted, atol=0.02)
    assert wanted[2] < 0.5
    assert found[3] == 1  # nobody has that label


def test_a_class_that_nobody_predicts_is_taken_to_be_right():
    probabilities = np.tile([0.9, 0.1, 0.0], (30, 1))
    found = estimate_noise(probabilities, np.array([0, 1, 0] * 10))
    assert found.anchors.tolist() == [30, 0, 0]
    assert found.rate == pytest.approx(1 / 3)
    np.testing.assert_array_equal(found.transition[1:], np.eye(3)[1:])


def test_few_samples_have_enough_anchors():
    probabilities, given, _ = made_up(300, symmetric(0.2, 2), np.full(2, 0.5), 0.0)
    assert (estimate_noise(probabilities, given).anchors == FEWEST).all()


def test_rows_that_are_no_numbers_count_nowhere():
    probabilities, given, _ = made_up(1000, symmetric(0.2, 3), np.full(3, 1 / 3), 0.0)
    broken = np.concatenate([probabilities, np.full((500, 3), np.nan)])
    wanted = estimate_noise(probabilities, given)
    found = estimate_noise(broken, np.concatenate([given, np.zeros(500, int)]))
    assert found.rate == wanted.rate
    np.testing.assert_array_equal(found.transition, wanted.transition)


def test_the_standard_error_is_that_of_the_rate():
    rates, errors = [], []
    for seed in range(40):
        found = estimate_noise(*made_up(4000, symmetric(0.3, 4), np.full(4, 0.25), 0.0, seed)[:2])
        rates.append(found.rate)
        errors.append(found.standard_error)
    assert np.std(rates) == pytest.approx(np.mean(errors), rel=0.35)


def test_small_classes_give_an_upper_bound():
    """Ten samples of a class: all are anchors, and the student's errors count as wrong labels."""
    probabilities, given, _ = made_up(200, symmetric(0.0, 20), np.full(20, 0.05), 0.15)
    found = estimate_noise(probabilities, given)
    assert found.rate > 0.05
    assert found.is_upper_bound
    assert not estimate_noise(
        *made_up(4000, symmetric(0.0, 4), np.full(4, 0.25), 0.15)[:2]
    ).is_upper_bound


@pytest.mark.parametrize(
    ("probabilities", "labels", "share", "message"),
    [
        (np.zeros((3, 2)), np.zeros(4, int), 0.1, r"\[3, 2\] and \[4\]"),
        (np.zeros(3), np.zeros(3, int), 0.1, r"\[N, C\]"),
        (np.zeros((3, 2)), np.zeros(3, int), 0.0, r"\(0, 1\], got 0"),
        (np.full((3, 2), np.nan), np.zeros(3, int), 0.1, "no sample"),
    ],
)
def test_what_cannot_be_estimated_is_refused(probabilities, labels, share, message):
    with pytest.raises(ValueError, match=message):
        estimate_noise(probabilities, labels, share)
