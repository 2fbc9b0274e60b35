"""How the students that judge labels are made and trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mentorch.engine.config import (
    CurriculumConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.data.memory import channel_statistics
from mentorch.engine.data.pipelines import Normalise
from mentorch.engine.student import create_student, read_weights, require_model

PERCENTILES = 0.05, 0.98
"""What an estimate may set: a curriculum of nothing learns nothing."""
_UNITS = 256  # of the hidden layer over features
_EPOCHS, _STEPS = 16, 500  # at least, where the caller does not say

MakeStudent = Callable[[int], nn.Module]
"""From the number of classes to a student with fresh weights."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the students that judge labels are trained."""

    student: str = "auto"
    """A model of timm's or ours; "auto": a small convolutional network for images, one hidden layer
    for features."""
    weights: Path | None = None
    """File of weights that the student starts from (safetensors, or a state dict)."""
    folds: int = 5
    """Parts of the data; a student is trained for each, on all others."""
    epochs: int = 0
    """Passes of each student over its samples; 0: 16, or more where those would be fewer than 500
    steps."""
    batch_size: int = 128
    """Samples a step; fewer where a student has fewer."""
    lr: float = 0.05
    """First learning rate; it falls to 0 along a cosine."""
    weight_decay: float = 1e-4
    """Of the students' weights."""
    pad: int = 0
    """Training images are shifted at random by up to so many pixels."""
    mirror: bool = False
    """Training images are mirrored at random."""
    curriculum: str = "self_paced"
    """Curriculum that the students are trained under; "uniform": none."""
    noise_rate: float | None = None
    """Share of labels that is wrong; None: estimated when the burn-in ends."""
    percentile_of: Literal["batch", "class"] = "class"
    """The curriculum compares a loss with those of its class, or of its batch. By batch a class
    that is behind for a while may be dropped as a whole, and is then never learnt."""
    burn_in: float = 0.2
    """Share of training before the curriculum sets in."""
    precision: Precision = "auto"
    """Of the students."""
    seed: int = 0
    """Of folds, students and order."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(
                f"folds is {self.folds}; two or more are needed to judge out of sample"
            )
        if self.epochs < 0 or self.batch_size < 2:  # a batch norm cannot do with one
            raise ValueError(
                "epochs must be at least 0 and batch_size 2, got "
                f"{self.epochs} and {self.batch_size}"
            )
        if self.noise_rate is not None and not 0.0 <= self.noise_rate < 1.0:
            raise ValueError(f"noise_rate is a share in [0, 1), got {self.noise_rate}")


def check_recipe(recipe: Recipe) -> None:
    """Refuses what can be seen to be wrong before any sample is read.

    Raises:
        ValueError: no such student or curriculum, or an option out of its range.
        FileNotFoundError: no such file of weights, or of a curriculum.
    """
    config_of(replace(recipe, epochs=recipe.epochs or 1), recipe.batch_size)
    resolve_curriculum(recipe.curriculum)
    if recipe.student != "auto":
        require_model(recipe.student)
    if recipe.weights:
        read_weights(recipe.weights)


def with_epochs(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with a number of epochs.

    Args:
        recipe: perhaps without.
        samples: of all folds together.
    """
    if recipe.epochs:
        return recipe
    epochs = max(_EPOCHS, -(-_STEPS // _steps_per_epoch(recipe, samples)))
    return replace(recipe, epochs=epochs)


def steps_of(recipe: Recipe, samples: int) -> int:
    """About how many training steps all students take together.

    Args:
        recipe: with a number of epochs.
        samples: of all folds together.
    """
    return recipe.folds * recipe.epochs * _steps_per_epoch(recipe, samples)


def _steps_per_epoch(recipe: Recipe, samples: int) -> int:
    trained = samples * (recipe.folds - 1) // recipe.folds
    return max(1, trained // recipe.batch_size)


def config_of(recipe: Recipe, samples: int) -> RunConfig:
    """The engine's options for a student of ``samples`` training samples."""
    known = recipe.noise_rate if recipe.noise_rate is not None else 0.25
    curriculum = CurriculumConfig(
        name=recipe.curriculum,
        loss_percentile=float(np.clip(1 - known, *PERCENTILES)),
        percentile_of=recipe.percentile_of,
        burn_in=0.0 if recipe.curriculum == "uniform" else recipe.burn_in,
    )
    return RunConfig(
        seed=recipe.seed,
        curriculum=curriculum,
        optim=OptimConfig(
            lr=recipe.lr, weight_decay=recipe.weight_decay, warmup_epochs=0, schedule="cosine"
        ),
        train=TrainConfig(
            epochs=recipe.epochs,
            batch_size=min(recipe.batch_size, samples),
            precision=recipe.precision,
        ),
    )


def student_name(recipe: Recipe, samples: Tensor) -> str:
    """Which student judges samples like these; "auto" says it is up to them.

    Raises:
        ValueError: a student of images, or a file of weights, for features.
    """
    if samples.ndim == 2:
        if recipe.student != "auto" or recipe.weights:
            raise ValueError(
                f"{recipe.weights or recipe.student} is for images, and these are features of "
                f"{samples.shape[1]} numbers: leave it out, or give from Python a function that "
                "makes a module for them"
            )
        return f"a hidden layer of {_UNITS}"
    if recipe.student != "auto":
        return recipe.student
    height, width = samples.shape[1:3]
    return "small_cnn" if height == width else "cifar_resnet20"  # which takes any shape


def new_student(
    recipe: Recipe, samples: Tensor, device: torch.device, num_classes: int
) -> nn.Module:
    """A student with fresh weights, or those that the recipe names, for samples like these."""
    name = student_name(recipe, samples)
    if samples.ndim == 2:
        width = samples.shape[1]
        layers = (
            nn.BatchNorm1d(width, affine=False),
            nn.Linear(width, _UNITS),
            nn.ReLU(),
            nn.Linear(_UNITS, num_classes),
        )
        return nn.Sequential(*layers).to(device)
    config = StudentConfig(name=name, drop_rate=0.0, weights=recipe.weights)
    height, _, channels = samples.shape[1:]
    return create_student(config, num_classes, device, in_chans=channels, img_size=height)


def normalisation(samples: Tensor) -> nn.Module:
    """From samples to a student's input, by the statistics of them all."""
    if samples.ndim == 2:
        return nn.Identity()
    means, stds = channel_statistics(samples)
    return Normalise(means, tuple(max(s, 1e-3) for s in stds))  # a channel may be constant


@torch.no_grad()
def check_student(
    student: nn.Module, normalise: nn.Module, two_samples: Tensor, num_classes: int
) -> None:
    """Refuses a student that cannot take samples like these, before it is trained.

    Raises:
        ValueError: what it said, or logits of another shape.
    """
    was_training = student.training
    student.eval()
    try:
        shape = list(student(normalise(two_samples)).shape)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"the student cannot take samples of {list(two_samples.shape[1:])}: {error}. Give "
            "another student, or images of another size"
        ) from error
    student.train(was_training)
    if shape != [2, num_classes]:
        raise ValueError(
            f"the student gives {shape} for two samples, not logits [2, {num_classes}]: make it "
            "for the number of classes that it is asked for"
        )
