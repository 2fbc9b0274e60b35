"""Scores of samples that are in no index: labels as an array, what is known from a ledger."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from torch import Tensor

from mentorch.engine.ledger import Columns
from mentorch.engine.report.scores import Labelled, Labels, score_samples


def score_arrays(
    ledger: Columns,
    labels: ArrayLike | Tensor,
    class_names: Sequence[str] | None = None,
    clean_labels: ArrayLike | Tensor | None = None,
    paths: Sequence[str] | None = None,
) -> pa.Table:
    """`score_samples` with arrays in place of an index.

    Args:
        ledger: columns by name, [N] each.
        labels: [N] integers, the given labels; a tensor may be on any device.
        class_names: [C], by label; by default the labels' numbers.
        clean_labels: [N], those known to be right; below 0 where unknown.
        paths: [N], what to call the samples.

    Returns:
        One row a visited sample, by rank.

    Raises:
        ValueError: lengths that do not fit, a label without a name, or no sample was visited.
    """
    given, clean = _flat(labels), None if clean_labels is None else _flat(clean_labels)
    if len(given) != len(ledger["visits"]):
        raise ValueError(
            f"{len(given):,} labels for a ledger of {len(ledger['visits']):,} samples: give those "
            "of the whole training set, in the order of the sample ids"
        )
    numbers = [column.max() for column in (given, clean, ledger["predicted"]) if column is not None]
    classes = 1 + int(max(numbers))
    names = [str(label) for label in range(classes)] if class_names is None else class_names
    if len(names) < classes:
        raise ValueError(
            f"{len(names)} class names, but label or prediction {classes - 1} has none"
        )
    return score_samples(ledger, Labelled(given, tuple(names), clean, paths))


def _flat(labels: ArrayLike | Tensor) -> Labels:
    labels = labels.cpu() if isinstance(labels, Tensor) else labels
    return np.asarray(labels, dtype=np.int64).reshape(-1)
