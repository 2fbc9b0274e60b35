"""The percentile of a batch's losses, and its moving average (the paper's ℓ_pt, Sec. 3.1).

"Nearest" order statistic, as the released code takes it: of n losses the one whose descending rank
is round-half-even((n − 1)(1 − p)). No interpolation, so the value is bit-exact on every backend.
"""

import torch
from torch import Tensor


def percentile_ref(losses: Tensor, loss_percentile: float) -> Tensor:
    """The p-th percentile of the losses present.

    Args:
        losses: [B], B ≥ 1. NaN marks an absent loss; +inf sorts above every finite loss.
        loss_percentile: p in [0, 1].

    Returns:
        0-d, one of the losses; NaN when none is present.
    """
    present = (~losses.isnan()).sum()
    descending_rank = ((present - 1).double() * (1.0 - loss_percentile)).round().long()
    position = (present - 1 - descending_rank).clamp(min=0)
    return losses.sort().values.gather(0, position.view(1)).squeeze(0)  # NaN sorts last


def moving_average_ref(loss_moving_avg: Tensor, percentile: Tensor, decay: float) -> Tensor:
    """ℓ_pt ← decay · ℓ_pt + (1 − decay) · q; a q that is not finite leaves ℓ_pt as it was.

    Args:
        loss_moving_avg: 0-d, the average before this step.
        percentile: 0-d, this step's q. An infinite one would stay in the average for ever.
        decay: in [0, 1).

    Returns:
        0-d, in the dtype of ``loss_moving_avg``.
    """
    updated = decay * loss_moving_avg + (1.0 - decay) * percentile.to(loss_moving_avg.dtype)
    return torch.where(percentile.isfinite(), updated, loss_moving_avg)
