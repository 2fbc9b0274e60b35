"""Label noise of the usual kinds, injected into labels or into an index.

Whether and how a label changes depends on the seed and its sample id only ("instance": and on its
image). The kinds and their sources are in noise_kinds.py and instance_noise.py. Two conventions are
in use that are both called symmetric:
    "symmetric"        with probability p a label is drawn anew from all C classes (the MentorNet
                       paper), so about p (1 − 1/C) of the labels end up wrong;
    "symmetric-other"  with probability p it becomes one of the C − 1 other classes, so about p of
                       them end up wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mentorch.engine.data.index import Index
from mentorch.engine.data.instance_noise import (
    flip_rate_std,
    instance_noise,
    mean_flip_rate,
    thumbnails,
)
from mentorch.engine.data.noise_kinds import (
    Matrix,
    NoiseKind,
    check_kind,
    check_rate,
    checked_matrix,
    resolved_mapping,
    transition_matrix,
)
from mentorch.kernels.philox import Stream, philox

Labels = npt.NDArray[np.int64]
Images = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Noise:
    """Label noise: a kind, its strength and a seed.

    Example:
        >>> given = Noise("pair", 0.4, seed=1).apply(clean, num_classes=10)

    Attributes:
        kind: one of `NoiseKind`.
        rate: probability p that a label is replaced, in [0, 1]; for "asymmetric" that of the
            classes that the mapping names; None for "matrix", which says it itself.
        seed: of the counter-based generator.
        mapping: for "asymmetric": a name in `noise_kinds.MAPPINGS`, text such as "3:5,5:3", or
            clean class → the class it is taken for.
        matrix: for "matrix": T [C, C], T[i, j] = P(given j | clean i); `read_matrix` reads a file.
    """

    kind: NoiseKind = "symmetric"
    rate: float | None = None
    seed: int = 0
    mapping: str | Mapping[int, int] | None = None
    matrix: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if something is missing, out of range, or of no use to the kind."""
        check_kind(self.kind)
        if self.kind != "matrix":
            check_rate(self.rate)
        elif self.rate is not None:
            raise ValueError(f"matrix noise takes no rate ({self.rate}): its matrix says it")
        for option, kind in (("mapping", "asymmetric"), ("matrix", "matrix")):
            given = getattr(self, option) is not None
            if given and self.kind != kind:
                raise ValueError(f"a {option} is for {kind} noise; this is {self.kind} noise")
            if not given and self.kind == kind:
                raise ValueError(f"{kind} noise needs a {option}")

    def transition(self, num_classes: int) -> Matrix:
        """T [C, C], T[i, j] = P(given j | clean i).

        Raises:
            ValueError: the mapping or the matrix is not one for C classes; or this is "instance"
                noise, which has no one T (`measured_matrix` gives the average).
        """
        if self.kind == "matrix":
            check_kind(self.kind, num_classes)
            return checked_matrix(self.matrix, num_classes)
        return transition_matrix(self.kind, self._rate, num_classes, self.mapping)

    def apply(
        self,
        labels: Labels,
        num_classes: int,
        sample_ids: Labels | None = None,
        images: Images | None = None,
    ) -> Labels:
        """Labels with this noise.

        Args:
            labels: the labels, [N], in 0..C−1.
            num_classes: C.
            sample_ids: int64 [N], no two alike; None numbers the labels from 0.
            images: for "instance": [N, …]; uint8 counts as 0 to 1, other numbers as they are.

        Returns:
            New labels, int64 [N].

        Raises:
            ValueError: an argument does not fit, see the message.
            AssertionError: the share of changed labels is not the expected one: a defect here.
        """
        labels = np.asarray(labels, np.int64)
        ids = np.arange(len(labels)) if sample_ids is None else np.asarray(sample_ids, np.int64)
        check_kind(self.kind, num_classes)
        _check_samples(labels, ids, num_classes)
        if self.kind == "instance":
            new = self._by_image(labels, num_classes, ids, images)
        else:
            new = self._by_class(labels, num_classes, ids)
        _assert_share(new != labels, self._flip_probability(labels, num_classes))
        return new

    def expected_share(self, labels: Labels, num_classes: int) -> float:
        """The share of these labels, [N], that the noise is expected to change."""
        return float(self._flip_probability(labels, num_classes).mean())

    def record(self, num_classes: int) -> dict[str, Any]:
        """What makes the same noise again, for `Index.noise`; plain JSON types."""
        record: dict[str, Any] = {"kind": self.kind, "rate": self.rate, "seed": self.seed}
        if self.kind == "asymmetric":
            pairs = resolved_mapping(self.mapping, num_classes)
            record["mapping"] = {str(source): target for source, target in sorted(pairs.items())}
        elif self.kind == "matrix":
            record["matrix"] = self.transition(num_classes).tolist()
        elif self.kind == "instance":
            record["flip_rate_std"] = flip_rate_std(self._rate)
        return record

    @property
    def _rate(self) -> float:
        assert self.rate is not None
        return self.rate

    def _by_class(self, labels: Labels, num_classes: int, ids: Labels) -> Labels:
        words = philox(self.seed, 0, torch.from_numpy(ids), Stream.LABEL_NOISE)
        first, second = words[0].numpy(), words[1].numpy()
        transition = self.transition(num_classes)
        if self.kind in ("symmetric", "symmetric-other"):
            new = _symmetric(labels, num_classes, self.kind, self._rate, first, second)
        else:
            new = _from_matrix(labels, transition, first)
        assert (transition[labels, new] > 0).all(), "a label became what it cannot become"
        return new

    def _by_image(
        self, labels: Labels, num_classes: int, ids: Labels, images: Images | None
    ) -> Labels:
        if images is None:
            raise ValueError("instance noise depends on the images; give them as images=…, [N, …]")
        return instance_noise(labels, num_classes, self._rate, self.seed, ids, np.asarray(images))

    def _flip_probability(self, labels: Labels, num_classes: int) -> npt.NDArray[np.float64]:
        if self.kind == "instance":
            return np.full(len(labels), mean_flip_rate(self._rate))
        # Rows may miss 1 by their tolerance, so this is not one minus the diagonal.
        transition = self.transition(num_classes)
        others = transition * (1 - np.eye(num_classes))
        flipped: npt.NDArray[np.float64] = others.sum(axis=1) / transition.sum(axis=1)
        return flipped[labels]


def add_noise(
    index: Index,
    noise: Noise,
    split: str = "train",
    max_label: int | None = None,
    images: Callable[[Labels], Images] | None = None,
) -> Index:
    """An index whose labels carry noise; the labels from before are its ``clean_label``.

    Args:
        index: an index without injected noise.
        noise: its kind, rate and seed.
        split: the split that gets noise.
        max_label: noise only among the labels below this number (50 for WebVision's mini protocol).
        images: for "instance" noise: sample ids [N] → their images or features [N, …]; None reads
            the image files as grey thumbnails of 32 × 32 pixels.

    Returns:
        A new index; `Index.noise` has what `Noise.record` gives, split and max_label, and of the
        labels of the split (below max_label) the shares: expected_share and changed_share, to be
        changed and changed by the noise, and wrong_share, wrong now.

    Raises:
        ValueError: the index has injected noise already, or an argument is out of range.
    """
    num_classes = _checked_classes(index, max_label)
    old, clean = index.labels(), index.clean_labels()
    rows = np.flatnonzero(
        pc.equal(index.table["split"], split).to_numpy() & (old < num_classes)
    ).astype(np.int64)
    if not len(rows):
        raise ValueError(f"the index has no samples with split={split!r} to put noise on")
    features = None
    if noise.kind == "instance":
        features = images(rows) if images is not None else thumbnails(index, rows)
    new = old.copy()
    new[rows] = noise.apply(old[rows], num_classes, rows, features)
    clean[rows] = np.where(clean[rows] < 0, old[rows], clean[rows])
    record = noise.record(num_classes) | {
        "split": split,
        "max_label": max_label,
        "expected_share": noise.expected_share(old[rows], num_classes),
        "changed_share": float((new[rows] != old[rows]).mean()),
        "wrong_share": float((new[rows] != clean[rows]).mean()),
    }
    return replace(index, table=_with_labels(index.table, new, clean), noise=record)


def _checked_classes(index: Index, max_label: int | None) -> int:
    if index.noise is not None:
        rate = index.noise["rate"]
        raise ValueError(
            f"this index has {index.noise['kind']} noise "
            f"{'' if rate is None else f'of rate {rate} '}already; "
            "start from the index without noise"
        )
    num_classes = len(index.classes) if max_label is None else max_label
    if not 0 < num_classes <= len(index.classes):
        raise ValueError(f"max_label is {max_label}; the index has {len(index.classes)} classes")
    return num_classes


def _check_samples(labels: Labels, ids: Labels, num_classes: int) -> None:
    if ids.shape != labels.shape:
        raise ValueError(f"{len(ids)} sample ids do not fit {len(labels)} labels")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0]} of sample {ids[outside.argmax()]} is not in "
            f"0..{num_classes - 1}"
        )
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"sample id {values[counts.argmax()]} is there twice; samples of the same id would "
            "get the same noise"
        )


def _symmetric(
    labels: Labels, num_classes: int, kind: str, rate: float, first: Labels, second: Labels
) -> Labels:
    """Whether by the first word, what by the second; existing indexes were made like this."""
    chosen = first < round(rate * 2**32)
    if kind == "symmetric":
        new = (second * num_classes) >> 32
    else:
        new = (second * (num_classes - 1)) >> 32
        new += new >= labels
    return np.where(chosen, new, labels).astype(np.int64)


def _from_matrix(labels: Labels, transition: Matrix, word: Labels) -> Labels:
    """The inverse distribution function of row T[label] at the word, for all rows by one search."""
    num_classes = len(transition)
    cumulative = np.cumsum(transition, axis=1)
    thresholds = np.round(cumulative / cumulative[:, -1:] * 2.0**32).astype(np.int64)
    ends = (thresholds + (np.arange(num_classes)[:, None] << 32)).ravel()
    found = np.searchsorted(ends, word + (labels << 32), side="right")
    return (found - labels * num_classes).astype(np.int64)


def _assert_share(changed: npt.NDArray[np.bool_], probability: npt.NDArray[np.float64]) -> None:
    """Holds the number of changed labels against its distribution.

    Bernstein's inequality at x = 15: by chance it fails less often than a normal number leaves five
    standard deviations (2 e⁻¹⁵ = 6e-7), for few samples and small rates too, where a plain limit of
    five standard deviations would not hold: |n − E n| ≤ x/3 + √(x²/9 + 2 x Var n).
    """
    expected, variance = probability.sum(), (probability * (1 - probability)).sum()
    allowed = 5 + np.sqrt(25 + 30 * variance) if variance > 0 else 0.5
    if abs(changed.sum() - expected) > allowed:
        raise AssertionError(
            f"{changed.sum():,} of {len(changed):,} labels changed and {expected:,.1f} were "
            "expected: a defect of mentorch's label noise, please report it"
        )


def _with_labels(table: pa.Table, labels: Labels, clean: Labels) -> pa.Table:
    clean_column = pa.array(clean, pa.int32(), mask=clean < 0)
    for name, column in (("label", pa.array(labels, pa.int32())), ("clean_label", clean_column)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), column)
    return table
