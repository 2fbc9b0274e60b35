"""Batch norm and ReLU in training, forward and backward under a random upstream gradient.

The equations are in `mentorch.kernels.batch_norm`; one norm over channels-last images, running
statistics updated.

    mentorch  `batch_norm_relu`
    eager     `batch_norm_relu_ref`: PyTorch's batch norm (cuDNN on a GPU) and ReLU in place
    compile   torch.compile of it

A row's B is all pixels of the images, n of the equations; its C the channels. Ideal bytes for s
bytes an element: s·n·C for each of x read and y written forward, x and dy read and dx written
backward.
"""

from typing import NamedTuple

import peers
import torch
from peers import Call
from rows import IMAGES, Row
from torch import Tensor

from mentorch.kernels.batch_norm import Norm, batch_norm_relu, batch_norm_relu_ref

MOMENTUM, EPS = 0.1, 1e-3  # Inception-ResNet-v2's


class Inputs(NamedTuple):
    x: Tensor  # [B, C, H, W] channels-last, a leaf
    upstream: Tensor  # the same
    norm: Norm  # γ and β are leaves


def inputs(row: Row, device: torch.device, seed: int) -> Inputs:
    logits, _, random = peers.draw(row, device, seed)
    shapes = [(b, side, side) for b, side, _ in IMAGES if b * side**2 == row.batch]
    shape = shapes[0] if shapes else (1, row.batch, 1)  # of the smoke test: one column

    def image(pixels: Tensor) -> Tensor:
        return pixels.detach().view(*shape, row.classes).permute(0, 3, 1, 2)

    upstream = torch.randn(logits.shape, generator=random, device=device).to(logits.dtype)
    values = torch.rand(4, row.classes, generator=random, device=device)
    weight, bias, mean, var = (value.clone() for value in values)
    norm = Norm(weight.requires_grad_(), (bias - 0.5).requires_grad_(), mean, var)
    return Inputs(image(logits).requires_grad_(), image(upstream), norm)


def setup(row: Row, given: Inputs) -> Call:
    """One step of ``row.provider``, which returns (y, dx, dγ, dβ)."""
    function = batch_norm_relu if row.provider == "mentorch" else batch_norm_relu_ref
    if row.provider == "compile":
        function = peers.compiled(batch_norm_relu_ref, row.cell)

    def run() -> tuple[Tensor, ...]:
        (y,) = function(given.x, [given.norm], momentum=MOMENTUM, eps=EPS)
        leaves = given.x, given.norm.weight, given.norm.bias
        return y.detach(), *torch.autograd.grad(y, leaves, given.upstream)

    return Call(run)


def reference(row: Row, given: Inputs) -> tuple[Tensor, ...]:
    """What `setup` returns, in float64; the running statistics stay."""
    x = given.x.detach().double().requires_grad_()
    weight, bias = (t.detach().double().requires_grad_() for t in given.norm[:2])
    norm = Norm(weight, bias, *(t.double() for t in given.norm[2:]))
    (y,) = batch_norm_relu_ref(x, [norm], momentum=MOMENTUM, eps=EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), given.upstream.double())


def test_batch_norm(row, measure):
    measure(row)
