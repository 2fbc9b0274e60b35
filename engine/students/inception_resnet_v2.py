"""timm's Inception-ResNet-v2 with less work in its forward pass: the same weights and mathematics.

Szegedy et al., 2017. Modules, their names and their initialisation are timm's own, so its weights
load into this one and back. What runs is another: 1×1 convolutions side by side on one input are
one convolution, their batch norms one norm, all counters of batches go up together, and the end of
a residual block is one addition with a factor. Joined convolutions and all norms are not called as
modules: hooks on those do not run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import generate_default_cfgs
from timm.models.inception_resnet_v2 import InceptionResnetV2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mentorch.engine.students.registry import build, cfg, student
from mentorch.kernels.batch_norm import Norm, batch_norm_relu
from mentorch.kernels.residual import scale_add_relu

__all__ = ["FastInceptionResnetV2", "inception_resnet_v2_fast"]

_NAMES = {"num_classes": 1000, "first_conv": "conv2d_1a.conv", "classifier": "classif"}
default_cfgs = generate_default_cfgs({"inception_resnet_v2_fast": cfg(3, 299) | _NAMES})


class FastInceptionResnetV2(InceptionResnetV2):  # type: ignore[misc]
    """Inception-ResNet-v2. A norm that is no plain batch norm with ReLU runs as timm has it.

    Args:
        fused_norms: in training, batch norm with ReLU, concatenation and the end of a residual
            block by `mentorch.kernels` in place of PyTorch.
        **arguments: timm's: num_classes, in_chans, drop_rate, ….
    """

    def __init__(self, fused_norms: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fused_norms, self.grad_checkpointing = fused_norms, False
        # Kept: looking for them takes as long as the launches that they save.
        self._units = [module for module in self.modules() if isinstance(module, ConvNormAct)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes what is inside a block again in the backward pass, so as not to keep it."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] from 75 pixels on to features [B, 1536, ~H/32, ~W/32]."""
        counters = [u.bn.num_batches_tracked for u in self._units if _plain(u) and u.bn.training]
        if counters:
            torch._foreach_add_(counters, 1)
        fused = self.fused_norms and self.training
        stem = (self.conv2d_1a, self.conv2d_2a, self.conv2d_2b, self.maxpool_3a)
        for layer in (*stem, self.conv2d_3b, self.conv2d_4a, self.maxpool_5a):
            x = _layer(layer, x, fused)
        stages = (self.mixed_5b, self.repeat, self.mixed_6a, self.repeat_1, self.mixed_7a)
        run = _again if self.grad_checkpointing and torch.is_grad_enabled() else _block
        for stage in (*stages, self.repeat_2, self.block8):
            for block in _layers(stage):
                x = run(block, x, fused)
        return _layer(self.conv2d_7b, x, fused)


def _layers(module: nn.Module) -> list[Any]:
    return list(module) if isinstance(module, nn.Sequential) else [module]


def _plain(layer: Any) -> bool:
    """Whether ``layer`` is a convolution with a batch norm and a ReLU that are computed here."""
    norm: Any = getattr(layer, "bn", None)
    return (
        type(norm) is BatchNormAct2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and type(norm.act) is nn.ReLU
        and type(norm.drop) is nn.Identity
    )


def _layer(layer: Any, x: Tensor, fused: bool) -> Tensor:
    """A convolution with norm and ReLU, or a pool."""
    if _plain(layer):
        return _norms([layer], layer.conv(x), fused)[0]
    out: Tensor = layer(x)
    return out


def _norms(
    units: Sequence[Any], x: Tensor, fused: bool, into: Tensor | None = None, offset: int = 0
) -> list[Tensor]:
    """max(0, batch norm) of ranges of channels; an output a unit, ``into`` as `batch_norm_relu`."""
    norms = [unit.bn for unit in units]
    first = norms[0]
    if fused and first.training:
        own = [Norm(n.weight, n.bias, n.running_mean, n.running_var) for n in norms]
        settings = {"momentum": first.momentum, "eps": first.eps}
        return batch_norm_relu(x, own, **settings, into=into, offset=offset)
    assert into is None
    if len(norms) == 1:
        return [_norm(x, first, first.running_mean, first.running_var, first.weight, first.bias)]
    sizes = [norm.num_features for norm in norms]
    mean, var = (torch.cat([getattr(n, f"running_{s}") for n in norms]) for s in ("mean", "var"))
    weight, bias = (torch.cat([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    y = _norm(x, first, mean, var, weight, bias)
    if first.training:
        running = [n.running_mean for n in norms] + [n.running_var for n in norms]
        torch._foreach_copy_(running, [*mean.split(sizes), *var.split(sizes)])
    return list(y.split(sizes, 1))


def _norm(x: Tensor, norm: Any, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum, norm.eps)
    return F.relu(y, inplace=True)  # the norm's gradient does not need y


def _block(block: Any, x: Tensor, fused: bool) -> Tensor:
    """One of timm's blocks: branches side by side, and what a residual block does with them."""
    branches = [_layers(b) for name, b in block.named_children() if name.startswith("branch")]
    if not branches:  # pruned: nn.Identity
        return block(x)  # type: ignore[no-any-return]
    residual = hasattr(block, "conv2d")
    siblings = [branch[0] for branch in branches if _is_1x1(branch[0])]
    joined = _joinable(siblings)
    units = [unit for branch in branches for unit in branch]
    if fused and residual and joined and all(_plain(u) and u.bn.training for u in units):
        y = _branches_into(branches, x, block.conv2d.in_channels)
    else:
        y = torch.cat(_branches(branches, siblings if joined else [], x, fused), 1)
    return _residual(block, y, x, fused) if residual else y


def _is_1x1(layer: Any) -> bool:
    return isinstance(layer, ConvNormAct) and layer.conv.kernel_size == (1, 1)


def _joinable(units: Sequence[Any]) -> bool:
    """Whether units can run as one: several, and nothing but their weights differs."""
    if len(units) < 2 or not all(_plain(unit) for unit in units):
        return False
    return len({(u.bn.training, u.bn.momentum, u.bn.eps) for u in units}) == 1


def _join(units: Sequence[Any], x: Tensor) -> Tensor:
    """1×1 convolutions of one input as one: it is read once, and so is its gradient written."""
    return F.conv2d(x, torch.cat([unit.conv.weight for unit in units]))


def _branches(
    branches: Sequence[Sequence[Any]], joined: Sequence[Any], x: Tensor, fused: bool
) -> list[Tensor]:
    ready = (
        dict(zip(joined, _norms(joined, _join(joined, x), fused), strict=True)) if joined else {}
    )
    outputs = []
    for first, *rest in branches:
        y = ready[first] if first in ready else _layer(first, x, fused)
        if rest and first in ready:  # a range of channels, which cuDNN would copy here and again
            y = y.contiguous(memory_format=_memory_format(x))  # in the backward pass
        for layer in rest:
            y = _layer(layer, y, fused)
        outputs.append(y)
    return outputs


def _branches_into(branches: Sequence[Sequence[Any]], x: Tensor, channels: int) -> Tensor:
    """The branches of a residual block, whose last norms write the concatenation [B, channels, …].

    All begin with a 1×1 convolution; the first ends with it.
    """
    heads = [branch[0] for branch in branches]
    y = _join(heads, x)
    shape = (len(y), channels, *y.shape[2:])
    into = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=_memory_format(y))
    into, *others = _norms(heads, y, True, into, 0)
    offset = heads[0].conv.out_channels
    for y, (_, *middle, last) in zip(others, branches[1:], strict=True):
        for layer in middle:
            y = _layer(layer, y, True)
        into = _norms([last], last.conv(y), True, into, offset)[0]
        offset += last.conv.out_channels
    assert offset == channels
    return into


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _residual(block: Any, y: Tensor, x: Tensor, fused: bool) -> Tensor:
    """relu(x + scale · conv(y)); timm's last block has no ReLU."""
    relu = getattr(block, "relu", True) is not None
    if fused:
        branch = F.conv2d(y, block.conv2d.weight)
        return scale_add_relu(branch, x, block.scale, block.conv2d.bias, relu)
    out = torch.add(x, block.conv2d(y), alpha=block.scale)
    return F.relu(out, inplace=True) if relu else out


def _again(block: nn.Module, x: Tensor, fused: bool) -> Tensor:
    """The block, whose inside is computed again in the backward pass; there statistics stay."""
    first = iter((True,))

    def run(x: Tensor) -> Tensor:
        # A compiler takes changes of buffers out of what it computes again, by itself.
        if torch.compiler.is_compiling() or next(first, False):
            return _block(block, x, fused)
        with _unchanged(list(block.buffers())):
            return _block(block, x, fused)

    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return out


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """Puts ``buffers`` back, also when checkpointing breaks off because it has what it needs."""
    kept = [torch.empty_like(buffer) for buffer in buffers]
    torch._foreach_copy_(kept, buffers)
    try:
        yield
    finally:
        torch._foreach_copy_(buffers, kept)


@student
def inception_resnet_v2_fast(
    pretrained: bool = False, fused_norms: bool = False, **kwargs: object
) -> nn.Module:
    """timm's inception_resnet_v2, faster: 55.84 M parameters, for images from 75 pixels on."""
    return build(
        FastInceptionResnetV2,
        "inception_resnet_v2_fast",
        pretrained,
        fused_norms=fused_norms,
        **kwargs,
    )
