"""A folder of class folders to an index.

    ROOT/train/<class>/…  and  ROOT/val/<class>/…
    or, without these, ROOT/<class>/…  (every image is for training)

Classes are the folder names in sorted order; images may lie in folders below them.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from mentorch.engine.data.build import (
    Rows,
    build_index,
    checked_root,
    default_out,
    print_counts,
)
from mentorch.engine.data.files import Ignored, folders_in, images_below
from mentorch.engine.data.index import Index

SPLITS = ("train", "val")


def index_folder(
    root: str | Path,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
) -> Index:
    """Makes the index of a folder of class folders and verifies every image.

    Args:
        root: the folder that holds ``train/`` (and ``val/``), or the class folders themselves.
        out: the Parquet file to write; None is ``root/folder.index.parquet``.
        workers: processes that verify; None is one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.

    Raises:
        FileNotFoundError: ``root`` is not there or holds no class folder with images.
        ValueError: ``val`` has a class that ``train`` lacks.
    """
    root = checked_root(root)
    out = default_out(root, "folder", Path(out) if out is not None else None)
    found = _images_by_split(root)
    classes = _classes(root, found)
    index = build_index(
        Rows.concat([rows_of_folders(split, files, classes) for split, files in found.items()]),
        root=root,
        dataset="folder",
        classes=classes,
        class_names=classes,
        out=out,
        workers=workers,
        reverify=reverify,
    )
    counts = index.counts()
    usable = {f"{split}, usable": (counts[split, _source(split), "ok"], "") for split in found}
    print_counts(index, out, usable)
    return index


def class_images(
    root: Path, folder: str, ignored: Ignored, *, recursive: bool = True
) -> dict[str, list[str]]:
    """The images of each class folder in ``root/folder``, relative to ``root``."""
    images = {}
    for name in folders_in(root / folder):
        inside = images_below(root / folder / name, ignored, recursive=recursive)
        start = f"{folder}/{name}/" if folder else f"{name}/"
        images[name] = [start + path for path in inside]
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        print(f"no images in {len(empty)} folders of {root / folder}: {', '.join(empty[:10])}")
    return {name: paths for name, paths in images.items() if paths}


def rows_of_folders(split: str, images: dict[str, list[str]], classes: tuple[str, ...]) -> Rows:
    """Rows whose label is their folder's place among ``classes``."""
    label = {name: i for i, name in enumerate(classes)}
    paths = pa.array([path for name in images for path in images[name]], pa.string())
    labels = np.repeat([label[name] for name in images], [len(p) for p in images.values()])
    return Rows.of(paths, labels.astype(np.int32), split, _source(split))


def _source(split: str) -> str:
    return "val" if split == "val" else ""


def _images_by_split(root: Path) -> dict[str, dict[str, list[str]]]:
    ignored = Ignored()
    splits = [s for s in SPLITS if (root / s).is_dir() and folders_in(root / s)]
    if splits:
        print(f"{root}: split into {' and '.join(splits)}")
        found = {split: class_images(root, split, ignored) for split in splits}
    else:
        print(f"{root}: no train/ or val/ with class folders; every image is for training")
        found = {"train": class_images(root, "", ignored)}
    ignored.print()
    found = {split: images for split, images in found.items() if images}
    if not found:
        raise FileNotFoundError(
            f"no class folder with images under {root}: ROOT should hold train/<class>/… and "
            "val/<class>/…, or <class>/…"
        )
    return found


def _classes(root: Path, found: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    classes = tuple(sorted(found.get("train", found.get("val", {}))))
    unknown = sorted(set(found.get("val", {})) - set(classes))
    if unknown:
        raise ValueError(
            f"{root / 'val'} has classes that {root / 'train'} lacks: {', '.join(unknown[:10])}; "
            "remove their folders, or add them to train"
        )
    return classes
