"""G, v* and F against each other: Eq. 5, 7, 9, 10 and 11, Remark 1 and Proposition 1."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.objectives import QuadraticG, regularizer, robust_objective
from mentorch.kernels.mentor import ClosedForm, closed_form_ref

LOSS = torch.linspace(0, 8, 161, dtype=torch.float64)
# λ1 = 0 is the minimax concave penalty; λ2 = 0 self-paced; a steep slope and one past the losses.
LAMBDAS = [(0.0, 1.0), (0.0, 0.0), (1.3, 0.0), (0.7, 2.5), (2.0, 0.01), (3.0, 20.0)]


def weight_of(form, epoch=None):
    return lambda x: closed_form_ref(form, x, x, epoch)


# ---------------------------------------------------------------- G and its optimum


@pytest.mark.parametrize(("l1", "l2"), LAMBDAS)
def test_the_optimum_minimises_eq_9(l1, l2):
    g = QuadraticG(l1, l2)
    v = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    objective = v * LOSS[:, None] + g.value(v)
    found = g.optimum(LOSS)
    torch.testing.assert_close(
        found * LOSS + g.value(found), objective.min(1).values, rtol=0, atol=1e-8 * max(1, l2)
    )
    if l2 > 0:  # strictly convex: one minimum only
        assert (found - v[objective.argmin(1)]).abs().max() <= 0.5e-4 + 1e-9  # half the grid's step


@pytest.mark.parametrize(("l1", "l2"), LAMBDAS)
def test_the_value_is_eq_5_and_the_gradient_its_derivative(l1, l2):
    g, v = QuadraticG(l1, l2), torch.rand(7, dtype=torch.float64, requires_grad=True)
    expected = 0.5 * l2 * v.detach().numpy() ** 2 - (l1 + l2) * v.detach().numpy()
    np.testing.assert_allclose(g.value(v).detach().numpy(), expected, rtol=1e-14)
    (slope,) = torch.autograd.grad(g.value(v).sum(), v)
    torch.testing.assert_close(g.gradient(v.detach()), slope)


def test_which_closed_forms_have_a_regularizer():
    assert regularizer(ClosedForm("linear", lambda1=0.3, lambda2=2.0)) == QuadraticG(0.3, 2.0)
    assert regularizer(ClosedForm("self_paced", lambda1=0.3, lambda2=2.0)) == QuadraticG(0.3, 0.0)
    for kind in ("uniform", "focal", "hard_example", "pd_mixture"):
        assert regularizer(ClosedForm(kind)) is None


@pytest.mark.parametrize("numbers", [(0.0, -1.0), (0.0, math.nan), (math.nan, 1.0)])
def test_a_regularizer_that_is_not_convex_is_refused(numbers):
    with pytest.raises(ValueError, match="lambda2 ≥ 0, got"):
        QuadraticG(*numbers)


@pytest.mark.parametrize("seed", range(5))
def test_no_regularizer_leads_to_weights_that_increase(seed):
    """Monotone comparative statics: argmin_v v x + G(v) never increases in x, for any G."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.linspace(0, 1, 401, dtype=torch.float64)
    rugged = torch.randn(401, generator=generator, dtype=torch.float64) * 0.3
    best = v[(v * LOSS[:, None] + 3 * v**2 - 6 * v + rugged).argmin(1)]  # far from convex
    assert len(best.unique()) > 3
    assert (best.diff() <= 0).all()
    for kind in ("focal", "hard_example"):  # and these do increase
        weight = weight_of(ClosedForm(kind, lambda1=1.0, on="loss"))(LOSS)
        assert (weight.diff() >= 0).all()
        assert weight[-1] > weight[0]


def test_uniform_is_the_limit_of_a_linear_regularizer():
    for c in (1.0, 5.0, 9.0):  # weight 1 below c; past the greatest loss that is uniform
        weight = QuadraticG(c, 0.0).optimum(LOSS)
        assert torch.equal(weight, (c >= LOSS).double())
    assert weight.eq(1).all()


# ---------------------------------------------------------------- F


@pytest.mark.parametrize(("l1", "l2"), LAMBDAS)
def test_remark_1(l1, l2):
    """Eq. 11 as printed, the formula of `robust_objective`, and the quadrature of Eq. 7."""
    form = ClosedForm("linear", lambda1=l1, lambda2=l2, on="loss")
    found = robust_objective(form, LOSS)
    torch.testing.assert_close(
        robust_objective(QuadraticG(l1, l2).optimum, LOSS), found, rtol=0, atol=1e-6
    )
    if l2 == 0:
        torch.testing.assert_close(found, LOSS.clamp(max=l1))
        return
    theta, loss = (l1 + l2) / l2, LOSS
    middle = theta * loss - loss**2 / (2 * l2) - (theta - 1) ** 2 * l2 / 2
    expected = torch.where(loss >= l1 + l2, (l2 + 2 * l1) / 2, middle)
    torch.testing.assert_close(found, torch.where(loss <= l1, loss, expected))


@pytest.mark.parametrize("l2", [0.5, 4.0])
def test_theta_1_is_the_minimax_concave_penalty(l2):
    """Zhang (2010): λ ∫_0^t (1 − x/(γλ))_+ dx with λ = 1 and γ = λ2."""
    loss = LOSS
    expected = torch.where(loss <= l2, loss - loss**2 / (2 * l2), l2 / 2)
    form = ClosedForm("linear", lambda1=0.0, lambda2=l2, on="loss")
    torch.testing.assert_close(robust_objective(form, loss), expected)


FORMS = [
    ClosedForm("uniform", on="loss"),
    ClosedForm("self_paced", lambda1=1.3, on="loss"),
    ClosedForm("linear", lambda1=0.4, lambda2=2.0, on="loss"),
    ClosedForm("hard_example", lambda1=1.3, on="loss"),
    *(ClosedForm("focal", gamma=gamma, on="loss") for gamma in (0.0, 1.0, 2.0, 5.0, 0.5, 2.7)),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kind} {form.gamma}")
def test_the_formulas_are_the_integral(form):
    torch.testing.assert_close(
        robust_objective(form, LOSS), robust_objective(weight_of(form), LOSS), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS[:8], ids=lambda form: f"{form.kind} {form.gamma}")
def test_its_slope_is_the_weight(form):
    loss = (LOSS + 0.013).requires_grad_()  # beside the kinks
    (slope,) = torch.autograd.grad(robust_objective(form, loss).sum(), loss)
    torch.testing.assert_close(slope, weight_of(form)(loss.detach()))


def test_a_fixed_moving_average_shifts_the_curriculum():
    for average in (0.5, 3.0):
        for kind in ("uniform", "self_paced", "linear", "hard_example", "focal"):
            form = ClosedForm(kind, lambda1=-1.0, lambda2=2.0)
            expected = robust_objective(
                lambda x, f=form, a=average: closed_form_ref(f, x, x - a), LOSS
            )
            found = robust_objective(form, LOSS, average)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", [1e-4, 0.03, 3.0, math.pi, 7.999])
def test_jumps_anywhere_are_found(where):
    found = robust_objective(lambda x: (x <= where).double(), LOSS)
    torch.testing.assert_close(found, LOSS.clamp(max=where), rtol=0, atol=1e-6)


def test_the_mixture_has_an_objective_an_epoch():
    mixture = ClosedForm("pd_mixture", lambda1=1.0, lambda2=2.0, on="loss")
    with pytest.raises(ValueError, match="changes with the epoch"):
        robust_objective(mixture, LOSS)
    for epoch, kind in ((18, "uniform"), (19, "self_paced"), (90, "linear")):
        expected = robust_objective(replace(mixture, kind=kind), LOSS)
        found = robust_objective(weight_of(mixture, epoch), LOSS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_any_shape_and_no_loss_at_all():
    loss = torch.tensor([[3.0, 0.0], [3.0, 1.0]])
    found = robust_objective(lambda x: 2 * x, loss)
    torch.testing.assert_close(found, loss.double() ** 2, rtol=0, atol=1e-8)
    assert robust_objective(lambda x: 2 * x, torch.zeros(2)).eq(0).all()


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_losses_it_cannot_integrate_to(bad):
    with pytest.raises(ValueError, match="finite and ≥ 0"):
        robust_objective(ClosedForm("linear"), torch.tensor([1.0, bad]))


# ---------------------------------------------------------------- Proposition 1


def test_a_robust_objective_underlies_the_shipped_mentornet():
    """Its weights decrease, so ρ is concave, not decreasing, and grows at most linearly."""
    mentor = resolve_curriculum("pd")
    average, epoch = 0.7, torch.tensor(50)

    def weight(x):
        with torch.no_grad():
            return mentor(x, x - average, torch.zeros_like(x).long(), epoch)

    weights = weight(LOSS).double()
    assert (weights.diff() < 2e-3).all()  # decreases, but for what the fit leaves
    rho = robust_objective(weight, LOSS)
    assert (rho.diff() >= 0).all()
    assert (rho.diff().diff() < 1e-4).all()
    assert (rho <= LOSS + 1e-6).all()
    assert rho[-1] < 0.25 * LOSS[-1]  # a sample of loss 8 does not count eight times one of loss 1
    slope = (rho[2:] - rho[:-2]) / (LOSS[2:] - LOSS[:-2])
    torch.testing.assert_close(slope, weights[1:-1], rtol=0, atol=0.02)
    exact = robust_objective(ClosedForm("linear"), LOSS, average)
    assert (rho - exact).abs().max() < 0.05


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_huber_is_a_special_case(delta):
    """Of ℓ = r²/2 the weight min(1, δ/r) gives Huber's function of the residual r."""
    residual = torch.linspace(0, 4, 101, dtype=torch.float64)
    found = robust_objective(
        lambda x: (delta / (2 * x).sqrt().clamp(min=1e-12)).clamp(max=1.0), residual**2 / 2
    )
    huber = torch.nn.functional.huber_loss(
        residual, torch.zeros_like(residual), reduction="none", delta=delta
    )
    torch.testing.assert_close(found, huber, rtol=0, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_log_sum_penalty_is_a_special_case(epsilon):
    found = robust_objective(lambda x: epsilon / (epsilon + x), LOSS)
    expected = epsilon * torch.log1p(LOSS / epsilon)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
