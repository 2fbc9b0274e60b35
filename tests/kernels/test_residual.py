"""Scale, addition and ReLU against float64: the reference anywhere, the kernels on a GPU or in
Triton's interpreter."""

import pytest
import torch

from mentorch.kernels import pixels
from mentorch.kernels.backend import INTERPRETED
from mentorch.kernels.residual import scale_add_relu, scale_add_relu_ref

LAST = torch.channels_last
SCALE = 0.17  # of Block35
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def where(monkeypatch):
    """The kernels' device where there is one; else the CPU, where all take the reference."""
    if INTERPRETED:  # split rows over programs as a GPU does
        monkeypatch.setattr(pixels, "multiprocessors", lambda device: 1)
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def draw(shape, device, dtype, count=3):
    """(branch, x, upstream gradient), channels-last, and a bias."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=random, dtype=torch.float64)
    bias = torch.randn(shape[1], generator=random).to(device)
    return *(i.to(device, dtype).contiguous(memory_format=LAST) for i in images), bias


def step(function, branch, x, upstream, bias, relu=True, dtype=None):
    """y and the gradients of branch, x and bias, in float64."""
    dtype = dtype or x.dtype
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (branch, x)]
    own = None
    if bias is not None:
        own_dtype = torch.promote_types(dtype, torch.float32)
        own = bias.detach().to(own_dtype, copy=True).requires_grad_()
        leaves.append(own)
    y = function(leaves[0], leaves[1], SCALE, own, relu)
    grads = torch.autograd.grad(y, leaves, upstream.to(dtype))
    assert y.dtype == dtype
    return [t.detach().double() for t in (y, *grads)]


def compare(branch, x, upstream, bias, relu=True):
    """At most twice the error of the reference in the same dtype, or two roundings."""
    arguments = branch, x, upstream, bias, relu
    found, eager = (step(f, *arguments) for f in (scale_add_relu, scale_add_relu_ref))
    exact = step(scale_add_relu_ref, *arguments, dtype=torch.float64)
    for i, (value, ours, theirs) in enumerate(zip(exact, found, eager, strict=True)):
        eps = torch.finfo(torch.float32 if i == 3 else x.dtype).eps
        allowed = max(2 * (theirs - value).abs().max(), 2 * eps * value.abs().max())
        assert (ours - value).abs().max() <= allowed, ("y", "branch", "x", "bias")[i]


def test_reference_is_the_equation():
    branch, x, upstream, bias = draw((2, 3, 4, 5), "cpu", torch.float64)
    bias = bias.double()
    y, dbranch, dx, dbias = step(scale_add_relu_ref, branch, x, upstream, bias)
    z = x + SCALE * (branch + bias.view(1, 3, 1, 1))
    kept = upstream * (z > 0)
    expected = [z * (z > 0), SCALE * kept, kept, (SCALE * kept).sum((0, 2, 3))]
    torch.testing.assert_close([y, dbranch, dx, dbias], expected)


def test_reference_gradcheck():
    branch, x, _, bias = draw((2, 3, 2, 2), "cpu", torch.float64)
    leaves = [t.requires_grad_() for t in (branch, x, bias.double())]
    for relu in (True, False):
        torch.autograd.gradcheck(
            lambda b, x, c, r=relu: scale_add_relu_ref(b, x, SCALE, c, r), leaves
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),  # a single value
        (3, 7, 1, 1),  # one pixel: strides of dimensions of size 1 say nothing
        (
            2,
            40,
            7,
            9,
        ),  # two blocks of channels, several programs of several tiles, the last not full
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_sizes(shape, dtype, relu, where):
    branch, x, upstream, bias = draw(shape, where, dtype)
    compare(branch, x, upstream, bias, relu)
    if dtype == torch.float32:
        compare(branch, x, upstream, None, relu)


def test_slices_and_strided_gradients(where):
    wide = draw((2, 40, 3, 5), where, torch.bfloat16)
    branch, x, upstream = (t[:, i : i + 24] for i, t in zip((0, 8, 16), wide[:3], strict=True))
    bias = wide[3][:24]
    compare(branch, x, upstream, bias)
    compare(branch, x, upstream.contiguous(), bias)  # channels first: copied
    compare(branch, x, upstream[:1, :1, :1, :1].expand_as(x), bias)  # of sum().backward()
    compare(branch, x, upstream[:1, :1, :1, :1].expand_as(x), bias, relu=False)
    compare(branch, x, upstream[:, :, :1, :1].expand_as(x), bias)  # of y.sum((2, 3))


def test_other_layouts_and_dtypes_take_the_reference(where):
    branch, x, upstream, bias = draw((2, 8, 3, 5), where, torch.float32)
    expected = step(scale_add_relu_ref, branch, x, upstream, bias)
    for b, z in ((branch.contiguous(), x), (branch, x.contiguous())):
        torch.testing.assert_close(step(scale_add_relu, b, z, upstream, bias), expected)
    y = scale_add_relu(branch.bfloat16(), x, SCALE, bias)
    torch.testing.assert_close(y, scale_add_relu_ref(branch.bfloat16(), x, SCALE, bias))
    assert y.dtype == torch.float32
    y = scale_add_relu(branch, x, SCALE, bias.bfloat16())
    torch.testing.assert_close(y, scale_add_relu_ref(branch, x, SCALE, bias.bfloat16()))


@pytest.mark.usefixtures("device")
def test_the_kernels_ran_and_the_same_bits_come_out(where):
    branch, x, upstream, bias = draw((2, 40, 7, 9), where, torch.bfloat16)
    before = branch.clone(), x.clone()
    y = scale_add_relu(branch.requires_grad_(), x, SCALE, bias)
    assert "Fused" in type(y.grad_fn).__name__
    assert y.is_contiguous(memory_format=LAST)
    found, again = (step(scale_add_relu, branch, x, upstream, bias) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert torch.equal(branch, before[0])
    assert torch.equal(x, before[1])


def test_nan_stays(where):
    branch, x, upstream, bias = draw((2, 4, 3, 3), where, torch.float32)
    x[0, 1, 0, 0] = torch.nan
    y, dbranch, dx, _ = step(scale_add_relu, branch, x, upstream, bias)
    assert y.isnan().sum() == 1
    torch.testing.assert_close(dx[0, 1, 0, 0], upstream[0, 1, 0, 0].double())
    assert not dbranch.isnan().any()


@pytest.mark.parametrize(
    ("branch", "x", "bias", "message"),
    [
        ((2, 4, 3, 3), (2, 4, 3, 2), 4, r"one shape, got \[2, 4, 3, 3\] and \[2, 4, 3, 2\]"),
        ((2, 4, 3), (2, 4, 3), 4, r"\[B, C, H, W\]"),
        ((2, 4, 3, 3), (2, 4, 3, 3), 3, r"bias must be \[4\], got \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(branch, x, bias, message, where):
    images = (torch.zeros(shape, device=where) for shape in (branch, x))
    with pytest.raises(ValueError, match=message):
        scale_add_relu(*images, SCALE, torch.zeros(bias, device=where))
