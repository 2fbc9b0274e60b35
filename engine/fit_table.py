"""How well MentorNets of several architectures learn known curricula: a table like Appendix D's.

One curriculum needs the past, the prediction variance of active bias (Chang et al., NeurIPS 2017):
with p_t = exp(−ℓ_t) over the last T visits and var their mean squared deviation,

    s  = sqrt(var + var² / (T − 1))            the deviation, and how sure T visits can be of it
    v* = s / sqrt(1/4 + 1/(16 (T − 1)))        in [0, 1]: a variance in [0, 1] is at most 1/4

Chang et al. divide by the mean over the data set instead. N points, T visits.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mentorch.engine.mentor import MentorNet
from mentorch.engine.mentor_training import (
    Features,
    feature_grid,
    fit_error,
    fit_weights,
    split_points,
)
from mentorch.kernels.mentor import EPOCHS, ClosedForm, closed_form_ref

_VISITS = 5
_GREATEST_LOSS = 30.0  # nats, as on the grid
_MEMORY = 0.5  # φ of the trajectories

CURRICULA = {
    "self_paced": ClosedForm("self_paced"),
    "linear": ClosedForm("linear"),
    "focal": ClosedForm("focal"),
    "hard_example": ClosedForm("hard_example"),
    "pd_mixture": ClosedForm("pd_mixture"),
}
VARIANCE = f"prediction variance, T={_VISITS}"


@dataclass(frozen=True)
class Architecture:
    """A column of the table: what is built, and how many visits of a sample it reads."""

    encoder: str
    activation: str = "tanh"
    fc_units: int = 20
    lstm_units: int = 1
    steps: int | None = None
    """T; None: all there are."""

    def build(self, steps: int, seed: int) -> MentorNet:
        """With Θ drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MentorNet(
                encoder=self.encoder,
                activation=self.activation,
                fc_units=self.fc_units,
                lstm_units=self.lstm_units,
                history_steps=steps,
            )


ARCHITECTURES = {
    "logistic": Architecture("none", activation="linear", fc_units=1),
    "perceptron": Architecture("none"),
    "lstm T=1": Architecture("lstm", steps=1),
    f"lstm T={_VISITS}": Architecture("lstm", lstm_units=4, steps=_VISITS),
}


def history_features(points: int = 100_000, steps: int = _VISITS, seed: int = 0) -> Features:
    """Synthetic trajectories of T losses each, for curricula that look back.

        log ℓ_t = m + s a_t,   a_1 ~ N(0, 1),   a_t = φ a_{t−1} + sqrt(1 − φ²) N(0, 1)

    with φ = 0.5, so that each a_t has unit variance; a sample's level m is uniform in
    [log 0.01, log 5], its restlessness s in [0, 1.5], ℓ at most 30 nats. ℓ_pt is uniform in
    [0.05, 3], one a sample; the epoch in 0..99.

    Args:
        points: N.
        steps: T.
        seed: of all draws; the same on every machine's CPU.

    Raises:
        ValueError: no points, or fewer than 2 visits.
    """
    if points < 1 or steps < 2:
        raise ValueError(f"a history takes 1 sample and 2 visits or more, got {points}, {steps}")
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([0.01, 5.0]).log()
    level = low + (high - low) * torch.rand(points, 1, generator=generator)
    restless = 1.5 * torch.rand(points, 1, generator=generator)
    state = torch.randn(points, steps, generator=generator)
    for t in range(1, steps):
        state[:, t] = _MEMORY * state[:, t - 1] + math.sqrt(1 - _MEMORY**2) * state[:, t]
    loss = (level + restless * state).exp().clamp(max=_GREATEST_LOSS)
    average = 0.05 + 2.95 * torch.rand(points, 1, generator=generator)
    epoch = torch.randint(EPOCHS, (points,), generator=generator)
    return Features(loss, loss - average, torch.zeros_like(epoch), epoch)


def prediction_variance(loss: Tensor) -> Tensor:
    """v* of the history curriculum above.

    Args:
        loss: [N, T], nats, T ≥ 2.

    Returns:
        [N] in [0, 1]: 0 for a sample that never changes, 1 for one that is certain half of the time
        and wrong the other half.
    """
    variance = (-loss).exp().var(dim=1, correction=0)
    visits = loss.shape[1]
    deviation = (variance + variance.square() / (visits - 1)).sqrt()
    return deviation / math.sqrt(1 / 4 + 1 / (16 * (visits - 1)))


def _last(features: Features, steps: int | None) -> Features:
    """The same points with their last T visits only."""
    if steps is None or features.loss.ndim == 1:
        return features
    loss, loss_diff = features.loss[:, -steps:], features.loss_diff[:, -steps:]
    return features._replace(loss=loss, loss_diff=loss_diff)


def _held_out_error(
    architecture: Architecture, features: Features, target_weight: Tensor, seed: int, steps: int
) -> dict[str, float]:
    features = _last(features, architecture.steps)
    learn, held_out = split_points(len(target_weight), seed)
    mentor = architecture.build(1 if features.loss.ndim == 1 else features.loss.shape[1], seed)
    fit_weights(mentor, features.rows(learn), target_weight[learn], seed=seed, steps=steps)
    return fit_error(mentor, features.rows(held_out), target_weight[held_out])


def fit_table(
    *, steps: int = 3000, points: int = 50_000, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Fits every architecture to every curriculum by regression, and judges it on held-out points.

    Args:
        steps: of the optimiser, for each fit.
        points: of the grid or trajectories; 80% to learn from and 20% to judge by.
        seed: of Θ, the points and their order.

    Returns:
        curriculum → architecture → `fit_error`. An LSTM over several visits is tried on the history
        curriculum only: the grid's points have one visit.
    """
    grid = feature_grid(points, seed)
    rows = {
        name: (grid, closed_form_ref(form, grid.loss, grid.loss_diff, grid.epoch_pct))
        for name, form in CURRICULA.items()
    }
    history = history_features(points, _VISITS, seed)
    rows[VARIANCE] = history, prediction_variance(history.loss)
    return {
        row: {
            column: _held_out_error(architecture, features, target_weight, seed, steps)
            for column, architecture in ARCHITECTURES.items()
            if features.loss.ndim == 2 or architecture.steps in (None, 1)
        }
        for row, (features, target_weight) in rows.items()
    }


def as_markdown(errors: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table: mean absolute error, and the mean squared error in parentheses."""
    lines = [
        "| curriculum | " + " | ".join(ARCHITECTURES) + " |",
        "|---" * (len(ARCHITECTURES) + 1) + "|",
    ]
    for row, found in errors.items():
        cells = [
            f"{found[column]['mean_abs_error']:.4f} ({found[column]['mse']:.5f})"
            if column in found
            else "–"
            for column in ARCHITECTURES
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mentor_table(*, out: Path, steps: int = 3000, points: int = 50_000, seed: int = 0) -> None:
    """Fits MentorNets of four architectures to six known curricula and prints how well they do.

    Args:
        out: the JSON file to write.
        steps: of the optimiser, for each of the fits.
        points: of each curriculum, 80% to learn from and 20% to judge by.
        seed: of the initial parameters, the points and their order.

    Raises:
        ValueError: another suffix, or a number out of range.
    """
    if out.suffix != ".json":  # before minutes of work
        raise ValueError(f"the table is written as *.json, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    errors = fit_table(steps=steps, points=points, seed=seed)
    made_by = {"seed": seed, "steps": steps, "points": points, "torch": torch.__version__}
    out.write_text(json.dumps({**made_by, "held_out": errors}, indent=1) + "\n")
    print(f"Mean absolute error (mean squared error) on held-out points; {made_by}\n")
    print(as_markdown(errors))
