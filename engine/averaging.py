"""The moving average of a student's weights: what is evaluated, and often the better model.

    ŵ ← ŵ + (1 − d_t)(w − ŵ),   d_t = min(d, 1 − (1 + t)^(−2/3))

The warm-up d_t is that of timm's ModelEmaV3, whose factor is a Python number; here it is a tensor,
so that a step which was captured in a CUDA graph can go on with another one.
"""

from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn


class WeightAverage:
    """Parameters and running statistics, averaged; integers (counters) are copied.

    Args:
        student: in training; the average starts as a copy of it.
        decay: d, per step, in [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.module = deepcopy(student).eval().requires_grad_(False)
        self.decay = decay
        self._new_share = torch.ones((), device=next(student.parameters()).device)

    def prepare(self, step: int) -> None:
        """Sets d_t; called by the host before a step's work is launched.

        Args:
            step: t, steps taken so far.
        """
        self._new_share.fill_(1 - min(self.decay, 1 - (1 + step) ** (-2 / 3)))

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Takes in the student's weights; a few launches, however many tensors there are."""
        pairs = list(zip(_tensors(self.module), _tensors(student), strict=True))
        averages = [average for average, _ in pairs if average.is_floating_point()]
        change = list(torch._foreach_sub([w for _, w in pairs if w.is_floating_point()], averages))
        torch._foreach_mul_(change, self._new_share)
        torch._foreach_add_(averages, change)
        counters = [(old, new) for old, new in pairs if not old.is_floating_point()]
        if counters:
            torch._foreach_copy_([old for old, _ in counters], [new for _, new in counters])


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))
