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

On a GPU a program weighs a tile of samples with everything in registers; Θ (a few kilobytes) is
read once a tile. All dims are free: products go one column at a time, since they are too small for
matrix units (H is 1 in the released nets) and must keep float32's precision.

Shapes: B batch, M samples of a tile, T history steps, H LSTM units a direction, E embedding size,
F fc1 units.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mentorch.kernels.backend import tl, triton

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
    """Last state of an LSTM over T steps, from zero: [B, H]. A step of NaN loss is not taken."""
    units = weights.weight_hh.shape[1]
    h = c = steps_BT2.new_zeros(steps_BT2.shape[0], units)
    for step_B2 in steps_BT2.unbind(1):
        absent_B1 = step_B2[:, :1].isnan()
        gates = step_B2 @ weights.weight_ih.T + h @ weights.weight_hh.T + weights.bias
        i, f, g, o = gates.chunk(4, dim=1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = torch.where(absent_B1, h, o.sigmoid() * new_c.tanh())
        c = torch.where(absent_B1, c, new_c)
    return c if output == "c" else h


def mentornet_ref(
    weights: MentorWeights, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor
) -> Tensor:
    """v = g_m(z; Θ) of Fig. 1. Differentiable in Θ, which is how Θ is learned.

    Args:
        weights: Θ.
        loss: [B] or [B, T], nats, oldest first; NaN where a sample has been seen less often. The
            last one is today's: NaN makes the weight NaN.
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
    weight = torch.sigmoid(hidden @ weights.fc2_weight.T + weights.fc2_bias).squeeze(1)
    return torch.where(steps_BT2[:, -1, 0].isnan(), torch.nan, weight)


def sample_weight_ref(
    curriculum: Curriculum, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor
) -> Tensor:
    """The weight of every sample under a curriculum of either kind; arguments as
    `mentornet_ref`."""
    if isinstance(curriculum, ClosedForm):
        return closed_form_ref(curriculum, loss, loss_diff)
    return mentornet_ref(curriculum, loss, loss_diff, labels, epoch_pct).to(loss.dtype)


# ---- The same on a tile of samples, in Triton ---------------------------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _power(x, exponent):
    """x^exponent for x in [0, 1] and exponent ≥ 0; 0^0 is 1."""
    return tl.where(exponent == 0.0, 1.0, tl.exp(exponent * tl.log(x)))


@triton.jit
def closed_form(
    loss_M, diff_M, lambda1, lambda2, gamma, KIND: tl.constexpr, ON_LOSS: tl.constexpr
):  # fmt: skip
    """`closed_form_ref`; KIND "linear" with λ2 = 0 comes as "self_paced"."""
    x_M = loss_M if ON_LOSS else diff_M
    if KIND == "uniform":
        weight_M = tl.full(loss_M.shape, 1.0, tl.float32)
    else:
        if KIND == "focal":
            # 1 − exp(−ℓ) by its series near 0, where the difference would cancel
            small_M = loss_M * (1.0 - loss_M * (0.5 - loss_M * (1.0 / 6.0 - loss_M / 24.0)))
            p_M = tl.where(loss_M < 0.02, small_M, 1.0 - tl.exp(-loss_M))
            weight_M = _power(tl.minimum(tl.maximum(p_M, 0.0), 1.0), gamma)
            x_M = loss_M
        elif KIND == "linear":
            weight_M = tl.minimum(tl.maximum(1.0 - (x_M - lambda1) / lambda2, 0.0), 1.0)
        elif KIND == "self_paced":
            weight_M = (x_M <= lambda1).to(tl.float32)
        else:
            weight_M = (x_M > lambda1).to(tl.float32)
        weight_M = tl.where(x_M != x_M, x_M, weight_M)
    return weight_M


@triton.jit
def _add_product(
    sum_MN, x_MK, weight_ptr, stride, K: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """sum + x Wᵀ for W [N, K] of row stride ``stride``; x and sum are padded."""
    n_N = tl.arange(0, sum_MN.shape[1])
    k_K = tl.arange(0, x_MK.shape[1])
    for k in range(K):
        x_M = tl.sum(tl.where(k_K[None, :] == k, x_MK, 0.0), axis=1)
        w_N = tl.load(weight_ptr + n_N * stride + k, mask=n_N < N, other=0.0).to(tl.float32)
        sum_MN += x_M[:, None] * w_N[None, :]
    return sum_MN


@triton.jit
def _gate(loss_M, diff_M, h_MH, ih_ptr, hh_ptr, bias_ptr, gate: tl.constexpr, H: tl.constexpr):
    """Pre-activation of one of the gates i, f, g, o (0 to 3): [M, H] padded."""
    unit_H = tl.arange(0, h_MH.shape[1])
    row_H = gate * H + unit_H
    bias_H = tl.load(bias_ptr + row_H, mask=unit_H < H, other=0.0).to(tl.float32)
    of_loss_H = tl.load(ih_ptr + 2 * row_H, mask=unit_H < H, other=0.0).to(tl.float32)
    of_diff_H = tl.load(ih_ptr + 2 * row_H + 1, mask=unit_H < H, other=0.0).to(tl.float32)
    x_MH = loss_M[:, None] * of_loss_H[None, :] + diff_M[:, None] * of_diff_H[None, :]
    return _add_product(x_MH + bias_H[None, :], h_MH, hh_ptr + gate * H * H, H, H, H)


@triton.jit
def _lstm_step(h_MH, c_MH, loss_M, diff_M, ih_ptr, hh_ptr, bias_ptr, H: tl.constexpr):
    i_MH = _sigmoid(_gate(loss_M, diff_M, h_MH, ih_ptr, hh_ptr, bias_ptr, 0, H))
    f_MH = _sigmoid(_gate(loss_M, diff_M, h_MH, ih_ptr, hh_ptr, bias_ptr, 1, H))
    g_MH = _tanh(_gate(loss_M, diff_M, h_MH, ih_ptr, hh_ptr, bias_ptr, 2, H))
    o_MH = _sigmoid(_gate(loss_M, diff_M, h_MH, ih_ptr, hh_ptr, bias_ptr, 3, H))
    new_c_MH = f_MH * c_MH + i_MH * g_MH
    there_M1 = (loss_M == loss_M)[:, None]
    return (
        tl.where(there_M1, o_MH * _tanh(new_c_MH), h_MH),
        tl.where(there_M1, new_c_MH, c_MH),
    )


@triton.jit
def _lstm(
    loss_M,
    diff_M,
    past_ptr_M,  # each sample's row of the history, [T, 2], of which the oldest step is not read
    known_M,
    ih_ptr,
    hh_ptr,
    bias_ptr,
    T: tl.constexpr,
    H: tl.constexpr,
    UNITS: tl.constexpr,  # H up to a power of two
    BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,  # "h" or "c"
):
    h_MH = tl.zeros([loss_M.shape[0], UNITS], tl.float32)
    c_MH = tl.zeros([loss_M.shape[0], UNITS], tl.float32)
    if BACKWARD:
        h_MH, c_MH = _lstm_step(h_MH, c_MH, loss_M, diff_M, ih_ptr, hh_ptr, bias_ptr, H)
    if T > 1:
        for t in range(T - 1):
            step = (T - 1 - t) if BACKWARD else (t + 1)
            then_loss_M = tl.load(past_ptr_M + 2 * step, mask=known_M, other=float("nan"))
            then_diff_M = tl.load(past_ptr_M + 2 * step + 1, mask=known_M, other=float("nan"))
            h_MH, c_MH = _lstm_step(
                h_MH, c_MH, then_loss_M, then_diff_M, ih_ptr, hh_ptr, bias_ptr, H
            )  # fmt: skip
    if not BACKWARD:
        h_MH, c_MH = _lstm_step(h_MH, c_MH, loss_M, diff_M, ih_ptr, hh_ptr, bias_ptr, H)
    return c_MH if OUTPUT == "c" else h_MH


@triton.jit
def mentornet(
    loss_M,
    diff_M,
    past_ptr_M,
    known_M,
    label_M,
    epoch_pct,
    theta,  # pointers, in the order of `theta_tensors`
    T: tl.constexpr,
    H: tl.constexpr,
    UNITS: tl.constexpr,  # H and F up to a power of two
    F: tl.constexpr,
    HIDDEN: tl.constexpr,
    LABEL_DIM: tl.constexpr,
    EPOCH_DIM: tl.constexpr,
    USE_LABEL: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """`mentornet_ref` on a tile of samples."""
    forward_MH = _lstm(
        loss_M, diff_M, past_ptr_M, known_M, theta[2], theta[3], theta[4], T, H, UNITS, False,
        OUTPUT,
    )  # fmt: skip
    backward_MH = _lstm(
        loss_M, diff_M, past_ptr_M, known_M, theta[5], theta[6], theta[7], T, H, UNITS, True, OUTPUT
    )  # fmt: skip
    inputs = LABEL_DIM + EPOCH_DIM + 2 * H
    unit_F = tl.arange(0, HIDDEN)
    w_ptr_F = theta[8] + unit_F * inputs
    real_F = unit_F < F
    x_F = tl.load(theta[9] + unit_F, mask=real_F, other=0.0).to(tl.float32)
    for e in range(EPOCH_DIM):  # the same for all samples
        w_F = tl.load(w_ptr_F + LABEL_DIM + e, mask=real_F, other=0.0).to(tl.float32)
        x_F += w_F * tl.load(theta[1] + epoch_pct * EPOCH_DIM + e).to(tl.float32)
    x_MF = tl.zeros([loss_M.shape[0], HIDDEN], tl.float32) + x_F[None, :]
    for e in range(LABEL_DIM):
        w_F = tl.load(w_ptr_F + e, mask=real_F, other=0.0).to(tl.float32)
        if USE_LABEL:
            embedded_M = tl.load(theta[0] + label_M * LABEL_DIM + e).to(tl.float32)
            x_MF += embedded_M[:, None] * w_F[None, :]
        else:
            x_MF += (w_F * tl.load(theta[0] + e).to(tl.float32))[None, :]
    of_state = theta[8] + LABEL_DIM + EPOCH_DIM
    x_MF = _add_product(x_MF, forward_MH, of_state, inputs, H, F)
    x_MF = _add_product(x_MF, backward_MH, of_state + H, inputs, H, F)
    w_F = tl.load(theta[10] + unit_F, mask=real_F, other=0.0).to(tl.float32)
    x_M = tl.sum(_tanh(x_MF) * w_F[None, :], axis=1) + tl.load(theta[11]).to(tl.float32)
    return tl.where(loss_M != loss_M, loss_M, _sigmoid(x_M))
