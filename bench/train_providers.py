"""Two training loops with the same work: uint8 images [B, H, W, 3] and labels in, one step of SGD.

`TimmLoop` is what timm's train.py does with `--channels-last --amp --amp-dtype bfloat16 --opt
momentum --sched cosine` (and `--torchcompile`), its images normalised as `PrefetchLoader` does it.
`SpadeLoop` is this package's, as `engine/assembly.py` puts it together. No dropout, no average of
the weights and no warm-up in either, so that their losses can be compared.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Protocol

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from train_subjects import Subject, split

from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.pipelines import Batch, Normalise
from mentorch.engine.distributed import World
from mentorch.engine.ledger import Ledger
from mentorch.engine.spade import Spade
from mentorch.engine.student import create_student

SAMPLES = 100_000  # rows of the made-up index
TOTAL_STEPS = 1_000_000
OPTIM = OptimConfig(lr=0.01, weight_decay=4e-5, warmup_epochs=0)  # no loss may run away at once
PIXELS = DataConfig()


@dataclass(frozen=True)
class Work:
    """What all providers start from.

    Attributes:
        subject: the student and its size.
        images: [B, H, W, 3] uint8.
        sample_ids: [B] int64.
        labels_N: [N] int64.
        weights: w⁰ by name, on the CPU.
        dtype: of the forward pass; float32 is no autocast.
    """

    subject: Subject
    images: Tensor
    sample_ids: Tensor
    labels_N: Tensor
    weights: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.images.device


class Loop(Protocol):
    """A provider at work."""

    model: nn.Module

    def step(self) -> None:
        """Takes one step; does not wait for the device."""

    def loss(self) -> float:
        """Mean cross-entropy of the last step's batch before its update, unweighted, nats."""


def make_work(subject: Subject, dtype: torch.dtype, device: torch.device) -> Work:
    """Made-up images, labels and first weights; the same for the same subject."""
    generator = torch.Generator().manual_seed(0)
    side, batch = subject.size, subject.batch
    images = torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, subject.classes, (SAMPLES,), generator=generator)
    ids = torch.randperm(SAMPLES, generator=generator)[:batch]
    torch.manual_seed(0)
    student = timm.create_model(subject.model, num_classes=subject.classes, drop_rate=0.0)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    return Work(subject, images.to(device), ids.to(device), labels.to(device), weights, dtype)


class TimmLoop:
    def __init__(self, work: Work, engine: str) -> None:
        subject, device = work.subject, work.device
        model = timm.create_model(subject.model, num_classes=subject.classes, drop_rate=0.0)
        model.load_state_dict(work.weights)
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)
        self.run = torch.compile(self.model) if engine == "compile" else self.model
        self.optimizer = create_optimizer_v2(
            self.model,
            opt="momentum",
            lr=OPTIM.lr,
            momentum=OPTIM.momentum,
            weight_decay=OPTIM.weight_decay,
        )
        self.scheduler = CosineLRScheduler(self.optimizer, TOTAL_STEPS, t_in_epochs=False)
        self.mean, self.std = (
            torch.tensor([255 * value for value in values], device=device).view(1, 3, 1, 1)
            for values in (PIXELS.mean, PIXELS.std)
        )
        self.loss_fn = nn.CrossEntropyLoss()
        self.work, self.updates = work, 0
        self.labels = work.labels_N[work.sample_ids]
        self.last = torch.zeros((), device=device)
        self.model.train()

    def step(self) -> None:
        images = self.work.images.permute(0, 3, 1, 2).to(torch.float32)
        images = images.sub_(self.mean).div_(self.std)
        images = images.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        dtype = self.work.dtype
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = self.loss_fn(self.run(images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.scheduler.step_update(self.updates)
        self.last = loss.detach()

    def loss(self) -> float:
        return float(self.last)


class SpadeLoop:
    def __init__(
        self, work: Work, who: str, engine: str, batches: Iterator[Batch] | None = None
    ) -> None:
        config = run_config(work, who, engine)
        world = World(device=work.device)
        self.model = create_student(config.student, work.subject.classes, work.device)
        self.model.load_state_dict(work.weights)
        clean = torch.full_like(work.labels_N, -1)
        criterion = create_criterion(
            config.curriculum,
            labels_N=work.labels_N,
            clean_labels_N=clean,
            sample_ids=torch.arange(SAMPLES, device=work.device),
            num_classes=work.subject.classes,
            total_steps=TOTAL_STEPS,
        )
        self.spade = Spade(
            config,
            self.model,
            criterion,
            Normalise(PIXELS.mean, PIXELS.std).to(work.device),
            work.labels_N,
            clean,
            TOTAL_STEPS,
            world,
            [Ledger(SAMPLES, world)] if config.train.ledger else [],
        )
        self.steps = self.spade.train(batches or repeat(Batch(work.images, work.sample_ids)))

    def step(self) -> None:
        if next(self.steps) % self.spade.config.train.log_every == 0:
            self.spade.metrics()  # as a run does

    def loss(self) -> float:
        return self.spade.metrics()["loss"]


def run_config(work: Work, who: str, engine: str) -> RunConfig:
    """A run's configuration: the recipes', but for what the module's docstring names."""
    precision: Any = {torch.float32: "fp32", torch.bfloat16: "bf16"}[work.dtype]
    fast, plain = who in ("mentorch-fast", "mentorch-fused"), who == "mentorch-plain"
    student = StudentConfig(name=work.subject.model + "_fast" * fast, drop_rate=0.0)
    if who == "mentorch-fused":
        student = replace(student, fused_norms=True)
    return RunConfig(
        data=PIXELS,
        student=student,
        # Without burn-in: in its fifth of the training nothing would be weighed by the MentorNet.
        curriculum=CurriculumConfig(name="uniform" if plain else "pd", burn_in=0.0),
        optim=OPTIM,
        train=TrainConfig(
            epochs=1,
            batch_size=work.subject.batch,
            precision=precision,
            engine=engine,  # type: ignore[arg-type]  # one of ENGINES
            ledger=not plain,
        ),
    )


def setup(provider: str, work: Work) -> Loop:
    """A provider, ready for its first step."""
    who, engine = split(provider)
    if who == "timm":
        return TimmLoop(work, engine)
    return SpadeLoop(work, who, engine)


def why_another(loop: Loop) -> str:
    """Why another engine took the wanted one's place, as Spade tells it; "" where none did.

    Raises:
        torch.OutOfMemoryError: because of that; a smaller batch may fit.
    """
    news = loop.spade.news if isinstance(loop, SpadeLoop) else []
    why = "; ".join(line for line in news if re.search(r"not\b", line))
    if "OutOfMemoryError" in why:
        raise torch.OutOfMemoryError(why)
    return why
