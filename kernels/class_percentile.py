"""The percentile of the losses of each class: ℓ_pt for data whose classes differ in size.

    ℓ_pt[c] = the p[c]-th percentile of the last M losses of samples labelled c

Over a batch as a whole (the paper) the percentile is nearly that of the frequent classes. What is
rare is learnt later, so its losses are larger, and a curriculum drops rare classes first. By class
each keeps a share p[c] of its own; where labels are wrong at random, those of a rare class are
wrong more often, having come from frequent ones. A batch has few samples of a rare class, or none,
and a moving average of percentiles of one or two losses would be one of their mean; so the last M
losses are kept and the percentile is exact over those. The window takes the place of the decay.

Plain PyTorch on every device, some twenty launches and none that the host waits for. 4 M (C + 1)
bytes; while they are sorted some five times as many, of W rows where those are fewer than classes.

Shapes: B rows, W rows of all ranks, C classes, M losses kept of a class.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mentorch.kernels.history import table_rows
from mentorch.kernels.percentile import nearest_position_ref


class ClassLosses(NamedTuple):
    """The last losses of every class, changed in place; the last row is scratch."""

    window: Tensor  # [C + 1, M] float32, nats; NaN: none yet
    seen: Tensor  # [C + 1] int64, losses put in so far
    share: Tensor  # [C + 1] float64, p; never changed here


def new_class_losses(
    num_classes: int,
    window: int,
    loss_percentile: float,
    device: torch.device | str | None = None,
) -> ClassLosses:
    """Nothing seen yet.

    Args:
        num_classes: C.
        window: M.
        loss_percentile: p of every class, in [0, 1].
        device: where the tensors shall lie.

    Raises:
        ValueError: ``num_classes`` or ``window`` is below 1.
    """
    if num_classes < 1 or window < 1:
        raise ValueError(
            f"num_classes and the window must be at least 1, got {num_classes} and {window}"
        )
    return ClassLosses(
        torch.full((num_classes + 1, window), torch.nan, dtype=torch.float32, device=device),
        torch.zeros(num_classes + 1, dtype=torch.int64, device=device),
        torch.full((num_classes + 1,), loss_percentile, dtype=torch.float64, device=device),
    )


def remember_losses(kept: ClassLosses, labels: Tensor, losses: Tensor) -> None:
    """Puts losses into their classes' windows, the oldest making room; ``kept`` is changed.

    Args:
        kept: what there is.
        labels: [W] integers; one outside [0, C) is of no class.
        losses: [W], nats; NaN: does not count.
    """
    rows = table_rows(kept.seen, labels.long().masked_fill(losses.isnan(), -1))
    order = rows.argsort(stable=True)
    ascending = rows[order]
    first = torch.searchsorted(ascending, ascending)
    end = torch.searchsorted(ascending, ascending, right=True)
    place = torch.arange(len(rows), device=rows.device)
    size = kept.window.shape[1]
    slot = (kept.seen[ascending] + place - first) % size
    # More of a class than its window holds: the last ones stay, each slot is written once.
    scratch = len(kept.seen) - 1
    target = ascending.masked_fill(place < end - size, scratch)
    kept.window[target, slot] = losses[order].to(kept.window.dtype)
    kept.seen.index_add_(0, rows, torch.ones_like(rows))


def class_percentile(kept: ClassLosses, labels: Tensor) -> Tensor:
    """ℓ_pt of every row's class, [B] in the windows' dtype; NaN where it has no losses yet.

    The "nearest" order statistic, as in `percentile`.

    Args:
        kept: what was seen, these rows included.
        labels: [B] integers.
    """
    rows = table_rows(kept.seen, labels.long())
    if len(kept.seen) <= len(rows):  # what is less: every class once (pixels, tokens), or every row
        found = _percentiles(*kept)[rows]
    else:
        found = _percentiles(*(column[rows] for column in kept))
    return found.masked_fill(rows == len(kept.seen) - 1, torch.nan)


def _percentiles(window: Tensor, seen: Tensor, share: Tensor) -> Tensor:
    """Of every row of a window its percentile."""
    ascending = (window + 0.0).sort(dim=1).values  # NaN sorts last
    position = nearest_position_ref(seen.clamp(max=window.shape[1]), share)
    return ascending.gather(1, position.unsqueeze(1)).squeeze(1)
