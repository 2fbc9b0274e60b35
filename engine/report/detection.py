"""How well the suspicion finds the labels that are known to be wrong."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from mentorch.engine.report.scores import known_wrong

DETECTORS = {  # column, and the sign that makes a higher value more suspicious
    "suspicion (mean loss)": ("suspicion", 1),
    "last loss": ("loss", 1),
    "mean weight": ("weight_mean", -1),
    "last weight": ("weight", -1),
}
_DEPTHS = (50, 100, 500)


@dataclass(frozen=True, eq=False)
class Detection:
    """What one score is worth as a detector of wrong labels.

    Attributes:
        name: of the score.
        auroc: area under the ROC curve, in [0, 1]; 0.5 says nothing.
        precision: share of wrong labels among the k most suspicious, by k.
        curve: false and true positive rates, [2, m].
    """

    name: str
    auroc: float
    precision: dict[int, float]
    curve: NDArray[np.float64]


def detect(scores: pa.Table) -> list[Detection]:
    """Every detector over the samples with a known clean label.

    Returns:
        One a detector; none when the known labels are all right, all wrong, or there are none.
    """
    known, wrong = known_wrong(scores)
    truth = wrong[known]
    if truth.all() or not truth.any():
        return []
    depths = sorted({*(k for k in _DEPTHS if k <= len(truth)), int(truth.sum())})
    found = []
    for name, (column, sign) in DETECTORS.items():
        # The suspicion of a hopeless sample rounds to 1; the mean loss behind it does not.
        source = "loss_mean" if column == "suspicion" else column
        values = sign * scores[source].to_numpy()[known].astype(np.float64)
        values = np.nan_to_num(values, nan=np.inf)  # a loss that was no number
        finite = np.clip(values, -1e30, 1e30)
        found.append(_detection(name, truth, finite, depths))
    return found


def _detection(name: str, truth: Any, values: Any, depths: list[int]) -> Detection:
    false, true, _ = roc_curve(truth, values)
    precision = {k: precision_at(truth, values, k) for k in depths}
    return Detection(name, float(roc_auc_score(truth, values)), precision, np.stack([false, true]))


def precision_at(truth: NDArray[np.bool_], values: NDArray[np.float64], k: int) -> float:
    """The share of wrong labels among the k highest values, equal ones in random order.

    Args:
        truth: [n], True where the label is wrong.
        values: [n], higher is more suspicious.
        k: at most n.

    Returns:
        Its expectation: a weight that is 0 or 1 must not profit from the order of the file.
    """
    edge = np.partition(values, len(values) - k)[len(values) - k]  # the k-th highest
    above, at_edge = values > edge, values == edge
    left = k - int(above.sum())
    return float((truth[above].sum() + left * truth[at_edge].mean()) / k)
