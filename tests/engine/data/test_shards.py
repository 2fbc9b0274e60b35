"""Tar shards: written, read back, gone on with, and told apart from what is none of them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mentorch.engine.config import DataConfig
from mentorch.engine.data import commands, shards
from mentorch.engine.data.datasets import open_datasets
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.data.readers import FileReader, open_reader
from mentorch.engine.data.shards import write_shards
from mentorch.engine.distributed import World


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_what_is_read_back_is_what_was_written(index, sharded):
    assert len(sharded.shards) > 3, "too few shards to say anything"
    assert sorted(sharded.shards) == list(sharded.shards)
    assert {name.split("-")[0] for name in sharded.shards} == {"train", "val"}
    file, tar = FileReader(index.root, index.paths()), open_reader(sharded)
    held, ok = sharded.places()[0] >= 0, index.table["status"].to_numpy() == "ok"
    assert np.array_equal(held, ok)
    assert ok.sum() == 17
    for sample_id in np.flatnonzero(ok):
        assert tar.read(sample_id).tobytes() == file.read(sample_id).tobytes()
    assert tar.read(int(np.flatnonzero(~ok)[0])) == "in no shard"


def test_the_index_of_shards_says_what_the_index_said(index, sharded, tmp_path):
    for name in index.table.schema.names:
        assert sharded.table[name].to_pylist() == index.table[name].to_pylist(), name
    assert (sharded.dataset, sharded.classes, sharded.noise) == ("folder", index.classes, None)
    read = Index.read(tmp_path / "shards" / "folder.index.parquet")
    assert read.table.equals(sharded.table)
    assert (read.root, read.shards) == (tmp_path / "shards", sharded.shards)


def test_the_same_index_and_seed_give_the_same_bytes(index, sharded, tmp_path):
    write_shards(index, str(tmp_path / "again"), shard_mb=1)
    write_shards(index, str(tmp_path / "other"), shard_mb=1, seed=1)
    first, again, other = (_files(tmp_path / name) for name in ("shards", "again", "other"))
    for name in sharded.shards:
        assert first[name] == again[name]
        assert first[name.replace(".tar", ".idx")] == again[name.replace(".tar", ".idx")]
    assert any(first[name] != other.get(name) for name in sharded.shards)


def test_samples_are_spread_over_shards(put, encoded, tmp_path, monkeypatch):
    """40 images of two classes, one after the other in the list, in shards of about 10."""
    for k in range(40):
        put(f"two/c{k // 20}/{k:02d}.jpg", encoded(seed=k))
    index = index_folder(tmp_path / "two", workers=0)
    in_tar = index.table["bytes"].to_numpy().mean() + 1800  # headers and padding
    monkeypatch.setattr(shards, "_MB", int(in_tar * 11))
    sharded = write_shards(index, str(tmp_path / "out"), shard_mb=1)
    assert len(sharded.shards) == 4
    for number in range(4):
        labels = index.labels()[sharded.places()[0] == number]
        assert 8 <= len(labels) <= 12, "shards differ in size"
        assert set(labels) == {0, 1}, "a shard of one class only"


def _interrupt_after(monkeypatch, images):
    seen = iter(range(images))

    class Reader(FileReader):
        def read(self, sample_id):
            if next(seen, None) is None:
                raise KeyboardInterrupt
            return super().read(sample_id)

    monkeypatch.setattr(shards, "open_reader", lambda index: Reader(index.root, index.paths()))


def test_a_run_that_was_stopped_goes_on(index, sharded, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "stopped", _files(tmp_path / "shards")
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            write_shards(index, str(out), shard_mb=1)
    assert "the same command goes on from it" in capsys.readouterr().out
    begun = _files(out)
    tars = {name for name in begun if name.endswith(".tar")}
    assert 0 < len(tars) < len(sharded.shards)
    assert "folder.index.parquet" not in begun
    assert not any(name.endswith(".tmp") for name in begun)
    times = {name: (out / name).stat().st_mtime_ns for name in tars}
    write_shards(index, str(out), shard_mb=1)
    gone_on = _files(out)
    assert {n: b for n, b in gone_on.items() if n.endswith((".tar", ".idx"))} == {
        n: b for n, b in whole.items() if n.endswith((".tar", ".idx"))
    }
    assert {name: (out / name).stat().st_mtime_ns for name in tars} == times, "written twice"


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: os.truncate(tar, tar.stat().st_size - 512),
        lambda tar: tar.with_suffix(".idx").unlink(),
        lambda tar: tar.with_suffix(".idx").write_text("v1.2 1\njpg 1 2 x.jpg\n"),
        lambda tar: tar.with_suffix(".idx").write_text(
            "".join(tar.with_suffix(".idx").read_text().splitlines(keepends=True)[:-1])
        ),
        lambda tar: tar.unlink(),
    ],
)
def test_an_incomplete_shard_is_written_again(index, sharded, tmp_path, damage):
    before = _files(tmp_path / "shards")
    damage(tmp_path / "shards" / sharded.shards[1])
    write_shards(index, str(tmp_path / "shards"), shard_mb=1)
    assert _files(tmp_path / "shards") == before


def test_shards_of_something_else_are_not_mixed_in(index, sharded, tmp_path):
    other = replace(
        index, table=index.table.set_column(1, "path", [index.paths().to_pylist()[::-1]])
    )
    for changed, seed, size in ((index, 1, 1), (index, 0, 2), (other, 0, 1)):
        with pytest.raises(ValueError, match="shards of another index, seed or size"):
            write_shards(changed, str(tmp_path / "shards"), shard_mb=size, seed=seed)


def test_an_index_of_files_is_not_overwritten(index):
    before = (index.root / "folder.index.parquet").read_bytes()
    with pytest.raises(ValueError, match="is no index of shards and would be lost"):
        write_shards(index, str(index.root))
    assert (index.root / "folder.index.parquet").read_bytes() == before
    assert not list(index.root.glob("*.tar"))


def test_an_image_that_cannot_be_read_loses_its_place_only(index, sharded, tmp_path, capsys):
    shard = sharded.places()[0]
    fullest = np.bincount(shard[shard >= 0]).argmax()
    bad = int(np.flatnonzero(shard == fullest)[0])
    path = index.root / index.path(bad)
    was = path.read_bytes()
    path.unlink()
    out = tmp_path / "some"
    some = write_shards(index, str(out), shard_mb=1)
    assert f"broken: {index.path(bad)} (No such file or directory)" in capsys.readouterr().out
    (line,) = (out / "folder.index.quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == index.path(bad)
    assert set(index.select("train")) - set(some.select("train")) == {bad}
    assert some.table["status"][bad].as_py() == "broken"
    assert some.sizes()[bad].tolist() == [0, 0]
    reader = open_reader(some)
    assert all(not isinstance(reader.read(i), str) for i in some.select("train"))
    path.write_bytes(was)  # repaired: the same command takes it in
    whole = write_shards(index, str(out), shard_mb=1)
    assert whole.table["status"].to_pylist() == index.table["status"].to_pylist()
    assert whole.table.equals(sharded.table)
    assert not (out / "folder.index.quarantine.jsonl").exists()


def test_nothing_readable_is_an_error(index, tmp_path):
    shutil.rmtree(index.root / "train")
    with pytest.raises(ValueError, match=r"none of the .* of shard train-000000 can be read"):
        write_shards(index, str(tmp_path / "none"), shard_mb=1)


def test_noise_goes_on_an_index_of_shards(index, sharded, tmp_path):
    path = sharded.root / "folder.index.parquet"
    commands.noise(path, rate=0.5, seed=4)
    noisy = Index.read(sharded.root / "folder.index.symmetric-0.5-seed4.parquet")
    same = add_noise(index, Noise("symmetric", 0.5, seed=4))
    assert noisy.labels().tolist() == same.labels().tolist()
    assert noisy.shards == sharded.shards
    assert not isinstance(open_reader(noisy).read(int(noisy.select("val")[0])), str)


def test_instance_noise_sees_the_images_in_shards(index, sharded):
    by_file, by_shard = (add_noise(i, Noise("instance", 0.5)) for i in (index, sharded))
    assert by_shard.labels().tolist() == by_file.labels().tolist()


def test_shards_of_shards(sharded, tmp_path):
    """Another size of shard needs no files."""
    again = write_shards(sharded, str(tmp_path / "one"), shard_mb=1000)
    assert again.shards == ("train-000000.tar", "val-000000.tar")
    one, other = open_reader(sharded), open_reader(again)
    for sample_id in again.select("train"):
        assert one.read(sample_id).tobytes() == other.read(sample_id).tobytes()


def test_the_command(index, tmp_path, capsys):
    out = tmp_path / "by command"
    made = commands.shard(index.root / "folder.index.parquet", str(out), shard_mb=1, seed=2)
    printed = capsys.readouterr().out
    assert f"{out}: 17 images" in printed
    assert f"--webvision {out}" in printed
    data = open_datasets(DataConfig(train=out, evaluate={"val": out}), World())
    assert data.train.index.shards == made.shards
    assert len(data.evaluate["val"].sample_ids) == 3
    for wrong in ({"shard_mb": 0}, {"read_threads": 0}):
        with pytest.raises(ValueError, match="give 1 or more"):
            commands.shard(index.root / "folder.index.parquet", str(tmp_path / "x"), **wrong)


SMALL = DataConfig(image_size=32, resize=36, threads=1, shard_streams=4, shard_window=8)


def _by_id(index, ids, **options):
    loader = Loader(index, ids, batch_size=16, config=SMALL, seed=3, **options)
    seen = {}
    for batch in loader.batches():
        seen |= dict(zip(batch.sample_ids.tolist(), batch.images, strict=True))
    loader.close()
    return seen


@pytest.fixture(scope="module")
def sharded_digits(digits_index, tmp_path_factory) -> Index:
    return write_shards(digits_index, str(tmp_path_factory.mktemp("digits")), shard_mb=1)


@pytest.mark.parametrize("train", [True, False])
def test_a_loader_sees_the_same_pixels_as_over_files(digits_index, sharded_digits, train):
    """A part of the samples only, and sizes that leave a rest in training."""
    ids = digits_index.select("train", sources=("google",), max_label=3)[:70]
    files, tars = (_by_id(i, ids, train=train) for i in (digits_index, sharded_digits))
    assert len(tars) == (64 if train else 70 + 1)  # in evaluation also the padding
    assert set(tars) <= {*ids.tolist(), -1}
    both = set(files) & set(tars) - {-1}
    assert len(both) >= 58
    assert all(torch.equal(files[i], tars[i]) for i in both)


def test_the_fingerprint_tells_shards_from_files(digits_index, sharded_digits):
    def fingerprint(index, **changes):
        config, ids = replace(SMALL, **changes), index.select("train")
        return Loader(index, ids, batch_size=16, config=config, train=True).fingerprint()

    shards = fingerprint(sharded_digits)
    for other in (
        fingerprint(digits_index),
        fingerprint(sharded_digits, shard_streams=2),
        fingerprint(sharded_digits, shard_window=9),
    ):
        assert {key for key in shards if shards[key] != other[key]} == {"order"}


def test_a_loader_over_shards_resumes_and_shares_out(digits_index, sharded_digits):
    ids = digits_index.select("train", sources=("flickr",))[:100]
    options = {"config": SMALL, "train": True, "seed": 3}

    def epochs(batch_size, world=None, start=0):
        loader = Loader(sharded_digits, ids, batch_size=batch_size, world=world, **options)
        return [b.sample_ids for b in loader.batches(start, epochs=2)]

    alone = epochs(16)
    assert len(alone) == 12
    assert all(map(torch.equal, alone[8:], epochs(16, start=8)))
    halves = zip(*(epochs(8, World(rank, 2)) for rank in range(2)), strict=True)
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(alone, halves, strict=True))
    assert not torch.equal(torch.cat(alone[:6]), torch.cat(alone[6:]))
