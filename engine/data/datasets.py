"""From what a user points at, a folder or an index, to the samples of a run."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from mentorch.engine.config import DataConfig
from mentorch.engine.data.build import default_out
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.imagenet import index_imagenet, match_labels
from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.noise_kinds import parse_noise
from mentorch.engine.data.order import Ids
from mentorch.engine.data.webvision import index_webvision
from mentorch.engine.distributed import World

_WNID = re.compile(r"n\d{8}$")
_INDEXERS: dict[str, Callable[[Path], Index]] = {
    "webvision": index_webvision,
    "imagenet": index_imagenet,
    "folder": index_folder,
}


@dataclass(frozen=True)
class Samples:
    """Part of an index: which rows, and the student's class of every row.

    Attributes:
        index: the data set.
        sample_ids: the rows used.
        labels_N: class of every row of the index among the student's classes; -1 for none.
    """

    index: Index
    sample_ids: Ids
    labels_N: Ids


@dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on."""

    classes: tuple[str, ...]
    train: Samples
    evaluate: dict[str, Samples]


def kind_of_folder(root: Path) -> str:
    """Which data set's layout a folder has: "webvision", "imagenet" or "folder"."""
    for info in (root / "info", root):
        if (info / "synsets.txt").is_file() and any(info.glob("train_filelist_*.txt")):
            return "webvision"
    for split in (root / "train", root / "val"):
        names = (entry.name for entry in split.iterdir()) if split.is_dir() else ()
        if any(_WNID.match(name) or name.startswith("ILSVRC2012_val_") for name in names):
            return "imagenet"
    return "folder"


def open_index(path: Path, world: World) -> Index:
    """Opens an index, or that of a folder: of shards, or of a data set.

    The index of a data set's folder is made by the main rank if there is none.

    Raises:
        FileNotFoundError: nothing at that path.
        ValueError: no index and no data set that could be indexed.
    """
    if path.is_file():
        return Index.read(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no data set or index at {path}")
    sharded = _index_of_shards(path)
    if sharded is not None:
        return sharded
    kind, file = index_of_folder(path)
    if world.is_main and not file.is_file():
        print(f"Indexing {path} (once; the result is {file})")
        _INDEXERS[kind](path)
    world.wait()
    for _ in range(30):  # a shared file system may show the file a little later
        if file.is_file():
            return Index.read(file, root=path.absolute())  # wherever it is mounted now
        time.sleep(1)
    raise FileNotFoundError(
        f"{file}, which the main rank wrote, is not on this host. Use storage all hosts share, or "
        f"run `mentorch index {kind} {path}` on each"
    )


def index_of_folder(path: Path) -> tuple[str, Path]:
    """Which kind of data set a folder of files is, and where its index is or would be."""
    kind = kind_of_folder(path)
    return kind, default_out(path, kind, None)


def needs_indexing(path: Path) -> bool:
    """Whether `open_index` would have to look at every image first.

    Args:
        path: a folder or an index.
    """
    if not path.is_dir() or _index_of_shards(path) is not None:
        return False
    return not index_of_folder(path)[1].is_file()


def _index_of_shards(folder: Path) -> Index | None:
    """The index of a folder that `mentorch shard` wrote; None for any other folder."""
    files = list(folder.glob("*.index.parquet"))
    if len(files) != 1 or next(folder.glob("*.tar"), None) is None:
        return None
    index = Index.read(files[0], root=folder.absolute())
    return index if index.shards else None


def open_datasets(config: DataConfig, world: World) -> Datasets:
    """Opens everything a run needs; classes are those of the training samples.

    A training set without a validation split (class folders alone) is not evaluated on itself.

    Raises:
        ValueError: no training set, an empty selection, or a validation set without a class in
            common.
        FileNotFoundError: nothing at a path.
    """
    if config.train is None:
        raise ValueError("no training data: give --data.train a data set's folder or an index")
    index = with_noise(open_index(config.train, world), config)
    classes = index.classes[: config.max_label]
    chosen = index.select("train", sources=config.sources or None, max_label=config.max_label)
    train = Samples(index, chosen, index.labels())
    evaluate = {}
    for name, path in config.evaluate.items():
        if path == config.train and not index.has("val"):
            if world.is_main:
                print(f"{path} has no validation images: {name!r} is not evaluated")
            continue
        evaluate[name] = _validation(name, open_index(path, world), classes)
    return Datasets(classes, train, evaluate)


def with_noise(index: Index, config: DataConfig) -> Index:
    """The training index with the label noise that a run puts on it.

    Raises:
        ValueError: no such noise, or the index has some already.
    """
    if not config.noise:
        return index
    kind, rate = parse_noise(config.noise)
    noise = Noise(kind, rate, config.noise_seed)  # type: ignore[arg-type]  # Noise checks the kind
    return add_noise(index, noise, "train", config.max_label)


def bad_files(
    index: Index, split: str | None = None, max_label: int | None = None
) -> list[tuple[str, str]]:
    """Path and status of every image that is missing or broken, which nothing trains on.

    Args:
        index: of all images.
        split: of this one only.
        max_label: only labels below this.
    """
    chosen = pc.not_equal(index.table["status"], "ok")
    if split is not None:
        chosen = pc.and_(chosen, pc.equal(index.table["split"], split))
    if max_label is not None:
        chosen = pc.and_(chosen, pc.less(index.table["label"], max_label))
    bad = index.table.filter(chosen)
    return list(zip(bad["path"].to_pylist(), bad["status"].to_pylist(), strict=True))


def _validation(name: str, index: Index, classes: tuple[str, ...]) -> Samples:
    """The validation samples whose class, by its id, is one the student is trained on."""
    labels = match_labels(index, classes)
    ids = index.select("val")
    ids = ids[labels[ids] >= 0]
    if not len(ids):
        raise ValueError(
            f"validation set {name!r} ({index.root}) has no class of the training set: its ids are "
            f"{', '.join(index.classes[:3])}, …, those trained {', '.join(classes[:3])}, …"
        )
    return Samples(index, ids, np.asarray(labels, dtype=np.int64))
