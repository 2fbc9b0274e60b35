"""Channels-last images as rows: a pixel is a row of channels side by side, rows equally far apart.

    pixel (b, h, w), channel c  at  ((b·H + h)·W + w) · stride + c

A channel slice of such an image is such an image too. A program takes a block of channels and a run
of pixels, tile by tile; what it sums stays its own until all programs are put together in a fixed
order, so the same bits come out every time.

Shapes: B batch, C channels, H×W pixels, N = B·H·W rows; P programs over rows, R rows and K channels
of a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mentorch.kernels.backend import multiprocessors, next_power_of_2, on_its_device, tl, triton

_TILE_BYTES = 8192  # read, of all images: 64 a thread, so that enough loads are under way
_MOST_PARTS = 512  # of a sum over rows: one program takes them all in, in one tile
_SUM_CHANNELS = 8


def pixel_stride(image: Tensor) -> int | None:
    """How many elements lie between two pixels of [B, C, H, W]; None for any other layout."""
    batch, channels, height, width = image.shape
    per_batch, per_channel, per_line, per_pixel = image.stride()
    if channels > 1 and per_channel != 1:
        return None
    # Of the first dimension that has more than one index, and of the next. None, not 0: that is the
    # stride of an expanded tensor, such as the gradient of a sum over the pixels.
    stride = following = None
    for size, step in ((width, per_pixel), (height, per_line), (batch, per_batch)):
        if size == 1:
            continue
        if following is not None and step != following:
            return None
        stride = step if stride is None else stride
        following = step * size
    stride = channels if stride is None else stride
    fits = stride >= channels and batch * height * width < 2**31
    return stride if fits else None


def row_stride(image: Tensor) -> int:
    """`pixel_stride` of an image known to have one."""
    stride = pixel_stride(image)
    assert stride is not None, image.stride()
    return stride


def as_rows(image: Tensor) -> Tensor:
    """The image, or a channels-last copy where its pixels are no rows."""
    if pixel_stride(image) is not None:
        return image
    return image.contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, channels: int) -> Tensor:
    """[B, C, H, W], packed channels-last, not filled."""
    batch, _, height, width = like.shape
    shape = batch, channels, height, width
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


class Grid(NamedTuple):
    """How programs go over N rows of channels."""

    parts: int  # programs over rows
    blocks: int  # programs over channels
    tiles: int  # of a program
    rows: int  # of a tile
    channels: int  # of a tile
    vector: int  # divides every number of channels and every stride

    @property
    def programs(self) -> tuple[int, int]:
        """Over rows and over channels."""
        return self.parts, self.blocks

    def constants(self) -> dict[str, int]:
        """The arguments that every kernel over rows takes."""
        return {"tiles": self.tiles, "V": self.vector, "R": self.rows, "K": self.channels}


def rows_of(image: Tensor) -> int:
    """N = B·H·W."""
    return image.shape[0] * image.shape[2] * image.shape[3]


def plan(
    image: Tensor, channels: Sequence[int], strides: Sequence[int], *, reads: int, sums: bool
) -> Grid:
    """A grid over ranges of channels of an image.

    Args:
        image: [B, C, H, W] that the rows are of.
        channels: of each range; a block of channels lies in one range.
        strides: of all images that are read or written, besides.
        reads: how many images are read, from one place each.
        sums: whether every program leaves a part of a sum over rows; a few programs a
            multiprocessor then, and at most 512 over rows.
    """
    vector = 16 // image.element_size()
    while any(number % vector for number in (*channels, *strides)):
        vector //= 2
    # The wider of the two that leaves no more lanes without a channel: 80 are 3 × 32, not 2 × 64.
    wide = min((64, 32), key=lambda k: sum(-(-c // k) * k for c in channels))
    block = min(wide, next_power_of_2(max(channels)))
    blocks = sum(-(-c // block) for c in channels)
    count = rows_of(image)
    tile = _TILE_BYTES // image.element_size() // reads
    if vector * image.element_size() < 16:
        tile //= 2  # an address for every few elements: registers would spill
    rows = min(tile // block, next_power_of_2(count))
    most = max((4 if sums else 16) * multiprocessors(image.device) // blocks, 1)
    tiles = -(-count // rows)
    tiles = -(-tiles // min(most, _MOST_PARTS if sums else most))
    return Grid(-(-count // (tiles * rows)), blocks, tiles, rows, block, vector)


@triton.jit
def tile_offsets(row, stride, block, C, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """(offsets [R, K] of a tile, which of its K channels are there [1, K]).

    The stride and C come as multiples of V: so the compiler sees what divides them, and moves
    16 bytes at once.
    """
    at_RK = tl.arange(0, R)[:, None] * (stride * V) + (block * K + tl.arange(0, K))[None, :]
    channel_K = block * K + tl.arange(0, K)
    return row * (stride * V) + at_RK, (channel_K < C * V)[None, :]


@triton.jit(do_not_specialize=["C", "parts"])
def _sum_parts_kernel(
    part_ptr,  # [sums, P, C] float32
    sum_ptr,  # [sums, C] float32, written
    C,
    parts,
    P2: tl.constexpr,  # a power of two, at least P
    K: tl.constexpr,
):
    which = tl.program_id(1)
    channel_K = (tl.program_id(0) * K + tl.arange(0, K))[None, :]
    part_P = tl.arange(0, P2)[:, None]
    there = (part_P < parts) & (channel_K < C)
    part_PK = tl.load(part_ptr + (which * parts + part_P) * C + channel_K, mask=there, other=0.0)
    sum_K = tl.sum(part_PK, axis=0)[None, :]
    tl.store(sum_ptr + which * C + channel_K, sum_K, mask=channel_K < C)


@on_its_device
def launch_sum_parts(parts: Tensor) -> Tensor:
    """[sums, P, C] float32 → [sums, C], always in the same order."""
    sums, count, channels = parts.shape
    total = parts.new_empty(sums, channels)
    _sum_parts_kernel[(-(-channels // _SUM_CHANNELS), sums)](
        parts, total, channels, count, P2=next_power_of_2(count), K=_SUM_CHANNELS
    )
    return total
