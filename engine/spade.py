"""SPADE, Algorithm 1 of the paper: student weights w and sample weights v, a mini-batch at a time.

The numbers in the comments are the algorithm's lines.
"""

from collections.abc import Callable, Iterator, Sequence
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
from mentorch.engine.optim import (
    add_weight_decay,
    create_optimizer,
    learning_rate,
    set_learning_rate,
)
from mentorch.engine.student import autocast_dtype, forward
from mentorch.kernels.reweight import Reweighted

Observer = Callable[[Tensor, Tensor, Tensor, Reweighted], None]
"""Sees every step: sample ids [B] (−1: no sample), logits [B, C], given labels [B] and what the
criterion found."""

USED = 0.001  # a weight above this counts as used, as in the released code's data utilisation
# Sums over samples, then the counts they are divided by.
SUMS = ("loss", "weighted_loss", "mean_weight", "data_utilization", "weight_right", "weight_wrong")
COUNTS = ("samples", "right", "wrong", "rows")


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
        observers: called after every step.
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
    ) -> None:
        self.config, self.world = config, world
        self.labels_N, self.clean_labels_N = labels_N, clean_labels_N
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.train.epochs
        self.dtype = autocast_dtype(config.train.precision, world.device)
        self.student = student
        torch.manual_seed(config.seed + world.rank)  # each rank its own dropout
        self.replica = self._replicate()
        self.normalise, self.criterion = normalise, criterion
        self.observers = observers
        self.optimizer = create_optimizer(config.optim, self.student, criterion)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        decay = config.optim.average_decay
        self.average = ModelEmaV3(self.student, decay, use_warmup=True) if decay else None
        self.step_count = 0  # t
        sums = len(SUMS) + len(COUNTS)
        self._sums = torch.zeros(sums, dtype=torch.float64, device=world.device)

    def _replicate(self) -> nn.Module:
        """The student with its gradients averaged over the ranks."""
        if self.world.world_size == 1:
            return self.student
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(self.student, device_ids=devices)

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
            self.criterion.update_curriculum(self.step_count)  # lines 5 to 7
            self._step(batch)
            self.step_count += 1  # line 13
            yield self.step_count

    def _step(self, batch: Batch) -> None:
        labels = self.labels_N[batch.sample_ids.clamp(min=0)]
        labels = labels.masked_fill(batch.sample_ids < 0, IGNORED)
        images = self.normalise(batch.images)
        logits = forward(self.replica, images, self.dtype)  # line 4
        out = self.criterion.weigh(logits, labels, batch.sample_ids)  # lines 8 to 11: v
        self._update(out, labels)  # line 12: w ← w − α ∇F
        self._count(out, labels, self.clean_labels_N[batch.sample_ids.clamp(min=0)])
        for observe in self.observers:
            observe(batch.sample_ids, logits.detach(), labels, out)

    def _update(self, out: Reweighted, labels: Tensor) -> None:
        optim = self.config.optim
        set_learning_rate(self.optimizer, self.lr)
        for parameter in self._parameters():
            parameter.grad = None  # what zero_grad does, which apex's optimisers define differently
        self.scaler.scale(out.loss).backward()
        self._average_own_gradients()
        if optim.clip_norm or optim.scale_weight_decay:
            self.scaler.unscale_(self.optimizer)
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip_norm)
        if optim.scale_weight_decay:
            sums = torch.stack([out.sample_weight.sum(), (labels != IGNORED).sum()])
            add_weight_decay(self.student, optim.weight_decay, sums, self.world.world_size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.student, step=self.step_count + 1)

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
        """Adds the step to the sums behind the metrics, on the device."""
        weight, valid = out.sample_weight, labels != IGNORED
        right = valid & (clean_labels == labels)
        wrong = valid & (clean_labels != labels) & (clean_labels >= 0)
        parts = [
            out.sample_loss.sum(),
            (weight * out.sample_loss).sum(),
            weight.sum(),
            (weight > USED).sum(),
            (weight * right).sum(),
            (weight * wrong).sum(),
            valid.sum(),
            right.sum(),
            wrong.sum(),
            torch.ones_like(valid).sum(),
        ]
        self._sums += torch.stack([part.to(torch.float64) for part in parts])

    def metrics(self, *flags: bool) -> tuple[dict[str, float], list[bool]]:
        """Means since the last call over all ranks; the only point at which the host waits.

        Args:
            flags: what this rank has to tell the others.

        Returns:
            The metrics, and of each flag whether it is up on any rank.
        """
        sums = torch.cat([self._sums, self._sums.new_tensor([float(flag) for flag in flags])])
        if self.world.world_size > 1:
            dist.all_reduce(sums)
        values = sums.tolist()
        totals, counts = values[: len(SUMS)], values[len(SUMS) : len(self._sums)]
        samples, right, wrong, rows = counts
        self._sums.zero_()
        divisors = [max(samples, 1)] * 4 + [right, wrong]
        metrics = {
            name: total / count
            for name, total, count in zip(SUMS, totals, divisors, strict=True)
            if count  # without known clean labels there are no right and wrong ones
        }
        metrics["loss_moving_avg"] = float(self.criterion.loss_moving_avg)
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        metrics["rows"] = rows
        metrics["unusable"] = 1 - samples / max(rows, 1)  # share of rows without an image
        return metrics, [total > 0 for total in values[len(self._sums) :]]

    def models(self) -> dict[str, dict[str, Tensor]]:
        """The weights a checkpoint holds."""
        models = {"model": self.student.state_dict()}
        if self.average:
            models["average"] = self.average.module.state_dict()
        return models

    def state(self) -> dict[str, Any]:
        """Everything else a checkpoint holds."""
        return {
            "step": self.step_count,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "criterion": self.criterion.state_dict(),
            "sums": self._sums,
        }

    def load(
        self, models: dict[str, dict[str, Tensor]], state: dict[str, Any], own: dict[str, Tensor]
    ) -> None:
        """Puts back what `models` and `state` gave, and the rank's own ℓ_pt if it had one."""
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
        self._sums.copy_(state["sums"])
        self.step_count = state["step"]
