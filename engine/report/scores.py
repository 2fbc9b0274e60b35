"""A row for every training sample the run has visited, the most suspicious label first.

    suspicion = 1 − exp(−mean loss)

is one minus the probability that the student gave the label, its geometric mean over all visits.
The mean over training finds wrong labels better than the last loss does, since what is memorised in
the end was hard to learn first, and better than weights, which are coarse (0 or 1) and random in
burn-in (docs/report.md has the figures). It needs no curriculum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mentorch.engine.data.index import replacing

Labels = NDArray[np.int64]

SUSPECT = 0.5  # suspicion from which on a label that the student does not predict is a suspect
_FROM_LEDGER = (
    "weight", "weight_mean", "weight_var", "loss", "loss_mean", "loss_var", "visits", "forgetting",
)  # fmt: skip


class Named(Protocol):
    """What the scores' table says of samples besides their scores: an `Index`, or `Labelled`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""

    def labels(self) -> Labels:
        """Given labels, [N]."""

    def clean_labels(self) -> Labels:
        """Labels known to be right, [N]; −1 where unknown."""

    def paths(self) -> pa.Array:
        """What to call the samples, [N] strings or nulls."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Samples that are in no index.

    Attributes:
        given: labels, [N] int64 in [0, C).
        class_names: [C], by label.
        clean: labels known to be right, [N] int64, −1 where unknown; None: none is known.
        files: what to call the samples, [N]; None: nothing.
    """

    given: Labels
    class_names: tuple[str, ...]
    clean: Labels | None = None
    files: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, column in (("clean", self.clean), ("files", self.files)):
            if column is not None and len(column) != len(self.given):
                raise ValueError(
                    f"{name} has {len(column):,} entries for {len(self.given):,} labels"
                )
        if len(self.given) and self.given.max() >= len(self.class_names):
            raise ValueError(
                f"label {self.given.max()} has no name: there are {len(self.class_names)}"
            )

    def labels(self) -> Labels:
        """Given labels, [N]."""
        return self.given

    def clean_labels(self) -> Labels:
        """Labels known to be right, [N]; −1 where unknown."""
        return np.full_like(self.given, -1) if self.clean is None else self.clean

    def paths(self) -> pa.Array:
        """What to call the samples, [N] strings or nulls."""
        nothing = pa.nulls(len(self.given), pa.string())
        return nothing if self.files is None else pa.array(self.files, pa.string())


def score_samples(ledger: dict[str, NDArray[Any]], samples: Named) -> pa.Table:
    """Every visited sample with its scores; the columns are those of docs/report.md.

    Args:
        ledger: columns by name, [N] each.
        samples: N rows too: the training set's index, or `Labelled`.

    Returns:
        One row a visited sample, by rank.

    Raises:
        ValueError: no sample was visited.
    """
    visited = np.flatnonzero(ledger["visits"] > 0)
    if not len(visited):
        raise ValueError("the ledger has no visited sample: the run has not trained on any yet")
    # Stable: among equals the lower sample id comes first.
    order = np.argsort(-ledger["loss_mean"][visited], kind="stable")
    ids = visited[order]
    of = {name: column[ids] for name, column in ledger.items()}
    given, clean = samples.labels()[ids], samples.clean_labels()[ids]
    quality = np.exp(-of["loss_mean"].astype(np.float64))
    differs = (of["predicted"] != given) & (of["predicted"] >= 0)
    columns = {
        "rank": pa.array(np.arange(1, len(ids) + 1)),
        "sample_id": pa.array(ids),
        "path": samples.paths().take(pa.array(ids)),
        **_label("given", given, samples),
        **_label("predicted", of["predicted"].astype(np.int64), samples),
        "given_probability": pa.array(np.exp(-of["loss"].astype(np.float64))),
        "predicted_probability": pa.array(of["probability"]),
        "suspicion": pa.array(1 - quality),
        "quality": pa.array(quality),
        "suspect": pa.array(differs & (1 - quality > SUSPECT)),
        **{name: pa.array(of[name]) for name in _FROM_LEDGER},
        "clean_label": pa.array(clean.astype(np.int32), mask=clean < 0),
    }
    return pa.table(columns)


def _label(what: str, labels: Labels, samples: Named) -> dict[str, pa.Array]:
    # Nothing was predicted where the student's output was no number.
    codes = pa.array(labels.astype(np.int32), mask=labels < 0)
    names = pa.DictionaryArray.from_arrays(codes, pa.array(samples.class_names, pa.string()))
    return {f"{what}_label": codes, f"{what}_name": names}


def known_wrong(scores: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows have a known clean label, and which are known to be wrong, [n] each."""
    known = pc.is_valid(scores["clean_label"])
    wrong = pc.fill_null(pc.not_equal(scores["clean_label"], scores["given_label"]), False)
    return known.to_numpy(), wrong.to_numpy()


def print_top(scores: pa.Table, column: str, rows: int = 10) -> None:
    """Prints the most suspicious samples, a line each.

    Args:
        scores: of `score_samples`.
        column: the number that is shown: "suspicion", "loss_mean".
        rows: how many, at most.
    """
    heads = {"loss_mean": "mean loss"}
    print(f"\n{'rank':>4}  {heads.get(column, column):>9}  {'given':<20}  {'predicted':<20}  path")
    for row in scores.slice(0, rows).to_pylist():
        # Nothing was predicted where the student's output was no number; arrays have no paths.
        given, predicted = (f"{(row[f'{w}_name'] or '?')[:20]:<20}" for w in ("given", "predicted"))
        name = row["path"] or f"sample {row['sample_id']}"
        print(f"{row['rank']:>4}  {row[column]:>9.4f}  {given}  {predicted}  {name}")


def write_scores(scores: pa.Table, path: Path) -> None:
    """Writes the table as Parquet, atomically."""
    with replacing(path) as temporary:
        pq.write_table(scores, temporary, compression="zstd")
