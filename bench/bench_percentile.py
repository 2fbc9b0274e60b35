"""The exact p-th percentile of a batch's losses, "nearest" order statistic, p = 0.75.

Ideal bytes: 4 B read. The peers are told that no loss is absent (NaN), which `percentile` finds out
by itself.
"""

from typing import NamedTuple

import torch
from peers import Call
from rows import Row
from torch import Tensor

from mentorch.kernels.percentile import percentile, percentile_ref

P = 0.75


class Inputs(NamedTuple):
    losses: Tensor  # [B] float32


def inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)
    # Losses of 1000 classes: positive, most near log 1000, so that their highest bits agree.
    return Inputs(torch.randn(row.batch, generator=random, device=device).add_(6.9).abs_())


def nearest_position(count: int) -> int:
    """Ascending position of the percentile among ``count`` losses; Python rounds half to even."""
    return count - 1 - round((count - 1) * (1.0 - P))


def setup(row: Row, given: Inputs) -> Call:
    """One call of ``row.provider``, which returns (q,)."""
    (losses,) = given
    position = nearest_position(row.batch)

    def quantile() -> Tensor:
        return torch.quantile(losses, P, interpolation="nearest")

    functions = {
        "mentorch": lambda: percentile(losses, P),
        "quantile": quantile,
        "sort": lambda: losses.sort().values[position],
        "kthvalue": lambda: losses.kthvalue(position + 1).values,
    }
    function = functions[row.provider]
    return Call(lambda: (function(),))


def reference(row: Row, given: Inputs) -> tuple[Tensor]:
    return (percentile_ref(given.losses, P),)


def test_percentile(row, measure):
    measure(row, tolerance=0.0)
