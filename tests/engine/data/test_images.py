"""Readers of the small image sets: files of the exact formats, and each way in which they can be
wrong."""

import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from mentorch.engine.data.images import FASHION_ROOT, ImageSet, cifar_n_labels, load_images

RNG = np.random.default_rng(0)


def idx(array, magic=None):
    """An array in MNIST's format."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return struct.pack(">I", magic or 0x0800 + array.ndim) + sizes + array.tobytes()


def bytes_like(*shape, below=256):
    return RNG.integers(0, below, shape, dtype=np.uint8)


def mnist_arrays():
    """Unequal numbers, so that a split taken for the other shows; all ten labels at the least."""
    labels = np.arange(12, dtype=np.uint8) % 10
    return {
        "train-images-idx3-ubyte": bytes_like(12, 28, 28),
        "train-labels-idx1-ubyte": labels,
        "t10k-images-idx3-ubyte": bytes_like(11, 28, 28),
        "t10k-labels-idx1-ubyte": labels[:11][::-1].copy(),
    }


@pytest.fixture
def mnist(put, tmp_path):
    arrays = mnist_arrays()
    for name, array in arrays.items():
        put(name, idx(array))
    return tmp_path, arrays


@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "dotted", "dotted.gz"])
def test_mnist_in_every_spelling(put, tmp_path, spelling):
    arrays = mnist_arrays()
    for name, array in arrays.items():
        name = spelling.format(name) if "{" in spelling else name.replace("-idx", ".idx")
        name += ".gz" if spelling == "dotted.gz" else ""
        put(name, gzip.compress(idx(array)) if name.endswith(".gz") else idx(array))
    got = load_images("mnist", tmp_path)
    expected = list(arrays.values())
    for tensor, array in zip(
        (got.images[..., 0], got.labels, got.test_images[..., 0], got.test_labels),
        expected,
        strict=True,
    ):
        assert np.array_equal(tensor.numpy(), array)
    assert got.images.shape == (12, 28, 28, 1)
    assert got.images.dtype == torch.uint8
    assert got.labels.dtype == got.test_labels.dtype == torch.int64
    assert (got.name, got.num_classes, got.classes[3]) == ("mnist", 10, "3")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = np.zeros((12, 28, 28), np.uint8)
BAD_IDX = {
    "magic": (IMAGES, idx(PIXELS, 0x0D03), r"begins with the numbers \[3331, 12, 28, 28\], exp"),
    "labels for images": (IMAGES, idx(PIXELS.ravel()[:16]), r"expected \[2051, 'n', 28, 28\]"),
    "images for labels": (LABELS, idx(PIXELS), r"expected \[2049, 'n'\] with n from 1"),
    "other pixels": (IMAGES, idx(np.zeros((12, 32, 28), np.uint8)), r"\[2051, 12, 32, 28\]"),
    "empty": (IMAGES, b"", r"begins with the numbers \[\]"),
    "cut header": (IMAGES, idx(PIXELS)[:15], r"begins with the numbers \[2051, 12, 28\]"),
    "no items": (IMAGES, idx(PIXELS[:0]), r"\[2051, 0, 28, 28\].* n from 1 to 1,000,000"),
    "too many": (IMAGES, struct.pack(">4I", 2051, 1_000_001, 28, 28), r"\[2051, 1000001, 28"),
    "short": (IMAGES, idx(PIXELS)[:-1], "has 9,407 bytes after its header, expected 9,408"),
    "long": (IMAGES, idx(PIXELS) + b"\0", "has more bytes after its header, expected 9,408"),
    "counts": (IMAGES, idx(PIXELS[:9]), f"has 9 images, but .*{LABELS} has 12 labels"),
    "range": (LABELS, idx(np.arange(12, dtype=np.uint8)), "labels from 0 to 11, expected 0 to 9"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_wrong_idx_file_is_refused(mnist, put, tmp_path, case):
    name, content, message = BAD_IDX[case]
    put(name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_images("mnist", tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-20],  # ends early
        lambda whole: b"no gzip" + whole,
        lambda whole: whole[:40] + bytes(40) + whole[80:],  # another checksum
        lambda whole: whole[:10] + b"\xff" + whole[11:],  # no such kind of block
    ],
)
def test_a_damaged_gzip_file_is_refused(mnist, put, tmp_path, damage):
    (tmp_path / IMAGES).unlink()
    put(f"{IMAGES}.gz", damage(gzip.compress(idx(bytes_like(12, 28, 28)))))
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz is not a whole gzip file"):
        load_images("mnist", tmp_path)


def test_missing_idx_files_and_roots(mnist, tmp_path):
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    missing = r"has no t10k-labels-idx1-ubyte \(nor t10k-labels-idx1-ubyte.gz, t10k-labels.idx1-"
    with pytest.raises(FileNotFoundError, match=missing) as error:
        load_images("mnist", tmp_path)
    assert "apt-get" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist, or give"):
        load_images("fashion_mnist", tmp_path)
    with pytest.raises(ValueError, match="mnist has no default folder; give root="):
        load_images("mnist")
    with pytest.raises(ValueError, match=r"image set 'svhn' is unknown; it is one of .*'cifar100'"):
        load_images("svhn")


@pytest.mark.skipif(not FASHION_ROOT.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist():
    got = load_images("fashion_mnist")
    assert got.images.shape == (60_000, 28, 28, 1)
    assert got.test_images.shape == (10_000, 28, 28, 1)
    assert got.labels.bincount().tolist() == [6000] * 10
    assert got.test_labels.bincount().tolist() == [1000] * 10
    # The first training image is an ankle boot; trousers are dark at the sides.
    assert got.classes[got.labels[0]] == "Ankle boot"
    trousers = got.images[got.labels == got.classes.index("Trouser"), ..., 0].float().mean((0, 1))
    assert trousers[[0, 27]].max() < 5 < 50 < trousers[10:18].min()


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    got = load_images("digits")
    assert got.images.shape == (1297, 8, 8, 1)
    assert got.test_images.shape == (500, 8, 8, 1)
    # Every digit is in one split, once, with its label and its grey levels.
    whole = np.concatenate([got.images[..., 0].numpy(), got.test_images[..., 0].numpy()])
    labels = np.concatenate([got.labels.numpy(), got.test_labels.numpy()])
    levels = np.rint(whole.astype(float) * 16 / 255)
    assert np.array_equal(np.unique(whole), np.rint(np.arange(17) * 255 / 16))
    rows = np.column_stack([levels.reshape(1797, 64), labels])
    expected = np.column_stack([sklearn.data, sklearn.target])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))
    assert got.labels.bincount().min() > 100, "the split is not random"
    # The split is part of the format: its first labels, written down.
    assert got.labels[:8].tolist() == [8, 6, 8, 8, 7, 5, 3, 2]


# CIFAR

CIFAR = {"cifar10": (10, 1, "cifar-10-batches-bin"), "cifar100": (100, 2, "cifar-100-binary")}


def write_cifar(put, name, folder):
    """A set of 2 images a CIFAR-10 batch, and 10 for CIFAR-100; returns what is in it."""
    classes, label_bytes, _ = CIFAR[name]
    ten = name == "cifar10"
    train = [f"data_batch_{k}.bin" for k in range(1, 6)] if ten else ["train.bin"]
    parts = {}
    for file in (*train, "test_batch.bin" if ten else "test.bin"):
        n = 2 if file.startswith("data") else 10 if file == "train.bin" else 3
        images = bytes_like(n, 3, 32, 32)
        labels = bytes_like(n, label_bytes, below=classes)
        labels[0, -1] = classes - 1  # the highest is allowed
        put(f"{folder}/{file}", np.hstack([labels, images.reshape(n, -1)]).tobytes())
        parts[file] = (images.transpose(0, 2, 3, 1), labels[:, -1])
    names = "batches.meta.txt" if ten else "fine_label_names.txt"
    put(f"{folder}/{names}", "".join(f"class{k}\n" for k in range(classes)) + "\n")
    *trained, test = parts.values()
    return [np.concatenate(arrays) for arrays in zip(*trained, strict=True)] + list(test)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("inside", [True, False])
def test_cifar(put, tmp_path, name, inside):
    folder = CIFAR[name][2]
    expected = write_cifar(put, name, folder)
    got = load_images(name, tmp_path / folder if inside else tmp_path)
    tensors = (got.images, got.labels, got.test_images, got.test_labels)
    for tensor, array in zip(tensors, expected, strict=True):
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), array)
    assert got.labels.dtype == torch.int64
    assert got.classes == tuple(f"class{k}" for k in range(CIFAR[name][0]))


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cifar10", "data_batch_3.bin", bytes(3072), "has 3,072 bytes, expected .* of 3,073"),
        ("cifar10", "test_batch.bin", b"", "has 0 bytes, expected whole records of 3,073"),
        ("cifar100", "train.bin", bytes(3073), "of 3,074; .* not of cifar-100-binary.tar.gz"),
        ("cifar10", "data_batch_2.bin", b"\x0a" + bytes(3072), "from 10 to 10, expected 0 to 9"),
        ("cifar100", "test.bin", b"\0\x64" + bytes(3072), "from 100 to 100, expected 0 to 99"),
        ("cifar10", "batches.meta.txt", "cat\n", "has 1 names, not 10; unpack cifar-10-bin"),
    ],
)
def test_a_wrong_cifar_file_is_refused(put, tmp_path, name, file, content, message):
    write_cifar(put, name, CIFAR[name][2])
    path = put(f"{CIFAR[name][2]}/{file}", content)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        load_images(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar10", "data_batch_1"),
        ("cifar100", "cifar-100-python/meta"),
        ("cifar100", "meta"),
    ],
)
def test_the_pickled_version_is_named_and_not_loaded(put, tmp_path, name, pickled):
    put(pickled, b"cos\nabort\n(tR.")  # would end the process
    archive = f"{name.replace('cifar', 'cifar-')}-binary.tar.gz"
    with pytest.raises(ValueError, match=f"Python version, a pickle.* binary version, {archive}"):
        load_images(name, tmp_path)


def test_missing_cifar_files(put, tmp_path):
    with pytest.raises(ValueError, match="cifar10 has no default folder"):
        load_images("cifar10")
    with pytest.raises(FileNotFoundError, match=r"neither data_batch_1.bin nor cifar-10-batches-b"):
        load_images("cifar10", tmp_path)
    write_cifar(put, "cifar10", "here")
    (tmp_path / "here/data_batch_4.bin").unlink()
    (tmp_path / "here/batches.meta.txt").unlink()
    lacks = r"here lacks \['data_batch_4.bin', 'batches.meta.txt'\]; unpack cifar-10-binary"
    with pytest.raises(FileNotFoundError, match=lacks):
        load_images("cifar10", tmp_path / "here")


# CIFAR-N

N = 300
CLEAN = torch.arange(N) % 10


def human(**changes):
    """The dict of the published files: arrays, and the coarse labels as lists."""
    worse = (np.arange(N) * 7) % 10
    arrays = {
        "clean_label": CLEAN.numpy().copy(),
        "worse_label": worse,
        "random_label1": worse[::-1].copy(),
        "noisy_coarse_label": worse.tolist(),
    }
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def by_numpy_1(path):
    """Renames what numpy 2 calls otherwise: the published files' spelling."""
    old = path.with_name("numpy1.pt")
    spellings = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert spellings[0] in content
                content = content.replace(*spellings)
            target.writestr(f"numpy1/{name.split('/', 1)[1]}", content)
    return old


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", ">i8"])
@pytest.mark.filterwarnings("error")
def test_human_labels(tmp_path, numpy, dtype):
    arrays = {k: v.astype(dtype) if isinstance(v, np.ndarray) else v for k, v in human().items()}
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save(arrays, path)
    labels = cifar_n_labels(by_numpy_1(path) if numpy == 1 else path, "random_label1", CLEAN)
    assert labels.dtype == torch.int64
    assert np.array_equal(labels.numpy(), human()["random_label1"])


class Unfilled:
    """Loads as an array of another type although only integers are let through."""

    def __reduce__(self):
        return np.empty(0).__reduce__()[0], (np.ndarray, (N,), "d")


HUMAN = np.zeros(N, np.int64)
BAD_HUMAN = {
    "unknown": ({}, "no labels 'aggre_label'; it has ['worse_label', 'random_label1']"),
    "no clean": ({"clean_label": None}, "clean_label is NoneType [], expected 300 integers"),
    "length": ({"clean_label": HUMAN[:299]}, "clean_label is int64 [299], expected 300 integers"),
    "other set": ({"clean_label": HUMAN}, "differs from the labels given in 270 of 300 rows"),
    "no array": ({"aggre_label": [1] * N}, "aggre_label is list [], expected 300 integers"),
    "noise length": ({"aggre_label": HUMAN[:9]}, "aggre_label is int64 [9], expected 300 integers"),
    "unfilled": (
        {"aggre_label": Unfilled()},
        "aggre_label is float64 [300], expected 300 integers",
    ),
    "high": ({"aggre_label": HUMAN + 10}, "has labels from 10 to 10, expected 0 to 9"),
    "low": ({"aggre_label": HUMAN - 1}, "has labels from -1 to -1, expected 0 to 9"),
    "floats": ({"aggre_label": HUMAN + 0.5}, "cannot be read as integer arrays only (Unpickling"),
}


@pytest.mark.parametrize("case", BAD_HUMAN)
def test_wrong_human_labels_are_refused(tmp_path, case):
    changes, message = BAD_HUMAN[case]
    torch.save(human(**changes), tmp_path / "human.pt")
    with pytest.raises(ValueError, match=r"human.pt") as error:
        cifar_n_labels(tmp_path / "human.pt", "aggre_label", CLEAN)
    assert message in str(error.value)


class Evil:
    def __reduce__(self):
        return os.abort, ()


def test_a_file_cannot_run_code(tmp_path, put):
    torch.save({"clean_label": Evil()}, tmp_path / "evil.pt")  # loading it would end the process
    with pytest.raises(ValueError, match=r"evil.pt cannot be read as integer arrays only"):
        cifar_n_labels(tmp_path / "evil.pt", "aggre_label", CLEAN)
    with pytest.raises(ValueError, match=r"noise.pt cannot be read as integer arrays only"):
        cifar_n_labels(put("noise.pt", b"PK noise"), "aggre_label", CLEAN)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list, expected a dict"):
        cifar_n_labels(tmp_path / "list.pt", "aggre_label", CLEAN)
    with pytest.raises(FileNotFoundError, match=r"none.pt is missing; https://github.com/UCSC"):
        cifar_n_labels(tmp_path / "none.pt", "aggre_label", CLEAN)
    assert np.ndarray not in torch.serialization.get_safe_globals(), (
        "numpy stays allowed for other files"
    )


# The set itself


@pytest.mark.parametrize("rows", [np.array([4, 0, 3]), torch.tensor([4, 0, 3])])
def test_subset_takes_training_rows_and_leaves_the_test_rows(rows):
    images, labels = torch.from_numpy(bytes_like(5, 2, 2, 1)), torch.arange(5)
    whole = ImageSet("small", images, labels, images[:2], labels[:2], ("a",) * 5)
    some = whole.subset(rows)
    assert some.labels.tolist() == [4, 0, 3]
    assert torch.equal(some.images, images[[4, 0, 3]])
    assert torch.equal(some.test_images, images[:2])
    assert torch.equal(some.test_labels, labels[:2])
    assert (some.name, some.num_classes) == ("small", 5)


def test_to_moves_every_tensor():
    images, labels = torch.zeros(5, 2, 2, 1, dtype=torch.uint8), torch.arange(5)
    moved = ImageSet("small", images, labels, images[:2], labels[:2], ("a",)).to("meta")
    tensors = (moved.images, moved.labels, moved.test_images, moved.test_labels)
    assert [t.device.type for t in tensors] == ["meta"] * 4
    assert [len(t) for t in tensors] == [5, 5, 2, 2]
