"""Reading from shards: reasons instead of errors, few open files, long requests."""

import os
import shutil
from pathlib import Path

import numpy as np

from mentorch.engine.data import readers
from mentorch.engine.data.readers import open_reader


def test_missing_and_damaged_shards_give_reasons(sharded):
    shard = sharded.places()[0]
    gone, cut, other = (sharded.root / sharded.shards[k] for k in (0, 1, 2))
    gone.unlink()
    os.truncate(cut, 700)
    shutil.copy(sharded.root / sharded.shards[3], other)
    reader = open_reader(sharded)
    said = [{reader.read(i) for i in np.flatnonzero(shard == k).tolist()} for k in (0, 1)]
    assert said[0] == {f"shard {gone.name}: No such file or directory"}
    assert said[1] == {f"shard {cut.name} is truncated"}
    for sample_id in np.flatnonzero(shard == 2).tolist():
        reason = reader.read(sample_id)
        assert isinstance(reason, str), "an image of another sample"
        assert "not of this index" in reason or "truncated" in reason


def test_more_shards_than_may_be_open(sharded, monkeypatch):
    monkeypatch.setattr(readers, "_MAX_OPEN", 1)
    reader = open_reader(sharded)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for sample_id in np.flatnonzero(sharded.places()[0] >= 0).tolist():
        assert not isinstance(reader.read(sample_id), str)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_whole_blocks_are_asked_for_once(sharded, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: asked.append(words[1:]))
    monkeypatch.setattr(readers, "_AHEAD_BLOCK", 2048)
    reader = open_reader(sharded)
    shard, offset = sharded.places()
    held = np.flatnonzero(shard == 0)
    for sample_id in (*held, *held):
        reader.read(int(sample_id))
    blocks = [start for start, size, advice in asked]
    assert set(asked) == {(start, 2048, os.POSIX_FADV_WILLNEED) for start in blocks}
    assert len(set(blocks)) == len(blocks), "a block was asked for twice"
    end = (offset + sharded.table["bytes"].to_numpy())[held].max()
    assert max(blocks) + 2048 > end + 1024, "nothing is asked for ahead"
    assert sorted(blocks) == list(range(0, max(blocks) + 1, 2048))
