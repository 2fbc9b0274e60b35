"""Shards in object storage, as fsspec's memory file system stands for it."""

from pathlib import Path

import fsspec
import pytest

from mentorch.engine.data.index import Index
from mentorch.engine.data.shards import write_shards


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_object_storage(index, sharded, tmp_path):
    """A stopped run goes on there too, and what is copied from there is read where it lies."""
    store = fsspec.filesystem("memory")
    write_shards(index, "memory://bucket/set", shard_mb=1)
    first = sharded.shards[0]
    store.rm_file("/bucket/set/" + first.replace(".tar", ".idx"))
    created = store.modified("/bucket/set/" + sharded.shards[1])
    write_shards(index, "memory://bucket/set", shard_mb=1)
    assert store.modified("/bucket/set/" + sharded.shards[1]) == created, "written twice"
    store.get("/bucket/set/", str(tmp_path / "copy/"), recursive=True)
    store.rm("/bucket", recursive=True)
    here, there = _files(sharded.root), _files(tmp_path / "copy")
    assert {n: b for n, b in here.items() if not n.endswith(".parquet")} == {
        n: b for n, b in there.items() if not n.endswith(".parquet")
    }
    copy = Index.read(tmp_path / "copy" / "folder.index.parquet")
    assert copy.root == tmp_path / "copy"
    assert copy.table.equals(sharded.table)


def test_urls_that_cannot_be_written_to(index, monkeypatch):
    with pytest.raises(ValueError, match="nowhere://x: Protocol not known: nowhere"):
        write_shards(index, "nowhere://x")

    def no_driver(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("mentorch.engine.data.shard_store.url_to_fs", no_driver)
    with pytest.raises(ImportError, match="s3://b, a package is missing: Install s3fs"):
        write_shards(index, "s3://b")
