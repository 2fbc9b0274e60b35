"""What labels are looked for in: arrays, a data set of PyTorch's kind, or a folder of images."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from os import fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mentorch.engine.data.datasets import (
    bad_files,
    index_of_folder,
    needs_indexing,
    open_index,
)
from mentorch.engine.data.readers import Bytes, Reader, open_reader
from mentorch.engine.distributed import World
from mentorch.engine.doctor_checks import available_memory
from mentorch.engine.report.scores import Labelled

_AT_ONCE = 4096  # images that are decoded between two looks at the progress


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in memory, with what is known of their labels.

    Attributes:
        values: [N, H, W, channels] uint8 images, or [N, D] float32 features.
        named: their labels and names.
        reader: gives their pictures, by row; None: there are none to show.
        unusable: path and reason of every file that was left out.
        source: what it is, for people.
    """

    values: Tensor
    named: Labelled
    reader: Reader | None
    unusable: list[tuple[str, str]]
    source: str

    def __post_init__(self) -> None:
        given = self.named.given
        if len(given) != len(self.values):
            raise ValueError(f"{len(given):,} labels for {len(self.values):,} samples")
        if len(given) and given.min() < 0:
            raise ValueError(f"label {given.min()} is negative: leave out what has no label")
        if self.values.ndim == 2 and not self.values.isfinite().all():
            raise ValueError("some features are no finite numbers: leave those samples out")


def from_arrays(
    values: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    class_names: Sequence[str] | None = None,
    clean_labels: ArrayLike | Tensor | None = None,
    paths: Sequence[str] | None = None,
) -> Samples:
    """From arrays.

    Args:
        values: uint8 images [N, H, W] or [N, H, W, channels], or features [N, D] of any float type.
        labels: [N] integers from 0.
        class_names: [C] by label; by default the labels' numbers.
        clean_labels: [N], known to be right; below 0 where unknown.
        paths: [N], what to call the samples.

    Raises:
        ValueError: arrays of another shape or type.
    """
    tensor = _tensor(values)
    if tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[3] > 4 >= tensor.shape[1]:
        raise ValueError(
            f"images are {list(tensor.shape)}, and channels come last: give [N, H, W, channels], "
            "tensor.permute(0, 2, 3, 1) or numpy.moveaxis(array, 1, 3)"
        )
    if tensor.dtype == torch.uint8 and tensor.ndim in (3, 4):
        tensor = tensor if tensor.ndim == 4 else tensor.unsqueeze(3)
    elif tensor.is_floating_point() and tensor.ndim == 2:
        tensor = tensor.float()
    else:
        raise ValueError(
            f"samples are {tensor.dtype} {list(tensor.shape)}; give uint8 images [N, H, W] or "
            "[N, H, W, channels], or float features [N, D]"
        )
    given = _labels(labels, "labels")
    clean = None if clean_labels is None else _labels(clean_labels, "clean_labels")
    files = None if paths is None else [_text(path) for path in paths]
    reader = _Pixels(tensor) if tensor.ndim == 4 else None
    kind = "images" if tensor.ndim == 4 else "features"
    shape = "×".join(map(str, tensor.shape[1:]))
    named = Labelled(given, _names(class_names, given), clean, files)
    return Samples(tensor.contiguous(), named, reader, [], f"{kind} of {shape} in memory")


def _tensor(values: ArrayLike | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    array = np.ascontiguousarray(values)
    if array.dtype == object:
        raise ValueError("samples are Python objects: give one array, all samples of one shape")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _names(class_names: Sequence[Any] | None, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Names by label, as text; some data sets have several a class."""
    if class_names is None:
        classes = int(labels.max(initial=0)) + 1
        if classes > max(1000, len(labels)):
            raise ValueError(
                f"label {classes - 1} among {len(labels):,} samples: labels are numbers of "
                "classes, from 0 on. numpy.unique(labels, return_inverse=True) makes such"
            )
        return tuple(map(str, range(classes)))
    if isinstance(class_names, dict | str):
        raise ValueError(
            f"class_names are a sequence, by label, not a {type(class_names).__name__}"
        )
    return tuple(", ".join(n) if isinstance(n, tuple) else _text(n) for n in class_names)


def _text(name: Any) -> str:
    """A name or path as text that can be written; bytes that are no text become marks."""
    text = fspath(name) if hasattr(name, "__fspath__") else str(name)
    return str(text).encode(errors="replace").decode()


def _labels(labels: ArrayLike | Tensor, name: str) -> NDArray[np.int64]:
    found = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} are [N] integers, got {found.dtype} {list(found.shape)}")
    return found.astype(np.int64)


class _Pixels:
    """Pictures from an array, as PNG."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image."""
        pixels = self.images[sample_id].cpu().numpy()
        if pixels.shape[2] not in (1, 3):
            return f"{pixels.shape[2]} channels, which are not shown"
        file = BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
        return np.frombuffer(file.getvalue(), np.uint8)


def from_dataset(dataset: Any, image_size: int, class_names: Sequence[str] | None) -> Samples:
    """From a data set of PyTorch's kind: ``len(dataset)``, and ``dataset[i]`` is (sample, label).

    Args:
        dataset: its samples are PIL images, uint8 [H, W], arrays [H, W, channels] or tensors
            [channels, H, W] (torchvision's ``ToTensor``), uint8 or floats in [0, 1], or features
            [D].
        image_size: PIL images become squares of so many pixels a side.
        class_names: [C] by label; by default ``dataset.classes``.

    Raises:
        ValueError: samples of another kind, or of several shapes.
    """
    values, labels = [], []
    for row in range(len(dataset)):
        item = dataset[row]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise ValueError(f"dataset[{row}] is no (sample, label) but {type(item).__name__}")
        values.append(_as_array(item[0], image_size, row))
        labels.append(int(item[1]))
    if not values:
        raise ValueError("the data set is empty")
    shapes = {value.shape for value in values}
    if len(shapes) != 1:
        raise ValueError(f"samples have several shapes, such as {sorted(shapes)[:3]}: resize them")
    names = class_names if class_names is not None else getattr(dataset, "classes", None)
    return from_arrays(np.stack(values), np.array(labels, np.int64), names)


def _as_array(sample: Any, image_size: int, row: int) -> Any:
    """Pixels [H, W] or [H, W, channels] uint8, or features [D] float32."""
    if isinstance(sample, Image.Image):
        return _square(sample, image_size)
    is_tensor = isinstance(sample, Tensor)
    value = np.asarray(sample.cpu() if is_tensor else sample)
    if value.dtype == np.uint8 and value.ndim in (2, 3):
        first = is_tensor and value.ndim == 3  # as PyTorch has its channels
        return value.transpose(1, 2, 0) if first else value
    if np.issubdtype(value.dtype, np.floating) and value.ndim == 1:
        return value.astype(np.float32)
    if np.issubdtype(value.dtype, np.floating) and value.ndim == 3:
        if not (value.min() >= 0 and value.max() <= 1):  # NaN neither
            raise ValueError(
                f"dataset[{row}] has pixels from {value.min():.2f} to {value.max():.2f}; give "
                "images in [0, 1], that is before they are normalised, or uint8"
            )
        channels_last = value.transpose(1, 2, 0) if is_tensor else value
        return np.round(255 * channels_last).astype(np.uint8)
    raise ValueError(
        f"dataset[{row}] is {value.dtype} {list(value.shape)}; give a PIL image, uint8 [H, W], an "
        "array [H, W, channels], a tensor [channels, H, W] (uint8, or floats in [0, 1]), or float "
        "features [D]"
    )


def _square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """The middle of an image at ``side`` × ``side``, RGB, the way up that it is meant to be."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR))


def from_folder(
    path: Path,
    image_size: int,
    max_label: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Samples:
    """From a data set's folder or an index: its training images that can be decoded.

    Args:
        path: as training takes it: class folders, WebVision, ImageNet, shards, or an index.
        image_size: images become squares of so many pixels a side.
        max_label: only labels below this.
        say: told what goes on.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no data set, or images that do not fit into memory.
    """
    _say_which_index(path, say)
    index = open_index(path, World())
    ids = index.select("train", max_label=max_label)
    _check_memory(len(ids) * image_size**2 * 3, image_size)
    reader = open_reader(index)
    values = np.empty((len(ids), image_size, image_size, 3), np.uint8)

    def decode(row: int) -> str:
        data = reader.read(int(ids[row]))
        if isinstance(data, str):
            return data
        try:
            with Image.open(BytesIO(data.tobytes())) as image:
                image.draft("RGB", (2 * image_size, 2 * image_size))  # JPEGs decode faster so
                values[row] = _square(image, image_size)
        except Exception as error:  # a damaged file may raise anything in a decoder
            return f"cannot be decoded ({type(error).__name__})"
        return ""

    reasons: list[str] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(ids), _AT_ONCE):
            reasons += pool.map(decode, range(start, min(start + _AT_ONCE, len(ids))))
            say(f"{len(reasons):,} of {len(ids):,} images decoded")
    good = np.array([not reason for reason in reasons])
    if not good.any():
        raise ValueError(f"none of the {len(ids):,} images under {index.root} can be decoded")
    unusable = [(index.path(int(ids[row])), reasons[row]) for row in np.flatnonzero(~good)]
    kept = ids[good]
    clean = index.clean_labels()[kept]
    named = Labelled(
        index.labels()[kept],
        tuple(index.class_names[:max_label]),
        clean if (clean >= 0).any() else None,
        index.paths().take(kept).to_pylist(),
    )
    return Samples(
        torch.from_numpy(values[good]), named, _Rows(reader, kept),
        bad_files(index, "train", max_label) + unusable, f"{index.root} ({index.dataset})",
    )  # fmt: skip


def _say_which_index(path: Path, say: Callable[[str], None]) -> None:
    """An index does not notice what is done to its folder."""
    if path.is_dir() and not needs_indexing(path):
        kind, file = index_of_folder(path)
        if file.is_file():
            made = datetime.fromtimestamp(file.stat().st_mtime)
            say(
                f"{file}, of {made:%Y-%m-%d %H:%M}, says which images there are. If any were "
                f"added, moved or removed since: mentorch index {kind} {path}"
            )


class _Rows:
    """The pictures of some rows of an index, numbered anew."""

    def __init__(self, reader: Reader, sample_ids: NDArray[np.int64]) -> None:
        self.reader, self.sample_ids = reader, sample_ids

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image, or why there is none."""
        return self.reader.read(int(self.sample_ids[sample_id]))


def _check_memory(needed: int, image_size: int) -> None:
    available = available_memory()[0]
    if 2 * needed > available:  # once more while the good ones are picked
        raise ValueError(
            f"the images need {2 * needed / 2**30:.1f} GiB at {image_size} pixels a side, and "
            f"{available / 2**30:.1f} GiB are free: give a smaller image size, or train on the "
            "folder (recipes/webvision_irv2.py) and run `mentorch report`, which streams"
        )
