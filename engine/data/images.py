"""Small labelled image sets, whole in memory: digits, MNIST's format, CIFAR, CIFAR-N.

Every reader checks what it reads against the format, and none of them runs code from a file: CIFAR
is read in its binary version, since the Python version is a pickle.
"""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mentorch.engine.data.order import Ids, shuffled

ImageSetName = Literal["digits", "fashion_mnist", "mnist", "cifar10", "cifar100"]

DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")  # Debian's package

_DIGITS_TRAIN, _DIGITS_SEED = 1297, 1797  # the split is part of the format
_IDX_MOST = 1_000_000  # items: what a damaged header or a gzip bomb may make us read

_CIFAR_N = "https://github.com/UCSC-REAL/cifar-10-100n"
# What the arrays of CIFAR-N are made of. numpy 1, which wrote the published files, called the
# function by another name; a plain import under that name warns.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ARRAYS_ONLY: list[Any] = [
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype),
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"]},
]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A small labelled image set, in memory.

    Attributes:
        name: of the set.
        images: training, [N, H, W, C] uint8.
        labels: [N] int64, in 0..C−1.
        test_images: [M, H, W, C] uint8.
        test_labels: [M] int64.
        classes: their names.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The set on a device."""
        images, labels = self.images.to(device), self.labels.to(device)
        test_images, test_labels = self.test_images.to(device), self.test_labels.to(device)
        return ImageSet(self.name, images, labels, test_images, test_labels, self.classes)

    def subset(self, train_ids: Tensor | Ids) -> "ImageSet":
        """The set with some of its training rows, numbered anew; all of the test rows.

        Args:
            train_ids: [n] int64, rows of `images`.
        """
        rows = torch.as_tensor(train_ids, device=self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])


def load_images(name: ImageSetName, root: Path | None = None) -> ImageSet:
    """Reads an image set; nothing is downloaded.

    Args:
        name: which one.
        root: the folder with its files. "digits" has none, "fashion_mnist" looks in
            `FASHION_ROOT` unless told otherwise.

    Raises:
        ValueError: the name is unknown, the root is missing, or a file is not what it should be.
        FileNotFoundError: a file is missing.
    """
    if name == "digits":
        return _digits()
    if name == "fashion_mnist":
        return _idx_set(name, FASHION_ROOT if root is None else Path(root), FASHION)
    if name not in get_args(ImageSetName):
        raise ValueError(f"image set {name!r} is unknown; it is one of {get_args(ImageSetName)}")
    if root is None:
        raise ValueError(f"{name} has no default folder; give root=, the folder with its files")
    return _idx_set(name, Path(root), DIGITS) if name == "mnist" else _cifar(name, Path(root))


def cifar_n_labels(path: Path, which: str, clean: Tensor) -> Tensor:
    """Human labels of CIFAR's training images: CIFAR-N (Wei et al., ICLR 2022).

    Args:
        path: ``CIFAR-10_human.pt`` or ``CIFAR-100_human.pt``.
        which: for CIFAR-10 "worse_label", "aggre_label" or "random_label1" to "random_label3"; for
            CIFAR-100 "noisy_label".
        clean: [N] int64, the set's own labels: the file's images must come in the same order.

    Returns:
        [N] int64, on the device of ``clean``.

    Raises:
        ValueError: the file is not CIFAR-N, not of this set, or has no labels of that name.
        FileNotFoundError: there is no such file.
    """
    arrays = _cifar_n_arrays(Path(path))
    known = _label_array(path, arrays, "clean_label", len(clean))
    differ = int((known != clean.cpu()).sum())
    if differ:
        raise ValueError(
            f"{path}: clean_label differs from the labels given in {differ:,} of {len(clean):,} "
            "rows; give all training labels of the same set, in the order of its binary files"
        )
    # Coarse labels are of another 20 classes.
    there = [key for key in arrays if key != "clean_label" and "coarse" not in str(key)]
    if which not in there:
        raise ValueError(f"{path} has no labels {which!r}; it has {there}")
    labels = _label_array(path, arrays, which, len(clean))
    _check_range(path, labels, int(known.max()) + 1)
    return labels.to(clean.device)


def _check_range(path: Path, labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{path} has labels from {low} to {high}, expected 0 to {num_classes - 1}; "
            "the file is damaged or of another set"
        )


def _digits() -> ImageSet:
    """1,797 digits of 8 × 8 pixels in 17 grey levels (UCI)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8)).unsqueeze(-1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = shuffled(np.arange(len(labels)), _DIGITS_SEED, 0)
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return ImageSet("digits", images[train], labels[train], images[test], labels[test], DIGITS)


# MNIST's format, idx: big-endian 32-bit numbers (magic, number of items, their sizes), then bytes


def _idx_set(name: str, root: Path, classes: tuple[str, ...]) -> ImageSet:
    images, labels = _idx_split(name, root, "train")
    return ImageSet(name, images, labels, *_idx_split(name, root, "t10k"), classes)


def _idx_split(name: str, root: Path, split: str) -> tuple[Tensor, Tensor]:
    pixels = _idx_path(name, root, f"{split}-images", "idx3")
    truth = _idx_path(name, root, f"{split}-labels", "idx1")
    images = _idx_array(pixels, (28, 28)).unsqueeze(-1)
    labels = _idx_array(truth, ()).long()
    if len(images) != len(labels):
        raise ValueError(
            f"{pixels} has {len(images):,} images, but {truth} has {len(labels):,} labels; "
            "take both from the same set"
        )
    _check_range(truth, labels, 10)
    return images, labels


def _idx_path(name: str, root: Path, stem: str, kind: str) -> Path:
    spellings = [f"{stem}{dot}{kind}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for spelling in spellings:
        if (root / spelling).is_file():
            return root / spelling
    install = "apt-get install dataset-fashion-mnist, or " if name == "fashion_mnist" else ""
    raise FileNotFoundError(
        f"{root} has no {spellings[0]} (nor {', '.join(spellings[1:])}), expected for {name}; "
        f"{install}give root=, the folder with its files"
    )


def _idx_array(path: Path, item: tuple[int, ...]) -> Tensor:
    """The uint8 array of an idx file, [n, *item]."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            n = _idx_count(path, file.read(8 + 4 * len(item)), item)
            size = n * math.prod(item)
            data = bytearray(file.read(size + 1))  # one more, to see whether it ends there
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); download it again") from error
    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else "more"
        raise ValueError(
            f"{path} has {found} bytes after its header, expected {size:,}; download it again"
        )
    return torch.frombuffer(data, dtype=torch.uint8).reshape(n, *item)


def _idx_count(path: Path, header: bytes, item: tuple[int, ...]) -> int:
    """The number of items that a header promises."""
    magic = 0x0801 + len(item)  # unsigned bytes, 1 dimension and those of an item
    numbers = np.frombuffer(header, ">u4", len(header) // 4).tolist()
    if len(numbers) > 1 and numbers == [magic, numbers[1], *item] and 0 < numbers[1] <= _IDX_MOST:
        return int(numbers[1])
    raise ValueError(
        f"{path} begins with the numbers {numbers}, expected {[magic, 'n', *item]} with n from 1 "
        f"to {_IDX_MOST:,}; it is damaged or another kind of file, download it again"
    )


# CIFAR's binary version: records of one label (CIFAR-100: coarse, fine) and 3 × 32 × 32 pixels


class _Cifar(NamedTuple):
    num_classes: int
    label_bytes: int  # the last one counts
    folder: str
    train: tuple[str, ...]
    test: str
    names: str

    @property
    def archive(self) -> str:
        return f"cifar-{self.num_classes}-binary.tar.gz"


_BATCHES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_CIFAR10 = _Cifar(10, 1, "cifar-10-batches-bin", _BATCHES, "test_batch.bin", "batches.meta.txt")
_CIFAR100 = _Cifar(100, 2, "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt")
_PICKLED = {10: ("cifar-10-batches-py", "data_batch_1"), 100: ("cifar-100-python", "meta")}


def _cifar(name: str, root: Path) -> ImageSet:
    kind = _CIFAR10 if name == "cifar10" else _CIFAR100
    folder = _cifar_folder(kind, root)
    missing = [f for f in (*kind.train, kind.test, kind.names) if not (folder / f).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}; unpack {kind.archive} again")
    parts = [_cifar_records(kind, folder / file) for file in kind.train]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    test = _cifar_records(kind, folder / kind.test)
    return ImageSet(name, images, labels, *test, _cifar_classes(kind, folder / kind.names))


def _cifar_folder(kind: _Cifar, root: Path) -> Path:
    for folder in (root, root / kind.folder):
        if (folder / kind.train[0]).is_file():
            return folder
    for pickled in _PICKLED[kind.num_classes]:  # its folder, or we are in it
        if (root / pickled).exists():
            raise ValueError(
                f"{root / pickled} is of the Python version, a pickle, which could run code and is "
                f"never loaded here; download the binary version, {kind.archive}, and unpack it"
            )
    raise FileNotFoundError(
        f"{root} has neither {kind.train[0]} nor {kind.folder}/; unpack {kind.archive} there, or "
        "give root=, the folder it was unpacked in"
    )


def _cifar_records(kind: _Cifar, path: Path) -> tuple[Tensor, Tensor]:
    size, record = path.stat().st_size, kind.label_bytes + 3 * 32 * 32
    if size == 0 or size % record:
        raise ValueError(
            f"{path} has {size:,} bytes, expected whole records of {record:,}; it is damaged or "
            f"not of {kind.archive}"
        )
    data = torch.from_numpy(np.fromfile(path, np.uint8)).reshape(-1, record)
    labels = data[:, kind.label_bytes - 1].long()
    _check_range(path, labels, kind.num_classes)
    images = data[:, kind.label_bytes :].reshape(-1, 3, 32, 32).permute(0, 2, 3, 1)
    return images.contiguous(), labels


def _cifar_classes(kind: _Cifar, path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text("utf-8", errors="replace").split())
    if len(names) != kind.num_classes:
        raise ValueError(
            f"{path} has {len(names)} names, not {kind.num_classes}; unpack {kind.archive} again"
        )
    return names


# CIFAR-N: a dict of integer arrays, written with torch.save


def _cifar_n_arrays(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_CIFAR_N} has it")
    with path.open("rb") as file, torch.serialization.safe_globals(_ARRAYS_ONLY):
        try:
            arrays = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises, its contents decide
            raise ValueError(
                f"{path} cannot be read as integer arrays only ({type(error).__name__}); download "
                f"it again from {_CIFAR_N}"
            ) from error
    if not isinstance(arrays, dict):
        raise ValueError(f"{path} holds a {type(arrays).__name__}, expected a dict of label arrays")
    return arrays


def _label_array(path: Path, arrays: dict[Any, Any], key: str, n: int) -> Tensor:
    array = arrays.get(key)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.shape != (n,):
        kind = getattr(array, "dtype", type(array).__name__)
        size = list(getattr(array, "shape", ()))
        raise ValueError(
            f"{path}: {key} is {kind} {size}, expected {n:,} integers, one for each image"
        )
    return torch.from_numpy(array.astype(np.int64))
