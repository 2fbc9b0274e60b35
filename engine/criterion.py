"""What SPADE needs of a loss: weights for a batch, and perhaps a curriculum that changes."""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mentorch.kernels.reweight import Reweighted


class Criterion(nn.Module, ABC):
    """A loss over noisy labels: `Reweight`, what it is compared with, or your own.

    In training mode every call is one step; in eval mode it is plain mean cross-entropy. Parameters
    that a criterion has of its own are trained along with the student, without weight decay.

    Args:
        ignore_index: label of rows that do not count.
        group: ranks whose batches form one.
    """

    loss_moving_avg: Tensor
    """ℓ_pt, nats, 0-d; stays 0 where there is none."""

    def __init__(self, *, ignore_index: int = -100, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.group = group
        self.register_buffer("loss_moving_avg", torch.zeros(()))

    @abstractmethod
    def weigh(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """One training step with everything it computed: loss, sample losses, weights, ℓ_pt.

        Args:
            logits: [B, C].
            labels: [B] int64; ``ignore_index`` for rows that do not count.
            index: [B] int64 sample ids; below 0 for rows that are no sample.
        """

    def learns_at(self, step: int) -> bool:
        """Whether `update_curriculum` is due; most curricula stay as they are.

        Args:
            step: calls of `weigh` so far.
        """
        return False

    def update_curriculum(self, step: int) -> None:
        """Lines 5 to 7 of Algorithm 1, called before a batch for which `learns_at` says so.

        Args:
            step: as there.
        """

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss to call ``backward`` on; arguments as `weigh`."""
        if self.training:
            return self.weigh(logits, labels, index).loss
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), labels.long(), ignore_index=self.ignore_index)


def count_rows(valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What to divide a rank's sum by, so that averaging over ranks gives the global mean.

    Args:
        valid: [B] bool, the rows that count.
        group: the ranks.

    Returns:
        0-d float32: valid rows of all ranks over the number of ranks, at least 1 over it.
    """
    count = valid.sum().to(torch.float32)
    if group is None or dist.get_world_size(group) == 1:
        return count.clamp(min=1)
    dist.all_reduce(count, group=group)
    return count.clamp(min=1) / dist.get_world_size(group)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks of a group, rank by rank; every rank brings equally many."""
    if group is None or dist.get_world_size(group) == 1:
        return rows
    everyones = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyones, rows.contiguous(), group=group)
    return everyones
