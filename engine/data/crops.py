"""Where to cut an image: windows as a pure function of (seed, epoch, sample id).

Image sizes are in the index, so the window is known before the file is read: the decoder decodes
only that part, a resumed run cuts the same windows, and CPU and GPU graphs do too.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mentorch.kernels.philox import Stream, philox, to_uniform

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, whose distribution this is

Sizes = NDArray[np.int32]
Floats = NDArray[np.float32]


class Windows(NamedTuple):
    """Parts of images, relative to their height and width, and whether to mirror them."""

    start_HW: Floats  # [B, 2] in [0, 1)
    shape_HW: Floats  # [B, 2] in (0, 1]
    flip: NDArray[np.int32]  # [B], 0 or 1


def _relative(top: Floats, left: Floats, height: Floats, width: Floats, sizes: Floats) -> Windows:
    size_HW = sizes[:, ::-1]
    start = np.stack([top, left], axis=1) / size_HW
    shape = np.stack([height, width], axis=1) / size_HW
    return Windows(
        start.astype(np.float32), shape.astype(np.float32), np.zeros(len(sizes), np.int32)
    )


def centre(sizes: Sizes, crop_share: float) -> Windows:
    """The centre square for evaluation.

    "Resize the shorter side to 320, cut the centre 299" is cutting the centre square whose side is
    299/320 of the shorter side, and resizing that.

    Args:
        sizes: [B, 2] width and height, pixels.
        crop_share: side of the square in shorter sides, e.g. 299/320.
    """
    size = sizes.astype(np.float32)
    side = np.maximum(size.min(axis=1) * np.float32(crop_share), 1)
    return _relative((size[:, 1] - side) / 2, (size[:, 0] - side) / 2, side, side, size)


def random_resized(
    sizes: Sizes,
    sample_ids: NDArray[np.int64],
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Windows:
    """Random resized crop and mirror for training (Szegedy et al. 2015), whole pixels.

    Args:
        sizes: [B, 2] width and height, pixels.
        sample_ids: [B].
        seed: of the run.
        epoch: another epoch, another window.
        scale: share of the image's area, drawn uniformly.
        ratio: width over height of the window, drawn log-uniformly.
    """
    ids = torch.from_numpy(sample_ids)
    attempt = epoch * _ATTEMPTS + torch.arange(_ATTEMPTS)
    words = philox(seed, attempt, ids.unsqueeze(1).expand(-1, _ATTEMPTS), Stream.CROP)
    u_area, u_ratio, u_top, u_left = (to_uniform(word).numpy() for word in words)  # [B, attempts]
    width, height = sizes[:, :1].astype(np.float32), sizes[:, 1:].astype(np.float32)

    area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + u_ratio * np.log(ratio[1] / ratio[0]))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)

    # The first attempt that fits; else the largest centred window within the allowed ratios.
    rows, first = np.arange(len(ids)), fits.argmax(axis=1)
    w, h, u_top, u_left = (x[rows, first] for x in (w, h, u_top, u_left))
    width, height = width[:, 0], height[:, 0]
    none = ~fits.any(axis=1)
    w = np.where(none, np.minimum(width, np.rint(height * ratio[1])), w)
    h = np.where(none, np.minimum(height, np.rint(width / ratio[0])), h)
    top = np.where(none, np.rint((height - h) / 2), np.floor(u_top * (height - h + 1)))
    left = np.where(none, np.rint((width - w) / 2), np.floor(u_left * (width - w + 1)))

    windows = _relative(top, left, h, w, np.stack([width, height], axis=1))
    mirror = philox(seed, epoch, ids, Stream.FLIP)[0] >> 31
    return windows._replace(flip=mirror.numpy().astype(np.int32))
