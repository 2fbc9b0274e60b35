"""Counter-based random numbers: the same for the same key, on every device, grid and rank.

Everything random in mentorch (example dropout, burn-in, sample order, crops, label noise) is a pure
function of ``(seed, step, sample)``, so a resumed run, another batch split or another backend draws
the same numbers and no generator state has to be saved.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counter
words are (sample low, sample high, step, stream) and the key is the seed, which is what
``tl.philox(seed, c0, c1, c2, c3)`` computes in a Triton kernel.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """What the numbers are for. Two streams never share a number; the values are part of the
    format."""

    EXAMPLE_DROPOUT = 0
    ORDER = 1
    CROP = 2
    FLIP = 3
    LABEL_NOISE = 4
    TRUSTED = 5
    SHARD = 6  # which samples a shard holds
    SHARD_ORDER = 7


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for 32-bit a and b (the signed 64-bit product wraps; its bits do
    not)."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(
    seed: Tensor | int, step: Tensor | int, sample: Tensor, stream: int
) -> tuple[Tensor, ...]:
    """Four independent random 32-bit words for each sample.

    Args:
        seed: the key, a 64-bit integer, signed or not (or a 0-d int64 tensor).
        step: the training step or epoch, below 2**32 (or a 0-d int64 tensor).
        sample: integer tensor of sample ids, any shape.
        stream: one of `Stream`.

    Returns:
        Four int64 tensors of the shape of ``sample``, values in [0, 2**32).
    """
    sample = sample.to(torch.int64)  # 32-bit products would overflow
    # Integers stay Python numbers: a copy to the device would sync and could not be captured.
    c0, c1 = sample & _MASK, (sample >> 32) & _MASK
    c2, c3 = torch.zeros_like(sample) + (step & _MASK), torch.full_like(sample, int(stream))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_b, low_b = _mul_hi_lo(_ROUND_B, c2)
        high_a, low_a = _mul_hi_lo(_ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def to_uniform(word: Tensor) -> Tensor:
    """A random 32-bit word as float32 in [0, 1): its upper 24 bits, so that the value is exact."""
    return (word >> 8).to(torch.float32) * 2.0**-24
