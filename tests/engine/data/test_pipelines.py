import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mentorch.engine.config import DataConfig
from mentorch.engine.data import pipelines
from mentorch.engine.data.order import PADDING
from mentorch.engine.data.pipelines import Loader, Normalise, _buffers, digest
from mentorch.engine.distributed import World

SMALL = DataConfig(image_size=64, resize=72, threads=1)


def _ids(batches):
    return torch.cat([batch.sample_ids for batch in batches])


def _loader(index, ids, **changes):
    options = {"batch_size": 16, "config": SMALL, "train": True, "seed": 3} | changes
    return Loader(index, ids, **options)


def test_evaluation_sees_each_sample_once_in_order(digits_index):
    ids = digits_index.select("val")  # 250: the last batch of 16 has 6 rows of padding
    seen = _ids(_loader(digits_index, ids, train=False).batches())
    assert len(seen) == 256
    assert seen[seen != PADDING].tolist() == ids.tolist()


def test_evaluation_pixels_are_pillows(digits_index):
    ids = digits_index.select("val")[:16]
    batch = next(_loader(digits_index, ids, train=False).batches())
    for row, sample_id in enumerate(ids):
        image = Image.open(digits_index.root / digits_index.path(sample_id)).convert("RGB")
        width, height = image.size
        side = min(width, height) * 64 / 72
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=box))
        difference = np.abs(batch.images[row].numpy().astype(int) - expected.astype(int))
        assert difference.max() <= 8, "not the crop Pillow makes"
        assert difference.mean() < 2


def test_training_crops_and_mirrors_what_the_windows_say(digits_index, monkeypatch):
    """A window of the left upper quarter, mirrored, against Pillow."""
    from mentorch.engine.data.crops import Windows

    def quarter(sizes, sample_ids, *_):
        half = np.full((len(sizes), 2), 0.5, np.float32)
        return Windows(half * 0, half, np.ones(len(sizes), np.int32))

    monkeypatch.setattr(pipelines.crops, "random_resized", quarter)
    ids = digits_index.select("train")[:16]
    batch = next(_loader(digits_index, ids).batches())
    image = Image.open(digits_index.root / digits_index.path(int(batch.sample_ids[0])))
    width, height = image.size
    quarter_image = image.convert("RGB").resize(
        (64, 64), Image.Resampling.BILINEAR, box=(0, 0, width / 2, height / 2)
    )
    expected = np.asarray(quarter_image)[:, ::-1].astype(int)
    assert np.abs(batch.images[0].numpy().astype(int) - expected).max() <= 8


def test_the_same_position_gives_the_same_pixels(digits_index):
    ids = digits_index.select("train", sources=["google"])[:100]
    whole = list(_loader(digits_index, ids).batches(0, epochs=3))
    rest = list(_loader(digits_index, ids).batches(8, epochs=3))
    assert len(whole) == 18  # 100 // 16 steps an epoch, the rest is left to another epoch
    assert len(rest) == 10
    for one, other in zip(whole[8:], rest, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.images, other.images)
    assert not torch.equal(whole[0].sample_ids, whole[6].sample_ids), "epochs are alike"


def test_two_ranks_share_the_epoch_of_one(digits_index):
    ids = digits_index.select("train", sources=["google"])[:100]
    alone = list(_loader(digits_index, ids).batches())
    worlds = [World(rank, 2) for rank in range(2)]
    halves = [list(_loader(digits_index, ids, batch_size=8, world=w).batches()) for w in worlds]
    for step, batch in enumerate(alone):
        both = torch.cat([half[step].images for half in halves])
        assert torch.equal(batch.images, both)


def test_a_file_that_went_bad_after_indexing_loses_its_row_only(digits_index, tmp_path, caplog):
    ids = digits_index.select("train", sources=["flickr"])[:48]
    broken = replace(digits_index, root=tmp_path)
    for sample_id in ids:
        name = digits_index.path(sample_id)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digits_index.root / name, tmp_path / name)
    gone, html, cut = (tmp_path / digits_index.path(i) for i in ids[[3, 20, 40]])
    gone.unlink()
    html.write_text("<html>404</html>")
    cut.write_bytes(cut.read_bytes()[:-200])

    loader = _loader(broken, ids)
    batches = list(loader.batches(0, epochs=2))
    seen = _ids(batches)
    assert len(seen) == 96
    assert (seen == PADDING).sum() == 6  # three files, two epochs
    assert set(seen.tolist()) - {PADDING} == set(ids.tolist()) - set(ids[[3, 20, 40]].tolist())
    assert {u.sample_id for u in loader.unusable()} == set(ids[[3, 20, 40]].tolist())
    assert loader.unusable_count() == 3
    assert len(caplog.messages) == 3, "each bad file is told of once"
    assert str(html) in caplog.text


def test_a_narrow_file_that_is_gone_still_gets_a_row(digits_index, tmp_path):
    """Its window is a sliver of the file; of the placeholder's 8 pixels nothing would be left."""
    sizes = digits_index.sizes()[:, :1] * [[1, 40]]  # width and height: 96 by 3,840
    columns = digits_index.table.drop_columns("height")
    table = columns.append_column("height", [sizes[:, 1].astype(np.int32)])
    gone = replace(digits_index, root=tmp_path, table=table)
    ids = digits_index.select("val")[:16]
    for train in (True, False):
        batch = next(_loader(gone, ids, train=train).batches())
        assert (batch.sample_ids == PADDING).all()


def test_normalise_gives_channels_last_floats():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    out = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images)
    assert out.shape == (2, 3, 5, 7)
    assert out.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_without_dali_the_error_says_what_to_install(digits_index, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    loader = _loader(digits_index, digits_index.select("val"), train=False)
    with pytest.raises(ImportError, match=r"nvidia-dali-cuda130 .*\n.*nvidia-dali-cuda120"):
        next(loader.batches())


def test_paths_are_hashed_with_offsets_of_64_bits():
    """More than 2 GiB of text do not fit into one piece otherwise; chunks make no difference."""
    one = pa.chunked_array([pa.array(["a", "bb"]), pa.array(["c"])])
    other = pa.chunked_array([pa.array(["a"]), pa.array(["bb", "c"])])
    assert digest(*_buffers(one)) == digest(*_buffers(other))
    offsets, characters = _buffers(one)
    assert np.frombuffer(offsets, np.int64)[:4].tolist() == [0, 1, 3, 4]
    assert bytes(characters)[:4] == b"abbc"
