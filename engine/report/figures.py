"""The report's drawings, each from the run's metrics or from the scores of its samples."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mentorch.engine.report.detection import Detection
from mentorch.engine.report.drawing import BLUE, GREY, ORANGE, Picture, draw
from mentorch.engine.report.scores import known_wrong

Metrics = list[dict[str, Any]]
Pairs = list[tuple[int, int, int]]
Lines = dict[str, tuple[list[int], list[float]]]
HEAT_MAP_CLASSES = 50  # more would be smaller than a pixel or two
_BINS = np.linspace(0, 1, 41)


def curves(metrics: Metrics) -> list[Picture]:
    """Losses, accuracies, weights and data utilisation over training, as far as there are any."""
    train = [line for line in metrics if line["kind"] == "train"]
    losses = {"loss": "loss", "weighted_loss": "weighted Σvℓ/B", "loss_moving_avg": "ℓ_pt"}
    weights = {"weight_right": "right labels", "weight_wrong": "wrong labels"}
    known = any(name in line for line in train for name in weights)
    shown = weights if known else {"mean_weight": "all labels"}
    pictures = [
        _lines("Training loss", "nats", _series(train, losses)),
        _lines("Accuracy (top-1)", "share of images", _accuracies(metrics), top=1.0),
        _lines("Mean weight", "weight", _series(train, shown), top=1.0),
        _lines(
            "Data utilisation", "share with weight above 0",
            _series(train, {"data_utilization": "samples used"}), top=1.0,
        ),
    ]  # fmt: skip
    return [picture for picture in pictures if picture is not None]


def _series(lines: Metrics, names: dict[str, str]) -> Lines:
    found = {}
    for name, label in names.items():
        there = [line for line in lines if name in line]
        if there:
            found[label] = ([line["step"] for line in there], [line[name] for line in there])
    return found


def _accuracies(metrics: Metrics) -> Lines:
    found: Lines = defaultdict(lambda: ([], []))
    for line in metrics:
        if line["kind"].startswith("eval/"):
            steps, values = found[line["kind"].removeprefix("eval/")]
            steps.append(line["step"])
            values.append(line["top1"])
    return dict(found)


def _lines(title: str, unit: str, lines: Lines, top: float | None = None) -> Picture | None:
    if not lines:
        return None

    def paint(axes: Any) -> None:
        for label, (steps, values) in lines.items():
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, label=_plain(label), marker=marker, markersize=3)
        axes.set(xlabel="training step", ylabel=unit)
        axes.set_ylim(bottom=0, top=None if top is None else top * 1.03)
        if len(lines) > 1:
            axes.legend()

    ends = ", ".join(f"{label} ends at {values[-1]:.3g}" for label, (_, values) in lines.items())
    return draw(title, f"Line chart of {title.lower()} by training step: {ends}.", paint)


def _plain(text: str) -> str:
    """Text for a drawing as it is: matplotlib reads mathematics between dollar signs."""
    return text.replace("$", r"\$")


def histograms(scores: pa.Table) -> list[Picture]:
    """Suspicion and mean weight of suspects and the rest; of right and wrong labels when known."""
    suspect = scores["suspect"].to_numpy()
    groups = {"suspects": (suspect, ORANGE), "the rest": (~suspect, GREY)}
    known, wrong = known_wrong(scores)
    truth = {"wrong labels": (wrong, ORANGE), "right labels": (known & ~wrong, BLUE)}
    columns = {"suspicion": "suspicion", "weight_mean": "mean weight over all visits"}
    pictures = [_histogram(scores[c].to_numpy(), name, groups) for c, name in columns.items()]
    if wrong.any():
        pictures += [_histogram(scores[c].to_numpy(), name, truth) for c, name in columns.items()]
    return pictures


def _histogram(
    values: NDArray[Any], name: str, groups: dict[str, tuple[NDArray[np.bool_], str]]
) -> Picture:
    title = f"{name[0].upper()}{name[1:]}: {' and '.join(groups)}"
    groups = {k: (rows & np.isfinite(values), color) for k, (rows, color) in groups.items()}

    def paint(axes: Any) -> None:
        for label, (rows, color) in groups.items():
            axes.hist(values[rows], _BINS, alpha=0.65, color=color, label=label)
        axes.set(xlabel=name, ylabel="samples", xlim=(0, 1))
        axes.legend()

    means = ", ".join(
        f"{rows.sum():,} {label} with mean {values[rows].mean():.2f}"
        for label, (rows, _) in groups.items()
        if rows.any()
    )
    return draw(title, f"Histogram of {name}: {means}.", paint)


def heat_map(pairs: Pairs, names: Sequence[str]) -> Picture | None:
    """Suspects by given and predicted class; None without any, or with too many classes to see.

    Args:
        pairs: given label, predicted label and count.
        names: of the classes, by label.
    """
    classes = len(names)
    if classes > HEAT_MAP_CLASSES or not pairs:
        return None
    counts = np.full((classes, classes), np.nan)  # NaN is left blank
    for given, predicted, count in pairs:
        counts[given, predicted] = count

    alt = f"Heat map of {np.nansum(counts):,.0f} suspects by given and predicted class."
    title = "Suspects by given and predicted class"
    return _matrix(title, alt, counts, names, bar="suspects", x="predicted", y="given")


def transition(shares: NDArray[np.float64], names: Sequence[str]) -> Picture | None:
    """Which classes wrong labels come from and go to; None with too many classes to see.

    Args:
        shares: [C, C], P(given label | right class).
        names: of the classes, by label.
    """
    if len(names) > HEAT_MAP_CLASSES:
        return None
    wrong = np.where(np.eye(len(names), dtype=bool) | (shares == 0), np.nan, shares)
    largest = np.nan_to_num(wrong).max(initial=0)
    alt = f"Heat map of wrong labels by right class and given label; at most {largest:.0%}."
    bar = "share of the class"
    return _matrix("Wrong labels", alt, wrong, names, bar=bar, x="given label", y="right class")


def _matrix(
    title: str,
    alt: str,
    values: NDArray[np.float64],
    names: Sequence[str],
    *,
    bar: str,
    x: str,
    y: str,
) -> Picture:
    """Values by class and class; NaN is left blank."""
    classes = len(names)

    def paint(axes: Any) -> None:
        axes.grid(False)
        image = axes.imshow(values, cmap="YlOrRd", vmin=0, interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, shrink=0.8, label=bar)
        short = [_plain(name if len(name) <= 18 else name[:17] + "…") for name in names]
        axes.set_xticks(range(classes), short, rotation=90)
        axes.set_yticks(range(classes), short)
        axes.tick_params(labelsize=8 if classes <= 20 else 5, length=0)
        axes.set(xlabel=x, ylabel=y)

    side = 4.6 if classes <= 20 else 7.5
    return draw(title, alt, paint, (side * 1.1, side))


def roc(found: list[Detection]) -> Picture:
    """The ROC curves of all detectors."""

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for detection in found:
            axes.plot(*detection.curve, label=f"{detection.name}  {detection.auroc:.3f}")
        axes.set(xlabel="right labels flagged (share)", ylabel="wrong labels found (share)")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right", title="area under the curve", title_fontsize=8)

    areas = ", ".join(f"{d.name} {d.auroc:.3f}" for d in found)
    return draw("Finding wrong labels (ROC)", f"ROC curves; areas: {areas}.", paint, (4.6, 3.6))
