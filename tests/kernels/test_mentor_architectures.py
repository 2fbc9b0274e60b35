"""MentorNets without an LSTM: the reference against fc1 and fc2 written out, and the fused step
against the reference in float64, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch

from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.history import new_history
from mentorch.kernels.mentor import LstmWeights, MentorWeights, mentornet_ref
from mentorch.kernels.reweight import reweight, reweight_ref

COINS = ExampleDropout(20, 0.5, 0.3)


def mentor(steps=1, hidden=20, labels=2, use_label=False, activation="tanh", encoder="none"):
    """A MentorNet of random weights, the label embedding 3 and the epoch embedding 5 wide."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    lstms = [LstmWeights(random(8, 2), random(8, 2), random(8)) for _ in range(2)]
    lstms = lstms if encoder == "lstm" else [None, None]
    visits = 2 * steps if encoder == "none" else 4
    return MentorWeights(
        random(labels, 3), random(100, 5), *lstms, random(hidden, 8 + visits), random(hidden),
        random(1, hidden), random(1), use_label, "h", encoder, activation,
    )  # fmt: skip


def cast(weights, *target):
    def move(value):
        if isinstance(value, LstmWeights):
            return LstmWeights(*(t.to(*target) for t in value))
        return value.to(*target) if isinstance(value, torch.Tensor) else value

    return MentorWeights(*map(move, weights))


ARCHITECTURES = {
    "logistic": {"hidden": 1, "activation": "linear"},
    "logistic T=3": {"steps": 3, "hidden": 1, "activation": "linear"},
    "perceptron": {},
    "perceptron T=3": {"steps": 3},
    "perceptron T=2 with labels": {"steps": 2, "hidden": 33, "labels": 12, "use_label": True},
    "lstm T=3, linear": {"steps": 3, "encoder": "lstm", "activation": "linear"},
}


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "lstm" not in n])
def test_without_an_lstm_it_is_two_layers(name):
    options = ARCHITECTURES[name]
    weights, steps = mentor(**options), options.get("steps", 1)
    loss = torch.rand(9, steps, dtype=torch.float64) * 4
    diff = loss - 1.5
    labels, epoch = torch.arange(9) % 2, torch.arange(9) * 11
    seen = torch.ones_like(loss, dtype=torch.bool)
    seen[4, :-1] = False  # a sample on its first visit
    absent = torch.full_like(loss, math.nan)
    found = mentornet_ref(
        weights, torch.where(seen, loss, absent), torch.where(seen, diff, absent), labels, epoch
    )
    for row in range(9):
        visits = [v for t in range(steps) for v in (loss[row, t], diff[row, t])]
        raw = torch.stack(visits) * seen[row].repeat_interleave(2)
        label = int(labels[row]) if weights.use_label else 0
        z = torch.cat([weights.label_embedding[label], weights.epoch_embedding[epoch[row]], raw])
        x = weights.fc1_weight @ z + weights.fc1_bias
        x = x.tanh() if weights.activation == "tanh" else x
        expected = torch.sigmoid(weights.fc2_weight @ x + weights.fc2_bias)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-14)


def test_a_logistic_regression_is_linear_in_its_features():
    """Its log-odds over the loss at a fixed difference lie on a line."""
    weights = mentor(**ARCHITECTURES["logistic"])
    loss = torch.linspace(0, 5, 11, dtype=torch.float64)
    zero = torch.zeros(11, dtype=torch.long)
    weight = mentornet_ref(weights, loss, torch.ones_like(loss), zero, zero)
    odds = torch.logit(weight)
    assert odds.diff().abs().min() > 0
    torch.testing.assert_close(odds.diff().diff(), torch.zeros(9).double(), atol=1e-9, rtol=0)


def test_a_nan_loss_today_has_no_weight():
    loss = torch.tensor([[1.0, math.nan], [math.nan, 1.0]]).double()
    zero = torch.zeros(2, dtype=torch.long)
    found = mentornet_ref(mentor(steps=2), loss, loss, zero, zero)
    assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("made_for", "given"), [(3, 1), (1, 3), (3, 2)])
def test_a_history_of_another_length_is_refused(made_for, given):
    message = f"reads T = {made_for} visits of a sample, got {given}"
    weights = cast(mentor(steps=made_for), torch.float32)
    loss, zero = torch.ones(2, given), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        mentornet_ref(weights, loss, loss, zero, zero)
    history = new_history(4, given) if given > 1 else None
    with pytest.raises(ValueError, match=message):
        reweight(
            torch.zeros(2, 3), zero, weights, torch.tensor(0.0), total_steps=1, history=history
        )
    lstm = mentor(encoder="lstm")
    mentornet_ref(lstm, loss, loss, zero, zero)  # takes any


# ---------------------------------------------------------------- fused


def both(weights, device, visit, state, **options):
    """One step fused and by the definition: [(outcome, gradient, what changed), …]."""
    generator = torch.Generator().manual_seed(visit)
    logits = torch.randn(65, 12, generator=generator) * 2
    labels = torch.randint(12, (65,), generator=generator)
    labels[2] = -100
    ids = torch.randperm(90, generator=generator)[:65]
    results = []
    for function, where, dtype, (avg, step, history) in zip(
        (reweight, reweight_ref), (device, "cpu"), (torch.float32, torch.float64), state,
        strict=True,
    ):  # fmt: skip
        z = logits.to(where, dtype).requires_grad_()
        out = function(
            z, labels.to(where), cast(weights, where, dtype), avg, step=step, history=history,
            sample_ids=ids.to(where), total_steps=100, dropout=COINS, seed=3, advance=True,
            **options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss * 1.7, z)
        results.append((out, gradient))
    return results


# Every architecture in two launches, whose tiles of samples are the largest, and the other
# forms of the step once, with a history and without.
FUSED = [(name, {}) for name in ARCHITECTURES] + [
    ("perceptron T=3", {"moving_avg": "lagged"}),
    ("logistic", {"one_launch": True}),
]


@pytest.mark.parametrize(("name", "form"), FUSED)
def test_fused_against_the_definition(name, form, device):
    weights, steps = mentor(**ARCHITECTURES[name]), ARCHITECTURES[name].get("steps", 1)
    state = [
        (
            torch.tensor(1.0, dtype=dtype, device=where),
            torch.tensor(50, device=where),
            new_history(90, steps, where).to(dtype) if steps > 1 else None,
        )
        for where, dtype in ((device, torch.float32), ("cpu", torch.float64))
    ]
    for visit in range(steps + 1):  # from an empty history to a full one that has moved on
        (found, gradient), (expected, exact) = both(weights, device, visit, state, **form)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double().cpu(), exact, rtol=1e-4, atol=1e-6)
        assert found.sample_weight.std() > 0.01
