"""The end of a residual block: a scaled branch added to its input, then ReLU.

    y = max(0, x + scale · (branch + bias))
    dx = dy 1[y > 0],   dbranch = scale · dx,   dbias = Σ dbranch of each channel

Bytes, for s bytes an element: forward reads branch and x and writes y, backward reads dy and y and
writes dbranch and dx, each once: seven passes of s·N·C. Without ReLU dx is dy itself, and backward
is one read and one write. PyTorch, one operator after another, makes seven forward (scale, add,
ReLU in place) and five backward (ReLU's mask, scale). Launches: one each, and one more for dbias.

Shapes as in `pixels`: B batch, C channels, H×W pixels, N = B·H·W rows; P programs over rows, R rows
and K channels of a tile.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mentorch.kernels.backend import on_its_device, runs_kernels, tl, triton
from mentorch.kernels.pixels import (
    as_rows,
    empty_image,
    launch_sum_parts,
    pixel_stride,
    plan,
    row_stride,
    rows_of,
    tile_offsets,
)


def scale_add_relu_ref(
    branch: Tensor, x: Tensor, scale: float, bias: Tensor | None = None, relu: bool = True
) -> Tensor:
    """The definition, in plain PyTorch; arguments as `scale_add_relu`."""
    _check(branch, x, bias)
    dtype = torch.promote_types(x.dtype, torch.float32)
    added = branch.to(dtype)
    if bias is not None:
        added = added + bias.to(dtype).view(1, -1, 1, 1)
    y = torch.add(x.to(dtype), added, alpha=scale)
    return (y.relu() if relu else y).to(x.dtype)


def _check(branch: Tensor, x: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4 or branch.shape != x.shape:
        shapes = f"{list(branch.shape)} and {list(x.shape)}"
        raise ValueError(f"branch and x must be [B, C, H, W] of one shape, got {shapes}")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be [{x.shape[1]}], got {list(bias.shape)}")


# ---- Kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "C", "branch_stride", "x_stride", "y_stride", "tiles"])
def _scale_add_relu_fwd_kernel(
    branch_ptr,  # [N, C], rows of branch_stride · V
    x_ptr,
    bias_ptr,  # [C] float32, or None
    y_ptr,  # written
    N,
    C,  # of V
    branch_stride,  # of V
    x_stride,
    y_stride,
    scale,
    tiles,
    RELU: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    block = tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * tiles * R
    bias_K = tl.zeros([1, K], tl.float32)
    if bias_ptr is not None:
        at_K = (block * K + tl.arange(0, K))[None, :]
        bias_K = tl.load(bias_ptr + at_K, mask=at_K < C * V, other=0.0)
    for tile in range(tiles):
        row = begin + tile * R
        branch_RK, there_K = tile_offsets(row, branch_stride, block, C, V, R, K)
        x_RK, _ = tile_offsets(row, x_stride, block, C, V, R, K)
        y_RK, _ = tile_offsets(row, y_stride, block, C, V, R, K)
        there_RK = (row + tl.arange(0, R)[:, None] < N) & there_K
        branch_RK = tl.load(branch_ptr + branch_RK, mask=there_RK, other=0.0).to(tl.float32)
        x_RK = tl.load(x_ptr + x_RK, mask=there_RK, other=0.0).to(tl.float32)
        sum_RK = x_RK + scale * (branch_RK + bias_K)
        if RELU:
            sum_RK = tl.where(sum_RK < 0.0, 0.0, sum_RK)  # NaN stays, as in PyTorch
        tl.store(y_ptr + y_RK, sum_RK.to(y_ptr.dtype.element_ty), mask=there_RK)


@triton.jit(do_not_specialize=["N", "C", "dy_stride", "stride", "tiles"])
def _scale_add_relu_bwd_kernel(
    dy_ptr,  # [N, C], rows of dy_stride · V
    y_ptr,  # None without ReLU
    dbranch_ptr,  # written
    dx_ptr,  # written; None without ReLU
    part_ptr,  # [1, P, C] float32, written: Σ dbranch; or None
    N,
    C,  # of V
    dy_stride,  # of V
    stride,  # of all others, of V
    scale,
    tiles,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    block = tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * tiles * R
    total_RK = tl.zeros([R, K], tl.float32)
    for tile in range(tiles):
        row = begin + tile * R
        dy_RK, there_K = tile_offsets(row, dy_stride, block, C, V, R, K)
        to_RK, _ = tile_offsets(row, stride, block, C, V, R, K)
        there_RK = (row + tl.arange(0, R)[:, None] < N) & there_K
        dx_RK = tl.load(dy_ptr + dy_RK, mask=there_RK, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y_RK = tl.load(y_ptr + to_RK, mask=there_RK, other=0.0)
            dx_RK = tl.where(y_RK <= 0.0, 0.0, dx_RK)
            tl.store(dx_ptr + to_RK, dx_RK.to(dx_ptr.dtype.element_ty), mask=there_RK)
        dbranch_RK = scale * dx_RK
        tl.store(dbranch_ptr + to_RK, dbranch_RK.to(dbranch_ptr.dtype.element_ty), mask=there_RK)
        if part_ptr is not None:
            total_RK += dbranch_RK
    if part_ptr is not None:
        at_K = (block * K + tl.arange(0, K))[None, :]
        to_K = part_ptr + tl.program_id(0) * (C * V) + at_K
        tl.store(to_K, tl.sum(total_RK, axis=0)[None, :], mask=at_K < C * V)


# ---- Launchers ----------------------------------------------------------------------------------


@on_its_device
def launch_forward(
    branch: Tensor, x: Tensor, scale: float, bias: Tensor | None, relu: bool
) -> Tensor:
    """y, packed, in x's dtype."""
    channels = x.shape[1]
    strides = [row_stride(branch), row_stride(x), channels]
    grid = plan(x, [channels], strides, reads=2, sums=False)
    y = empty_image(x, channels)
    _scale_add_relu_fwd_kernel[grid.programs](
        branch,
        x,
        bias,
        y,
        rows_of(x),
        channels // grid.vector,
        *(stride // grid.vector for stride in strides),
        scale,
        RELU=relu,
        **grid.constants(),
    )
    return y


@on_its_device
def launch_backward(
    dy: Tensor, y: Tensor | None, scale: float, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dbranch, dx, dbias [C] float32 if wanted); ``y`` is None without ReLU."""
    channels = dy.shape[1]
    strides = [row_stride(dy), channels]
    grid = plan(dy, [channels], strides, reads=2, sums=bias)
    dbranch = empty_image(dy, channels)
    dx = dy if y is None else empty_image(dy, channels)
    parts = dy.new_empty(1, grid.parts, channels, dtype=torch.float32) if bias else None
    _scale_add_relu_bwd_kernel[grid.programs](
        dy,
        y,
        dbranch,
        None if y is None else dx,
        parts,
        rows_of(dy),
        channels // grid.vector,
        *(stride // grid.vector for stride in strides),
        scale,
        **grid.constants(),
    )
    return dbranch, dx, None if parts is None else launch_sum_parts(parts)[0]


class _Fused(torch.autograd.Function):
    """The kernels, differentiable in branch, x and bias."""

    @staticmethod
    def forward(ctx, branch, x, scale, bias, relu):
        y = launch_forward(branch, x, scale, bias, relu)
        ctx.scale = scale
        ctx.save_for_backward(y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        dbranch, dx, dbias = launch_backward(as_rows(dy), y, ctx.scale, wanted)
        return dbranch, dx, None, dbias, None


def _takes_kernels(branch: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not runs_kernels(branch, x) or branch.dtype != x.dtype:
        return False
    if bias is not None and not (
        runs_kernels(bias) and bias.dtype == torch.float32 and bias.is_contiguous()
    ):
        return False
    return pixel_stride(branch) is not None and pixel_stride(x) is not None


def scale_add_relu(
    branch: Tensor, x: Tensor, scale: float, bias: Tensor | None = None, relu: bool = True
) -> Tensor:
    """x + scale · (branch + bias), cut off below 0.

    Args:
        branch: [B, C, H, W], any floating dtype: a convolution's output without its bias.
        x: the same shape and dtype: the block's input.
        scale: of the branch.
        bias: [C], the convolution's.
        relu: whether values below 0 become 0.

    Returns:
        [B, C, H, W] in x's dtype; the mathematics is float32, or float64 for float64.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(branch, x, bias)
    if not _takes_kernels(branch, x, bias):
        return scale_add_relu_ref(branch, x, scale, bias, relu)
    y: Tensor = _Fused.apply(branch, x, scale, bias, relu)
    return y
