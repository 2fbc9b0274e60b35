"""Launches of the kernels over images, on tensors without storage, for `kernel_resources`."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mentorch.kernels import batch_norm, residual

IMAGES = {  # channels of the norms over one image of 35×35 pixels
    "three norms": (32, 48, 64),  # siblings of Inception-ResNet-v2's Block35
    "by eight": (24,),  # whole lines in every dtype, and no multiple of 16
    "one norm": (1088,),
    "odd": (7, 13),  # rows begin anywhere
}


def _image(channels: int, dtype: torch.dtype) -> Tensor:
    image = torch.empty(64, channels, 35, 35, dtype=dtype, device="meta")
    return image.to(memory_format=torch.channels_last)


def cases(dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what launches it), over channels and dtypes."""
    for size, channels in IMAGES.items():
        for name, dtype in dtypes.items():
            yield f"batch_norm {size} {name}", lambda c=channels, d=dtype: _norms(c, d)
            yield (
                f"residual {size} {name}",
                lambda c=channels[-1], d=dtype: _residual(_image(c, d)),
            )


def _norms(channels: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _image(sum(channels), dtype)
    norms = [batch_norm.Norm(*(torch.empty(c, device="meta") for _ in range(4))) for c in channels]
    images = [_image(c, dtype) for c in channels]
    statistics = batch_norm.launch_statistics(x, norms, 0.1, 1e-3, True)
    batch_norm.launch_forward(x, norms, statistics, images)
    sums = batch_norm.launch_sums(x, norms, statistics, images)
    batch_norm.launch_backward(x, norms, statistics, sums, images)


def _residual(image: Tensor) -> None:
    residual.launch_forward(image, image, 0.17, torch.empty(image.shape[1], device="meta"), True)
    residual.launch_backward(image, image, 0.17, True)
