r"""Inception-ResNet-v2 on ImageNet, 40% of whose labels are drawn anew (Sec. 5.2, Table 4).

    torchrun --nproc-per-node 8 recipes/imagenet_irv2.py --imagenet /data/imagenet

The noise is on the training labels only, in memory: neither the images nor an index change. The
paper's baselines are `--curriculum.name uniform --curriculum.burn-in 0` (FullModel) and, with it,
`--student.drop-rate 0.8` (Forgetting).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mentorch.engine.cli import parse, run_cleanly
from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from mentorch.engine.job import run


@dataclass(frozen=True, kw_only=True)
class ImageNet(RunConfig):
    """Options of this recipe; those below `data`, `optim`, … are every run's."""

    imagenet: Path | None = None
    """Root of ILSVRC-2012 (train/<wnid>/ and val/ in any of its layouts), or its index."""


RECIPE = ImageNet(
    name="imagenet_irv2",
    data=DataConfig(noise="symmetric:0.4"),
    # p: the paper cross-validates it; 0.60 of the labels are right, and ℓ_pt should be their loss.
    curriculum=CurriculumConfig(loss_percentile=0.6),
    optim=OptimConfig(lr=0.1, weight_decay=4e-5, average_decay=0.999, warmup_epochs=2),
    train=TrainConfig(epochs=90, batch_size=256, eval_batch_size=512),
)


def with_data(config: ImageNet) -> ImageNet:
    """The recipe's option, spelt out as every run's data options."""
    if config.imagenet is None:
        raise ValueError("give --imagenet the folder of ILSVRC-2012, or its index")
    ours = {"train": config.imagenet, "evaluate": {"imagenet": config.imagenet}}
    return replace(config, data=replace(config.data, **ours))


def main() -> int:
    """Trains and evaluates."""
    return run(with_data(parse(ImageNet, RECIPE)))


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
