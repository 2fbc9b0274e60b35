"""How much memory training needs, without using it: a step traced on tensors that have no data.

The trace sees every tensor that PyTorch makes in the forward and backward pass of one part of a
batch, and when it is freed. What it does not see: workspaces of cuDNN and oneDNN, what the
allocator keeps in reserve, CUDA's context, and the loader's buffers.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mentorch.engine.config import OptimConfig
from mentorch.engine.optim import create_optimizer
from mentorch.engine.student import forward


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, and are still alive.

    Args:
        there: tensors that exist already and are not to be counted, nor views of them.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes what it has made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False

    def _freed(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Trace:
    """What the passes over one part of a batch need besides the weights, bytes.

    Attributes:
        activations: alive between the forward and the backward pass.
        peak: the most at any moment, gradients included.
    """

    activations: int
    peak: int


class _Passes(nn.Module):
    """A forward and a backward pass, as a module so that its weights can be stood in for."""

    def __init__(self, student: nn.Module, normalise: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.student, self.normalise, self.dtype = student, normalise, dtype

    def forward(self, shape: tuple[int, ...], device: torch.device, live: LiveBytes) -> Trace:
        with live:
            images = torch.zeros(shape, dtype=torch.uint8, device=device)
            labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
            logits = forward(self.student, self.normalise(images), self.dtype)
            loss = F.cross_entropy(logits.float(), labels)
            activations = live.now
            loss.backward()
        return Trace(activations, live.peak)


def trace(
    student: nn.Module, normalise: nn.Module, dtype: torch.dtype, images: int, side: int,
    fake: bool = True,
) -> Trace:  # fmt: skip
    """Traces the passes over a part of a batch; the student stays as it is.

    Norms that it fuses are traced as PyTorch's: a kernel cannot run on tensors without data.

    Args:
        student: in training mode.
        normalise: from pixels to the student's input.
        dtype: of the forward pass.
        images: of the part.
        side: of the images, pixels.
        fake: on tensors without data, which needs neither the memory nor the time; False really
            does it, and leaves gradients behind: what the estimate is tested against.
    """
    passes = _Passes(student, normalise, dtype)
    device = next(student.parameters()).device
    shape = (images, side, side, 3)
    state = dict(passes.named_parameters()) | dict(passes.named_buffers())
    if not fake:
        return passes(shape, device, LiveBytes(state.values()))  # type: ignore[no-any-return]
    mode = FakeTensorMode()
    stand_ins: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in state.items()}
    with mode, _plain_norms(student):
        live = LiveBytes(stand_ins.values())
        found = torch.func.functional_call(passes, stand_ins, (shape, device, live))
    assert isinstance(found, Trace)
    return found


@contextmanager
def _plain_norms(student: Any) -> Iterator[None]:
    """Switches ``student.fused_norms`` off, where a student has that and it is on."""
    if not getattr(student, "fused_norms", False):
        yield
        return
    student.fused_norms = False
    try:
        yield
    finally:
        student.fused_norms = True


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(config: OptimConfig, student: nn.Module) -> int:
    """What the optimiser will keep for a student: a small layer's state, per byte of weights.

    LARS and LAMB make their state at the first step only, so a step of the layer is taken.
    """
    layer = nn.Linear(16, 16, device=next(student.parameters()).device)
    optimizer = create_optimizer(config, layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [
        value
        for parameter, slots in optimizer.state.items()
        for value in slots.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    return size_of(student.parameters()) * size_of(state) // size_of(layer.parameters())
