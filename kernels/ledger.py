"""What training knows about every sample, 24 bytes each: losses, weights, predictions, forgetting.

A table [N + 1, 24] of bytes on the device, a row a sample; the last row is scratch, where rows that
are no sample go, so that nothing has to be filtered out (which would wait for the device). A row
(`FIELDS`; little-endian, as every machine that torch runs on):

    bytes 0–11    loss_mean f32 · weight_mean f32 · predicted i32
    bytes 12–21   loss f16 · loss_var f16 · weight f16 · weight_var f16 · probability f16
    bytes 22–23   visits u8 · forgetting u8, which stay at 255 once they are there

A visit with loss ℓ, weight v and logits z of a sample with the given label y:

    loss, weight = ℓ, v                      as they are; finite ones cut to ±65504, float16's range
    predicted    = argmax_c z_c              the first of equals; −1 where softmax(z) is no number
    probability  = max_c softmax(z)_c
    forgetting  += 1                         if predicted was y and no longer is
                                             (Toneva et al., ICLR 2019, arXiv:1812.05159)
    and, if ℓ and v are both finite (others would stay in a mean for ever), for x = ℓ and x = v:
    n     = visits + 1, at most 255          from there on the oldest visits fade, by 1/255 a visit
    mean' = mean + (x − mean) / n
    var'  = var + ((x − mean)(x − mean') − var) / n      Welford: divided by n, not by n − 1

A sample never visited has NaN, predicted −1 and counts of 0. The variances are rounded to float16
at every visit: after 90 visits they are off by 0.1% of their value, after 255 by 0.2% (root mean
square over samples; 1% at most).

Bytes, for logits of s bytes an element: s·B·C read (the loss has just read them: from the L2 cache
where they fit there), 24·B of the table read and written. One launch. A row of logits is walked by
one program whatever its length, lanes and chunks as in `rows`.

Shapes: B batch, C classes, N samples of the data set, R rows of a program, L lanes, V elements of a
lane in one 16-byte line.
"""

import torch
from torch import Tensor, library

from mentorch.kernels.backend import on_its_device, runs_kernels, tl, triton
from mentorch.kernels.cross_entropy import check_logits
from mentorch.kernels.history import table_rows
from mentorch.kernels.rows import lanes_of_rows, load_lines, row_tile, unit_stride

ROW_BYTES = 24
FIELDS = {  # name: (type, first byte)
    "loss": (torch.float16, 12),
    "loss_mean": (torch.float32, 0),
    "loss_var": (torch.float16, 14),
    "weight": (torch.float16, 16),
    "weight_mean": (torch.float32, 4),
    "weight_var": (torch.float16, 18),
    "predicted": (torch.int32, 8),
    "probability": (torch.float16, 20),
    "visits": (torch.uint8, 22),
    "forgetting": (torch.uint8, 23),
}
LARGEST_COUNT = 255  # of a byte
LARGEST_HALF = 65504.0  # of float16
_LARGEST_COUNT = tl.constexpr(LARGEST_COUNT)
_LARGEST_HALF = tl.constexpr(LARGEST_HALF)
_NO_CLASS = tl.constexpr(2**31 - 1)  # a column behind every other


def fields(table: Tensor) -> dict[str, Tensor]:
    """The columns of a table [M, 24] uint8 by name, each a view [M] of stride 24 bytes."""
    return {
        name: table.view(dtype)[:, first // dtype.itemsize]
        for name, (dtype, first) in FIELDS.items()
    }


def new_ledger(samples: int, device: torch.device | str | None = None) -> Tensor:
    """An empty table for samples 0 … N − 1: [N + 1, 24] uint8.

    Raises:
        ValueError: no samples.
    """
    if samples < 1:
        raise ValueError(f"a ledger needs at least 1 sample, got {samples}")
    row = torch.zeros(1, ROW_BYTES, dtype=torch.uint8)
    for column in fields(row).values():
        column.fill_(torch.nan if column.is_floating_point() else 0)
    fields(row)["predicted"].fill_(-1)
    return row.to(device).repeat(samples + 1, 1)


def _to_half(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.clamp(-LARGEST_HALF, LARGEST_HALF), x).half()


def _predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(argmax, its probability), each [B]; −1 and NaN where a row has no softmax."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = z.amax(1, keepdim=True)
    probability = 1 / (z - top).exp().sum(1)
    return torch.where(probability.isnan(), -1, z.argmax(1)), probability


def record_ref(
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    ignore_index: int = -100,
) -> None:
    """Adds a visit to the samples' rows, in place; arguments as `record`."""
    rows = table_rows(table, torch.where(labels == ignore_index, -1, sample_ids))
    visited = table[rows]
    row = fields(visited)
    loss, weight = sample_loss.float(), sample_weight.float()
    predicted, probability = _predictions(logits)
    was_right = (row["predicted"] == labels) & (labels >= 0)
    forgotten = was_right & (predicted != labels) & (row["forgetting"] < LARGEST_COUNT)
    counts = loss.isfinite() & weight.isfinite()
    n = (row["visits"].float() + 1).clamp(max=LARGEST_COUNT)
    for name, x in (("loss", loss), ("weight", weight)):
        for column, now in zip(("_mean", "_var"), _welford(row, name, x, n), strict=True):
            at = row[name + column]
            at.copy_(torch.where(counts, now, at))
        row[name].copy_(_to_half(x))
    row["predicted"].copy_(predicted)
    row["probability"].copy_(probability)
    row["visits"].copy_(torch.where(counts, n, row["visits"]))
    row["forgetting"].add_(forgotten)
    table[rows] = visited


def _welford(row: dict[str, Tensor], name: str, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) after x, the n-th."""
    mean, var = (row[name + column].float().where(n > 1, 0.0) for column in ("_mean", "_var"))
    new_mean = mean + (x - mean) / n
    new_var = var + ((x - mean) * (x - new_mean) - var) / n
    return new_mean, _to_half(new_var.clamp(max=LARGEST_HALF))


# ---- Kernel -------------------------------------------------------------------------------------


@triton.jit
def _first_largest(
    logits_ptr, first_row, B, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(argmax, sum of exp(z − largest)) of rows, each [R]; the sum is below 1 or NaN where a row
    has no softmax."""
    row_L, lane_L, line_L, skip_L = lanes_of_rows(first_row, C, STRIDE, ROWS, LANES, V)
    top_L = tl.full([ROWS * LANES], float("-inf"), tl.float32)
    total_L = tl.zeros([ROWS * LANES], tl.float32)
    class_L = tl.full([ROWS * LANES], _NO_CLASS, tl.int32)
    for chunk in range(CHUNKS):
        z_LV, at_LV, _ = load_lines(
            logits_ptr, row_L, lane_L, line_L, skip_L, B, chunk * (LANES * V), C, V
        )  # fmt: skip
        here_L = tl.max(z_LV, axis=1)
        equal_LV = z_LV == here_L[:, None]
        first_L = tl.min(tl.where(equal_LV, at_LV - skip_L[:, None], _NO_CLASS), axis=1)
        class_L = tl.where(here_L > top_L, first_L, class_L)  # later chunks hold later classes
        new_top_L = tl.maximum(top_L, here_L)
        base_L = tl.where(new_top_L == float("-inf"), 0.0, new_top_L)  # −inf − −inf would be NaN
        total_L = total_L * tl.exp(top_L - base_L) + tl.sum(tl.exp(z_LV - base_L[:, None]), axis=1)
        top_L = new_top_L
    top_RL = tl.reshape(top_L, [ROWS, LANES])
    top_R = tl.max(top_RL, axis=1)
    base_R = tl.where(top_R == float("-inf"), 0.0, top_R)
    total_R = tl.sum(tl.reshape(total_L, [ROWS, LANES]) * tl.exp(top_RL - base_R[:, None]), axis=1)
    class_RL = tl.where(
        top_RL == top_R[:, None], tl.reshape(class_L, [ROWS, LANES]), _NO_CLASS
    )  # fmt: skip
    return tl.min(class_RL, axis=1), total_R


@triton.jit
def _finite(x):
    return (x - x) == 0.0


@triton.jit
def _cut_to_half(x):
    """The bits of `_to_half`, in the lower half of an int32."""
    cut = tl.minimum(tl.maximum(x, -_LARGEST_HALF), _LARGEST_HALF)  # takes NaN for a number
    half = tl.where(_finite(x), cut, x).to(tl.float16)
    return half.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def _upper_half(word):
    """The float16 in the upper half of an int32."""
    bits = ((word >> 16) & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _add_value(mean_word_R, last_word_R, x_R, n_R, counts_R):
    """The two words of one quantity after x, the n-th: mean; last value and variance."""
    first_R = n_R == 1.0
    mean_R = tl.where(first_R, 0.0, mean_word_R.to(tl.float32, bitcast=True))
    var_R = tl.where(first_R, 0.0, _upper_half(last_word_R))
    new_mean_R = mean_R + tl.div_rn(x_R - mean_R, n_R)
    new_var_R = var_R + tl.div_rn((x_R - mean_R) * (x_R - new_mean_R) - var_R, n_R)
    new_var_R = _cut_to_half(tl.minimum(new_var_R, _LARGEST_HALF))
    new_var_R = tl.where(counts_R, new_var_R, (last_word_R >> 16) & 0xFFFF)
    new_mean_R = tl.where(counts_R, new_mean_R.to(tl.int32, bitcast=True), mean_word_R)
    return new_mean_R, _cut_to_half(x_R) | (new_var_R << 16)


@triton.jit(do_not_specialize=["B", "N", "ignore_index"])
def _record_kernel(
    table_ptr,  # [N + 1, 6] int32: the table in words
    logits_ptr,
    labels_ptr,
    ids_ptr,
    loss_ptr,  # [B] float32
    weight_ptr,  # [B] float32
    B,
    N,
    ignore_index,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    class_R, total_R = _first_largest(
        logits_ptr, first_row, B, C, STRIDE, ROWS, LANES, V, CHUNKS
    )  # fmt: skip
    row_R = first_row + tl.arange(0, ROWS)
    there_R = row_R < B
    label_R = tl.load(labels_ptr + row_R, mask=there_R, other=0).to(tl.int64)
    id_R = tl.load(ids_ptr + row_R, mask=there_R, other=-1).to(tl.int64)
    kept_R = (id_R >= 0) & (id_R < N) & (label_R != ignore_index)
    at_R = table_ptr + id_R * 6
    loss_R = tl.load(loss_ptr + row_R, mask=there_R, other=0.0)
    weight_R = tl.load(weight_ptr + row_R, mask=there_R, other=0.0)

    loss_mean_R = tl.load(at_R, mask=kept_R, other=0)
    weight_mean_R = tl.load(at_R + 1, mask=kept_R, other=0)
    old_class_R = tl.load(at_R + 2, mask=kept_R, other=0)
    last_loss_R = tl.load(at_R + 3, mask=kept_R, other=0)
    last_weight_R = tl.load(at_R + 4, mask=kept_R, other=0)
    counters_R = tl.load(at_R + 5, mask=kept_R, other=0)
    tl.debug_barrier()  # several threads may have loaded a row that one of them stores

    known_R = total_R >= 1.0  # the largest's own share is 1; False for NaN
    class_R = tl.where(known_R, class_R, -1)
    probability_R = tl.where(known_R, tl.div_rn(1.0, total_R), float("nan"))
    forgetting_R = (counters_R >> 24) & 0xFF
    was_right_R = (old_class_R == label_R) & (label_R >= 0)
    forgotten_R = was_right_R & (class_R != label_R) & (forgetting_R < _LARGEST_COUNT)
    visits_R = (counters_R >> 16) & 0xFF
    n_R = tl.minimum(visits_R + 1, _LARGEST_COUNT)
    counts_R = _finite(loss_R) & _finite(weight_R)
    loss_mean_R, last_loss_R = _add_value(
        loss_mean_R, last_loss_R, loss_R, n_R.to(tl.float32), counts_R
    )  # fmt: skip
    weight_mean_R, last_weight_R = _add_value(
        weight_mean_R, last_weight_R, weight_R, n_R.to(tl.float32), counts_R
    )  # fmt: skip
    counters_R = tl.where(counts_R, n_R, visits_R) | ((forgetting_R + forgotten_R) << 8)
    counters_R = _cut_to_half(probability_R) | (counters_R << 16)

    tl.store(at_R, loss_mean_R, mask=kept_R)
    tl.store(at_R + 1, weight_mean_R, mask=kept_R)
    tl.store(at_R + 2, class_R, mask=kept_R)
    tl.store(at_R + 3, last_loss_R, mask=kept_R)
    tl.store(at_R + 4, last_weight_R, mask=kept_R)
    tl.store(at_R + 5, counters_R, mask=kept_R)


@on_its_device
def launch_record(
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    ignore_index: int,
) -> None:
    """`record_ref` in one launch, but that the scratch row is left as it is."""
    batch = logits.shape[0]
    logits = unit_stride(logits)
    tile = row_tile(logits, splits=1)
    _record_kernel[tile.grid(batch)](
        table.view(torch.int32),
        logits,
        labels.contiguous(),
        sample_ids.contiguous(),
        sample_loss.float().contiguous(),
        sample_weight.float().contiguous(),
        batch,
        table.shape[0] - 1,
        ignore_index,
        **tile.constants(logits),
    )


@library.custom_op("mentorch::record", mutates_args=("table",))
def _record(
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    ignore_index: int,
) -> None:
    launch_record(table, logits, labels, sample_ids, sample_loss, sample_weight, ignore_index)


@_record.register_fake
def _(table, logits, labels, sample_ids, sample_loss, sample_weight, ignore_index):
    return None


def _check(table: Tensor, logits: Tensor, *of_batch: Tensor) -> None:
    if table.ndim != 2 or table.shape[1] != ROW_BYTES or table.dtype != torch.uint8:
        raise ValueError(
            f"a ledger's table is [N + 1, {ROW_BYTES}] uint8, as `new_ledger` makes it, got "
            f"{list(table.shape)} {table.dtype}"
        )
    if not table.is_contiguous() or table.device != logits.device:
        raise ValueError(
            f"the table must be contiguous and where the logits are, {logits.device}; it is on "
            f"{table.device} with strides {table.stride()}"
        )
    for tensor in of_batch:
        if tensor.shape != logits.shape[:1] or tensor.device != logits.device:
            raise ValueError(
                f"sample ids, losses and weights must be [{logits.shape[0]}] on {logits.device}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )


@torch.no_grad()
def record(
    table: Tensor,
    logits: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    ignore_index: int = -100,
) -> None:
    """Adds a visit to the samples' rows of a table, in place; on a GPU in one launch.

    Nothing waits for the device, and a CUDA graph can hold it.

    Args:
        table: [N + 1, 24] uint8 from `new_ledger`, changed.
        logits: [B, C], any floating dtype; rows may be strided. The mathematics is float32.
        labels: [B] integers, the given labels; rows with ``ignore_index`` are no visits.
        sample_ids: [B] int64, each at most once; rows with one outside [0, N) are no visits.
        sample_loss: [B], nats.
        sample_weight: [B].
        ignore_index: see ``labels``.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    check_logits(logits, labels, 0.0)
    _check(table, logits, sample_ids, sample_loss, sample_weight)
    run = _record if runs_kernels(logits) else record_ref
    run(
        table, logits.detach(), labels, sample_ids, sample_loss.detach(), sample_weight.detach(),
        ignore_index,
    )  # fmt: skip
