"""g_m: from a sample's loss to its weight in [0, 1], in closed form or by a MentorNet.

Closed forms (x is the loss difference ℓ − ℓ_pt, or the loss itself with ``on="loss"``):

    uniform        1
    self_paced     1[x ≤ λ1]                                  Eq. 2
    linear         clip(1 − (x − λ1)/λ2, 0, 1)                Eq. 7, the optimum of the G of Eq. 5;
                                                              λ2 = 0: self_paced
    focal          (1 − exp(−ℓ))^γ                            Eq. 8
    hard_example   1[x > λ1], what self_paced leaves out      hard-example mining
    pd_mixture     1 to epoch 18, self_paced to 89, linear    the released code's MentorNet PD
                   from 90 (in percent of training)

MentorNet (Fig. 1): bi-LSTM over the last T (loss, difference) pairs, embeddings of label and epoch
percentage, fc1 tanh, fc2 sigmoid. Without the LSTM (``encoder="none"``) the T pairs go into fc1 as
they are, oldest first and 0 where absent: the two-layer perceptron of Appendix D; with a linear fc1
of one unit besides, a logistic regression.

On a GPU a program weighs a tile of samples with everything in registers; Θ (a few kilobytes) is
read once a tile. All dims are free: products go one column at a time, since they are too small for
matrix units (H is 1 in the released nets) and must keep float32's precision.

Shapes: B batch, M samples of a tile, T history steps, H LSTM units a direction, E embedding size,
F fc1 units.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mentorch.kernels.backend import tl, triton

ClosedFormKind = Literal["uniform", "self_paced", "linear", "focal", "hard_example", "pd_mixture"]
EPOCHS = 100  # the epoch percentage is an integer in [0, 99]
LAST_UNIFORM_PCT, FIRST_LINEAR_PCT = 18, 90  # of pd_mixture, as released
_LAST_UNIFORM = tl.constexpr(LAST_UNIFORM_PCT)  # kernels read no other globals
_FIRST_LINEAR = tl.constexpr(FIRST_LINEAR_PCT)


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
    forward: LstmWeights | None  # None without an LSTM
    backward: LstmWeights | None
    fc1_weight: Tensor  # [F, E_label + E_epoch + 2H]; 2T for 2H without an LSTM
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [1, F]
    fc2_bias: Tensor  # [1]
    use_label: bool = False  # False: the label input is always 0, as released
    lstm_output: str = "h"  # "h", or "c": the released weights pass the cell state on
    encoder: str = "lstm"  # of the T visits: "lstm", or "none": they go into fc1 as they are
    activation: str = "tanh"  # of fc1: "tanh" or "linear"
    last_epoch_pct: int = 99  # the greatest epoch percentage it is told, whatever the progress

    @property
    def lstm_units(self) -> int:
        """H; 0 without an LSTM."""
        return 0 if self.forward is None else self.forward.weight_hh.shape[1]

    def check_steps(self, steps: int) -> None:
        """An LSTM takes any number of visits, a fully connected layer its own.

        Raises:
            ValueError: not the T that fc1 was made for.
        """
        embedded = self.label_embedding.shape[1] + self.epoch_embedding.shape[1]
        known = (self.fc1_weight.shape[1] - embedded) // 2
        if self.encoder == "none" and steps != known:
            raise ValueError(
                f"this MentorNet has no LSTM and reads T = {known} visits of a sample, got "
                f"{steps}; keep a history of {known} steps, or learn one with encoder='lstm'"
            )


Curriculum = ClosedForm | MentorWeights


def _pd_mixture_ref(form: ClosedForm, x: Tensor, epoch_pct: Tensor | int) -> Tensor:
    """The released MentorNet PD: all samples, then the easy ones, then by Eq. 7."""
    epoch = torch.as_tensor(epoch_pct, device=x.device)
    easy = closed_form_ref(replace(form, kind="self_paced", on="loss"), x, x)
    linear = closed_form_ref(replace(form, kind="linear", on="loss"), x, x)
    weight = torch.where(epoch < FIRST_LINEAR_PCT, easy, linear)
    return torch.where((epoch <= LAST_UNIFORM_PCT) & ~x.isnan(), 1.0, weight)


def closed_form_ref(
    form: ClosedForm, loss: Tensor, loss_diff: Tensor, epoch_pct: Tensor | int | None = None
) -> Tensor:
    """v* of a closed form (equations above).

    Args:
        form: which one.
        loss: ℓ, any shape, nats.
        loss_diff: ℓ − ℓ_pt, same shape.
        epoch_pct: integer 0..99, 0-d or like ``loss``; only ``pd_mixture`` reads it.

    Returns:
        weights in [0, 1], shape and dtype of ``loss``; NaN where the loss is NaN (but for
        ``uniform``).

    Raises:
        ValueError: ``pd_mixture`` without an epoch.
    """
    x = loss_diff if form.on == "loss_diff" else loss
    if form.kind == "uniform":
        return torch.ones_like(loss)
    if form.kind == "focal":
        return (-torch.expm1(-loss)).clamp(0.0, 1.0) ** form.gamma
    if form.kind == "pd_mixture":
        if epoch_pct is None:
            raise ValueError("pd_mixture changes during training: give epoch_pct, 0 to 99")
        return _pd_mixture_ref(form, x, epoch_pct)
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
        # Filled, because the gradient of what `where` leaves out is 0 · NaN.
        there_B2 = step_B2.masked_fill(absent_B1, 0.0)
        gates = there_B2 @ weights.weight_ih.T + h @ weights.weight_hh.T + weights.bias
        i, f, g, o = gates.chunk(4, dim=1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = torch.where(absent_B1, h, o.sigmoid() * new_c.tanh())
        c = torch.where(absent_B1, c, new_c)
    return c if output == "c" else h


def _encoded_ref(weights: MentorWeights, steps_BT2: Tensor) -> Tensor:
    """What fc1 sees of the visits: both LSTMs' last states, or the visits themselves."""
    if weights.forward is None or weights.backward is None:
        absent_BT1 = steps_BT2[..., :1].isnan()
        return steps_BT2.masked_fill(absent_BT1, 0.0).flatten(1)
    forward_BH = _lstm_ref(weights.forward, steps_BT2, weights.lstm_output)
    backward_BH = _lstm_ref(weights.backward, steps_BT2.flip(1), weights.lstm_output)
    return torch.cat([forward_BH, backward_BH], dim=1)


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

    Raises:
        ValueError: without an LSTM, another T than fc1 takes.
    """
    batch = loss.shape[0]
    steps = 1 if loss.ndim == 1 else loss.shape[1]
    weights.check_steps(steps)
    steps_BT2 = torch.stack([loss, loss_diff], dim=-1).view(batch, steps, 2)
    steps_BT2 = steps_BT2.to(weights.fc1_weight.dtype)
    label_row = labels.clamp(min=0) if weights.use_label else torch.zeros_like(labels)
    features = torch.cat(
        [
            weights.label_embedding[label_row],
            weights.epoch_embedding[
                epoch_pct.long().clamp(0, weights.last_epoch_pct).expand(batch)
            ],
            _encoded_ref(weights, steps_BT2),
        ],
        dim=1,
    )
    hidden = features @ weights.fc1_weight.T + weights.fc1_bias
    hidden = hidden.tanh() if weights.activation == "tanh" else hidden
    weight = torch.sigmoid(hidden @ weights.fc2_weight.T + weights.fc2_bias).squeeze(1)
    return torch.where(steps_BT2[:, -1, 0].isnan(), torch.nan, weight)


def sample_weight_ref(
    curriculum: Curriculum, loss: Tensor, loss_diff: Tensor, labels: Tensor, epoch_pct: Tensor
) -> Tensor:
    """The weight of every sample under a curriculum of either kind; arguments as
    `mentornet_ref`."""
    if isinstance(curriculum, ClosedForm):
        return closed_form_ref(curriculum, loss, loss_diff, epoch_pct)
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
def _linear(x_M, lambda1, lambda2):
    return tl.minimum(tl.maximum(1.0 - (x_M - lambda1) / lambda2, 0.0), 1.0)


@triton.jit
def closed_form(
    loss_M, diff_M, epoch_pct, lambda1, lambda2, gamma, KIND: tl.constexpr, ON_LOSS: tl.constexpr
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
            weight_M = _linear(x_M, lambda1, lambda2)
        elif KIND == "pd_mixture":
            weight_M = _linear(x_M, lambda1, tl.maximum(lambda2, 1e-30))  # λ2 = 0: self-paced
            easy_M = (x_M <= lambda1).to(tl.float32)
            weight_M = tl.where(epoch_pct < _FIRST_LINEAR, easy_M, weight_M)
            weight_M = tl.where(epoch_pct <= _LAST_UNIFORM, 1.0, weight_M)
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
def _add_visit(x_MF, loss_M, diff_M, w_ptr_F, real_F):
    """x + what fc1 makes of one visit; an absent one (NaN) is 0."""
    there_M = loss_M == loss_M
    of_loss_F = tl.load(w_ptr_F, mask=real_F, other=0.0).to(tl.float32)
    of_diff_F = tl.load(w_ptr_F + 1, mask=real_F, other=0.0).to(tl.float32)
    x_MF += tl.where(there_M, loss_M, 0.0)[:, None] * of_loss_F[None, :]
    x_MF += tl.where(there_M, diff_M, 0.0)[:, None] * of_diff_F[None, :]
    return x_MF


@triton.jit
def _add_visits(
    x_MF, loss_M, diff_M, past_ptr_M, known_M, w_ptr_F, real_F, T: tl.constexpr
):  # fmt: skip
    """x + fc1 of the last T visits as they are, today's last."""
    if T > 1:
        for t in range(T - 1):
            then_loss_M = tl.load(past_ptr_M + 2 * t + 2, mask=known_M, other=float("nan"))
            then_diff_M = tl.load(past_ptr_M + 2 * t + 3, mask=known_M, other=float("nan"))
            x_MF = _add_visit(x_MF, then_loss_M, then_diff_M, w_ptr_F + 2 * t, real_F)
    return _add_visit(x_MF, loss_M, diff_M, w_ptr_F + 2 * (T - 1), real_F)


@triton.jit
def mentornet(
    loss_M,
    diff_M,
    past_ptr_M,
    known_M,
    label_M,
    epoch_pct,
    theta,  # pointers, of `MentorWeights` in its order; any for an absent LSTM's
    T: tl.constexpr,
    H: tl.constexpr,
    UNITS: tl.constexpr,  # H and F up to a power of two
    F: tl.constexpr,
    HIDDEN: tl.constexpr,
    LABEL_DIM: tl.constexpr,
    EPOCH_DIM: tl.constexpr,
    USE_LABEL: tl.constexpr,
    OUTPUT: tl.constexpr,
    ENCODER: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`mentornet_ref` on a tile of samples."""
    if ENCODER == "lstm":  # before there is an x to keep in registers
        forward_MH = _lstm(
            loss_M, diff_M, past_ptr_M, known_M, theta[2], theta[3], theta[4], T, H, UNITS, False,
            OUTPUT,
        )  # fmt: skip
        backward_MH = _lstm(
            loss_M, diff_M, past_ptr_M, known_M, theta[5], theta[6], theta[7], T, H, UNITS, True,
            OUTPUT,
        )  # fmt: skip
    inputs: tl.constexpr = LABEL_DIM + EPOCH_DIM + (2 * T if ENCODER == "none" else 2 * H)
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
    if ENCODER == "none":
        x_MF = _add_visits(
            x_MF, loss_M, diff_M, past_ptr_M, known_M, w_ptr_F + LABEL_DIM + EPOCH_DIM, real_F, T
        )  # fmt: skip
    else:
        of_state = theta[8] + LABEL_DIM + EPOCH_DIM
        x_MF = _add_product(x_MF, forward_MH, of_state, inputs, H, F)
        x_MF = _add_product(x_MF, backward_MH, of_state + H, inputs, H, F)
    hidden_MF = _tanh(x_MF) if ACTIVATION == "tanh" else x_MF
    w_F = tl.load(theta[10] + unit_F, mask=real_F, other=0.0).to(tl.float32)
    x_M = tl.sum(hidden_MF * w_F[None, :], axis=1) + tl.load(theta[11]).to(tl.float32)
    return tl.where(loss_M != loss_M, loss_M, _sigmoid(x_M))
