"""The curriculum-weighted loss and its gradient, one training step of the loss.

Every provider does the same work (the equations in `mentorch.kernels.reweight`): losses, their
exact 75th percentile, its moving average, weights by the linear curriculum or the shipped MentorNet
`pd`, weighted mean, gradient in the logits. `mentorch-lagged` alone takes the average before this
batch; `mentorch-chip` keeps the logits on the chip (``one_launch=True``).

    mentorch      `mentorch.Reweight`
    eager         `reweight_ref`, the definition
    eager-lean    the fewest PyTorch calls that do it: one cross-entropy, not the definition's two
    compile…      torch.compile of either
    liger, quack  their cross-entropy in place of PyTorch's in eager-lean

The moving average starts near where training keeps it, at the percentile of these losses: from 0,
all weights would be 0, and rows of weight 0 are not read again by our backward. A quarter of a nat
below, so that the check sees it move. Once it has settled, about 4% of the rows weigh 0 under the
linear curriculum, none under `pd`.

Ideal bytes for logits of s bytes an element: s·B·C read, s·B·C written.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import peers
import torch
from peers import Call
from rows import Row
from torch import Tensor

from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.mentor import MentorNet
from mentorch.engine.reweight import Reweight
from mentorch.kernels.cross_entropy import cross_entropy_ref
from mentorch.kernels.mentor import Curriculum, sample_weight_ref
from mentorch.kernels.percentile import percentile_ref
from mentorch.kernels.reweight import reweight_ref

P, DECAY = 0.75, 0.95
STEPS = 10**9  # of the training; all samples are taken halfway, at an epoch percentage of 50


class Inputs(NamedTuple):
    logits: Tensor  # [B, C], a leaf
    labels: Tensor  # [B]
    loss_moving_avg: Tensor  # 0-d float32, before the step


def inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    logits, labels, _ = peers.draw(row, device, seed)
    average = percentile_ref(cross_entropy_ref(logits.detach(), labels), P)
    return Inputs(logits, labels, average - 0.25)


def curriculum_of(row: Row, device: torch.device, dtype: torch.dtype) -> Curriculum:
    resolved = resolve_curriculum(row.curriculum)
    if isinstance(resolved, MentorNet):
        return resolved.requires_grad_(False).to(device, dtype).weights()
    return resolved


def definition(logits, labels, curriculum, average, step, moving_avg="updated") -> Tensor:
    """The loss by `reweight_ref`, which updates average and step."""
    return reweight_ref(
        logits,
        labels,
        curriculum,
        average,
        loss_percentile=P,
        decay=DECAY,
        moving_avg=moving_avg,
        step=step,
        total_steps=STEPS,
        advance=True,
    ).loss


def lean(logits, labels, curriculum, average, step, loss_of=peers.torch_loss) -> Tensor:
    """The same loss as one would write it for speed, knowing that every row counts."""
    sample_loss = loss_of(logits, labels)
    with torch.no_grad():
        kth = len(labels) - round((len(labels) - 1) * (1.0 - P))
        average.lerp_(sample_loss.kthvalue(kth).values, 1.0 - DECAY)
        epoch_pct = step * 100 // STEPS
        weight = sample_weight_ref(
            curriculum, sample_loss, sample_loss - average, labels, epoch_pct
        )
        step.add_(1)
    return (weight * sample_loss).mean()


def loss_function(row: Row) -> Callable[..., Tensor]:
    """The provider's loss; all take the same arguments."""
    if row.provider == "eager":
        return definition
    if row.provider == "eager-lean":
        return lean
    if row.provider.startswith("compile"):
        function = lean if row.provider == "compile-lean" else definition
        return peers.compiled(function, (row.cell, row.curriculum))
    return partial(lean, loss_of=peers.loss_of(row.provider))


def setup(row: Row, given: Inputs) -> Call:
    """One step of ``row.provider``, which returns (loss, gradient [B, C], ℓ_pt after the step)."""
    labels, average = given.labels, given.loss_moving_avg
    logits, restore = peers.private_logits(row.provider, given.logits)
    device = logits.device
    step = torch.full((), STEPS // 2, dtype=torch.int64, device=device)
    if row.provider.startswith("mentorch"):
        criterion = Reweight(
            row.curriculum,
            total_steps=STEPS,
            loss_percentile=P,
            decay=DECAY,
            moving_avg="lagged" if row.provider == "mentorch-lagged" else "updated",
            burn_in=0.0,
            one_launch=row.provider == "mentorch-chip",
        ).to(device)
        average = criterion.loss_moving_avg.copy_(average)
        criterion.step.copy_(step)
        loss_of_step = partial(criterion, logits, labels)
    else:
        average = average.clone()
        curriculum = curriculum_of(row, device, torch.float32)
        loss_of_step = partial(loss_function(row), logits, labels, curriculum, average, step)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss = loss_of_step()
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad, average

    return Call(run, restore)


def reference(row: Row, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """What `setup` returns, in float64."""
    logits = given.logits.detach().double().requires_grad_()
    average = given.loss_moving_avg.double()
    loss = definition(
        logits,
        given.labels,
        curriculum_of(row, logits.device, torch.float64),
        average,
        torch.full((), STEPS // 2, dtype=torch.int64, device=logits.device),
        "lagged" if row.provider == "mentorch-lagged" else "updated",
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0], average


def test_reweight(row, measure):
    measure(row)
