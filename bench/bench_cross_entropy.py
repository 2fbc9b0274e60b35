"""Per-sample cross-entropy, forward and backward under a random upstream gradient.

    ℓ_i = logsumexp(z_i) − z_i[y_i];   ∂(Σ u_i ℓ_i)/∂z_i = u_i (softmax(z_i) − 1[y_i])

Ideal bytes for logits of s bytes an element: s·B·C read, s·B·C written.
"""

from typing import NamedTuple

import peers
import torch
from peers import Call
from rows import Row
from torch import Tensor

from mentorch.kernels.cross_entropy import cross_entropy, cross_entropy_ref


class Inputs(NamedTuple):
    logits: Tensor  # [B, C], a leaf
    labels: Tensor  # [B]
    upstream: Tensor  # [B] float32


def inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    logits, labels, random = peers.draw(row, device, seed)
    return Inputs(logits, labels, torch.rand(row.batch, generator=random, device=device))


def setup(row: Row, given: Inputs) -> Call:
    """One step of ``row.provider``, which returns (losses [B], gradient [B, C])."""
    loss_of = {"mentorch": cross_entropy, "eager": cross_entropy_ref}.get(row.provider)
    if row.provider == "compile":
        loss_of = peers.compiled(cross_entropy_ref, row.cell)
    loss_of = loss_of or peers.loss_of(row.provider)
    logits, restore = peers.private_logits(row.provider, given.logits)

    def run() -> tuple[Tensor, Tensor]:
        loss = loss_of(logits, given.labels)
        (grad,) = torch.autograd.grad(loss, logits, given.upstream)
        return loss.detach(), grad

    return Call(run, restore)


def reference(row: Row, given: Inputs) -> tuple[Tensor, Tensor]:
    """What `setup` returns, in float64."""
    logits = given.logits.detach().double().requires_grad_()
    loss = cross_entropy_ref(logits, given.labels)
    return loss.detach(), torch.autograd.grad(loss, logits, given.upstream.double())[0]


def test_cross_entropy(row, measure):
    measure(row)
