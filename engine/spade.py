"""SPADE, Algorithm 1 of the paper: student weights w and sample weights v, a mini-batch at a time.

The numbers in the comments are the algorithm's lines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mentorch.engine.config import RunConfig
from mentorch.engine.criteria import IGNORED
from mentorch.engine.criterion import Criterion
from mentorch.engine.data.pipelines import Batch
from mentorch.engine.distributed import World
from mentorch.engine.guard import StepGuard, Suspect
from mentorch.engine.optim import (
    add_weight_decay,
    create_optimizer,
    learning_rate,
    set_learning_rate,
    step_unless,
)
from mentorch.engine.parallel import replicate, synchronise_batch_norms
from mentorch.engine.student import autocast_dtype, forward
from mentorch.engine.watchdog import Progress
from mentorch.kernels.reweight import Reweighted

Observer = Callable[[Tensor, Tensor, Tensor, Reweighted], None]
"""Sees every step: sample ids [B] (−1: no sample), logits [B, C], given labels [B] and what the
criterion found."""

USED = 0.001  # a weight above this counts as used, as in the released code's data utilisation
# Sums over samples, then the counts they are divided by.
SUMS = ("loss", "weighted_loss", "mean_weight", "data_utilization", "weight_right", "weight_wrong")
COUNTS = ("samples", "right", "wrong", "labelled", "rows")
OF_STEPS = ("grad_norm", "steps", "skipped")  # the same on every rank


class Spade:
    """A student in training under a curriculum.

    Args:
        config: the run.
        student: w⁰, the same on every rank.
        criterion: the curriculum.
        normalise: from a batch's pixels to the student's input.
        labels_N: [N] int64 on the device: the given label of every row of the index.
        clean_labels_N: likewise the labels known to be right; -1 where unknown. For metrics only.
        steps_per_epoch: of the loader.
        world: the ranks.
        observers: called after every step, and every part of one where gradients accumulate.
        progress: told of what may take long.
    """

    def __init__(
        self,
        config: RunConfig,
        student: nn.Module,
        criterion: Criterion,
        normalise: nn.Module,
        labels_N: Tensor,
        clean_labels_N: Tensor,
        steps_per_epoch: int,
        world: World,
        observers: Sequence[Observer] = (),
        progress: Progress | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.labels_N, self.clean_labels_N = labels_N, clean_labels_N
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.train.epochs
        self.dtype = autocast_dtype(config.train.precision, world.device)
        self.student = synchronise_batch_norms(student, config.parallel, world)
        self.guard = StepGuard(self.student)
        torch.manual_seed(config.seed + world.rank)  # each rank its own dropout
        accumulates = config.train.accumulate > 1
        self.replica = replicate(self.student, config.parallel, world, accumulates)
        self.normalise, self.criterion = normalise, criterion
        self.observers, self.progress = observers, progress or Progress()
        self.optimizer = create_optimizer(config.optim, self.student, criterion)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        decay = config.optim.average_decay
        self.average = ModelEmaV3(self.student, decay, use_warmup=True) if decay else None
        self.step_count = 0  # t
        sums = len(SUMS) + len(COUNTS)
        self._sums = torch.zeros(sums, dtype=torch.float64, device=world.device)
        self._of_steps = self._sums.new_zeros(len(OF_STEPS))

    @property
    def trained(self) -> nn.Module:
        """What is evaluated: the averaged student where there is an average."""
        return self.average.module if self.average else self.student

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(
            self.config.optim, self.step_count, self.steps_per_epoch, self.total_steps
        )

    def train(self, batches: Iterator[Batch]) -> Iterator[int]:
        """Trains on the batches; yields the number of steps taken so far, after each."""
        self.replica.train()
        self.criterion.train()
        for batch in batches:  # lines 2 and 3: the loader's order is uniformly random
            self._step(batch)
            self.step_count += 1  # line 13
            yield self.step_count

    def _step(self, batch: Batch) -> None:
        self.guard.begin()
        for parameter in self._parameters():
            parameter.grad = None  # what zero_grad does, which apex's optimisers define differently
        parts = self.config.train.accumulate
        trust = self._sums.new_zeros(2)  # Σ v and the number of samples
        for part in range(parts):
            images, sample_ids = (rows.chunk(parts)[part] for rows in batch)
            with self._exchange_gradients(last=part == parts - 1):
                trust += self._backward(images, sample_ids, self.step_count * parts + part)
        self._update(trust)  # line 12: w ← w − α ∇F

    def _exchange_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step: in the backward pass of its last part."""
        if isinstance(self.replica, DistributedDataParallel) and not last:
            return self.replica.no_sync()
        return nullcontext()

    def _backward(self, images: Tensor, sample_ids: Tensor, call: int) -> Tensor:
        """Gradients of a batch, or of a part of one; returns Σ v and the number of samples."""
        if self.criterion.learns_at(call):
            with self.progress.during("learning the curriculum"):
                self.criterion.update_curriculum(call)  # lines 5 to 7
        labels = self.labels_N[sample_ids.clamp(min=0)].masked_fill(sample_ids < 0, IGNORED)
        logits = forward(self.replica, self.normalise(images), self.dtype)  # line 4
        out = self.criterion.weigh(logits, labels, sample_ids)  # lines 8 to 11: v
        parts = self.config.train.accumulate
        loss = out.loss if parts == 1 else out.loss / parts  # untouched, it saves a launch
        self.scaler.scale(loss).backward()
        self._count(out, labels, self.clean_labels_N[sample_ids.clamp(min=0)])
        self.guard.note(self.step_count, sample_ids, out.sample_loss)
        for observe in self.observers:
            observe(sample_ids, logits.detach(), labels, out)
        return torch.stack([out.sample_weight.sum(), (labels != IGNORED).sum()])

    def _update(self, trust: Tensor) -> None:
        optim = self.config.optim
        set_learning_rate(self.optimizer, self.lr)
        self._average_own_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(optim.clip_norm)
        finite = norm.isfinite()
        if optim.scale_weight_decay:
            add_weight_decay(self.student, optim.weight_decay, trust, self.world.world_size)
        step_unless(~finite, self.optimizer, self.scaler)
        self.guard.end(self.step_count, finite)
        if self.average:  # after that: it averages the running statistics too
            self.average.update(self.student, step=self.step_count + 1)
        self._of_steps += torch.stack([norm.where(finite, 0), torch.ones_like(norm), ~finite])

    def _clip(self, largest: float) -> Tensor:
        """The norm of all gradients, 0-d, before those of the student are scaled down."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if largest:
            torch.nn.utils.clip_grads_with_norm_(self.student.parameters(), largest, norm)
        return norm

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from self.student.parameters()
        yield from self.criterion.parameters()

    def _average_own_gradients(self) -> None:
        """Over the ranks, for what the criterion has to learn: DDP sees the student only."""
        if self.world.world_size > 1:
            for parameter in self.criterion.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world.world_size

    @torch.no_grad()
    def _count(self, out: Reweighted, labels: Tensor, clean_labels: Tensor) -> None:
        """Adds a batch to the sums behind the metrics, on the device."""
        valid = (labels != IGNORED) & out.sample_loss.isfinite() & out.sample_weight.isfinite()
        loss = out.sample_loss.masked_fill(~valid, 0.0)
        weight = out.sample_weight.masked_fill(~valid, 0.0)
        right = valid & (clean_labels == labels)
        wrong = valid & (clean_labels != labels) & (clean_labels >= 0)
        parts = [
            loss.sum(),
            (weight * loss).sum(),
            weight.sum(),
            (weight > USED).sum(),
            (weight * right).sum(),
            (weight * wrong).sum(),
            valid.sum(),
            right.sum(),
            wrong.sum(),
            (labels != IGNORED).sum(),
            torch.ones_like(valid).sum(),
        ]
        self._sums += torch.stack([part.to(torch.float64) for part in parts])

    def metrics(self) -> dict[str, float]:
        """Means since the last call over all ranks; the only point at which the host waits."""
        sums = self._sums.clone()
        if self.world.world_size > 1:
            dist.all_reduce(sums)
        values = torch.cat([sums, self._of_steps]).tolist()
        totals, counts = values[: len(SUMS)], values[len(SUMS) : len(sums)]
        samples, right, wrong, labelled, rows = counts
        norm, steps, skipped = values[len(sums) :]
        self._sums.zero_()
        self._of_steps.zero_()
        divisors = [max(samples, 1)] * 4 + [right, wrong]
        metrics = {
            name: total / count
            for name, total, count in zip(SUMS, totals, divisors, strict=True)
            if count  # without known clean labels there are no right and wrong ones
        }
        metrics["loss_moving_avg"] = float(self.criterion.loss_moving_avg)
        metrics["grad_norm"] = norm / max(steps - skipped, 1)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["rows"] = rows
        metrics["unusable"] = 1 - labelled / max(rows, 1)  # share of rows without an image
        metrics["skipped"] = skipped  # steps whose gradients were not finite
        if not skipped:
            self.guard.forget()
        return metrics

    def suspects(self) -> list[Suspect]:
        """The samples behind steps that `metrics` has just called skipped; all ranks call it."""
        found = self.guard.suspects(self.world)
        self.guard.forget()
        return found

    def models(self) -> dict[str, dict[str, Tensor]]:
        """The weights a checkpoint holds."""
        models = {"model": self.student.state_dict()}
        if self.average:
            models["average"] = self.average.module.state_dict()
        return models

    def state(self) -> dict[str, Any]:
        """Everything else a checkpoint holds that all ranks share; all of them call it."""
        sums = self._sums.clone()
        if self.world.world_size > 1:
            dist.all_reduce(sums)
        return {
            "step": self.step_count,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "criterion": self.criterion.state_dict(),
            "sums": sums,
            "of_steps": self._of_steps,
        }

    def own(self) -> dict[str, Tensor]:
        """What is this rank's alone: a local ℓ_pt, its part of the sums behind the metrics."""
        return {"loss_moving_avg": self.criterion.loss_moving_avg, "sums": self._sums}

    def load(
        self, models: dict[str, dict[str, Tensor]], state: dict[str, Any], own: dict[str, Tensor]
    ) -> None:
        """Puts back what `models`, `state` and `own` gave.

        Args:
            models: the weights.
            state: the rest.
            own: this rank's; empty where the number of ranks is another one now.
        """
        self.student.load_state_dict(models["model"])
        if self.average:
            self.average.module.load_state_dict(models["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, slots in self.optimizer.state.items():
            for name, value in slots.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # In the parameter's memory order, or the fused update would sum in another one.
                    slots[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        self.criterion.load_state_dict(state["criterion"])
        if "loss_moving_avg" in own:
            self.criterion.loss_moving_avg.copy_(own["loss_moving_avg"])
        if "sums" in own:
            self._sums.copy_(own["sums"])
        elif self.world.is_main:
            self._sums.copy_(state["sums"])
        self._of_steps.copy_(state["of_steps"])
        self.step_count = state["step"]
