"""ImageNet (ILSVRC-2012) on disk to an index; classes are matched by wnid.

    ROOT/train/<wnid>/*.JPEG
    ROOT/val/<wnid>/*.JPEG, ROOT/val/<0..999>/*.JPEG, or ROOT/val/*.JPEG with a list (val_list.py)

Labels follow the class list (``--synsets``, or synsets.txt, LOC_synset_mapping.txt,
synset_words.txt in ROOT or ROOT/info: line number = label), else the sorted wnids of ``train/``,
else those of ``val/``. ILSVRC's own lists are sorted by wnid, so all of these agree.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mentorch.engine.data.build import (
    Rows,
    build_index,
    checked_root,
    default_out,
    print_counts,
)
from mentorch.engine.data.files import Ignored, folders_in
from mentorch.engine.data.folder import class_images, rows_of_folders
from mentorch.engine.data.index import Index
from mentorch.engine.data.synsets import read_synsets
from mentorch.engine.data.val_list import listed_wnids, read_flat_val

_SYNSET_FILES = ("synsets.txt", "LOC_synset_mapping.txt", "synset_words.txt")
_WNID = re.compile(r"n\d{8}")

Classes = tuple[tuple[str, ...], tuple[str, ...]]  # ids and names


def index_imagenet(
    root: str | Path,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
    val_list: str | Path | None = None,
    synsets: str | Path | None = None,
) -> Index:
    """Makes the index of ImageNet (training, validation or both) and verifies every image.

    Args:
        root: the folder that holds ``train/``, ``val/`` or both.
        out: the Parquet file to write; None is ``root/imagenet.index.parquet``.
        workers: processes that verify; None is one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.
        val_list: the labels of a flat ``val/``, if they are not found by themselves.
        synsets: the class list, a line "wnid names…" a class, if it is not found by itself.

    Raises:
        FileNotFoundError: ``root`` has neither ``train/`` nor ``val/``, or a given file is missing.
        ValueError: the labels of the validation images are unknown or out of range.
    """
    root = checked_root(root)
    out = default_out(root, "imagenet", Path(out) if out is not None else None)
    ignored = Ignored()
    train = class_images(root, "train", ignored) if (root / "train").is_dir() else {}
    val_list = Path(val_list) if val_list is not None else None
    ids, names = _classes(root, train, Path(synsets) if synsets is not None else None, val_list)
    parts = [rows_of_folders("train", train, ids)] if train else []
    if (root / "val").is_dir():
        parts.append(_val_rows(root, ids, val_list))
    ignored.print()
    if not sum(map(len, parts)):
        raise FileNotFoundError(
            f"no images under {root}/train or {root}/val; ROOT is the folder that holds one of them"
        )
    index = build_index(
        Rows.concat(parts),
        root=root,
        dataset="imagenet",
        classes=ids,
        class_names=names,
        out=out,
        workers=workers,
        reverify=reverify,
    )
    print_counts(index, out, _expected(index))
    return index


def match_labels(index: Index, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """For each row its label among another index's classes, by wnid; -1 where it has none.

    Args:
        index: for example ImageNet's validation images.
        classes: `Index.classes` of what the student is trained on, or its first 50.

    Returns:
        Labels, int64 [N].
    """
    place = {wnid: label for label, wnid in enumerate(classes)}
    table = np.array([place.get(wnid, -1) for wnid in index.classes], np.int64)
    return np.asarray(table[index.labels()])


def _classes(
    root: Path, train: dict[str, list[str]], synsets: Path | None, val_list: Path | None
) -> Classes:
    """Ids and names by label: a class list's, else the wnids of train/, else those of val/."""
    file = _synset_file(root, synsets)
    if file is not None:
        ids, names = read_synsets(file)
        unknown = sorted(set(train) - set(ids))
        if unknown:
            raise ValueError(f"{root / 'train'} has folders that are not in {file}: {unknown[:10]}")
        return ids, names
    wnids = sorted(train)
    if not wnids and (root / "val").is_dir():
        folders = folders_in(root / "val")
        wnids = [name for name in folders if _WNID.fullmatch(name)]
        if not folders:
            wnids = list(listed_wnids(root, val_list))
    return tuple(wnids), tuple(wnids)


def _synset_file(root: Path, given: Path | None) -> Path | None:
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"--synsets {given} is not a file")
        return given
    places = [folder / name for folder in (root, root / "info") for name in _SYNSET_FILES]
    return next((file for file in places if file.is_file()), None)


def _val_rows(root: Path, ids: tuple[str, ...], val_list: Path | None) -> Rows:
    """The validation images, whichever of the three layouts they have."""
    folders = folders_in(root / "val")
    if val_list is None and folders and all(map(_WNID.fullmatch, folders)):
        print(f"{root / 'val'}: wnid folders")
        return _val_of_wnids(root, ids)
    if val_list is None and folders and all(name.isdecimal() for name in folders):
        print(f"{root / 'val'}: class-index folders")
        return _val_of_numbers(root, ids)
    paths, labels = read_flat_val(root, ids, val_list)
    return Rows.of(paths, labels, "val", "val")


def _val_of_wnids(root: Path, ids: tuple[str, ...]) -> Rows:
    ignored = Ignored()
    images = class_images(root, "val", ignored)
    ignored.print()
    unknown = sorted(set(images) - set(ids))
    if unknown:
        print(f"validation images of {len(unknown):,} other classes are left out: {unknown[:3]}, …")
    known = {wnid: paths for wnid, paths in images.items() if wnid in set(ids)}
    return rows_of_folders("val", known, ids)


def _val_of_numbers(root: Path, ids: tuple[str, ...]) -> Rows:
    ignored = Ignored()
    images = class_images(root, "val", ignored)
    ignored.print()
    if not ids:
        raise ValueError(
            f"{root / 'val'} has class-index folders (0, 1, …) and nothing says which wnid each "
            "is; give the class list with --synsets FILE"
        )
    for name in images:
        if int(name) >= len(ids):
            raise ValueError(
                f"folder {root / 'val' / name}: label {name} is out of range, there are {len(ids)} "
                "classes; give the class list that it belongs to with --synsets FILE"
            )
    by_label = {int(name): paths for name, paths in images.items()}
    if len(by_label) < len(images):
        raise ValueError(f"{root / 'val'} has two folders for one class index (such as 7 and 007)")
    return rows_of_folders("val", {ids[label]: by_label[label] for label in sorted(by_label)}, ids)


def _expected(index: Index) -> dict[str, tuple[int, str]]:
    listed, usable = Counter[str](), Counter[str]()
    for (split, _, status), n in index.counts().items():
        listed[split] += n
        usable[split] += n if status == "ok" else 0
    return {
        "training, listed": (listed["train"], "1,281,167"),
        "training, usable": (usable["train"], ""),
        "validation, listed": (listed["val"], "50,000"),
        "validation, usable": (usable["val"], ""),
        "classes": (len(index.classes), "1,000"),
    }
