"""A step's operations, recorded and run again: what a CUDA graph does, on any device.

For tests and for counting, not for speed. A replay runs the operators of one step with the tensors
of that step: what a step takes from Python instead (a learning rate, a step number, a branch on a
loss) stays as it was, just as in a CUDA graph, so a replayed step that equals an eager one proves
that there is no such thing. And no operator is let through for which a host waits for its GPU; what
is no operator on a CPU (``tolist()``, ``numpy()``, ``cpu()``, printing) is not seen here.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
WAITS = {  # operators after which the host knows a value, or a size that depends on one
    _aten._local_scalar_dense.default: "item(), float() or bool() of a tensor",
    _aten.nonzero.default: "nonzero(), or a boolean mask as an index",
    _aten.masked_select.default: "masked_select()",
    _aten._unique2.default: "unique()",
    _aten._unique.default: "unique()",
    _aten.unique_dim.default: "unique()",
    _aten.unique_consecutive.default: "unique_consecutive()",
    _aten._linalg_check_errors.default: "a check of torch.linalg",
    _aten.equal.default: "torch.equal()",
    _aten.is_nonzero.default: "the truth of a tensor",
    _aten.repeat_interleave.Tensor: "repeat_interleave() by a tensor",
    _aten.bincount.default: "bincount()",
    _aten.lift_fresh.default: "torch.tensor(…) of Python's numbers, copied to the device",
}


class HostWaits(RuntimeError):
    """A step did what makes the host wait for a GPU."""


class Tape(TorchDispatchMode):
    """A `step_engine.Recorder` of operators; see the module's text.

    Args:
        allow_waits: let through what would make a host wait.
    """

    def __init__(self, allow_waits: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allow_waits = allow_waits
        self.waits = ""
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.allow_waits and (why := _why_waits(func, args, kwargs)):
            raise HostWaits(f"{func} in a training step: {why}")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def warm(self, step: Callable[[], Any]) -> Any:
        """Nothing to prepare."""
        return step()

    def record(self, step: Callable[[], Any]) -> Any:
        """Takes the step under this mode."""
        with self:
            return step()

    @torch.no_grad()
    def replay(self) -> None:
        """Every operator again; its results take the places of the first ones."""
        for func, args, kwargs, out in self.calls:
            if _is_view(func):
                continue  # of a tensor that has new contents
            new = func(*args, **kwargs)
            for place, tensor in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(place, Tensor) and place is not tensor:
                    place.copy_(tensor)

    def operators(self) -> Counter[str]:
        """How often each operator that computes something was called; views compute nothing."""
        return Counter(str(func) for func, *_ in self.calls if not _is_view(func))


def _why_waits(func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    if func in WAITS:
        return WAITS[func]
    if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        indices = [i for i in tree_leaves(list(args)[1]) if isinstance(i, Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "a boolean mask as an index"
    devices = {leaf.device.type for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)}
    if func is _aten._to_copy.default and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    copies = func in (_aten._to_copy.default, _aten.copy_.default)
    return "a copy from one device to another" if copies and len(devices) > 1 else ""


def _is_view(func: Any) -> bool:
    """Whether all results of an operator are views of its arguments, unchanged."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)
