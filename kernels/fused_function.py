"""The fused step as torch differentiates it, and the losses that must be known before it."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.kernels.class_percentile import ClassLosses, class_percentile, remember_losses
from mentorch.kernels.cross_entropy import cross_entropy_gradient
from mentorch.kernels.fused import (
    correct_gradient,
    parts,
    present_losses,
    reweight_one_pass,
    reweight_step,
    weigh,
)
from mentorch.kernels.ranks import count_ranks, gather_rows


class Losses(NamedTuple):
    """What the weighing asks of all ranks or of classes; nothing where one launch does it all."""

    loss: Tensor | None = None  # [B], nats
    lse: Tensor | None = None  # [2, B]
    everyone: Tensor | None = None  # [W], the losses of all ranks as the percentile takes them
    ids: Tensor | None = None  # [W], whose they are; with a history, of several ranks
    bases: Tensor | None = None  # [W], ℓ_pt of their classes


@torch.no_grad()
def losses_of_all(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    sample_ids: Tensor | None,
    class_losses: ClassLosses | None,
    ignore_index: int,
    label_smoothing: float,
) -> Losses:
    """The losses of all ranks, put into their classes' windows where there are such."""
    loss, lse, present = present_losses(logits.detach(), labels, ignore_index, label_smoothing)
    everyone = gather_rows(present, group)
    several = count_ranks(group) > 1  # or torch.compile sees the same tensor twice, and gives up
    ids = gather_rows(sample_ids, group) if several and sample_ids is not None else None
    if class_losses is None:
        return Losses(loss, lse, everyone, ids)
    everyones_labels = gather_rows(labels.long(), group)  # NCCL has no int16
    remember_losses(class_losses, everyones_labels, everyone)
    return Losses(loss, lse, everyone, ids, class_percentile(class_losses, everyones_labels))


class Fused(torch.autograd.Function):
    """The fused step, differentiable in the logits."""

    @staticmethod
    def forward(ctx, logits, labels, one_pass, loss, lse, everyone, ids, bases, *arguments):
        """After ``one_pass`` the fields of `Losses`, then what `parts` puts together."""
        _, numbers, plan = parts(arguments)
        ctx.settings = numbers.ignore_index, plan.label_smoothing
        grad = written = None
        if one_pass:
            *out, grad, written = reweight_one_pass(logits, labels, *arguments)
        elif everyone is None:
            out = reweight_step(logits, labels, *arguments)
        else:
            total, weight, new_avg, count = weigh(
                loss, lse, everyone, ids, bases, labels, *arguments
            )
            out = total, loss, weight, new_avg, lse, count
        total, loss, weight, new_avg, lse, count = out
        ctx.save_for_backward(logits, labels, lse, weight, count, grad, written)
        ctx.mark_non_differentiable(loss, weight, new_avg)
        ctx.set_materialize_grads(False)
        ctx.used = False
        return total, loss, weight, new_avg

    @staticmethod
    def backward(ctx, scale, *_others):
        """The gradient, unless the forward pass has written it already."""
        nothing = (None,) * len(ctx.needs_input_grad)
        if scale is None:
            return nothing
        logits, labels, lse, weight, count, grad, written = ctx.saved_tensors
        if grad is None or ctx.used or torch.is_grad_enabled():  # the last: create_graph=True
            grad = cross_entropy_gradient(logits, labels, lse, weight, scale, count, *ctx.settings)
        else:
            grad = grad.data  # of its own version: what was saved counts as not changed
            correct_gradient(
                grad, written, logits, labels, lse, weight, scale, count, *ctx.settings
            )
            ctx.used = True  # handed out: a second backward writes its own
        return grad, *nothing[1:]
