"""Top-1 and top-5 accuracy on a validation set, over all ranks, every sample exactly once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mentorch.engine.data.pipelines import Batch
from mentorch.engine.data.prefetch import prefetched
from mentorch.engine.distributed import World
from mentorch.engine.parallel import share_buffers
from mentorch.engine.student import forward


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, in [0, 1], and the number of images they are over."""

    top1: float
    top5: float
    images: int


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [right at first, right among five, rows]; rows with a negative label do not count."""
    counted = labels >= 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return torch.stack([best[:, 0].sum(), best.any(1).sum(), counted.sum()])


@torch.no_grad()
def evaluate(
    student: nn.Module,
    batches: Iterable[Batch],
    labels_N: Tensor,
    normalise: nn.Module,
    dtype: torch.dtype,
    world: World,
) -> Accuracy:
    """Evaluates a student.

    Args:
        student: not wrapped in DDP.
        batches: all of the validation set, from a loader with ``train=False``.
        labels_N: [N] int64 on the device, the student's class of each row of the index; -1 for
            none.
        normalise: from pixels to the student's input.
        dtype: of the forward pass.
        world: the ranks.
    """
    was_training = student.training
    student.eval()
    share_buffers(student, world)
    total = torch.zeros(3, dtype=torch.int64, device=world.device)
    for images, sample_ids in prefetched(batches, world.device):
        labels = labels_N[sample_ids.clamp(min=0)].masked_fill(sample_ids < 0, -1)
        logits = forward(student, normalise(images), dtype)
        total += hits(logits, labels)
    if world.world_size > 1:
        dist.all_reduce(total)
    student.train(was_training)
    top1, top5, images_seen = total.tolist()
    return Accuracy(top1 / max(1, images_seen), top5 / max(1, images_seen), images_seen)
