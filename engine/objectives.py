"""What a curriculum minimises: its regularizer G(v) and its underlying objective F(ℓ).

    v*(x) = argmin_{v ∈ [0, 1]} v x + G(v)                        Eq. 9
    F(ℓ)  = ∫_0^ℓ v*(x) dx,   dF/dℓ = v*(ℓ)                       Eq. 10

G is known for two of the closed forms: ``linear`` has Eq. 5, ``self_paced`` the same at λ2 = 0. The
others have none. Whatever G is, v*(x) never increases with x: from v1 x1 + G(v1) ≤ v2 x1 + G(v2)
and v2 x2 + G(v2) ≤ v1 x2 + G(v1) follows (v1 − v2)(x1 − x2) ≤ 0. ``focal`` and ``hard_example``
increase, so no G leads to them. ``uniform`` is the limit c → ∞ of G = −c v, which weighs all
losses below c with 1. ``pd_mixture`` changes with the epoch.

F is robust in Proposition 1's sense where v* decreases: concave, so a great loss counts for less.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mentorch.kernels.mentor import ClosedForm, closed_form_ref


@dataclass(frozen=True)
class QuadraticG:
    """G(v) = Σ ½ λ2 v² − (λ1 + λ2) v, Eq. 5.

    At λ2 = 0 it is self-paced learning's −λ1 Σ v, whose optimum is 1[x ≤ λ1].

    Raises:
        ValueError: λ2 < 0, where G would not be convex; or a number that is none.
    """

    lambda1: float
    """λ1, nats: where the optimum starts to fall."""
    lambda2: float
    """λ2, nats ≥ 0: over how much loss it falls from 1 to 0."""

    def __post_init__(self) -> None:
        if not (self.lambda2 >= 0 and self.lambda1 == self.lambda1):
            raise ValueError(
                "G needs numbers with lambda2 ≥ 0, "
                f"got lambda1={self.lambda1}, lambda2={self.lambda2}"
            )

    def value(self, weight: Tensor) -> Tensor:
        """The term of each weight v in [0, 1], any shape; G is their sum."""
        return 0.5 * self.lambda2 * weight.square() - (self.lambda1 + self.lambda2) * weight

    def gradient(self, weight: Tensor) -> Tensor:
        """∂G/∂v = λ2 v − (λ1 + λ2), any shape."""
        return self.lambda2 * weight - (self.lambda1 + self.lambda2)

    def optimum(self, loss: Tensor) -> Tensor:
        """argmin_{v ∈ [0, 1]} v x + G(v), Eq. 7.

        Args:
            loss: x, nats, any shape: the loss, or its difference from ℓ_pt.
        """
        form = ClosedForm("linear", lambda1=self.lambda1, lambda2=self.lambda2, on="loss")
        return closed_form_ref(form, loss, loss)


def regularizer(form: ClosedForm) -> QuadraticG | None:
    """The G whose optimum a closed form is, as a function of its input (``form.on``).

    Returns:
        None where there is none (see above): ``uniform``, ``focal``, ``hard_example`` and
        ``pd_mixture``.
    """
    if form.kind == "self_paced":
        return QuadraticG(form.lambda1, 0.0)
    return QuadraticG(form.lambda1, form.lambda2) if form.kind == "linear" else None


Weight = Callable[[Tensor], Tensor]

_PANELS = 256
_TOLERANCE = 1e-8  # by which a panel's integral may change when the panel is halved
_DEPTH = 40


def _simpson(weight: Weight, left: Tensor, right: Tensor) -> Tensor:
    """One parabola a panel. It looks at the ends, so that no jump inside goes unnoticed when the
    panel is halved; Gauss' rules miss those next to an end."""
    points = torch.stack([left, (left + right) / 2, right])
    ends_and_middle = weight(points.flatten()).double().view_as(points)
    return (right - left) / 6 * (ends_and_middle * points.new_tensor([[1.0], [4.0], [1.0]])).sum(0)


def _integrals(weight: Weight, left: Tensor, right: Tensor, depth: int = _DEPTH) -> Tensor:
    """∫ weight over each panel, halved until its integral settles."""
    middle = (left + right) / 2
    halves = _simpson(weight, left, middle) + _simpson(weight, middle, right)
    rough = (halves - _simpson(weight, left, right)).abs() > _TOLERANCE
    if depth > 0 and rough.any():
        left, middle, right = left[rough], middle[rough], right[rough]
        first = _integrals(weight, left, middle, depth - 1)
        halves[rough] = first + _integrals(weight, middle, right, depth - 1)
    return halves


@torch.no_grad()
def _quadrature(weight: Weight, loss: Tensor) -> Tensor:
    """∫_0^ℓ weight(x) dx for every ℓ, each of which ends a panel."""
    upper = loss.flatten().double()
    even = torch.linspace(0, 1, _PANELS + 1, dtype=torch.float64, device=loss.device)
    edges = torch.cat([even * upper.max().clamp(min=1.0), upper]).unique()  # of a width > 0
    integral = _integrals(weight, edges[:-1], edges[1:]).cumsum(0)
    integral = torch.cat([integral.new_zeros(1), integral])
    return integral[torch.searchsorted(edges, upper)].view_as(loss)


def _closed(form: ClosedForm, x: Tensor) -> Tensor:
    """An antiderivative of v* in x, the form's input."""
    easy = x.clamp(max=form.lambda1)
    if form.kind == "uniform":
        return x
    if form.kind == "hard_example":
        return x - easy
    if form.kind == "self_paced" or form.lambda2 == 0:
        return easy
    fall = (x - form.lambda1).clamp(0.0, form.lambda2)
    return easy + fall - fall.square() / (2 * form.lambda2)


def _focal(loss: Tensor, gamma: int) -> Tensor:
    """∫_0^ℓ u^γ dx = ℓ − Σ_{k ≤ γ} u^k / k with u = 1 − exp(−x)."""
    u = -torch.expm1(-loss)
    return loss - sum((u**k / k for k in range(1, gamma + 1)), torch.zeros_like(loss))


def robust_objective(
    weight: Weight | ClosedForm, loss: Tensor, loss_moving_avg: float = 0.0
) -> Tensor:
    """F(ℓ) = ∫_0^ℓ v*(x) dx, Eq. 10, the objective that training by the weights v* descends.

        self_paced    min(ℓ, λ1)
        linear        Eq. 11; at λ1 = 0 the minimax concave penalty
        hard_example  max(ℓ − λ1, 0)
        focal         ℓ − Σ_{k=1..γ} (1 − exp(−ℓ))^k / k for whole γ
        uniform       ℓ

    Everything else by adaptive quadrature: error below 1e-5 for weights in [0, 1] with a few jumps
    or kinks; a bump narrower than 1/256 of the greatest loss may be missed.

    Args:
        weight: a closed form, or x → v for x of any length. A MentorNet's, at a fixed ℓ_pt and
            epoch (a 0-d tensor): ``lambda x: mentor(x, x - l_pt, torch.zeros_like(x).long(),
            epoch_pct)``.
        loss: ℓ ≥ 0, nats, finite, any shape.
        loss_moving_avg: ℓ_pt, nats, for a closed form on the loss difference; held fixed.

    Returns:
        F, nats, float64, shape of ``loss``; for the formulas above autograd finds v*.

    Raises:
        ValueError: a loss that is negative or not finite, or ``pd_mixture``, which has an F for
            every epoch.
    """
    if not bool(((loss >= 0) & loss.isfinite()).all()):
        raise ValueError(f"losses must be finite and ≥ 0, got {loss.min()} to {loss.max()}")
    loss = loss.double()
    if not isinstance(weight, ClosedForm):
        return _quadrature(weight, loss)
    form, zero = weight, torch.zeros_like(loss)
    if form.kind == "pd_mixture":
        raise ValueError(
            "pd_mixture changes with the epoch; give its weights at one: "
            "lambda x: closed_form_ref(form, x, x - loss_moving_avg, epoch_pct)"
        )
    if form.kind == "focal":
        if form.gamma == int(form.gamma):
            return _focal(loss, int(form.gamma))
        return _quadrature(lambda x: closed_form_ref(form, x, x), loss)
    shift = loss_moving_avg if form.on == "loss_diff" else 0.0
    return _closed(form, loss - shift) - _closed(form, zero - shift)
