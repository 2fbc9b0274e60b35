r"""Inception-ResNet-v2 on WebVision 1.0 under a MentorNet (Sec. 5.2 of the paper).

With no data given it trains on real digits in WebVision's layout, at a size a laptop bears:

    torchrun recipes/webvision_irv2.py

With the data and eight GPUs, the paper's mini protocol (Google images of the first 50 classes):

    torchrun --nproc-per-node 8 recipes/webvision_irv2.py \
        --webvision /data/webvision --imagenet /data/imagenet
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mentorch.engine.cli import parse, run_cleanly
from mentorch.engine.config import DataConfig, OptimConfig, RunConfig, StudentConfig, TrainConfig
from mentorch.engine.data.embedded import embedded_root, write_embedded
from mentorch.engine.job import run


@dataclass(frozen=True, kw_only=True)
class WebVision(RunConfig):
    """Options of this recipe; those below `data`, `optim`, … are every run's."""

    webvision: Path | None = None
    """Root of WebVision 1.0, or its index. None: the embedded digits."""
    imagenet: Path | None = None
    """Root of ImageNet (only val/ is needed), or its index, as the second validation set."""
    protocol: Literal["mini", "entire"] = "mini"
    """mini: Google images with labels below 50; entire: all 2.4 million images."""


FULL = WebVision(
    name="webvision_irv2",
    optim=OptimConfig(lr=0.1, weight_decay=4e-5, average_decay=0.999, warmup_epochs=2),
    train=TrainConfig(epochs=90, batch_size=256, eval_batch_size=512),
)
EMBEDDED = replace(
    FULL,
    name="webvision_irv2_embedded",
    data=DataConfig(image_size=75, resize=80, crop_scale=(0.5, 1.0), mirror=False),
    student=StudentConfig(drop_rate=0.0),
    optim=replace(FULL.optim, lr=0.015, average_decay=0.9, warmup_epochs=0.5),
    train=TrainConfig(epochs=3, batch_size=32, eval_batch_size=64, log_every=10),
)


def with_data(config: WebVision) -> WebVision:
    """The recipe's three options, spelt out as every run's data options."""
    root, imagenet = config.webvision, config.imagenet
    if imagenet and not root:
        raise ValueError("--imagenet is a second validation set of --webvision, which is missing")
    if root is None:
        root = embedded_root()
        imagenet = imagenet or root / "ilsvrc"
        if int(os.environ.get("RANK", "0")) == 0:  # the others wait for it to join them
            write_embedded(root)
            print(
                f"No --webvision given: training on scikit-learn's digits, as WebVision in {root}"
            )
    evaluate = {"webvision": root} | ({"imagenet": imagenet} if imagenet else {})
    mini = {"sources": ("google",), "max_label": 50} if config.protocol == "mini" else {}
    ours = {"train": root, "evaluate": evaluate, "sources": (), "max_label": None} | mini
    for name, value in ours.items():
        if getattr(config.data, name) not in (getattr(DataConfig, name, {}), value, {}):
            option = f"--data.{name.replace('_', '-')}"
            raise ValueError(f"{option} follows from --webvision, --imagenet and --protocol here")
    return replace(config, data=replace(config.data, **ours))


def main() -> int:
    """Trains and evaluates."""
    default = FULL if "--webvision" in " ".join(sys.argv) else EMBEDDED
    return run(with_data(parse(WebVision, default)))


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
