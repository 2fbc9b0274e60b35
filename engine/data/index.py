"""The index: one Parquet file that says which images there are, and what their labels are.

A row is a sample and the row number is its ``sample_id``. Everything that changes labels or drops
samples rewrites the index and never touches an image; everything measured per sample joins back to
a path here. The images are files, or lie in tar shards (`shards`): then two more columns say where.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mentorch.engine.data.probe import MAX_BYTES

FORMAT_VERSION = 1
STATUSES = ("ok", "missing", "broken")

_METADATA_KEY = b"mentorch"
_CATEGORY = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),  # POSIX, relative to the root
        ("label", pa.int32()),
        ("clean_label", pa.int32()),  # null: unknown
        ("split", _CATEGORY),  # train, val
        ("source", _CATEGORY),  # google, flickr, val, ""
        ("status", _CATEGORY),  # one of STATUSES
        ("bytes", pa.int64()),
        ("width", pa.int32()),  # as displayed, that is after the EXIF rotation; 0 where not ok
        ("height", pa.int32()),
    ]
)

# Of an index whose images lie in tar shards; `bytes` is the image's length there.
SHARD_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("shard", pa.int32()),  # position in Index.shards; -1 where the sample is in none
        ("offset", pa.int64()),  # of the image in the tar, bytes; -1 likewise
    ]
)

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")
_ESCAPES = r"^/|(^|/)\.\.(/|$)|\x00|^$"  # absolute, upwards, cut short by a NUL, or the root itself


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of a data set.

    Attributes:
        table: the columns of `SCHEMA`, or `SHARD_SCHEMA` where there are shards; row number ==
            sample_id.
        root: the folder that the paths are relative to; where there are shards, that of the shards.
        dataset: "webvision", "imagenet" or "folder".
        classes: class id (wnid, folder name) by label.
        class_names: human-readable name by label.
        noise: kind, rate, seed and result of the label noise that was injected, or None.
        shards: names of the tar files in ``root`` that hold the images; none where these are files.
    """

    table: pa.Table
    root: Path
    dataset: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    noise: dict[str, Any] | None = None
    shards: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @classmethod
    def read(
        cls, path: str | Path, root: str | Path | None = None, *, need_root: bool = True
    ) -> "Index":
        """Reads an index and checks that it is one.

        Args:
            path: the Parquet file that `mentorch index` wrote.
            root: where the images are now, if the folder has moved since. Shards are found without
                it when they lie beside the index.
            need_root: False reads an index whose images are not on this machine.

        Raises:
            FileNotFoundError: the index or its root folder is not there.
            ValueError: the file is not a mentorch index, or a damaged one.
        """
        path = Path(path)
        table, metadata = _read_parquet(path)
        index = cls(
            table=table,
            root=Path(root) if root is not None else _recorded_root(path, metadata),
            dataset=metadata["dataset"],
            classes=tuple(metadata["classes"]),
            class_names=tuple(metadata["class_names"]),
            noise=metadata["noise"],
            shards=tuple(metadata.get("shards", ())),
        )
        _check_rows(index, path)
        if index.shards:
            _check_shards(index, path)
        if need_root and not index.root.is_dir():
            raise FileNotFoundError(
                f"{path} was made for images under {index.root}, and that folder is not there. "
                "If it has moved, give its new place as root=…"
                + (" Shards are found beside their index too." if index.shards else "")
            )
        return index

    def write(self, path: str | Path) -> None:
        """Writes the index atomically; the same content always gives the same bytes."""
        metadata = {
            "format": FORMAT_VERSION,
            "root": str(self.root),
            "dataset": self.dataset,
            "classes": self.classes,
            "class_names": self.class_names,
            "noise": self.noise,
            **({"shards": self.shards} if self.shards else {}),
        }
        text = json.dumps(metadata, sort_keys=True, ensure_ascii=False).encode()
        table = self.table.replace_schema_metadata({_METADATA_KEY: text})
        with replacing(Path(path)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def select(
        self,
        split: str,
        *,
        sources: Sequence[str] | None = None,
        max_label: int | None = None,
    ) -> npt.NDArray[np.int64]:
        """The sample ids with status "ok" of a split, in order.

        Args:
            split: "train" or "val".
            sources: keep only these, for example ("google",); None keeps all.
            max_label: keep only labels below this number (50 is WebVision's mini protocol).

        Raises:
            ValueError: nothing is left; the message has the counts by split, source and status.
        """
        keep = pc.and_(pc.equal(self.table["split"], split), pc.equal(self.table["status"], "ok"))
        if sources is not None:
            chosen = pc.is_in(self.table["source"], value_set=pa.array(list(sources), pa.string()))
            keep = pc.and_(keep, chosen)
        if max_label is not None:
            keep = pc.and_(keep, pc.less(self.table["label"], max_label))
        ids = np.flatnonzero(keep.to_numpy()).astype(np.int64)
        if not len(ids):
            raise ValueError(
                f"no usable sample has split={split!r}, sources={sources} and label < {max_label}. "
                f"The index of {self.root} holds {self._counts_in_words()}."
            )
        return ids

    def has(self, split: str) -> bool:
        """Whether any row, usable or not, is of a split."""
        return bool(pc.any(pc.equal(self.table["split"], split)).as_py())

    def counts(self) -> Counter[tuple[str, str, str]]:
        """The number of rows by (split, source, status)."""
        keys = ["split", "source", "status"]
        grouped = self.table.select(keys).group_by(keys).aggregate([([], "count_all")])
        names = (grouped[key].to_pylist() for key in keys)
        return Counter(dict(zip(zip(*names), grouped["count_all"].to_pylist())))  # noqa: B905

    def labels(self) -> npt.NDArray[np.int64]:
        """The given labels, [N]."""
        return _to_int64(self.table["label"])

    def clean_labels(self) -> npt.NDArray[np.int64]:
        """The labels known to be right, [N]; -1 where unknown."""
        return _to_int64(pc.fill_null(self.table["clean_label"], -1))

    def paths(self) -> pa.ChunkedArray:
        """All paths as one Arrow column; slice it before turning it into Python strings."""
        return self.table["path"]

    def path(self, sample_id: int) -> str:
        """The path of one sample, relative to `root`."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample_id {sample_id} is not in 0..{len(self) - 1}")
        return str(self.table["path"][int(sample_id)].as_py())

    def sizes(self) -> npt.NDArray[np.int32]:
        """Width and height as displayed, [N, 2]; 0 where the status is not "ok"."""
        return np.stack([self.table["width"].to_numpy(), self.table["height"].to_numpy()], axis=1)

    def places(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Where shards hold the images: shard number and offset in bytes, [N] each; else -1."""
        assert self.shards, "the images are files"
        shard, offset = (pc.fill_null(self.table[name], -1) for name in ("shard", "offset"))
        return shard.to_numpy(), offset.to_numpy()

    def _counts_in_words(self) -> str:
        rows = sorted(self.counts().items())
        return ", ".join(f"{n:,} {' '.join(filter(None, key))}" for key, n in rows) or "no rows"


def escapes_root(paths: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """True where a path is absolute, empty, or climbs out of its root by "..", [N]."""
    return np.asarray(pc.match_substring_regex(paths, _ESCAPES).to_numpy(zero_copy_only=False))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside ``path`` that takes its place if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_int64(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _read_parquet(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no index {path}; `mentorch index` makes one")
    not_an_index = f"{path} is not a mentorch index (`mentorch index` makes one)"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{not_an_index}: {error}") from error
    text = (table.schema.metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise ValueError(f"{not_an_index}: a Parquet file without mentorch's metadata")
    metadata = json.loads(text)
    if metadata.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has index format {metadata.get('format')}, this version of mentorch reads "
            f"format {FORMAT_VERSION}; make the index again with `mentorch index`"
        )
    schema = SHARD_SCHEMA if metadata.get("shards") else SCHEMA
    if not table.schema.equals(schema):
        raise ValueError(f"{not_an_index}: its columns are {table.schema.names}")
    return table.combine_chunks(), metadata


def _recorded_root(path: Path, metadata: dict[str, Any]) -> Path:
    """The root that an index says it has. Shards are copied about: those beside it come first."""
    shards = metadata.get("shards")
    if shards and (path.parent / shards[0]).is_file():
        return path.parent.absolute()
    return Path(metadata["root"])


def _check_rows(index: Index, path: Path) -> None:
    labels = index.labels()
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(index.classes):
        raise ValueError(
            f"{path} has labels {labels.min()}..{labels.max()} for {len(index.classes)} classes"
        )
    if not np.array_equal(_to_int64(index.table["sample_id"]), np.arange(len(index))):
        raise ValueError(f"{path} is damaged: sample_id is not the row number")
    outside = escapes_root(index.paths())
    if outside.any():
        raise ValueError(
            f"{path}, row {outside.argmax()}: {index.path(int(outside.argmax()))!r} leaves the "
            "root folder; an index may only name files under its root"
        )


def _check_shards(index: Index, path: Path) -> None:
    for name in index.shards:
        if not (isinstance(name, str) and _SHARD_NAME.fullmatch(name)):
            raise ValueError(f"{path} names the shard {name!r}; a shard is a .tar file in the root")
    shard, offset = index.places()
    status = index.table["status"].to_numpy()
    size = pc.fill_null(index.table["bytes"], 0).to_numpy()
    held = shard >= 0
    wrong = (shard < -1) | (shard >= len(index.shards)) | ((status == "ok") & ~held)
    # A header comes before every image, and no image is larger than `mentorch index` lets in.
    wrong |= held & ((offset < 512) | (size < 1) | (size > MAX_BYTES))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{path} is damaged: row {row} ({status[row]}) is in shard {shard[row]} of "
            f"{len(index.shards)}, at {offset[row]:,}, {size[row]:,} bytes"
        )
