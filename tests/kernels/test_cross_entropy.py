"""Per-sample cross-entropy against logsumexp written out in numpy's float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mentorch.kernels.cross_entropy import cross_entropy_ref

SIZES = [
    (1, 1),  # nothing to choose from: loss 0, gradient 0
    (1, 2),  # one sample, the smallest problem
    (7, 10),  # CIFAR-10, an odd batch
    (128, 1000),  # the paper's batch, ImageNet's classes
    (3, 4099),  # prime, past a block of 4096
]


def draw(batch, classes, dtype=torch.float64, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(classes, (batch,), generator=generator)
    upstream = torch.randn(batch, generator=generator, dtype=torch.float64)
    return logits.to(dtype), labels, upstream


def loss_in_numpy(logits, labels):
    z = logits.double().numpy()
    top = z.max(1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(1))
    return lse - z[np.arange(len(z)), labels.numpy()]


def gradient_in_numpy(logits, labels, upstream):
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    one_hot = np.eye(z.shape[1])[labels.numpy()]
    return (e / e.sum(1, keepdims=True) - one_hot) * upstream.numpy()[:, None]


@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_float64_loss_and_gradient(batch, classes):
    logits, labels, upstream = draw(batch, classes)
    loss = cross_entropy_ref(logits.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    np.testing.assert_allclose(
        loss.detach(), loss_in_numpy(logits.detach(), labels), rtol=1e-12, atol=1e-14
    )
    expected = gradient_in_numpy(logits.detach(), labels, upstream)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_error_at_most_twice_that_of_eager_code(batch, classes, dtype):
    logits, labels, upstream = draw(batch, classes, dtype)
    exact_loss = torch.from_numpy(loss_in_numpy(logits, labels))
    exact_gradient = torch.from_numpy(gradient_in_numpy(logits, labels, upstream))
    errors = []
    for function in (cross_entropy_ref, lambda z, y: F.cross_entropy(z, y, reduction="none")):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, labels)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
        loss_error = (loss.detach().double() - exact_loss).abs().max()
        errors.append((loss_error, (gradient.double() - exact_gradient).abs().max()))
        assert gradient.dtype == dtype
    (ours, our_gradient), (eager, eager_gradient) = errors
    assert ours <= 2 * eager
    assert our_gradient <= 2 * eager_gradient


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(dtype, loss_dtype):
    logits, labels, _ = draw(4, 5, dtype)
    assert cross_entropy_ref(logits, labels).dtype == loss_dtype


@pytest.mark.parametrize(
    "ignore_index", [-100, 2, 255]
)  # torch's, one that is a class, Cityscapes'
def test_ignored_rows_have_loss_and_gradient_zero(ignore_index):
    logits, labels, upstream = draw(6, 5)
    labels = torch.tensor([0, ignore_index, 4, 3, ignore_index, 1])
    kept = labels != ignore_index
    loss = cross_entropy_ref(logits.requires_grad_(), labels, ignore_index)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert loss[~kept].tolist() == [0.0, 0.0]
    assert gradient[~kept].abs().sum() == 0
    np.testing.assert_allclose(
        loss[kept].detach(), loss_in_numpy(logits.detach()[kept], labels[kept]), rtol=1e-12
    )


def test_extreme_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, 1e4]])
    loss = cross_entropy_ref(logits, torch.tensor([0, 1, 2]))
    np.testing.assert_allclose(loss, [0.0, 2e4, math.log(3)], rtol=1e-6)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(IndexError, match="5"):
        cross_entropy_ref(torch.zeros(1, 5), torch.tensor([5]))
