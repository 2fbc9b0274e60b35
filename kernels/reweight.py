"""The curriculum-weighted cross-entropy: the definition, and its fused form.

    ℓ_i   = logsumexp(z_i) − z_i[y_i]                   per-sample cross-entropy, nats
    q     = the p-th percentile of ℓ over the batch     "nearest" order statistic
    ℓ_pt  = decay · ℓ_pt + (1 − decay) · q              updated before it is used
    v_i   = g_m(ℓ_i, ℓ_i − ℓ_pt, y_i, epoch %)          closed form or MentorNet, in [0, 1]
    v_i   = burn-in or example dropout applied to v_i
    L     = Σ v_i ℓ_i / B                               Eq. 1 without G and weight decay
    ∂L/∂z_i = v_i (softmax(z_i) − 1[y_i]) / B           v is a constant for the student

Jiang et al., "MentorNet", ICML 2018.

On one rank the fused form is two launches. Forward: every program takes the losses of its rows, and
the one that finishes last goes on with the batch: percentile, ℓ_pt, weights, L (`weigh`). Backward:
the gradient, written once, the upstream gradient read from the device (`cross_entropy`). So with s
bytes a logit, s·B·C are read twice, the second time from the L2 cache when they fit there, and
s·B·C written. The exact percentile needs all losses before the first gradient; with
``moving_avg="lagged"`` the weights do not wait for it, and forward and gradient are one pass.

Shapes: B batch, C classes, T history steps, N samples of the data set, W rows of all ranks.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.kernels.backend import runs_kernels
from mentorch.kernels.class_percentile import ClassLosses, class_percentile, remember_losses
from mentorch.kernels.cross_entropy import check_logits, cross_entropy_ref
from mentorch.kernels.example_dropout import ExampleDropout, example_dropout_ref
from mentorch.kernels.fused import PLAN_FIELDS, Numbers, State
from mentorch.kernels.fused_function import Fused, Losses, losses_of_all
from mentorch.kernels.history import history_steps_ref, update_history_ref
from mentorch.kernels.mentor import (
    EPOCHS,
    Curriculum,
    LstmWeights,
    MentorWeights,
    sample_weight_ref,
)
from mentorch.kernels.percentile import check_moving_average, moving_average_ref, percentile_ref
from mentorch.kernels.ranks import count_ranks, first_row, gather_rows
from mentorch.kernels.weigh import Plan

MovingAverage = Literal["updated", "lagged"]


class Reweighted(NamedTuple):
    """What a weighted step yields. Only ``loss`` carries a gradient."""

    loss: Tensor  # 0-d, nats: Σ v ℓ / B
    sample_loss: Tensor  # [B], nats; 0 in ignored rows
    sample_weight: Tensor  # [B] in [0, 1]; 0 in ignored rows
    loss_moving_avg: Tensor  # 0-d, nats: ℓ_pt after this step


def _check(
    logits: Tensor,
    labels: Tensor,
    curriculum: Curriculum,
    epoch_pct: Tensor | None,
    total_steps: int | None,
    sample_ids: Tensor | None,
    history: Tensor | None,
    moving_avg: str,
    label_smoothing: float,
    loss_moving_avg: Tensor,
    step: Tensor | int,
    advance: bool,
    class_losses: ClassLosses | None = None,
) -> None:
    check_logits(logits, labels, label_smoothing)
    if class_losses is not None and len(class_losses.seen) - 1 < logits.shape[1]:
        raise ValueError(
            f"the logits have {logits.shape[1]} classes, and losses are kept of "
            f"{len(class_losses.seen) - 1}: give num_classes={logits.shape[1]}"
        )
    if class_losses is not None and moving_avg == "lagged":
        raise ValueError("a percentile by class is of the class's last losses: not with 'lagged'")
    if isinstance(curriculum, MentorWeights) and curriculum.use_label:
        known = curriculum.label_embedding.shape[0]
        if logits.shape[1] > known:
            raise ValueError(
                f"this MentorNet embeds {known} labels but the logits have {logits.shape[1]} "
                "classes; use one learnt without labels (use_label=False)"
            )
    if epoch_pct is None and total_steps is None:
        raise ValueError("give epoch_pct, or total_steps to compute it from the step")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if moving_avg not in ("updated", "lagged"):
        raise ValueError(f"moving_avg is 'updated' or 'lagged', not {moving_avg!r}")
    if sample_ids is not None and sample_ids.shape != labels.shape:
        raise ValueError(
            f"sample_ids must be one a row, {list(labels.shape)}, got {list(sample_ids.shape)}"
        )
    if history is not None and (history.ndim != 3 or history.shape[2] != 2):
        raise ValueError(f"a history is [N + 1, T, 2], got {list(history.shape)}: see new_history")
    if history is not None and not history.is_contiguous():
        raise ValueError("the history is changed in place and must be contiguous: see new_history")
    if advance and not isinstance(step, Tensor):
        raise ValueError(f"to advance, step must be a tensor that can be changed, not {step!r}")
    elsewhere = {"loss_moving_avg": loss_moving_avg, "step": step, "epoch_pct": epoch_pct}
    elsewhere |= {"sample_ids (index)": sample_ids, "history": history}
    elsewhere["the classes' losses"] = None if class_losses is None else class_losses.window
    if isinstance(curriculum, MentorWeights):
        curriculum.check_steps(1 if history is None else history.shape[1])
        elsewhere["the MentorNet"] = curriculum.fc1_weight
    for name, tensor in elsewhere.items():
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(
                f"the logits are on {logits.device} but {name} on {tensor.device}; "
                "move it there (a Reweight: criterion.to(device))"
            )


def progress_pct(step: Tensor | int, total_steps: int) -> Tensor:
    """The share of training steps that are taken, an integer percentage 0..99."""
    return (torch.as_tensor(step) * EPOCHS // total_steps).clamp(0, EPOCHS - 1)


def _row_ids(labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row numbers in the global batch, so that ranks do not toss the same coins."""
    return torch.arange(labels.shape[0], device=labels.device) + first_row(labels, group)


def _absent_as_nan(losses: Tensor, valid: Tensor) -> Tensor:
    """NaN means "absent" to the percentile, so a real NaN loss goes in as +inf: last too."""
    return losses.masked_fill(losses.isnan(), torch.inf).masked_fill(~valid, torch.nan)


def reweight_ref(
    logits: Tensor,
    labels: Tensor,
    curriculum: Curriculum,
    loss_moving_avg: Tensor,
    epoch_pct: Tensor | None = None,
    *,
    loss_percentile: float = 0.75,
    decay: float = 0.95,
    moving_avg: MovingAverage = "updated",
    dropout: ExampleDropout | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    total_steps: int | None = None,
    sample_ids: Tensor | None = None,
    history: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    advance: bool = False,
    one_launch: bool = False,
    class_losses: ClassLosses | None = None,
) -> Reweighted:
    """The definition, in plain PyTorch; arguments as `reweight`."""
    _check(
        logits, labels, curriculum, epoch_pct, total_steps, sample_ids, history, moving_avg,
        label_smoothing, loss_moving_avg, step, advance, class_losses,
    )  # fmt: skip
    check_moving_average(loss_percentile, decay)
    labels = labels.long()
    valid = labels != ignore_index
    sample_ids = _row_ids(labels, group) if sample_ids is None else sample_ids
    if epoch_pct is None:
        assert total_steps is not None  # `_check` has seen to it
        epoch_pct = progress_pct(step, total_steps)
    # Under autocast a MentorNet's matrix products would lose the weight's lower bits.
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        sample_loss = cross_entropy_ref(logits, labels, ignore_index, label_smoothing)
        everyone = gather_rows(_absent_as_nan(sample_loss, valid), group)
        count = (~everyone.isnan()).sum().clamp(min=1).to(sample_loss.dtype) / count_ranks(group)
        percentile = percentile_ref(everyone, loss_percentile)
        new_avg = moving_average_ref(loss_moving_avg, percentile, decay)
        base = (loss_moving_avg if moving_avg == "lagged" else new_avg).to(sample_loss.dtype)
        own = everyones = base
        if class_losses is not None:
            labels_W = gather_rows(labels, group)
            remember_losses(class_losses, labels_W, everyone)
            everyones = class_percentile(class_losses, labels_W).to(base.dtype)
            own = everyones.narrow(0, first_row(labels, group), len(labels))
        steps = sample_loss, sample_loss - own
        if history is not None and isinstance(curriculum, MentorWeights):
            steps = history_steps_ref(history, sample_ids, *steps)
        label_input = labels.masked_fill(~valid, 0)  # ignore_index is no row of the embedding
        weight = sample_weight_ref(curriculum, *steps, label_input, epoch_pct)
        if dropout is not None:
            weight = example_dropout_ref(dropout, weight, valid, epoch_pct, seed, step, sample_ids)
        if history is not None:  # no such sample: let it be seen
            weight = weight.masked_fill(sample_ids >= history.shape[0] - 1, torch.nan)
        weight = weight.masked_fill(~valid, 0.0)
        if history is not None:
            update_history_ref(
                history, gather_rows(sample_ids, group), everyone, everyone - everyones
            )
        if advance:
            loss_moving_avg.copy_(new_avg)
            assert isinstance(step, Tensor)
            step.add_(1)

    # Rows of weight 0 leave the graph before the loss: 0 · NaN must be 0, in the gradient too.
    dropped = weight == 0
    loss_of_kept = cross_entropy_ref(
        logits.masked_fill(dropped.unsqueeze(1), 0.0), labels, ignore_index, label_smoothing
    )
    loss = (weight * loss_of_kept).sum() / count
    return Reweighted(loss, sample_loss, weight, new_avg)


# ---- Fused --------------------------------------------------------------------------------------


def _signed(seed: int) -> int:
    """The same 64 bits as torch passes them to an operator."""
    return (seed + 2**63) % 2**64 - 2**63


def reweight(
    logits: Tensor,
    labels: Tensor,
    curriculum: Curriculum,
    loss_moving_avg: Tensor,
    epoch_pct: Tensor | None = None,
    *,
    loss_percentile: float = 0.75,
    decay: float = 0.95,
    moving_avg: MovingAverage = "updated",
    dropout: ExampleDropout | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    total_steps: int | None = None,
    sample_ids: Tensor | None = None,
    history: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    advance: bool = False,
    one_launch: bool = False,
    class_losses: ClassLosses | None = None,
) -> Reweighted:
    """Weights every sample of a batch by a curriculum and takes the weighted loss, as above.

    On a GPU fused: on one rank two launches in all. With a lagged average the first writes the
    gradient too and the second only sees that there is nothing to correct. Elsewhere
    `reweight_ref`. Nothing syncs with the host; only ``history``, ``class_losses`` and, with
    ``advance``, the state are changed in place.

    Args:
        logits: [B, C], any floating dtype; the mathematics is float32, or float64 for float64.
        labels: [B] integers in [0, C), or ``ignore_index``. On a GPU any other label makes the loss
            NaN, since raising an error would wait for the device.
        curriculum: a `ClosedForm` or the weights of a MentorNet.
        loss_moving_avg: 0-d, ℓ_pt before this step, nats.
        epoch_pct: 0-d integer tensor 0..99, the student's progress; None: from the step.
        loss_percentile: p in [0, 1].
        decay: of the moving average, in [0, 1).
        moving_avg: "updated": differences are taken from ℓ_pt after this batch (the paper);
            "lagged": from ℓ_pt before it, which lets a GPU write the gradient in the same pass. It
            does so for an upstream gradient of 1 and no ignored rows; for any other (a loss scaler,
            a loss divided for accumulation) the gradient is written again, and nothing is saved.
        dropout: burn-in and example dropout; None for neither.
        seed: key of the dropout's random numbers.
        step: training step, the other half of the key; a 0-d int64 tensor or a number.
        total_steps: of the training, from which the progress is computed without ``epoch_pct``.
        sample_ids: [B] int64, which sample each row is, for dropout and history; by default the row
            number in the global batch. With a history a sample must not come twice in a batch, over
            all ranks, and one outside [0, N) is told apart: below 0 it has no past and none is
            kept, from N on it makes the loss NaN.
        history: [N + 1, T, 2] from `new_history`; the batch's losses are appended. A MentorNet then
            looks at T visits.
        label_smoothing: ε in [0, 1].
        ignore_index: rows with this label weigh 0 and count nowhere, neither in B nor in the
            percentile.
        group: ranks whose batches form one; the percentile and B are then global and the loss is
            scaled so that *averaging* gradients over the ranks (what DDP does) gives the gradient
            of the global L. Each rank must bring the same number of rows. None: this batch alone.
        advance: write ℓ_pt into ``loss_moving_avg`` and add 1 to ``step`` (a tensor then).
        one_launch: on one GPU, keep the logits on the chip between loss and gradient where they
            fit: a single cooperative launch. The results are the same; as for "lagged", it pays for
            an upstream gradient of 1. Not the default: where it wins has not been measured yet.
        class_losses: from `new_class_losses`: differences are then taken from the percentile of the
            row's class (`class_percentile`) and the batch's losses are put in, some twenty launches
            more. ``loss_moving_avg`` goes on, and decides nothing.

    Returns:
        `Reweighted`. A batch with no valid row has loss 0 and leaves ℓ_pt as it was.

    Raises:
        ValueError: shapes or parameters out of range.
    """
    rest = {"loss_percentile": loss_percentile, "decay": decay, "label_smoothing": label_smoothing}
    if not runs_kernels(logits):
        return reweight_ref(
            logits, labels, curriculum, loss_moving_avg, epoch_pct, moving_avg=moving_avg,
            dropout=dropout, seed=seed, step=step, total_steps=total_steps, sample_ids=sample_ids,
            history=history, ignore_index=ignore_index, group=group, advance=advance,
            one_launch=one_launch, class_losses=class_losses, **rest,
        )  # fmt: skip
    _check(
        logits, labels, curriculum, epoch_pct, total_steps, sample_ids, history, moving_avg,
        label_smoothing, loss_moving_avg, step, advance, class_losses,
    )  # fmt: skip
    check_moving_average(loss_percentile, decay)
    steps = 1 if history is None else history.shape[1]
    lagged = moving_avg == "lagged"
    plan = Plan.of(curriculum, dropout, steps, lagged=lagged, advance=advance, **rest)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    one_pass = (
        (one_launch or (lagged and plan.dropout != "exact"))  # its count is over the whole batch
        and count_ranks(group) == 1
        and class_losses is None
        and not torch.compiler.is_compiling()  # which would copy the gradient to correct the copy
        and logits.requires_grad
        and torch.is_grad_enabled()
    )
    avg = loss_moving_avg.detach()
    sample_ids = None if sample_ids is None else sample_ids.contiguous()
    losses = Losses()
    if count_ranks(group) > 1 or class_losses is not None:
        ids = None if history is None else sample_ids
        losses = losses_of_all(
            logits, labels, group, ids, class_losses, ignore_index, label_smoothing
        )
    with torch.autocast(logits.device.type, enabled=False):
        out = Fused.apply(
            logits,
            labels,
            one_pass,
            *losses,
            *State(avg, step, history, epoch_pct, sample_ids, _theta(curriculum)),
            *Numbers(total_steps or 1, first_row(labels, group), _signed(seed), ignore_index),
            *[getattr(plan, name) for name in PLAN_FIELDS],
        )
    return Reweighted(*out)


def _theta(curriculum: Curriculum) -> list[Tensor]:
    """The tensors of a MentorNet in the order in which the kernels read them.

    Those of an LSTM that it lacks are not read; fc1's bias holds their places.
    """
    if not isinstance(curriculum, MentorWeights):
        return []
    w = curriculum
    absent = (w.fc1_bias,) * len(LstmWeights._fields)
    lstms = (*(w.forward or absent), *(w.backward or absent))
    dense = (w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias)
    return [t.detach() for t in (w.label_embedding, w.epoch_embedding, *lstms, *dense)]
