"""Sums behind the metrics of training, kept on the device and read at log points."""

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.engine.criteria import IGNORED
from mentorch.engine.distributed import World
from mentorch.kernels.reweight import Reweighted

USED = 0.001  # a weight above this counts as used, as in the released code's data utilisation
MASKS = ("valid", "right", "wrong", "labelled", "all")
VALUES = ("one", "loss", "weighted_loss", "weight", "used")


class Tally:
    """Sums over samples and over steps since the last reading.

    Args:
        device: where the sums are.

    Attributes:
        sums: [masks, values] float64, of this rank: Σ over the rows of a mask of a value.
        of_steps: [3] float64, the same on every rank: Σ of gradient norms, steps, skipped steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(MASKS), len(VALUES), dtype=torch.float64, device=device)
        self.of_steps = self.sums.new_zeros(3)

    @torch.no_grad()
    def add_batch(self, out: Reweighted, labels: Tensor, clean_labels: Tensor) -> None:
        """Counts a batch.

        Args:
            out: what the criterion found, [B].
            labels: [B] given labels, `IGNORED` for rows without an image.
            clean_labels: [B] labels known to be right; −1 where unknown.
        """
        labelled = labels != IGNORED
        both = out.sample_loss + out.sample_weight
        valid = labelled & (both - both == 0)  # finite, in two launches of the four of isfinite()
        loss = out.sample_loss.masked_fill(~valid, 0.0)
        weight = out.sample_weight.masked_fill(~valid, 0.0)
        right = valid & (clean_labels == labels)
        wrong = valid & (clean_labels >= 0) & ~right
        every = torch.ones_like(valid)
        masks = torch.stack([valid, right, wrong, labelled, every])
        values = torch.stack(
            [every.to(loss), loss, weight * loss, weight, (weight > USED).to(loss)]
        )
        # All the sums by one product: launches cost, not multiplications.
        self.sums.addmm_(masks.to(torch.float64), values.to(torch.float64).T)

    @torch.no_grad()
    def add_step(self, norm: Tensor, finite: Tensor) -> None:
        """Counts a step by its gradients' norm, 0-d, and whether that is finite."""
        self.of_steps += torch.stack([norm.where(finite, 0), torch.ones_like(norm), ~finite])

    def of_all_ranks(self, world: World) -> Tensor:
        """`sums` over the ranks; all of them call it."""
        sums = self.sums.clone()
        if world.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading; the host waits."""
        values = torch.cat([self.of_all_ranks(world).flatten(), self.of_steps]).tolist()
        self.sums.zero_()
        self.of_steps.zero_()
        norm, steps, skipped = values[-3:]
        pairs = [(mask, value) for mask in MASKS for value in VALUES]
        total = dict(zip(pairs, values[:-3], strict=True))
        samples, rows = max(total["valid", "one"], 1), total["all", "one"]
        metrics = {
            "loss": total["valid", "loss"] / samples,
            "weighted_loss": total["valid", "weighted_loss"] / samples,
            "mean_weight": total["valid", "weight"] / samples,
            "data_utilization": total["valid", "used"] / samples,
        }
        for mask in ("right", "wrong"):
            if count := total[mask, "one"]:  # none without known clean labels
                metrics[f"weight_{mask}"] = total[mask, "weight"] / count
        metrics["grad_norm"] = norm / max(steps - skipped, 1)
        metrics["rows"] = rows
        metrics["unusable"] = 1 - total["labelled", "one"] / max(rows, 1)  # rows without an image
        metrics["skipped"] = skipped  # steps whose gradients were not finite
        return metrics


def sum_of_weights(out: Reweighted, labels: Tensor) -> Tensor:
    """[2]: Σ v of a batch, and how many samples it has."""
    return torch.stack([out.sample_weight.sum(), (labels != IGNORED).sum()])
