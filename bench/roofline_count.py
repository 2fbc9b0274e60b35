"""What a training step computes, moves and launches: counted from its operators, nothing is run.

The step is taken by fake tensors, which have shapes and no data: bf16 autocast, channels-last,
batch norms in training, cross-entropy, backward, torch's fused SGD. Every ATen operator that
launches a kernel becomes an `Op`; views, allocations and shape questions do not.

Eager bytes: each operator reads each input once and writes each output once. Weights that autocast
casts, and gradients cast back, are operators as well. A batch norm counts as one pass over its
input, though statistics and normalisation are two where nothing takes the one along.

Launches: one an operator; a convolution's backward one for each gradient asked for; the optimiser's
one for each 48 tensors or 320 pieces of 65,536 elements, as torch's multi-tensor kernels take them
(newer releases take more at a time).
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from roofline_ops import Op, fused_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mentorch.engine import students  # noqa: F401  puts ours into timm's registry

OPTIMISER_BYTES = 20  # a parameter: itself, gradient, momentum read, itself and momentum written
_TENSORS_A_LAUNCH, _PIECES_A_LAUNCH, _PIECE = 48, 320, 65_536
_NO_KERNEL = ("empty", "detach", "alias", "as_strided", "_unsafe_view", "_reshape_alias")

_OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_")  # do not read what they write to


@dataclass(frozen=True)
class Convolution:
    """A convolution layer; `macs` of its forward pass for one image."""

    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    out: tuple[int, int]
    """Height and width of its output."""
    groups: int
    macs: int

    def __str__(self) -> str:
        pairs = (self.kernel, self.stride, self.out)
        kernel, stride, out = ("×".join(map(str, pair)) for pair in pairs)
        return f"{self.channels}→{self.filters}, {kernel}, stride {stride}, out {out}"


@dataclass(frozen=True)
class Count:
    """A training step of a batch."""

    batch: int
    parameters: int
    optimiser_launches: int
    linear_macs: int
    """Forward, an image."""
    convolutions: list[Convolution]
    ops: list[Op]

    @property
    def flop(self) -> int:
        """Forward and backward, the whole batch."""
        return sum(op.flop for op in self.ops)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass, an image."""
        return sum(c.macs for c in self.convolutions) + self.linear_macs

    @property
    def optimiser_bytes(self) -> int:
        return OPTIMISER_BYTES * self.parameters

    @property
    def eager_bytes(self) -> int:
        """Of a step, with the optimiser."""
        return sum(op.bytes for op in self.ops) + self.optimiser_bytes

    @property
    def fused_bytes(self) -> int:
        """Of a step, with the optimiser; `roofline_ops` has the rule."""
        return sum(fused_bytes(self.ops).values()) + self.optimiser_bytes

    @property
    def launches(self) -> int:
        return sum(op.launches for op in self.ops) + self.optimiser_launches

    def bytes_by_family(self) -> dict[str, int]:
        """Eager bytes, the largest first."""
        found: Counter[str] = Counter()
        for op in self.ops:
            found[op.family] += op.bytes
        found["optimiser"] += self.optimiser_bytes
        return dict(found.most_common())

    def share(self, *, one_by_one: bool = False, off_64: bool = False) -> float:
        """Of the forward pass's multiply-adds, those in such convolutions.

        Args:
            one_by_one: 1×1 convolutions.
            off_64: whose channels or filters are no multiple of 64.
        """
        chosen = (
            c.macs
            for c in self.convolutions
            if (not one_by_one or c.kernel == (1, 1))
            and (not off_64 or c.channels % 64 or c.filters % 64)
        )
        return sum(chosen) / self.macs


class _Counter(TorchDispatchMode):
    """Notes every operator that is called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.convolutions: list[Convolution] = []
        self.linear_macs = 0
        self.backward = False
        self._last_writer: dict[int, int] = {}
        # A storage's number is its own only while it lives. Not the tensors: autograd would copy
        # gradients that somebody else holds.
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _no_kernel(func):
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        flops = flop_registry.get(func.overloadpacket)
        flop = flops(*args, **kwargs, out_val=out) if flops else 0
        reads = _bytes(tree_leaves((args, kwargs)))
        writes = _bytes(tree_leaves(out))
        name = f"aten::{func.overloadpacket.__name__}"
        if name in _OVERWRITE:
            reads = _bytes(tree_leaves((args[1:], kwargs)))
        op = Op(name, flop, reads, writes, _launches(func, args), self.backward)
        op.made_by = {s: self._last_writer[s] for s in reads if s in self._last_writer}
        self._last_writer |= dict.fromkeys(writes, len(self.ops))
        leaves = tree_leaves((args, kwargs, out))
        self._alive += [t.untyped_storage() for t in leaves if isinstance(t, Tensor)]
        self.ops.append(op)
        if flop and not self.backward:
            self._note_layer(func, args, out, flop)

    def _note_layer(self, func: Any, args: Any, out: Any, flop: int) -> None:
        if func.overloadpacket is not torch.ops.aten.convolution:
            self.linear_macs += flop // 2 // args[1].shape[0]
            return
        images, weight, _, stride, *_, groups = args
        self.convolutions.append(
            Convolution(
                channels=images.shape[1],
                filters=weight.shape[0],
                kernel=tuple(weight.shape[2:]),
                stride=tuple(stride),
                out=tuple(out.shape[2:]),
                groups=groups,
                macs=flop // 2 // images.shape[0],
            )
        )


def _no_kernel(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return (
        func.namespace != "aten" or func.is_view or name.removeprefix("new_").startswith(_NO_KERNEL)
    )


def _bytes(values: list[Any]) -> dict[int, int]:
    """Bytes by storage; of an expanded tensor each element once."""
    found: dict[int, int] = defaultdict(int)
    for value in values:
        if isinstance(value, Tensor):
            sizes = (n for n, s in zip(value.shape, value.stride(), strict=True) if s)
            count = value.element_size() * torch.Size(sizes).numel()
            storage = value.untyped_storage()._cdata
            found[storage] = max(found[storage], count)
    return dict(found)


def _launches(func: Any, args: Any) -> int:
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        return sum(args[-1])  # the output mask: gradients of input, weight, bias
    return 1


def optimiser_launches(parameters: list[Tensor]) -> int:
    """Of torch's fused SGD, matrices and filters apart from the rest (weight decay)."""
    total = 0
    for group in ([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]):
        pieces = sum(-(-p.numel() // _PIECE) for p in group)
        total += max(-(-len(group) // _TENSORS_A_LAUNCH), -(-pieces // _PIECES_A_LAUNCH))
    return total


def _channels_last(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
            layer.weight = nn.Parameter(weight)


def count_step(name: str, size: int, batch: int, num_classes: int = 1000) -> Count:
    """Counts a training step.

    Args:
        name: of a model in timm's registry, or one of ours.
        size: side of the images, pixels.
        batch: images a step.
        num_classes: of the classifier.
    """
    return count_model(
        lambda: timm.create_model(name, num_classes=num_classes), torch.Size((batch, 3, size, size))
    )


def count_model(make: Callable[[], nn.Module], shape: torch.Size) -> Count:
    """Counts a training step.

    Args:
        make: makes the model, from images to logits.
        shape: of the images, [B, C, H, W].
    """
    with FakeTensorMode():
        return _count(make(), shape)


def _count(model: nn.Module, shape: torch.Size) -> Count:
    model.train()
    _channels_last(model)
    images = torch.empty(shape).to(memory_format=torch.channels_last)
    labels = torch.zeros(shape[0], dtype=torch.int64)
    with _Counter() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        counter.backward = True
        loss.backward()
    parameters = list(model.parameters())
    return Count(
        batch=shape[0],
        parameters=sum(p.numel() for p in parameters),
        optimiser_launches=optimiser_launches(parameters),
        linear_macs=counter.linear_macs,
        convolutions=counter.convolutions,
        ops=counter.ops,
    )
