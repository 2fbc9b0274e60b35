import math
import sys
import types

import pytest
import torch
from torch import nn

from mentorch.engine import optim
from mentorch.engine.config import OptimConfig
from mentorch.engine.optim import (
    add_weight_decay,
    create_optimizer,
    has_nvidia_apex,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    step_unless,
)


def _rates(config, steps_per_epoch=10, epochs=10):
    total = steps_per_epoch * epochs
    return [learning_rate(config, step, steps_per_epoch, total) for step in range(total)]


def test_cosine_after_a_linear_warmup():
    rates = _rates(OptimConfig(lr=0.4, warmup_epochs=2))
    assert rates[:20] == pytest.approx([0.4 * (i + 1) / 21 for i in range(20)])
    assert rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[-1] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_steps_at_the_milestones():
    config = OptimConfig(lr=1.0, warmup_epochs=0, schedule="step", milestones=(0.5, 0.75))
    rates = _rates(config)
    assert rates[:50] == [1.0] * 50
    assert rates[50:75] == pytest.approx([0.1] * 25)
    assert rates[75:] == pytest.approx([0.01] * 25)


def test_constant():
    config = OptimConfig(lr=0.3, warmup_epochs=0, schedule="constant")
    assert _rates(config) == [0.3] * 100


def _student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def _step(config, scale=None):
    student = _student()
    optimizer = create_optimizer(config, student)
    torch.manual_seed(1)
    student(torch.randn(8, 3, 4, 4)).square().sum().backward()
    if scale is not None:
        add_weight_decay(student, config.weight_decay, torch.tensor([8 * scale, 8.0]), 1)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_weight_decay_spares_norms_and_biases():
    optimizer = create_optimizer(OptimConfig(weight_decay=0.1), _student())
    decays = {p.ndim > 1: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {True: 0.1, False: 0.0}


def test_scaled_weight_decay_is_weight_decay_times_the_mean_weight():
    scaled = _step(OptimConfig(weight_decay=0.2, scale_weight_decay=True), scale=0.25)
    plain = _step(OptimConfig(weight_decay=0.05))
    none = _step(OptimConfig(weight_decay=0.0))
    assert torch.allclose(scaled, plain, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(scaled, none, rtol=1e-5, atol=1e-7)


def test_the_rate_is_set_in_every_group():
    optimizer = create_optimizer(OptimConfig(), _student())
    set_learning_rate(optimizer, 0.123)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.123] * 2)


def test_the_registrys_apex_is_not_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_nvidia_apex()
    with pytest.raises(ValueError, match="built from its source"):
        create_optimizer(OptimConfig(implementation="apex"), _student())
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_sgd.py").write_text("")
    assert not has_nvidia_apex(), "without its extension it cannot run"
    (tmp_path / "amp_C.py").write_text("")
    assert has_nvidia_apex()
    assert not isinstance(sys.modules.get("apex"), types.ModuleType), "it was imported to look at"


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_large_batch_optimisers_move_weights_by_their_norm(name):
    """What both are for: however large the gradient, a layer moves by a share of its norm."""
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.01, trust_coefficient=1.0)
    moved = []
    for scale in (1.0, 1e4):
        layer = nn.Linear(8, 8, bias=False)
        nn.init.eye_(layer.weight)
        optimizer = create_optimizer(config, layer)
        layer.weight.grad = scale * torch.arange(1.0, 65.0).view(8, 8)
        optimizer.step()
        moved.append((layer.weight.detach() - torch.eye(8)).norm() / torch.eye(8).norm())
    assert moved == pytest.approx([0.1, 0.1], rel=0.02)


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_a_step_with_bad_gradients_changes_nothing(name):
    student = _student()
    optimizer = create_optimizer(OptimConfig(name=name), student)
    before = [p.detach().clone() for p in student.parameters()]
    off = torch.amp.GradScaler("cpu", enabled=False)
    for bad in (True, False):
        for parameter in student.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
        step_unless(torch.tensor(bad), optimizer, off)
        same = [torch.equal(*pair) for pair in zip(before, student.parameters(), strict=True)]
        assert all(same) if bad else not any(same)
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb"])
def test_an_optimiser_goes_on_where_it_was(name):
    """Momenta, step counts and the rate; the rate of a captured step keeps its place."""
    config = OptimConfig(name=name, weight_decay=0.01)
    one, other = _student(), _student()
    first, second = create_optimizer(config, one), create_optimizer(config, other)
    place = second.param_groups[0]["lr"]
    set_learning_rate(first, 0.37)
    for student, optimizer in ((one, first), (one, first), (other, second)):
        if optimizer is second:
            other.load_state_dict(one.state_dict())
            load_optimizer_state(second, optimizer_state(first))
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(second.param_groups[1]["lr"]) == pytest.approx(0.37)
    if name == "sgd":
        assert second.param_groups[0]["lr"] is second.param_groups[1]["lr"] is place
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_apex_has_no_lars(monkeypatch):
    monkeypatch.setattr(optim, "has_nvidia_apex", lambda: True)
    assert optim._takes_apex(OptimConfig(name="lamb"), on_gpu=True)
    assert not optim._takes_apex(OptimConfig(name="lamb"), on_gpu=False)
    assert not optim._takes_apex(OptimConfig(), on_gpu=True), "apex's SGD makes the host wait"
    assert optim._takes_apex(OptimConfig(implementation="apex"), on_gpu=True)
    with pytest.raises(ValueError, match="apex has no LARS"):
        optim._takes_apex(OptimConfig(name="lars", implementation="apex"), on_gpu=True)
