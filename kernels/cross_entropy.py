"""Per-sample cross-entropy.

    ℓ_i = logsumexp(z_i) − z_i[y_i]          nats
    ∂ℓ_i/∂z_i = softmax(z_i) − 1[y_i]

Half-precision logits are raised to float32 first; float64 stays float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_ref(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The loss of every sample, in nats.

    Args:
        logits: [B, C], any floating dtype.
        labels: [B] int64 in [0, C), or ``ignore_index``.
        ignore_index: rows with this label have loss 0 and no gradient.

    Returns:
        [B], float64 for float64 logits and float32 for all others.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, reduction="none", ignore_index=ignore_index)
