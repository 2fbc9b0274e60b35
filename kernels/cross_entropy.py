"""Per-sample cross-entropy of hard labels, with label smoothing ε.

    ℓ_i = logsumexp(z_i) − (1 − ε) z_i[y_i] − ε mean(z_i)          nats
    ∂ℓ_i/∂z_i = softmax(z_i) − (1 − ε) 1[y_i] − ε / C

Half-precision logits are raised to float32 first; float64 stays float64 (reference only).

Bytes, for logits of s bytes an element: forward reads s·B·C, backward reads s·B·C (from the L2 cache
when the logits fit there, about 40 MB) and writes s·B·C, each once and 16 bytes a thread. A row whose
upstream gradient is 0 is not read again: its gradient is 0 whatever its logits.

Rows may start anywhere (C = 21841 in bf16 is aligned once in eight rows). A program walks a row from
the 16-byte line that holds its first element: whole lines are moved 16 bytes a thread, the
neighbours' elements in the first and last line are left out of the sums and not written.

Shapes: B batch, C classes, R rows of a program, L lanes (R times the lanes of a row), V elements of
a lane in one 16-byte line.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mentorch.kernels.backend import (
    INTERPRETED,
    multiprocessors,
    next_power_of_2,
    runs_kernels,
    tickets,
    tl,
    triton,
    vector_width,
)


def cross_entropy_ref(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of every sample, in nats.

    Args:
        logits: [B, C], any floating dtype.
        labels: [B] int64 in [0, C), or ``ignore_index``.
        ignore_index: rows with this label have loss 0 and no gradient.
        label_smoothing: ε in [0, 1]: this share of the target is spread over all classes.

    Returns:
        [B], float64 for float64 logits and float32 for all others.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(dtype),
        labels,
        reduction="none",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


# ---- Forward --------------------------------------------------------------------------------------


@triton.jit
def _merge(top, total, other_top, other_total):
    """Two parts of a running (largest, sum of exponentials)."""
    new_top = tl.maximum(top, other_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − −inf would be NaN
    return new_top, total * tl.exp(top - base) + other_total * tl.exp(other_top - base)


@triton.jit
def lanes_of_rows(
    first_row, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Where a program's lanes work: (row, lane of the row, first line's offset, elements of that
    line that belong to the row before), each [L]."""
    at_L = tl.arange(0, ROWS * LANES)
    row_L = first_row + at_L // LANES
    start_L = row_L * STRIDE
    line_L = (start_L // V) * V
    return row_L, at_L % LANES, line_L, (start_L - line_L).to(tl.int32)


@triton.jit
def load_lines(
    logits_ptr, row_L, lane_L, line_L, skip_L, B, first, C: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """One line a lane: (logits, −inf where not the row's; offsets from the line; which are the row's),
    each [L, V].

    The mask is one for a whole line, so that a line is one load. A column is its offset − skip.
    """
    at_LV = first + lane_L[:, None] * V + tl.arange(0, V)[None, :]
    end_L = ((skip_L + C + V - 1) // V) * V
    z_LV = tl.load(
        logits_ptr + line_L[:, None] + at_LV,
        mask=(row_L < B)[:, None] & (at_LV < end_L[:, None]),
    ).to(tl.float32)
    mine_LV = (at_LV >= skip_L[:, None]) & (at_LV < (skip_L + C)[:, None])
    return tl.where(mine_LV, z_LV, float("-inf")), at_LV, mine_LV


@triton.jit
def _add_lines(top_L, total_L, z_LV):
    """Online softmax: every lane keeps its own running maximum, so no barrier is needed."""
    new_top_L = tl.maximum(top_L, tl.max(z_LV, axis=1))
    base_L = tl.where(new_top_L == float("-inf"), 0.0, new_top_L)  # −inf − −inf would be NaN
    total_L *= tl.exp(top_L - base_L)
    return new_top_L, total_L + tl.sum(tl.exp(z_LV - base_L[:, None]), axis=1)


@triton.jit
def row_statistics(
    logits_ptr, first_row, B, split, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of exp(z − largest), mean of z), each [R], of rows or one split of them.

    A split is CHUNKS chunks, a chunk one line a lane; MEAN says whether the mean is wanted.
    """
    row_L, lane_L, line_L, skip_L = lanes_of_rows(first_row, C, STRIDE, ROWS, LANES, V)
    top_L = tl.full([ROWS * LANES], float("-inf"), tl.float32)
    total_L = tl.zeros([ROWS * LANES], tl.float32)
    mean_L = tl.zeros([ROWS * LANES], tl.float32)
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * (LANES * V)
        z_LV, _, mine_LV = load_lines(
            logits_ptr, row_L, lane_L, line_L, skip_L, B, first, C, V
        )  # fmt: skip
        top_L, total_L = _add_lines(top_L, total_L, z_LV)
        if MEAN:
            mean_L += tl.sum(tl.where(mine_LV, z_LV * (1.0 / C), 0.0), axis=1)
    return join_lanes(top_L, total_L, mean_L, ROWS, LANES)


@triton.jit
def join_lanes(top_L, total_L, mean_L, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The lanes' statistics put together, row by row: three times [R]."""
    top_RL = tl.reshape(top_L, [ROWS, LANES])
    top_R = tl.max(top_RL, axis=1)
    base_R = tl.where(top_R == float("-inf"), 0.0, top_R)
    total_RL = tl.reshape(total_L, [ROWS, LANES]) * tl.exp(top_RL - base_R[:, None])
    return top_R, tl.sum(total_RL, axis=1), tl.sum(tl.reshape(mean_L, [ROWS, LANES]), axis=1)


@triton.jit
def loss_of_rows(
    logits_ptr,
    labels_ptr,
    row_R,
    B,
    top_R,  # largest logit
    log_R,  # log of the sum of exp(z − largest)
    mean_R,  # of the logits; read when smoothing
    ignore_index,
    smoothing,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """(loss, label), [R]. A label outside [0, C) that is not ignored makes its loss NaN."""
    there_R = row_R < B
    label_R = tl.load(labels_ptr + row_R, mask=there_R, other=0).to(tl.int64)
    known_R = (label_R >= 0) & (label_R < C)
    z_R = tl.load(logits_ptr + row_R * STRIDE + label_R, mask=there_R & known_R).to(tl.float32)
    z_R = tl.where(known_R, z_R, float("nan"))
    # Differences from the largest first: their sum with it would round small losses away.
    if SMOOTH:
        loss_R = log_R + (1.0 - smoothing) * (top_R - z_R) + smoothing * (top_R - mean_R)
    else:
        loss_R = log_R + (top_R - z_R)
    return tl.where(label_R == ignore_index, 0.0, loss_R), label_R


@triton.jit
def _combine_splits(
    partial_ptr,  # [3, SPLITS, B]: largest, sum of exponentials, share of the mean
    row_R,
    B,
    SPLITS: tl.constexpr,
    MEAN: tl.constexpr,
):
    there_R = row_R < B
    top_R = tl.full(row_R.shape, float("-inf"), tl.float32)
    total_R = tl.zeros(row_R.shape, tl.float32)
    mean_R = tl.zeros(row_R.shape, tl.float32)
    for split in range(SPLITS):
        at_R = partial_ptr + split * B + row_R
        part_R = tl.load(at_R, mask=there_R, other=float("-inf"), cache_modifier=".cg")
        exp_R = tl.load(at_R + SPLITS * B, mask=there_R, other=0.0, cache_modifier=".cg")
        top_R, total_R = _merge(top_R, total_R, part_R, exp_R)
        if MEAN:
            mean_R += tl.load(
                at_R + 2 * SPLITS * B, mask=there_R, other=0.0, cache_modifier=".cg"
            )
    return top_R, total_R, mean_R


@triton.jit
def is_last_program(ticket_ptr):
    """True in the program of the grid that comes here last: all others' stores are visible to it.

    It puts the counter back to zero for the next launch.
    """
    tl.debug_barrier()  # every warp's stores come before the ticket, which one thread draws
    programs = tl.num_programs(0) * tl.num_programs(1)
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def losses_of_program(
    logits_ptr,
    labels_ptr,
    loss_ptr,  # [B] float32, written
    lse_ptr,  # [2, B] float32, written: largest logit, log of the sum of exp(z − largest)
    present_ptr,  # [B] float32, written: the loss as the percentile takes it; or None
    partial_ptr,  # [3, SPLITS, B] float32, written when SPLITS > 1
    B,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The losses of one program's rows, or its share of them when rows are split."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row_R = first_row + tl.arange(0, ROWS)
    split = tl.program_id(1)
    top_R, total_R, mean_R = row_statistics(
        logits_ptr, first_row, B, split, C, STRIDE, ROWS, LANES, V, CHUNKS, SMOOTH
    )
    if SPLITS > 1:
        at_R = partial_ptr + split * B + row_R
        tl.store(at_R, top_R, mask=row_R < B)
        tl.store(at_R + SPLITS * B, total_R, mask=row_R < B)
        if SMOOTH:
            tl.store(at_R + 2 * SPLITS * B, mean_R, mask=row_R < B)
    else:
        _store_losses(
            logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R,
            mean_R, ignore_index, smoothing, C, STRIDE, SMOOTH,
        )  # fmt: skip


@triton.jit
def _store_losses(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R, mean_R,
    ignore_index, smoothing, C: tl.constexpr, STRIDE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    log_R = tl.log(total_R)
    loss_R, label_R = loss_of_rows(
        logits_ptr, labels_ptr, row_R, B, top_R, log_R, mean_R, ignore_index, smoothing, C, STRIDE,
        SMOOTH,
    )  # fmt: skip
    tl.store(lse_ptr + row_R, top_R, mask=row_R < B)
    tl.store(lse_ptr + B + row_R, log_R, mask=row_R < B)
    tl.store(loss_ptr + row_R, loss_R, mask=row_R < B)
    if present_ptr is not None:
        present_R = tl.where(loss_R != loss_R, float("inf"), loss_R)
        present_R = tl.where(label_R == ignore_index, float("nan"), present_R)
        tl.store(present_ptr + row_R, present_R, mask=row_R < B)


@triton.jit
def finish_splits(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, B, ignore_index, smoothing,
    C: tl.constexpr, STRIDE: tl.constexpr, SPLITS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The losses of all rows from the parts of split rows, by the last program."""
    for start in range(0, B, 128):
        row_R = start + tl.arange(0, 128).to(tl.int64)
        top_R, total_R, mean_R = _combine_splits(partial_ptr, row_R, B, SPLITS, SMOOTH)
        _store_losses(
            logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R,
            mean_R, ignore_index, smoothing, C, STRIDE, SMOOTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "ignore_index"])
def _cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    lse_ptr,
    present_ptr,
    partial_ptr,
    ticket_ptr,
    B,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    losses_of_program(
        logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, B, ignore_index,
        smoothing, C, STRIDE, ROWS, LANES, V, CHUNKS, SPLITS, SMOOTH,
    )  # fmt: skip
    if SPLITS > 1:
        if is_last_program(ticket_ptr):
            finish_splits(
                logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, B,
                ignore_index, smoothing, C, STRIDE, SPLITS, SMOOTH,
            )  # fmt: skip


# ---- Backward -------------------------------------------------------------------------------------


@triton.jit
def gradient_of_rows(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    grad_ptr,  # [B, C] contiguous, written
    row_scale_ptr,  # [B] of stride row_scale_stride: what multiplies the gradient of each ℓ_i
    row_scale_stride,
    scale,  # multiplies all of them
    first_row,
    B,
    split,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,  # 1 unless STRIDE and C leave the same remainder by it
    CHUNKS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """scale · row_scale_i · (softmax(z_i) − target_i) of some rows or parts of rows."""
    row_L, lane_L, line_L, skip_L = lanes_of_rows(first_row, C, STRIDE, ROWS, LANES, V)
    there_L = row_L < B
    label_L = tl.load(labels_ptr + row_L, mask=there_L, other=0).to(tl.int64)
    top_L = tl.load(lse_ptr + row_L, mask=there_L, other=0.0)
    log_L = tl.load(lse_ptr + B + row_L, mask=there_L, other=0.0)
    scale_L = tl.load(row_scale_ptr + row_L * row_scale_stride, mask=there_L, other=0.0)
    scale_L = scale_L.to(tl.float32) * scale
    scale_L = tl.where((label_L < 0) | (label_L >= C), float("nan"), scale_L)  # as its loss
    scale_L = tl.where(label_L == ignore_index, 0.0, scale_L)
    grad_line_L = (row_L * C // V) * V
    read_L = tl.where(scale_L == 0.0, B, row_L)  # rows of weight 0 are written, not read
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * (LANES * V)
        z_LV, at_LV, mine_LV = load_lines(
            logits_ptr, read_L, lane_L, line_L, skip_L, B, first, C, V
        )  # fmt: skip
        p_LV = tl.exp((z_LV - top_L[:, None]) - log_L[:, None])
        target_LV = (at_LV == (label_L + skip_L)[:, None]).to(tl.float32)
        if SMOOTH:
            target_LV = (1.0 - smoothing) * target_LV + smoothing / C
        # 0 · NaN must be 0: a row that weighs nothing leaves no trace.
        grad_LV = tl.where(
            scale_L[:, None] == 0.0, 0.0, scale_L[:, None] * (p_LV - target_LV)
        ).to(grad_ptr.dtype.element_ty)
        to_LV = grad_ptr + grad_line_L[:, None] + at_LV
        if C % V == 0:
            tl.store(to_LV, grad_LV, mask=there_L[:, None] & (at_LV < C))
        else:
            # Lines wholly inside the row go out 16 bytes a thread, the rest by element.
            begin_L = first + lane_L * V
            whole_L = there_L & (begin_L >= skip_L) & (begin_L + V <= skip_L + C)
            tl.store(to_LV, grad_LV, mask=whole_L[:, None] & (at_LV >= 0))
            tl.store(to_LV, grad_LV, mask=(there_L & ~whole_L)[:, None] & mine_LV)


@triton.jit(do_not_specialize=["B", "ignore_index"])
def _cross_entropy_bwd_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    grad_ptr,
    row_scale_ptr,
    row_scale_stride,
    scale_ptr,  # 0-d, or None for 1
    count_ptr,  # 0-d, or None: what the scale is divided by
    written_ptr,  # 0-d, or None: the scale of a gradient that is there already
    B,
    ignore_index,
    smoothing,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if count_ptr is not None:
        scale = scale / tl.load(count_ptr)
    needed = True
    if written_ptr is not None:
        needed = scale != tl.load(written_ptr)
    if needed:
        gradient_of_rows(
            logits_ptr, labels_ptr, lse_ptr, grad_ptr, row_scale_ptr, row_scale_stride, scale,
            tl.program_id(0).to(tl.int64) * ROWS, B, tl.program_id(1), ignore_index, smoothing,
            C, STRIDE, ROWS, LANES, V, CHUNKS, SMOOTH,
        )  # fmt: skip


# ---- Launchers ------------------------------------------------------------------------------------


class RowTile(NamedTuple):
    """How a grid goes over the rows of logits [B, C]."""

    rows: int  # of a program
    lanes: int  # of a row
    vector: int  # elements of a lane
    chunks: int  # of a split, each one line a lane
    splits: int  # of a row
    warps: int

    def grid(self, batch: int) -> tuple[int, int]:
        """Programs over rows, programs over parts of rows."""
        return -(-batch // self.rows), self.splits

    def constants(self, logits: Tensor) -> dict[str, int]:
        """The compile-time arguments; C and the stride are among them because the compiler must
        know what divides them to move 16 bytes at once."""
        return {
            "C": logits.shape[1],
            "STRIDE": logits.stride(0),
            "ROWS": self.rows,
            "LANES": self.lanes,
            "V": self.vector,
            "CHUNKS": self.chunks,
            "num_warps": self.warps,
        }


def row_tile(
    logits: Tensor, *, splits: int | None = None, most_chunks: int | None = None, vector: int = 0
) -> RowTile:
    """One line a thread for short rows, up to four for long ones, which are then walked in chunks.

    Rows are split over programs when the batch alone would leave multiprocessors idle, or to keep a
    program's share under ``most_chunks``.
    """
    batch, classes = logits.shape
    vector = vector or vector_width(logits)
    ragged = logits.stride(0) % vector != 0 or classes % vector != 0
    lines = -(-(classes + (vector - 1 if ragged else 0)) // vector)
    warps = 8 if lines > 1024 or batch > 1024 else 4
    threads = 32 * warps
    lanes = min(next_power_of_2(lines), 4 * threads)
    rows = max(min(threads // lanes, next_power_of_2(batch)), 1)
    if INTERPRETED and batch >= 64:
        rows = max(rows, 16)  # the interpreter pays by the program, not by its size
    chunks = -(-lines // lanes)
    if splits is None:
        programs = -(-batch // rows)
        splits = -(-chunks // most_chunks) if most_chunks else 1
        splits = max(splits, min(chunks, 2 * multiprocessors(logits.device) // programs))
    return RowTile(rows, lanes, vector, -(-chunks // splits), splits, warps)


def row_buffers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Room for (loss [B], lse [2, B]), float32."""
    batch = logits.shape[0]
    return (
        logits.new_empty(batch, dtype=torch.float32),
        logits.new_empty(2, batch, dtype=torch.float32),
    )


def partials(logits: Tensor, tile: RowTile) -> Tensor | None:
    """Scratch for the parts of split rows."""
    if tile.splits == 1:
        return None
    return logits.new_empty(3, tile.splits, logits.shape[0], dtype=torch.float32)


def unit_stride(logits: Tensor) -> Tensor:
    """Logits whose classes lie side by side, as the kernels take them; a copy only if they do not."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def launch_forward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    *,
    present: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [B], lse [2, B]) float32; ``present`` is filled as `losses_of_program` says.

    lse is kept in two parts, whose sum is log Σ exp(z): largest logit and log Σ exp(z − largest).
    """
    batch = logits.shape[0]
    logits, labels = unit_stride(logits), labels.contiguous()
    tile = row_tile(logits, splits=splits)
    loss, lse = row_buffers(logits)
    _cross_entropy_fwd_kernel[tile.grid(batch)](
        logits,
        labels,
        loss,
        lse,
        present,
        partials(logits, tile),
        tickets(logits.device) if tile.splits > 1 else None,
        batch,
        ignore_index,
        smoothing,
        SPLITS=tile.splits,
        SMOOTH=smoothing > 0,
        **tile.constants(logits),
    )
    return loss, lse


def launch_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    count: Tensor | None,
    ignore_index: int,
    smoothing: float,
    *,
    grad: Tensor | None = None,
    written: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """scale / count · row_scale_i · ∂ℓ_i/∂z_i: [B, C] contiguous, in the logits' dtype.

    With ``grad`` and ``written``, a gradient and the scale it was written at, it is written again
    only where that is not the scale wanted.
    """
    batch, classes = logits.shape
    logits, labels = unit_stride(logits), labels.contiguous()
    vector = vector_width(logits)
    same_remainder = (logits.stride(0) - classes) % vector == 0
    tile = row_tile(logits, splits=splits, most_chunks=1, vector=vector if same_remainder else 1)
    grad = logits.new_empty(batch, classes) if grad is None else grad
    _cross_entropy_bwd_kernel[tile.grid(batch)](
        logits,
        labels,
        lse,
        grad,
        row_scale,
        row_scale.stride(0),
        scale,
        count,
        written,
        batch,
        ignore_index,
        smoothing,
        SMOOTH=smoothing > 0,
        **tile.constants(logits),
    )
    return grad


# ---- Registration with torch ----------------------------------------------------------------------


@torch.library.custom_op("mentorch::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(logits, labels, ignore_index, smoothing)


@_cross_entropy.register_fake
def _(logits, labels, ignore_index, smoothing):
    return row_buffers(logits)


@torch.library.custom_op("mentorch::cross_entropy_gradient", mutates_args=())
def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    scale: Tensor | None,
    count: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """`launch_backward` as torch knows it."""
    return launch_backward(logits, labels, lse, row_scale, scale, count, ignore_index, smoothing)


@cross_entropy_gradient.register_fake
def _(logits, labels, lse, row_scale, scale, count, ignore_index, smoothing):
    return logits.new_empty(logits.shape)


def _refuse_double_backward(ctx, *_gradients):
    raise RuntimeError(
        "the fused cross-entropy has no second derivative; differentiate "
        "cross_entropy_ref or reweight_ref twice instead"
    )


cross_entropy_gradient.register_autograd(_refuse_double_backward)


def _save_for_backward(ctx, inputs, output):
    logits, labels, ctx.ignore_index, ctx.smoothing = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _cross_entropy_backward(ctx, grad_loss, _grad_lse):
    if grad_loss is None:
        return None, None, None, None
    logits, labels, lse = ctx.saved_tensors
    grad = cross_entropy_gradient(
        logits, labels, lse, grad_loss, None, None, ctx.ignore_index, ctx.smoothing
    )
    return grad, None, None, None


_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_save_for_backward)


def check_logits(logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
    """Raises ValueError for shapes, an empty batch or a smoothing that have no loss."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(labels.shape)}"
        raise ValueError(f"logits must be [B, C] and labels [B], got {shapes}")
    if logits.shape[0] == 0:
        raise ValueError("the batch is empty: logits have 0 rows")
    if logits.shape[1] == 0:
        raise ValueError(f"there are no classes: logits are {list(logits.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"the logits are on {logits.device} but the labels on {labels.device}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of every sample, differentiable: `cross_entropy_ref`, fused on a GPU.

    Args:
        logits: [B, C], any floating dtype; rows may be strided.
        labels: [B] integers in [0, C), or ``ignore_index``. On a GPU a label outside makes its
            sample's loss NaN, since raising an error would wait for the device.
        ignore_index: rows with this label have loss 0 and no gradient.
        label_smoothing: ε in [0, 1].

    Returns:
        [B] nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, or ε out of range.
    """
    check_logits(logits, labels, label_smoothing)
    if runs_kernels(logits):
        loss: Tensor = _cross_entropy(logits, labels, ignore_index, label_smoothing)[0]
        return loss
    return cross_entropy_ref(logits, labels.long(), ignore_index, label_smoothing)
