"""Batch norm and ReLU against float64: the reference anywhere, the kernels on a GPU or in Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F

from mentorch.kernels import pixels
from mentorch.kernels.backend import INTERPRETED
from mentorch.kernels.batch_norm import Norm, batch_norm_relu, batch_norm_relu_ref
from mentorch.kernels.residual import scale_add_relu

MOMENTUM, EPS = 0.1, 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last
kernels = pytest.mark.usefixtures("device", "several_programs")


@pytest.fixture
def several_programs(monkeypatch):
    """So that the interpreter splits rows over programs as a GPU does."""
    if INTERPRETED:
        monkeypatch.setattr(pixels, "multiprocessors", lambda device: 2)


@pytest.fixture
def where(request):
    """The kernels' device where there is one; else the CPU, where all take the reference."""
    usable = INTERPRETED or torch.cuda.is_available()
    if usable:
        request.getfixturevalue("several_programs")
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def draw_image(shape, seed, device, dtype, mean=0.5, std=2.0):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=random, dtype=torch.float64) * std + mean
    return image.to(device, dtype).contiguous(memory_format=LAST)


def draw_norms(channels, device, seed=1):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randn(4, c, generator=random) for c in channels]
    return [Norm(r[0], r[1], r[2], r[3].abs()) for r in (row.to(device) for row in rows)]


def copies(norms, dtype):
    """Norms of their own, whose γ and β take a gradient."""
    return [
        Norm(*(t.to(dtype, copy=True).requires_grad_(i < 2) for i, t in enumerate(norm)))
        for norm in norms
    ]


def step(function, x, norms, upstream, dtype=None, **options):
    """{what: float64 value} of all that a step yields: y, gradients, running statistics.

    ``dtype``: of the step, where it is not that of x.
    """
    dtype = dtype or x.dtype
    norms = copies(norms, torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    outputs = function(leaf, norms, momentum=MOMENTUM, eps=EPS, **options)
    affine = [t for norm in norms for t in norm[:2]]
    upstream = [u.to(dtype) for u in upstream]
    grads = torch.autograd.grad(outputs, [leaf, *affine], upstream)
    assert all(y.dtype == dtype for y in outputs)
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    found |= {f"running {i}{j}": norm[j] for i, norm in enumerate(norms) for j in (2, 3)}
    return {name: value.double() for name, value in found.items()}


def compare(x, norms, upstream, **options):
    """At most twice the error of PyTorch in the same dtype, or eight roundings of the largest; dx
    is a difference of numbers as large as dy."""
    found = step(batch_norm_relu, x, norms, upstream, **options)
    eager = step(batch_norm_relu_ref, x, norms, upstream, **options)
    exact = step(batch_norm_relu_ref, x, norms, upstream, torch.float64, **options)
    for name, value in exact.items():
        of_image = name.startswith("y") or name == "gradient 0"
        eps = torch.finfo(x.dtype if of_image else torch.float32).eps
        sizes = [value, *upstream] if name == "gradient 0" else [value]
        rounding = 8 * eps * max(float(size.abs().max()) for size in sizes)
        allowed = max(2 * (eager[name] - value).abs().max(), rounding)
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= allowed, name


def upstream_of(x, channels, seed=2):
    shapes = [(x.shape[0], c, *x.shape[2:]) for c in channels]
    return [draw_image(s, seed + i, x.device, x.dtype, 0.1, 1.0) for i, s in enumerate(shapes)]


# ---- The reference ------------------------------------------------------------------------------


def test_reference_is_the_equations():
    x = draw_image((3, 5, 4, 2), 0, "cpu", torch.float64)
    (norm,) = copies(draw_norms([5], "cpu"), torch.float64)
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    (y,) = batch_norm_relu_ref(x, [norm], momentum=MOMENTUM, eps=EPS)
    n, over = x.numel() // 5, (0, 2, 3)
    mean = x.sum(over) / n
    apart = x - mean.view(-1, 1, 1)
    var = apart.square().sum(over) / n
    weight, bias = ((t.view(-1, 1, 1)) for t in norm[:2])
    z = apart / (var + EPS).sqrt().view(-1, 1, 1) * weight + bias
    torch.testing.assert_close(y, z.clamp(min=0))
    new = [0.9 * before[0] + 0.1 * mean, 0.9 * before[1] + 0.1 * var * n / (n - 1)]
    torch.testing.assert_close([norm.running_mean, norm.running_var], new)


def test_reference_is_the_modules_and_the_concatenation():
    modules = [torch.nn.BatchNorm2d(c, EPS, MOMENTUM) for c in (3, 4)]
    norms = [Norm(m.weight, m.bias, m.running_mean, m.running_var) for m in modules]
    own = copies(norms, torch.float32)
    x = draw_image((3, 7, 4, 2), 0, "cpu", torch.float32)
    expected = [m(part).relu() for m, part in zip(modules, x.split([3, 4], 1), strict=True)]
    into = torch.empty(3, 9, 4, 2).contiguous(memory_format=LAST)
    options = {"momentum": MOMENTUM, "eps": EPS}
    joined, second = batch_norm_relu_ref(x, own, **options, into=into, offset=4)
    assert joined is into
    torch.testing.assert_close([joined[:, 4:7], second], expected)
    torch.testing.assert_close([t for n in own for t in n], [t for n in norms for t in n])


def test_reference_gradcheck():
    x = draw_image((2, 5, 2, 2), 3, "cpu", torch.float64).requires_grad_()
    norms = copies(draw_norms([2, 3], "cpu"), torch.float64)

    def function(x, *affine):
        own = [Norm(*affine[i : i + 2], *norms[i // 2][2:]) for i in (0, 2)]
        into = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
        options = {"momentum": MOMENTUM, "eps": EPS, "update": False}
        into, second = batch_norm_relu_ref(x, own, **options, into=into, offset=2)
        return batch_norm_relu_ref(second[:, :2], own[:1], **options, into=into)[0], second

    torch.autograd.gradcheck(function, (x, *(t for norm in norms for t in norm[:2])))


@pytest.mark.slow
def test_compiles_as_one_graph_with_the_residual(where):
    """The compiler gets the references, also where there are kernels."""
    x = draw_image((2, 6, 4, 2), 0, where, torch.float32)
    norms, upstream = draw_norms([4, 2], where), upstream_of(x, [6])

    def block(x, norms, **options):
        into = torch.empty_like(x)
        into, second = batch_norm_relu(x, norms, into=into, offset=2, **options)
        into[:, :2] = second
        return [scale_add_relu(into, x, 0.17, norms[0].bias.repeat(2)[:6])]

    found = step(torch.compile(block, fullgraph=True, backend="aot_eager"), x, norms, upstream)
    expected = step(block, x, norms, upstream)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)


# ---- The public function ------------------------------------------------------------------------

SIZES = [
    ((2, 1, 1, 1), [1]),  # the smallest there is: two values
    ((5, 3, 1, 1), [3]),  # one pixel: strides of dimensions of size 1 say nothing
    ((1, 24, 7, 9), [24]),  # one image; whole lines, no multiple of 16
    ((3, 45, 5, 7), [32, 13]),  # several programs over rows, the last not full; odd offsets
    ((2, 96, 5, 7), [16, 80]),  # several blocks of channels, the last half empty
    ((2, 48, 5, 7), [8, 32, 8]),  # three norms, as in Block35
]


@pytest.mark.parametrize("case", range(len(SIZES)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(case, dtype, where):
    if INTERPRETED and dtype != DTYPES[case % 3] and case != 3:
        pytest.skip("in the interpreter every size in one dtype, and one in all")
    shape, channels = SIZES[case]
    x = draw_image(shape, case, where, dtype)
    compare(x, draw_norms(channels, where), upstream_of(x, channels))


@kernels
def test_mean_far_from_zero(device):
    """E[x²] − E[x]² in float32 would leave no digit of a variance 10⁻⁸ of the square."""
    x = draw_image((4, 8, 9, 9), 0, device, torch.float32, mean=1e4, std=1.0)
    norms, upstream = draw_norms([8], device), upstream_of(x, [8])
    found = step(batch_norm_relu, x, norms, upstream)
    exact = step(batch_norm_relu_ref, x, norms, upstream, torch.float64)
    torch.testing.assert_close(found["running 03"], exact["running 03"], rtol=1e-6, atol=0)
    # The mean that is kept is rounded by up to 5e-4 standard deviations.
    torch.testing.assert_close(found["y0"], exact["y0"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_strided_gradients(dtype, where):
    wide = draw_image((2, 40, 5, 6), 0, where, dtype)
    x = wide[:, 8:32]
    norms, upstream = draw_norms([16, 8], where), upstream_of(x, [16, 8])
    upstream[0] = draw_image((2, 24, 5, 6), 7, where, dtype)[:, 8:]  # a slice of a wider gradient
    upstream[1] = upstream[1].contiguous()  # channels first: copied
    compare(x, norms, upstream)
    compare(x, norms, [u[:1, :1, :1, :1].expand_as(u) for u in upstream])  # of sum().backward()
    compare(x, norms, [u[:, :, :1, :1].expand_as(u) for u in upstream])  # of y.sum((2, 3))
    compare(x, norms, [u[:1, :, :1, :1].expand_as(u) for u in upstream])  # of y.sum((0, 2, 3))


def test_other_layouts_take_the_reference(where):
    x = draw_image((2, 6, 5, 4), 0, where, torch.float32)
    norms, upstream = draw_norms([6], where), upstream_of(x, [6])
    expected = step(batch_norm_relu, x, norms, upstream)
    for other in (x.contiguous(), x.transpose(2, 3).contiguous(memory_format=LAST).transpose(2, 3)):
        found = step(batch_norm_relu, other, norms, upstream)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_concatenation_by_two_calls(dtype, where):
    """Values, and a gradient that goes through the second call to the first."""
    x = draw_image((2, 24, 5, 6), 0, where, dtype)
    norms = draw_norms([8, 8, 16], where)

    def two_calls(x, norms, **options):
        into = torch.full((2, 25, 5, 6), torch.nan, dtype=x.dtype, device=x.device)
        into = into.contiguous(memory_format=LAST)
        into, second = batch_norm_relu(x[:, :16], norms[:2], into=into, offset=17, **options)
        (into,) = batch_norm_relu(x[:, 8:], norms[2:], into=into, offset=1, **options)
        assert into[:, :1].isnan().all(), "a channel of nobody was written"
        return into[:, 1:], second

    def concatenation(x, norms, **options):
        first, second = batch_norm_relu_ref(x[:, :16], norms[:2], **options)
        (third,) = batch_norm_relu_ref(x[:, 8:], norms[2:], **options)
        return torch.cat([third, first], 1), second

    upstream = upstream_of(x, [24, 8])
    found = step(two_calls, x, norms, upstream)
    eager = step(concatenation, x, norms, upstream)
    exact = step(concatenation, x, norms, upstream, torch.float64)
    for name, value in exact.items():
        allowed = 2 * (eager[name] - value).abs().max() + 2e-6 * value.abs().max()
        assert (found[name] - value).abs().max() <= allowed, name


def test_no_update_leaves_running_statistics(where):
    x = draw_image((2, 6, 5, 4), 0, where, torch.float32)
    norms, upstream = draw_norms([6], where), upstream_of(x, [6])
    found = step(batch_norm_relu, x, norms, upstream, update=False)
    assert torch.equal(found["running 02"], norms[0].running_mean.double())
    assert torch.equal(found["running 03"], norms[0].running_var.double())
    torch.testing.assert_close(found["y0"], step(batch_norm_relu, x, norms, upstream)["y0"])


@kernels
def test_the_same_bits_every_time_and_inputs_stay(device):
    x = draw_image((2, 40, 5, 7), 0, device, torch.bfloat16)
    norms, upstream = draw_norms([32, 8], device), upstream_of(x, [32, 8])
    before = x.clone()
    found, again = (step(batch_norm_relu, x, norms, upstream) for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert torch.equal(x, before)


@kernels
def test_outputs_and_gradient_are_packed_and_the_kernels_ran(device):
    x = draw_image((2, 40, 3, 3), 0, device, torch.float32).requires_grad_()
    outputs = batch_norm_relu(x, draw_norms([32, 8], device), momentum=MOMENTUM, eps=EPS)
    assert all(y.is_contiguous(memory_format=LAST) for y in outputs)
    assert "Fused" in type(outputs[0].grad_fn).__name__
    (grad,) = torch.autograd.grad([y.sum() for y in outputs], x)
    assert grad.is_contiguous(memory_format=LAST)


def test_nan_stays_in_its_channel(where):
    x = draw_image((2, 4, 3, 3), 0, where, torch.float32)
    x[0, 1, 0, 0] = torch.nan
    norms, upstream = draw_norms([4], where), upstream_of(x, [4])
    found = step(batch_norm_relu, x, norms, upstream)
    for name in ("y0", "gradient 0"):
        assert found[name][:, 1].isnan().all(), name
        assert not found[name][:, [0, 2, 3]].isnan().any(), name


@pytest.mark.parametrize(
    ("shape", "channels", "options", "message"),
    [
        ((2, 6, 3, 3), [4], {}, r"\[4\] channels do not add up"),
        ((2, 6, 3, 3), [], {}, "do not add up"),
        ((1, 6, 1, 1), [6], {}, "one value a channel"),
        ((2, 6, 3, 3), [6], {"into": torch.zeros(2, 9, 3, 4)}, r"into must be \[2, 9, 3, 3\]"),
        ((2, 6, 3, 3), [6], {"into": torch.zeros(2, 9, 3, 3).half()}, "got .*float16"),
        ((2, 6, 3, 3), [6], {"into": torch.zeros(2, 9, 3, 3), "offset": 4}, "6 channels from 4"),
    ],
)
def test_what_does_not_fit_is_refused(shape, channels, options, message, where):
    x = draw_image(shape, 0, where, torch.float32)
    options = {k: v.to(where) if k == "into" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        batch_norm_relu(x, draw_norms(channels, where), momentum=MOMENTUM, eps=EPS, **options)


# ---- Layouts ------------------------------------------------------------------------------------


def test_which_layouts_are_rows():
    image = torch.empty(2, 6, 3, 4).contiguous(memory_format=LAST)
    assert pixels.pixel_stride(image) == 6
    assert pixels.pixel_stride(image[:, 1:4]) == 6
    assert pixels.pixel_stride(image[:, :, :, :1]) == 24  # the first pixel of every line
    assert pixels.pixel_stride(image[1:]) == 6
    assert pixels.pixel_stride(image[:, :, 1:2]) is None  # lines between batches are left out
    assert pixels.pixel_stride(torch.empty(2, 6, 3, 4)) is None
    assert pixels.pixel_stride(torch.empty(2, 6, 1, 1)) == 6
    assert pixels.pixel_stride(torch.zeros(1, 1, 1, 1).expand(2, 6, 3, 4)) is None
    assert pixels.pixel_stride(torch.zeros(1, 1, 1, 1).expand(2, 1, 3, 4)) is None
    for shape in ((2, 6, 1, 1), (1, 6, 1, 1), (2, 6, 3, 1)):  # 0 is no stride that is not set yet
        assert pixels.pixel_stride(torch.zeros(shape).expand(2, 6, 3, 4)) is None


@pytest.mark.parametrize(
    ("channels", "block"),
    [([192], 64), ([80], 32), ([32, 32, 64], 32), ([2080], 32), ([1088], 64), ([13], 16), ([1], 1)],
)
def test_blocks_leave_few_lanes_idle(channels, block, monkeypatch):
    monkeypatch.setattr(pixels, "multiprocessors", lambda device: 132)
    image = torch.empty(64, sum(channels), 17, 17, dtype=torch.bfloat16, device="meta")
    grid = pixels.plan(image, channels, [sum(channels)], reads=1, sums=True)
    assert grid.channels == block
    assert grid.parts <= 512
    count = 64 * 17 * 17
    assert grid.parts * grid.tiles * grid.rows >= count > (grid.parts - 1) * grid.tiles * grid.rows


def test_relu_of_batch_norm_is_what_timm_calls(where):
    """One call in place of F.batch_norm and F.relu, under autocast as well."""
    x = draw_image((2, 6, 5, 4), 0, where, torch.bfloat16)
    (norm,) = draw_norms([6], where)
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, True, MOMENTUM, EPS).relu()
    with torch.autocast(x.device.type, torch.bfloat16):
        (y,) = batch_norm_relu(x, [norm], momentum=MOMENTUM, eps=EPS)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-2)
