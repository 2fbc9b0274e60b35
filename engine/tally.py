"""What the metrics of training are made of: sums on the device, read at log points."""

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.engine.criteria import IGNORED
from mentorch.engine.distributed import World
from mentorch.kernels.reweight import Reweighted
from mentorch.kernels.tally import SUMS, tally


class Tally:
    """Sums over samples and over steps since the last reading.

    Args:
        device: where the sums are.

    Attributes:
        sums: [11] float64, of this rank: see `mentorch.kernels.tally`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self._before = self.sums.new_zeros(3)  # what a checkpoint had of an unfinished reading
        self._norms: list[Tensor] = []

    def add_batch(self, out: Reweighted, labels: Tensor, clean_labels: Tensor) -> None:
        """Counts a batch.

        Args:
            out: what the criterion found, [B].
            labels: [B] given labels, `IGNORED` for rows without an image.
            clean_labels: [B] labels known to be right; −1 where unknown.
        """
        tally(self.sums, out.sample_loss, out.sample_weight, labels, clean_labels, IGNORED)

    def add_step(self, norm: Tensor) -> None:
        """Notes a step by its gradients' norm, 0-d; it is looked at when it is read."""
        self._norms.append(norm)

    def of_steps(self) -> Tensor:
        """[3] float64, the same on every rank: Σ of finite norms, steps, skipped steps."""
        if not self._norms:
            return self._before
        norms = torch.stack(self._norms).double()
        finite = norms.isfinite()
        total = norms.where(finite, 0.0).sum()
        return self._before + torch.stack([total, torch.ones_like(norms).sum(), (~finite).sum()])

    def of_all_ranks(self, world: World) -> Tensor:
        """`sums` over the ranks; all of them call it."""
        sums = self.sums.clone()
        if world.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading; the host waits."""
        values = torch.cat([self.of_all_ranks(world), self.of_steps()]).tolist()
        self.load(torch.zeros_like(self.sums), torch.zeros_like(self._before))
        norm, steps, skipped = values[-3:]
        total = dict(zip(SUMS, values[:-3], strict=True))
        samples, rows = max(total["valid"], 1), total["rows"]
        metrics = {
            "loss": total["loss"] / samples,
            "weighted_loss": total["weighted_loss"] / samples,
            "mean_weight": total["weight"] / samples,
            "data_utilization": total["used"] / samples,
        }
        for which in ("right", "wrong"):
            if count := total[which]:  # none without known clean labels
                metrics[f"weight_{which}"] = total[f"weight_{which}"] / count
        metrics["grad_norm"] = norm / max(steps - skipped, 1)
        metrics["rows"] = rows
        metrics["unusable"] = 1 - total["labelled"] / max(rows, 1)  # rows without an image
        metrics["skipped"] = skipped  # steps whose gradients were not finite
        return metrics

    def load(self, sums: Tensor | None, of_steps: Tensor) -> None:
        """Puts back what `sums` and `of_steps` were; without ``sums`` another rank has them."""
        if sums is not None:
            self.sums.copy_(sums)
        self._before.copy_(of_steps)
        self._norms.clear()


def sum_of_weights(out: Reweighted, labels: Tensor) -> Tensor:
    """[2]: Σ v of a batch, and how many samples it has."""
    return torch.stack([out.sample_weight.sum(), (labels != IGNORED).sum()])
