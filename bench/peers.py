"""What more than one benchmark needs of the peers: which are here, and how each takes a loss."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rows import Row
from torch import Tensor

LossOf = Callable[[Tensor, Tensor], Tensor]
_MODULES = {"liger": "liger_kernel.transformers.functional", "quack": "quack.cross_entropy"}


class Call(NamedTuple):
    """One step of one provider on one input set."""

    run: Callable[[], tuple[Tensor, ...]]
    """Forward and backward; returns what is checked."""
    restore: Callable[[], Any] = lambda: None
    """Puts an input back that ``run`` wrote over; called before each sample, outside the clock."""


def draw(row: Row, device: torch.device, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """(random logits [B, C], a leaf; random labels [B]; the generator, to go on with)."""
    random = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if row.dtype == "bf16" else torch.float32
    shape = row.batch, row.classes
    logits = torch.randn(shape, generator=random, device=device, dtype=dtype)
    labels = torch.randint(row.classes, shape[:1], generator=random, device=device)
    return logits.requires_grad_(), labels, random


@cache
def why_missing(provider: str, has_gpu: bool) -> str:
    """Why a provider cannot be timed on this machine; "" when it can."""
    if provider.startswith("compile") and not has_gpu:
        return "torch.compile is left out of the smoke test: it takes longer than all the rest"
    if provider not in _MODULES:
        return ""
    if not has_gpu:
        return f"{provider} needs a GPU"
    try:
        import_module(_MODULES[provider])
    except Exception as error:  # whatever a package raises that does not fit this machine
        return f"{provider}: {type(error).__name__}: {error}"
    return ""


def torch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The shortest per-sample loss in PyTorch whose losses are float32."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def loss_of(provider: str) -> LossOf:
    """A peer's differentiable per-sample loss: (logits [B, C], labels [B]) → [B] float32."""
    if provider == "liger":
        liger = import_module(_MODULES["liger"]).liger_cross_entropy
        # Its losses have the logits' dtype. Its only weights are of classes, so samples are
        # weighted through the upstream gradient, which its backward multiplies in by one more pass.
        return lambda logits, labels: liger(logits, labels, reduction="none").float()
    if provider == "quack":
        quack = import_module(_MODULES["quack"]).cross_entropy
        return lambda logits, labels: quack(logits, labels, reduction="none")
    return torch_loss


def private_logits(provider: str, logits: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """(the leaf that a provider works on, what puts its values back before the next step).

    Liger writes its gradient over the logits, which a model would make anew every step.
    """
    if provider != "liger":
        return logits, lambda: None
    own = logits.detach().clone().requires_grad_()
    return own, lambda: own.detach().copy_(logits.detach())


@cache
def compiled(function: Callable[..., Any], cell: tuple[Any, ...]) -> Callable[..., Any]:
    """torch.compile of a function for one size, compiled once for all rows of that size."""
    torch.compiler.reset()  # torch gives up after eight sizes of a function; the disk cache stays
    return torch.compile(function, dynamic=False)
