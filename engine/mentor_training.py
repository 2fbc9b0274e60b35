"""Learns Θ of a MentorNet (Sec. 3.1), by regression to given weights v* or by the objective itself.

    min_Θ  mean_i  d(g_m(z_i; Θ), v*_i)      d: cross-entropy where v* is binary, else squared error
    min_Θ  mean_i  g_m(z_i; Θ) x_i + G(g_m(z_i; Θ))          Eq. 4, x: the loss, or its difference

A predefined curriculum (MentorNet PD) takes z from a grid, and v* from its closed form; the minimum
of both is the same wherever the MentorNet can represent v*. Regression works where G is unknown too
(Eq. 8).

The released code takes batches of 32 and Adam 0.1; batches of 1024 and 0.02 fit better in less
time. A run is a pure function of its arguments on a given torch build; which points are drawn and
which of them are held out depends on the seed alone. N points, T history steps.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mentorch.engine.mentor import MentorNet
from mentorch.engine.objectives import regularizer
from mentorch.kernels.mentor import EPOCHS, ClosedForm, ClosedFormKind, closed_form_ref
from mentorch.kernels.philox import Stream, philox

# The released grid: loss [0, 10) by 0.1 and [10, 30) by 1, difference [−5, 5) by 0.1, every epoch.
_GRID_LOSS = torch.cat([torch.arange(100) / 10, torch.arange(10.0, 30.0)])
_GRID_DIFF = (torch.arange(100) - 50) / 10
_GRID_TEXT = "loss [0,10) step 0.1, [10,30) step 1; loss_diff [-5,5) step 0.1; epoch_pct 0..99"
_HELD_OUT = 0.2
_GRADIENT_CLIP = 5.0
_BATCH_SIZE, _LEARNING_RATE = 1024, 0.02

Objective = Literal["regression", "eq4"]


class Features(NamedTuple):
    """z of N points, what a MentorNet reads."""

    loss: Tensor  # [N] or [N, T], nats
    loss_diff: Tensor  # like loss
    labels: Tensor  # [N] int64
    epoch_pct: Tensor  # [N] int64, 0..99

    def rows(self, index: Tensor) -> "Features":
        """The points of an index or mask."""
        return Features(*(column[index] for column in self))


def _shuffled(count: int, seed: int, step: int) -> Tensor:
    """A permutation of 0..count − 1 that depends on (seed, step) alone; on the CPU."""
    return philox(seed, step, torch.arange(count), Stream.ORDER)[0].argsort(stable=True)


def feature_grid(points: int = 100_000, seed: int = 0) -> Features:
    """A random subset of the released grid of 120 × 100 × 100 points.

    Args:
        points: how many, at most 1,200,000.
        seed: which ones.

    Raises:
        ValueError: more points than there are.
    """
    total = len(_GRID_LOSS) * len(_GRID_DIFF) * EPOCHS
    if not 1 <= points <= total:
        raise ValueError(f"the grid has {total} points, {points} were asked for")
    chosen = _shuffled(total, seed, 0)[:points]
    diff_and_epoch = chosen % (len(_GRID_DIFF) * EPOCHS)
    return Features(
        _GRID_LOSS[chosen // (len(_GRID_DIFF) * EPOCHS)],
        _GRID_DIFF[diff_and_epoch // EPOCHS],
        torch.zeros_like(chosen),
        diff_and_epoch % EPOCHS,
    )


def split_points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the points to learn from (80%) and of the held-out ones (20%)."""
    order = _shuffled(count, seed, 1)
    held_out = round(count * _HELD_OUT)
    return order[held_out:], order[:held_out]


def _auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative; a tie is half."""
    ranked, of_positives = score.sort().values, score[positive].contiguous()
    below = torch.searchsorted(ranked, of_positives, right=False)
    up_to = torch.searchsorted(ranked, of_positives, right=True)
    n_pos = len(of_positives)
    rank_sum = (below + up_to + 1).double().sum().item() / 2
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * (len(score) - n_pos))


def _is_binary(target_weight: Tensor) -> bool:
    return bool(((target_weight == 0) | (target_weight == 1)).all())


@torch.no_grad()
def fit_error(mentor: MentorNet, features: Features, target_weight: Tensor) -> dict[str, float]:
    """How far a MentorNet is from v* on given points.

    Args:
        mentor: g_m.
        features: z of N points.
        target_weight: v* [N] in [0, 1].

    Returns:
        ``mse``, ``mean_abs_error``, ``max_abs_error``, and ``auc`` where v* is both 0 and 1.
    """
    weight = mentor(*features)
    error = (weight - target_weight).double().abs()
    found = {
        "mse": error.square().mean().item(),
        "mean_abs_error": error.mean().item(),
        "max_abs_error": error.max().item(),
    }
    if _is_binary(target_weight) and 0 < target_weight.sum() < len(target_weight):
        found["auc"] = _auc(weight, target_weight == 1)
    return found


def _minimise(
    mentor: MentorNet,
    points: Tensor,
    mean_of: Callable[[Tensor], Tensor],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> MentorNet:
    """Adam on batches of row numbers, cosine decay to 0, gradient norm clipped at 5; in place."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    parameters = list(mentor.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches_a_pass = max(1, len(points) // batch_size)
    for step in range(steps):
        lap, batch = divmod(step, batches_a_pass)
        if batch == 0:
            order = _shuffled(len(points), seed, 2 + lap).to(points.device)
        optimizer.zero_grad()
        mean_of(order[batch * batch_size : (batch + 1) * batch_size]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_CLIP)
        optimizer.step()
        decay.step()
    return mentor


def fit_weights(
    mentor: MentorNet,
    features: Features,
    target_weight: Tensor,
    *,
    seed: int = 0,
    steps: int = 10_000,
    batch_size: int = _BATCH_SIZE,
    learning_rate: float = _LEARNING_RATE,
) -> MentorNet:
    """Learns Θ in place from z and v*: Adam, cosine decay to 0, gradient norm clipped at 5.

    Args:
        mentor: where to start from.
        features: z of N points, of one visit or of the last T.
        target_weight: v* [N] in [0, 1]; all 0 or 1: cross-entropy, else squared error.
        seed: of the order of the points.
        steps: of the optimiser.
        batch_size: points a step.
        learning_rate: of the first step.

    Returns:
        ``mentor``.

    Raises:
        ValueError: a v* outside [0, 1], or no step.
    """
    if not bool(((target_weight >= 0) & (target_weight <= 1)).all()):
        low, high = target_weight.min().item(), target_weight.max().item()
        raise ValueError(f"target weights must be in [0, 1], got {low} to {high}")
    distance = F.binary_cross_entropy if _is_binary(target_weight) else F.mse_loss

    def mean_of(rows: Tensor) -> Tensor:
        return distance(mentor(*features.rows(rows)), target_weight[rows])

    return _minimise(
        mentor, target_weight, mean_of, seed=seed, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate,
    )  # fmt: skip


def fit_objective(
    mentor: MentorNet,
    features: Features,
    form: ClosedForm,
    *,
    seed: int = 0,
    steps: int = 10_000,
    batch_size: int = _BATCH_SIZE,
    learning_rate: float = _LEARNING_RATE,
) -> MentorNet:
    """Learns Θ in place from z and G, without v*: Eq. 4, its sum as a mean.

    Slower than regression where the mean of x is large: at first all weights go to 0, and the
    sigmoid lets them back but slowly.

    Args:
        mentor: where to start from.
        features: z of N points, of one visit or of the last T.
        form: the closed form whose G is minimised, on its input x (``form.on``) of today's visit.
        seed: of the order of the points.
        steps: of the optimiser, which is that of `fit_weights`.
        batch_size: points a step.
        learning_rate: of the first step.

    Returns:
        ``mentor``.

    Raises:
        ValueError: a form without a G, or no step.
    """
    g = regularizer(form)
    if g is None:
        raise ValueError(
            f"{form.kind} has no regularizer G to minimise (self_paced and linear have one); "
            "learn it by regression"
        )
    x = features.loss_diff if form.on == "loss_diff" else features.loss
    today = x.view(len(x), -1)[:, -1]

    def mean_of(rows: Tensor) -> Tensor:
        weight: Tensor = mentor(*features.rows(rows))
        return (weight * today[rows] + g.value(weight)).mean()

    return _minimise(
        mentor, today, mean_of, seed=seed, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate,
    )  # fmt: skip


def fit_mentornet(
    target: ClosedForm,
    *,
    mentor: MentorNet | None = None,
    points: int = 100_000,
    seed: int = 0,
    steps: int = 10_000,
    objective: Objective = "regression",
) -> MentorNet:
    """Learns a MentorNet that approximates a predefined curriculum: MentorNet PD (Sec. 3.1).

    About a minute on one CPU core at the default numbers.

    Args:
        target: the closed form whose v* is learnt.
        mentor: where to start from, changed in place; by default the released dims with Θ drawn
            from the seed.
        points: of the grid, 80% to learn from and 20% to judge by.
        seed: of Θ, the points and their order.
        steps: of the optimiser.
        objective: "regression" to v*, or "eq4": Eq. 4 itself, for forms that have a G.

    Returns:
        The MentorNet; its ``card`` says how it was made and, under ``held_out``, how far it is from
        v* there.

    Raises:
        ValueError: a number out of range, or "eq4" for a form without a G.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective is 'regression' or 'eq4', not {objective!r}")
    features = feature_grid(points, seed)
    target_weight = closed_form_ref(target, features.loss, features.loss_diff, features.epoch_pct)
    learn, held_out = split_points(points, seed)
    if mentor is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mentor = MentorNet()
    if objective == "eq4":
        fit_objective(mentor, features.rows(learn), target, seed=seed, steps=steps)
        minimised = "Eq. 4"
    else:
        fit_weights(mentor, features.rows(learn), target_weight[learn], seed=seed, steps=steps)
        minimised = "cross-entropy" if _is_binary(target_weight) else "squared error"
    mentor.card = {
        "target": asdict(target),
        "grid": _GRID_TEXT,
        "points": points,
        "seed": seed,
        "steps": steps,
        "objective": minimised,
        "held_out": fit_error(mentor, features.rows(held_out), target_weight[held_out]),
        "torch": torch.__version__,
    }
    return mentor


def train_mentor(
    *,
    out: Path,
    target: ClosedFormKind = "linear",
    lambda1: float = 0.0,
    lambda2: float = 1.0,
    gamma: float = 2.0,
    seed: int = 0,
    steps: int = 10_000,
    objective: Objective = "regression",
) -> None:
    """Learns a MentorNet from a predefined curriculum and writes it to a .safetensors file.

    Args:
        out: the file to write, *.safetensors.
        target: the closed form to approximate, on the loss difference ℓ − ℓ_pt.
        lambda1: λ1, nats: where the weight starts to fall.
        lambda2: λ2, nats: over how much loss linear falls from 1 to 0.
        gamma: γ of focal.
        seed: of the initial parameters, the grid's points and their order.
        steps: of the optimiser.
        objective: regression to the weights, or eq4: the paper's Eq. 4, for self_paced and linear.

    Raises:
        ValueError: another suffix, eq4 for a target without a regularizer, or a number out of
            range.
    """
    if out.suffix != ".safetensors":  # before a minute's work
        raise ValueError(f"a MentorNet is read from *.safetensors files only, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    form = ClosedForm(target, lambda1=lambda1, lambda2=lambda2, gamma=gamma)
    mentor = fit_mentornet(form, seed=seed, steps=steps, objective=objective)
    mentor.save(out)
    errors = mentor.card["held_out"]
    assert isinstance(errors, dict)
    found = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
    print(f"{out}: on held-out points {found}")
