"""Streaming a tree in which files of every kind that people meet are broken."""

import io
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mentorch.engine.config import DataConfig
from mentorch.engine.data import graph, pipelines
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index
from mentorch.engine.data.order import PADDING
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.data.quarantine import Quarantine, Unusable
from mentorch.engine.distributed import World

SMALL = DataConfig(image_size=32, resize=36, threads=1)


def _jpeg(mode="RGB", size=(60, 40), kind="JPEG", **options):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(exif=exif)


GOOD = _jpeg()


def _patched(marker, offset, content):
    at = GOOD.index(marker) + offset
    return GOOD[:at] + content + GOOD[at + len(content) :]


# Odd ones that decode, whatever their name says.
ODD = {
    "cmyk": _jpeg("CMYK"),
    "gray": _jpeg("L"),
    "progressive": _jpeg(progressive=True),
    "rotated": _rotated(),
    "png named jpg": _jpeg(kind="PNG"),
    "rgba png": _jpeg("RGBA", kind="PNG"),
    "palette png": _jpeg("P", kind="PNG"),
    "bmp": _jpeg(kind="BMP"),
    "tiff": _jpeg(kind="TIFF"),
    "webp": _jpeg(kind="WEBP"),
    "one pixel": _jpeg(size=(1, 1)),
    "trailing garbage": GOOD + b"garbage" * 99,
    "ünïcödé 图像": GOOD,
}
# What reading them shows.
UNREADABLE = {
    "truncated": GOOD[:-300],
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "random bytes": np.random.default_rng(1).bytes(4000),
    "gif": _jpeg("P", kind="GIF"),
    "avif": b"\x00\x00\x00\x20ftypavif" + bytes(900),
    "empty": b"",
}
# What only decoding them shows.
REFUSED = {
    "bad tables": _patched(b"\xff\xc4", 4, b"\xff" * 17),
    "absurd header": _patched(b"\xff\xc0", 5, b"\xff\xff\xff\xff"),
    "cut png": _jpeg(kind="PNG")[:60],
}
# What is in a file's place.
MISPLACED = ("missing", "dangling", "directory", "pipe")


def _misplace(path, kind):
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


@pytest.fixture
def tree(put, tmp_path):
    """A folder of 64 good images, and what makes each of the others bad: after indexing."""
    odd = {f"train/a/{name}.jpg": content for name, content in ODD.items()}
    bad = {f"train/b/{name}.jpg": content for name, content in (UNREADABLE | REFUSED).items()}
    misplaced = {f"train/b/{kind}.jpg": kind for kind in MISPLACED}
    for k in range(64):
        put(f"train/a/good {k:02d}.jpg", GOOD)
    for name, content in odd.items():
        put(name, content)
    for name in bad | misplaced:
        put(name, GOOD)  # as it was when indexed
    index = index_folder(tmp_path, workers=0)
    assert not (index.table["status"].to_numpy() != "ok").any()
    for name, content in bad.items():
        put(name, content)
    for name, kind in misplaced.items():
        (tmp_path / name).unlink()
        _misplace(tmp_path / name, kind)
    return index, set(bad) | set(misplaced)


def _seen(batches):
    return torch.cat([batch.sample_ids for batch in batches])


def _loader(index, ids, **changes):
    return Loader(index, ids, **({"batch_size": 15, "config": SMALL, "train": True} | changes))


def test_every_good_file_comes_and_every_bad_one_is_named(tree):
    index, bad = tree
    ids = index.select("train")
    assert len(ids) == 90  # 6 batches of 15, so that an epoch has all of them
    loader = _loader(index, ids)
    seen = _seen(loader.batches(0, epochs=3))
    good = [i for i in ids.tolist() if index.path(i) not in bad]
    for epoch in seen.split(90):
        assert sorted(epoch[epoch != PADDING].tolist()) == good
    found = {u.path: u for u in loader.unusable()}
    assert set(found) == bad
    assert all(u.reason for u in found.values())
    assert {path for path, u in found.items() if u.refused} == {
        f"train/b/{name}.jpg" for name in REFUSED
    }
    words = {
        "missing": "No such",
        "directory": "Is a dir",
        "pipe": "regular",
        "html": "HTML",
        "gif": "GIF",
        "empty": "empty",
        "truncated": "end marker",
    }
    for name, word in words.items():
        assert word in found[f"train/b/{name}.jpg"].reason


def test_bad_files_do_not_shift_what_comes_after_them(tree):
    """The batches are those of the tree as it was, but for the rows of the bad files."""
    index, bad = tree
    ids = index.select("train")
    worlds = [World(rank, 3) for rank in range(3)]
    loaders = [_loader(index, ids, batch_size=5, world=world) for world in worlds]
    ranks = [list(loader.batches(0, epochs=2)) for loader in loaders]
    assert {len(batches) for batches in ranks} == {12}, "ranks are out of step"
    alone = _loader(index, ids)
    for step, batch in enumerate(alone.batches(0, epochs=2)):
        planned = torch.from_numpy(alone._epoch(step // 6)[step % 6])
        is_bad = torch.tensor([index.path(i) in bad for i in planned.tolist()])
        assert torch.equal(batch.sample_ids, planned.masked_fill(is_bad, PADDING))
        assert torch.equal(torch.cat([r[step].sample_ids for r in ranks]), batch.sample_ids)
        assert torch.equal(torch.cat([r[step].images for r in ranks]), batch.images)


def test_a_file_that_vanishes_between_epochs(tree, tmp_path):
    index, bad = tree
    ids = np.array([i for i in index.select("train") if index.path(int(i)) not in bad])
    loader = _loader(index, ids[:75], config=replace(SMALL, read_ahead=0, prefetch=1))
    batches = loader.batches(0, epochs=2)
    first = _seen([next(batches) for _ in range(5)])
    assert sorted(first.tolist()) == ids[:75].tolist()
    (tmp_path / index.path(int(ids[7]))).unlink()
    second = _seen(batches)
    assert int((second == PADDING).sum()) <= 1  # 0 if it had been read ahead of the epoch
    assert len(second) == 75


def test_a_refused_file_is_not_handed_to_dali_again(tree, monkeypatch):
    index, _ = tree
    ids = index.select("train")
    first = _loader(index, ids)
    list(first.batches())
    refused = {u.sample_id: u.reason for u in first.unusable() if u.refused}
    assert len(refused) == len(REFUSED)
    monkeypatch.setattr(pipelines, "refused_rows", lambda *_: 1 / 0)
    again = _loader(index, ids, refused=refused)
    list(again.batches(0, epochs=2))
    assert {u.sample_id for u in again.unusable() if u.refused} == refused.keys()


def test_an_error_that_no_file_explains_ends_the_run(tree, monkeypatch):
    """Out of memory, say: quarantining good files would hide it."""
    index, _ = tree
    monkeypatch.setattr(graph, "_why_not", lambda *_: "out of memory")
    with pytest.raises(RuntimeError, match=r"no file of the batch fails by itself to explain it"):
        list(_loader(index, index.select("train")).batches())


def test_reasons_are_dalis_without_its_traceback():
    said = (
        "Error in X:\n  File 'x.py'\n\nencountered:\n\nFailed to decode sample #7 : \nCurrent pipe"
    )
    error = RuntimeError(said + "line object is no longer valid.")
    assert graph.reason_of(error) == "the decoder refuses it: Failed to decode it"


def test_the_quarantine_is_a_file_that_goes_on(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    one = Unusable("train", 3, "a/b.jpg", "truncated JPEG", False)
    two = Unusable("val", 3, "c.jpg", "the decoder refuses it", True)
    first = Quarantine(path)
    first.add([one, two])
    first.add([one])
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + '{"set": "tra')  # killed while it wrote
    second = Quarantine(path)
    assert list(second.found.values()) == [one, two]
    assert second.refused("val") == {3: "the decoder refuses it"}
    assert second.refused("train") == {}
    second.add([replace(two, sample_id=4)])
    assert len(Quarantine(path, write=False).found) == 3


def test_a_strange_quarantine_is_refused(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"path": "x"}\n')
    with pytest.raises(ValueError, match="no record of a quarantined file"):
        Quarantine(path)


def test_imagenets_odd_files_show_what_they_show(put, tmp_path):
    """One training file is a PNG named .JPEG, some are CMYK; Pillow's pixels are the reference."""
    for name, content in (("png", _jpeg(kind="PNG")), ("cmyk", _jpeg("CMYK", quality=95))):
        put(f"train/n01440764/{name}.JPEG", content)
    index = index_folder(tmp_path, workers=0)
    config = replace(SMALL, image_size=36)
    (batch,) = _loader(
        index, index.select("train"), config=config, batch_size=2, train=False
    ).batches()
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        image = Image.open(tmp_path / index.path(sample_id)).convert("RGB")
        box = (10, 0, 50, 40)
        expected = np.asarray(image.resize((36, 36), Image.Resampling.BILINEAR, box=box))
        assert np.abs(batch.images[row].numpy().astype(int) - expected).mean() < 3


def test_the_root_may_hold_an_index_that_was_read_back(tree, tmp_path):
    index, _ = tree
    again = Index.read(tmp_path / "folder.index.parquet")
    ids = index.select("train")
    assert _loader(again, ids).fingerprint() == _loader(index, ids).fingerprint()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("data.image_size", {"config": replace(SMALL, image_size=30)}),
        ("data.crop_scale", {"config": replace(SMALL, crop_scale=(0.5, 1.0))}),
        ("data.crop_ratio", {"config": replace(SMALL, crop_ratio=(1.0, 1.0))}),
        ("data.mirror", {"config": replace(SMALL, mirror=False)}),
    ],
)
def test_the_fingerprint_names_what_changed(tree, name, change):
    index, _ = tree
    ids = index.select("train")
    one, other = (_loader(index, ids, **c).fingerprint() for c in ({}, change))
    assert {key for key in one if one[key] != other[key]} == {name}


def test_the_fingerprint_sees_other_files_and_other_samples(tree):
    index, _ = tree
    ids = index.select("train")
    one = _loader(index, ids).fingerprint()
    backwards = _loader(index, ids[::-1].copy()).fingerprint()
    assert backwards["training samples"] != one["training samples"]
    for name, values in (("path", index.paths().to_pylist()), ("width", index.sizes()[:, 0])):
        column = index.table.schema.get_field_index(name)
        changed = pa.array([*values[1:], values[0]], index.table.schema.field(column).type)
        table = index.table.set_column(column, index.table.schema.field(column), changed)
        other = _loader(replace(index, table=table), ids).fingerprint()
        assert {key for key in one if one[key] != other[key]} == {"training images"}, name
