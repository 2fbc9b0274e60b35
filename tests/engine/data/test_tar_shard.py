"""A shard is a tar that others read too: webdataset, DALI, NVIDIA's list of members."""

import tarfile

import numpy as np
import pytest

from mentorch.engine.data.readers import open_reader
from mentorch.engine.data.tar_shard import ENDINGS, read_idx


def test_a_tar_holds_samples_as_webdataset_wants_them(index, sharded):
    endings = set()
    for name in sharded.shards:
        with tarfile.open(sharded.root / name) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                stem, _, ending = image.name.partition(".")
                assert (len(stem), label.name) == (9, f"{stem}.cls")
                given = int(tar.extractfile(label).read())
                assert given == index.labels()[int(stem)]
                assert (image.mtime, image.uid, image.gid, image.uname) == (0, 0, 0, "")
                endings.add(ending)
    assert endings == {"jpg", "png", "webp", "bmp", "tiff", "jp2", "ppm"}


def test_dalis_own_reader_takes_the_shards(sharded):
    fn = pytest.importorskip("nvidia.dali").fn
    from nvidia.dali.pipeline import Pipeline

    tars = [str(sharded.root / name) for name in sharded.shards if name.startswith("train")]
    pipe = Pipeline(batch_size=14, num_threads=1, device_id=None)
    with pipe:
        every = ";".join(ENDINGS.values())
        pipe.set_outputs(
            *fn.readers.webdataset(
                paths=tars,
                index_paths=[tar.replace(".tar", ".idx") for tar in tars],
                ext=[every, "cls"],
            )
        )
    pipe.build()
    images, labels = pipe.run()
    shard, offset = sharded.places()
    ids = [i for i in np.lexsort((offset, shard)) if shard[i] >= 0][:14]
    tar = open_reader(sharded)
    for row, sample_id in enumerate(ids):
        assert np.array_equal(images.at(row), tar.read(sample_id))
        assert int(bytes(labels.at(row))) == sharded.labels()[sample_id]


def test_nvidias_tool_makes_the_same_list(sharded, tmp_path):
    creator = pytest.importorskip("wds2idx").IndexCreator
    for name in sharded.shards:
        with creator(str(sharded.root / name), str(tmp_path / "theirs"), verbose=False) as theirs:
            theirs.create_index()
        ours = (sharded.root / name).with_suffix(".idx")
        assert (tmp_path / "theirs").read_text() == ours.read_text()


def test_a_list_of_members_is_ours_or_none():
    text = "v1.2 1\njpg 512 10 000000007.jpg cls 1536 1 000000007.cls\n"
    ((sample_id, *_),) = read_idx(text)
    assert sample_id == 7
    for wrong in ("", "v1.2 0\n", text.replace("1536", "2048"), text.replace("v1.2", "v1.1")):
        assert read_idx(wrong) is None
