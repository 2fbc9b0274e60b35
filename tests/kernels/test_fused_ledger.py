"""The ledger's kernel against its reference, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from torch import library

from mentorch.kernels import ledger as module
from mentorch.kernels.ledger import fields, new_ledger, record, record_ref
from mentorch.kernels.rows import row_tile

pytestmark = pytest.mark.usefixtures("device")

SIZES = [
    (1, 1),  # one sample, one class: certain
    (2, 2),
    (63, 10),  # several rows a program at odd offsets, the last tile not full
    (64, 1000),  # whole lines
    (127, 1001),  # the same at odd offsets
    (3, 21841),  # several chunks at odd offsets
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(batch, classes, dtype, device, seed=0):
    """A batch of `record` on a table of twice as many samples."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, classes, generator=generator) * 3).to(dtype)
    labels = torch.randint(min(classes, 3), (batch,), generator=generator)
    ids = torch.randperm(2 * batch, generator=generator)[:batch]
    loss, weight = torch.rand(2, batch, generator=generator) * 5
    return [tensor.to(device) for tensor in (logits, labels, ids, loss, weight)]


def assert_same(found, expected):
    """All rows but scratch: counts and classes alike, numbers to two roundings."""
    expected = fields(expected[:-1].cpu())
    for name, column in fields(found[:-1].cpu()).items():
        rtol = 2 * torch.finfo(column.dtype).eps if column.is_floating_point() else 0
        torch.testing.assert_close(
            column, expected[name], rtol=rtol, atol=1e-6, equal_nan=True, msg=name
        )


def check(device, *batches, **options):
    """Several visits by the kernel and by the reference, on the CPU."""
    samples = 2 * len(batches[0][0])
    found, expected = new_ledger(samples, device), new_ledger(samples)
    for batch in batches:
        record(found, *batch, **options)
        record_ref(expected, *[tensor.cpu() for tensor in batch], **options)
    assert_same(found, expected)
    return fields(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_grid(batch, classes, dtype, device):
    found = check(device, *[draw(batch, classes, dtype, device, seed) for seed in range(2)])
    assert found["visits"].max() > 1 or batch < 60


@pytest.mark.parametrize(("width", "offset"), [(1024, 8), (1024, 1), (1003, 3)])
def test_strided_rows(width, offset, device):  # on a line, inside one, anywhere
    wide, *rest = draw(5, width, torch.bfloat16, device)
    for classes in (1000, 7):
        check(device, (wide[:, offset : offset + classes], *rest))
        check(device, (wide[:, offset : offset + 14 : 2], *rest))  # not side by side


def test_a_million_classes(device):
    logits, *rest = draw(1, 1_000_000, torch.bfloat16, device)
    tile = row_tile(logits, splits=1)
    next_of_lane = 700_000 + tile.lanes * tile.vector
    for column in (700_000, next_of_lane, 999_999):  # equals in one lane, and the last class
        logits[0, column] = 20.0
    found = check(device, (logits, *rest))
    assert found["predicted"][rest[1].cpu()].tolist() == [700_000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 1001])  # in one line, and over lanes and lines
def test_ties_and_rows_without_a_softmax(classes, dtype, device):
    logits = torch.zeros(8, classes, dtype=dtype)
    logits[1, classes - 1] = logits[1, 2] = 4.0
    logits[2] = -math.inf
    logits[3, classes - 2] = math.inf
    logits[4, 1] = math.nan
    logits[5], logits[5, 3] = -math.inf, 1.0
    logits[6] = -torch.finfo(dtype).max
    batch = draw(8, 5, dtype, device)[1:]
    found = check(device, (logits.to(device), *batch), (logits.to(device), *batch))
    predicted = found["predicted"][batch[1].cpu()]
    assert predicted.tolist() == [0, 2, -1, -1, -1, 3, 0, 0]


def test_what_does_not_count(device):
    """Ids outside the table, ignored labels, losses and weights that are not finite or too big."""
    batches = []
    for seed in range(4):
        _, labels, ids, loss, weight = batch = draw(64, 10, torch.float32, device, seed)
        ids[0], ids[1], ids[2] = -1, 128, 2**40
        labels[3] = labels[4] = 7
        loss[5], loss[6], loss[7], loss[8] = math.nan, math.inf, 1e30, 70_000.0
        weight[9], weight[10], weight[11] = math.nan, -math.inf, 1e-9
        batches.append(batch)
    found = check(device, *batches, ignore_index=7)
    table = new_ledger(128, device)
    record(table, *batches[0], ignore_index=7)
    untouched = torch.ones(128, dtype=torch.bool)
    untouched[batches[0][2][5:].cpu()] = False
    assert torch.equal(table[:-1].cpu()[untouched], new_ledger(128)[:-1][untouched])
    assert found["loss_mean"][:-1].isnan().any()


def test_counts_stay_at_255(device):
    logits, labels, ids, loss, weight = draw(2, 2, torch.float32, device)
    found, expected = new_ledger(4, device), new_ledger(4)
    for table in (found, expected):
        for column, count in (("visits", 253), ("forgetting", 254)):
            fields(table)[column].fill_(count)
        for column in ("loss_mean", "loss_var", "weight_mean", "weight_var"):
            fields(table)[column].fill_(0.5)
    for step in range(5):  # right, wrong, right, …
        labels[:] = 0
        logits[:, 0], logits[:, 1] = float(step % 2 == 0), 0.5
        for table in (found, expected):
            batch = (logits, labels, ids, loss + step, weight)
            (record if table is found else record_ref)(table, *[x.to(table.device) for x in batch])
    assert_same(found, expected)
    assert fields(found)["visits"][ids].tolist() == [255, 255]
    assert fields(found)["forgetting"][ids].tolist() == [255, 255]


def test_opcheck(device):
    batch = draw(6, 10, torch.float32, device)
    library.opcheck(module._record, (new_ledger(12, device), *batch, -100))


def test_compiles_as_one_graph(device):
    logits, *rest = draw(6, 10, torch.float32, device)
    found, expected = new_ledger(12, device), new_ledger(12, device)
    compiled = torch.compile(lambda t, z: record(t, z * 2, *rest), fullgraph=True)
    for _ in range(2):
        compiled(found, logits)
        record(expected, logits * 2, *rest)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_it_can_be_captured_and_never_waits(device):
    batch = draw(128, 1000, torch.bfloat16, device)
    found, expected = new_ledger(256, device), new_ledger(256, device)
    record(new_ledger(256, device), *batch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record(found, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            graph.replay()
            record(expected, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
