"""Per-sample cross-entropy of hard labels, with label smoothing ε.

    ℓ_i = logsumexp(z_i) − (1 − ε) z_i[y_i] − ε mean(z_i)          nats
    ∂ℓ_i/∂z_i = softmax(z_i) − (1 − ε) 1[y_i] − ε / C

Half-precision logits are raised to float32 first; float64 stays float64 (reference only).

Bytes, for logits of s bytes an element: forward reads s·B·C, backward reads s·B·C (from the L2
cache when the logits fit there, about 40 MB) and writes s·B·C, each once and 16 bytes a thread. A
row whose upstream gradient is 0 is not read again: its gradient is 0 whatever its logits.

Shapes as in `rows`: B batch, C classes, L lanes, V elements of a lane in one 16-byte line.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, library

from mentorch.kernels.backend import on_its_device, runs_kernels, tickets, tl, triton, vector_width
from mentorch.kernels.rows import (
    finish_splits,
    is_last_program,
    lanes_of_rows,
    load_lines,
    losses_of_program,
    partials,
    row_buffers,
    row_tile,
    unit_stride,
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


# ---- Forward ------------------------------------------------------------------------------------


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


# ---- Backward -----------------------------------------------------------------------------------


@triton.jit
def scales_of_rows(
    labels_ptr, row_scale_ptr, row_scale_stride, scale, row_L, B, ignore_index, C: tl.constexpr
):  # fmt: skip
    """(label, what multiplies the row's gradient), each [L]: 0 where ignored, NaN for a label out
    of range."""
    there_L = row_L < B
    label_L = tl.load(labels_ptr + row_L, mask=there_L, other=0).to(tl.int64)
    scale_L = tl.load(
        row_scale_ptr + row_L * row_scale_stride, mask=there_L, other=0.0, cache_modifier=".cg"
    )
    scale_L = scale_L.to(tl.float32) * scale
    scale_L = tl.where((label_L < 0) | (label_L >= C), float("nan"), scale_L)
    return label_L, tl.where(label_L == ignore_index, 0.0, scale_L)


@triton.jit
def store_gradient(
    grad_ptr,  # [B, C] contiguous
    z_LV,
    at_LV,
    mine_LV,
    row_L,
    skip_L,
    begin_L,  # offset of the lane's line
    label_L,
    scale_L,
    lse_ptr,
    B,
    smoothing,
    C: tl.constexpr,
    V: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Writes scale · (softmax(z) − target) for one line a lane, as `load_lines` gave it."""
    there_L = row_L < B
    top_L = tl.load(lse_ptr + row_L, mask=there_L, other=0.0)
    log_L = tl.load(lse_ptr + B + row_L, mask=there_L, other=0.0)
    p_LV = tl.exp((z_LV - top_L[:, None]) - log_L[:, None])
    target_LV = (at_LV == (label_L + skip_L)[:, None]).to(tl.float32)
    if SMOOTH:
        target_LV = (1.0 - smoothing) * target_LV + smoothing / C
    # 0 · NaN must be 0: a row that weighs nothing leaves no trace.
    grad_LV = tl.where(scale_L[:, None] == 0.0, 0.0, scale_L[:, None] * (p_LV - target_LV))
    grad_LV = grad_LV.to(grad_ptr.dtype.element_ty)
    to_LV = grad_ptr + ((row_L * C // V) * V)[:, None] + at_LV
    if C % V == 0:
        tl.store(to_LV, grad_LV, mask=there_L[:, None] & (at_LV < C))
    else:
        # Lines wholly inside the row go out 16 bytes a thread, the rest by element.
        whole_L = there_L & (begin_L >= skip_L) & (begin_L + V <= skip_L + C)
        tl.store(to_LV, grad_LV, mask=whole_L[:, None] & (at_LV >= 0))
        tl.store(to_LV, grad_LV, mask=(there_L & ~whole_L)[:, None] & mine_LV)


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
    label_L, scale_L = scales_of_rows(
        labels_ptr, row_scale_ptr, row_scale_stride, scale, row_L, B, ignore_index, C
    )
    read_L = tl.where(scale_L == 0.0, B, row_L)  # rows of weight 0 are written, not read
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * (LANES * V)
        z_LV, at_LV, mine_LV = load_lines(
            logits_ptr, read_L, lane_L, line_L, skip_L, B, first, C, V
        )  # fmt: skip
        store_gradient(
            grad_ptr, z_LV, at_LV, mine_LV, row_L, skip_L, first + lane_L * V, label_L, scale_L,
            lse_ptr, B, smoothing, C, V, SMOOTH,
        )  # fmt: skip


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
        scale = tl.div_rn(scale, tl.load(count_ptr))  # exact: compared with what was written
    needed = True
    if written_ptr is not None:
        needed = scale != tl.load(written_ptr)
    if needed:
        gradient_of_rows(
            logits_ptr, labels_ptr, lse_ptr, grad_ptr, row_scale_ptr, row_scale_stride, scale,
            tl.program_id(0).to(tl.int64) * ROWS, B, tl.program_id(1), ignore_index, smoothing,
            C, STRIDE, ROWS, LANES, V, CHUNKS, SMOOTH,
        )  # fmt: skip


# ---- Launchers ----------------------------------------------------------------------------------


@on_its_device
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


@on_its_device
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


# ---- Registration with torch --------------------------------------------------------------------


@library.custom_op("mentorch::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(logits, labels, ignore_index, smoothing)


@_cross_entropy.register_fake
def _(logits, labels, ignore_index, smoothing):
    return row_buffers(logits)


@library.custom_op("mentorch::cross_entropy_gradient", mutates_args=())
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
