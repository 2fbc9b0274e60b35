"""The index file: columns, selection, and that a damaged or foreign file is told apart."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mentorch.engine.data.index import SCHEMA, Index, escapes_root


def _index(root, **changes):
    columns = {
        "sample_id": [0, 1, 2, 3, 4],
        "path": ["google/a.jpg", "flickr/ünï.jpg", "google/c.jpg", "v/d.jpg", "google/e.jpg"],
        "label": [0, 1, 2, 1, 2],
        "clean_label": [None, 2, None, None, 2],
        "split": ["train", "train", "train", "val", "train"],
        "source": ["google", "flickr", "google", "val", "google"],
        "status": ["ok", "ok", "missing", "ok", "ok"],
        "bytes": [10, 20, 0, 30, 40],
        "width": [5, 6, 0, 7, 8],
        "height": [1, 2, 0, 3, 4],
        **changes,
    }
    arrays = {
        name: pa.array(v).dictionary_encode() if name in ("split", "source", "status") else v
        for name, v in columns.items()
    }
    table = pa.table(arrays, schema=SCHEMA)
    return Index(
        table, root, "webvision", ("n0", "n1", "n2"), ("zero", "one", "two"), {"rate": 0.4}
    )


def test_round_trip_keeps_everything(tmp_path):
    index = _index(tmp_path)
    index.write(tmp_path / "a.parquet")
    read = Index.read(tmp_path / "a.parquet")
    for field in dataclasses.fields(Index):
        assert getattr(read, field.name) == getattr(index, field.name), field.name
    assert len(read) == 5
    assert list(tmp_path.iterdir()) == [tmp_path / "a.parquet"]  # no temporary file is left


def test_the_same_content_is_the_same_file(tmp_path):
    index = _index(tmp_path)
    index.write(tmp_path / "a.parquet")
    Index.read(tmp_path / "a.parquet").write(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_failed_write_leaves_the_old_index(tmp_path, monkeypatch):
    _index(tmp_path).write(tmp_path / "a.parquet")
    before = (tmp_path / "a.parquet").read_bytes()

    def full(table, where, **options):
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        _index(tmp_path).write(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.parquet"]


def test_columns_as_arrays(tmp_path):
    index = _index(tmp_path)
    assert index.labels().tolist() == [0, 1, 2, 1, 2]
    assert index.clean_labels().tolist() == [-1, 2, -1, -1, 2]
    assert index.labels().dtype == index.clean_labels().dtype == np.int64
    assert index.sizes().tolist() == [[5, 1], [6, 2], [0, 0], [7, 3], [8, 4]]
    assert index.sizes().dtype == np.int32
    assert index.path(1) == "flickr/ünï.jpg"
    assert index.path(np.int64(4)) == "google/e.jpg"
    for outside in (-1, 5):
        with pytest.raises(IndexError, match=f"sample_id {outside} is not in 0..4"):
            index.path(outside)


def test_select(tmp_path):
    index = _index(tmp_path)
    assert index.select("train").tolist() == [0, 1, 4]  # 2 is missing
    assert index.select("val").tolist() == [3]
    assert index.select("train", sources=("google",)).tolist() == [0, 4]
    assert index.select("train", sources=("google", "flickr"), max_label=2).tolist() == [0, 1]
    assert index.select("train").dtype == np.int64


def test_select_says_what_there_is_when_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"2 train google ok, 1 val val ok") as error:
        _index(tmp_path).select("train", sources=("bing",))
    assert "1 train google missing" in str(error.value)
    assert "sources=('bing',)" in str(error.value)


def test_a_moved_root(tmp_path):
    path = tmp_path / "a.parquet"
    _index(tmp_path / "gone").write(path)
    with pytest.raises(FileNotFoundError, match=r"gone, and that folder is not there.*root="):
        Index.read(path)
    assert Index.read(path, root=tmp_path).root == tmp_path
    assert Index.read(path, need_root=False).root == tmp_path / "gone"


def test_what_is_not_an_index(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(FileNotFoundError, match="mentorch index"):
        Index.read(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a mentorch index"):
        Index.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="without mentorch's metadata"):
        Index.read(path)
    _index(tmp_path).write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a mentorch index"):
        Index.read(path)


def test_another_format_version(tmp_path):
    path = tmp_path / "a.parquet"
    metadata = {b"mentorch": b'{"format": 99}'}
    pq.write_table(_index(tmp_path).table.replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match="format 99, this version of mentorch reads format 1"):
        Index.read(path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"label": [0, 1, 3, 1, 2]}, r"labels 0\.\.3 for 3 classes"),
        ({"sample_id": [0, 1, 2, 4, 3]}, "sample_id is not the row number"),
        ({"path": ["a", "b", "../../etc/passwd", "d", "e"]}, r"row 2: '../../etc/passwd' leaves"),
        ({"path": ["a", "/etc/passwd", "c", "d", "e"]}, "row 1: '/etc/passwd' leaves"),
    ],
)
def test_a_damaged_or_hostile_index_is_refused(tmp_path, changes, error):
    _index(tmp_path, **changes).write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=error):
        Index.read(tmp_path / "a.parquet")


def test_other_columns_are_refused(tmp_path):
    index = _index(tmp_path)
    dataclasses.replace(index, table=index.table.drop_columns(["bytes"])).write(tmp_path / "a")
    with pytest.raises(ValueError, match="its columns are"):
        Index.read(tmp_path / "a")


def test_escapes_root():
    paths = ["a/b", "..a", "a..", "a/../b", "..", "/a", "", "a\0", "a/.."]
    assert escapes_root(pa.array(paths)).tolist() == [False] * 3 + [True] * 6
