"""Logits of text and of segmentation: what a flattened call finds, in the labels' shape."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mentorch.engine.baselines import Bootstrap, GeneralisedCrossEntropy, NoiseLayer
from mentorch.engine.data_driven import DataDriven, Trusted
from mentorch.engine.distributed import distributed
from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.mentor import MentorNet
from mentorch.engine.reweight import Reweight
from mentorch.kernels.mentor import ClosedForm

C = 5
# A step of burn-in with its dropout, then the curriculum.
STEPS = {"total_steps": 4, "burn_in": 0.25, "example_dropout": 0.25}
N = 24  # samples: the labels of the largest layout
THREE_STEPS = range(3)  # of which the last has a past that is not burn-in's


# The labels' shape, and class_dim. No two sizes of a shape are equal, nor equal to C.
LAYOUTS = {
    "text": ((4, 6), -1),
    "text_second": ((4, 6), 1),
    "image": ((2, 3, 4), 1),
    "one_image": ((1, 3, 4), 1),  # its rows are no copy, but their classes lie apart
    "volume": ((2, 1, 3, 4), 1),
    "classes_first": ((4, 6), 0),
    "single": ((), 1),  # [C], one sample without a batch
}


def _batch(layout, step=0, dtype=torch.float32):
    """Logits and labels; where there are enough labels, a third of them is ignored."""
    shape, dim = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(step)
    flat = torch.randn(*shape, C, generator=generator, dtype=dtype) * 2
    labels = torch.randint(C, shape, generator=generator)
    if shape:
        flat_labels = labels.view(-1)
        flat_labels[torch.randperm(len(flat_labels), generator=generator)[::3]] = -100
        flat = flat.movedim(-1, dim).contiguous()
    return flat, labels


def _flattened(logits, labels, layout):
    """The call that is known to be right, written out."""
    dim = LAYOUTS[layout][1] if labels.ndim else 0
    return logits.movedim(dim, -1).reshape(-1, C), labels.flatten()


def _seeded(make, *arguments, **options):
    """What has a MentorNet is drawn at random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **options)


CRITERIA = {
    "linear": lambda **rest: Reweight("linear", **STEPS, **rest),
    "lagged": lambda **rest: Reweight("linear", moving_avg="lagged", **STEPS, **rest),
    "history": lambda **rest: Reweight(
        _seeded(MentorNet), history_steps=3, num_samples=N, **STEPS, **rest
    ),
    "exact": lambda **rest: Reweight("self_paced", exact_dropout=True, **STEPS, **rest),
    "latent": lambda **rest: LatentReweight(
        ClosedForm("linear"), num_samples=N, weight_lr=0.3, **STEPS, **rest
    ),
    "data_driven": lambda **rest: _seeded(
        DataDriven,
        Trusted(torch.arange(4), torch.tensor([True, False, True, False])),
        num_samples=N,
        **STEPS,
        **rest,
    ),
    "reed_soft": lambda **rest: Bootstrap("soft", **rest),
    "reed_hard": lambda **rest: Bootstrap("hard", **rest),
    "noise_layer": lambda **rest: NoiseLayer(C, **rest),
    "gce": lambda **rest: GeneralisedCrossEntropy(**rest),
}


def _step(criterion, logits, labels, ids):
    """What a step found, and the gradient with respect to the logits as they were given."""
    leaf = logits.clone().requires_grad_()
    out = criterion.weigh(leaf, labels, ids)
    out.loss.backward()
    return out, leaf.grad


# ---------------------------------------------------------------- training


# The layouts do not see the dtype: one of them in float64 too.
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, torch.float32) for layout in LAYOUTS), ("image", torch.float64)],
)
@pytest.mark.parametrize("name", CRITERIA)
def test_a_step_is_that_of_the_flattened_call_to_the_last_bit(name, layout, dtype):
    ours, theirs = CRITERIA[name](class_dim=LAYOUTS[layout][1]), CRITERIA[name]()
    for step in THREE_STEPS:
        logits, labels = _batch(layout, step, dtype)
        ids = torch.randperm(N)[: labels.numel()]
        flat_logits, flat_labels = _flattened(logits, labels, layout)
        out, grad = _step(ours, logits, labels, ids.view(labels.shape))
        expected, flat_grad = _step(theirs, flat_logits, flat_labels, ids)
        assert out.sample_loss.shape == out.sample_weight.shape == labels.shape
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.sample_loss.flatten(), expected.sample_loss)
        assert torch.equal(out.sample_weight.flatten(), expected.sample_weight)
        assert torch.equal(_flattened(grad, labels, layout)[0], flat_grad)
        assert grad.shape == logits.shape
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key].nan_to_num(-1), value.nan_to_num(-1)), key


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_segmentation_against_the_definition_in_float64(memory_format):
    """Σ v ℓ over the pixels that count, with v = 1[ℓ < ℓ_pt] after the first update of ℓ_pt."""
    logits, labels = _batch("image", dtype=torch.float64)
    logits = logits.to(memory_format=memory_format).requires_grad_()
    criterion = Reweight(ClosedForm("self_paced", lambda1=0.0, on="loss_diff"), burn_in=0, decay=0)
    out = criterion.weigh(logits, labels)
    loss = F.cross_entropy(logits, labels, reduction="none")
    there = labels != -100
    kept = there & (loss < loss[there].quantile(0.75, interpolation="nearest"))
    assert 0 < kept.sum() < there.sum() < labels.numel()
    torch.testing.assert_close(out.sample_loss, loss.detach(), rtol=1e-12, atol=1e-12)
    expected = (loss * kept).sum() / there.sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)  # ℓ_pt is float32
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in (out.loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
def test_void_pixels_count_nowhere(name):
    """NaN in their logits changes nothing, and they get no gradient."""
    logits, labels = _batch("image")
    void = labels == -100
    poisoned = logits.masked_fill(void.unsqueeze(1), torch.nan)
    ids = torch.arange(N).view(labels.shape)
    (out, grad), (expected, _) = (
        _step(CRITERIA[name](), given, labels, ids) for given in (poisoned, logits)
    )
    assert torch.equal(out.loss, expected.loss)
    assert not out.sample_loss[void].any()
    assert not out.sample_weight[void].any()
    assert not grad.movedim(1, -1)[void].any()
    assert grad.isfinite().all()


def test_rows_are_a_view_where_the_classes_come_last(monkeypatch):
    seen = []
    criterion = Reweight("linear", burn_in=0, class_dim=-1)
    weigh_rows = criterion.weigh_rows
    monkeypatch.setattr(
        criterion, "weigh_rows", lambda *rows: seen.append(rows) or weigh_rows(*rows)
    )
    logits, labels = _batch("text")
    criterion(logits, labels)
    assert seen[0][0].data_ptr() == logits.data_ptr()
    assert seen[0][1].data_ptr() == labels.data_ptr()
    logits, labels = logits.flatten(0, 1), labels.flatten()
    criterion(logits, labels)  # plain rows go through untouched
    assert seen[1][0] is logits
    assert seen[1][1] is labels


# ---------------------------------------------------------------- eval mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_eval_mode_it_is_cross_entropy(layout, dtype):
    dim = LAYOUTS[layout][1]
    logits, labels = _batch(layout, dtype=dtype)
    loss = Reweight("linear", burn_in=0, class_dim=dim).eval()(logits, labels)
    # For class_dim 1 the very same call, otherwise that of the flattened rows.
    given = (logits, labels) if dim == 1 else _flattened(logits, labels, layout)
    assert torch.equal(loss, F.cross_entropy(*given))


# ---------------------------------------------------------------- index


def test_ids_may_be_flat_or_shaped_and_decide_the_coins():
    logits, labels = _batch("text")
    ids = torch.arange(24) + 100
    shaped, flat, other = (
        CRITERIA["linear"](class_dim=-1).weigh(logits, labels, index).sample_weight
        for index in (ids.view(4, 6), ids, ids.flip(0))
    )
    assert torch.equal(shaped, flat)
    assert not torch.equal(shaped, other)


@pytest.mark.parametrize("name", CRITERIA)
def test_an_id_of_a_sequence_is_refused(name):
    """Repeated over its tokens it would be a sample that comes often in one batch."""
    logits, labels = _batch("text")
    criterion = CRITERIA[name](class_dim=-1)
    for index in (torch.arange(4), torch.arange(4).view(4, 1), torch.arange(6)):
        with pytest.raises(ValueError, match=r"\[4, 6\], but is .*an id of its own"):
            criterion(logits, labels, index)
    assert criterion.loss_moving_avg == 0


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["linear", "gce"])
@pytest.mark.parametrize(
    ("logits", "labels", "class_dim"),
    [
        ([4, 6, C], [4, 6], 1),  # text with the default
        ([4, C, 6], [4, 6], -1),
        ([2, C, 3, 4], [2, 4, 3], 1),
        ([2, C, 3, 4], [24], 1),  # labels flat, logits not
        ([24, C], [4, 6], 1),
        ([24, C], [24, 1], 1),  # would broadcast
        ([4, 6, C], [4, 6, C], -1),  # shares of the classes
        ([4, 6, C], [4, 6], 3),
        ([4, C], [4], -3),
        ([], [], 1),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, mode, logits, labels, class_dim):
    criterion = CRITERIA[name](class_dim=class_dim).train(mode == "train")
    with pytest.raises(ValueError, match="do not fit") as caught:
        criterion(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
    assert f"{logits} and {labels}: with class_dim={class_dim}" in str(caught.value)


def test_an_empty_batch_is_still_refused():
    with pytest.raises(ValueError, match="empty"):
        Reweight("linear", burn_in=0)(torch.zeros(0, C, 3), torch.zeros(0, 3, dtype=torch.int64))


# ---------------------------------------------------------------- in company


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_saved_does_not_depend_on_the_layout(name):
    saved, before = CRITERIA[name](class_dim=-1).state_dict(), CRITERIA[name]().state_dict()
    assert list(saved) == list(before)
    CRITERIA[name]().load_state_dict(saved)


def test_under_autocast_the_mathematics_is_float32():
    logits, labels = _batch("image")
    with torch.autocast("cpu", torch.bfloat16):
        inside = CRITERIA["linear"]().weigh(logits.bfloat16(), labels)
    outside = CRITERIA["linear"]().weigh(logits.bfloat16(), labels)
    assert all(map(torch.equal, inside, outside))
    assert inside.sample_loss.dtype == torch.float32


def test_compiles_as_one_graph():
    """With pixels, whose rows are a copy."""
    eager, compiled = (CRITERIA["linear"]() for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in THREE_STEPS:
        logits, labels = _batch("image", step)
        ids = torch.arange(N).view(labels.shape)
        gradients = []
        for criterion in (eager, call):
            leaf = logits.clone().requires_grad_()
            criterion(leaf, labels, ids).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(compiled.loss_moving_avg, eager.loss_moving_avg)


def _of_ranks(group, entries):
    logits, labels = _batch("image")
    criterion = Reweight("linear", burn_in=0, group=group)
    out, grad = _step(criterion, logits[entries], labels[entries], None)
    return out.sample_weight, grad, out.loss_moving_avg


def be_a_rank():
    with distributed("cpu") as world:
        return _of_ranks(dist.group.WORLD, slice(world.rank, world.rank + 1))


def test_two_ranks_with_an_image_each_are_one_batch(ranks):
    """The percentile and the mean are over the pixels of both."""
    first, second = ranks(be_a_rank).results()
    weight, grad, average = _of_ranks(None, slice(None))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), weight)
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, grad)  # as DDP averages
    assert torch.equal(first[2], average)
    assert torch.equal(second[2], average)
