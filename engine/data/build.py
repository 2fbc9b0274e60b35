"""From paths and labels to a verified index on disk; what the three data set readers share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mentorch.engine.data.index import SCHEMA, STATUSES, Index, escapes_root, replacing
from mentorch.engine.data.journal import Journal, Known, known_from, ok_rows
from mentorch.engine.data.verify import Verified, verify_images

SHOWN = 10  # bad files printed; all of them are in the quarantine file


@dataclass
class Rows:
    """What a data set lists, before anything is known about the files; N rows.

    Attributes:
        paths: Arrow strings, relative to the root.
        labels: int32 [N].
        split: "train" or "val", Arrow strings.
        source: "google", "flickr", "val" or "", Arrow strings.
        clean_labels: int32 [N], -1 where unknown; None when none is known.
    """

    paths: pa.Array
    labels: npt.NDArray[np.int32]
    split: pa.Array
    source: pa.Array
    clean_labels: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def of(
        cls, paths: pa.Array, labels: npt.NDArray[np.int32], split: str, source: str | pa.Array
    ) -> "Rows":
        """Rows of one split (and one source, when that is a name)."""
        if isinstance(source, str):
            source = pa.repeat(pa.scalar(source), len(paths))
        return cls(paths, labels, pa.repeat(pa.scalar(split), len(paths)), source)

    @classmethod
    def concat(cls, parts: list["Rows"]) -> "Rows":
        """One after the other."""
        return cls(
            pa.concat_arrays([p.paths for p in parts]),
            np.concatenate([p.labels for p in parts]).astype(np.int32),
            pa.concat_arrays([p.split for p in parts]),
            pa.concat_arrays([p.source for p in parts]),
        )


def build_index(
    rows: Rows,
    *,
    root: Path,
    dataset: str,
    classes: tuple[str, ...],
    class_names: tuple[str, ...],
    out: Path | None,
    workers: int | None,
    reverify: bool,
) -> Index:
    """Verifies the images of ``rows``; writes the index and, beside it, the list of bad files.

    Args:
        rows: the samples; their order becomes the sample ids.
        root: the folder that the paths are relative to.
        dataset: "webvision", "imagenet" or "folder".
        classes: class id by label.
        class_names: human-readable name by label.
        out: the Parquet file; None is ``root/<dataset>.index.parquet``.
        workers: see `verify_images`.
        reverify: decode every image again, also those that an earlier index knows.

    Raises:
        ValueError: the output cannot be written, belongs to something else, or no image is usable.
    """
    assert len(rows)
    assert not escapes_root(rows.paths).any()
    out = default_out(root, dataset, out)
    journal = Journal(out.with_name(f"{out.stem}.journal.jsonl"), root, reverify=reverify)
    known = _known(out, journal, root, rows.paths, reverify)
    with _kept_when_interrupted(journal):
        verified = verify_images(root, rows.paths, known=known, journal=journal, workers=workers)
    bad = _write_quarantine(out, rows.paths, verified)
    if len(bad) == len(rows):
        journal.path.unlink()
        raise ValueError(
            f"none of the {len(rows):,} images listed is usable under {root}; the first is "
            f"{bad[0]['path']!r}: {bad[0]['reason']}. Is this the right folder?"
        )
    index = Index(_table(rows, verified), root, dataset, classes, class_names)
    index.write(out)
    journal.path.unlink()
    _print_bad(bad, out)
    return index


def default_out(root: Path, dataset: str, out: Path | None) -> Path:
    """The index's place, checked to be writable before hours of work go into it."""
    out = Path(out) if out is not None else root / f"{dataset}.index.parquet"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of the Parquet file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {out} does not exist; make it first")
    return out


def checked_root(root: str | Path) -> Path:
    """The data set's folder, absolute; an index records it."""
    root = Path(root).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise FileNotFoundError(f"ROOT {root} {problem}; give the folder that holds the data set")
    return root.absolute()


def quarantine_path(out: Path) -> Path:
    """Where the bad files of an index are listed."""
    return out.with_name(f"{out.stem}.quarantine.jsonl")


def _known(
    out: Path, journal: Journal, root: Path, paths: pa.Array, reverify: bool
) -> Known | None:
    """What an interrupted run or an earlier index says about these files."""
    earlier = journal.read()
    if earlier.num_rows:
        print(f"going on from {journal.path}: {earlier.num_rows:,} images are verified already")
    if out.exists():
        index = _index_to_replace(out)
        if index.root == root and not reverify:
            earlier = pa.concat_tables([ok_rows(index), earlier])
    return known_from(earlier, paths) if earlier.num_rows else None


def _index_to_replace(out: Path) -> Index:
    """The index that is at ``out`` now, unless it is something to keep."""
    try:
        index = Index.read(out, need_root=False)
    except ValueError as error:
        raise ValueError(f"{out} is in the way: {error}. Remove it or give another --out") from None
    if index.shards:
        raise ValueError(f"{out} is the index of shards and would be lost; give another --out")
    if index.noise is not None:
        raise ValueError(f"{out} has injected label noise and would be lost; give another --out")
    return index


@contextmanager
def _kept_when_interrupted(journal: Journal) -> Iterator[None]:
    try:
        journal.open()
    except OSError as error:
        raise ValueError(
            f"cannot write to {journal.path.parent} ({error.strerror}); give another place for the "
            "index with --out FILE"
        ) from error
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {journal.path} keeps what is done, the same command goes on from it")
        raise
    finally:
        journal.close()


def _table(rows: Rows, verified: Verified) -> pa.Table:
    clean = rows.clean_labels
    columns = {
        "sample_id": np.arange(len(rows), dtype=np.int64),
        "path": rows.paths,
        "label": rows.labels,
        "clean_label": pa.nulls(len(rows), pa.int32())
        if clean is None
        else pa.array(clean, pa.int32(), mask=clean < 0),
        "split": rows.split.dictionary_encode(),
        "source": rows.source.dictionary_encode(),
        "status": pa.DictionaryArray.from_arrays(verified.status.astype(np.int32), list(STATUSES)),
        "bytes": verified.bytes,
        "width": verified.width,
        "height": verified.height,
    }
    return pa.table(columns, schema=SCHEMA)


def _write_quarantine(out: Path, paths: pa.Array, verified: Verified) -> list[dict[str, str]]:
    """Lists every missing and broken file; the list goes away when there is none."""
    bad = [
        {"path": paths[row].as_py(), "status": STATUSES[verified.status[row]], "reason": reason}
        for row, reason in sorted(verified.reasons.items())
    ]
    if not bad:
        quarantine_path(out).unlink(missing_ok=True)
        return bad
    with (
        replacing(quarantine_path(out)) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
    return bad


def _print_bad(bad: list[dict[str, str]], out: Path) -> None:
    for line in bad[:SHOWN]:
        print(f"  {line['status']}: {line['path']} ({line['reason']})")
    if bad:
        print(f"{len(bad):,} files are left out; all of them are named in {quarantine_path(out)}")


def print_counts(index: Index, out: Path, expected: dict[str, tuple[int, str]]) -> None:
    """Prints what was found beside what the data set should have.

    Args:
        index: the finished index.
        out: where it was written.
        expected: for each line its name, the number found and what is expected, in words.
    """
    print(f"{out}: {len(index):,} samples, {len(index.classes):,} classes")
    width = max(map(len, expected), default=0)
    for name, (found, should) in expected.items():
        print(f"  {name:<{width}}  {found:>9,}{'   expected ' + should if should else ''}")
