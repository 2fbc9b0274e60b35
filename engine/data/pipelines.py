"""The DALI graph and the loader around it: encoded files in, uint8 images and sample ids out.

One graph serves training and evaluation, CPU and GPU: decode a window, resize it, mirror it. Which
window is decided outside (`crops`), which sample comes when too (`order`), so the loader has no
state but the position: a run resumes by asking for the batches from there on.
"""

import os
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mentorch.engine.config import DataConfig
from mentorch.engine.data import crops
from mentorch.engine.data.index import Index
from mentorch.engine.data.order import PADDING, Ids, rank_batches, shuffled
from mentorch.engine.data.source import BatchSource, EncodedBatch
from mentorch.engine.distributed import World

_NO_DALI = """DALI is not installed. It comes as one wheel a CUDA major version:
    pip install nvidia-dali-cuda130     CUDA 13, and machines without a GPU
    pip install nvidia-dali-cuda120     CUDA 12
(The package called nvidia-dali, without a suffix, is not it.)"""


class Batch(NamedTuple):
    """One step's images on the device."""

    images: Tensor  # [B, H, W, 3] uint8
    sample_ids: Tensor  # [B] int64, row of the index; PADDING (-1) where the row is no sample


def _build(
    batches: Iterator[EncodedBatch],
    batch_size: int,
    threads: int,
    config: DataConfig,
    device: torch.device,
) -> Any:
    """The DALI pipeline: (files, window, mirror, id) → (uint8 image, id)."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise ImportError(_NO_DALI) from error
    on_gpu = device.type == "cuda"
    pipe = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
    )
    with pipe:
        files, start, shape, flip, sample_ids = fn.external_source(
            source=batches,
            num_outputs=5,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.INT64],
            ndim=[1, 1, 1, 0, 0],
        )
        images = fn.decoders.image_slice(
            files,
            rel_start=start,
            rel_shape=shape,
            axis_names="HW",
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
        )
        images = fn.resize(
            images,
            resize_x=config.image_size,
            resize_y=config.image_size,
            interp_type=types.INTERP_LINEAR,  # with antialiasing a triangular filter, as Pillow's
            antialias=True,
        )
        pipe.set_outputs(fn.flip(images, horizontal=flip), sample_ids)
    pipe.build()
    return pipe


class Loader:
    """Batches of a data set for one rank, from any position of training.

    Args:
        index: the data set.
        sample_ids: the samples to use, rows of the index.
        batch_size: rows a rank a step.
        config: cutting and prefetching.
        train: random crops, shuffled, the samples that do not fill a global batch left to another
            epoch; or centre crops, in order, each sample exactly once.
        seed: of order and crops.
        world: which rank this is, and its device.

    Raises:
        ValueError: fewer samples than one global batch.
        ImportError: DALI is missing; the message says what to install.
    """

    def __init__(
        self,
        index: Index,
        sample_ids: Ids,
        *,
        batch_size: int,
        config: DataConfig,
        train: bool,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.index, self.sample_ids = index, sample_ids
        self.batch_size = batch_size
        self.config = config
        self.train = train
        self.seed = seed
        self.world = world or World()
        self.steps_per_epoch = len(self._epoch(0))
        self._source = BatchSource(index, self._cut, config.read_threads, config.read_ahead)

    def _epoch(self, epoch: int) -> Ids:
        """This rank's batches of an epoch, [steps, B] sample ids."""
        order = shuffled(self.sample_ids, self.seed, epoch) if self.train else self.sample_ids
        world = self.world
        return rank_batches(order, self.batch_size, world.rank, world.world_size, self.train)

    def _cut(self, sizes: crops.Sizes, sample_ids: Ids, epoch: int) -> crops.Windows:
        if not self.train:
            return crops.centre(sizes, self.config.image_size / self.config.resize)
        scale, ratio = self.config.crop_scale, self.config.crop_ratio
        windows = crops.random_resized(sizes, sample_ids, self.seed, epoch, scale, ratio)
        return windows if self.config.mirror else windows._replace(flip=windows.flip * 0)

    def batches(self, start_step: int = 0, epochs: int = 1) -> Iterator[Batch]:
        """Batches from a step of training up to the end of the last epoch.

        Args:
            start_step: steps already taken, counted from the start of training.
            epochs: epochs of training in all.

        Raises:
            RuntimeError: DALI could not decode a file that looked like an image.
        """
        first_epoch, skip = divmod(start_step, self.steps_per_epoch)
        plan = chain.from_iterable(
            ((ids, epoch) for ids in self._epoch(epoch)[skip if epoch == first_epoch else 0 :])
            for epoch in range(first_epoch, epochs)
        )
        in_flight: deque[Ids] = deque()
        encoded = self._noted(self._source.batches(plan), in_flight)
        pipe = _build(encoded, self.batch_size, self._threads(), self.config, self.world.device)
        for _ in range(epochs * self.steps_per_epoch - start_step):
            yield self._next(pipe, in_flight)

    def _threads(self) -> int:
        # The affinity, not cpu_count: containers are given fewer cores than the machine has.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.config.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)

    @staticmethod
    def _noted(encoded: Iterator[EncodedBatch], in_flight: deque[Ids]) -> Iterator[EncodedBatch]:
        """Notes which samples DALI has been handed and has not given back."""
        for batch in encoded:
            in_flight.append(batch.sample_ids)
            yield batch

    def _next(self, pipe: Any, in_flight: deque[Ids]) -> Batch:
        try:
            images, sample_ids = pipe.run()
        except RuntimeError as error:
            suspects = in_flight[0] if in_flight else ()
            paths = (self.index.path(i) for i in suspects if i != PADDING)
            raise RuntimeError(
                f"DALI says: {error}\nIt could not decode one of these files, although Pillow "
                f"could; repair it or take it away (missing files are skipped): {', '.join(paths)}"
            ) from error
        in_flight.popleft()
        return Batch(self._to_torch(images), self._to_torch(sample_ids))

    def _to_torch(self, output: Any) -> Tensor:
        """A copy on the device, ordered on torch's stream: DALI reuses its own buffers."""
        from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

        device = self.world.device
        on_gpu = "GPU" in type(output).__name__
        tensor = torch.empty(
            output.as_tensor().shape(),
            dtype=to_torch_type[output.dtype],
            device=device if on_gpu else "cpu",
        )
        stream = torch.cuda.current_stream(device) if on_gpu else None
        feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
        return tensor.to(device, non_blocking=True)

    def unreadable(self) -> dict[int, str]:
        """Samples that could not be read while streaming, and why."""
        return self._source.unreadable

    def close(self) -> None:
        """Stops the reading threads."""
        self._source.close()


class Normalise(nn.Module):
    """Raw pixels to what a student takes: (x/255 − mean)/std, in float32.

    Args:
        mean: per channel, for pixels in [0, 1].
        std: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # Buffers, so that no step copies them to the device and waits for it.
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift", torch.tensor([m / s for m, s in zip(mean, std, strict=True)]))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, 3, H, W] in channels-last memory order, as the pixels came: no transposition.
        """
        return (images * self.scale - self.shift).permute(0, 3, 1, 2)
