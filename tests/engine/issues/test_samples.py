"""Arrays, data sets and folders become samples in memory; what cannot says why."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mentorch.engine.issues.samples import from_arrays, from_dataset, from_folder


def pixels(n=6, side=8, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_images(channels, as_tensor):
    values = pixels(channels=channels or 1)
    values = values if channels else values[..., 0]
    given = torch.from_numpy(values) if as_tensor else values
    found = from_arrays(given, torch.from_numpy(LABELS) if as_tensor else LABELS)
    np.testing.assert_array_equal(found.values.numpy().reshape(values.shape), values)
    assert found.values.ndim == 4
    assert found.named.class_names == ("0", "1", "2")
    picture = Image.open(io.BytesIO(found.reader.read(2).tobytes()))
    np.testing.assert_array_equal(np.asarray(picture).reshape(values[2].shape), values[2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features(dtype):
    found = from_arrays(np.ones((6, 5), dtype), LABELS, class_names=["a", "b", "c", "d"])
    assert found.values.dtype == torch.float32
    assert found.reader is None
    assert found.named.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("values", "labels", "rest", "message"),
    [
        (pixels().astype(np.int64), LABELS, {}, r"int64.*\[6, 8, 8, 3\].*uint8"),
        (pixels().transpose(0, 3, 1, 2), LABELS, {}, r"permute\(0, 2, 3, 1\)"),
        (pixels(channels=4).transpose(0, 3, 1, 2), LABELS, {}, "moveaxis"),
        (np.array([None] * 6), LABELS, {}, "Python objects"),
        (pixels(), LABELS * 5_000_000, {}, "label 10000000 among 6.*unique"),
        (pixels(), LABELS, {"class_names": {0: "a", 1: "b", 2: "c"}}, "not a dict"),
        (pixels(), LABELS[:4], {}, "4 labels for 6"),
        (pixels(), LABELS - 1, {}, "-1 is negative"),
        (pixels(), LABELS.astype(float), {}, "labels are .* integers, got float64"),
        (pixels(), LABELS, {"class_names": ["a", "b"]}, "label 2 has no name"),
        (pixels(), LABELS, {"clean_labels": LABELS[:3]}, "clean has 3"),
        (pixels(), LABELS, {"paths": ["a"]}, "files has 1"),
        (np.full((6, 2), np.nan), LABELS, {}, "finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(values, labels, rest, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(values, labels, **rest)


def test_arrays_as_people_have_them():
    """Reversed channels, what nobody may write to, a graph; names and paths that are no text."""
    values = pixels()[..., ::-1]
    values.flags.writeable = False
    names = [("cat", "tabby"), 1, "c"]
    paths = [Path("a") / str(row) for row in range(5)] + ["b\udcff"]
    found = from_arrays(values, LABELS, names, paths=paths)
    np.testing.assert_array_equal(found.values.numpy(), values)
    assert found.named.class_names == ("cat, tabby", "1", "c")
    assert found.named.files[0] == "a/0"
    found.named.files[5].encode()  # which a lone surrogate could not
    with_graph = torch.ones(6, 2, requires_grad=True) * 2
    assert not from_arrays(with_graph, LABELS).values.requires_grad


def test_a_clean_label_needs_no_name():
    """Below a largest label, given ones may be wrong labels of classes above it."""
    found = from_arrays(pixels(), LABELS, ["a", "b", "c"], clean_labels=LABELS + 1)
    assert found.named.clean_labels().max() == 3


class Data:
    """A data set of PyTorch's kind."""

    classes = ("a", "b", "c")

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row], int(LABELS[row])


def as_float(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255


KINDS = {
    "array": lambda image: image,
    "float array": lambda image: image.astype(np.float32) / 255,
    "uint8 tensor": lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()),
    "ToTensor": as_float,
    "PIL": Image.fromarray,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_data_sets(kind):
    found = from_dataset(Data([kind(image) for image in pixels()]), 8, None)
    np.testing.assert_array_equal(found.values.numpy(), pixels())
    assert found.named.given.tolist() == LABELS.tolist()
    assert found.named.class_names == Data.classes


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.full((3, 4, 4), 2.0)], r"dataset\[0\] has pixels from 2.00"),
        ([torch.full((3, 4, 4), torch.nan)], "pixels from nan"),
        ([], "the data set is empty"),
        ([pixels()[0], pixels(side=4)[0]], "several shapes"),
        (["text"], r"dataset\[0\] is"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        from_dataset(Data(samples), 8, None)


def test_a_data_set_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"no \(sample, label\) but ndarray"):
        from_dataset(pixels(), 8, None)


@pytest.fixture
def folder(tmp_path):
    """Two classes, a file that is no image, and one that only a decoder finds broken."""
    for row, image in enumerate(pixels(side=20)):
        path = tmp_path / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).resize((20, 30)).save(path)
    (tmp_path / "a" / "page.jpg").write_bytes(b"<html>")
    return tmp_path


def test_folders(folder):
    found = from_folder(folder, 16)
    assert found.values.shape == (6, 16, 16, 3)
    assert found.named.class_names == ("a", "b")
    assert sorted(found.named.files) == sorted(f"{'ab'[row % 2]}/{row}.png" for row in range(6))
    assert [path for path, _ in found.unusable] == ["a/page.jpg"]
    picture = Image.open(io.BytesIO(found.reader.read(0).tobytes()))
    assert picture.size == (20, 30)


def test_a_file_that_broke_since_is_left_out_and_named(folder):
    from_folder(folder, 16)  # which indexes
    path = folder / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    found = from_folder(folder, 16)
    assert "b/3.png" not in found.named.files
    assert len(found.values) == len(found.named.files) == 5
    assert "b/3.png" in dict(found.unusable)
    assert found.named.files[4] == "b/5.png"  # numbered anew, pictures too
    assert found.reader.read(4).tobytes() == (folder / "b" / "5.png").read_bytes()


def test_an_index_is_not_taken_for_the_folder(folder):
    said = []
    from_folder(folder, 16, say=said.append)
    assert not any("index folder" in line for line in said)
    from_folder(folder, 16, say=said.append)
    assert any("mentorch index folder" in line for line in said)


def test_what_is_not_for_training_is_not_missed(tmp_path):
    for split in ("train", "val"):
        for row, image in enumerate(pixels(side=8)):
            path = tmp_path / split / "ab"[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (tmp_path / "val" / "a" / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "train" / "b" / "page.jpg").write_bytes(b"<html>")
    assert from_folder(tmp_path, 8).unusable == [("train/b/page.jpg", "broken")]
    assert from_folder(tmp_path, 8, max_label=1).unusable == []


def test_images_that_do_not_fit_into_memory_are_refused(folder):
    with pytest.raises(ValueError, match="smaller image size"):
        from_folder(folder, 200_000)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set or index"):
        from_folder(tmp_path / "missing", 16)
