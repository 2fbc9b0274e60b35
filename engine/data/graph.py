"""The DALI graph, encoded files in and uint8 images out, and finding the file that it refuses."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mentorch.engine.config import DataConfig
from mentorch.engine.data.order import PADDING
from mentorch.engine.data.source import PLACEHOLDER, EncodedBatch

_NO_DALI = """DALI is not installed. It comes as one wheel a CUDA major version:
    pip install nvidia-dali-cuda130     CUDA 13, and machines without a GPU
    pip install nvidia-dali-cuda120     CUDA 12
(The package called nvidia-dali, without a suffix, is not it.)"""

_REASON_CHARS = 200


def build_graph(
    batches: Iterator[EncodedBatch],
    batch_size: int,
    threads: int,
    config: DataConfig,
    device: torch.device,
) -> Any:
    """The pipeline (files, window, mirror, id) → (uint8 image, id).

    Args:
        batches: what goes in.
        batch_size: rows of the largest of them.
        threads: decoding threads.
        config: size of the images, prefetching, and how a GPU decodes.
        device: that decodes.

    Raises:
        ImportError: DALI is missing; the message says what to install.
    """
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
            **(_on_gpu(config) if on_gpu else {}),
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


def _on_gpu(config: DataConfig) -> dict[str, Any]:
    """How the mixed decoder works; its CPU half does not know these options."""
    width, height = config.decoder_size_hint
    return {
        "hw_decoder_load": config.decoder_load,
        "preallocate_width_hint": width,
        "preallocate_height_hint": height,
        "jpeg_fancy_upsampling": True,  # as the CPU decoder: the same pixels, but for rounding
    }


def to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy on the device, ordered on torch's stream: DALI reuses its own buffers.

    ``run()`` has waited for the output: only so is it known which batch an error belongs to. With
    batches decoded ahead, and this one asked for ahead (`prefetched`), the device does not wait.
    """
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

    on_gpu = "GPU" in type(output).__name__
    tensor = torch.empty(
        output.as_tensor().shape(),
        dtype=to_torch_type[output.dtype],
        device=device if on_gpu else "cpu",
    )
    stream = torch.cuda.current_stream(device) if on_gpu else None
    feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
    return tensor.to(device, non_blocking=True)


def refused_rows(
    batch: EncodedBatch, config: DataConfig, device: torch.device
) -> list[tuple[int, str]]:
    """The rows of a batch that cannot be decoded, and why: found by halving, 2 log2 B tries each.

    Args:
        batch: one that did not decode as a whole.
        config: as it was decoded with.
        device: likewise.

    Returns:
        Row and reason; nothing where the device does not even decode the placeholder, or where
        every part decodes by itself: then the files are not what is wrong.
    """
    sound = EncodedBatch(
        [PLACEHOLDER],
        np.zeros((1, 2), np.float32),
        np.ones((1, 2), np.float32),
        np.zeros(1, np.int32),
        np.array([PADDING]),
    )
    if _why_not(sound, config, device):
        return []
    return _halve(batch, np.flatnonzero(batch.sample_ids != PADDING), config, device)


def _halve(
    batch: EncodedBatch, rows: NDArray[np.int64], config: DataConfig, device: torch.device
) -> list[tuple[int, str]]:
    if not len(rows):
        return []
    reason = _why_not(_part(batch, rows), config, device)
    if reason is None:
        return []
    if len(rows) == 1:
        return [(int(rows[0]), reason)]
    half = len(rows) // 2
    return [
        *_halve(batch, rows[:half], config, device),
        *_halve(batch, rows[half:], config, device),
    ]


def _part(batch: EncodedBatch, rows: NDArray[np.int64]) -> EncodedBatch:
    files, start, shape, flip, sample_ids = batch
    return EncodedBatch(
        [files[row] for row in rows], start[rows], shape[rows], flip[rows], sample_ids[rows]
    )


def _why_not(batch: EncodedBatch, config: DataConfig, device: torch.device) -> str | None:
    """Why a batch does not decode; None if it does."""
    pipe = build_graph(iter([batch]), len(batch.files), 1, config, device)
    try:
        images, _ = pipe.run()
        to_torch(images, device)  # what a GPU reports late
    except RuntimeError as error:
        return reason_of(error)
    return None


def reason_of(error: RuntimeError) -> str:
    """What DALI says happened, without its traceback of our own graph."""
    said = str(error).partition("encountered:")[2] or str(error)
    said = said.partition("Current pipeline object")[0]
    said = re.sub(r"[Ss]ample #\d+", "it", re.sub(r"\s+", " ", said)).strip(" :.\n")
    return f"the decoder refuses it: {said}"[:_REASON_CHARS]
