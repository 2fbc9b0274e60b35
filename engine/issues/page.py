"""What was found, as one HTML page."""

from typing import TYPE_CHECKING

import numpy as np

from mentorch.engine.report import figures
from mentorch.engine.report.page import render_scores

if TYPE_CHECKING:
    from mentorch.engine.issues.find import LabelIssues

_MOVES = 15  # rows of the table


def render_issues(found: "LabelIssues", samples: int, name: str) -> str:
    """The page as HTML.

    Args:
        found: what.
        samples: how many of the most suspicious to show.
        name: title of the page.
    """
    names, noise = found.samples.named.class_names, found.noise
    wrong = noise.prior[:, None] * noise.transition * len(found.probabilities)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOVES]
    moves = [
        (names[k], names[y], round(float(wrong[k, y])))
        for k, y in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[k, y] >= 0.5
    ]
    return render_scores(
        found.scores,
        found.samples.reader,
        samples,
        name=name,
        class_names=names,
        essentials=_essentials(found),
        template="issues.html.jinja",
        noise=noise,
        moves=moves,
        transition=figures.transition(noise.transition, names),
        unusable=found.samples.unusable,
        folds=found.recipe.folds,
        epochs=found.judgement.epochs,
        loss_name="loss",
    )


def _essentials(found: "LabelIssues") -> dict[str, str]:
    recipe, noise, judgement = found.recipe, found.noise, found.judgement
    agreed = np.mean([fold[-1] for fold in judgement.agreement])
    curriculum = recipe.curriculum
    if judgement.percentiles:
        low, high = min(judgement.percentiles), max(judgement.percentiles)
        curriculum += f", percentile of the {recipe.percentile_of} {low:.2f} to {high:.2f}"
    lines = {
        "Data": found.samples.source,
        "Samples": f"{len(found.probabilities):,}, {len(noise.prior):,} classes",
        "Wrong labels": f"{'at most ' if noise.is_upper_bound else ''}{noise.rate:.1%} ± "
        f"{noise.standard_error:.1%}, estimated"
        + ("" if recipe.noise_rate is None else f"; {recipe.noise_rate:.1%} were given"),
        "Students": f"{found.student}, {recipe.folds} folds, {recipe.epochs} epochs, seed "
        f"{recipe.seed}",
        "Curriculum": curriculum,
        "Predicted as labelled": f"{agreed:.1%}, out of sample, after the last epoch",
        "Time": f"{found.seconds:,.0f} s",
    }
    if found.samples.unusable:
        lines["Left out"] = f"{len(found.samples.unusable):,} files that cannot be used"
    return lines
