"""The kernels of the fused step (`reweight`), their launchers, and their names in torch.

- ``mentorch::reweight_step``: losses, weights and ℓ_pt in one launch; the gradient is another.
- ``mentorch::reweight_one_pass``: the same and the gradient in one launch: row by row for a lagged
  ℓ_pt, else with the whole batch kept on the chip.
- ``mentorch::correct_gradient``: that gradient, for another upstream gradient than 1; else nothing.
- ``mentorch::present_losses``: the losses that several ranks exchange, or classes are known by.
- ``mentorch::weigh``: what follows from them, on each rank.

Bytes at s bytes a logit: a step reads s·B·C, the gradient reads and writes as much; one pass reads
s·B·C from memory (rows longer than a tile twice, the second time from the cache) and writes s·B·C.
"""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from mentorch.kernels.backend import on_its_device, tickets, tl, triton, vector_width
from mentorch.kernels.cross_entropy import (
    gradient_of_rows,
    launch_backward,
    launch_forward,
    scales_of_rows,
    store_gradient,
)
from mentorch.kernels.example_dropout import coins
from mentorch.kernels.rows import (
    RowTile,
    finish_splits,
    is_last_program,
    lanes_of_rows,
    load_lines,
    losses_of_program,
    partials,
    resident_tile,
    row_buffers,
    row_tile,
    store_losses,
    tile_statistics,
    unit_stride,
    wait_for_last_program,
)
from mentorch.kernels.weigh import (
    Plan,
    batch_tile,
    curriculum_weight,
    epoch_percent,
    final_weight,
    kept_by_coin,
    sample_id,
    weigh_batch,
    weigh_kernel,
)

_RUNTIME = ["B", "N", "total_steps", "first_row", "seed", "ignore_index"]


@triton.jit(do_not_specialize=_RUNTIME)
def _reweight_fwd_kernel(
    logits_ptr, labels_ptr, ids_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, weight_ptr,
    total_ptr, new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr,
    theta, ticket_ptr, B, N, total_steps, first_row, seed, ignore_index,
    PLAN: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses; then, in the program that comes last, all that follows from them."""
    SMOOTHING: tl.constexpr = PLAN.label_smoothing
    SMOOTH: tl.constexpr = PLAN.smooths
    losses_of_program(
        logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, B, ignore_index,
        SMOOTHING, C, STRIDE, ROWS, LANES, V, CHUNKS, SPLITS, SMOOTH,
    )  # fmt: skip
    if is_last_program(ticket_ptr):
        if SPLITS > 1:
            finish_splits(
                logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, partial_ptr, B,
                ignore_index, SMOOTHING, C, STRIDE, SPLITS, SMOOTH,
            )  # fmt: skip
            tl.debug_barrier()  # the losses are read back by other threads
        weigh_batch(
            loss_ptr, present_ptr, labels_ptr, ids_ptr, ids_ptr, None, weight_ptr, total_ptr,
            new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr,
            theta, B, B, N, total_steps, first_row, seed, ignore_index, PLAN, M, BLOCK,
            ONE_BLOCK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _reweight_one_pass_kernel(
    logits_ptr, labels_ptr, ids_ptr, loss_ptr, lse_ptr, present_ptr, weight_ptr, grad_ptr,
    written_ptr, total_ptr, new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr,
    history_ptr, theta, ticket_ptr, B, N, total_steps, first_row, seed, ignore_index,
    PLAN: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Lagged ℓ_pt: losses, weights and gradient row by row; the batch's sums in the last program.

    The gradient is written as for an upstream gradient of 1 and B valid rows.
    """
    SMOOTHING: tl.constexpr = PLAN.label_smoothing
    SMOOTH: tl.constexpr = PLAN.smooths
    losses_of_program(
        logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr, None, B, ignore_index,
        SMOOTHING, C, STRIDE, ROWS, LANES, V, CHUNKS, 1, SMOOTH,
    )  # fmt: skip
    tl.debug_barrier()  # the losses are read back by other threads
    first_row_of_program = tl.program_id(0).to(tl.int64) * ROWS
    row_R = first_row_of_program + tl.arange(0, ROWS)
    there_R = row_R < B
    step = tl.load(step_ptr).to(tl.int64)
    epoch_pct = epoch_percent(epoch_pct_ptr, step, total_steps)
    loss_R = tl.load(loss_ptr + row_R, mask=there_R, other=0.0)
    diff_R = loss_R - tl.load(avg_ptr).to(tl.float32)
    label_R = tl.load(labels_ptr + row_R, mask=there_R, other=0).to(tl.int64)
    id_R = sample_id(ids_ptr, row_R, there_R, first_row)
    weight_R = curriculum_weight(
        loss_R, diff_R, label_R, id_R, there_R, epoch_pct, theta, history_ptr, N, PLAN
    )
    if PLAN.dropout == "coins":
        weight_R = tl.where(kept_by_coin(coins(seed, step, id_R), epoch_pct, PLAN), weight_R, 0.0)
    weight_R = final_weight(weight_R, label_R, id_R, ignore_index, N, history_ptr is not None)
    tl.store(weight_ptr + row_R, weight_R, mask=there_R)
    tl.debug_barrier()  # weights and lse are read back by other threads
    scale = tl.div_rn(1.0, B.to(tl.float32))
    gradient_of_rows(
        logits_ptr, labels_ptr, lse_ptr, grad_ptr, weight_ptr, 1, scale, first_row_of_program, B, 0,
        ignore_index, SMOOTHING, C, STRIDE, ROWS, LANES, V, CHUNKS, SMOOTH,
    )  # fmt: skip
    if is_last_program(ticket_ptr):
        tl.store(written_ptr, scale)
        weigh_batch(
            loss_ptr, present_ptr, labels_ptr, ids_ptr, ids_ptr, None, weight_ptr, total_ptr,
            new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr,
            theta, B, B, N, total_steps, first_row, seed, ignore_index, PLAN, M, BLOCK,
            ONE_BLOCK, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _reweight_resident_kernel(
    logits_ptr, labels_ptr, ids_ptr, loss_ptr, lse_ptr, present_ptr, weight_ptr, grad_ptr,
    written_ptr, total_ptr, new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr,
    history_ptr, theta, ticket_ptr, B, N, total_steps, first_row, seed, ignore_index,
    PLAN: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole step with the logits kept in registers: read once, gradient written once.

    Cooperative: all programs run at once, and wait while the last one weighs the batch.
    """
    SMOOTHING: tl.constexpr = PLAN.label_smoothing
    SMOOTH: tl.constexpr = PLAN.smooths
    first_row_of_program = tl.program_id(0).to(tl.int64) * ROWS
    row_L, lane_L, line_L, skip_L = lanes_of_rows(first_row_of_program, C, STRIDE, ROWS, LANES, V)
    z_LV, at_LV, mine_LV = load_lines(logits_ptr, row_L, lane_L, line_L, skip_L, B, 0, C, V)
    top_R, total_R, mean_R = tile_statistics(z_LV, mine_LV, C, ROWS, LANES, SMOOTH)
    store_losses(
        logits_ptr, labels_ptr, loss_ptr, lse_ptr, present_ptr,
        first_row_of_program + tl.arange(0, ROWS), B, top_R, total_R, mean_R, ignore_index,
        SMOOTHING, C, STRIDE, SMOOTH,
    )  # fmt: skip
    last = is_last_program(ticket_ptr)
    if last:
        weigh_batch(
            loss_ptr, present_ptr, labels_ptr, ids_ptr, ids_ptr, None, weight_ptr, total_ptr,
            new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr,
            theta, B, B, N, total_steps, first_row, seed, ignore_index, PLAN, M, BLOCK,
            ONE_BLOCK, False,
        )  # fmt: skip
    wait_for_last_program(ticket_ptr, last)
    scale = tl.div_rn(1.0, tl.load(count_ptr, cache_modifier=".cg"))
    if last:
        tl.store(written_ptr, scale)
    label_L, scale_L = scales_of_rows(
        labels_ptr, weight_ptr, 1, scale, row_L, B, ignore_index, C
    )  # fmt: skip
    store_gradient(
        grad_ptr, z_LV, at_LV, mine_LV, row_L, skip_L, lane_L * V, label_L, scale_L, lse_ptr, B,
        SMOOTHING, C, V, SMOOTH,
    )  # fmt: skip


# ---- Launchers ----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step reads besides logits and labels, and (the first three) changes in place."""

    loss_moving_avg: Tensor
    step: Tensor
    history: Tensor | None
    epoch_pct: Tensor | None
    sample_ids: Tensor | None
    theta: list[Tensor]

    def pointers(self) -> tuple[Any, ...]:
        """In the kernels' order, from ``avg_ptr`` to ``theta``."""
        theta = tuple(t.contiguous() for t in self.theta) or None
        return self.loss_moving_avg, self.step, self.epoch_pct, self.history, theta

    @property
    def samples(self) -> int:
        """N of the history."""
        return 0 if self.history is None else self.history.shape[0] - 1


class Outcome(NamedTuple):
    """The outputs of a fused step."""

    total: Tensor
    sample_loss: Tensor
    weight: Tensor
    new_avg: Tensor
    lse: Tensor
    divisor: Tensor


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _outcome(like: Tensor, loss_moving_avg: Tensor) -> Outcome:
    batch = like.shape[0]
    return Outcome(
        total=_float32(like),
        sample_loss=_float32(like, batch),
        weight=_float32(like, batch),
        new_avg=torch.empty_like(loss_moving_avg),
        lse=_float32(like, 2, batch),
        divisor=_float32(like),
    )


class Numbers(NamedTuple):
    """The kernels' run-time integers, in their order."""

    total_steps: int
    first_row: int
    seed: int
    ignore_index: int


@on_its_device
def launch_step(
    logits: Tensor,
    labels: Tensor,
    state: State,
    numbers: Numbers,
    plan: Plan,
    splits: int | None = None,
) -> Outcome:
    """The forward launch."""
    logits, labels = unit_stride(logits), labels.contiguous()
    batch = logits.shape[0]
    tile = row_tile(logits, splits=splits)
    out = _outcome(logits, state.loss_moving_avg)
    _reweight_fwd_kernel[tile.grid(batch)](
        logits,
        labels,
        state.sample_ids,
        out.sample_loss,
        out.lse,
        _float32(logits, batch),
        partials(logits, tile),
        out.weight,
        out.total,
        out.new_avg,
        out.divisor,
        _float32(logits, batch) if plan.dropout == "exact" else None,
        *state.pointers(),
        tickets(logits.device),
        batch,
        state.samples,
        *numbers,
        PLAN=plan,
        SPLITS=tile.splits,
        **batch_tile(plan, batch, batch, tile.warps),
        **tile.constants(logits),
    )
    return out


def one_launch_tile(logits: Tensor, plan: Plan) -> RowTile | None:
    """The tile of the form with forward and gradient in one launch, or None if there is none.

    A lagged average has it at any size (but for the exact dropout, whose count is over the batch);
    otherwise the logits must fit on the chip, and a GPU must launch cooperative grids.
    """
    same_remainder = (logits.stride(0) - logits.shape[1]) % vector_width(logits) == 0
    vector = vector_width(logits) if same_remainder else 1
    if plan.lagged and plan.dropout != "exact":
        return row_tile(logits, splits=1, vector=vector)
    return resident_tile(logits, vector)


@on_its_device
def launch_one_pass(
    logits: Tensor, labels: Tensor, state: State, numbers: Numbers, plan: Plan
) -> tuple[Outcome, Tensor, Tensor]:
    """Forward and gradient in one launch: (outcome, gradient, scale at which it was written).

    Two launches where the batch does not fit on the chip.
    """
    logits, labels = unit_stride(logits), labels.contiguous()
    batch, classes = logits.shape
    tile = one_launch_tile(logits, plan)
    if tile is None:
        out = launch_step(logits, labels, state, numbers, plan)
        settings = numbers.ignore_index, plan.label_smoothing
        grad = launch_backward(logits, labels, out.lse, out.weight, None, out.divisor, *settings)
        return out, grad, out.divisor.reciprocal()
    by_row = plan.lagged and plan.dropout != "exact"
    kernel = _reweight_one_pass_kernel if by_row else _reweight_resident_kernel
    out = _outcome(logits, state.loss_moving_avg)
    grad, written = logits.new_empty(batch, classes), _float32(logits)
    kernel[tile.grid(batch)](
        logits,
        labels,
        state.sample_ids,
        out.sample_loss,
        out.lse,
        _float32(logits, batch),
        out.weight,
        grad,
        written,
        out.total,
        out.new_avg,
        out.divisor,
        _float32(logits, batch) if plan.dropout == "exact" else None,
        *state.pointers(),
        tickets(logits.device),
        batch,
        state.samples,
        *numbers,
        PLAN=plan,
        **batch_tile(plan, batch, batch, tile.warps if by_row else min(tile.warps // 2, 4)),
        **tile.constants(logits),
        launch_cooperative_grid=not by_row,
    )
    return out, grad, written


@on_its_device
def launch_weigh(
    loss: Tensor,
    lse: Tensor,
    everyone: Tensor,
    everyones_ids: Tensor | None,
    bases: Tensor | None,
    labels: Tensor,
    state: State,
    numbers: Numbers,
    plan: Plan,
) -> Outcome:
    """The launch between the gathered losses of all ranks [W] and the gradient.

    ``everyones_ids``: [W], None where this rank's are all. ``bases``: [W] float32, what the losses
    are compared with; None: all with ℓ_pt.
    """
    batch, rows = loss.shape[0], everyone.shape[0]
    warps = 4 if rows <= 1024 else 8
    out = _outcome(loss, state.loss_moving_avg)
    weigh_kernel[(1,)](
        loss,
        everyone,
        labels.contiguous(),
        state.sample_ids,
        state.sample_ids if everyones_ids is None else everyones_ids,
        bases,
        out.weight,
        out.total,
        out.new_avg,
        out.divisor,
        _float32(loss, batch) if plan.dropout == "exact" else None,
        *state.pointers(),
        batch,
        rows,
        state.samples,
        *numbers,
        PLAN=plan,
        **batch_tile(plan, batch, rows, warps),
        num_warps=warps,
    )
    return out._replace(sample_loss=loss, lse=lse)


# ---- Registration with torch --------------------------------------------------------------------

_SCHEMA_TYPES = {str: "str", float: "float", int: "int", bool: "bool"}
PLAN_FIELDS = tuple(f.name for f in fields(Plan))
_PLAN_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[f.type]} {f.name}" for f in fields(Plan))  # type: ignore[index]
_STATE_SCHEMA = (
    "Tensor(a!) loss_moving_avg, Tensor(b!) step, Tensor(c!)? history, Tensor? epoch_pct, "
    "Tensor? sample_ids, Tensor[] theta, int total_steps, int first_row, int seed, "
    "int ignore_index, " + _PLAN_SCHEMA
)
_CHANGED = ("loss_moving_avg", "step", "history")
_STATE, _NUMBERS = len(State._fields), len(Numbers._fields)


def parts(arguments: tuple[Any, ...]) -> tuple[State, Numbers, Plan]:
    """What `_STATE_SCHEMA` lists, put together again."""
    numbers = arguments[_STATE : _STATE + _NUMBERS]
    return State(*arguments[:_STATE]), Numbers(*numbers), Plan(*arguments[_STATE + _NUMBERS :])


def _step(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(launch_step(logits, labels, *parts(arguments)))


def _step_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_outcome(logits, arguments[0]))


def _one_pass(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    out, grad, written = launch_one_pass(logits, labels, *parts(arguments))
    return *out, grad, written


def _one_pass_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return *_outcome(logits, arguments[0]), logits.new_empty(logits.shape), _float32(logits)


def _weigh(
    loss: Tensor,
    lse: Tensor,
    everyone: Tensor,
    everyones_ids: Tensor | None,
    bases: Tensor | None,
    labels: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    out = launch_weigh(loss, lse, everyone, everyones_ids, bases, labels, *parts(arguments))
    return out.total, out.weight, out.new_avg, out.divisor


def _weigh_fake(loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    out = _outcome(loss, arguments[5])
    return out.total, out.weight, out.new_avg, out.divisor


def _operator(name: str, function: Any, fake: Any, tensors: str, outputs: int) -> Any:
    """``mentorch::{name}``, which takes ``tensors`` and then what `_STATE_SCHEMA` lists."""
    results = ", ".join(["Tensor"] * outputs)
    operator = library.custom_op(
        f"mentorch::{name}",
        function,
        mutates_args=_CHANGED,
        schema=f"({tensors}, {_STATE_SCHEMA}) -> ({results})",
    )
    operator.register_fake(fake)
    return operator


reweight_step = _operator("reweight_step", _step, _step_fake, "Tensor logits, Tensor labels", 6)
reweight_one_pass = _operator(
    "reweight_one_pass", _one_pass, _one_pass_fake, "Tensor logits, Tensor labels", 8
)
weigh = _operator(
    "weigh",
    _weigh,
    _weigh_fake,
    "Tensor loss, Tensor lse, Tensor everyone, Tensor? everyones_ids, Tensor? bases, Tensor labels",
    4,
)


@library.custom_op("mentorch::present_losses", mutates_args=())
def present_losses(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, loss as the percentile takes it), each [B]: what ranks exchange."""
    present = _float32(logits, logits.shape[0])
    loss, lse = launch_forward(logits, labels, ignore_index, smoothing, present=present)
    return loss, lse, present


@present_losses.register_fake
def _(logits, labels, ignore_index, smoothing):
    return *row_buffers(logits), _float32(logits, logits.shape[0])


@library.custom_op("mentorch::correct_gradient", mutates_args=("grad",))
def correct_gradient(
    grad: Tensor,
    written: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    weight: Tensor,
    scale: Tensor,
    count: Tensor,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Writes a one-pass gradient again if it was written at another scale than is wanted."""
    launch_backward(
        logits,
        labels,
        lse,
        weight,
        scale,
        count,
        ignore_index,
        smoothing,
        grad=grad,
        written=written,
    )
