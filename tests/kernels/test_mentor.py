"""Closed forms against their equations, MentorNet against torch.nn's LSTM, Embedding and Linear."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mentorch.kernels.mentor import (
    ClosedForm,
    LstmWeights,
    MentorWeights,
    closed_form_ref,
    mentornet_ref,
    sample_weight_ref,
)

KINDS = ("uniform", "self_paced", "linear", "focal", "hard_example")
LOSS = np.concatenate([np.linspace(0, 12, 121), [0.3, 1e4, math.inf]])
AVERAGE = 1.7

EQUATIONS = {  # of the loss ℓ and of x, the difference or the loss itself
    "uniform": lambda loss, x, l1, l2, g: np.ones_like(loss),
    "self_paced": lambda loss, x, l1, l2, g: np.where(x <= l1, 1.0, 0.0),
    "linear": lambda loss, x, l1, l2, g: np.minimum(np.maximum(0, 1 - (x - l1) / l2), 1),
    "focal": lambda loss, x, l1, l2, g: (1 - np.exp(-loss)) ** g,
    "hard_example": lambda loss, x, l1, l2, g: np.where(x > l1, 1.0, 0.0),
}


def weigh(form, loss, loss_diff):
    return closed_form_ref(form, torch.as_tensor(loss), torch.as_tensor(loss_diff)).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", ["loss_diff", "loss"])
# The defaults; λ1 below and above ℓ_pt; γ = 0 and a fractional one; a steep and a long slope.
@pytest.mark.parametrize(
    ("l1", "l2", "gamma"), [(0.0, 1.0, 2.0), (-0.5, 0.01, 0.0), (2.0, 7.5, 0.5)]
)
def test_closed_forms(kind, on, l1, l2, gamma):
    x = LOSS - AVERAGE if on == "loss_diff" else LOSS
    form = ClosedForm(kind, lambda1=l1, lambda2=l2, gamma=gamma, on=on)
    expected = EQUATIONS[kind](LOSS, x, l1, l2, gamma)
    np.testing.assert_allclose(weigh(form, LOSS, LOSS - AVERAGE), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("on", ["loss_diff", "loss"])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1.0), (0.7, 2.5)])  # as released, and others
def test_the_released_mixture_changes_with_the_epoch(l1, l2, on):
    form = ClosedForm("pd_mixture", lambda1=l1, lambda2=l2, on=on)
    loss = torch.as_tensor(LOSS)
    x = LOSS - AVERAGE if on == "loss_diff" else LOSS
    easy, linear = np.where(x <= l1, 1.0, 0.0), np.clip(1 - (x - l1) / l2, 0, 1)
    epochs = [0, 18, 19, 50, 89, 90, 99]  # the first and last of each part
    expected = [np.ones_like(x)] * 2 + [easy] * 3 + [linear] * 2
    for epoch, weight in zip(epochs, expected, strict=True):
        for given_as in (epoch, torch.tensor(epoch), torch.full(loss.shape, epoch)):
            found = closed_form_ref(form, loss, loss - AVERAGE, given_as)
            np.testing.assert_allclose(found, weight, rtol=0, atol=1e-14)
            assert found.dtype == torch.float64
    each = torch.tensor(epochs)[:, None].expand(-1, len(LOSS))
    found = closed_form_ref(form, loss.expand(7, -1), (loss - AVERAGE).expand(7, -1), each)
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-14)
    no_loss = torch.full((2,), math.nan)
    assert all(closed_form_ref(form, no_loss, no_loss, e).isnan().all() for e in epochs)


def test_the_mixture_needs_an_epoch():
    with pytest.raises(ValueError, match="give epoch_pct"):
        closed_form_ref(ClosedForm("pd_mixture"), torch.ones(2), torch.ones(2))


def test_linear_with_lambda2_zero_is_self_paced():
    difference = np.array([-1.0, 0.0, 1e-9, 1.0])
    assert weigh(ClosedForm("linear", lambda2=0.0), difference + 1, difference).tolist() == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 1.0), (0.5, 2.0), (1.0, 0.25)])
def test_linear_minimises_the_objective_of_eq_6(l1, l2):
    loss = np.linspace(0, 4, 81)
    v = np.linspace(0, 1, 10_001)
    objective = v * loss[:, None] + l2 * v**2 / 2 - (l1 + l2) * v
    form = ClosedForm("linear", lambda1=l1, lambda2=l2, on="loss")
    found = weigh(form, loss, loss)
    np.testing.assert_allclose(found, v[objective.argmin(1)], rtol=0, atol=1e-4)  # the grid's step


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_has_no_weight_of_its_own(kind):
    weight = weigh(ClosedForm(kind), np.array([math.nan, 1.0]), np.array([math.nan, 0.5]))
    assert np.isnan(weight[0]) == (kind != "uniform")
    assert not np.isnan(weight[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "spl"}, "unknown curriculum 'spl'.*self_paced"),
        ({"kind": "linear", "on": "epoch"}, "'epoch'"),
        ({"kind": "linear", "lambda2": -1.0}, "lambda2=-1.0"),
        ({"kind": "linear", "lambda2": math.nan}, "lambda2=nan"),
        ({"kind": "focal", "gamma": -2.0}, "gamma=-2.0"),
    ],
)
def test_bad_closed_forms_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClosedForm(**arguments)


forms = st.builds(
    ClosedForm,
    kind=st.sampled_from(KINDS),
    lambda1=st.floats(-5, 5),
    lambda2=st.just(0.0) | st.floats(1e-3, 5),
    gamma=st.floats(0, 5),
    on=st.sampled_from(["loss_diff", "loss"]),
)
losses = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=30)


@settings(deadline=None, max_examples=100)
@given(form=forms, loss=losses, average=st.floats(0, 10, width=32))
def test_weights_are_in_the_unit_interval_and_monotone(form, loss, average):
    loss = torch.tensor(loss).sort().values
    weight = closed_form_ref(form, loss, loss - average)
    assert ((weight >= 0) & (weight <= 1)).all()
    step = weight.diff()
    if form.kind in ("self_paced", "linear"):  # Eq. 10 asks for this
        assert (step <= 0).all()
    elif form.kind != "uniform":  # hard examples and focal loss look at the large losses
        assert (step >= -1e-7).all()


# ---------------------------------------------------------------- MentorNet


class Twin(nn.Module):
    """Fig. 1 from torch.nn's parts."""

    def __init__(self, labels, label_dim, epoch_dim, units, fc_units, output):
        super().__init__()
        self.label = nn.Embedding(labels, label_dim)
        self.epoch = nn.Embedding(100, epoch_dim)
        self.lstm = nn.LSTM(2, units, batch_first=True, bidirectional=True)
        self.fc1 = nn.Linear(label_dim + epoch_dim + 2 * units, fc_units)
        self.fc2 = nn.Linear(fc_units, 1)
        self.output = output

    def forward(self, loss, loss_diff, labels, epoch_pct):
        _, (h, c) = self.lstm(torch.stack([loss, loss_diff], dim=2))
        state = {"h": h, "c": c}[self.output]  # [2, B, H]: forward, backward
        parts = [self.label(labels), self.epoch(epoch_pct), state[0], state[1]]
        return self.fc2(self.fc1(torch.cat(parts, dim=1)).tanh()).sigmoid().squeeze(1)

    def weights(self, use_label):
        lstm = self.lstm
        return MentorWeights(
            self.label.weight,
            self.epoch.weight,
            LstmWeights(lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0),
            LstmWeights(
                lstm.weight_ih_l0_reverse,
                lstm.weight_hh_l0_reverse,
                lstm.bias_ih_l0_reverse + lstm.bias_hh_l0_reverse,
            ),
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            use_label,
            self.output,
        )


def twin(output, dims):
    torch.manual_seed(0)
    return Twin(*dims, output).double()


def inputs(batch, steps, labels):
    generator = torch.Generator().manual_seed(1)
    loss = torch.rand(batch, steps, generator=generator, dtype=torch.float64) * 6
    return (
        loss,
        loss - 2,
        torch.randint(labels, (batch,), generator=generator),
        torch.randint(100, (batch,), generator=generator),
    )


DIMS = [
    (2, 2, 5, 1, 20),  # as released
    (3, 5, 10, 1, 17),  # the other released file
    (10, 3, 4, 6, 8),  # several LSTM units: W_hh is a matrix, so a transposed one would show
]


@pytest.mark.parametrize("output", ["h", "c"])
@pytest.mark.parametrize("steps", [1, 4])  # Sec. 5.1's, and a history
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("batch", [1, 33])  # one row; odd, past a warp
def test_mentornet_is_torchs_lstm_embedding_and_linear(output, steps, dims, batch):
    net = twin(output, dims)
    data = inputs(batch, steps, dims[0])
    expected = net(*data)
    found = mentornet_ref(net.weights(use_label=True), *data)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(batch, dtype=torch.float64)
    parameters = list(net.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_mentornet_without_labels_reads_row_zero():
    net = twin("h", DIMS[2])
    loss, diff, labels, epoch = inputs(8, 1, 10)
    expected = net(loss, diff, torch.zeros_like(labels), epoch)
    far_labels = labels + 10**6  # never looked up
    found = mentornet_ref(net.weights(use_label=False), loss, diff, far_labels, epoch)
    torch.testing.assert_close(found, expected)


def test_mentornet_takes_one_step_flat_and_one_epoch_for_all():
    net = twin("h", DIMS[0])
    loss, diff, labels, _ = inputs(5, 1, 2)
    weights = net.weights(use_label=True)
    expected = net(loss, diff, labels, torch.full((5,), 42))
    found = mentornet_ref(weights, loss[:, 0], diff[:, 0], labels, torch.tensor(42))
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), steps=st.sampled_from([1, 3]), output=st.sampled_from("hc"))
def test_mentornet_is_permutation_equivariant_and_in_the_unit_interval(seed, steps, output):
    net = twin(output, DIMS[0])
    data = inputs(16, steps, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    weights = net.weights(use_label=True)
    found = mentornet_ref(weights, *data)
    assert ((found > 0) & (found < 1)).all()
    permuted = mentornet_ref(weights, *(column[order] for column in data))
    torch.testing.assert_close(permuted, found[order], rtol=1e-14, atol=1e-14)


def test_mentornet_stays_finite_for_huge_losses():
    net = twin("h", DIMS[0])
    loss = torch.tensor([1e4, 1e30], dtype=torch.float64)
    found = mentornet_ref(
        net.weights(False), loss, loss - 1, torch.zeros(2, dtype=torch.long), torch.tensor(0)
    )
    assert found.isfinite().all()


def test_sample_weight_dispatches_on_the_curriculum():
    net = twin("h", DIMS[0])
    loss, diff, labels, epoch = inputs(4, 1, 2)
    loss, diff = loss[:, 0], diff[:, 0]
    torch.testing.assert_close(
        sample_weight_ref(net.weights(True), loss, diff, labels, epoch),
        net(loss[:, None], diff[:, None], labels, epoch),
    )
    linear = sample_weight_ref(ClosedForm("linear"), loss, diff, labels, epoch)
    torch.testing.assert_close(linear, (1 - diff).clamp(0, 1))
    epochs, diff = torch.tensor([10, 50, 95, 18]), torch.tensor([3.0, 0.5, 0.5, 3.0])
    mixture = sample_weight_ref(ClosedForm("pd_mixture"), diff + 2, diff, labels, epochs)
    assert mixture.tolist() == [1.0, 0.0, 0.5, 1.0]
    # The weight has the loss's dtype even where Θ has another.
    assert sample_weight_ref(
        net.weights(True), loss.float(), loss.float(), labels, epoch
    ).dtype == (torch.float32)
