"""Burn-in and example dropout: the probabilistic sampling layer of Fig. 1.

During burn-in (the first 20% of training in the paper) v ~ Bernoulli(p): the curriculum is not used
and samples are dropped at random. Afterwards v = g_m(z), of which a share may still be dropped.
Kept weights are not rescaled. The released code keeps an exact count, ⌊B(1 − rate)⌋, lets the rate
change at other times than the burn-in ends, and knows a third rate for the end of training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mentorch.kernels.backend import tl, triton
from mentorch.kernels.philox import Stream, philox, to_uniform

_STREAM = tl.constexpr(int(Stream.EXAMPLE_DROPOUT))


@dataclass(frozen=True)
class ExampleDropout:
    """How many samples get weight 0 by chance, and when.

    Raises:
        ValueError: a rate outside [0, 1) or a burn-in outside 0..100.
    """

    burn_in_pct: int = 20
    """Epoch percentage at which burn-in ends; before it every kept sample has weight 1."""
    burn_in_rate: float = 0.5
    """Share of samples dropped during burn-in (1 − the paper's p)."""
    rate: float = 0.0
    """Share of samples dropped after burn-in."""
    exact: bool = False
    """Keep exactly ⌊B(1 − rate)⌋ of a rank's B samples, as released, not one coin a sample."""
    burn_in_rate_pct: int | None = None
    """Epoch percentage at which ``burn_in_rate`` gives way to ``rate``; None: when burn-in ends."""
    late_pct: int = 100
    """Epoch percentage at which ``rate`` gives way to ``late_rate``; 100: never."""
    late_rate: float = 0.0
    """Share of samples dropped from then on."""

    def __post_init__(self) -> None:
        for name in ("burn_in_rate", "rate", "late_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("burn_in_pct", "burn_in_rate_pct", "late_pct"):
            if not 0 <= (getattr(self, name) or 0) <= 100:
                raise ValueError(f"{name} must be in 0..100, got {getattr(self, name)}")

    @property
    def early_pct(self) -> int:
        """`burn_in_rate_pct`, resolved."""
        return self.burn_in_pct if self.burn_in_rate_pct is None else self.burn_in_rate_pct

    @property
    def rates(self) -> tuple[float, float, float]:
        """The rates in the order in which they rule; 0 for one that never does."""
        early = self.burn_in_rate if self.early_pct > 0 else 0.0
        return early, self.rate, self.late_rate if self.late_pct < 100 else 0.0

    def rate_at(self, epoch_pct: Tensor) -> Tensor:
        """The rate in force, 0-d float64: in float32 0.05 is more than 1/20, and of 8,000 samples
        one more would go."""
        early, rate, late = (torch.full_like(epoch_pct, r, dtype=torch.float64) for r in self.rates)
        rate = torch.where(epoch_pct < self.late_pct, rate, late)
        return torch.where(epoch_pct < self.early_pct, early, rate)


def example_dropout_ref(
    dropout: ExampleDropout,
    sample_weight: Tensor,
    valid: Tensor,
    epoch_pct: Tensor,
    seed: Tensor | int,
    step: Tensor | int,
    sample_ids: Tensor,
) -> Tensor:
    """Weights after burn-in and dropout.

    Args:
        dropout: rates.
        sample_weight: [B] from the curriculum.
        valid: [B] bool; the rows that count towards B in the exact form.
        epoch_pct: 0-d integer 0..99.
        seed: key of the random numbers.
        step: training step.
        sample_ids: [B] int64; a sample's coin depends on (seed, step, its id) alone.

    Returns:
        [B], dtype of ``sample_weight``.
    """
    in_burn_in = epoch_pct < dropout.burn_in_pct
    weight = torch.where(in_burn_in, torch.ones_like(sample_weight), sample_weight)
    if not any(dropout.rates):
        return weight
    rate = dropout.rate_at(epoch_pct)
    coin = to_uniform(philox(seed, step, sample_ids, Stream.EXAMPLE_DROPOUT)[0])
    if dropout.exact:
        keep_count = (valid.sum() * (1.0 - rate) + 1e-6).floor()  # 100 · (1 − 0.07) is 92.999…
        order = coin.masked_fill(~valid, 2.0).argsort(stable=True)
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        keep = rank < keep_count
    else:
        keep = coin >= rate
    return torch.where(keep, weight, torch.zeros_like(weight))


@triton.jit
def coins(seed, step, id_M):
    """The samples' coins in [0, 1), the very numbers of `example_dropout_ref`."""
    low_M = (id_M & 0xFFFFFFFF).to(tl.uint32)
    high_M = ((id_M >> 32) & 0xFFFFFFFF).to(tl.uint32)
    step_M = tl.zeros_like(low_M) + (step & 0xFFFFFFFF).to(tl.uint32)
    stream_M = tl.full(low_M.shape, _STREAM, tl.uint32)
    word_M, _, _, _ = tl.philox(seed, low_M, high_M, step_M, stream_M)
    return (word_M >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def how_many_to_keep(valid, share):
    """⌊valid · share⌋, where ``share`` is 1 − rate as the bits of a float64."""
    kept = valid.to(tl.float64) * share.to(tl.float64, bitcast=True)
    return (kept + 1e-6).to(tl.int32)  # 100 · (1 − 0.07) is 92.999…


@triton.jit
def keep_exact(coin_M, threshold, of_equals, equals_before):
    """Which samples are below the threshold, and the first ``of_equals`` of those upon it.

    Returns (kept, samples upon the threshold up to here): the ones of the tiles before are passed
    in, so that ties are settled by the row number.
    """
    equal_M = (coin_M == threshold).to(tl.int32)
    nth_M = equals_before + tl.cumsum(equal_M, axis=0)
    kept_M = (coin_M < threshold) | ((equal_M == 1) & (nth_M <= of_equals))
    return kept_M, equals_before + tl.sum(equal_M, axis=0)
