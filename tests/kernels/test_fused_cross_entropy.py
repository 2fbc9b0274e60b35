"""The cross-entropy kernels against float64, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from torch import library

from mentorch.kernels import cross_entropy as module
from mentorch.kernels.backend import INTERPRETED
from mentorch.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_ref,
    launch_backward,
    launch_forward,
)
from mentorch.kernels.rows import row_tile

pytestmark = pytest.mark.usefixtures("device")

BATCHES = [
    1,  # a tile of rows with one in it; the interpreter takes the GPU's tiles for these two,
    2,  # and at least 16 rows a program, which is the faster there, from here on
    15 if INTERPRETED else 63,  # just under a tile of 16 rows, or 64
    16 if INTERPRETED else 64,
    33 if INTERPRETED else 127,  # a last tile that is not full
    150 if INTERPRETED else 1000,  # several programs of any size, the last not full
]
CLASSES = [
    1,  # the loss is 0
    2,
    10,  # rows at odd offsets, several rows in one program
    100,  # not a multiple of a bf16 line (8)
    1000,  # ImageNet and WebVision: whole lines
    1001,  # the same at odd offsets
    21841,  # ImageNet-21k: several chunks at odd offsets
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = [
    (batch, classes, dtype)
    for b, batch in enumerate(BATCHES)
    for c, classes in enumerate(CLASSES)
    for d, dtype in enumerate(DTYPES)
    if not INTERPRETED or d == (b + 2 * c) % 3  # there every two of the three meet once at least
]


def draw(batch, classes, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(classes, (batch,), generator=generator)
    upstream = torch.randn(batch, generator=generator)
    return logits.to(device, dtype), labels.to(device), upstream.to(device)


def loss_and_gradient(function, logits, labels, upstream, **options):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(logits, labels, **options)
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return loss.detach().double(), gradient.double()


def assert_at_most_twice_eager(found, eager, exact, dtype):
    """The largest error is at most twice that of eager code, or two roundings of the largest."""
    found, eager, exact = (t.flatten() for t in (found, eager, exact))
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(found), special(exact))
    finite = exact.isfinite()
    if finite.any():
        found, eager, exact = found[finite], eager[finite], exact[finite]
        allowed = 2 * (eager - exact).abs().nan_to_num(0, 0, 0).max()
        rounding = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (found - exact).abs().max() <= max(allowed, rounding)


def compare(logits, labels, upstream, **options):
    """Kernel against float64, beside eager PyTorch in the logits' dtype."""
    found = loss_and_gradient(cross_entropy, logits, labels, upstream, **options)
    eager = loss_and_gradient(cross_entropy_ref, logits, labels, upstream, **options)
    exact = loss_and_gradient(cross_entropy_ref, logits.double(), labels, upstream, **options)
    assert_at_most_twice_eager(found[0], eager[0], exact[0], torch.float32)
    assert_at_most_twice_eager(found[1], eager[1], exact[1], logits.dtype)


@pytest.mark.parametrize(("batch", "classes", "dtype"), GRID, ids=str)
def test_grid(batch, classes, dtype, device):
    logits, labels, upstream = draw(batch, classes, dtype, device)
    options = {}
    if batch > 8:  # corner cases ride along where there is room for them
        labels[5] = -100
        logits[6, : classes // 2] = -math.inf
        upstream[7] = 0.0
        options = {"label_smoothing": 0.1} if batch == BATCHES[4] else {}
        if batch == BATCHES[3]:
            upstream = upstream[:1].expand(batch)  # what sum().backward() sends: stride 0
    if options:
        logits[6] = 1.0  # −inf logits and smoothing make +inf in both, tested below
    compare(logits, labels, upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "offset"),
    [
        (1024, 0),  # whole lines
        (1024, 8),  # whole lines from a line on
        (1024, 1),  # every row begins inside a line
        (1003, 3),  # rows begin anywhere, and neither stride nor C is a multiple of a line
        (1008, 0),  # lines for the logits, but not for the gradient of C = 1001
    ],
)
def test_strided_rows(width, offset, dtype, device):
    for classes in (1000, 1001, 7):
        wide, labels, upstream = draw(5, width, dtype, device)
        if offset + classes > width:
            continue
        logits, labels = wide[:, offset : offset + classes], labels % classes
        compare(logits, labels, upstream)
        compare(logits, labels, upstream, label_smoothing=0.2)


def test_classes_not_side_by_side(device):
    logits, labels, upstream = draw(9, 33, torch.float32, device)
    compare(logits.t().contiguous().t(), labels, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 7])  # 7 of 6 chunks: a split with nothing to do
def test_split_rows(splits, dtype, device):
    batch, classes = 3, 21841
    logits, labels, upstream = draw(batch, classes, dtype, device)
    labels[1] = -100
    logits[2, :9000] = -math.inf  # a whole split of −inf
    for smoothing in (0.0, 0.1):
        if smoothing:
            logits[2] = 0.5
        loss, lse = launch_forward(logits, labels, -100, smoothing, splits=splits)
        expected = cross_entropy_ref(logits.double(), labels, -100, smoothing)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
        grads = [
            launch_backward(
                logits, labels, lse, upstream, None, None, -100, smoothing, splits=splits
            )
            for splits in (splits, 1)
        ]
        assert torch.equal(*grads)  # element by element: no matter who writes it
        again, _ = launch_forward(logits, labels, -100, smoothing, splits=splits)
        assert torch.equal(loss, again)  # the counter was put back, and sums repeat


def test_a_million_classes(device):
    logits, labels, upstream = draw(2, 1_000_000, torch.bfloat16, device)
    compare(logits, labels, upstream)


def test_rows_beyond_32_bit_offsets(device):
    stride = 2**31 + 8
    storage = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=device)  # hardly touched
    logits, labels, upstream = draw(3, 9, torch.bfloat16, device)
    far = storage.as_strided((3, 9), (stride, 1))
    far.copy_(logits)
    torch.testing.assert_close(cross_entropy(far, labels), cross_entropy(logits, labels))
    _, lse = launch_forward(far, labels, -100, 0.0)
    found, expected = (
        launch_backward(z, labels, lse, upstream, None, None, -100, 0.0) for z in (far, logits)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extremes(dtype, smoothing, device):
    """Rows of huge, infinite, equal and missing logits, next to each other."""
    largest = torch.finfo(dtype).max / 4
    logits = torch.zeros(9, 12, dtype=dtype, device=device)
    logits[1, 3], logits[1, 4] = largest, -largest
    logits[2] = 7.0 if smoothing else largest  # the mean of huge logits is rounded at their size
    logits[3] = -math.inf
    logits[4, 5] = math.inf
    logits[5, 0] = math.nan
    logits[6, 2] = -math.inf  # the label's own: an infinite loss
    logits[7, :11] = -math.inf  # certain, and right
    labels = torch.tensor([0, 3, 1, 2, 5, 3, 2, 11, 4], device=device)
    upstream = torch.arange(9.0, device=device) + 1
    found = loss_and_gradient(cross_entropy, logits, labels, upstream, label_smoothing=smoothing)
    exact = loss_and_gradient(
        cross_entropy_ref, logits.double(), labels, upstream, label_smoothing=smoothing
    )
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        found[1], exact[1], rtol=1e-2, atol=torch.finfo(dtype).eps, equal_nan=True
    )


def test_labels_out_of_range_show_as_nan_and_read_nothing_else(device):
    logits, labels, upstream = draw(6, 10, torch.float32, device)
    labels[2], labels[4], labels[5] = 10, -1, 2**40
    found = cross_entropy(logits.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    bad = torch.tensor([False, False, True, False, True, True], device=device)
    assert torch.equal(found.isnan(), bad)
    assert torch.equal(gradient.isnan(), bad[:, None].expand(6, 10))


def test_ignored_rows_of_nan_have_no_gradient(device):
    logits, labels, upstream = draw(4, 10, torch.float32, device)
    logits[1], labels[1] = math.nan, -100
    loss, gradient = loss_and_gradient(cross_entropy, logits, labels, upstream)
    assert loss[1] == 0
    assert not gradient[1].any()
    assert not gradient.isnan().any()


def test_any_integer_labels(device):
    logits, labels, _ = draw(4, 10, torch.float32, device)
    expected = cross_entropy(logits, labels)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(cross_entropy(logits, labels.to(dtype)), expected)


def test_inputs_are_not_changed(device):
    logits, labels, upstream = draw(5, 100, torch.bfloat16, device)
    before = logits.clone()
    loss_and_gradient(cross_entropy, logits, labels, upstream)
    leaf = logits.requires_grad_()
    cross_entropy(leaf, labels).backward(upstream)
    assert torch.equal(logits, before)


def test_opcheck(device):
    logits, labels, _ = draw(6, 10, torch.float32, device)
    library.opcheck(module._cross_entropy, (logits.requires_grad_(), labels, -100, 0.1))
    loss, lse = launch_forward(logits, labels, -100, 0.1)
    arguments = (logits.detach(), labels, lse, loss.detach(), None, None, -100, 0.1)
    library.opcheck(module.cross_entropy_gradient, arguments)


def test_compiles_as_one_graph(device):
    logits, labels, upstream = draw(6, 10, torch.float32, device)
    function = torch.compile(lambda z, y: cross_entropy(z * 2, y), fullgraph=True)
    found = loss_and_gradient(function, logits, labels, upstream)
    expected = loss_and_gradient(lambda z, y: cross_entropy(z * 2, y), logits, labels, upstream)
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_refused(device):
    logits, labels, _ = draw(3, 4, torch.float32, device)
    loss = cross_entropy(logits.requires_grad_(), labels).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; differentiate cross_entropy_ref"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("batch", "classes", "expected"),
    [
        (128, 1000, (1, 128, 8, 1)),  # one line a thread
        (128, 10, (32, 4, 8, 1)),  # 10 elements touch up to 3 lines: 4 lanes, 32 rows
        (4096, 1000, (2, 128, 8, 1)),  # 8 warps for the batch, two rows each
        (8, 21841, (1, 1024, 8, 3)),  # four lines a thread, three times
        (8, 1_000_000, (1, 1024, 8, 123)),
    ],
)
def test_tiles(batch, classes, expected):
    logits = torch.empty(batch, classes, dtype=torch.bfloat16, device="meta")
    tile = row_tile(logits, splits=1)
    assert (tile.lanes, tile.vector, tile.chunks) == expected[1:]
    if not INTERPRETED:
        assert tile.rows == expected[0]
    assert tile.lanes * tile.vector * tile.chunks >= classes
