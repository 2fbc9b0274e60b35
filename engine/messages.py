"""What a run says: sentences and lines, for people."""

import os
import sys
from collections.abc import Iterator

from mentorch.engine.data.datasets import Datasets, bad_files
from mentorch.engine.distributed import World
from mentorch.engine.spade import Spade


def train_line(step: int, spade: Spade, metrics: dict[str, float]) -> str:
    """A line of metrics."""
    known = ""
    if "weight_wrong" in metrics and "weight_right" in metrics:
        right, wrong = metrics["weight_right"], metrics["weight_wrong"]
        known = f"  weight of right labels {right:.2f}, wrong {wrong:.2f}"
    unusable = metrics["unusable"]
    missing = f"  unusable {unusable:.1%}" if unusable else ""
    return (
        f"step {step:,}/{spade.total_steps:,}  epoch {(step - 1) // spade.steps_per_epoch + 1}  "
        f"loss {metrics['loss']:.3f}  weighted {metrics['weighted_loss']:.3f}  "
        f"used {metrics['data_utilization']:.0%}  ℓ_pt {metrics['loss_moving_avg']:.3f}"
        f"{known}{missing}  lr {metrics['lr']:.4f}  {metrics['images_per_s']:.1f} images/s  "
        f"{metrics['eta_s'] / 60:.1f} min left"
    )


def label_notes(data: Datasets) -> Iterator[str]:
    """What is known about the training labels and files."""
    index, ids = data.train.index, data.train.sample_ids
    clean = index.clean_labels()[ids]
    known = clean >= 0
    if known.any():
        wrong = (clean != index.labels()[ids])[known].mean()
        yield f"{known.sum():,} of them have a known clean label; {wrong:.1%} of those are wrong"
    bad = bad_files(index)
    if bad:
        yield f"{len(bad):,} files of {index.root} are left out:"
        yield from (f"    {path}: {status}" for path, status in bad[:10])


def launcher(world: World) -> str:
    """How this process was started, as far as it matters for starting it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {sys.argv[0]}"
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return f"torchrun --nproc-per-node {ranks} {sys.argv[0]}"
