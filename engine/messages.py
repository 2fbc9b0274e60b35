"""What a run says: sentences and lines, for people."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mentorch.engine.config import RunConfig
from mentorch.engine.data.datasets import Datasets, bad_files
from mentorch.engine.data.quarantine import Quarantine
from mentorch.engine.spade import Spade


def train_line(step: int, spade: Spade, metrics: dict[str, float]) -> str:
    """A line of metrics."""
    known = ""
    if "weight_wrong" in metrics and "weight_right" in metrics:
        right, wrong = metrics["weight_right"], metrics["weight_wrong"]
        known = f"  weight of right labels {right:.2f}, wrong {wrong:.2f}"
    unusable = metrics["unusable"]
    missing = f"  unusable {unusable:.1%}" if unusable else ""
    if metrics["skipped"]:
        missing += f"  skipped {metrics['skipped']:.0f} steps"
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


def introduction(config: RunConfig, spade: Spade, data: Datasets) -> Iterator[str]:
    """What is trained, under which curriculum, on what."""
    count = sum(p.numel() for p in spade.student.parameters())
    world = spade.world
    yield (
        f"{config.student.name} ({count / 1e6:.1f} M parameters, {len(data.classes)} classes, "
        f"{spade.dtype}) under curriculum {config.curriculum.name!r}, on {world.world_size} × "
        f"{world.device.type}"
    )
    yield (
        f"{len(data.train.sample_ids):,} training samples, {spade.steps_per_epoch:,} steps an "
        f"epoch, {spade.total_steps:,} in all; {spade.step_count:,} taken"
    )


def skipped_line(skipped: float, named: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Steps that were left out, and the samples behind them."""
    if not named:
        return (
            f"gradients were not finite: {skipped:.0f} steps skipped on all ranks, before the run "
            "was interrupted; their samples are not known"
        )
    shown = ", ".join(f"{s['path']} (rank {s['rank']}, loss {s['loss']:.4g})" for s in named[:3])
    more = f" and {len(named) - 3:,} more" if len(named) > 3 else ""
    return (
        f"gradients were not finite: {skipped:.0f} steps skipped on all ranks, because of {shown}"
        f"{more}; {path} names them"
    )


def too_many_skipped(skipped: float, spade: Spade, path: Path, go_on: str) -> str:
    """Why a run ends whose gradients are not finite, and what may help."""
    return (
        f"the gradients of {skipped:.0f} steps in short order were not finite (train.max_skipped "
        f"is {spade.config.train.max_skipped}), the last before step {spade.step_count + 1:,}. "
        f"{path} names their samples. The weights are as they were before. A lower optim.lr, "
        "optim.clip_norm or train.precision bf16 may help; go on from the last checkpoint with\n"
        f"    {go_on}"
    )


def images_gone(unusable: float, allowed: float, quarantine: Quarantine, go_on: str) -> str:
    """Why a run ends whose images are gone."""
    reasons = Counter(u.reason for u in quarantine.found.values())
    return (
        f"{unusable:.0%} of the images since the last line of metrics could not be used "
        f"(data.max_unusable is {allowed:.0%}), most of them because of: "
        f"{reasons.most_common(1)[0][0]}. {quarantine.path} names them. Mend that and go on from "
        f"the last checkpoint with\n    {go_on}"
    )
