"""How many labels are wrong, from out-of-sample predictions.

A student that has not seen a sample cannot have memorised its label. Where it is surest, it is
nearly always right, and how often the given labels differ there is how often they are wrong:

    anchors of class k = the samples with prediction k of the highest probabilities
    T[k, y]            = share of the anchors of class k that are labelled y
    rate               = 1 − Σ_k P(k) T[k, k],  P(k): share of predictions that are k

This is the anchor idea of Patrini et al. (CVPR 2017, Sec. 3.3) with counts in place of
probabilities: a count does not ask the student's probabilities to be calibrated, which under a
curriculum they are not. It assumes that a label is as often wrong on clear samples as on others:
where labels are wrong because the samples are hard, the rate comes out too low. Where the student
is wrong even at its surest it comes out too high. docs/finding_issues.md has the measured errors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ANCHORS = 0.1  # share of a class's predictions
FEWEST = 50  # anchors of a class, as far as there are predictions: their count is the noise's error


@dataclass(frozen=True, eq=False)
class NoiseEstimate:
    """What the labels' noise is taken to be.

    Attributes:
        rate: share of the labels that is wrong, in [0, 1].
        transition: [C, C], T[k, y] = P(given label y | right label k); rows sum to 1.
        prior: [C], share of each class among the right labels.
        anchors: [C], samples that a row of ``transition`` was counted on; a class without any is
            taken to have no wrong labels.
        samples: N.
    """

    rate: float
    transition: NDArray[np.float64]
    prior: NDArray[np.float64]
    anchors: NDArray[np.int64]
    samples: int

    @property
    def is_upper_bound(self) -> bool:
        """Whether classes are too small to count on clear samples alone.

        More than half of all samples were anchors: the students' own errors are counted, too.
        """
        return bool(self.anchors.sum() > 0.5 * self.samples)

    @property
    def standard_error(self) -> float:
        """Of ``rate``, from the number of anchors alone."""
        right = np.diag(self.transition)
        variance = right * (1 - right) / np.maximum(self.anchors, 1)
        return float(np.sqrt((self.prior**2 * variance).sum()))


def estimate_noise(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], share: float = ANCHORS
) -> NoiseEstimate:
    """The noise of labels, from what students say that were not trained on their samples.

    Args:
        probabilities: [N, C], out of sample; a row that is no number counts nowhere.
        labels: [N] in [0, C), the given ones.
        share: of a class's predictions to take as anchors, in (0, 1]; at least `FEWEST`.

    Raises:
        ValueError: shapes that do not fit, or no row with numbers.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities are [N, C] and labels [N], got {list(probabilities.shape)} and "
            f"{list(labels.shape)}"
        )
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is in (0, 1], got {share}")
    known = np.isfinite(probabilities).all(axis=1)
    if not known.any():
        raise ValueError("no sample has probabilities that are numbers")
    if not known.all():
        probabilities, labels = probabilities[known], labels[known]
    classes = probabilities.shape[1]
    predicted, surest = probabilities.argmax(1), probabilities.max(1)
    transition = np.eye(classes)
    anchors = np.zeros(classes, np.int64)
    for k in range(classes):
        rows = np.flatnonzero(predicted == k)
        if not len(rows):
            continue
        anchors[k] = min(len(rows), max(FEWEST, round(share * len(rows))))
        best = rows[np.argsort(-surest[rows], kind="stable")[: anchors[k]]]
        transition[k] = np.bincount(labels[best], minlength=classes) / len(best)
    prior = np.bincount(predicted, minlength=classes) / len(predicted)
    rate = float(np.clip(1 - prior @ np.diag(transition), 0.0, 1.0))
    return NoiseEstimate(rate, transition, prior, anchors, len(labels))


def right_by_label(rate: float, labels: NDArray[np.integer], classes: int) -> NDArray[np.float64]:
    """Of the samples with a label, the share whose label is right, [C].

    Wrong labels are taken to go to all other classes alike. With P(y) the share of class y and s(y)
    that of label y, of K classes that there are:

        s(y) = P(y) (1 − rate) + (1 − P(y)) rate / (K − 1)
        right = P(y) (1 − rate) / s(y)

    So a rare class, to which as many wrong labels come as to a frequent one, has more of them. One
    number is estimated, not one a class: those of a fold's few samples of a rare class are too
    uncertain (docs/finding_issues.md).

    Args:
        rate: share of all labels that is wrong.
        labels: [N] in [0, C), the given ones.
        classes: C.
    """
    given = np.bincount(labels, minlength=classes) / len(labels)
    others = max(1, int((given > 0).sum()) - 1)
    moved = rate / others
    left = 1 - rate - moved
    clean = np.clip((given - moved) / left, 0.0, 1.0) if left > 0 else given
    right = np.divide(clean * (1 - rate), given, out=np.ones(classes), where=given > 0)
    clipped: NDArray[np.float64] = np.clip(right, 0.0, 1.0)
    return clipped
