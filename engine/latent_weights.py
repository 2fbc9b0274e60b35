"""SPADE with a known G: the sample weights are variables of their own (Algorithm 1, line 9).

    v_i ← Π_[0,1] ( v_i − α_k (x_i + ∂G/∂v_i) ),   x_i = ℓ_i − ℓ_pt or ℓ_i,   i in the mini-batch

v is a table over all samples on the device, of which a step changes its mini-batch's rows only.
With the G of Eq. 5 and α = 1/λ2 one such step lands on the optimum, Eq. 7: line 9 is then line 11.
A smaller α makes a sample's weight an average over its visits.

Theorem 1 asks for Σ α_k = ∞ and Σ α_k² < ∞, for a smooth G. ``weight_lr / k^power`` meets that for
power in (½, 1]; power 0, the default, is a constant step, which it does not cover (and neither does
it cover a student's usual learning rates).
"""

import torch
from torch import Tensor

from mentorch.engine.criterion import count_rows
from mentorch.engine.objectives import regularizer
from mentorch.engine.reweight import Reweight
from mentorch.kernels.cross_entropy import cross_entropy
from mentorch.kernels.mentor import ClosedForm
from mentorch.kernels.ranks import gather_rows
from mentorch.kernels.reweight import Reweighted


class LatentReweight(Reweight):
    """Cross-entropy under latent sample weights that descend along G.

    Burn-in and example dropout act on top of v, as in `Reweight`; during burn-in v rests.

    Args:
        form: a closed form with a known G: ``self_paced`` or ``linear`` (`regularizer`).
        num_samples: N of the data set.
        weight_lr: α, the first step's size, in weight per nat.
        power: of the visit count k that divides α; see the module's text.
        settings: further options of `Reweight`, but no history.

    Raises:
        ValueError: a closed form without G, or a number out of range.
    """

    sample_weights: Tensor
    visits: Tensor

    def __init__(
        self,
        form: ClosedForm,
        *,
        num_samples: int,
        weight_lr: float,
        power: float = 0.0,
        **settings: object,
    ) -> None:
        super().__init__(ClosedForm("uniform"), **settings)  # type: ignore[arg-type]
        found = regularizer(form)
        if found is None:
            raise ValueError(
                f"{form.kind!r} has no G whose gradient could be followed; self_paced and linear "
                "have, or use the curriculum directly (weight_lr=0)"
            )
        if num_samples < 1 or not weight_lr > 0 or not 0.0 <= power <= 1.0:
            raise ValueError(
                "num_samples and weight_lr must be above 0 and power in [0, 1], got "
                f"num_samples={num_samples}, weight_lr={weight_lr}, power={power}"
            )
        self.form, self.regularizer = form, found
        self.weight_lr, self.power = weight_lr, power
        # The last row is scratch, for rows that are no sample.
        start = torch.ones(num_samples + 1, dtype=torch.float32)  # line 1: v⁰
        self.register_buffer("sample_weights", start)
        self.register_buffer("visits", torch.zeros_like(start))

    def weigh_rows(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """One training step; arguments as `Criterion.weigh_rows`, ``index`` required.

        Raises:
            ValueError: no ``index``.
        """
        if index is None:
            raise ValueError("latent weights are kept by sample: call criterion(…, index)")
        in_burn_in = self.epoch_pct() < self.dropout.burn_in_pct
        valid = labels != self.ignore_index
        with torch.no_grad():
            out = super().weigh_rows(logits, labels, index)  # its weights are the dropout's coins
            moves = valid & (index >= 0) & ~in_burn_in
            v = self._descend(out, torch.where(moves, index, len(self.visits) - 1))
            weight = out.sample_weight * torch.where(in_burn_in, 1.0, v)
        # Rows of weight 0 leave the graph before the loss: 0 · NaN must be 0.
        kept = logits.masked_fill((weight == 0).unsqueeze(1), 0.0)
        loss = weight * cross_entropy(kept, labels, self.ignore_index)
        mean = loss.sum() / count_rows(valid, self.group)
        return Reweighted(mean, out.sample_loss, weight, out.loss_moving_avg)

    def _descend(self, out: Reweighted, rows: Tensor) -> Tensor:
        """Line 9 on the table's rows; returns their new values."""
        x = out.sample_loss.float()  # as the table, whatever the logits are
        if self.form.on == "loss_diff":
            x = x - out.loss_moving_avg
        v = self.sample_weights[rows]
        rate = self.weight_lr / (1 + self.visits[rows]) ** self.power
        moved = (v - rate * (x + self.regularizer.gradient(v))).clamp(0.0, 1.0)
        v = moved.where(x.isfinite(), v)  # a NaN would stay
        # On every rank: another one may have the sample in the next epoch.
        rows = gather_rows(rows, self.group)
        self.sample_weights[rows] = gather_rows(v, self.group)
        self.visits[rows] += 1
        return v
