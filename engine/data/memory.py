"""Batches of an image set that lies in memory, on the device: no files, no workers, no waiting.

It means the same as `pipelines.Loader`: the order is that of `order`, crops and flips are a pure
function of (seed, epoch, sample id), so a run resumes by asking for the batches from there on. An
epoch's order and augmentation are put on the device at its start; within it nothing waits for the
host.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mentorch.engine.data.order import Ids, rank_batches, shuffled
from mentorch.engine.data.pipelines import Batch
from mentorch.engine.distributed import World
from mentorch.kernels.philox import Stream, philox

_CHUNK = 1 << 24  # values of images that are summed at once


@dataclass(frozen=True)
class Augment:
    """Random changes to training images.

    Attributes:
        pad: zeros put around an image before a window of its own size is cut at random, pixels.
        mirror: whether every second window, at random, is mirrored.
    """

    pad: int = 0
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad is {self.pad} pixels; it is 0 (no crop) or more")


class MemoryLoader:
    """Batches of a set in memory for one rank, from any position of training.

    Args:
        images: [N, H, W, C] uint8, or features [N, D] float32, the whole set; batches come on its
            device.
        sample_ids: int64, the samples to use, rows of ``images``.
        batch_size: rows a rank a step.
        train: shuffled and augmented, the samples that do not fill a global batch left to another
            epoch; or as they are, in order, each sample exactly once.
        seed: of order, crops and flips.
        augment: of training images.
        world: which rank this is; its device is not looked at.

    Raises:
        ValueError: fewer samples than one global batch, images of another shape or type, or ids
            that are no rows of them.
    """

    def __init__(
        self,
        images: Tensor,
        sample_ids: Tensor | Ids,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        augment: Augment = Augment(),
        world: World | None = None,
    ) -> None:
        self.images = images
        on_host = sample_ids.cpu().numpy() if isinstance(sample_ids, Tensor) else sample_ids
        self.sample_ids: Ids = np.array(on_host, dtype=np.int64)
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.augment = augment if train else Augment()
        self.world = world or World()
        _check(images, self.sample_ids, self.augment)
        self.steps_per_epoch = len(self._epoch(0))

    def _epoch(self, epoch: int) -> Ids:
        """This rank's batches of an epoch, [steps, B] sample ids."""
        order = shuffled(self.sample_ids, self.seed, epoch) if self.train else self.sample_ids
        world = self.world
        return rank_batches(order, self.batch_size, world.rank, world.world_size, self.train)

    def batches(self, start_step: int = 0, epochs: int = 1) -> Iterator[Batch]:
        """Batches from a step of training up to the end of the last epoch.

        Args:
            start_step: steps already taken, counted from the start of training.
            epochs: epochs of training in all.
        """
        first_epoch, skip = divmod(start_step, self.steps_per_epoch)
        for epoch in range(first_epoch, epochs):
            order = self._epoch(epoch)[skip if epoch == first_epoch else 0 :]
            ids = torch.from_numpy(order).to(self.images.device)
            top, left, flip = windows(self.augment, ids, self.seed, epoch)
            for step, sample_ids in enumerate(ids):
                images = self.images[sample_ids.clamp(min=0)]  # padding rows show image 0
                if self.augment.pad or self.augment.mirror:
                    images = cut(images, top[step], left[step], flip[step], self.augment.pad)
                yield Batch(images, sample_ids)

    def close(self) -> None:
        """Nothing to stop."""


def _check(images: Tensor, sample_ids: Ids, augment: Augment) -> None:
    kind = images.dtype, images.ndim
    if kind != (torch.uint8, 4) and (kind != (torch.float32, 2) or augment != Augment()):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, C], or float32 "
            "features [N, D] without augmentation"
        )
    if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < len(images):
        raise ValueError(
            f"sample_ids are from {sample_ids.min()} to {sample_ids.max()}; the rows of the images "
            f"are from 0 to {len(images) - 1}"
        )


def windows(augment: Augment, sample_ids: Tensor, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Where to cut each sample in an epoch, and whether to mirror it.

    Args:
        augment: what may be drawn.
        sample_ids: int64, any shape.
        seed: of the run.
        epoch: another epoch, another window.

    Returns:
        Top and left edge in the padded image, int64 in 0..2·pad, and the flip, bool; each of the
        shape of ``sample_ids``.
    """
    down, right, _, _ = philox(seed, epoch, sample_ids, Stream.CROP)
    places = 2 * augment.pad + 1
    flip = (philox(seed, epoch, sample_ids, Stream.FLIP)[0] >> 31).bool() & augment.mirror
    return (down * places) >> 32, (right * places) >> 32, flip


def cut(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Windows of the images' own size out of the images with zeros around them.

    Args:
        images: [B, H, W, C].
        top: [B] int64, first row of the window in the padded image.
        left: [B] int64, first column, likewise.
        flip: [B] bool, mirror the window.
        pad: rows and columns of zeros on every side, pixels.
    """
    batch, height, width, _ = images.shape
    padded = nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    device = images.device
    column = torch.arange(width, device=device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    rows = top[:, None] + torch.arange(height, device=device)
    image = torch.arange(batch, device=device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


class Standardise(nn.Module):
    """Raw pixels to what a student takes, each image by its own: (x − mean)/max(std, 1/√n).

    Mean and standard deviation are over the n = H·W·C values of an image, 0 to 255, and computed in
    float32, as TensorFlow's ``per_image_standardization`` does; the floor keeps the noise of almost
    uniform images small.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images.

        Args:
            images: [B, H, W, C] uint8.

        Returns:
            [B, C, H, W] float32 in channels-last memory order, as the pixels came.
        """
        x = images.float()
        var, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        std = var.sqrt().clamp(min=1 / math.sqrt(math.prod(images.shape[1:])))
        return ((x - mean) / std).permute(0, 3, 1, 2)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, as `pipelines.Normalise` takes them.

    Sums of the integer pixels are exact, and so is the result up to float64's rounding.

    Args:
        images: [N, H, W, C] uint8.

    Returns:
        The means and the standard deviations over the set, for pixels in [0, 1].
    """
    total = torch.zeros(2, images.shape[-1], dtype=torch.int64, device=images.device)
    for chunk in images.split(max(1, _CHUNK // max(1, images[0].numel()))):
        x = chunk.long()
        total += torch.stack([x.sum((0, 1, 2)), x.square().sum((0, 1, 2))])
    n = images.shape[:-1].numel()
    sums, squares = cast(list[list[int]], total.tolist())
    means = tuple(s / (255 * n) for s in sums)
    # Python's integers: n · Σx² − (Σx)² loses nothing.
    stds = tuple(math.sqrt(n * q - s * s) / (255 * n) for s, q in zip(sums, squares, strict=True))
    return means, stds
