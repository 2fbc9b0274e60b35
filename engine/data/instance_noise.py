"""Instance-dependent label noise: which label is wrong, and how, depends on the image.

Xia et al., "Part-dependent label noise", NeurIPS 2020, algorithm 2. For a sample x of class y:
    q ~ N(p, 0.1²) truncated to [0, 1]              its own flip rate
    s = x W_y, W_y of standard normal numbers       [D] × [D, C], a projection for each class
    P(given j) = q softmax(s without y)_j for j ≠ y, and 1 − q for j = y
The paper draws from one generator in turn; here q, W and the outcome come from counters, so that
each label is a function of the seed, the sample's id and its image alone.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mentorch.engine.data.index import Index
from mentorch.engine.data.readers import open_reader
from mentorch.kernels.philox import Stream, philox

FLIP_RATE_STD = 0.1
THUMBNAIL_SIDE = 32  # pixels

# Pixels and projections are multiples of 2⁻¹², so that every sum below is exact in float64 and a
# label cannot depend on the order of addition, that is on which samples share a chunk.
_STEPS = 2**12
_LARGEST_PROJECTION = 8  # of 32-bit words the normal numbers end at 6.4
_LARGEST_SUM = 2**53 // (_STEPS * _STEPS * _LARGEST_PROJECTION)
_CHUNK_ELEMENTS = 2**22  # of images or scores, 32 MiB


def instance_noise(
    labels: npt.NDArray[np.int64],
    num_classes: int,
    rate: float,
    seed: int,
    sample_ids: npt.NDArray[np.int64],
    images: npt.NDArray[np.generic],
) -> npt.NDArray[np.int64]:
    """Labels with instance-dependent noise.

    Args:
        labels: the labels, [N], in 0..num_classes−1.
        num_classes: C, at least 2.
        rate: the mean p of the flip rates before they are truncated, in [0, 1]; 0 and 1 are taken
            literally, without a spread.
        seed: of the counter-based generator.
        sample_ids: int64 [N].
        images: [N, …], flattened to [N, D]: uint8 counts as 0 to 1, other numbers as they are.

    Returns:
        New labels, [N].

    Raises:
        ValueError: the images do not fit the labels, or are too large or not finite.
    """
    if len(images) != len(labels):
        raise ValueError(f"instance noise got {len(images)} images for {len(labels)} labels")
    images = images.reshape(len(images), -1)
    words = philox(seed, 0, torch.from_numpy(sample_ids), Stream.LABEL_NOISE)
    outcome, flip_rates = words[0].numpy(), _flip_rates(words[1], rate)
    new: npt.NDArray[np.int64] = labels.copy()
    for label in np.unique(labels):
        projection = _projection(seed, int(label), images.shape[1], num_classes)
        for rows in _chunks(np.flatnonzero(labels == label), max(images.shape[1], num_classes)):
            scores = _fixed_point(images[rows], sample_ids[rows]) @ projection / _STEPS**2
            new[rows] = _draw(scores, int(label), flip_rates[rows], outcome[rows])
    return new


def mean_flip_rate(rate: float) -> float:
    """The mean of the truncated normal distribution: close to ``rate`` away from 0 and 1."""
    if not flip_rate_std(rate):
        return float(rate)
    normal = NormalDist(rate, FLIP_RATE_STD)
    mass = normal.cdf(1) - normal.cdf(0)
    return rate + FLIP_RATE_STD**2 * (normal.pdf(0) - normal.pdf(1)) / mass


def flip_rate_std(rate: float) -> float:
    """Standard deviation of the flip rates, before they are truncated."""
    return FLIP_RATE_STD if 0 < rate < 1 else 0.0


def thumbnails(
    index: Index, sample_ids: npt.NDArray[np.int64], side: int = THUMBNAIL_SIDE
) -> npt.NDArray[np.uint8]:
    """The images of an index, small and grey, as features for instance noise.

    Args:
        index: its root folder has to be there.
        sample_ids: which ones, int64 [N].
        side: width and height, pixels.

    Returns:
        uint8 [N, side · side]; 0 where the index has the image as missing or broken.

    Raises:
        ValueError: an image that the index has as usable cannot be read.
    """
    reader = open_reader(index)
    usable = index.table["status"].to_numpy() == "ok"
    out = np.zeros((len(sample_ids), side * side), np.uint8)

    def read(row: int) -> None:
        sample_id = int(sample_ids[row])
        if usable[sample_id]:
            data = reader.read(sample_id)
            if isinstance(data, str):
                raise ValueError(f"{index.path(sample_id)} under {index.root}: {data}")
            out[row] = _thumbnail(data.tobytes(), side)

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for _ in pool.map(read, range(len(sample_ids))):
            pass
    return out


def _thumbnail(data: bytes, side: int) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (side, side))  # a JPEG is decoded at a fraction of its size
        small = image.convert("L").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.uint8).reshape(-1)


def _flip_rates(word: Tensor, rate: float) -> npt.NDArray[np.float64]:
    """q of each sample by the inverse distribution function, [N]."""
    if not flip_rate_std(rate):
        return np.full(len(word), rate, np.float64)
    normal = NormalDist(rate, FLIP_RATE_STD)
    low, high = normal.cdf(0), normal.cdf(1)
    q = rate + FLIP_RATE_STD * _normal(low + (high - low) * _unit(word))
    return np.clip(q, 0, 1)


def _projection(seed: int, label: int, features: int, classes: int) -> npt.NDArray[np.float64]:
    """W_y in steps of 2⁻¹², whole numbers [D, C]. Step 0 of the stream belongs to the samples."""
    size = features * classes
    words = philox(seed, 1 + label, torch.arange(-(-size // 4)), Stream.LABEL_NOISE)
    normal = _normal(_unit(torch.stack(words, dim=1).reshape(-1)[:size]))
    return np.round(normal * _STEPS).reshape(features, classes)


def _unit(word: Tensor) -> Tensor:
    """A 32-bit word as float64, inside (0, 1)."""
    return (word.double() + 0.5) * 2.0**-32


def _normal(unit: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(torch.special.ndtri(unit).numpy(), np.float64)


def _chunks(rows: npt.NDArray[np.int64], elements_per_row: int) -> Iterator[npt.NDArray[np.int64]]:
    size = max(1, _CHUNK_ELEMENTS // elements_per_row)
    return (rows[at : at + size] for at in range(0, len(rows), size))


def _fixed_point(
    images: npt.NDArray[np.generic], sample_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Images in steps of 2⁻¹², whole numbers [n, D]."""
    x = images.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
    total = np.abs(x).sum(axis=1)
    good = total < _LARGEST_SUM
    if not good.all():
        row = int((~good).argmax())
        raise ValueError(
            f"the image of sample {sample_ids[row]} has values that are not finite, or sum to more "
            f"than {_LARGEST_SUM:,} ({total[row]:g}); scale images to about −1 to 1"
        )
    return np.round(x * _STEPS)


def _draw(
    scores: npt.NDArray[np.float64],
    label: int,
    flip_rates: npt.NDArray[np.float64],
    word: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Given labels, [n], from the scores [n, C] of samples of one class."""
    scores[:, label] = -np.inf
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p *= (flip_rates / p.sum(axis=1))[:, None]
    p[:, label] = 1 - flip_rates
    cumulative = np.cumsum(p, axis=1)
    thresholds = np.round(cumulative / cumulative[:, -1:] * 2.0**32)
    return np.asarray((thresholds[:, :-1] <= word[:, None]).sum(axis=1), np.int64)
