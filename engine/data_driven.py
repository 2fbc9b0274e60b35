"""MentorNet DD: a curriculum learned from samples whose labels are known to be right or wrong.

    D' = {(z_i, v*_i)},  v*_i = 1[label i is right]          Sec. 3.1, "data-driven curriculums"

The student itself makes the features z as it trains (`VisitLog`); Θ minimises the cross-entropy to
v* (`fit_visits`). Learned on one data set and saved, such a MentorNet is used like any other. Or it
is learned again at given points of the very run it steers (`DataDriven`; Algorithm 1, line 6).

docs/data_driven.md is the study that the defaults come from. Shapes: n samples of D', V visits
kept a sample, N samples of the data set.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mentorch.engine.mentor import MentorNet
from mentorch.engine.mentor_training import Features, fit_error, fit_weights, split_points
from mentorch.engine.reweight import Reweight
from mentorch.kernels.mentor import EPOCHS
from mentorch.kernels.ranks import gather_rows
from mentorch.kernels.reweight import Reweighted


class Trusted(NamedTuple):
    """D': samples whose labels somebody has checked."""

    sample_ids: Tensor  # [n] int64, distinct
    is_right: Tensor  # [n] bool: the given label is the true one
    labels: Tensor | None = None  # [n] int64, as given; for a MentorNet that reads them


class VisitLog(nn.Module):
    """Loss, loss difference and progress of the last V visits of D', on the device.

    Args:
        trusted: D'.
        num_samples: N; sample ids are below it.
        visits: V.

    Raises:
        ValueError: an id out of range or twice, or no visit to keep.
    """

    slot_N: Tensor  # row of the table; n, a scratch row, for samples outside D'
    table: Tensor  # [n + 1, V, 4]: loss, difference, epoch percentage, step; NaN where empty
    seen: Tensor  # [n + 1] visits so far

    def __init__(self, trusted: Trusted, num_samples: int, visits: int) -> None:
        super().__init__()
        ids = trusted.sample_ids.cpu()
        count = len(ids)
        if visits < 1:
            raise ValueError(f"at least 1 visit must be kept, got {visits}")
        if count and not 0 <= int(ids.min()) <= int(ids.max()) < num_samples:
            raise ValueError(f"trusted sample ids must be in [0, {num_samples})")
        if len(ids.unique()) != count:
            raise ValueError("a sample comes twice among the trusted ones")
        slots = torch.full((num_samples + 1,), count)
        slots[ids] = torch.arange(count)
        self.register_buffer("slot_N", slots)
        self.register_buffer("table", torch.full((count + 1, visits, 4), torch.nan))
        self.register_buffer("seen", torch.zeros(count + 1, dtype=torch.int64))

    @torch.no_grad()
    def record(
        self, sample_ids: Tensor, loss: Tensor, diff: Tensor, pct: Tensor, step: Tensor
    ) -> None:
        """Notes a step's batch; samples outside D' and rows that are no sample leave no trace.

        Args:
            sample_ids: [B] int64.
            loss: [B], nats.
            diff: [B], ℓ − ℓ_pt.
            pct: epoch percentage, 0-d.
            step: of training, 0-d.
        """
        slots = self.slot_N[sample_ids]  # id −1 reads the last entry, which is no sample
        column = self.seen[slots] % self.table.shape[1]
        progress = torch.stack([pct, step]).to(loss.dtype).expand(len(loss), 2)
        self.table[slots, column] = torch.cat([loss[:, None], diff[:, None], progress], 1)
        self.seen[slots] += 1

    def latest(self) -> Tensor:
        """[n, V, 4], the latest V visits, oldest first; NaN where there were less."""
        table = self.table[:-1]
        order = table[:, :, 3].nan_to_num(-1.0).argsort(dim=1, stable=True)
        table = table.gather(1, order.unsqueeze(2).expand_as(table))
        return table[:, -self.table.shape[1] :]


def features_of(
    visits: Tensor, is_right: Tensor, labels: Tensor | None = None
) -> tuple[Features, Tensor]:
    """Every visit as one point to learn from.

    Args:
        visits: [n, V, 4] of `VisitLog.latest`.
        is_right: [n] bool.
        labels: [n] int64, as given; None: not to be read.

    Returns:
        The features of the visits there were, and v* of each, float32.

    Raises:
        ValueError: no visit at all.
    """
    there = ~visits[:, :, 0].isnan()
    if not bool(there.any()):
        raise ValueError("none of the trusted samples has been visited yet: nothing to learn from")
    target = is_right.to(visits.device)[:, None].expand(there.shape)[there].to(torch.float32)
    loss, diff, pct, _ = visits[there].unbind(1)
    label = torch.zeros(len(there), dtype=torch.int64) if labels is None else labels
    label = label.to(visits.device)[:, None].expand(there.shape)[there]
    return Features(loss.contiguous(), diff.contiguous(), label, pct.to(torch.int64)), target


def features_of_history(history: Tensor, trusted: Trusted, pct: Tensor) -> tuple[Features, Tensor]:
    """Every trusted sample's last T visits as one point to learn from.

    Args:
        history: [N + 1, T, 2], see `mentorch.kernels.history`.
        trusted: D'.
        pct: epoch percentage now, 0-d.

    Returns:
        The features of the samples that have been visited, [n', T], and v* of each, float32.

    Raises:
        ValueError: none has.
    """
    loss, diff = history[trusted.sample_ids].unbind(2)
    seen = ~loss[:, -1].isnan()
    if not bool(seen.any()):
        raise ValueError("none of the trusted samples has been visited yet: nothing to learn from")
    zeros = torch.zeros_like(trusted.sample_ids[seen])
    labels = zeros if trusted.labels is None else trusted.labels[seen]
    features = Features(loss[seen], diff[seen], labels, zeros + pct)
    return features, trusted.is_right[seen].to(torch.float32)


def sharpen(mentor: MentorNet, sharpness: float) -> MentorNet:
    """Multiplies the logit of the weight, in place: v = σ(s · logit).

    At 1 the weight is P(label right | z); above, it tends to the decision 1[P > ½].
    """
    with torch.no_grad():
        mentor.fc2.weight.mul_(sharpness)
        mentor.fc2.bias.mul_(sharpness)
    return mentor


def new_mentor(lstm_units: int, num_labels: int) -> MentorNet:
    """A MentorNet with fresh Θ that reads the label if there is a number of them."""
    if num_labels:
        return MentorNet(lstm_units=lstm_units, num_labels=num_labels, use_label=True)
    return MentorNet(lstm_units=lstm_units)


def _ignore_loss(mentor: MentorNet) -> None:
    """Makes the LSTMs' weights of the loss 0, and keeps them there."""
    only_diff = torch.tensor([0.0, 1.0], device=mentor.fc1.weight.device)
    for lstm in (mentor.forward_lstm, mentor.backward_lstm):
        assert lstm is not None
        weight = lstm.get_parameter("weight_ih")
        with torch.no_grad():
            weight.mul_(only_diff)
        weight.register_hook(only_diff.mul)


def fit_visits(
    features: Features,
    is_right: Tensor,
    *,
    seed: int = 0,
    steps: int = 1000,
    lstm_units: int = 1,
    num_labels: int = 0,
    use_loss: bool = False,
    use_epoch: bool = False,
    sharpness: float = 1.0,
) -> MentorNet:
    """Learns Θ of a data-driven curriculum.

    Args:
        features: z of the visits.
        is_right: v*, float32 0 or 1, like ``features.loss``.
        seed: of Θ and the order of the points.
        steps: of the optimiser.
        lstm_units: of the MentorNet, a direction.
        num_labels: C, to read the given label, which fits one label set only; 0: do not.
        use_loss: read the loss itself, not just its difference from ℓ_pt. Where ℓ_pt hardly moves
            among the visits the two are one, and what is learned of the other is arbitrary.
        use_epoch: read the training progress; otherwise the curriculum is the same throughout.
        sharpness: see `sharpen`.

    Returns:
        The MentorNet; its ``card`` has the fit on 20% of the points, which were held out.

    Raises:
        ValueError: all labels right or all wrong: nothing to tell apart.
    """
    right = int(is_right.sum())
    if right in (0, len(is_right)):
        raise ValueError(
            f"{right} of {len(is_right)} trusted visits have a right label: a curriculum needs "
            "both right and wrong labels to learn from"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mentor = new_mentor(lstm_units, num_labels)
    mentor.to(features.loss.device)
    if not use_epoch:
        with torch.no_grad():  # the same row for every percentage, whatever is learned elsewhere
            mentor.epoch_embedding.zero_()
        mentor.epoch_embedding.requires_grad_(False)
    if not use_loss:
        _ignore_loss(mentor)
    learn, held_out = (part.to(is_right.device) for part in split_points(len(is_right), seed))
    fit_weights(mentor, features.rows(learn), is_right[learn], seed=seed, steps=steps)
    error = fit_error(mentor, features.rows(held_out), is_right[held_out])
    mentor.card = {
        "target": "1[label is right]",
        "visits": len(is_right),
        "right": right,
        "seed": seed,
        "steps": steps,
        "use_loss": use_loss,
        "use_epoch": use_epoch,
        "use_label": num_labels > 0,
        "sharpness": sharpness,
        "held_out": error,
        "torch": torch.__version__,
    }
    return sharpen(mentor, sharpness)


class DataDriven(Reweight):
    """MentorNet DD learned from the run it steers.

    Until the first point of learning the weights are those of the burn-in, which must last until
    then. D' is trained on like all samples, so that its features are those of a trained sample.

    Args:
        trusted: D'.
        num_samples: N of the data set.
        total_steps: training steps in all.
        learn_at: shares of training at which Θ is learned (again), the first at ``burn_in``.
        history_steps: T. Above 1, a weight is that of a sample's last T visits together.
        lstm_units: of the MentorNet, a direction.
        num_labels: C, to learn a curriculum that reads the given label; 0: one that does not.
        use_loss: see `fit_visits`.
        fit_steps: of the optimiser, each time.
        sharpness: see `sharpen`.
        settings: further options of `Reweight`.

    Raises:
        ValueError: the first learning comes after the burn-in, or a number out of range.
    """

    trusted_ids: Tensor
    is_right: Tensor
    trusted_labels: Tensor | None

    def __init__(
        self,
        trusted: Trusted,
        *,
        num_samples: int,
        total_steps: int,
        learn_at: Sequence[float] = (0.2, 0.3, 0.55, 0.8),
        history_steps: int = 1,
        lstm_units: int = 1,
        num_labels: int = 0,
        use_loss: bool = False,
        fit_steps: int = 1000,
        sharpness: float = 4.0,
        burn_in: float = 0.2,
        seed: int = 0,
        **settings: object,
    ) -> None:
        super().__init__(
            new_mentor(lstm_units, num_labels),
            num_samples=num_samples,
            total_steps=total_steps,
            history_steps=history_steps,
            burn_in=burn_in,
            seed=seed,
            **settings,  # type: ignore[arg-type]
        )
        if not learn_at or min(learn_at) <= 0 or max(learn_at) >= 1:
            raise ValueError(f"learn_at are shares of training in (0, 1), got {tuple(learn_at)}")
        if min(learn_at) > round(burn_in * EPOCHS) / EPOCHS:
            raise ValueError(
                f"the curriculum is first learned at {min(learn_at)} of training, but the burn-in "
                f"ends at {burn_in}: there would be none in between"
            )
        self.learn_steps = {round(share * total_steps) for share in learn_at}
        self.fit_options: dict[str, Any] = {
            "steps": fit_steps,
            "lstm_units": lstm_units,
            "num_labels": num_labels,
            "use_loss": use_loss,
            "sharpness": sharpness,
        }
        self.learned: dict[int, MentorNet] = {}  # by step, those of this process, for reports
        self.register_buffer("trusted_ids", trusted.sample_ids.clone())
        self.register_buffer("is_right", trusted.is_right.clone())
        if num_labels and trusted.labels is None:
            raise ValueError(
                "to read the labels, D' needs them: Trusted(sample_ids, is_right, labels)"
            )
        read = trusted.labels if num_labels else None
        self.register_buffer("trusted_labels", None if read is None else read.clone())
        self.log = VisitLog(trusted, num_samples, 1) if self.history is None else None

    def weigh_rows(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """One training step; arguments as `Criterion.weigh_rows`, ``index`` required.

        Raises:
            ValueError: no ``index``.
        """
        if index is None:
            raise ValueError("trusted samples are known by their ids: call criterion(…, index)")
        pct, step = self.epoch_pct(), self.step.clone()
        out = super().weigh_rows(logits, labels, index)
        if self.log is not None:  # every rank keeps all visits: a checkpoint is of one rank
            loss = gather_rows(out.sample_loss, self.group)
            diff = (loss - out.loss_moving_avg).float()
            self.log.record(gather_rows(index, self.group), loss.float(), diff, pct, step)
        return out

    def _features(self) -> tuple[Features, Tensor]:
        """What D' looks like to the student now."""
        if self.log is not None:
            visits = self.log.latest()
            return features_of(visits, self.is_right, self.trusted_labels)
        assert self.history is not None
        trusted = Trusted(self.trusted_ids, self.is_right, self.trusted_labels)
        return features_of_history(self.history, trusted, self.epoch_pct())

    def learns_at(self, step: int) -> bool:
        """At the shares of training that were asked for."""
        return step in self.learn_steps

    def update_curriculum(self, step: int) -> None:
        """Learns Θ when it is time (line 6); the parameters keep their places in memory."""
        if not self.learns_at(step):
            return
        features, target = self._features()
        found = fit_visits(features, target, seed=self.seed, **self.fit_options)
        assert self.mentor is not None
        self.mentor.load_state_dict(found.state_dict())
        self.mentor.card = found.card
        self.learned[step] = found
        if self.group is not None and dist.get_world_size(self.group) > 1:
            for parameter in self.mentor.parameters():  # the same to the last bit everywhere
                dist.broadcast(parameter.data, src=0, group=self.group)
