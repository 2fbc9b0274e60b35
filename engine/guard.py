"""Steps whose gradients are not finite: they change nothing, and their samples are named.

Gradients are averaged over the ranks before anyone looks, so a NaN of one rank is everyone's, and
all ranks decide alike without asking each other. The decision stays on the device: the optimiser's
kernel reads it, and the running statistics are put back. What the host learns, it learns when it
asks for metrics.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mentorch.engine.distributed import World
from mentorch.engine.parallel import flatten_buffers


@dataclass(frozen=True)
class Suspect:
    """A sample of a step that was skipped.

    Attributes:
        step: training steps taken before it.
        rank: that had the sample.
        sample_id: row of the training index.
        loss: nats; finite if the losses of the step all were, and just a gradient was not.
    """

    step: int
    rank: int
    sample_id: int
    loss: float


class StepGuard:
    """Undoes what a forward pass has done, and remembers the steps since the host last asked.

    Args:
        student: in training. Its float32 buffers become views of one tensor.
    """

    def __init__(self, student: nn.Module) -> None:
        self._buffers = flatten_buffers(student)
        self._kept = None if self._buffers is None else self._buffers.clone()
        self._batches: list[tuple[int, Tensor, Tensor]] = []  # not copied: no work, no launch
        self._norms: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step's forward pass."""
        if self._buffers is not None and self._kept is not None:
            self._kept.copy_(self._buffers)

    @torch.no_grad()
    def end(self, bad: Tensor) -> None:
        """After its backward pass; ``bad``: 0-d bool, whether the gradients are not finite."""
        if self._buffers is not None and self._kept is not None:
            torch.where(bad, self._kept, self._buffers, out=self._buffers)

    def note(self, step: int, sample_ids: Tensor, sample_loss: Tensor) -> None:
        """A batch of a step that was taken."""
        self._batches.append((step, sample_ids, sample_loss))

    def noted(self, step: int, norm: Tensor) -> None:
        """All batches of the step are noted; ``norm``: 0-d, of its gradients."""
        self._norms.append((step, norm))

    def forget(self) -> None:
        """All steps so far have been told of, or were good."""
        self._batches.clear()
        self._norms.clear()

    def suspects(self, world: World) -> list[Suspect]:
        """The samples of all ranks behind the steps skipped since `forget`; every rank calls it."""
        good = torch.stack([norm for _, norm in self._norms]).isfinite().tolist()
        skipped = {s for (s, _), ok in zip(self._norms, good, strict=True) if not ok}
        mine = [
            Suspect(step, world.rank, sample, loss)
            for step, sample_ids, sample_loss in self._batches
            if step in skipped
            for sample, loss in zip(sample_ids.tolist(), sample_loss.tolist(), strict=True)
            if sample >= 0
        ]
        found = [suspect for of_rank in world.gather(mine) for suspect in of_rank]
        return list(_guilty(found))


def _guilty(suspects: Iterable[Suspect]) -> Iterable[Suspect]:
    """Of every step the samples with a loss that is not finite, or all if it has none."""
    by_step: dict[int, list[Suspect]] = {}
    for suspect in suspects:
        by_step.setdefault(suspect.step, []).append(suspect)
    for _, found in sorted(by_step.items()):
        yield from [s for s in found if not math.isfinite(s.loss)] or found
