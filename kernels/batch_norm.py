"""Batch norm and ReLU in training, of one or several norms over the channels of one image.

    μ = mean(x),  σ² = mean((x − μ)²)                    of each channel, over its n values
    x̂ = (x − μ) / √(σ² + ε),   z = x̂ γ + β,   y = max(0, z)
    running ← (1 − momentum) · running + momentum · (μ, σ² n / (n − 1))

    dz = dy 1[z > 0],   dβ = Σ dz,   dγ = Σ dz x̂
    dx = γ / √(σ² + ε) · (dz − dβ / n − x̂ dγ / n)

Forward: every program takes mean and Σ(x − mean)² of a run of pixels, by Welford's update in every
lane and from a shift by each channel's first value, so a mean far from 0 costs no digits; one small
launch puts them together (Chan et al., 1983) and updates the running statistics; a third writes y.
Backward: partial sums, their sum, dx. z is computed again from x, so x and two numbers a channel
are all that is kept.

Bytes, for s bytes an element: forward reads s·n·C twice and writes it once, backward reads x and dy
twice and writes dx, eight passes together; what fits into the L2 cache is read from there the
second time. PyTorch's batch norm and ReLU in place make five (statistics, normalise, ReLU's read
and write) and eight (ReLU's mask: two reads, one write; then the norm's five). Launches: six,
however many norms share x; the norms of PyTorch have theirs each.

Shapes as in `pixels`: B batch, C channels, H×W pixels, N = B·H·W rows (n above); P programs over
rows, R rows and K channels of a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mentorch.kernels.backend import next_power_of_2, on_its_device, runs_kernels
from mentorch.kernels.batch_norm_kernels import (
    batch_norm_combine_kernel,
    batch_norm_relu_bwd_kernel,
    batch_norm_relu_fwd_kernel,
    batch_norm_relu_sums_kernel,
    batch_norm_statistics_kernel,
)
from mentorch.kernels.pixels import (
    Grid,
    as_rows,
    empty_image,
    launch_sum_parts,
    pixel_stride,
    plan,
    row_stride,
    rows_of,
)

_COMBINED_CHANNELS = 8  # of a program: 32 bytes of each part, and as many programs as can be


class Norm(NamedTuple):
    """One batch norm; each tensor [C] float32 (float64 where x is)."""

    weight: Tensor  # γ
    bias: Tensor  # β
    running_mean: Tensor  # updated in place
    running_var: Tensor  # updated in place, unbiased


def batch_norm_relu_ref(
    x: Tensor,
    norms: Sequence[Norm],
    *,
    momentum: float,
    eps: float,
    into: Tensor | None = None,
    offset: int = 0,
    update: bool = True,
) -> list[Tensor]:
    """The definition, in plain PyTorch; arguments as `batch_norm_relu`."""
    _check(x, norms, into, offset)
    outputs = []
    parts = x.split([len(norm.weight) for norm in norms], dim=1)
    for part, norm in zip(parts, norms, strict=True):
        mean, var = (norm.running_mean, norm.running_var) if update else (None, None)
        y = F.batch_norm(part, mean, var, norm.weight, norm.bias, True, momentum, eps)
        outputs.append(y.relu_())
    if into is not None:
        into[:, offset : offset + outputs[0].shape[1]] = outputs[0]
        outputs[0] = into
    return outputs


def _check(x: Tensor, norms: Sequence[Norm], into: Tensor | None, offset: int) -> None:
    channels = [len(norm.weight) for norm in norms]
    if x.ndim != 4 or not norms or sum(channels) != x.shape[1]:
        raise ValueError(f"norms of {channels} channels do not add up to x {list(x.shape)}")
    if x.numel() == x.shape[1]:
        raise ValueError(f"x {list(x.shape)} has one value a channel: its variance is not defined")
    if into is None:
        return
    expected = x.shape[0], into.shape[1], *x.shape[2:]
    if into.shape != expected or into.dtype != x.dtype:
        got = f"{list(into.shape)} {into.dtype}"
        raise ValueError(f"into must be {list(expected)} {x.dtype}, got {got}")
    if not 0 <= offset <= into.shape[1] - channels[0]:
        raise ValueError(f"{channels[0]} channels from {offset} do not fit into {into.shape[1]}")


# ---- Launchers ----------------------------------------------------------------------------------


def _over_norms(
    x: Tensor, norms: Sequence[Norm], images: Sequence[Tensor], *, reads: int, sums: bool
) -> tuple[Grid, dict[str, object]]:
    """A grid over the norms' channels, and the arguments of every kernel that goes over it.

    ``images`` are the norms' own: outputs or their gradients.
    """
    channels = [len(norm.weight) for norm in norms]
    strides = [row_stride(image) for image in images]
    grid = plan(x, channels, (row_stride(x), *strides), reads=reads, sums=sums)
    return grid, {
        "weight_ptrs": tuple(norm.weight for norm in norms),
        "bias_ptrs": tuple(norm.bias for norm in norms),
        "channels": tuple(c // grid.vector for c in channels),
        "N": rows_of(x),
        "C": x.shape[1],
        "stride": row_stride(x) // grid.vector,
        "NORMS": len(norms),
        **grid.constants(),
    }


@on_its_device
def launch_statistics(
    x: Tensor, norms: Sequence[Norm], momentum: float, eps: float, update: bool
) -> Tensor:
    """[2, C] float32: mean and 1/√(σ² + ε) of every channel; ``update``: of the norms too."""
    count, channels = rows_of(x), x.shape[1]
    grid = plan(x, [channels], [row_stride(x)], reads=1, sums=True)
    parts = x.new_empty(2, grid.parts, channels, dtype=torch.float32)
    batch_norm_statistics_kernel[grid.programs](
        x, parts, count, channels // grid.vector, row_stride(x) // grid.vector, **grid.constants()
    )
    statistics = x.new_empty(2, channels, dtype=torch.float32)
    own = [len(norm.weight) for norm in norms]
    batch_norm_combine_kernel[(sum(-(-c // _COMBINED_CHANNELS) for c in own),)](
        x,
        parts,
        statistics,
        tuple(norm.running_mean for norm in norms),
        tuple(norm.running_var for norm in norms),
        tuple(own),
        count,
        channels,
        grid.parts,
        grid.tiles * grid.rows,
        momentum,
        eps,
        NORMS=len(norms),
        UPDATE=update,
        P2=next_power_of_2(grid.parts),
        K=_COMBINED_CHANNELS,
        num_warps=8,
    )
    return statistics


@on_its_device
def launch_forward(
    x: Tensor, norms: Sequence[Norm], statistics: Tensor, outputs: Sequence[Tensor]
) -> None:
    """Writes y of each norm into its output."""
    grid, arguments = _over_norms(x, norms, outputs, reads=1, sums=False)
    batch_norm_relu_fwd_kernel[grid.programs](
        x,
        tuple(outputs),
        statistics,
        y_strides=tuple(row_stride(y) // grid.vector for y in outputs),
        **arguments,
    )


@on_its_device
def launch_sums(
    x: Tensor, norms: Sequence[Norm], statistics: Tensor, grads: Sequence[Tensor]
) -> Tensor:
    """[2, C] float32: dβ and dγ of every channel."""
    grid, arguments = _over_norms(x, norms, grads, reads=2, sums=True)
    parts = statistics.new_empty(2, grid.parts, x.shape[1])
    batch_norm_relu_sums_kernel[grid.programs](
        x,
        tuple(grads),
        parts,
        statistics,
        dy_strides=tuple(row_stride(dy) // grid.vector for dy in grads),
        **arguments,
    )
    return launch_sum_parts(parts)


@on_its_device
def launch_backward(
    x: Tensor, norms: Sequence[Norm], statistics: Tensor, sums: Tensor, grads: Sequence[Tensor]
) -> Tensor:
    """dx, packed, in x's dtype."""
    grid, arguments = _over_norms(x, norms, grads, reads=2, sums=False)
    dx = empty_image(x, x.shape[1])
    batch_norm_relu_bwd_kernel[grid.programs](
        x,
        tuple(grads),
        dx,
        sums,
        statistics,
        dy_strides=tuple(row_stride(dy) // grid.vector for dy in grads),
        dx_stride=x.shape[1] // grid.vector,
        **arguments,
    )
    return dx


# ---- Autograd -----------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """The kernels, differentiable in x, γ and β. The gradient of ``into`` is passed on whole, and
    read where it is this call's."""

    @staticmethod
    def forward(ctx, x, into, settings, *tensors):
        norms = [Norm(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]
        momentum, eps, offset, update = settings
        statistics = launch_statistics(x, norms, momentum, eps, update)
        outputs = [
            into.narrow(1, offset, len(norm.weight))
            if into is not None and i == 0
            else empty_image(x, len(norm.weight))
            for i, norm in enumerate(norms)
        ]
        launch_forward(x, norms, statistics, outputs)
        if into is not None:
            ctx.mark_dirty(into)
            outputs[0] = into
        ctx.offset = None if into is None else offset
        ctx.save_for_backward(x, statistics, *(t for norm in norms for t in norm[:2]))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, statistics, *affine = ctx.saved_tensors
        norms = [Norm(w, b, w, b) for w, b in zip(affine[::2], affine[1::2], strict=True)]
        own = [as_rows(grad) for grad in grads]
        grad_into = None
        if ctx.offset is not None:
            grad_into = own[0]
            own[0] = grad_into.narrow(1, ctx.offset, len(norms[0].weight))
        sums = launch_sums(x, norms, statistics, own)
        dx = launch_backward(x, norms, statistics, sums, own) if ctx.needs_input_grad[0] else None
        first, of_norms = 0, []
        for norm in norms:
            bias, weight = sums[:, first : first + len(norm.weight)]
            of_norms += [weight, bias, None, None]
            first += len(norm.weight)
        return dx, grad_into, None, *of_norms


def _takes_kernels(x: Tensor, norms: Sequence[Norm], into: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not runs_kernels(x):
        return False
    images = (x,) if into is None else (x, into)
    own = [tensor for norm in norms for tensor in norm]
    return all(pixel_stride(image) is not None for image in images) and all(
        t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device for t in own
    )


def batch_norm_relu(
    x: Tensor,
    norms: Sequence[Norm],
    *,
    momentum: float,
    eps: float,
    into: Tensor | None = None,
    offset: int = 0,
    update: bool = True,
) -> list[Tensor]:
    """Normalises ranges of channels by the batch's statistics and cuts off below 0, as above.

    Args:
        x: [B, C1 + C2 + …, H, W], any floating dtype; more than one value a channel.
        norms: the i-th belongs to the i-th range of channels.
        momentum: the new batch's share in the running statistics, in [0, 1].
        eps: ε > 0.
        into: [B, C, H, W] in x's dtype, which takes the first norm's output instead of a tensor of
            its own: a concatenation without a copy. A fresh buffer, not a view, each of whose
            channels is written once.
        offset: the first channel of ``into`` that is written.
        update: whether the running statistics are updated; a recomputation under activation
            checkpointing must not count twice.

    Returns:
        A tensor a norm, in x's dtype; with ``into`` the first is that itself: go on with what is
        returned.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a single value a channel.
    """
    _check(x, norms, into, offset)
    if not _takes_kernels(x, norms, into):
        return batch_norm_relu_ref(
            x, norms, momentum=momentum, eps=eps, into=into, offset=offset, update=update
        )
    tensors = [tensor for norm in norms for tensor in norm]
    return list(_Fused.apply(x, into, (momentum, eps, offset, update), *tensors))
