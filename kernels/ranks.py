"""Rows of a batch that the ranks of a process group have between them, rank by rank."""

import torch.distributed as dist
from torch import Tensor


def count_ranks(group: dist.ProcessGroup | None) -> int:
    """How many ranks there are; without a group this one."""
    return 1 if group is None else dist.get_world_size(group)


def first_row(rows: Tensor, group: dist.ProcessGroup | None) -> int:
    """The number of this rank's first row among those of all, each having as many."""
    return 0 if group is None else dist.get_rank(group) * rows.shape[0]


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, [W, …]; every rank brings the same [B, …]. The host does not wait."""
    if count_ranks(group) == 1:
        return rows
    everyone = rows.new_empty(count_ranks(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.contiguous(), group=group)
    return everyone
