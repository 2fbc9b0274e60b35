"""The index of shards: where it is looked for, and that a damaged or hostile one is refused."""

import shutil
from dataclasses import replace

import pyarrow as pa
import pytest

from mentorch.engine.data.datasets import open_index
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index
from mentorch.engine.distributed import World


def test_a_moved_folder_of_shards(sharded, tmp_path):
    moved = sharded.root.rename(tmp_path / "moved")
    index = moved / "webvision.index.parquet"  # of shards the folder's layout says nothing
    (moved / "folder.index.parquet").rename(index)
    for opened in (Index.read(index), open_index(moved, World())):
        assert opened.root == moved
        assert opened.shards == sharded.shards
    elsewhere = shutil.move(index, tmp_path / "alone.parquet")
    with pytest.raises(FileNotFoundError, match=r"is not there.*Shards are found beside"):
        Index.read(elsewhere)


def test_a_folder_of_files_is_opened_as_before(index):
    (index.root / "ILSVRC2012_img_train.tar").touch()
    opened = open_index(index.root, World())
    assert (opened.shards, opened.root) == ((), index.root)


@pytest.mark.parametrize(
    "name", ["../train-000000.tar", "/etc/x.tar", "a/b.tar", "..tar", "x.tar\n", "x", "", 3]
)
def test_names_that_leave_the_root_are_refused(sharded, tmp_path, name):
    bad = replace(sharded, shards=(name, *sharded.shards[1:]))
    bad.write(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"a shard is a \.tar file in the root"):
        Index.read(tmp_path / "bad.parquet", root=sharded.root)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("shard", value) for value in (99, -2, None)),
        *(("offset", value) for value in (-1, 0, None)),
        *(("bytes", value) for value in (0, 1 << 40)),
    ],
)
def test_damaged_places_are_refused(sharded, tmp_path, column, value):
    row = int(sharded.select("train")[0])
    values = sharded.table[column].to_pylist()
    values[row] = value
    at = sharded.table.schema.get_field_index(column)
    field = sharded.table.schema.field(at)
    table = sharded.table.set_column(at, field, [pa.array(values, field.type)])
    replace(sharded, table=table).write(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=f"is damaged: row {row} "):
        Index.read(tmp_path / "bad.parquet", root=sharded.root)


def test_shards_without_their_columns_are_refused(index, tmp_path):
    replace(index, shards=("train-000000.tar",)).write(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="its columns are"):
        Index.read(tmp_path / "bad.parquet", root=tmp_path)


def test_an_index_of_shards_is_not_overwritten_by_one_of_files(index, sharded):
    out = sharded.root / "folder.index.parquet"
    with pytest.raises(ValueError, match="is the index of shards and would be lost"):
        index_folder(index.root, out=out, workers=0)
    assert Index.read(out).shards == sharded.shards
