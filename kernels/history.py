"""The last T losses of every sample: what a MentorNet's bi-LSTM looks at (Fig. 1, "loss and loss
difference over the last few epochs").

A table [N + 1, T, 2] on the device: for each sample its last T visits, oldest first, each a loss
and its difference from the ℓ_pt of that visit; NaN where there was none. The last row is scratch,
where rows without a sample go, so that nothing has to be filtered out (which would wait for the
device).

A visit moves a sample's row up by one step and appends. The row has to be read anyway, and its 8 T
bytes lie side by side: 40 bytes a sample for T = 5, whatever N is (2.4 million samples take 98 MB).

Shapes: B batch, M samples of a tile, T steps, N samples of the data set.
"""

import torch
from torch import Tensor

from mentorch.kernels.backend import tl, triton


def new_history(samples: int, steps: int, device: torch.device | str | None = None) -> Tensor:
    """An empty table for samples 0 … N − 1: [N + 1, T, 2] float32 of NaN.

    Raises:
        ValueError: no samples, or no steps.
    """
    if samples < 1 or steps < 1:
        raise ValueError(f"a history needs at least 1 sample and 1 step, got {samples} and {steps}")
    return torch.full((samples + 1, steps, 2), torch.nan, dtype=torch.float32, device=device)


def table_rows(table: Tensor, ids: Tensor) -> Tensor:
    """The row of every id in a table [N + 1, …]: its own, or the last one, which is scratch, for an
    id outside [0, N)."""
    scratch = table.shape[0] - 1
    return torch.where((ids < 0) | (ids >= scratch), scratch, ids)


def history_steps_ref(
    history: Tensor, sample_ids: Tensor, loss: Tensor, loss_diff: Tensor
) -> tuple[Tensor, Tensor]:
    """The samples' last T losses and differences, today's last.

    Args:
        history: [N + 1, T, 2] before this visit.
        sample_ids: [B] int64; one outside [0, N) has no past (the step makes one from N on NaN).
        loss: [B], nats, today's.
        loss_diff: [B], ℓ − ℓ_pt.

    Returns:
        ([B, T], [B, T]); NaN where a sample has been seen less often.
    """
    scratch = history.shape[0] - 1
    rows = table_rows(history, sample_ids)
    past = history[rows, 1:].to(loss.dtype).masked_fill((rows == scratch)[:, None, None], torch.nan)
    today = torch.stack([loss, loss_diff], dim=-1).unsqueeze(1)
    losses, diffs = torch.cat([past, today], dim=1).unbind(-1)
    return losses, diffs


def update_history_ref(
    history: Tensor, sample_ids: Tensor, loss: Tensor, loss_diff: Tensor
) -> None:
    """Appends a visit to the samples' rows, in place.

    Args:
        history: [N + 1, T, 2].
        sample_ids: [B] int64, each at most once; one outside [0, N) is not kept.
        loss: [B], nats; a visit whose loss is not finite (or NaN for absent) is not kept.
        loss_diff: [B], ℓ − ℓ_pt.
    """
    scratch = history.shape[0] - 1
    rows = torch.where(loss.isfinite(), table_rows(history, sample_ids), scratch)
    steps = torch.stack(history_steps_ref(history, sample_ids, loss, loss_diff), dim=-1)
    history.index_put_((rows,), steps.to(history.dtype))


@triton.jit
def update_history(
    history_ptr,  # [N + 1, T, 2]
    id_M,
    loss_M,
    diff_M,
    N,
    T: tl.constexpr,
):
    """`update_history_ref` on a tile of samples."""
    kept_M = (id_M >= 0) & (id_M < N) & ((loss_M - loss_M) == 0.0)
    row_ptr_M = history_ptr + id_M * (2 * T)
    for t in range(T - 1):  # each sample's row is moved by one thread, in order
        for k in range(2):
            later_M = tl.load(row_ptr_M + 2 * (t + 1) + k, mask=kept_M)
            tl.store(row_ptr_M + 2 * t + k, later_M, mask=kept_M)
    tl.store(row_ptr_M + 2 * (T - 1), loss_M, mask=kept_M)
    tl.store(row_ptr_M + 2 * (T - 1) + 1, diff_M, mask=kept_M)
