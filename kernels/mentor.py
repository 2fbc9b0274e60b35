"""g_m: from a sample's loss to its weight in [0, 1], in closed form or by a MentorNet.

Closed forms (x is the loss difference ℓ − ℓ_pt, or the loss itself with ``on="loss"``):

    uniform        1
    self_paced     1[x ≤ λ1]                                  Eq. 2
    linear         clip(1 − (x − λ1)/λ2, 0, 1)                Eq. 7, the optimum of the G of Eq. 5;
                                                              λ2 = 0: self_paced
    focal          (1 − exp(−ℓ))^γ                            Eq. 8
    hard_example   1[x > λ1], what self_paced leaves out      hard-example mining

MentorNet (Fig. 1): bi-LSTM over the last T (loss, difference) pairs, embeddings of label and epoch
percentage, fc1 tanh, fc2 sigmoid.

Shapes: B batch, T history steps, H LSTM units a direction, E embedding size, F fc1 units.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

ClosedFormKind = Literal["uniform", "self_paced", "linear", "focal", "hard_example"]
EPOCHS = 100  # the epoch percentage is an integer in [0, 99]


@dataclass(frozen=True)
class ClosedForm:
    """A curriculum known by its formula.

    Raises:
        ValueError: unknown kind or input, or a negative λ2 or γ.
    """

    kind: ClosedFormKind
    lambda1: float = 0.0
    """λ1, nats: where the weight starts to fall."""
    lambda2: float = 1.0
    """λ2, nats ≥ 0: over how much loss ``linear`` falls from 1 to 0."""
    gamma: float = 2.0
    """γ ≥ 0 of ``focal``."""
    on: Literal["loss_diff", "loss"] = "loss_diff"
    """Whether λ1 is counted from ℓ_pt (the released code) or from 0 (the paper's fixed λ)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ClosedFormKind):
            known = ", ".join(get_args(ClosedFormKind))
            raise ValueError(f"unknown curriculum {self.kind!r}; the closed forms are: {known}")
        if self.on not in ("loss_diff", "loss"):
            raise ValueError(f"a curriculum works on 'loss_diff' or 'loss', not {self.on!r}")
        if not (self.lambda2 >= 0 and self.gamma >= 0):  # refuses NaN too
            raise ValueError(
                f"lambda2 and gamma must be ≥ 0, got lambda2={self.lambda2}, gamma={self.gamma}"
            )


class LstmWeights(NamedTuple):
    """One direction, in torch's layout: gates i, f, g, o stacked."""

    weight_ih: Tensor  # [4H, 2]
    weight_hh: Tensor  # [4H, H]
    bias: Tensor  # [4H]


class MentorWeights(NamedTuple):
    """A MentorNet's Θ. All dims are free; they are read off the shapes."""

    label_embedding: Tensor  # [L, E_label]
    epoch_embedding: Tensor  # [100, E_epoch]
    forward: LstmWeights
    backward: LstmWeights
    fc1_weight: Tensor  # [F, E_label + E_epoch + 2H]
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [1, F]
    fc2_bias: Tensor  # [1]
    use_label: bool = False  # False: the label input is always 0, as released
    lstm_output: str = "h"  # "h", or "c": the released weights pass the cell state on


Curriculum = ClosedForm | MentorWeights


def closed_form_ref(form: ClosedForm, loss: Tensor, loss_diff: Tensor) -> Tensor:
    """v* of a closed form (equations above).

    Args:
        form: which one.
        loss: ℓ, any shape, nats.
        loss_diff: ℓ − ℓ_pt, same shape.

    Returns:
        weights in [0, 1], shape and dtype of ``loss``; NaN where the loss is NaN (but for
        ``uniform``).
    """
    x = loss_diff if form.on == "loss_diff" else loss
    if form.kind == "uniform":
        return torch.ones_like(loss)
    if form.kind == "focal":
        return (-torch.expm1(-loss)).clamp(0.0, 1.0) ** form.gamma
    if form.kind == "linear" and form.lambda2 > 0:
        return (1.0 - (x - form.lambda1) / form.lambda2).clamp(0.0, 1.0)
    easy = (x <= form.lambda1).to(loss.dtype)
    weight = 1.0 - easy if form.kind == "hard_example" else easy
    return torch.where(x.isnan(), x, weight)


def _lstm_ref(weights: LstmWeights, steps_BT2: Tensor, output: str) -> Tensor:
    """Last state of an LSTM over T steps, from zero: [B, H]."""
    units = weights.weight_hh.shape[1]
    h = c = steps_BT2.new_zeros(steps_BT2.shape[0], units)
    for step_B2 in steps_BT2.unbind(1):
        gates = step_B2 @ weights.weight_ih.T + h @ weights.weight_hh.T + weights.bias
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return c if output == "c" else h


def mentornet_ref(
    weights: MentorWeights, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor
) -> Tensor:
    """v = g_m(z; Θ) of Fig. 1. Differentiable in Θ, which is how Θ is learned.

    Args:
        weights: Θ.
        loss: [B] or [B, T], nats, oldest first.
        loss_diff: ℓ − ℓ_pt, like ``loss``.
        labels: [B] int64; not read unless ``weights.use_label``.
        epoch_pct: integer 0..99, 0-d or [B].

    Returns:
        [B], in (0, 1).
    """
    batch = loss.shape[0]
    steps_BT2 = torch.stack([loss.view(batch, -1), loss_diff.view(batch, -1)], dim=-1)
    steps_BT2 = steps_BT2.to(weights.fc1_weight.dtype)
    label_row = labels.clamp(min=0) if weights.use_label else torch.zeros_like(labels)
    features = torch.cat(
        [
            weights.label_embedding[label_row],
            weights.epoch_embedding[epoch_pct.long().clamp(0, EPOCHS - 1).expand(batch)],
            _lstm_ref(weights.forward, steps_BT2, weights.lstm_output),
            _lstm_ref(weights.backward, steps_BT2.flip(1), weights.lstm_output),
        ],
        dim=1,
    )
    hidden = torch.tanh(features @ weights.fc1_weight.T + weights.fc1_bias)
    return torch.sigmoid(hidden @ weights.fc2_weight.T + weights.fc2_bias).squeeze(1)


def sample_weight_ref(
    curriculum: Curriculum, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor
) -> Tensor:
    """The weight of every sample under a curriculum of either kind; arguments as
    `mentornet_ref`."""
    if isinstance(curriculum, ClosedForm):
        return closed_form_ref(curriculum, loss, loss_diff)
    return mentornet_ref(curriculum, loss, loss_diff, labels, epoch_pct).to(loss.dtype)
