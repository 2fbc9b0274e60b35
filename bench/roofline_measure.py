"""What a device can do at best: copying, multiplying, convolving, launching. Seconds, all told."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from roofline_count import Convolution
from torch import nn
from torch.utils.benchmark import Timer

_LAUNCHES = 1000  # of one sample


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured on one device; nothing here is taken from a data sheet."""

    copy_bytes_s: float
    """Read plus written."""
    matmul_flop_s: dict[str, float]
    """Of a square product, by dtype."""
    conv_flop_s: dict[str, float]
    """Of a forward convolution in bf16, by shape."""
    launch_us: float
    """Of an operator on one number, called from Python; without a GPU with its work."""
    graph_launch_us: float | None
    """The same within a CUDA graph; None without a GPU."""


def seconds(run: Callable[[], object], min_run_s: float = 0.2) -> float:
    """Median time of a call; on a GPU up to the end of its work."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_run_s).median)


def copy_bytes_s(device: torch.device, size: int) -> float:
    """Bytes/s of a copy of ``size`` bytes on the device, read plus written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def matmul_flop_s(device: torch.device, n: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two n×n matrices."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a)


def conv_flop_s(device: torch.device, shape: Convolution, batch: int) -> float:
    """FLOP/s of a layer's forward pass, bf16, channels-last."""
    layer = nn.Conv2d(
        shape.channels, shape.filters, shape.kernel, shape.stride, groups=shape.groups, bias=False
    )
    layer.to(device, torch.bfloat16, memory_format=torch.channels_last)
    # Padded by hand: what was counted is the output, with whatever padding the layer has.
    height, width = (
        (out - 1) * stride + kernel
        for out, stride, kernel in zip(shape.out, shape.stride, shape.kernel, strict=True)
    )
    images = torch.randn(batch, shape.channels, height, width, device=device, dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return 2 * shape.macs * batch / seconds(lambda: layer(images))


def launch_us(device: torch.device) -> float:
    """µs of an in-place addition to one number."""
    x = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)

    return 1e6 * seconds(run) / _LAUNCHES


def graph_launch_us(device: torch.device) -> float | None:
    """The same, replayed from a CUDA graph; None without a GPU."""
    if device.type != "cuda":
        return None
    x = torch.zeros(1, device=device)
    x.add_(1)  # compiles and loads what capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            x.add_(1)
    return 1e6 * seconds(graph.replay) / _LAUNCHES


def typical(convolutions: list[Convolution], count: int = 3) -> list[Convolution]:
    """The shapes in which a model has most of its multiply-adds, those first."""
    work: dict[Convolution, int] = {}
    for layer in convolutions:
        work[layer] = work.get(layer, 0) + layer.macs
    return sorted(work, key=lambda layer: -work[layer])[:count]


def measure(
    device: torch.device,
    convolutions: list[Convolution],
    *,
    batch: int,
    matmul_n: int,
    copy_size: int,
) -> Speeds:
    """Measures a device.

    Args:
        device: to measure.
        convolutions: shapes to measure.
        batch: images of the convolutions.
        matmul_n: rows and columns of the matrices.
        copy_size: bytes to copy, many times the caches.
    """
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return Speeds(
        copy_bytes_s=copy_bytes_s(device, copy_size),
        matmul_flop_s={name: matmul_flop_s(device, matmul_n, t) for name, t in dtypes.items()},
        conv_flop_s={str(shape): conv_flop_s(device, shape, batch) for shape in convolutions},
        launch_us=launch_us(device),
        graph_launch_us=graph_launch_us(device),
    )
