"""One experiment: a method on an image set with known label noise, under a fixed recipe.

The training set is a fixed random part of the set's training images; others (`Task.validation`) are
the validation set, on which choices are made. Test images are for the final table only.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mentorch.engine.comparison.weight_log import WeightLog
from mentorch.engine.config import CurriculumConfig, RunConfig
from mentorch.engine.criteria import choose_trusted, create_criterion
from mentorch.engine.data.images import ImageSet, ImageSetName, cifar_n_labels, load_images
from mentorch.engine.data.memory import Augment, MemoryLoader, Standardise, channel_statistics
from mentorch.engine.data.noise import Noise
from mentorch.engine.data.noise_kinds import NoiseKind, parse_noise
from mentorch.engine.data.order import shuffled
from mentorch.engine.data.pipelines import Normalise
from mentorch.engine.data_driven import DataDriven
from mentorch.engine.distributed import World
from mentorch.engine.evaluate import evaluate
from mentorch.engine.spade import Spade
from mentorch.engine.student import create_student

_SPLIT_SEED = 2018
_MAPPINGS = {  # of asymmetric noise
    "digits": "mnist",
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Images and their noise."""

    dataset: ImageSetName = "fashion_mnist"
    """Image set."""
    root: Path | None = None
    """Folder of its files; None: where its package puts them."""
    noise: NoiseKind = "symmetric"
    """Kind of label noise."""
    rate: float = 0.4
    """Its probability p."""
    human_labels: str | None = None
    """CIFAR-N's FILE:NAME: labels that people gave, instead of the noise above."""
    train_samples: int = 0
    """Training images; 0: all but the validation set."""
    validation: float = 1 / 12
    """Share of the training images that is never trained on."""
    skip: int = 0
    """Images left out before those, so that two tasks can share none."""
    classes: tuple[int, ...] = ()
    """Only these classes, renumbered; all when empty."""
    evaluate_on: Literal["test", "validation"] = "test"
    """What accuracies are over."""

    def with_noise(self, text: str) -> "Task":
        """The same images with the noise of a text such as ``symmetric:0.4``.

        Raises:
            ValueError: it is not KIND:RATE.
        """
        kind, rate = parse_noise(text)
        return replace(self, noise=kind, rate=rate)  # type: ignore[arg-type]  # Noise checks

    def expected_right(self, seed: int = 0) -> float:
        """The share of labels that the noise is expected to leave right, all classes alike."""
        num_classes = len(self.classes) or (100 if self.dataset == "cifar100" else 10)
        return 1 - self.make_noise(seed).expected_share(np.arange(num_classes), num_classes)

    def make_noise(self, seed: int) -> Noise:
        """The noise, with the set's usual confusable classes where it is asymmetric."""
        mapping = _MAPPINGS[self.dataset] if self.noise == "asymmetric" else None
        return Noise(self.noise, self.rate, seed, mapping)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What differs between the rows of a comparison."""

    curriculum: CurriculumConfig = field(
        default_factory=lambda: CurriculumConfig(name="uniform", burn_in=0.0)
    )
    drop_rate: float = 0.0
    """Dropout of the student."""
    corrected: float = 0.0
    """This share of the samples get their clean labels: what D' is worth without a MentorNet."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A method on a task with a seed; `key` names its results."""

    task: Task
    name: str
    method: Method
    config: RunConfig
    """The recipe, identical for all methods; its seed is also that of the noise."""
    mirror: bool = False
    """Mirror every other training image."""
    pad: int = 0
    """Random crops of images padded by this many pixels."""
    standardise: bool = False
    """Give every image mean 0 and deviation 1, instead of the training set as a whole."""

    @property
    def key(self) -> str:
        """File name of the results, without suffix."""
        task = self.task
        noise = f"{task.noise}-{task.rate:g}"
        if task.human_labels:
            noise = f"human-{task.human_labels.rpartition(':')[2]}"
        name = self.name.replace(" ", "_").replace("/", "_")
        return "-".join((task.dataset, noise, name, f"s{self.config.seed}"))


class Prepared(NamedTuple):
    """A task's tensors on the device."""

    images: Tensor  # [N, H, W, C] uint8
    given: Tensor  # [N] int64
    clean: Tensor  # [N] int64
    held_out: Tensor  # [M, H, W, C] uint8
    held_out_labels: Tensor  # [M] int64
    num_classes: int


def _renumbered(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Labels among the chosen classes; −1 for the others."""
    if not classes:
        return labels
    number = torch.full((int(labels.max()) + 1,), -1)
    number[list(classes)] = torch.arange(len(classes))
    return number[labels]


def prepare(task: Task, seed: int, device: torch.device) -> Prepared:
    """Reads a task's images and injects its noise.

    Args:
        task: which.
        seed: of the noise.
        device: where the tensors shall lie.

    Raises:
        ValueError: more training images than there are.
    """
    found: ImageSet = load_images(task.dataset, task.root)
    labels = _renumbered(found.labels, task.classes)
    order = torch.from_numpy(shuffled(np.arange(len(labels)), _SPLIT_SEED, 0))
    # Split before classes are chosen: no task trains on what another is judged by.
    pool, validation = order.tensor_split([len(order) - round(task.validation * len(order))])
    pool, validation = (rows[labels[rows] >= 0] for rows in (pool, validation))
    end = task.skip + task.train_samples if task.train_samples else len(pool)
    if not task.skip < end <= len(pool):
        raise ValueError(
            f"{task.dataset} has {len(pool):,} training images of these classes besides the "
            f"validation set; rows {task.skip:,} to {end:,} were asked for"
        )
    rows = pool[task.skip : end]
    if task.evaluate_on == "validation":
        held_out, held_out_labels = found.images[validation], labels[validation]
    else:
        test_labels = _renumbered(found.test_labels, task.classes)
        chosen = test_labels >= 0
        held_out, held_out_labels = found.test_images[chosen], test_labels[chosen]
    clean = labels[rows]
    num_classes = len(task.classes) or found.num_classes
    if task.human_labels:
        path, _, which = task.human_labels.rpartition(":")
        given = cifar_n_labels(Path(path), which, found.labels)[rows]
    else:
        given = torch.from_numpy(
            task.make_noise(seed).apply(
                clean.numpy(), num_classes, rows.numpy(), found.images[rows].numpy()
            )
        )
    return Prepared(
        found.images[rows].to(device), given.to(device), clean.to(device), held_out.to(device),
        held_out_labels.to(device), num_classes,
    )  # fmt: skip


def run_experiment(
    experiment: Experiment, mentors_out: Path | None = None, progress: bool = False
) -> dict[str, Any]:
    """Trains and evaluates after every epoch.

    Args:
        experiment: what.
        mentors_out: folder for the MentorNets that the run learns.
        progress: print a line an epoch.

    Returns:
        JSON values: the experiment, the noise, curves by epoch, last and best accuracy.
    """
    config, start = experiment.config, time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(device=device)
    data = prepare(experiment.task, config.seed, device)
    data = _corrected(data, experiment)
    spade, loader, log = trainer(experiment, data, world)
    judge = MemoryLoader(
        data.held_out, torch.arange(len(data.held_out)), batch_size=500, train=False, world=world
    )
    curves: dict[str, list[float]] = {}
    for step in spade.train(loader.batches(0, config.train.epochs)):
        if step % spade.steps_per_epoch:
            continue
        metrics = spade.metrics()
        accuracy = evaluate(
            spade.trained, judge.batches(), data.held_out_labels, spade.normalise, spade.dtype,
            world,
        )  # fmt: skip
        found = {"top1": accuracy.top1, **metrics, **log.snapshot(step // spade.steps_per_epoch)}
        for name, value in found.items():
            curves.setdefault(name, []).append(value)
        if progress:
            print(_line(step // spade.steps_per_epoch, found), flush=True)
    if mentors_out is not None and isinstance(spade.criterion, DataDriven):
        for step, mentor in spade.criterion.learned.items():
            pct = round(100 * step / spade.total_steps)
            mentor.save(mentors_out / f"{experiment.key}.at-{pct}.safetensors")
    top1 = curves["top1"]
    return {
        "experiment": {"key": experiment.key, **asdict(experiment)},
        "noise_seed": config.seed,
        "wrong_share": float((data.given != data.clean).double().mean()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": time.monotonic() - start,
        "curves": curves,
        "weight_histograms": log.histograms,
        "last": top1[-1],
        "best": max(top1),
        "best_epoch": top1.index(max(top1)) + 1,
    }


def _corrected(data: Prepared, experiment: Experiment) -> Prepared:
    if not experiment.method.corrected:
        return data
    ids = torch.arange(len(data.given), device=data.given.device)
    trusted = choose_trusted(
        data.given, data.clean, ids, experiment.method.corrected, experiment.config.seed
    )
    given = data.given.clone()
    given[trusted.sample_ids] = data.clean[trusted.sample_ids]
    return data._replace(given=given)


def trainer(
    experiment: Experiment, data: Prepared, world: World
) -> tuple[Spade, MemoryLoader, WeightLog]:
    """A student ready to train, its training images, and the log that observes it."""
    config, method = experiment.config, experiment.method
    student_config = replace(config.student, drop_rate=method.drop_rate)
    config = replace(config, curriculum=method.curriculum, student=student_config)
    ids = torch.arange(len(data.given))
    loader = MemoryLoader(
        data.images, ids, batch_size=config.train.batch_size, train=True, seed=config.seed,
        augment=Augment(pad=experiment.pad, mirror=experiment.mirror), world=world,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    height, channels = data.images.shape[1], data.images.shape[3]
    student = create_student(
        config.student, data.num_classes, world.device, in_chans=channels, img_size=height
    )
    criterion = create_criterion(
        config.curriculum,
        labels_N=data.given,
        clean_labels_N=data.clean,
        sample_ids=ids,
        num_classes=data.num_classes,
        total_steps=loader.steps_per_epoch * config.train.epochs,
        seed=config.seed,
    )
    log = WeightLog(data.given == data.clean)
    normalise = _normalise(experiment, data).to(world.device)
    spade = Spade(
        config, student, criterion, normalise, data.given, data.clean, loader.steps_per_epoch,
        world, observers=[log],
    )  # fmt: skip
    return spade, loader, log


def _normalise(experiment: Experiment, data: Prepared) -> nn.Module:
    return Standardise() if experiment.standardise else Normalise(*channel_statistics(data.images))


def _line(epoch: int, found: dict[str, float]) -> str:
    names = ("top1", "loss", "weighted_loss", "weight_right", "weight_wrong", "auroc_weight")
    values = (f"{name} {found[name]:.4f}" for name in names if name in found)
    return f"epoch {epoch}  {'  '.join(values)}"
