"""How long a step and an evaluation take here, from a few real ones on the run's own images."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from mentorch.engine.config import RunConfig
from mentorch.engine.data.datasets import Datasets, Samples
from mentorch.engine.data.pipelines import Batch, Loader
from mentorch.engine.distributed import World
from mentorch.engine.evaluate import evaluate
from mentorch.engine.spade import Spade
from mentorch.engine.step_engine import WARM_STEPS

_BUDGET_S = 60.0  # of timing steps of one size
_STEPS, _LEAST_S = 3, 3.0  # timed at least so many, for at least so long
_EVALUATED = 4  # batches


@dataclass(frozen=True)
class Pace:
    """What was measured, by one rank alone.

    Attributes:
        images: of the steps that were timed.
        steps: how many there were.
        step_s: seconds a step of the rank's whole share of the batch.
        evaluation_s: of each validation set, seconds before its first batch, and seconds an image.
    """

    images: int
    steps: int
    step_s: float
    evaluation_s: dict[str, tuple[float, float]]


def measure_pace(
    config: RunConfig, spade: Spade, data: Datasets, world: World, share: int, room: int
) -> Pace:
    """Takes some training steps; the student is not to be used afterwards.

    On a CPU a few images go first, then more and more. Where a rank's whole share of the batch
    would take too long, the line through the last two sizes leads to it: what a step takes however
    few its images are must not be multiplied.

    Args:
        config: the run.
        spade: its student under its curriculum, on one rank.
        data: its data sets.
        world: of one rank.
        share: a rank's share of the batch, images.
        room: the largest share that memory allows, images.
    """
    goal, few = min(share, room), 2 * config.train.accumulate
    images = min(goal, few) if world.device.type == "cpu" else goal
    before = 0, 0.0
    while True:
        most = 1 if images < goal else 1000
        steps, step_s = _time_steps(config, spade, data.train, world, images, most)
        larger = min(goal, 4 * images)
        # A step of four times the images takes at most four times as long.
        if images == goal or step_s * larger / images * (_STEPS + 1) > _BUDGET_S:
            break
        before, images = (images, step_s), larger
    more_s = (step_s - before[1]) / (images - before[0])  # for an image more
    step_s += max(0.0, more_s) * (share - images)
    evaluation_s = {
        name: _time_evaluation(config, spade, name, samples, world, images)
        for name, samples in data.evaluate.items()
    }
    return Pace(images, steps, step_s, evaluation_s)


def _time_steps(
    config: RunConfig, spade: Spade, samples: Samples, world: World, images: int, most: int
) -> tuple[int, float]:
    """Steps timed after the first ones, and seconds a step."""
    untimed = _untimed(config, world)
    loader = Loader(
        samples.index, samples.sample_ids, batch_size=images, config=config.data, train=True,
        seed=config.seed, world=world, parts=config.train.accumulate,
    )  # fmt: skip
    begun, taken = 0.0, -untimed
    with closing(loader):
        for _ in spade.train(loader.batches(epochs=most + untimed)):
            taken += 1
            if taken == 0:
                begun = _now(world)
            enough = taken >= most or time.perf_counter() - begun >= _LEAST_S
            if taken >= min(_STEPS, most) and enough:
                break
        return taken, (_now(world) - begun) / taken


def _untimed(config: RunConfig, world: World) -> int:
    """Steps that are not like those after them: kernels are compiled, then a step is captured."""
    captures = world.device.type == "cuda" and config.train.engine.endswith("graph")
    return WARM_STEPS + 1 if captures else 1


def _time_evaluation(
    config: RunConfig, spade: Spade, name: str, samples: Samples, world: World, images: int
) -> tuple[float, float]:
    """Seconds before the first batch, and seconds an image of some batches."""
    size = max(1, min(images, len(samples.sample_ids) // _EVALUATED))
    loader = Loader(
        samples.index, samples.sample_ids, batch_size=size, config=config.data, train=False,
        world=world, name=name,
    )  # fmt: skip
    came: list[float] = []
    labels = torch.from_numpy(samples.labels_N).to(world.device)
    with closing(loader):
        if world.device.type == "cuda":  # kernels for batches of this size are looked for first
            first = islice(loader.batches(), 1)
            evaluate(spade.trained, first, labels, spade.normalise, spade.dtype, world)
        begun = time.perf_counter()
        batches = _noting(islice(loader.batches(), _EVALUATED), came)
        evaluate(spade.trained, batches, labels, spade.normalise, spade.dtype, world)
        took = _now(world) - came[0]
    return came[0] - begun, took / (size * len(came))


def _noting(batches: Iterator[Batch], came: list[float]) -> Iterator[Batch]:
    for batch in batches:
        came.append(time.perf_counter())
        yield batch


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
