"""The whole weighted step against its equations in numpy's float64, then the corner cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mentorch.kernels.class_percentile import new_class_losses
from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.mentor import ClosedForm, LstmWeights, MentorWeights
from mentorch.kernels.reweight import Reweighted, reweight, reweight_ref

LINEAR = ClosedForm("linear")
UNIFORM = ClosedForm("uniform")
EPOCH = torch.tensor(50)
SIZES = [
    (1, 1),  # nothing to learn
    (1, 10),  # one sample is its own percentile
    (5, 2),  # fewer samples than a percentile resolves
    (128, 10),  # the paper's CIFAR batch
    (33, 1001),  # odd everywhere, past a block of 1024
]


def draw(batch, classes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype), torch.randint(classes, (batch,), generator=generator)


def average(value=0.8, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


def run(logits, labels, curriculum=LINEAR, avg=None, epoch=EPOCH, **options):
    """The step and the gradient of its loss."""
    logits = logits.clone().requires_grad_()
    avg = average(dtype=torch.promote_types(logits.dtype, torch.float32)) if avg is None else avg
    out = reweight(logits, labels, curriculum, avg, epoch, **options)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out, gradient


def softmax_in_numpy(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def step_in_numpy(logits, labels, weigh, avg, p, decay):
    """ℓ, v, ℓ_pt, L and ∂L/∂z, line by line; ``weigh`` is v of (ℓ, ℓ − ℓ_pt)."""
    z, y = logits.double().numpy(), labels.numpy()
    n = len(z)
    top = z.max(1)
    loss = top + np.log(np.exp(z - top[:, None]).sum(1)) - z[np.arange(n), y]
    q = np.sort(loss)[n - 1 - round((n - 1) * (1 - p))]
    avg = decay * avg + (1 - decay) * q
    v = weigh(loss, loss - avg)
    gradient = v[:, None] * (softmax_in_numpy(z) - np.eye(z.shape[1])[y]) / n
    return loss, v, avg, (v * loss).sum() / n, gradient


def mentor(use_label=False, labels=4, units=2, output="h", dtype=torch.float64):
    """A MentorNet of random weights, and the same mathematics in numpy for T = 1 and label 0."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    directions = [
        LstmWeights(random(4 * units, 2), random(4 * units, units), random(4 * units))
        for _ in range(2)
    ]
    width = 3 + 5 + 2 * units
    return MentorWeights(
        random(labels, 3),
        random(100, 5),
        *directions,
        random(20, width) / 2,
        random(20),
        random(1, 20),
        random(1),
        use_label,
        output,
    )


def mentor_in_numpy(weights, epoch):
    w = {name: np.asarray(value) for name, value in weights._asdict().items() if "_" in name}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def weigh(loss, diff):
        z = np.stack([loss, diff], 1)
        states = []
        for lstm in (weights.forward, weights.backward):
            gates = z @ lstm.weight_ih.numpy().T + lstm.bias.numpy()
            i, _, g, o = np.split(gates, 4, axis=1)
            states.append(sigmoid(o) * np.tanh(sigmoid(i) * np.tanh(g)))
        n = len(loss)
        embedded = [w["label_embedding"][[0] * n], w["epoch_embedding"][[epoch] * n]]
        hidden = np.tanh(np.hstack([*embedded, *states]) @ w["fc1_weight"].T + w["fc1_bias"])
        return sigmoid(hidden @ w["fc2_weight"].T + w["fc2_bias"])[:, 0]

    return weigh


CURRICULA = {
    "uniform": (UNIFORM, lambda loss, d: np.ones_like(loss)),
    "self_paced": (ClosedForm("self_paced"), lambda loss, d: 1.0 * (d <= 0)),
    "linear": (LINEAR, lambda loss, d: np.clip(1 - d, 0, 1)),
    "focal": (ClosedForm("focal"), lambda loss, d: (1 - np.exp(-loss)) ** 2),
    "hard_example": (ClosedForm("hard_example"), lambda loss, d: 1.0 * (d > 0)),
    "mentor": (mentor(), mentor_in_numpy(mentor(), 50)),
}


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_the_definition(name, batch, classes):
    curriculum, weigh = CURRICULA[name]
    logits, labels = draw(batch, classes)
    p, decay = 0.6, 0.9
    out, gradient = run(logits, labels, curriculum, loss_percentile=p, decay=decay)
    loss, v, avg, total, expected = step_in_numpy(logits, labels, weigh, 0.8, p, decay)
    np.testing.assert_allclose(out.sample_loss, loss, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(out.sample_weight, v, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(out.loss_moving_avg, avg, rtol=1e-12)
    np.testing.assert_allclose(out.loss.detach(), total, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-13)


def test_the_upstream_gradient_scales_the_gradient():
    logits, labels = draw(16, 7)
    upstream = torch.randn((), dtype=torch.float64).item()
    leaf = logits.clone().requires_grad_()
    reweight(leaf, labels, LINEAR, average(), EPOCH).loss.backward(torch.tensor(upstream))
    _, gradient = run(logits, labels)
    torch.testing.assert_close(leaf.grad, gradient * upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_error_at_most_twice_that_of_eager_code(dtype, batch, classes):
    logits, labels = draw(batch, classes, dtype)
    upstream = 1.7
    _, _, _, exact_loss, exact = step_in_numpy(
        logits, labels, CURRICULA["linear"][1], 0.8, 0.75, 0.95
    )

    def eager(leaf):
        loss = F.cross_entropy(leaf, labels, reduction="none")
        kept = loss.detach()
        q = kept.sort().values[batch - 1 - round((batch - 1) * 0.25)]
        avg = torch.tensor(0.8, dtype=dtype) * 0.95 + q * 0.05
        return ((1 - (kept - avg)).clamp(0, 1) * loss).mean()

    def ours(leaf):
        return reweight(leaf, labels, LINEAR, average(dtype=torch.float32), EPOCH).loss

    errors = []
    for function in (ours, eager):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))
        gradient_error = (leaf.grad.double() - torch.from_numpy(exact) * upstream).abs().max()
        errors.append(((loss.detach().double() - exact_loss).abs(), gradient_error))
        assert leaf.grad.dtype == dtype
    (our_loss, our_gradient), (eager_loss, eager_gradient) = errors
    ulp = torch.finfo(torch.float32).eps  # float32 sums in another order
    assert our_loss <= 2 * eager_loss + ulp * exact_loss
    assert our_gradient <= 2 * eager_gradient + ulp * np.abs(exact).max()


def test_only_the_loss_carries_a_gradient_and_nothing_is_changed_in_place():
    logits, labels = draw(8, 5)
    avg = average()
    leaf = logits.clone().requires_grad_()
    out = reweight(leaf, labels, LINEAR, avg, EPOCH)
    assert isinstance(out, Reweighted)
    assert [tensor.requires_grad for tensor in out] == [True, False, False, False]
    assert torch.equal(leaf.detach(), logits)
    assert avg == 0.8


def test_two_names_one_signature():
    logits, labels = draw(8, 5)
    for a, b in zip(
        reweight(logits, labels, LINEAR, average(), EPOCH),
        reweight_ref(logits, labels, LINEAR, average(), EPOCH),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_average_is_updated_before_it_is_used():
    logits, labels = torch.tensor([[0.0, 3.0]], dtype=torch.float64), torch.tensor([0])
    out, _ = run(logits, labels, avg=average(0.0), decay=0.5)
    loss = math.log1p(math.exp(3))
    # With ℓ_pt of the step before the weight would be clip(1 − 3.05) = 0.
    np.testing.assert_allclose(out.loss_moving_avg, loss / 2)
    np.testing.assert_allclose(out.sample_weight, max(0, 1 - loss / 2))
    out, _ = run(logits, labels, avg=average(0.0), decay=0.0)
    assert out.sample_weight == 1.0


# ---------------------------------------------------------------- rows that do not count


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize("dropout", [None, ExampleDropout(rate=0.4), ExampleDropout(60, 0.5)])
def test_ignored_rows_change_nothing(name, dropout):
    curriculum, _ = CURRICULA[name]
    logits, labels = draw(20, 6)
    kept = torch.arange(20) % 4 != 1  # 15 rows, so that the percentile's rank differs
    labels_with_ignored = labels.masked_fill(~kept, -100)
    logits_with_nan = logits.clone()
    logits_with_nan[1] = math.nan  # an ignored row may hold anything
    options = {"dropout": dropout, "seed": 5, "step": 9, "loss_percentile": 0.7}
    ids = torch.arange(20)
    out, gradient = run(logits_with_nan, labels_with_ignored, curriculum, sample_ids=ids, **options)
    alone, gradient_alone = run(
        logits[kept], labels[kept], curriculum, sample_ids=ids[kept], **options
    )
    assert out.loss_moving_avg == alone.loss_moving_avg
    assert out.sample_loss[~kept].eq(0).all()
    assert out.sample_weight[~kept].eq(0).all()
    assert gradient[~kept].eq(0).all()
    for ours, theirs in [
        (out.loss, alone.loss),
        (out.sample_loss[kept], alone.sample_loss),
        (out.sample_weight[kept], alone.sample_weight),
        (gradient[kept], gradient_alone),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_exact_dropout_counts_the_valid_rows():
    logits, labels = draw(20, 6)
    labels[:10] = -100
    out, _ = run(logits, labels, UNIFORM, dropout=ExampleDropout(rate=0.3, exact=True))
    assert out.sample_weight.sum() == 7


@pytest.mark.parametrize("ignore_index", [-100, -1, 255, 2])
def test_any_ignore_index_under_a_mentor_that_reads_labels(ignore_index):
    logits, _ = draw(4, 4)
    labels = torch.tensor([0, ignore_index, 3, 1])
    kept = labels != ignore_index
    weights = mentor(use_label=True)
    out, _ = run(logits, labels, weights, ignore_index=ignore_index)
    alone, _ = run(logits[kept], labels[kept], weights)
    torch.testing.assert_close(out.sample_weight[kept], alone.sample_weight)


@pytest.mark.parametrize("name", CURRICULA)
def test_all_rows_ignored(name):
    logits, _ = draw(4, 6)
    out, gradient = run(logits, torch.full((4,), -100), CURRICULA[name][0])
    assert out.loss == 0
    assert out.loss_moving_avg == 0.8
    assert gradient.eq(0).all()


# ---------------------------------------------------------------- losses that are not finite


def test_a_nan_row_of_weight_zero_leaves_no_trace_in_loss_and_gradient():
    logits, labels = draw(64, 6)
    dropout = ExampleDropout(rate=0.5)
    clean, clean_gradient = run(logits, labels, dropout=dropout)
    row = int((clean.sample_weight == 0).nonzero()[0])
    logits[row] = math.nan
    out, gradient = run(logits, labels, dropout=dropout)
    assert out.sample_weight[row] == 0
    assert gradient[row].eq(0).all()
    assert gradient.isfinite().all()
    assert out.loss.isfinite()
    assert clean_gradient[row].eq(0).all()


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize("epoch", [0, 50])
def test_a_nan_row_of_positive_weight_shows(name, epoch):
    logits, labels = draw(8, 6)
    logits[3] = math.nan
    dropout = ExampleDropout(20, 0.0)
    out, _ = run(logits, labels, CURRICULA[name][0], epoch=torch.tensor(epoch), dropout=dropout)
    assert out.loss.isnan()
    assert out.loss_moving_avg.isfinite()  # the state survives the step


def test_a_nan_loss_counts_as_the_largest_in_the_percentile():
    logits, labels = draw(5, 6)
    nan_logits, inf_logits = logits.clone(), logits.clone()
    nan_logits[2] = math.nan
    inf_logits[2, labels[2]] = -math.inf
    for p in (0.25, 0.75, 1.0):
        a, _ = run(nan_logits, labels, loss_percentile=p)
        b, _ = run(inf_logits, labels, loss_percentile=p)
        assert a.loss_moving_avg == b.loss_moving_avg


def test_an_infinite_loss():
    logits, labels = draw(8, 6)
    logits[3, labels[3]] = -math.inf
    out, gradient = run(logits, labels)
    assert out.sample_loss[3] == math.inf
    assert out.sample_weight[3] == 0  # the curriculum takes it out
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    out, _ = run(logits, labels, UNIFORM)
    assert out.loss == math.inf
    out, _ = run(logits, labels, loss_percentile=1.0)
    assert out.loss_moving_avg == 0.8  # not infinite for ever


def test_all_weights_zero():
    logits, labels = draw(8, 6)
    out, gradient = run(logits, labels, ClosedForm("self_paced", lambda1=-100.0))
    assert out.sample_weight.eq(0).all()
    assert out.loss == 0
    assert gradient.eq(0).all()
    assert out.loss_moving_avg > 0.5  # ℓ_pt goes on


def test_ties():
    logits, labels = torch.zeros(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    out, _ = run(logits, labels, ClosedForm("self_paced"), avg=average(math.log(4)))
    assert out.loss_moving_avg.item() == pytest.approx(math.log(4), rel=1e-15)
    assert out.sample_weight.unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits(dtype):
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-1e4, -1e4]]).to(dtype)
    labels = torch.tensor([0, 1, 1])
    out, gradient = run(logits, labels, UNIFORM)
    top = logits[0, 0].double() * 2
    np.testing.assert_allclose(out.sample_loss, [0, top, math.log(2)], rtol=1e-6)
    expected = torch.tensor([[0, 0], [1, -1], [0.5, -0.5]], dtype=torch.float64) / 3
    torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


# ---------------------------------------------------------------- dropout, properties, errors


def test_burn_in_ignores_the_curriculum():
    logits, labels = draw(64, 6)
    never = ClosedForm("self_paced", lambda1=-100.0)
    dropout = ExampleDropout(20, 0.5)
    burning, _ = run(logits, labels, never, epoch=torch.tensor(19), dropout=dropout)
    after, _ = run(logits, labels, never, epoch=torch.tensor(20), dropout=dropout)
    assert set(burning.sample_weight.tolist()) == {0.0, 1.0}
    assert after.sample_weight.eq(0).all()
    torch.testing.assert_close(
        burning.loss, (burning.sample_weight * burning.sample_loss).mean().requires_grad_()
    )


def test_sample_ids_default_to_the_row_number():
    logits, labels = draw(32, 6)
    options = {"dropout": ExampleDropout(rate=0.5), "seed": 1, "step": 2}
    default, _ = run(logits, labels, UNIFORM, **options)
    given_ids, _ = run(logits, labels, UNIFORM, sample_ids=torch.arange(32), **options)
    assert torch.equal(default.sample_weight, given_ids.sample_weight)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    name=st.sampled_from(list(CURRICULA)),
    p=st.floats(0, 1),
    rate=st.sampled_from([0.0, 0.5]),
)
def test_rows_may_come_in_any_order(seed, name, p, rate):
    logits, labels = draw(24, 6, seed=seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(24)
    options = {"loss_percentile": p, "dropout": ExampleDropout(20, 0.5, rate)}
    curriculum = CURRICULA[name][0]
    out, gradient = run(logits, labels, curriculum, sample_ids=ids, **options)
    permuted, permuted_gradient = run(
        logits[order], labels[order], curriculum, sample_ids=ids[order], **options
    )
    assert ((out.sample_weight >= 0) & (out.sample_weight <= 1)).all()
    assert permuted.loss_moving_avg == out.loss_moving_avg
    torch.testing.assert_close(permuted.sample_weight, out.sample_weight[order])
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("output", ["h", "c"])
def test_autocast_does_not_change_the_weights(output):
    logits, labels = draw(64, 4, torch.bfloat16)
    weights = mentor(dtype=torch.float32, output=output)
    outside, gradient = run(logits, labels, weights)
    with torch.autocast("cpu", torch.bfloat16):
        inside, gradient_inside = run(logits, labels, weights)
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gradient, gradient_inside)


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_is_read_by_the_host(name, exact):
    # A fake tensor has no values: reading one (item, if, nonzero) raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = reweight(
            torch.randn(8, 4).requires_grad_(),
            torch.randint(4, (8,)),
            CURRICULA[name][0],
            torch.zeros(()),
            torch.zeros((), dtype=torch.int64),
            dropout=ExampleDropout(20, 0.5, 0.1, exact),
        )
        out.loss.backward()
    assert out.loss.shape == ()


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        ((4, 3), (5,), {}, r"\[4, 3\] and \[5\]"),
        ((4, 3, 2), (4,), {}, r"\[4, 3, 2\]"),
        ((4, 3), (4, 3), {}, r"\[4, 3\] and \[4, 3\]"),
        ((4,), (4,), {"class_losses": new_class_losses(3, 2, 0.5)}, r"\[4\] and \[4\]"),
        ((0, 3), (0,), {}, "empty.*0 rows"),
        ((4, 3), (4,), {"loss_percentile": 75.0}, "loss_percentile.*75.0"),
        ((4, 3), (4,), {"loss_percentile": -0.1}, "-0.1"),
        ((4, 3), (4,), {"decay": 1.0}, "decay.*1.0"),
        ((4, 3), (4,), {"decay": math.nan}, "decay.*nan"),
    ],
)
def test_bad_arguments_are_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        reweight(
            torch.zeros(logits),
            torch.zeros(labels, dtype=torch.long),
            LINEAR,
            average(),
            EPOCH,
            **options,
        )


def test_a_mentor_of_fewer_labels_than_classes_is_refused():
    with pytest.raises(ValueError, match=r"embeds 4 labels.*10 classes"):
        run(*draw(3, 10), mentor(use_label=True))
