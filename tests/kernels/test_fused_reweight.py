"""The fused step against the definition in float64, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import mentorch
from mentorch.kernels import fused
from mentorch.kernels import reweight as module
from mentorch.kernels.backend import INTERPRETED, tickets
from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.history import new_history
from mentorch.kernels.mentor import ClosedForm
from mentorch.kernels.reweight import reweight, reweight_ref
from mentorch.kernels.weigh import Plan

from .fused_run import Run, cast, draw, mentor

pytestmark = pytest.mark.usefixtures("device")

# As in test_fused_cross_entropy.py, all three.
BATCHES = [1, 2, 15, 16, 33, 150] if INTERPRETED else [1, 2, 63, 64, 127, 1000]
CLASSES = [1, 2, 10, 100, 1000, 1001, 21841]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = [
    (batch, classes, dtype)
    for b, batch in enumerate(BATCHES)
    for c, classes in enumerate(CLASSES)
    for d, dtype in enumerate(DTYPES)
    if not INTERPRETED or d == (b + 2 * c) % 3
]
FEW = 33 if INTERPRETED else 70  # two programs of 32 rows, the last not full, or several
COINS = ExampleDropout(20, 0.5, 0.3)
EXACT = ExampleDropout(20, 0.5, 0.3, exact=True)
LINEAR = ClosedForm("linear", lambda2=3.0)


@pytest.mark.parametrize(("batch", "classes", "dtype"), GRID, ids=str)
def test_grid(batch, classes, dtype, device):
    """Curricula, dropout and the lagged form take turns over the sizes: each meets every size."""
    turn = len(CLASSES) * BATCHES.index(batch) + CLASSES.index(classes)
    curriculum = [LINEAR, mentor(), ClosedForm("focal")][turn % 3]
    logits, labels = draw(batch, classes, dtype)
    if batch > 8:
        labels[3] = -100
        logits[3] = math.nan  # an ignored row leaves no trace
    run = Run(
        curriculum, device, dropout=[COINS, EXACT, None][turn // 3 % 3],
        moving_avg="lagged" if turn % 2 else "updated", one_launch=turn % 4 < 2,
        label_smoothing=0.1 if turn % 5 == 0 else 0.0,
    )  # fmt: skip
    run.step(logits, labels)


@pytest.mark.parametrize("moving_avg", ["updated", "lagged"])
@pytest.mark.parametrize("kind", ["uniform", "self_paced", "linear", "focal", "hard_example"])
def test_closed_forms(kind, moving_avg, device):
    for form in (
        ClosedForm(kind, lambda1=0.3, lambda2=0.0, gamma=0.0),
        ClosedForm(kind, lambda1=0.2, lambda2=2.0, gamma=0.5, on="loss"),
    ):
        run = Run(form, device, moving_avg=moving_avg)
        for seed in range(3):
            run.step(*draw(FEW, 12, seed=seed))


@pytest.mark.parametrize("moving_avg", ["updated", "lagged"])
@pytest.mark.parametrize("step", [0, 18, 19, 89, 90, 99])  # the ends of its three parts
def test_the_released_mixture(step, moving_avg, device):
    for form in (
        ClosedForm("pd_mixture"),
        ClosedForm("pd_mixture", lambda1=1.3, lambda2=2.0, on="loss"),
        ClosedForm("pd_mixture", lambda1=0.2, lambda2=0.0),
    ):
        run = Run(form, device, step=step, moving_avg=moving_avg)
        found, _ = run.step(*draw(FEW, 12))
        if 18 < step < 90 or form.lambda2 == 0:
            assert set(found.sample_weight.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("units", "hidden", "use_label", "output", "steps"),
    [
        (1, 20, False, "c", 1),  # as released
        (1, 20, False, "c", 5),
        (1, 1, True, "h", 2),  # nothing to sum over
        (3, 33, True, "h", 3),  # padded to powers of two
        (16, 64, False, "h", 1),
    ],
)
def test_mentornets(units, hidden, use_label, output, steps, device):
    rows = 33 if INTERPRETED else 65  # two tiles of samples of the widest nets, or of all
    net = mentor(units, hidden, labels=12, use_label=use_label, output=output)
    history = new_history(200, steps) if steps > 1 else None
    run = Run(net, device, history=history, dropout=COINS)
    for visit in range(steps + 2):  # from an empty history to a full one that has moved on
        logits, labels = draw(rows, 12, seed=visit)
        labels[2] = -100
        ids = torch.randperm(90 * rows // 65, generator=torch.Generator().manual_seed(visit))
        run.step(logits, labels, ids[:rows])


def test_the_history_of_all_kinds_of_rows(device):
    logits, labels = draw(7, 5)
    labels[1] = -100  # ignored: not kept
    logits[2] = math.nan  # its weight shows NaN, its visit is not kept
    logits[3, labels[3]] = -math.inf  # an infinite loss: neither
    ids = torch.tensor([8, 3, 5, 6, -1, 0, 9])  # −1: a sample without a number
    table = new_history(10, 3)
    table[5] = 1.0
    run = Run(ClosedForm("linear"), device, history=table)
    run.step(logits, labels, ids)
    kept = run.tables[0][:-1, -1, 0].isfinite().nonzero().flatten().tolist()
    assert kept == [0, 5, 8, 9]  # 5 as it was
    assert run.tables[0][5].eq(1).all()


def test_a_sample_id_beyond_the_history_shows_as_nan(device):
    logits, labels = draw(4, 5)
    labels[3] = -100
    for step in (3, 50):  # in burn-in too
        for options in ({"dropout": COINS}, {"moving_avg": "lagged"}):
            run = Run(LINEAR, device, step=step, history=new_history(10, 2), **options)
            out, _ = run.step(logits, labels, torch.tensor([0, 1, 10, 11]))
            assert out.sample_weight.isnan().tolist() == [False, False, True, False]
            assert out.loss.isnan()


def test_strided_sample_ids(device):
    logits, labels = draw(30, 5)
    ids = torch.stack([torch.arange(30), torch.arange(30) + 60], 1)[:, 1]
    run = Run(mentor(), device, history=new_history(100, 2), dropout=COINS)
    for _ in range(2):
        run.step(logits, labels, ids)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_any_seed_of_64_bits(seed, device):
    Run(ClosedForm("uniform"), device, dropout=COINS, seed=seed).step(*draw(50, 3))


def test_bad_arguments_are_refused(device):
    logits, labels = (t.to(device) for t in draw(4, 5))
    avg = torch.zeros((), device=device)
    with pytest.raises(ValueError, match="step must be a tensor"):
        reweight(logits, labels, LINEAR, avg, total_steps=1, step=3, advance=True)
    across = new_history(2, 5, device).transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        reweight(logits, labels, LINEAR, avg, total_steps=1, history=across)
    with pytest.raises(ValueError, match=r"sample_ids .* meta.*criterion.to\(device\)"):
        reweight(logits, labels, LINEAR, avg, total_steps=1, sample_ids=labels.to("meta"))


MASKS = [
    (step, batch, moving_avg)
    for s, step in enumerate([3, 50, 97])  # burn-in, after it, and the end
    for b, batch in enumerate([1, 50, 129, 1100])  # 1100: two tiles of samples
    for m, moving_avg in enumerate(["updated", "lagged"])
    if not INTERPRETED or m == (s + b) % 2  # there every two of the three meet
]


@pytest.mark.parametrize(("step", "batch", "moving_avg"), MASKS)
def test_the_same_mask_as_the_reference(step, batch, moving_avg, device):
    logits, labels = draw(batch, 3)
    labels[::7] = -100
    labels[0] = 1
    ids = torch.arange(batch) * (2**33 + 1)  # both words of the counter
    three = {"burn_in_rate_pct": 17, "late_pct": 95, "late_rate": 0.8}
    released = [ExampleDropout(18, 0.5, 0.05, exact, **three) for exact in (False, True)]
    for dropout in (COINS, EXACT, ExampleDropout(20, 0.9, 0.05, exact=True), *released):
        run = Run(ClosedForm("uniform"), device, step=step, dropout=dropout, moving_avg=moving_avg)
        found, _ = run.step(logits, labels, ids)
        assert set(found.sample_weight.unique().tolist()) <= {0.0, 1.0}
    tied, _ = Run(ClosedForm("uniform"), device, step=step, dropout=EXACT).step(
        logits, labels, torch.full((batch,), 5)
    )
    valid = labels != -100
    rate = 0.5 if step < 20 else 0.3
    kept = tied.sample_weight.cpu()[valid]
    count = math.floor(int(valid.sum()) * (1 - rate) + 1e-6)
    assert kept.sum() == count
    assert kept[:count].all()  # of equal coins the first rows


def test_a_frozen_epoch(device):
    """Late in training a net that is told 18% at most answers as it does at 18%."""
    logits, labels = draw(50, 3)
    net = mentor()
    frozen, _ = Run(net._replace(last_epoch_pct=18), device, step=90).step(logits, labels)
    then, _ = Run(net, device, step=18).step(logits, labels)
    now, _ = Run(net, device, step=90).step(logits, labels)
    assert torch.equal(frozen.sample_weight, then.sample_weight)
    assert not torch.equal(frozen.sample_weight, now.sample_weight)


FORMS = {  # of the step: how the gradient comes to be
    "two launches": {},
    "row by row": {"moving_avg": "lagged"},
    "on the chip": {"one_launch": True},
}


@pytest.mark.parametrize("upstream", [1.0, 1024.0, 0.0, -0.5])
@pytest.mark.parametrize("ignored", [0, 1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_upstream_gradients_and_ignored_rows(form, ignored, upstream, device):
    """A gradient is right also where it was written at another scale than is wanted."""
    logits, labels = draw(5, 17)
    labels[:ignored] = -100
    Run(LINEAR, device, upstream=upstream, **FORMS[form]).step(logits, labels)


@pytest.mark.parametrize("form", FORMS)
def test_backward_twice_over_one_graph(form, device):
    logits, labels = draw(6, 9)
    z = logits.to(device).requires_grad_()
    avg = torch.tensor(0.5, device=device)
    out = reweight(z, labels.to(device), LINEAR, avg, total_steps=1, **FORMS[form])
    first = torch.autograd.grad(out.loss * 3, z, retain_graph=True)[0].clone()
    second = torch.autograd.grad(out.loss, z, retain_graph=True)[0].clone()
    third = torch.autograd.grad(out.loss * 3, z)[0]
    torch.testing.assert_close(first, 3 * second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("moving_avg", ["updated", "lagged"])
def test_lagged_means_the_average_before_the_batch(moving_avg, device):
    logits, labels = draw(8, 4)
    avg = torch.tensor(-100.0, device=device)  # before: every loss lies far above it
    form = ClosedForm("self_paced")
    out = reweight(
        logits.to(device), labels.to(device), form, avg, total_steps=1, decay=0.0,
        loss_percentile=1.0, moving_avg=moving_avg,
    )  # fmt: skip
    assert out.sample_weight.sum() == (8 if moving_avg == "updated" else 0)
    assert avg == -100.0  # not without `advance`


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["linear", "mentor"])
def test_split_rows(name, splits, device):
    curriculum = {"linear": LINEAR, "mentor": mentor()}[name]
    logits, labels = draw(5, 21841)
    labels[3] = -100
    z, y = logits.to(device), labels.to(device)
    plan = Plan.of(
        curriculum, None, 1, loss_percentile=0.5, decay=0.9, label_smoothing=0.0, lagged=False,
        advance=False,
    )  # fmt: skip
    avg, step = torch.tensor(9.0), torch.tensor(0)
    theta = module._theta(cast(curriculum, device))
    state = fused.State(avg.to(device), step.to(device), None, None, None, theta)
    found = fused.launch_step(z, y, state, fused.Numbers(10, 0, 0, -100), plan, splits=splits)
    expected = reweight_ref(
        logits, labels, curriculum, avg, loss_percentile=0.5, decay=0.9, total_steps=10, step=step
    )
    torch.testing.assert_close(found.total.cpu(), expected.loss)
    torch.testing.assert_close(found.weight.cpu(), expected.sample_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.new_avg.cpu(), expected.loss_moving_avg)


@pytest.mark.parametrize("lagged", [True, False])
@pytest.mark.parametrize("classes", [10, 1000, 21841])
def test_one_launch_writes_the_gradient_itself(classes, lagged, device):
    """Backward would put a wrong one right, at the price of the pass that was to be saved."""
    logits, labels, *rest = arguments(device, LINEAR, lagged, classes)
    state, numbers, plan = fused.parts(tuple(rest))
    before = state.loss_moving_avg.clone(), state.step.clone()
    out, grad, written = fused.launch_one_pass(logits, labels, state, numbers, plan)
    assert written == 1 / 6
    z = logits.clone().requires_grad_()
    expected = reweight_ref(
        z, labels, LINEAR, before[0], step=before[1], dropout=COINS, seed=3, total_steps=100,
        label_smoothing=0.1, moving_avg="lagged" if lagged else "updated",
        sample_ids=state.sample_ids,
    )  # fmt: skip
    torch.testing.assert_close(out.total, expected.loss.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.loss, z)[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_counters_are_zero_again(form, device):
    """Or the next launch on the stream would take the wrong program for the last one."""
    for batch in (3, 70):
        Run(LINEAR, device, **FORMS[form]).step(*draw(batch, 1000))
        assert not tickets(torch.empty(0, device=device).device).any()  # "cuda" is not "cuda:0"


def test_a_batch_too_large_for_the_chip_takes_two_launches(device, monkeypatch):
    monkeypatch.setattr(fused, "resident_tile", lambda *_: None)
    Run(LINEAR, device, one_launch=True).step(*draw(6, 9))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["wide", "odd", "transposed", "inside a line"])
def test_layouts(layout, form, device):
    logits, labels = draw(6, 1003, torch.bfloat16)
    logits = {
        "wide": lambda z: torch.cat([z, z], 1)[:, :1000],
        "odd": lambda z: z[:, :1000],
        "transposed": lambda z: z.t().contiguous().t(),
        "inside a line": lambda z: z[:, 3:],
    }[layout](logits.to(device))
    labels = labels % logits.shape[1]
    found, expected = (
        function(
            logits.detach().requires_grad_(), labels.to(device), LINEAR,
            torch.tensor(5.0, device=device), total_steps=1, **FORMS[form],
        )
        for function in (reweight, reweight_ref)
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_results_repeat_bit_by_bit(device):
    logits, labels = draw(100 if INTERPRETED else 300, 37)  # two tiles of samples, or more
    runs = [Run(mentor(), device, dropout=EXACT).step(logits, labels) for _ in range(2)]
    for a, b in zip(*([*out, gradient] for out, gradient in runs), strict=True):
        assert torch.equal(a, b)


def test_a_row_of_nan(device):
    logits, labels = draw(40, 9)
    logits[4] = math.nan
    for form in (LINEAR, mentor(), ClosedForm("focal")):
        found, gradient = Run(form, device).step(logits, labels)
        assert found.loss.isnan()
        assert torch.equal(gradient.isnan().any(1).cpu(), torch.arange(40) == 4)


def test_labels_out_of_range_show_as_nan(device):
    logits, labels = draw(6, 5)
    labels[2] = 5
    for moving_avg in ("updated", "lagged"):
        z = logits.to(device).requires_grad_()
        out = reweight(
            z, labels.to(device), mentor(labels=5, use_label=True),
            torch.tensor(1.0, device=device), total_steps=1, moving_avg=moving_avg,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.isnan()
        assert z.grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


# ---- As torch sees it ---------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """The operators that ran, but for those that only allocate or look at memory."""

    FREE = ("empty", "detach", "view", "alias", "slice", "select", "expand")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not any(word in name for word in self.FREE):
            self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("two launches", ["mentorch.reweight_step", "mentorch.cross_entropy_gradient"]),
        ("row by row", ["mentorch.reweight_one_pass", "mentorch.correct_gradient"]),
        ("on the chip", ["mentorch.reweight_one_pass", "mentorch.correct_gradient"]),
    ],
)
@pytest.mark.parametrize("curriculum", ["linear", "pd"])
def test_a_step_of_the_module_is_two_operators(curriculum, form, expected, device):
    """State, progress, dropout and row numbers included; each operator is one launch."""
    criterion = mentorch.Reweight(curriculum, total_steps=10, **FORMS[form]).to(device)
    logits, labels = draw(8, 5)
    logits, labels = logits.to(device).requires_grad_(), labels.to(device)
    with Operators() as operators:
        loss = criterion(logits, labels)
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert [n for n in operators.names if n != "aten.ones_like"] == expected
    assert criterion.step == 1


def arguments(device, curriculum, lagged, classes=10):
    logits, labels = draw(6, classes)
    plan = Plan.of(
        curriculum, COINS, 3, loss_percentile=0.75, decay=0.95, label_smoothing=0.1, lagged=lagged,
        advance=True,
    )  # fmt: skip
    average, step = torch.tensor(1.0, device=device), torch.tensor(3, device=device)
    ids = torch.arange(6, device=device)
    state = (average, step, new_history(50, 3, device), None, ids)
    theta = module._theta(cast(curriculum, device))
    numbers = fused.Numbers(100, 0, 3, -100)
    plan_values = [getattr(plan, name) for name in fused.PLAN_FIELDS]
    return logits.to(device), labels.to(device), *state, theta, *numbers, *plan_values


@pytest.mark.parametrize("curriculum", [LINEAR, mentor()], ids=["linear", "mentor"])
def test_opcheck(curriculum, device):
    library.opcheck(fused.reweight_step, arguments(device, curriculum, False))
    library.opcheck(fused.reweight_one_pass, arguments(device, curriculum, True))
    logits, labels, *rest = arguments(device, curriculum, False)
    library.opcheck(fused.present_losses, (logits, labels, -100, 0.1))
    loss, lse, present = fused.present_losses(logits, labels, -100, 0.1)
    everyone, ids = present.repeat(2), torch.arange(12, device=device)
    for bases in (None, torch.ones_like(everyone)):
        library.opcheck(fused.weigh, (loss, lse, everyone, ids, bases, labels, *rest))
    grad, scalar = torch.zeros_like(logits), torch.tensor(2.0, device=device)
    library.opcheck(
        fused.correct_gradient,
        (grad, scalar, logits, labels, lse, loss, scalar.clone(), scalar.clone(), -100, 0.1),
    )


@pytest.mark.parametrize("form", [*FORMS, "by class"])
def test_compiles_as_one_graph(form, device):
    by_class = {"percentile_of": "class", "num_classes": 10}
    options = {"history_steps": 3, "num_samples": 50, **FORMS.get(form, by_class)}
    eager, compiled = (
        mentorch.Reweight("pd", total_steps=10, **options).to(device) for _ in range(2)
    )
    graph = torch.compile(lambda z, y, i: compiled(z * 2, y, i), fullgraph=True)
    ids = torch.arange(6, device=device)
    for seed in range(3):
        logits, labels = (t.to(device) for t in draw(6, 10, seed=seed))
        results = []
        for function in (lambda z, y, i: eager(z * 2, y, i), graph):
            z = logits.clone().requires_grad_()
            loss = function(z, labels, ids)
            results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
        torch.testing.assert_close(*results)
    for name, expected in eager.state_dict().items():
        found = compiled.state_dict()[name]
        if name == "history":  # its last row is scratch
            expected, found = expected[:-1], found[:-1]
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_loss_may_be_scaled_in_place(device):
    logits, labels = draw(6, 4)
    z = logits.to(device).requires_grad_()
    loss = reweight(
        z, labels.to(device), LINEAR, torch.zeros((), device=device), total_steps=1
    ).loss
    loss /= 4  # gradient accumulation as people write it
    loss.backward()
    assert z.grad.any()


def test_a_second_derivative_is_refused(device):
    logits, labels = draw(3, 4)
    z = logits.to(device).requires_grad_()
    for moving_avg in ("updated", "lagged"):
        loss = reweight(
            z, labels.to(device), LINEAR, torch.ones((), device=device), total_steps=1,
            moving_avg=moving_avg,
        ).loss  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_without_a_gradient_none_is_written(device):
    logits, labels = (t.to(device) for t in draw(6, 4))
    avg, step = torch.tensor(0.0, device=device), torch.tensor(0, device=device)
    with Operators() as operators:
        reweight(logits, labels, LINEAR, avg, moving_avg="lagged", total_steps=1, step=step)
    assert operators.names == ["mentorch.reweight_step"]
