"""The report as one HTML page that needs nothing besides itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mentorch.engine.data.readers import Reader
from mentorch.engine.report import figures
from mentorch.engine.report.detection import detect
from mentorch.engine.report.run_folder import Run
from mentorch.engine.report.scores import SUSPECT, known_wrong
from mentorch.engine.report.sheets import contact_sheet
from mentorch.engine.report.surfaces import surfaces
from mentorch.engine.report.templates import render

_PAIRS = 15  # rows of the table of confused classes
_QUARANTINED = 200  # rows of that table; the run folder has them all


def render_page(run: Run, scores: pa.Table, reader: Reader, samples: int) -> str:
    """The page of a run as HTML.

    Args:
        run: what was read of the run folder.
        scores: of `score_samples`.
        reader: gives the pictures.
        samples: how many of the most suspicious to show.
    """
    return render_scores(
        scores,
        reader,
        samples,
        template="page.html.jinja",
        name=run.folder.resolve().name,
        class_names=run.index.class_names[: run.config.data.max_label],
        essentials=_essentials(run, scores),
        curves=figures.curves(run.metrics),
        surfaces=surfaces(run),
        quarantine=run.quarantine[:_QUARANTINED],
        quarantined=len(run.quarantine),
    )


def render_scores(
    scores: pa.Table,
    reader: Reader | None,
    samples: int,
    *,
    name: str,
    class_names: Sequence[str],
    essentials: Mapping[str, str],
    template: str = "scores.html.jinja",
    **more: Any,
) -> str:
    """The page of a table of scores as HTML.

    Args:
        scores: of `score_samples`.
        reader: gives the pictures of the samples, encoded; None: there are none.
        samples: how many of the most suspicious to show.
        name: the page's title.
        class_names: by label.
        essentials: lines for the head of the page.
        template: the page's; one that extends "page.html.jinja".
        more: what else the template wants.
    """
    pairs, detections = confused_pairs(scores), detect(scores)
    return render(
        template,
        name=name,
        essentials=essentials,
        histograms=figures.histograms(scores),
        pairs=[(class_names[given], class_names[pred], n) for given, pred, n in pairs[:_PAIRS]],
        heat_map=figures.heat_map(pairs, class_names),
        cards=contact_sheet(scores, reader, samples),
        detections=detections,
        wrong=int(known_wrong(scores)[1].sum()),
        roc=figures.roc(detections) if detections else None,
        suspects=int(scores["suspect"].to_numpy().sum()),
        total=len(scores),
        threshold=SUSPECT,
        **{"loss_name": "mean loss", **more},
    )


def confused_pairs(scores: pa.Table) -> list[tuple[int, int, int]]:
    """Given label, predicted label and number of the suspects, the most frequent pairs first."""
    suspects = scores.filter(scores["suspect"])
    pairs = np.stack([suspects[f"{what}_label"].to_numpy() for what in ("given", "predicted")], 1)
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        (int(g), int(p), int(n)) for (g, p), n in zip(distinct[order], counts[order], strict=True)
    ]


def _essentials(run: Run, scores: pa.Table) -> dict[str, str]:
    """What the run was, for the head of the page."""
    config, index = run.config, run.index
    classes = len(index.classes[: config.data.max_label])
    found = {
        "Data": f"{index.root} ({index.dataset})",
        "Samples": f"{len(scores):,} visited, {classes:,} classes",
        "Student": config.student.name,
        "Curriculum": _curriculum(run),
        "Training": f"{config.train.epochs} epochs, batch size {config.train.batch_size}, "
        f"learning rate {config.optim.lr:g}, seed {config.seed}",
        "Checkpoint": run.checkpoint.name,
        **_accuracies(run),
    }
    known, wrong = known_wrong(scores)
    if known.any():
        share = wrong.sum() / known.sum()
        found["Known labels"] = (
            f"{known.sum():,} known, {wrong.sum():,} of them wrong ({share:.1%})"
        )
    return found


def _curriculum(run: Run) -> str:
    config = run.config.curriculum
    learned = ", learned in the run" if config.trusted else ""
    return (
        f"{config.name}{learned}, burn-in {config.burn_in:.0%}, ℓ_pt at {config.loss_percentile:g}"
    )


def _accuracies(run: Run) -> dict[str, str]:
    """The last accuracy on each validation set."""
    last = {line["kind"]: line for line in run.metrics if line["kind"].startswith("eval/")}
    return {
        f"Accuracy on {kind.removeprefix('eval/')}": f"top-1 {line['top1']:.2%}"
        + (f", top-5 {line['top5']:.2%}" if "top5" in line else "")
        for kind, line in last.items()
    }
