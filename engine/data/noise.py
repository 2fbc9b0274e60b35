"""Symmetric label noise, injected into an index.

Two conventions are in use, and both are called symmetric:
    "symmetric"        with probability p a label is drawn anew from all C classes (the MentorNet
                       paper), so about p (1 − 1/C) of the labels end up wrong;
    "symmetric-other"  with probability p it becomes one of the C − 1 other classes, so about p of
                       them end up wrong.
Whether and how a label changes depends on the seed and its sample id only.
"""

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mentorch.engine.data.index import Index
from mentorch.kernels.philox import Stream, philox

NoiseKind = Literal["symmetric", "symmetric-other"]


def symmetric_noise(
    labels: npt.NDArray[np.int64],
    num_classes: int,
    rate: float,
    *,
    kind: NoiseKind = "symmetric",
    seed: int = 0,
    sample_ids: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Labels with symmetric noise.

    Args:
        labels: the labels, [N], in 0..num_classes−1.
        num_classes: C of the convention.
        rate: probability p that a label is replaced, in [0, 1].
        kind: "symmetric" or "symmetric-other".
        seed: of the counter-based generator.
        sample_ids: int64 [N]; None numbers the labels from 0.

    Returns:
        New labels, [N].
    """
    _check(num_classes, rate, kind)
    ids = np.arange(len(labels)) if sample_ids is None else sample_ids
    words = philox(seed, 0, torch.from_numpy(np.asarray(ids, np.int64)), Stream.LABEL_NOISE)
    chosen = words[0].numpy() < round(rate * 2**32)
    if kind == "symmetric":
        new = (words[1].numpy() * num_classes) >> 32
    else:
        new = (words[1].numpy() * (num_classes - 1)) >> 32
        new += new >= labels
    return np.where(chosen, new, labels).astype(np.int64)


def add_symmetric_noise(
    index: Index,
    rate: float,
    kind: NoiseKind = "symmetric",
    seed: int = 0,
    split: str = "train",
    max_label: int | None = None,
) -> Index:
    """An index whose labels carry symmetric noise; the labels from before are its `clean_label`.

    Args:
        index: an index without injected noise.
        rate: probability that a label is replaced, in [0, 1].
        kind: "symmetric" (uniform over all classes) or "symmetric-other" (over the other classes).
        seed: of the counter-based generator; stored in `Index.noise`.
        split: the split that gets noise.
        max_label: noise only among the labels below this number (50 for WebVision's mini protocol).

    Returns:
        A new index; `Index.noise` has kind, rate, seed, split, max_label and wrong_share, the share
        of the split's labels (below max_label) that are wrong now.

    Raises:
        ValueError: the index has injected noise already, or an argument is out of range.
    """
    if index.noise is not None:
        raise ValueError(
            f"this index has {index.noise['kind']} noise of rate {index.noise['rate']} already; "
            "start from the index without noise"
        )
    num_classes = len(index.classes) if max_label is None else max_label
    if not 0 < num_classes <= len(index.classes):
        raise ValueError(f"max_label is {max_label}; the index has {len(index.classes)} classes")
    old, clean = index.labels(), index.clean_labels()
    rows = np.flatnonzero(
        pc.equal(index.table["split"], split).to_numpy() & (old < num_classes)
    ).astype(np.int64)
    if not len(rows):
        raise ValueError(f"the index has no samples with split={split!r} to put noise on")
    new = old.copy()
    new[rows] = symmetric_noise(old[rows], num_classes, rate, kind=kind, seed=seed, sample_ids=rows)
    clean[rows] = np.where(clean[rows] < 0, old[rows], clean[rows])
    noise = {
        "kind": kind,
        "rate": rate,
        "seed": seed,
        "split": split,
        "max_label": max_label,
        "wrong_share": float((new[rows] != clean[rows]).mean()),
    }
    return replace(index, table=_with_labels(index.table, new, clean), noise=noise)


def _check(num_classes: int, rate: float, kind: str) -> None:
    if kind not in get_args(NoiseKind):
        raise ValueError(f"noise kind {kind!r} is unknown; it is one of {get_args(NoiseKind)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"noise rate is {rate}; it is a probability, from 0 to 1")
    if kind == "symmetric-other" and num_classes < 2:
        raise ValueError("symmetric-other noise needs at least two classes")


def _with_labels(
    table: pa.Table, labels: npt.NDArray[np.int64], clean: npt.NDArray[np.int64]
) -> pa.Table:
    clean_column = pa.array(clean, pa.int32(), mask=clean < 0)
    for name, column in (("label", pa.array(labels, pa.int32())), ("clean_label", clean_column)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), column)
    return table
