"""Where the Triton kernels run, and what their launchers share.

CUDA tensors take the kernels and all others the plain-PyTorch references, so everything works
everywhere. ``TRITON_INTERPRET=1`` (set before Python starts) runs the kernels on CPU tensors too,
one program after another in NumPy: slow, and how they are tested without a GPU.
"""

import os
import struct
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have torch but no Triton: the references run there

    class _Absent:
        """Stands in for ``triton`` and ``tl`` so that the kernel files can be imported."""

        constexpr = staticmethod(lambda value: value)

        @staticmethod
        def jit(function: Any = None, **_options: Any) -> Any:
            return function if function is not None else (lambda inner: inner)

    triton, tl = _Absent(), _Absent()
    HAS_TRITON = False
else:
    HAS_TRITON = True

P = ParamSpec("P")
R = TypeVar("R")
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_LINE_BYTES = 16  # the widest load or store of one thread
_SLOTS = 8192


def runs_kernels(*tensors: Tensor) -> bool:
    """Whether these floating-point tensors take the kernels rather than the reference.

    float64 never does: the kernels' mathematics is float32.
    """
    if not HAS_TRITON:
        return False
    device = "cpu" if INTERPRETED else "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return all(t.device.type == device and t.dtype in dtypes for t in tensors)


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """A launcher made to run on the GPU of its first argument; Triton takes the current one."""

    @wraps(launch)
    def launch_there(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if first.device.type != "cuda":
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return launch_there


def vector_width(tensor: Tensor) -> int:
    """Elements a thread moves at once: 16 bytes' worth, or 1 if the storage is not aligned."""
    return _LINE_BYTES // tensor.element_size() if tensor.data_ptr() % _LINE_BYTES == 0 else 1


def float64_bits(value: float) -> int:
    """A positive float64 as the integer of its bits; Triton rounds a float argument to float32.

    Zero becomes 1e-300, which every use here rounds to zero: a small integer would be passed as
    32 bits.
    """
    bits: int = struct.unpack("<q", struct.pack("<d", max(value, 1e-300)))[0]
    return bits


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Tickets:
    """Zeroed counters for the programs of a launch to find out which of them finishes last.

    The last one puts its counter back to zero, so nothing has to be cleared between launches. What
    may run at the same time must not share a counter: eager launches have one a stream, and every
    launch captured in a CUDA graph has one of its own, since graphs replay on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.zeros(_SLOTS, 4, dtype=torch.int32, device=device)
        if device.type == "cuda":  # other streams take counters too, and must find them zeroed
            torch.cuda.current_stream(device).synchronize()
        self.of_stream: dict[int, Tensor] = {}
        self.free = iter(range(_SLOTS))  # next() is atomic: two threads never get the same slot

    def take(self, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return self.pool[0]
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream
        if not capturing and stream in self.of_stream:
            return self.of_stream[stream]
        slot = next(self.free, None)
        if slot is None:  # correct, at the price of one more small launch
            return torch.zeros(4, dtype=torch.int32, device=device)
        counter = self.pool[slot]
        if not capturing:
            self.of_stream[stream] = counter
        return counter


_tickets: dict[torch.device, _Tickets] = {}


def tickets(device: torch.device) -> Tensor:
    """[4] int32 zeros on the device for one launch (see `_Tickets`)."""
    if device not in _tickets:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(4, dtype=torch.int32, device=device)  # zeroed inside the graph
        _tickets[device] = _Tickets(device)
    return _tickets[device].take(device)
