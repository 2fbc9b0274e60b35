"""A data set that needs no download: scikit-learn's 1,797 digits as WebVision on disk.

The tree has WebVision's exact layout with 40 % symmetric label noise (the paper's convention) in
the training lists, the labels from before aside in ``info/clean_labels.txt``, two broken files, and
an ILSVRC-like validation tree of other digits under ``ilsvrc/``. It serves tests, examples and a
first run of the whole job.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mentorch.engine.data.noise import Noise
from mentorch.kernels.philox import Stream, philox

NOISE_RATE = 0.4
SEED = 20180710
SIDE = 96  # pixels
SIZES = {"google": 1100, "flickr": 197, "val": 250, "ilsvrc": 250}  # 1,797 together

# WordNet's noun file begins with a licence and its first noun has offset 1740: no wnid is as low.
WNIDS = tuple(f"n{digit:08d}" for digit in range(10))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUERIES = 3  # a class

_README = f"""Handwritten digits in the layout of WebVision 1.0, written by mentorch.

The 1,797 images are scikit-learn's digits (8 x 8 pixels, UCI "Optical Recognition of
Handwritten Digits"), enlarged to {SIDE} x {SIDE}; each is used once. They are not WebVision images,
and the wnids n00000000 to n00000009 are invented: WordNet's first noun has the offset 00001740.
Label noise in the training lists: symmetric (uniform over all classes), rate {NOISE_RATE}, seed
{SEED}.
info/clean_labels.txt has the labels from before. Two files under google/ are broken on purpose.
"""


def embedded_root() -> Path:
    """Where the tree is kept: in the user's cache folder, another one for another version of it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256(_README.encode()).hexdigest()[:8]
    return cache / "mentorch" / f"digits-as-webvision-{version}"


@dataclass
class _Digits:
    """One part of the digits.

    Attributes:
        pixels: uint8 [n, 8, 8].
        clean: what they show, int64 [n].
        ids: their numbers among all digits, int64 [n].
    """

    pixels: npt.NDArray[np.uint8]
    clean: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]


def write_embedded(root: str | Path) -> Path:
    """Writes the tree, unless it is there already.

    Args:
        root: the folder to make; it must not exist, be empty, or be such a tree.

    Returns:
        The folder.

    Raises:
        ValueError: something else is in the folder.
    """
    root = Path(root)
    if _is_complete(root):
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"{root} holds something else; give a folder that is empty or not there yet"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        _write_tree(temporary)
        temporary.chmod(0o755)
        temporary.replace(root)
    except OSError:
        if not _is_complete(root):  # another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _is_complete(root: Path) -> bool:
    """The tree appears at once by a rename, so its README stands for all of it."""
    readme = root / "info" / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8") == _README


def _write_tree(root: Path) -> None:
    parts = _split(*_load_digits())
    (root / "info").mkdir()
    google = _write_train(root, "google", parts["google"])
    flickr = _write_train(root, "flickr", parts["flickr"])
    _write_lines(root, "clean_labels.txt", google + flickr)
    _break_two(root, google)
    _write_val(root, parts["val"])
    _write_ilsvrc(root / "ilsvrc", parts["ilsvrc"])
    names = [f"{w} {n}, {d}" for d, (w, n) in enumerate(zip(WNIDS, NAMES, strict=True))]
    _write_lines(root, "synsets.txt", names)
    queries = range(10 * QUERIES)
    _write_lines(root, "queries_synsets_map.txt", [f"{q + 1} {q // QUERIES + 1}" for q in queries])
    (root / "info" / "README.txt").write_text(_README, encoding="utf-8")


def _load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return pixels, digits.target.astype(np.int64)


def _split(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> dict[str, _Digits]:
    """Shuffles the digits and deals them out."""
    keys = philox(SEED, 0, torch.arange(len(labels)), Stream.ORDER)[0].numpy()
    ends = np.cumsum(list(SIZES.values()))
    pieces = np.split(np.argsort(keys, kind="stable"), ends[:-1])
    return {
        name: _Digits(pixels[ids], labels[ids], ids)
        for name, ids in zip(SIZES, pieces, strict=True)
    }


def _write_train(root: Path, source: str, part: _Digits) -> list[str]:
    """Writes the images and the list of one source; returns lines with the clean labels."""
    noisy = Noise("symmetric", NOISE_RATE, SEED).apply(part.clean, 10, part.ids)
    query = (
        noisy * QUERIES + part.ids % QUERIES + 1
    )  # whoever searched for the wrong label found it
    paths = [f"{source}/q{q:04d}/{i:06d}.jpg" for q, i in zip(query, part.ids, strict=True)]
    for path, pixels in zip(paths, part.pixels, strict=True):
        _save(root / path, pixels)
    lines = sorted(zip(paths, noisy.tolist(), part.clean.tolist(), strict=True))
    _write_lines(root, f"train_filelist_{source}.txt", [f"{p} {y}" for p, y, _ in lines])
    return [f"{p} {y}" for p, _, y in lines]


def _write_val(root: Path, part: _Digits) -> None:
    names = [f"val{k:06d}.jpg" for k in range(1, len(part.clean) + 1)]
    for name, pixels in zip(names, part.pixels, strict=True):
        _save(root / "val_images_256" / name, pixels)
    pairs = zip(names, part.clean, strict=True)
    _write_lines(root, "val_filelist.txt", [f"{name} {label}" for name, label in pairs])
    _write_lines(root, "test_filelist.txt", [f"test{k:06d}.jpg" for k in range(1, 11)])


def _write_ilsvrc(root: Path, part: _Digits) -> None:
    for number, (pixels, label) in enumerate(zip(part.pixels, part.clean, strict=True), 1):
        _save(root / "val" / WNIDS[label] / f"ILSVRC2012_val_{number:08d}.JPEG", pixels)


def _break_two(root: Path, lines: list[str]) -> None:
    """What a web crawl is never without: half a JPEG, and an error page in a JPEG's place."""
    half, page = (root / lines[k].split()[0] for k in (len(lines) // 3, 2 * len(lines) // 3))
    half.write_bytes(half.read_bytes()[:-400])
    page.write_text("<!DOCTYPE html><title>404 Not Found</title>\n", encoding="utf-8")


def _save(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.convert("RGB").save(path, "JPEG", quality=90)


def _write_lines(root: Path, name: str, lines: list[str]) -> None:
    (root / "info" / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
