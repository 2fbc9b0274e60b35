"""The curriculum-weighted cross-entropy: the definition everything else is measured against.

    ℓ_i   = logsumexp(z_i) − z_i[y_i]                   per-sample cross-entropy, nats
    q     = the p-th percentile of ℓ over the batch     "nearest" order statistic
    ℓ_pt  = decay · ℓ_pt + (1 − decay) · q              updated before it is used
    v_i   = g_m(ℓ_i, ℓ_i − ℓ_pt, y_i, epoch %)          closed form or MentorNet, in [0, 1]
    v_i   = burn-in or example dropout applied to v_i
    L     = Σ v_i ℓ_i / B                               Eq. 1 without G and weight decay
    ∂L/∂z_i = v_i (softmax(z_i) − 1[y_i]) / B           v is a constant for the student

Jiang et al., "MentorNet", ICML 2018. Shapes: B batch, C classes.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.kernels.cross_entropy import cross_entropy_ref
from mentorch.kernels.example_dropout import ExampleDropout, example_dropout_ref
from mentorch.kernels.mentor import Curriculum, MentorWeights, sample_weight_ref
from mentorch.kernels.percentile import moving_average_ref, percentile_ref


class Reweighted(NamedTuple):
    """What a weighted step yields. Only ``loss`` carries a gradient."""

    loss: Tensor  # 0-d, nats: Σ v ℓ / B
    sample_loss: Tensor  # [B], nats; 0 in ignored rows
    sample_weight: Tensor  # [B] in [0, 1]; 0 in ignored rows
    loss_moving_avg: Tensor  # 0-d, nats: ℓ_pt after this step


def check_moving_average(loss_percentile: float, decay: float) -> None:
    """Raises ValueError unless p is in [0, 1] and the decay in [0, 1)."""
    if not 0.0 <= loss_percentile <= 1.0:
        raise ValueError(f"loss_percentile must be in [0, 1], got {loss_percentile}")
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")


def _check(logits: Tensor, labels: Tensor, curriculum: Curriculum) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(labels.shape)}"
        raise ValueError(f"logits must be [B, C] and labels [B], got {shapes}")
    if logits.shape[0] == 0:
        raise ValueError("the batch is empty: logits have 0 rows")
    if isinstance(curriculum, MentorWeights) and curriculum.use_label:
        known = curriculum.label_embedding.shape[0]
        if logits.shape[1] > known:
            raise ValueError(
                f"this MentorNet embeds {known} labels but the logits have {logits.shape[1]} "
                "classes; use one learnt without labels (use_label=False)"
            )


def _absent_as_nan(losses: Tensor, valid: Tensor) -> Tensor:
    """NaN means "absent" to the percentile, so a real NaN loss goes in as +inf: last too."""
    return losses.masked_fill(losses.isnan(), torch.inf).masked_fill(~valid, torch.nan)


def _gather(losses: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The losses of all ranks, [world · B]; every rank brings the same B (absent rows are NaN)."""
    if group is None or dist.get_world_size(group) == 1:
        return losses
    everyone = losses.new_empty(dist.get_world_size(group) * losses.shape[0])
    dist.all_gather_into_tensor(everyone, losses.contiguous(), group=group)
    return everyone


def reweight_ref(
    logits: Tensor,
    labels: Tensor,
    curriculum: Curriculum,
    loss_moving_avg: Tensor,
    epoch_pct: Tensor,
    *,
    loss_percentile: float = 0.75,
    decay: float = 0.95,
    dropout: ExampleDropout | None = None,
    seed: Tensor | int = 0,
    step: Tensor | int = 0,
    sample_ids: Tensor | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
) -> Reweighted:
    """Weights every sample of a batch by a curriculum and takes the weighted loss, as above.

    Nothing is changed in place and nothing syncs with the host.

    Args:
        logits: [B, C], any floating dtype; the mathematics is float32, or float64 for float64.
        labels: [B] int64 in [0, C), or ``ignore_index``.
        curriculum: a `ClosedForm` or the weights of a MentorNet.
        loss_moving_avg: 0-d, ℓ_pt before this step, nats.
        epoch_pct: 0-d integer tensor 0..99, the student's progress.
        loss_percentile: p in [0, 1].
        decay: of the moving average, in [0, 1).
        dropout: burn-in and example dropout; None for neither.
        seed: key of the dropout's random numbers.
        step: training step, the other half of the key.
        sample_ids: [B] int64, which sample each row is, for dropout; the row number by default.
        ignore_index: rows with this label weigh 0 and count nowhere, neither in B nor in the
            percentile.
        group: ranks whose batches form one; the percentile and B are then global and the loss is
            scaled so that *averaging* gradients over the ranks (what DDP does) gives the gradient
            of the global L. Each rank must bring the same number of rows. None: this batch alone.

    Returns:
        `Reweighted`. A batch with no valid row has loss 0 and leaves ℓ_pt as it was.

    Raises:
        ValueError: shapes or parameters out of range.
    """
    _check(logits, labels, curriculum)
    check_moving_average(loss_percentile, decay)
    valid = labels != ignore_index
    # Under autocast a MentorNet's matrix products would lose the weight's lower bits.
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        sample_loss = cross_entropy_ref(logits, labels, ignore_index)
        everyone = _gather(_absent_as_nan(sample_loss, valid), group)
        ranks = everyone.shape[0] // sample_loss.shape[0]
        count = (~everyone.isnan()).sum().clamp(min=1).to(sample_loss.dtype) / ranks
        percentile = percentile_ref(everyone, loss_percentile)
        new_avg = moving_average_ref(loss_moving_avg, percentile, decay)
        loss_diff = sample_loss - new_avg.to(sample_loss.dtype)
        label_input = labels.masked_fill(~valid, 0)  # ignore_index is no row of the embedding
        weight = sample_weight_ref(curriculum, sample_loss, loss_diff, label_input, epoch_pct)
        if dropout is not None:
            if sample_ids is None:
                sample_ids = torch.arange(labels.shape[0], device=labels.device)
            weight = example_dropout_ref(dropout, weight, valid, epoch_pct, seed, step, sample_ids)
        weight = weight.masked_fill(~valid, 0.0)

    # Rows of weight 0 leave the graph before the loss: 0 · NaN must be 0, in the gradient too.
    dropped = weight == 0
    loss_of_kept = cross_entropy_ref(
        logits.masked_fill(dropped.unsqueeze(1), 0.0), labels, ignore_index
    )
    loss = (weight * loss_of_kept).sum() / count
    return Reweighted(loss, sample_loss, weight, new_avg)


# The fused kernels come behind this name with the same signature; until then it is the definition.
reweight = reweight_ref
