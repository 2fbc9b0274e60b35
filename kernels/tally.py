"""Sums of a batch that the metrics of training are made of, in one launch.

    valid    the given label is no ``ignore_index``, and loss and weight are finite
    right    valid, and the given label is the one known to be right;  wrong: valid, and another is
    used     valid, and v > 0.001, as in the released code's data utilisation

    sums += [Σ ℓ, Σ v ℓ, Σ v, Σ used] over valid · Σ v over right · Σ v over wrong
            · rows that are valid, right, wrong · rows with a label · rows                  (`SUMS`)

In float64, so that a run's sums lose nothing. PyTorch takes some thirty launches for it, which is a
good part of a small student's step. 24 bytes a row are read; the batch is walked by one program.

Shapes: B batch, K rows of a tile.
"""

import torch
from torch import Tensor, library

from mentorch.kernels.backend import on_its_device, runs_kernels, tl, triton

SUMS = (
    "loss", "weighted_loss", "weight", "used", "weight_right", "weight_wrong",
    "valid", "right", "wrong", "labelled", "rows",
)  # fmt: skip
USED = 0.001
_USED = tl.constexpr(USED)
_TILE = 256


def tally_ref(
    sums: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    labels: Tensor,
    clean_labels: Tensor,
    ignore_index: int,
) -> None:
    """The definition, in plain PyTorch; arguments as `tally`."""
    labelled = labels != ignore_index
    valid = labelled & sample_loss.isfinite() & sample_weight.isfinite()
    loss = sample_loss.double().masked_fill(~valid, 0.0)
    weight = sample_weight.double().masked_fill(~valid, 0.0)
    right = valid & (clean_labels == labels)
    wrong = valid & (clean_labels >= 0) & ~right
    used = valid & (sample_weight > USED)
    columns = [loss, weight * loss, weight, used, weight * right, weight * wrong]
    columns += [valid, right, wrong, labelled, torch.ones_like(valid)]
    sums += torch.stack([column.double() for column in columns]).sum(1)


@triton.jit(do_not_specialize=["B", "ignore_index"])
def _tally_kernel(sums_ptr, loss_ptr, weight_ptr, label_ptr, clean_ptr, B, ignore_index,
                  K: tl.constexpr):  # fmt: skip
    zero_K = tl.zeros([K], tl.float64)
    loss_K, weighted_K, weight_K, of_right_K, of_wrong_K = zero_K, zero_K, zero_K, zero_K, zero_K
    none_K = tl.zeros([K], tl.int32)
    used_K, valid_K, right_K, wrong_K, labelled_K = none_K, none_K, none_K, none_K, none_K
    for start in range(0, B, K):
        at_K = start + tl.arange(0, K)
        there_K = at_K < B
        l_K = tl.load(loss_ptr + at_K, mask=there_K, other=0.0)
        v_K = tl.load(weight_ptr + at_K, mask=there_K, other=0.0)
        label_K = tl.load(label_ptr + at_K, mask=there_K, other=0)
        clean_K = tl.load(clean_ptr + at_K, mask=there_K, other=0)
        has_label_K = there_K & (label_K != ignore_index)
        is_valid_K = has_label_K & ((l_K - l_K) == 0.0) & ((v_K - v_K) == 0.0)
        is_right_K = is_valid_K & (clean_K == label_K)
        is_wrong_K = is_valid_K & (clean_K >= 0) & (clean_K != label_K)
        l64_K = tl.where(is_valid_K, l_K, 0.0).to(tl.float64)
        v64_K = tl.where(is_valid_K, v_K, 0.0).to(tl.float64)
        loss_K += l64_K
        weighted_K += v64_K * l64_K
        weight_K += v64_K
        of_right_K += tl.where(is_right_K, v64_K, 0.0)
        of_wrong_K += tl.where(is_wrong_K, v64_K, 0.0)
        used_K += (is_valid_K & (v_K > _USED)).to(tl.int32)
        valid_K += is_valid_K.to(tl.int32)
        right_K += is_right_K.to(tl.int32)
        wrong_K += is_wrong_K.to(tl.int32)
        labelled_K += has_label_K.to(tl.int32)
    _add(sums_ptr, tl.sum(loss_K, axis=0))
    _add(sums_ptr + 1, tl.sum(weighted_K, axis=0))
    _add(sums_ptr + 2, tl.sum(weight_K, axis=0))
    _add(sums_ptr + 3, tl.sum(used_K, axis=0))
    _add(sums_ptr + 4, tl.sum(of_right_K, axis=0))
    _add(sums_ptr + 5, tl.sum(of_wrong_K, axis=0))
    _add(sums_ptr + 6, tl.sum(valid_K, axis=0))
    _add(sums_ptr + 7, tl.sum(right_K, axis=0))
    _add(sums_ptr + 8, tl.sum(wrong_K, axis=0))
    _add(sums_ptr + 9, tl.sum(labelled_K, axis=0))
    _add(sums_ptr + 10, B)


@triton.jit
def _add(ptr, value):
    tl.store(ptr, tl.load(ptr) + value.to(tl.float64))


@on_its_device
def launch_tally(
    sums: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    labels: Tensor,
    clean_labels: Tensor,
    ignore_index: int,
) -> None:
    """`tally_ref` in one launch."""
    _tally_kernel[(1,)](
        sums,
        sample_loss.float().contiguous(),
        sample_weight.float().contiguous(),
        labels.contiguous(),
        clean_labels.contiguous(),
        len(labels),
        ignore_index,
        K=_TILE,
    )


@library.custom_op("mentorch::tally", mutates_args=("sums",))
def _tally(
    sums: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    labels: Tensor,
    clean_labels: Tensor,
    ignore_index: int,
) -> None:
    launch_tally(sums, sample_loss, sample_weight, labels, clean_labels, ignore_index)


@_tally.register_fake
def _(sums, sample_loss, sample_weight, labels, clean_labels, ignore_index):
    return None


def _check(sums: Tensor, *of_batch: Tensor) -> None:
    if sums.shape != (len(SUMS),) or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(
            f"sums must be [{len(SUMS)}] float64 and contiguous, got {list(sums.shape)} "
            f"{sums.dtype}"
        )
    shapes = {tuple(tensor.shape) for tensor in of_batch}
    devices = {tensor.device for tensor in (sums, *of_batch)}
    if len(shapes) != 1 or len(devices) != 1 or of_batch[0].ndim != 1:
        raise ValueError(
            f"losses, weights and labels must be [B] and where the sums are, {sums.device}; got "
            f"{', '.join(f'{list(t.shape)} on {t.device}' for t in of_batch)}"
        )


@torch.no_grad()
def tally(
    sums: Tensor,
    sample_loss: Tensor,
    sample_weight: Tensor,
    labels: Tensor,
    clean_labels: Tensor,
    ignore_index: int = -100,
) -> None:
    """Adds a batch to the sums, in place; nothing waits for the device.

    Args:
        sums: [11] float64, of `SUMS`; changed.
        sample_loss: [B], nats.
        sample_weight: [B], v.
        labels: [B] integers, as given; ``ignore_index`` for rows that are no sample.
        clean_labels: [B] integers, known to be right; below 0 where none is.
        ignore_index: see ``labels``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(sums, sample_loss, sample_weight, labels, clean_labels)
    run = _tally if runs_kernels(sample_loss) else tally_ref
    run(sums, sample_loss.detach(), sample_weight.detach(), labels, clean_labels, ignore_index)
