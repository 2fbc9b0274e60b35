"""A folder of made-up photographs: JPEGs of real ones' size, sharpness and cost to decode.

Their spectrum falls as 1/f, as that of photographs does, and their channels are mostly alike.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 500, 375  # ImageNet's most frequent size
QUALITY = 90
CLASSES = 16
CANVASES = 8  # larger pictures that the photographs are cut from: noise is slower than encoding


def _falling(random: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Noise of spectrum 1/f, [height, width], mean 0 and standard deviation 1."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(y, x)
    frequency[0, 0] = np.inf
    shape = frequency.shape
    spectrum = (random.standard_normal(shape) + 1j * random.standard_normal(shape)) / frequency
    noise = np.fft.irfft2(spectrum, s=(height, width))
    return noise / noise.std()


def canvas(random: np.random.Generator) -> NDArray[np.uint8]:
    """A picture twice as high and wide as a photograph, RGB."""
    size = 2 * HEIGHT, 2 * WIDTH
    light = _falling(random, *size)
    colour = np.stack([_falling(random, *size) for _ in range(3)], axis=-1)
    return (118 + 30 * light[..., None] + 6 * colour).clip(0, 255).astype(np.uint8)


def write(folder: Path, count: int, seed: int = 0) -> float:
    """Writes ``folder/train/c00/00000.jpg`` …, no two alike; gives their mean size in bytes."""
    random = np.random.default_rng(seed)
    canvases = [canvas(random) for _ in range(CANVASES)]
    sizes = []
    for i in range(count):
        top, left = random.integers(HEIGHT), random.integers(WIDTH)
        picture = canvases[i % len(canvases)][top : top + HEIGHT, left : left + WIDTH]
        path = folder / "train" / f"c{i % CLASSES:02}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))
