"""Algorithm 1, line 9: weights as variables that descend along G."""

import pytest
import torch
import torch.nn.functional as F

from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.reweight import Reweight
from mentorch.kernels.mentor import ClosedForm

N, C = 12, 4
LINEAR = ClosedForm("linear", lambda1=0.5, lambda2=1.5, on="loss")
PLAIN = {"total_steps": 10, "burn_in": 0.0}


def _batch(seed=0, rows=8):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, C, generator=generator)
    labels = torch.randint(C, (rows,), generator=generator)
    return logits, labels, torch.randperm(N, generator=generator)[:rows]


@pytest.mark.parametrize("on", ["loss", "loss_diff"])
def test_one_newton_step_is_the_optimum(on):
    """With α = 1/λ2 line 9 lands on Eq. 7: it is line 11 then."""
    form = ClosedForm("linear", lambda1=0.5, lambda2=1.5, on=on)
    latent = LatentReweight(form, num_samples=N, weight_lr=1 / 1.5, **PLAIN)
    direct = Reweight(form, **PLAIN)
    for seed in range(3):
        logits, labels, index = _batch(seed)
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        out, expected = latent.weigh(ours, labels, index), direct.weigh(theirs, labels, index)
        assert torch.allclose(out.sample_weight, expected.sample_weight, atol=1e-6)
        assert out.loss_moving_avg == expected.loss_moving_avg
        out.loss.backward()
        expected.loss.backward()
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_the_update_is_projected_gradient_descent():
    criterion = LatentReweight(LINEAR, num_samples=N, weight_lr=0.2, power=0.75, **PLAIN)
    v, visits = torch.ones(N), torch.zeros(N)
    for seed in range(4):
        logits, labels, index = _batch(seed)
        loss = F.cross_entropy(logits, labels, reduction="none")
        for row, i in enumerate(index.tolist()):
            rate = 0.2 / (1 + visits[i]) ** 0.75
            slope = loss[row] + 1.5 * v[i] - (0.5 + 1.5)
            v[i] = (v[i] - rate * slope).clamp(0, 1)
            visits[i] += 1
        out = criterion.weigh(logits, labels, index)
        assert torch.allclose(criterion.sample_weights[:-1], v, atol=1e-6)
        assert torch.allclose(out.sample_weight, v[index], atol=1e-6)
        assert out.loss.item() == pytest.approx((v[index] * loss).mean().item(), rel=1e-5)
    assert ((v > 0) & (v < 1)).any(), "the test should see weights in between"


def test_converges_to_the_optimum_for_fixed_losses():
    """What Theorem 1 asks of the steps, Σα = ∞ and Σα² < ∞, brings v to Eq. 7."""
    criterion = LatentReweight(LINEAR, num_samples=N, weight_lr=0.5, power=0.6, **PLAIN)
    logits, labels, index = _batch()
    for _ in range(400):
        out = criterion.weigh(logits, labels, index)
    expected = (1 - (out.sample_loss - 0.5) / 1.5).clamp(0, 1)
    assert torch.allclose(out.sample_weight, expected, atol=1e-3)


def test_self_paced_moves_at_constant_speed():
    form = ClosedForm("self_paced", lambda1=0.7, on="loss")
    criterion = LatentReweight(form, num_samples=N, weight_lr=0.1, **PLAIN)
    logits, labels, index = _batch()
    out = criterion.weigh(logits, labels, index)
    expected = (1 - 0.1 * (out.sample_loss - 0.7)).clamp(0, 1)
    assert torch.allclose(out.sample_weight, expected)


def test_burn_in_and_ignored_rows_leave_v_alone():
    criterion = LatentReweight(
        LINEAR, num_samples=N, weight_lr=0.3, total_steps=10, burn_in=0.2, burn_in_dropout=0.5
    )
    logits, labels, index = _batch()
    for _ in range(2):
        out = criterion.weigh(logits, labels, index)
        assert set(out.sample_weight.tolist()) <= {0.0, 1.0}
    assert (criterion.sample_weights[:-1] == 1).all()
    labels[3], index[5] = -100, -1
    labels[5] = -100
    logits[3] = torch.nan
    out = criterion.weigh(logits.requires_grad_(), labels, index)
    out.loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert criterion.sample_weights[index[3]] == 1
    moved = criterion.visits[:-1].nonzero().flatten().tolist()
    assert moved == sorted(i for row, i in enumerate(index.tolist()) if row not in (3, 5))


def test_resumes_exactly():
    first = LatentReweight(LINEAR, num_samples=N, weight_lr=0.2, **PLAIN)
    first.weigh(*_batch(0))
    second = LatentReweight(LINEAR, num_samples=N, weight_lr=0.2, **PLAIN)
    second.load_state_dict(first.state_dict())
    assert torch.equal(
        first.weigh(*_batch(1)).sample_weight, second.weigh(*_batch(1)).sample_weight
    )


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="has no G"):
        LatentReweight(ClosedForm("focal"), num_samples=N, weight_lr=0.1, **PLAIN)
    with pytest.raises(ValueError, match="weight_lr"):
        LatentReweight(LINEAR, num_samples=N, weight_lr=0.0, **PLAIN)
    with pytest.raises(ValueError, match="index"):
        LatentReweight(LINEAR, num_samples=N, weight_lr=0.1, **PLAIN)(*_batch()[:2])
