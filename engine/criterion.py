"""What SPADE needs of a loss: weights for a batch, and perhaps a curriculum that changes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mentorch.kernels.reweight import Reweighted

Ranks = dist.ProcessGroup | Literal["world"] | None
_Same = TypeVar("_Same", bound="Criterion")


class Criterion(nn.Module, ABC):
    """A loss over noisy labels: `Reweight`, what it is compared with, or your own.

    In training mode every call is one step; in eval mode it is plain mean cross-entropy. Parameters
    that a criterion has of its own are trained along with the student, without weight decay.

    Logits may have more dimensions than [B, C]: every label is then a sample, be it of an image, a
    token or a pixel.

    Args:
        ignore_index: label of rows that do not count.
        group: ranks whose batches form one; each brings the same number of labels. "world": all
            ranks there are at the call, be they set up later than this criterion or not at all.
        class_dim: which dimension of the logits the classes are in. 1, as `nn.CrossEntropyLoss` has
            it: [B, C], [B, C, H, W]. −1 for classes that come last: [B, length, C].

    Raises:
        ValueError: a group of another name than "world".
    """

    loss_moving_avg: Tensor
    """ℓ_pt, nats, 0-d; stays 0 where there is none."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        group: Ranks = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(group, str) and group != "world":
            raise ValueError(f"group is 'world', a process group or None, not {group!r}")
        self.ignore_index = ignore_index
        self._ranks = group
        self.class_dim = class_dim
        # Not PyTorch's default dtype, which trainers set to a half precision: see `_apply`.
        self.register_buffer("loss_moving_avg", torch.zeros((), dtype=torch.float32))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks whose batches form one; None: this one alone."""
        return dist.group.WORLD if isinstance(self._ranks, str) else self._ranks

    def __deepcopy__(self: _Same, memo: dict[int, Any]) -> _Same:
        # A process group cannot be copied: it is no state but a connection, which copies share.
        memo[id(self._ranks)] = self._ranks
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _apply(self: _Same, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Same:
        # Trainers cast whole models to half precision. ℓ_pt moves by less than that can show.
        super()._apply(  # type: ignore[no-untyped-call]
            lambda tensor: _keep_precision(tensor, fn(tensor)), recurse
        )
        return self

    @abstractmethod
    def weigh_rows(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """What `weigh` does, of a batch of plain rows.

        Args:
            logits: [B, C].
            labels: [B] integers; ``ignore_index`` for rows that do not count.
            index: [B] int64 sample ids; below 0 for rows that are no sample.
        """

    def weigh(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """One training step with everything it computed: loss, sample losses, weights, ℓ_pt.

        Args:
            logits: [B, C], or of more dimensions, with the classes in ``class_dim``.
            labels: integers, of the logits' shape without the classes; ``ignore_index`` for what
                does not count (padding, void pixels).
            index: int64 sample ids, one a label, in the labels' shape or flat; below 0 for what is
                no sample.

        Returns:
            What was found; sample losses and weights have the labels' shape.

        Raises:
            ValueError: shapes that do not fit, or soft targets.
        """
        dim = self._find_classes(logits, labels)
        if logits.ndim == 2 and dim == 1:
            return self.weigh_rows(logits, labels, index)
        ids = None if index is None else _as_rows_of_ids(index, labels)
        out = self.weigh_rows(_as_rows(logits, dim), labels.reshape(-1), ids)
        return Reweighted(
            out.loss,
            out.sample_loss.view(labels.shape),
            out.sample_weight.view(labels.shape),
            out.loss_moving_avg,
        )

    def _find_classes(self, logits: Tensor, labels: Tensor) -> int:
        """The dimension of the classes, counted from 0; ValueError where the labels do not fit."""
        if labels.is_floating_point():
            raise ValueError(
                f"labels are class numbers, integers, but these are {labels.dtype} of "
                f"{list(labels.shape)}: soft targets, as Mixup and CutMix make them, belong to no "
                "one sample that could be weighted. Turn both off; for label smoothing give "
                "Reweight(…, label_smoothing=0.1)"
            )
        dim = self.class_dim if logits.ndim > 1 else 0  # [C]: a single sample
        if -logits.ndim <= dim < logits.ndim:
            dim %= logits.ndim
            if labels.shape == logits.shape[:dim] + logits.shape[dim + 1 :]:
                return dim
        raise ValueError(
            "logits and labels do not fit, they are "
            f"{list(logits.shape)} and {list(labels.shape)}: with class_dim={self.class_dim} the "
            "labels have the logits' shape without that dimension. Give class_dim=1 for classes in "
            "the second one, as in [B, C, H, W], class_dim=-1 for the last, as in [B, length, C]"
        )

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
        """The loss to call ``backward`` on; arguments as `weigh`.

        In eval mode a batch without a label that counts gives NaN, as `nn.CrossEntropyLoss` does;
        in training mode it gives 0.
        """
        if self.training:
            return self.weigh(logits, labels, index).loss
        dim = self._find_classes(logits, labels)
        if dim != 1:  # PyTorch wants them there; rows are no copy where the classes come last
            logits, labels = _as_rows(logits, dim), labels.reshape(-1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(dtype), labels.long(), ignore_index=self.ignore_index)


def _keep_precision(tensor: Tensor, moved: Tensor) -> Tensor:
    """``moved``, or ``tensor`` on its device where it would have lost bits."""
    if moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize:
        return tensor.to(moved.device)
    return moved


def _as_rows(logits: Tensor, dim: int) -> Tensor:
    """[rows, C] of logits with the classes in ``dim``; a view where the memory allows it."""
    by_label = logits.movedim(dim, -1)
    return by_label.reshape(math.prod(by_label.shape[:-1]), by_label.shape[-1])


def _as_rows_of_ids(index: Tensor, labels: Tensor) -> Tensor:
    """[rows] of sample ids, one a label.

    Raises:
        ValueError: another number of them. One of a sequence or an image is not repeated over its
            labels: their coins would be one, and so would their histories.
    """
    if index.shape not in (labels.shape, (labels.numel(),)):
        raise ValueError(
            f"index has the ids of the labels, {list(labels.shape)}, but is {list(index.shape)}. "
            "A token or a pixel is a sample of its own: give each an id of its own (such as "
            "sequence id · length + position), or no index where neither a history nor anything "
            "else is kept by sample"
        )
    return index.reshape(-1)


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
