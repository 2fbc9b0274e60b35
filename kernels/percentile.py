"""The percentile of a batch's losses, and its moving average (the paper's ℓ_pt, Sec. 3.1).

    q     the loss whose descending rank is round-half-even((n − 1)(1 − p)), of n losses present
    ℓ_pt  ← decay · ℓ_pt + (1 − decay) · q

The "nearest" order statistic, as the released code takes it: no interpolation, so the value is
bit-exact on every backend. NaN marks an absent loss, +inf sorts above every finite one, −0 counts
as +0.

The kernel maps the floats to integers of the same order and settles the wanted one from its highest
bits down, two bits a round: each round counts how many keys continue with 0, 1, 2 and 3, all four
counts in the 16-bit fields of one sum. So a round is one reduction, the batch stays in registers
and nothing is sorted (a sort of 16,384 losses has about a thousand barriers). One program, 4 B
bytes.

Shapes: B losses.
"""

import torch
from torch import Tensor, library

from mentorch.kernels.backend import (
    float64_bits,
    next_power_of_2,
    on_its_device,
    runs_kernels,
    tl,
    triton,
)

_ABSENT_KEY = tl.constexpr(2**32 - 1)  # above +inf
_ROUND_TO_INTEGER = tl.constexpr(1.5 * 2.0**52)  # x + this − this rounds half to even
_LARGEST_BLOCK = 16384  # keys that one program holds in registers; a count must stay below 2^16


def check_moving_average(loss_percentile: float, decay: float) -> None:
    """Raises ValueError unless p is in [0, 1] and the decay in [0, 1)."""
    if not 0.0 <= loss_percentile <= 1.0:
        raise ValueError(f"loss_percentile must be in [0, 1], got {loss_percentile}")
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")


def nearest_position_ref(present: Tensor, loss_percentile: Tensor | float) -> Tensor:
    """Ascending position of the percentile among ``present`` losses; 0 where there is none."""
    descending_rank = ((present - 1).double() * (1.0 - loss_percentile)).round().long()
    return (present - 1 - descending_rank).clamp(min=0)


def percentile_ref(losses: Tensor, loss_percentile: float) -> Tensor:
    """The p-th percentile of the losses present.

    Args:
        losses: [B], B ≥ 1. NaN marks an absent loss; +inf sorts above every finite loss.
        loss_percentile: p in [0, 1].

    Returns:
        0-d, one of the losses; NaN when none is present.
    """
    present = (~losses.isnan()).sum()
    position = nearest_position_ref(present, loss_percentile)
    ascending = (losses + 0.0).sort().values  # −0 + 0 is +0; NaN sorts last
    return ascending.gather(0, position.view(1)).squeeze(0)


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


@triton.jit
def order_key(x):
    """uint32 keys in the order of float32 ``x``; NaN last."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(
        bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000
    )  # negative floats order backwards
    return tl.where(x != x, _ABSENT_KEY, key)


@triton.jit
def nearest_position(present, complement):
    """Ascending position of the percentile; ``complement``: 1 − p as the bits of a float64."""
    rank = (present - 1).to(tl.float64) * complement.to(tl.float64, bitcast=True)
    # The maximum also keeps the compiler from fusing the product into the sum: a fused product is
    # not rounded, and ties such as 5 · 0.1 would fall on the other side.
    rank = (tl.maximum(rank, 0.0) + _ROUND_TO_INTEGER) - _ROUND_TO_INTEGER
    return tl.maximum(present - 1 - rank.to(tl.int32), 0)


@triton.jit
def _load_keys(losses_ptr, offset_B, B):
    return order_key(
        tl.load(losses_ptr + offset_B, mask=offset_B < B, other=float("nan"), cache_modifier=".cg")
    )


@triton.jit
def _count_digits(key_B, found, shift):
    """How many keys go on from the bits ``found`` with 0, 1, 2, 3: 16-bit fields of an int64."""
    rest_B = (key_B ^ found) >> shift
    counted_B = tl.where(rest_B < 4, tl.full(key_B.shape, 1, tl.int64) << (16 * rest_B), 0)
    return tl.sum(counted_B, axis=0)


@triton.jit
def _unpack(counts, digit: tl.constexpr):
    return ((counts >> (16 * digit)) & 0xFFFF).to(tl.int32)


@triton.jit
def block_present(losses_ptr, B, BLOCK: tl.constexpr):
    """How many of the losses [B] are not NaN, by one program."""
    present = 0
    for start in range(0, B, BLOCK):
        key = _load_keys(losses_ptr, start + tl.arange(0, BLOCK), B)
        present += tl.sum((key != _ABSENT_KEY).to(tl.int32), axis=0)
    return present


@triton.jit
def block_order_statistic(
    losses_ptr, B, position, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):  # fmt: skip
    """The float32 at an ascending position among losses [B], by one program.

    BLOCK is a power of two up to 2^15; ONE_BLOCK says that B ≤ BLOCK: the keys stay in registers.
    """
    offset_B = tl.arange(0, BLOCK)
    key_B = _load_keys(losses_ptr, offset_B, B)
    found = tl.full([], 0, tl.uint32)
    for settled in range(2, 33, 2):
        shift = 32 - settled
        counts = _count_digits(key_B, found, shift)
        zeros, ones, twos = _unpack(counts, 0), _unpack(counts, 1), _unpack(counts, 2)
        if not ONE_BLOCK:
            for start in range(BLOCK, B, BLOCK):
                key = _load_keys(losses_ptr, start + offset_B, B)
                counts = _count_digits(key, found, shift)
                zeros += _unpack(counts, 0)
                ones += _unpack(counts, 1)
                twos += _unpack(counts, 2)
        below_2 = zeros + ones
        below_3 = below_2 + twos
        digit = (
            (position >= zeros).to(tl.uint32)
            + (position >= below_2).to(tl.uint32)
            + (position >= below_3).to(tl.uint32)
        )
        skipped = tl.where(digit == 1, zeros, 0)
        skipped = tl.where(digit == 2, below_2, skipped)
        position -= tl.where(
            digit == 3, below_3, skipped
        )  # now among those that begin with `found`
        found = found | (digit << shift)
    bits = tl.where(found >> 31 == 1, found ^ 0x80000000, found ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def block_percentile(
    losses_ptr, B, complement, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):  # fmt: skip
    """(percentile, losses present) of float32 losses [B], by one program."""
    present = block_present(losses_ptr, B, BLOCK)
    position = nearest_position(present, complement)
    q = block_order_statistic(losses_ptr, B, position, BLOCK, ONE_BLOCK)
    return tl.where(present > 0, q, float("nan")), present


@triton.jit
def moving_average(avg, q, decay, complement):
    """ℓ_pt after a step (`moving_average_ref`); ``complement``: 1 − decay."""
    finite = (q - q) == 0.0
    return tl.where(finite, decay * avg + complement * q, avg)


@triton.jit(do_not_specialize=["B"])
def _percentile_kernel(
    losses_ptr,  # [B] float32
    avg_ptr,  # 0-d
    q_ptr,  # 0-d float32, written
    new_avg_ptr,  # 0-d, written
    B,
    complement,  # 1 − p, the bits of a float64
    decay,
    decay_complement,  # 1 − decay
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    q, _ = block_percentile(losses_ptr, B, complement, BLOCK, ONE_BLOCK)
    avg = tl.load(avg_ptr).to(tl.float32)
    tl.store(q_ptr, q)
    tl.store(new_avg_ptr, moving_average(avg, q, decay, decay_complement))


@on_its_device
def launch_percentile(
    losses: Tensor, loss_moving_avg: Tensor, loss_percentile: float, decay: float
) -> tuple[Tensor, Tensor]:
    """(q, ℓ_pt after the step), both 0-d."""
    batch = losses.shape[0]
    q, new_avg = losses.new_empty(()), torch.empty_like(loss_moving_avg)
    block = min(next_power_of_2(batch), _LARGEST_BLOCK)
    _percentile_kernel[(1,)](
        losses.contiguous(),
        loss_moving_avg,
        q,
        new_avg,
        batch,
        float64_bits(1.0 - loss_percentile),
        decay,
        1.0 - decay,
        BLOCK=block,
        ONE_BLOCK=batch <= block,
        num_warps=min(max(block // 128, 1), 16),
    )
    return q, new_avg


_percentile = library.custom_op("mentorch::percentile", launch_percentile, mutates_args=())


@_percentile.register_fake
def _(losses, loss_moving_avg, loss_percentile, decay):
    return losses.new_empty(()), torch.empty_like(loss_moving_avg)


def percentile(losses: Tensor, loss_percentile: float) -> Tensor:
    """The p-th percentile of the losses present: `percentile_ref`, on a GPU in one launch.

    Args:
        losses: [B], 1 ≤ B. NaN marks an absent loss.
        loss_percentile: p in [0, 1].

    Returns:
        0-d, one of the losses; NaN when none is present. No gradient.

    Raises:
        ValueError: an empty batch, or p out of range.
    """
    return percentile_moving_average(losses, losses.new_zeros(()), loss_percentile, 0.0)[0]


def percentile_moving_average(
    losses: Tensor, loss_moving_avg: Tensor, loss_percentile: float, decay: float
) -> tuple[Tensor, Tensor]:
    """The percentile and ℓ_pt updated by it, in one launch on a GPU.

    Args:
        losses: [B], 1 ≤ B. NaN marks an absent loss.
        loss_moving_avg: 0-d, ℓ_pt before this step.
        loss_percentile: p in [0, 1].
        decay: of ℓ_pt, in [0, 1).

    Returns:
        (q, ℓ_pt), both 0-d; a q that is not finite leaves ℓ_pt as it was. No gradient.

    Raises:
        ValueError: an empty batch, or a parameter out of range.
    """
    check_moving_average(loss_percentile, decay)
    if losses.ndim != 1 or losses.shape[0] == 0:
        raise ValueError(f"losses must be [B] with B ≥ 1, got {list(losses.shape)}")
    losses, loss_moving_avg = losses.detach(), loss_moving_avg.detach()
    if runs_kernels(losses) and losses.dtype == torch.float32:
        q, new_avg = _percentile(losses, loss_moving_avg, loss_percentile, decay)
        return q, new_avg
    q = percentile_ref(losses, loss_percentile)
    return q, moving_average_ref(loss_moving_avg, q, decay)
