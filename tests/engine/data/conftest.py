"""Small generated data sets, as fixtures: importlib mode lets tests share nothing else."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mentorch.engine.data import shards
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index
from mentorch.engine.data.shards import write_shards
from mentorch.engine.data.tar_shard import ENDINGS

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def _encoded(kind="JPEG", size=(20, 10), mode="RGB", seed=0, **options):
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = image.convert("L")
    image.convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """A noise image as bytes: `encoded("PNG", size=(20, 10), mode="RGB", **save_options)`."""
    return _encoded


@pytest.fixture
def put(tmp_path) -> Callable[..., Path]:
    """Writes a file under tmp_path and its folders: an image, or the text or bytes given."""

    def write(name, content=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _encoded() if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def webvision(put, tmp_path) -> Path:
    """WebVision's layout: 4 classes, 6 Google, 3 Flickr and 4 validation images."""
    google = [(f"google/q{1 + k % 4:04d}/same name {k // 4}.jpg", k % 4) for k in range(6)]
    flickr = [(f"flickr/q{1 + k:04d}/same name 0.jpg", k) for k in range(3)]
    val = [(f"val{k + 1:06d}.jpg", k) for k in range(4)]
    for path, _ in google + flickr:
        put(path)
    for path, _ in val:
        put(f"val_images_256/{path}")
    for name, rows in (("train_filelist_google", google), ("train_filelist_flickr", flickr)):
        put(f"info/{name}.txt", "".join(f"{path} {label}\n" for path, label in rows))
    put("info/val_filelist.txt", "".join(f"{path} {label}\n" for path, label in val))
    put("info/synsets.txt", "".join(f"{w} name of {w}, other\n" for w in WNIDS))
    put("info/queries_synsets_map.txt", "1 1\n2 2\n3 3\n4 4\n")
    return tmp_path


@pytest.fixture
def wnids() -> tuple[str, ...]:
    return WNIDS


@pytest.fixture
def index(put, encoded, tmp_path, monkeypatch) -> Index:
    """Every format twice in 2 training classes, 3 validation images, one broken; shards of 4 kB."""
    for label in (0, 1):
        for k, kind in enumerate(ENDINGS):
            put(
                f"files/train/c{label}/{k}.jpg",
                encoded(kind, size=(20 + k, 30), seed=9 * label + k),
            )
        put(f"files/val/c{label}/v.jpg", encoded(seed=20 + label))
    put("files/val/c0/w.jpg", encoded(seed=30))
    put("files/train/c0/page.jpg", "<html>")
    monkeypatch.setattr(shards, "_MB", 4096)
    return index_folder(tmp_path / "files", workers=0)


@pytest.fixture
def sharded(index, tmp_path) -> Index:
    return write_shards(index, str(tmp_path / "shards"), shard_mb=1)
