"""WebVision 1.0 on disk to an index: images of web searches, labelled by their query.

    ROOT/info/train_filelist_google.txt, …_flickr.txt     "google/q0001/x.jpg 0", labels from 0
    ROOT/info/val_filelist.txt                            "val000001.jpg 0"
    ROOT/info/synsets.txt                                 line = label: "n01440764 tench, ..."
    ROOT/google/q0001/*.jpg, ROOT/flickr/q0001/*.jpg, ROOT/val_images_256/*.jpg

Older copies keep the lists in ROOT itself and the images under ``train_images_256/``. The mini
protocol needs the Google list only, and of that the labels below 50; every image listed gets a row,
so one index serves both protocols (`Index.select`).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mentorch.engine.data.build import (
    Rows,
    build_index,
    checked_root,
    default_out,
    print_counts,
)
from mentorch.engine.data.index import Index
from mentorch.engine.data.lists import ImageList, check_duplicates, read_image_list, read_lines
from mentorch.engine.data.synsets import read_synsets

MINI_CLASSES = 50  # the mini protocol: Google images with a label below this

_TRAIN_FOLDERS = ("", "train_images_256/", "train_images/")
_VAL_FOLDERS = ("val_images_256/", "", "val_images/")
_TRAIN_LISTS = ("train_filelist_google.txt", "train_filelist_flickr.txt")
_ALL_LIST, _VAL_LIST = "train_filelist_all.txt", "val_filelist.txt"
_PROBES = 512  # paths looked up to find out which folder the lists mean


def index_webvision(
    root: str | Path,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
) -> Index:
    """Makes the index of WebVision 1.0 and verifies every image.

    Args:
        root: the folder that holds ``info/``.
        out: the Parquet file to write; None is ``root/webvision.index.parquet``.
        workers: processes that verify; None is one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.

    Raises:
        FileNotFoundError: ``root`` holds no WebVision lists.
        ValueError: a list is wrong; the message names file and line.
    """
    root = checked_root(root)
    out = default_out(root, "webvision", Path(out) if out is not None else None)
    info = _info_folder(root)
    classes, names = read_synsets(_required(info, "synsets.txt"))
    lists = _train_lists(root, info, len(classes))
    lists += _val_list(root, info, len(classes))
    check_duplicates([entries for _, entries in lists])
    rows = Rows.concat([_rows(split, entries) for split, entries in lists])
    rows.clean_labels = _clean_labels(root, info, rows.paths, len(classes))
    _warn_of_other_queries(info, rows)
    index = build_index(
        rows,
        root=root,
        dataset="webvision",
        classes=classes,
        class_names=names,
        out=out,
        workers=workers,
        reverify=reverify,
    )
    print_counts(index, out, _expected(index))
    return index


def _info_folder(root: Path) -> Path:
    wanted = (*_TRAIN_LISTS, _ALL_LIST, _VAL_LIST)
    for folder in (root / "info", root):
        if any((folder / name).is_file() for name in wanted):
            return folder
    raise FileNotFoundError(
        f"no WebVision lists under {root}: neither info/ nor the folder itself holds any of "
        f"{', '.join(wanted)}. ROOT is the folder that holds info/, google/ and val_images_256/"
    )


def _required(info: Path, name: str) -> Path:
    if not (info / name).is_file():
        raise FileNotFoundError(f"{info / name} is missing; it comes with WebVision's info archive")
    return info / name


def _train_lists(root: Path, info: Path, num_classes: int) -> list[tuple[str, ImageList]]:
    """The Google and Flickr lists, or the list of all where neither is there."""
    files = [info / name for name in _TRAIN_LISTS if (info / name).is_file()]
    for name in _TRAIN_LISTS:
        if files and not (info / name).is_file():
            print(f"{info / name} was not found: its images are left out")
    if not files and (info / _ALL_LIST).is_file():
        files = [info / _ALL_LIST]
    if not files:
        raise FileNotFoundError(f"none of {', '.join((*_TRAIN_LISTS, _ALL_LIST))} is in {info}")
    read = (read_image_list(file, num_classes) for file in files)
    return [("train", _in_folder(root, entries, _TRAIN_FOLDERS)) for entries in read]


def _val_list(root: Path, info: Path, num_classes: int) -> list[tuple[str, ImageList]]:
    if not (info / _VAL_LIST).is_file():
        print(f"{info / _VAL_LIST} was not found: the index has training images only")
        return []
    entries = read_image_list(info / _VAL_LIST, num_classes)
    return [("val", _in_folder(root, entries, _VAL_FOLDERS))]


def _in_folder(root: Path, entries: ImageList, folders: tuple[str, ...]) -> ImageList:
    """Puts the folder before the paths under which most of a sample of them exist."""
    step = max(1, len(entries) // _PROBES)
    sample = entries.paths.take(pa.array(np.arange(0, len(entries), step))).to_pylist()
    if sample[0].startswith(tuple(filter(None, folders))):
        folders = ("",)
    found = [sum((root / f"{folder}{p}").exists() for p in sample) for folder in folders]
    folder = folders[found.index(max(found))]
    if not folder:
        return entries
    return replace(entries, paths=pc.binary_join_element_wise(folder, entries.paths, ""))


def _rows(split: str, entries: ImageList) -> Rows:
    source: str | pa.Array = "val"
    if split == "train":
        first = r"^(?:train_images[^/]*/)?(?P<source>[^/]+)/"
        source = pc.fill_null(pc.struct_field(pc.extract_regex(entries.paths, first), "source"), "")
    return Rows.of(entries.paths, entries.labels, split, source)


def _clean_labels(
    root: Path, info: Path, paths: pa.Array, num_classes: int
) -> npt.NDArray[np.int32] | None:
    """Labels known to be right, from the optional list ``clean_labels.txt``; -1 elsewhere."""
    file = info / "clean_labels.txt"
    if not file.is_file():
        return None
    clean = _in_folder(root, read_image_list(file, num_classes), _TRAIN_FOLDERS)
    check_duplicates([clean])
    at = pc.index_in(clean.paths, value_set=paths)
    if at.null_count:
        row = int(at.is_null().to_numpy(zero_copy_only=False).argmax())
        raise ValueError(f"{clean.where(row)}: {clean.paths[row].as_py()!r} is in no other list")
    labels = np.full(len(paths), -1, np.int32)
    labels[at.to_numpy()] = clean.labels
    return labels


def _warn_of_other_queries(info: Path, rows: Rows) -> None:
    """Counts images whose folder qNNNN stands for another class than their label."""
    file = info / "queries_synsets_map.txt"
    if not file.is_file():
        return
    synset_of_query = _query_map(file)
    number = pc.extract_regex(rows.paths, r"(?:^|/)q(?P<query>[0-9]{1,6})/")
    query = pc.fill_null(pc.struct_field(number, "query").cast(pa.int32()), -1).to_numpy()
    known = (query >= 0) & (query < len(synset_of_query))
    synset = np.where(known, synset_of_query[np.where(known, query, 0)], -1)
    other = int(((synset > 0) & (synset != rows.labels + 1)).sum())
    if other:
        print(f"{other:,} images have another label than their query folder has in {file}")


def _query_map(file: Path) -> npt.NDArray[np.int64]:
    """The synset's line number (from 1) by query number; 0 where the map says nothing."""
    words = [line.split() for line in read_lines(file).to_pylist()]
    pairs = [(int(w[0].lstrip("q")), int(w[1])) for w in words if _is_pair(w)]
    synset = np.zeros(max((q for q, _ in pairs), default=0) + 1, np.int64)
    for query, line in pairs:
        synset[query] = line
    return synset


def _is_pair(words: list[str]) -> bool:
    digits = [w.lstrip("q") for w in words]
    return len(words) == 2 and all(d.isdecimal() and d.isascii() and len(d) < 7 for d in digits)


def _expected(index: Index) -> dict[str, tuple[int, str]]:
    usable = pc.equal(index.table["status"], "ok").to_numpy()
    mini = usable & (index.labels() < MINI_CLASSES)
    google, flickr, val = (
        pc.equal(index.table["source"], name).to_numpy() for name in ("google", "flickr", "val")
    )
    return {
        "Google, listed": (google.sum(), "980,449"),
        "Google, usable": ((google & usable).sum(), ""),
        "Flickr, listed": (flickr.sum(), "1,459,125"),
        "Flickr, usable": ((flickr & usable).sum(), ""),
        "validation, listed": (val.sum(), "50,000"),
        "validation, usable": ((val & usable).sum(), ""),
        "classes": (len(index.classes), "1,000"),
        "mini protocol, Google": ((google & mini).sum(), "65,944 or 61,234 (both published)"),
        "mini protocol, validation": ((val & mini).sum(), "2,500"),
    }
