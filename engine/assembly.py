"""From a configuration to what trains: student, criterion and SPADE on every rank."""

from collections.abc import Sequence
from datetime import timedelta

import torch

from mentorch.engine.config import RunConfig, TrainConfig
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.datasets import Datasets
from mentorch.engine.data.pipelines import Normalise
from mentorch.engine.distributed import World
from mentorch.engine.spade import Observer, Spade
from mentorch.engine.student import create_student
from mentorch.engine.watchdog import Progress


def assemble(
    config: RunConfig,
    data: Datasets,
    steps_per_epoch: int,
    world: World,
    observers: Sequence[Observer],
    progress: Progress,
) -> Spade:
    """A run's student under its curriculum, ready to train; the same weights on every rank.

    Args:
        config: the run.
        data: its data sets.
        steps_per_epoch: of the loader.
        world: the ranks.
        observers: of every step.
        progress: told of what may take long.
    """
    # Every batch has the same shape: cuDNN may try its algorithms out, once for each convolution.
    torch.backends.cudnn.benchmark = world.device.type == "cuda"
    samples, classes = data.train, len(data.classes)
    labels = torch.from_numpy(samples.labels_N).to(world.device)
    clean = torch.from_numpy(samples.index.clean_labels()).to(world.device)
    torch.manual_seed(config.seed)  # line 1 of Algorithm 1: the same w⁰ on every rank
    student = create_student(config.student, classes, world.device)
    criterion = create_criterion(
        config.curriculum,
        labels_N=labels,
        clean_labels_N=clean,
        sample_ids=torch.from_numpy(samples.sample_ids).to(world.device),
        num_classes=classes,
        total_steps=steps_per_epoch * config.train.epochs * config.train.accumulate,
        seed=config.seed,
    )
    normalise = Normalise(config.data.mean, config.data.std).to(world.device)
    return Spade(
        config, student, criterion, normalise, labels, clean, steps_per_epoch, world, observers,
        progress,
    )  # fmt: skip


def per_rank(batch_size: int, world: World, name: str, parts: int = 1) -> int:
    """A rank's share of a global batch.

    Args:
        batch_size: over all ranks.
        world: the ranks.
        name: of the option that it comes from.
        parts: that each rank takes its share in.

    Raises:
        ValueError: it cannot be shared out evenly.
    """
    if batch_size % (world.world_size * parts):
        among = f"{world.world_size} ranks" + (f" in {parts} parts each" if parts > 1 else "")
        raise ValueError(f"{name} is {batch_size}, which {among} cannot share out evenly")
    return batch_size // world.world_size


def collective_timeout(train: TrainConfig) -> timedelta | None:
    """A minute longer than the watchdog waits, which can say more; None: no limit."""
    limits = train.first_step_timeout, train.step_timeout
    return timedelta(seconds=max(limits) + 60) if all(limits) else None
