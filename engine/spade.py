"""SPADE, Algorithm 1 of the paper: student weights w and sample weights v, a mini-batch at a time.

The numbers in the comments are the algorithm's lines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mentorch.engine.averaging import WeightAverage
from mentorch.engine.config import RunConfig
from mentorch.engine.criteria import IGNORED
from mentorch.engine.criterion import Criterion
from mentorch.engine.data.pipelines import Batch
from mentorch.engine.data.prefetch import prefetched
from mentorch.engine.distributed import World
from mentorch.engine.guard import StepGuard, Suspect
from mentorch.engine.optim import (
    add_weight_decay,
    create_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    step_unless,
)
from mentorch.engine.parallel import replicate, synchronise_batch_norms
from mentorch.engine.step_engine import Captured, CudaGraph, Step, compiled, why_not_captured
from mentorch.engine.student import autocast_dtype, forward
from mentorch.engine.tally import Tally, sum_of_weights
from mentorch.engine.watchdog import Progress
from mentorch.kernels.reweight import Reweighted

Observer = Callable[[Tensor, Tensor, Tensor, Reweighted], None]
"""Sees every step: sample ids [B] (−1: no sample), logits [B, C], given labels [B] and what the
criterion found. It works on the device, in place: in a captured step Python calls it only once."""


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
        # With a last entry for rows that are no sample: −1 is the index of it.
        self.labels_N = nn.functional.pad(labels_N, (0, 1), value=IGNORED)
        self.clean_labels_N = nn.functional.pad(clean_labels_N, (0, 1), value=-1)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.train.epochs
        self.dtype = autocast_dtype(config.train.precision, world.device)
        self.student = synchronise_batch_norms(student, config.parallel, world)
        self.guard = StepGuard(self.student)
        torch.manual_seed(config.seed + world.rank)  # each rank its own dropout
        changes = config.train.accumulate > 1 or config.train.engine.startswith("compile")
        self.replica = replicate(self.student, config.parallel, world, changes)
        self.normalise, self.criterion = normalise, criterion
        self.observers, self.progress = observers, progress or Progress()
        self.optimizer = create_optimizer(config.optim, self.student, criterion)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        decay = config.optim.average_decay
        self.average = WeightAverage(self.student, decay) if decay else None
        self.tally = Tally(world.device)
        self.step_count = 0  # t
        self._lr = config.optim.lr
        self.news: list[str] = []  # about how steps are run
        self.say: Callable[[str], None] = lambda line: None  # told it, to tell people
        self._prepared = False
        self._forward: Callable[[Tensor], Tensor] = self._forward_eager
        self._engine: Step = self._on_device

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
        for batch in prefetched(batches, self.world.device):  # lines 2 and 3: in random order
            self._step(batch)
            self.step_count += 1  # line 13
            yield self.step_count

    def _step(self, batch: Batch) -> None:
        """What of a step the host decides; the rest is `_on_device`."""
        self._prepare(batch)
        self._learn_curriculum()
        self._lr = self.lr
        set_learning_rate(self.optimizer, self._lr)
        if self.average:
            self.average.prepare(self.step_count)
        norm, *losses = self._engine(batch.images, batch.sample_ids)
        parts = self.config.train.accumulate
        for sample_ids, sample_loss in zip(batch.sample_ids.chunk(parts), losses, strict=True):
            self.guard.note(self.step_count, sample_ids, sample_loss)
        self.guard.noted(self.step_count, norm)
        self.tally.add_step(norm)

    def _prepare(self, batch: Batch) -> None:
        """Before the first step of this process: compiles the student, if that is asked for."""
        if self._prepared:
            return
        self._prepared = True
        kind = self.config.train.engine
        if kind.startswith("compile"):
            with self.progress.during("compiling the student"):
                images = batch.images.chunk(self.config.train.accumulate)[0]
                self._forward, why = compiled(self._forward, self.replica, images)
            # One rank without it would be slower than all others, and differ.
            if why := next(filter(None, self.world.gather(why)), ""):
                self._forward = self._forward_eager
            self._tell(
                f"the student is not compiled, and runs eager: {why}"
                if why
                else "the student is compiled"
            )
        if kind.endswith("graph"):
            if why := why_not_captured(self.world, self.optimizer):
                self._tell(f"the step is not captured in a CUDA graph: {why}")
                return
            new_recorder = partial(CudaGraph, self.world.device)
            self._engine = Captured(self._on_device, new_recorder, self._tell, self._undo)

    def _undo(self) -> None:
        """After a step that broke off: gradients, and what the loss scale knows of this step."""
        for parameter in self._parameters():
            parameter.grad = None
        self.scaler._per_optimizer_states.clear()
        for name in ("found_inf", "grad_scale"):
            if hasattr(self.optimizer, name):
                delattr(self.optimizer, name)

    def _tell(self, line: str) -> None:
        self.news.append(line)
        self.say(line)

    def _learn_curriculum(self) -> None:
        parts = self.config.train.accumulate
        for call in range(self.step_count * parts, (self.step_count + 1) * parts):
            if self.criterion.learns_at(call):
                with self.progress.during("learning the curriculum"):
                    self.criterion.update_curriculum(call)  # lines 5 to 7
                self._forget_recording()  # it may weigh with other tensors now

    def _forget_recording(self) -> None:
        if isinstance(self._engine, Captured):
            self._engine.forget()

    def _on_device(self, images: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:
        """A step's work on the device, the same launches in every step.

        Returns:
            The gradients' norm, 0-d; the sample losses of every part.
        """
        self.guard.begin()
        for parameter in self._parameters():
            parameter.grad = None  # what zero_grad does, which apex's optimisers define differently
        parts = self.config.train.accumulate
        found = []
        for part in range(parts):
            with self._exchange_gradients(last=part == parts - 1):
                found.append(
                    self._backward(images.chunk(parts)[part], sample_ids.chunk(parts)[part])
                )
        norm = self._update(found)  # line 12: w ← w − α ∇F
        return norm, *(out.sample_loss for out, _ in found)

    def _exchange_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step: in the backward pass of its last part."""
        if isinstance(self.replica, DistributedDataParallel) and not last:
            return self.replica.no_sync()
        return nullcontext()

    def _forward_eager(self, images: Tensor) -> Tensor:
        return forward(self.replica, self.normalise(images), self.dtype)

    def _backward(self, images: Tensor, sample_ids: Tensor) -> tuple[Reweighted, Tensor]:
        """Gradients of a batch, or of a part of one; returns what was found, and the labels."""
        labels = self.labels_N[sample_ids]
        logits = self._forward(images)  # line 4
        out = self.criterion.weigh(logits, labels, sample_ids)  # lines 8 to 11: v
        parts = self.config.train.accumulate
        loss = out.loss if parts == 1 else out.loss / parts  # untouched, it saves a launch
        self.scaler.scale(loss).backward()
        self.tally.add_batch(out, labels, self.clean_labels_N[sample_ids])
        for observe in self.observers:
            observe(sample_ids, logits.detach(), labels, out)
        return out, labels

    def _update(self, found: list[tuple[Reweighted, Tensor]]) -> Tensor:
        """The optimiser's step, unless the gradients' norm is not finite; returns that, 0-d."""
        optim = self.config.optim
        self._average_own_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(optim.clip_norm)
        bad = norm - norm != 0  # NaN is, and ∞ − ∞
        if optim.scale_weight_decay:
            trust = torch.stack([sum_of_weights(out, labels) for out, labels in found]).sum(0)
            add_weight_decay(self.student, optim.weight_decay, trust, self.world.world_size)
        step_unless(bad, self.optimizer, self.scaler)
        self.guard.end(bad)
        if self.average:  # after that: it averages the running statistics too
            self.average.update(self.student)
        return norm

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

    def metrics(self) -> dict[str, float]:
        """Means since the last call over all ranks; the only point at which the host waits."""
        metrics = self.tally.read(self.world)
        metrics["loss_moving_avg"] = float(self.criterion.loss_moving_avg)
        metrics["lr"] = self._lr
        if not metrics["skipped"]:
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
        return {
            "step": self.step_count,
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "criterion": self.criterion.state_dict(),
            "sums": self.tally.of_all_ranks(self.world),
            "of_steps": self.tally.of_steps(),
        }

    def own(self) -> dict[str, Tensor]:
        """What is this rank's alone: a local ℓ_pt, its part of the sums behind the metrics."""
        return {"loss_moving_avg": self.criterion.loss_moving_avg, "sums": self.tally.sums}

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
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.criterion.load_state_dict(state["criterion"])
        if "loss_moving_avg" in own:
            self.criterion.loss_moving_avg.copy_(own["loss_moving_avg"])
        sums = own.get("sums", state["sums"] if self.world.is_main else None)
        self.tally.load(sums, state["of_steps"])
        self._forget_recording()
        self.step_count = state["step"]
