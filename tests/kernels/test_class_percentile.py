"""The percentile by class against a loop over Python's lists."""

from collections import deque

import pytest
import torch

from mentorch import Reweight
from mentorch.kernels import reweight as module
from mentorch.kernels.class_percentile import (
    class_percentile,
    new_class_losses,
    remember_losses,
)
from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.history import new_history
from mentorch.kernels.mentor import ClosedForm
from mentorch.kernels.percentile import percentile_ref
from mentorch.kernels.reweight import reweight

from .fused_run import Run, mentor
from .fused_run import draw as draw_logits

WINDOW = 5
COINS = ExampleDropout(20, 0.5, 0.3)
EXACT = ExampleDropout(20, 0.5, 0.3, exact=True)
LINEAR = ClosedForm("linear", lambda2=3.0)


def draw(rows, classes, seed):
    """Labels of which class 0 has most, one row in eight of no class; losses, one in ten absent."""
    random = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=random).square() * classes).long()
    labels[torch.rand(rows, generator=random) < 1 / 8] = -100
    losses = torch.randn(rows, generator=random).abs()
    losses[torch.rand(rows, generator=random) < 0.1] = torch.nan
    return labels, losses


# p: the ends, the default, and 0.5, where ranks fall on ties of the rounding.
@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0])
def test_it_is_the_percentile_of_each_classs_last_losses(p):
    kept = new_class_losses(4, WINDOW, p)
    kept.share[2] = 0.3  # a class of its own mind
    last = [deque(maxlen=WINDOW) for _ in range(4)]
    for step in range(12):
        # 1 row: most classes missing; 64: class 0 has more rows than the window holds.
        labels, losses = draw((1, 7, 64)[step % 3], 4, step)
        remember_losses(kept, labels, losses)
        for label, loss in zip(labels.tolist(), losses.tolist(), strict=True):
            if label >= 0 and loss == loss:
                last[label].append(loss)
        asked = torch.tensor([0, 1, 2, 3, 3, -100, 4])
        found = class_percentile(kept, asked)
        wanted = [
            percentile_ref(torch.tensor(list(last[c])), 0.3 if c == 2 else p).item()
            if last[c]
            else float("nan")
            for c in (0, 1, 2, 3, 3)
        ]
        torch.testing.assert_close(
            found, torch.tensor([*wanted, torch.nan, torch.nan]), rtol=0, atol=0, equal_nan=True
        )
        # Rows fewer than classes go another way.
        alone = torch.cat([class_percentile(kept, label) for label in asked.split(1)])
        torch.testing.assert_close(alone, found, rtol=0, atol=0, equal_nan=True)


def test_the_oldest_loss_makes_room():
    kept = new_class_losses(1, 3, 1.0)
    for loss in (9.0, 1.0, 2.0, 3.0):
        remember_losses(kept, torch.tensor([0]), torch.tensor([loss]))
    assert class_percentile(kept, torch.tensor([0])).item() == 3.0


@pytest.mark.parametrize(("classes", "window"), [(0, 5), (3, 0)])
def test_sizes_below_one_are_refused(classes, window):
    with pytest.raises(ValueError, match="at least 1"):
        new_class_losses(classes, window, 0.5)


def step(kept, logits, labels, **options):
    return reweight(
        logits, labels, ClosedForm("self_paced"), torch.zeros(()), torch.tensor(50),
        loss_percentile=0.5, class_losses=kept, **options,
    )  # fmt: skip


def test_a_rare_class_keeps_its_share():
    """Class 1 has losses that are all above those of class 0: over the batch none would stay."""
    labels = torch.tensor([0] * 8 + [1] * 4)
    logits = torch.zeros(12, 2)
    logits[:8, 0] = torch.linspace(3, 4, 8)
    logits[8:, 0] = torch.linspace(1, 2, 4)
    by_batch = step(None, logits, labels).sample_weight
    by_class = step(new_class_losses(2, 16, 0.5), logits, labels).sample_weight
    assert by_batch[8:].sum() == 0
    assert by_class[:8].sum() == 4
    assert by_class[8:].sum() == 2


def test_gradients_and_ignored_rows():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, -100, 2, 1, 0])
    kept = new_class_losses(3, 4, 0.5)
    out = step(kept, logits, labels)
    out.loss.backward()
    assert out.sample_weight[2] == 0
    assert kept.seen.tolist()[:3] == [2, 2, 1]
    wanted = out.sample_weight / 5
    softmax = logits.detach().softmax(1)
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), 3)
    torch.testing.assert_close(logits.grad, wanted[:, None] * (softmax - hot))


@pytest.mark.parametrize("dropout", [None, COINS, EXACT], ids=["none", "coins", "exact"])
# Fewer rows than classes, and more; the larger numbers are two tiles of samples, and three.
@pytest.mark.parametrize(
    ("name", "rows"), [("linear", 33), ("linear", 1100), ("mentor", 33), ("mentor", 150)]
)
def test_the_fused_form_is_the_definition(name, rows, dropout, device):
    """As many steps as fill a window of 8, so that the oldest losses go."""
    net = {"linear": LINEAR, "mentor": mentor()}[name]
    history = new_history(1200, 3) if name == "mentor" else None
    run = Run(net, device, history=history, dropout=dropout, windows=(40, 8))
    for seed in range(5):
        logits, labels = draw_logits(rows, 40, torch.bfloat16 if seed % 2 else torch.float32, seed)
        labels = labels**2 // 40  # rare classes, and such as have more rows than the window
        labels[2] = -100
        ids = torch.randperm(1190, generator=torch.Generator().manual_seed(seed))[:rows]
        run.step(logits, labels, ids)
    here, there = run.kept
    assert torch.equal(here.seen[:-1].cpu(), there.seen[:-1])
    torch.testing.assert_close(
        here.window[:-1].cpu(), there.window[:-1], rtol=1e-5, atol=1e-5, equal_nan=True
    )


def test_a_step_by_class_is_fused(device, monkeypatch):
    """Where kernels run, the definition's hundreds of launches do not."""
    monkeypatch.setattr(module, "reweight_ref", lambda *_, **__: pytest.fail("not fused"))
    criterion = Reweight("pd", total_steps=9, percentile_of="class", num_classes=3).to(device)
    labels = torch.tensor([0, 1, 2, 1], device=device)
    assert criterion(torch.randn(4, 3, device=device), labels).isfinite()
    assert criterion.class_seen[:3].tolist() == [1, 2, 1]


def test_what_does_not_go_together_is_refused():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="num_classes=3"):
        step(new_class_losses(2, 4, 0.5), logits, labels)
    with pytest.raises(ValueError, match="lagged"):
        step(new_class_losses(3, 4, 0.5), logits, labels, moving_avg="lagged")
