"""Every sample is judged by a student that was not trained on it, but on the other folds.

All students are trained by SPADE under one curriculum. After every epoch each judges its fold, and
a sample's probabilities are the mean over the epochs: the early ones do not know wrong labels yet,
the late ones know the right ones better, and the mean of both finds wrong labels better than the
last alone (docs/finding_issues.md). When the burn-in ends, a student's own fold says how many
labels are wrong (`estimate_noise`), and the percentile of its curriculum is set to the rest.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from mentorch.engine.config import RunConfig
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.memory import Augment, MemoryLoader
from mentorch.engine.distributed import World
from mentorch.engine.issues.noise_rate import estimate_noise, right_by_label
from mentorch.engine.issues.recipe import (
    PERCENTILES,
    MakeStudent,
    Recipe,
    check_student,
    config_of,
    new_student,
    normalisation,
)
from mentorch.engine.ledger import Columns, Ledger
from mentorch.engine.reweight import Reweight
from mentorch.engine.spade import Spade
from mentorch.engine.student import forward

_JUDGED_AT_ONCE = 512  # samples
_FEW_STEPS = 20  # in which the loss scale of fp16 may still be too high
_UNEQUAL = 3  # times the samples of the smallest class: each class gets a percentile of its own


@dataclass(eq=False)
class Judgement:
    """What students say of samples that they were not trained on.

    Attributes:
        probabilities: [N, C] float32, mean over the epochs.
        last: [N, C] float32, of the last epoch alone.
        forgetting: [N] how often the label was predicted after an epoch and not after the next.
        loss_var: [N] float32, variance of the loss over the epochs, nats².
        weight: [N] float32, last weight in training, mean over the other folds' students.
        weight_mean: [N] float32, the mean weight of all visits, likewise.
        weight_var: [N] float32, its variance, likewise.
        epochs: that were judged.
        percentiles: p of each student's curriculum after the burn-in.
        agreement: share of samples whose given label is the prediction, by epoch, fold after fold.
    """

    probabilities: NDArray[np.float32]
    last: NDArray[np.float32]
    forgetting: NDArray[np.int64]
    loss_var: NDArray[np.float32]
    weight: NDArray[np.float32]
    weight_mean: NDArray[np.float32]
    weight_var: NDArray[np.float32]
    epochs: int
    percentiles: list[float] = field(default_factory=list)
    agreement: list[list[float]] = field(default_factory=list)


def check_classes(labels: NDArray[np.int64], class_names: Sequence[str], folds: int) -> None:
    """Judging out of sample needs two classes, two samples of each, and one for every fold.

    Raises:
        ValueError: there are fewer.
    """
    counts = np.bincount(labels)
    if (counts > 0).sum() < 2:
        raise ValueError("there are samples of one class only: no label can be wrong")
    single = [class_names[int(c)] for c in np.flatnonzero(counts == 1)]
    if single:
        raise ValueError(
            f"{len(single)} classes have a single sample, such as {', '.join(single[:5])}: no "
            "student could know them when it judges that sample. Leave them out, or give more"
        )
    if counts.max() < folds:
        raise ValueError(
            f"{len(labels):,} samples, at most {counts.max()} of a class, are too few for {folds} "
            "folds: give fewer folds or more samples"
        )


def fold_ids(labels: NDArray[np.int64], folds: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Rows to train on and rows to judge, fold by fold; classes in equal shares."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer samples than folds
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
        yield from splits.split(np.zeros(len(labels)), labels)


def judge(
    samples: Tensor,
    labels: Tensor,
    num_classes: int,
    recipe: Recipe,
    device: torch.device,
    on_step: Callable[[str], None] = lambda what: None,
    make_student: MakeStudent | None = None,
) -> Judgement:
    """Trains a student a fold and has it judge that fold.

    Args:
        samples: [N, H, W, channels] uint8 images, or [N, D] float32 features; on ``device`` if it
            is to be fast.
        labels: [N] int64 in [0, C), the given ones.
        num_classes: C.
        recipe: how, with a number of epochs.
        device: where students are trained.
        on_step: called after every training step, with what is being done.
        make_student: makes them, in place of ``recipe.student``.

    Raises:
        ValueError: a student that cannot judge such samples, or does not train.
    """
    make = make_student or partial(new_student, recipe, samples, device)
    given = labels.cpu().numpy()
    found = _nothing(len(labels), num_classes, recipe.epochs)
    times = np.zeros(len(labels), np.float32)
    normalise = normalisation(samples).to(device)
    students = weakref.WeakSet[nn.Module]()
    for number, (train, held_out) in enumerate(fold_ids(given, recipe.folds, recipe.seed), 1):
        about = f"fold {number} of {recipe.folds}"
        config = config_of(recipe, len(train))
        torch.manual_seed(recipe.seed)
        student = make(num_classes).to(device)
        if student in students:
            raise ValueError(
                "student returned the same module twice; each fold needs a fresh one, that was not "
                "trained on what it judges"
            )
        students.add(student)
        check_student(student, normalise, samples[:2].to(device), num_classes)
        fold = _Fold(
            samples, labels, config, recipe, num_classes, student, normalise, train, held_out
        )
        fold.train(found, partial(on_step, about))
        known = fold.ledger.columns()
        visited = np.flatnonzero(known["visits"])
        for name in ("weight", "weight_mean", "weight_var"):
            getattr(found, name)[visited] += _finite(known, name)[visited]
        times[visited] += 1
    for column in (found.weight, found.weight_mean, found.weight_var):
        column /= np.maximum(times, 1)
    return found


def _finite(columns: Columns, name: str) -> NDArray[np.float32]:
    return np.nan_to_num(columns[name].astype(np.float32))


def _nothing(n: int, classes: int, epochs: int) -> Judgement:
    return Judgement(
        probabilities=np.zeros((n, classes), np.float32),
        last=np.zeros((n, classes), np.float32),
        forgetting=np.zeros(n, np.int64),
        loss_var=np.zeros(n, np.float32),
        weight=np.zeros(n, np.float32),
        weight_mean=np.zeros(n, np.float32),
        weight_var=np.zeros(n, np.float32),
        epochs=epochs,
    )


class _Fold:
    """A student in training on all folds but one."""

    def __init__(
        self,
        samples: Tensor,
        labels: Tensor,
        config: RunConfig,
        recipe: Recipe,
        num_classes: int,
        student: nn.Module,
        normalise: nn.Module,
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
    ) -> None:
        self.samples, self.labels, self.recipe, self.held_out = samples, labels, recipe, held_out
        self.num_classes = num_classes
        world = World(device=labels.device)
        self.loader = MemoryLoader(
            samples, train, batch_size=config.train.batch_size, train=True, seed=recipe.seed,
            augment=Augment(recipe.pad, recipe.mirror), world=world,
        )  # fmt: skip
        unknown = torch.full_like(labels, -1)
        criterion = create_criterion(
            config.curriculum,
            labels_N=labels,
            clean_labels_N=unknown,
            sample_ids=torch.from_numpy(train).to(labels.device),
            num_classes=num_classes,
            total_steps=self.loader.steps_per_epoch * recipe.epochs,
            seed=recipe.seed,
        )
        self.ledger = Ledger(len(labels), world)
        self.spade = Spade(
            config, student, criterion, normalise, labels, unknown, self.loader.steps_per_epoch,
            world, observers=[self.ledger],
        )  # fmt: skip

    def train(self, found: Judgement, on_step: Callable[[], None]) -> None:
        """Trains, and writes what the student says of its fold into ``found``."""
        recipe, rows = self.recipe, self.held_out
        given = self.labels[torch.from_numpy(rows)].cpu().numpy()
        losses = np.zeros((2, len(rows)))  # sum and sum of squares
        was_right = np.zeros(len(rows), bool)
        agreement, skipped = [], 0.0
        for step in self.spade.train(self.loader.batches(0, recipe.epochs)):
            on_step()
            epoch, rest = divmod(step, self.loader.steps_per_epoch)
            if rest:
                continue
            skipped += self.spade.metrics()["skipped"]
            self.spade.guard.forget()
            if skipped > step / 2 and (step >= _FEW_STEPS or epoch == recipe.epochs):
                raise ValueError(
                    f"a student does not train: {skipped:.0f} of its first {step} steps had "
                    f"gradients that are not finite. Give a lower lr than {recipe.lr:g}, or "
                    "precision fp32"
                )
            now = self.predict()
            found.probabilities[rows] += now
            loss = -np.log(np.maximum(now[np.arange(len(rows)), given], 1e-30))
            losses += np.stack([loss, loss**2])
            right = now.argmax(1) == given
            found.forgetting[rows] += was_right & ~right
            was_right = right
            agreement.append(float(right.mean()))
            if epoch == max(1, int(recipe.burn_in * recipe.epochs)):
                self._set_percentile(found, found.probabilities[rows] / epoch, given)
        found.last[rows] = now
        found.probabilities[rows] /= recipe.epochs
        mean, square = losses / recipe.epochs
        found.loss_var[rows] = np.maximum(square - mean**2, 0)
        found.agreement.append(agreement)

    def _set_percentile(
        self, found: Judgement, probabilities: NDArray[np.floating], given: NDArray[np.int64]
    ) -> None:
        """At the end of the burn-in: ℓ_pt keeps the share of labels that is right."""
        criterion = self.spade.criterion
        if not isinstance(criterion, Reweight) or self.recipe.curriculum == "uniform":
            return  # p decides nothing
        if self.recipe.noise_rate is None:
            rate = estimate_noise(probabilities, given).rate
            # Steps run eagerly here; one captured in a graph would go on with the old number. Two
            # digits, no less than is known: on a GPU every other number is another kernel.
            criterion.loss_percentile = round(float(np.clip(1 - rate, *PERCENTILES)), 2)
        found.percentiles.append(criterion.loss_percentile)
        if self.recipe.percentile_of == "class":
            criterion.set_class_percentiles(self._by_class(criterion.loss_percentile))

    def _by_class(self, percentile: float) -> Tensor:
        """p of every class, [C]: the same where they are about equally large."""
        labels = self.labels.cpu().numpy()
        counts = np.bincount(labels, minlength=self.num_classes)
        if counts.max() <= _UNEQUAL * counts[counts > 0].min():
            return torch.full((self.num_classes,), percentile, dtype=torch.float64)
        right = right_by_label(1 - percentile, labels, self.num_classes)
        return torch.from_numpy(right).clamp(*PERCENTILES)

    @torch.no_grad()
    def predict(self) -> NDArray[np.float32]:
        """The student's probabilities of its fold, [M, C]."""
        spade = self.spade
        student = spade.trained
        was_training = student.training
        student.eval()
        out = []
        for rows in torch.from_numpy(self.held_out).split(_JUDGED_AT_ONCE):
            inputs = self.samples[rows.to(self.samples.device)].to(spade.world.device)
            logits = forward(student, spade.normalise(inputs), spade.dtype)
            out.append(logits.float().softmax(1).cpu())
        student.train(was_training)
        return torch.cat(out).numpy()
