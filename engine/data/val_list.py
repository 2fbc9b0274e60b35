"""The labels of a flat folder of ImageNet validation images.

Three kinds of list are in use, and told apart by what they hold:
    "name label" or "name wnid" a line (Caffe's val.txt; labels from 0, in the classes' order),
    Kaggle's LOC_val_solution.csv ("ImageId,PredictionString"; the first word is the wnid),
    a wnid a line, the k-th for ILSVRC2012_val_0000000k (…_validation_synset_labels.txt).
The development kit's ground truth (a number a line) counts classes in an order of its own: refused.
"""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mentorch.engine.data.files import Ignored, images_below
from mentorch.engine.data.index import escapes_root
from mentorch.engine.data.lists import read_lines

_LISTS = ("val.txt", "imagenet_2012_validation_synset_labels.txt", "LOC_val_solution.csv")
_WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})$")

Entry = tuple[str, str]  # file name (its suffix may be missing), and a wnid or a label


def read_flat_val(
    root: Path, ids: tuple[str, ...], val_list: Path | None
) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """Paths and labels of the images in ``root/val``, by name; those not on disk are kept.

    Raises:
        FileNotFoundError: no list is there.
        ValueError: naming file and line, what is wrong with the list.
    """
    file = _find_list(root, val_list)
    print(f"{root / 'val'}: flat, labels from {file}")
    ignored = Ignored()
    on_disk = images_below(root / "val", ignored, recursive=False)
    ignored.print()
    entries = _entries(file, on_disk)
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    full_name = {name.rpartition(".")[0]: name for name in on_disk}
    labels: dict[str, int] = {}
    left_out = 0
    for number, (name, word) in entries:
        name = full_name.get(name, name if "." in name else f"{name}.JPEG")
        label = _label(word, label_of, f"{file}, line {number}")
        if name in labels:
            raise ValueError(f"{file}, line {number}: {name!r} was listed before")
        labels[name] = label
        left_out += label < 0
    _report(file, left_out, sorted(set(on_disk) - set(labels)))
    kept = sorted((f"val/{name}", label) for name, label in labels.items() if label >= 0)
    if not kept:
        raise ValueError(f"{file}: none of its wnids is among the {len(ids)} classes")
    return pa.array([p for p, _ in kept], pa.string()), np.array([y for _, y in kept], np.int32)


def listed_wnids(root: Path, val_list: Path | None) -> tuple[str, ...]:
    """The wnids that the list of a flat ``val/`` names, sorted; none when it has numbers."""
    file = _find_list(root, val_list)
    on_disk = images_below(root / "val", Ignored(), recursive=False)
    words = {word for _, (_, word) in _entries(file, on_disk)}
    return tuple(sorted(filter(_WNID.fullmatch, words)))


def _find_list(root: Path, given: Path | None) -> Path:
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"--val-list {given} is not a file")
        return given
    folders = (root, root / "val", root / "info")
    for file in (folder / name for folder in folders for name in _LISTS):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{root / 'val'} holds images without class folders, and none of {', '.join(_LISTS)} is in "
        f"{root}, its val/ or its info/; give the list of labels with --val-list FILE"
    )


def _entries(file: Path, on_disk: list[str]) -> list[tuple[int, Entry]]:
    lines = [(n, line.strip()) for n, line in enumerate(read_lines(file).to_pylist(), 1)]
    lines = [(n, line) for n, line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty; it should have a line for each validation image")
    if lines[0][1].startswith("ImageId,"):
        return [(n, _of_kaggle(line, f"{file}, line {n}")) for n, line in lines[1:]]
    if " " not in lines[0][1] and "\t" not in lines[0][1]:
        return _of_ordered(file, lines, on_disk)
    return [(n, _of_pair(line, f"{file}, line {n}")) for n, line in lines]


def _of_kaggle(line: str, where: str) -> Entry:
    name, _, prediction = line.partition(",")
    if not prediction.split():
        raise ValueError(f"{where}: {line[:200]!r} is not 'ImageId,wnid …'")
    return _checked_name(name, where), prediction.split()[0]


def _of_pair(line: str, where: str) -> Entry:
    words = line.rsplit(maxsplit=1)
    if len(words) != 2:
        raise ValueError(f"{where}: {line[:200]!r} is neither 'name label' nor 'name wnid'")
    return _checked_name(words[0], where), words[1]


def _checked_name(name: str, where: str) -> str:
    if escapes_root(pa.array([name]))[0]:
        raise ValueError(f"{where}: the path {name!r} leaves the data set's folder")
    return name.removeprefix("./").removeprefix("val/")


def _of_ordered(
    file: Path, lines: list[tuple[int, str]], on_disk: list[str]
) -> list[tuple[int, Entry]]:
    """A wnid a line: by the number in ILSVRC's names, else in sorted order if the counts agree."""
    for number, word in lines:
        if word.isdecimal():
            raise ValueError(
                f"{file}, line {number}: a number alone is the development kit's class number, "
                "whose order is not that of the wnids; give a list with wnids by --val-list FILE"
            )
        if not _WNID.fullmatch(word):
            raise ValueError(f"{file}, line {number}: {word[:200]!r} is not a wnid")
    words = [word for _, word in lines]
    stems = [name.rpartition(".")[0] for name in on_disk]
    if all(map(_NUMBERED.match, stems)):
        names = [f"ILSVRC2012_val_{k:08d}" for k in range(1, len(words) + 1)]
    elif len(on_disk) == len(words):
        names = on_disk
    else:
        raise ValueError(
            f"{file} has {len(words)} wnids for the {len(on_disk)} images of val/, whose names are "
            "not ILSVRC's; give a list that has names by --val-list FILE"
        )
    return [(n, (name, word)) for (n, word), name in zip(lines, names, strict=True)]


def _label(word: str, label_of: dict[str, int], where: str) -> int:
    """The label; -1 for a wnid of another class."""
    if _WNID.fullmatch(word):
        return label_of.get(word, -1)
    if not (word.isdecimal() and word.isascii()):
        raise ValueError(f"{where}: {word[:200]!r} is neither a label nor a wnid")
    if not label_of:
        raise ValueError(f"{where}: nothing says which wnid label {word} is; give --synsets FILE")
    if int(word) >= len(label_of):
        raise ValueError(
            f"{where}: label {word} is out of range, there are {len(label_of)} classes; give the "
            "class list that it belongs to with --synsets FILE"
        )
    return int(word)


def _report(file: Path, left_out: int, unlisted: list[str]) -> None:
    if left_out:
        print(f"{left_out:,} validation images of other classes are left out")
    if unlisted:
        print(f"{len(unlisted):,} images of val/ are not in {file} and left out: {unlisted[0]}, …")
