"""Rows of logits in tiles: loads of whole lines, the online softmax, and who finishes last.

    lse_i = m_i + log Σ_c exp(z_ic − m_i)      m_i the largest logit of the row

Rows may start anywhere (C = 21841 in bf16 is aligned once in eight rows). A program walks a row
from the 16-byte line that holds its first element: whole lines are moved 16 bytes a thread, and the
neighbours' elements in the first and last line are left out. Such a line never ends in another
memory page than an element of the row, so nothing foreign is touched.

Every lane keeps its own running maximum and sum, so that walking a row needs no barrier; the lanes
are put together once. Rows too few to fill the device are split over programs, and the program that
draws the last ticket puts the parts together.

Shapes: B batch, C classes, R rows of a program, L lanes (R times the lanes of a row), V elements of
a lane in one 16-byte line.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mentorch.kernels.backend import (
    INTERPRETED,
    multiprocessors,
    next_power_of_2,
    tl,
    triton,
    vector_width,
)


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
    """One line a lane, three times [L, V]: logits, −inf where they are not the row's; offsets from
    the line; which are the row's.

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
def tile_statistics(
    z_LV, mine_LV, C: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MEAN: tl.constexpr
):  # fmt: skip
    """`row_statistics` of whole rows that have been loaded."""
    top_L = tl.full([ROWS * LANES], float("-inf"), tl.float32)
    total_L = tl.zeros([ROWS * LANES], tl.float32)
    top_L, total_L = _add_lines(top_L, total_L, z_LV)
    mean_L = tl.zeros([ROWS * LANES], tl.float32)
    if MEAN:
        mean_L = tl.sum(tl.where(mine_LV, z_LV * (1.0 / C), 0.0), axis=1)
    return join_lanes(top_L, total_L, mean_L, ROWS, LANES)


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
            mean_R += tl.load(at_R + 2 * SPLITS * B, mask=there_R, other=0.0, cache_modifier=".cg")
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
def wait_for_last_program(ticket_ptr, last):
    """A barrier over the grid, all of whose programs run at once: none goes on before the last one
    has come through here. The counters are back at zero when the grid ends."""
    tl.debug_barrier()
    if last:
        tl.atomic_xchg(ticket_ptr + 1, 1, sem="release")
    else:
        released = tl.atomic_add(ticket_ptr + 1, 0, sem="acquire")
        while released == 0:
            released = tl.atomic_add(ticket_ptr + 1, 0, sem="acquire")
    tl.debug_barrier()  # what was released to one thread is there for all
    if tl.atomic_add(ticket_ptr + 2, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ticket_ptr + 1, 0)
        tl.store(ticket_ptr + 2, 0)


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
        store_losses(
            logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R,
            mean_R, ignore_index, smoothing, C, STRIDE, SMOOTH,
        )  # fmt: skip


@triton.jit
def store_losses(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R, mean_R,
    ignore_index, smoothing, C: tl.constexpr, STRIDE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Losses and lse of rows whose statistics are complete."""
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
        store_losses(
            logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, row_R, B, top_R, total_R,
            mean_R, ignore_index, smoothing, C, STRIDE, SMOOTH,
        )  # fmt: skip


# ---- Sizes --------------------------------------------------------------------------------------


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
    if INTERPRETED and batch > 2:
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


def resident_tile(logits: Tensor, vector: int) -> RowTile | None:
    """A tile of whole rows a program, with all programs on the device at once; None if they do not
    fit.

    A thread keeps up to 64 logits of one row, or 32 of several, in registers (more would spill, as
    the compiler says); each multiprocessor takes one program.
    """
    batch, classes = logits.shape
    ragged = logits.stride(0) % vector != 0 or classes % vector != 0
    lanes = next_power_of_2(-(-(classes + (vector - 1 if ragged else 0)) // vector))
    rows = next_power_of_2(-(-batch // multiprocessors(logits.device)))
    elements = rows * lanes * vector
    warps = min(max(next_power_of_2(elements // (32 * 32)), 4), 16)
    most = (
        2**20 if INTERPRETED else (64 if rows == 1 else 32) * 32 * warps
    )  # 2^20: Triton's own limit
    if elements > most:
        return None
    return RowTile(rows, lanes, vector, 1, 1, warps)


def partials(logits: Tensor, tile: RowTile) -> Tensor | None:
    """Scratch for the parts of split rows."""
    if tile.splits == 1:
        return None
    return logits.new_empty(3, tile.splits, logits.shape[0], dtype=torch.float32)


def unit_stride(logits: Tensor) -> Tensor:
    """Logits whose classes lie side by side, as the kernels take them; a copy if they do not."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()
