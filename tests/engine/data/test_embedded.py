"""The embedded data set, all the way to its index."""

import shutil

import numpy as np
import pytest

from mentorch.engine.data.embedded import SIZES, WNIDS, write_embedded
from mentorch.engine.data.imagenet import index_imagenet, match_labels
from mentorch.engine.data.webvision import index_webvision


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    pytest.importorskip("sklearn")
    return write_embedded(tmp_path_factory.mktemp("embedded") / "digits")


@pytest.fixture(scope="module")
def index(tree):
    return index_webvision(tree, workers=0)


def test_counts_and_the_two_broken_files(tree, index, capsys):
    counts = index.counts()
    assert counts["train", "google", "ok"] == SIZES["google"] - 2
    assert counts["train", "google", "broken"] == 2
    assert counts["train", "flickr", "ok"] == SIZES["flickr"]
    assert counts["val", "val", "ok"] == SIZES["val"]
    assert index.classes == WNIDS
    assert index.class_names[3] == "three, 3"
    assert set(map(tuple, index.sizes()[index.select("train")].tolist())) == {(96, 96)}
    reasons = (tree / "webvision.index.quarantine.jsonl").read_text()
    assert "truncated" in reasons
    assert "HTML" in reasons


def test_labels_carry_the_papers_noise(index):
    rows = index.select("train")
    wrong = index.labels()[rows] != index.clean_labels()[rows]
    assert index.clean_labels()[rows].min() >= 0
    assert wrong.mean() == pytest.approx(0.4 * 0.9, abs=4 * np.sqrt(0.23 / len(rows)))
    assert (index.clean_labels()[index.select("val")] == -1).all()


def test_query_folders_match_the_given_labels(tree, index, capsys):
    index_webvision(tree, workers=0)
    assert "another label" not in capsys.readouterr().out


def test_ilsvrc_is_the_same_classes_and_other_digits(tree, index):
    ilsvrc = index_imagenet(tree / "ilsvrc", workers=0)
    assert len(ilsvrc.select("val")) == SIZES["ilsvrc"]
    assert (match_labels(ilsvrc, index.classes) == ilsvrc.labels()).all()
    assert len(index) + len(ilsvrc) == 1797


def test_images_show_their_clean_label(tree, index):
    """Nearest class mean of the validation images knows most training digits by the clean label."""
    from PIL import Image

    def pixels(rows):
        files = [tree / index.path(int(row)) for row in rows]
        small = [Image.open(file).convert("L").resize((8, 8)) for file in files]
        return np.array([np.asarray(image, float) for image in small]).reshape(-1, 64)

    train, val = index.select("train")[:200], index.select("val")
    seen, labels = pixels(val), index.labels()[val]
    means = np.stack([seen[labels == c].mean(axis=0) for c in range(10)])
    nearest = ((pixels(train)[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == index.clean_labels()[train]).mean() > 0.8
    assert (nearest == index.labels()[train]).mean() < 0.75


def test_a_complete_tree_is_reused_and_made_alike(tree, tmp_path):
    stamp = (tree / "info/README.txt").stat().st_mtime_ns
    assert write_embedded(tree) == tree
    assert (tree / "info/README.txt").stat().st_mtime_ns == stamp
    other = write_embedded(tmp_path / "again")
    mine = {p.relative_to(other): p.read_bytes() for p in other.rglob("*") if p.is_file()}
    theirs = {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    assert mine == {p: data for p, data in theirs.items() if ".index." not in p.name}
    assert list(tmp_path.iterdir()) == [other]


def test_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        write_embedded(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mentorch.engine.data.embedded._write_ilsvrc", full)
    with pytest.raises(OSError, match="No space"):
        write_embedded(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tree, tmp_path, monkeypatch):
    """Two ranks write at the same time: the second finds the tree in its place and takes it."""
    from mentorch.engine.data import embedded

    def meanwhile(root):
        shutil.copytree(tree, tmp_path / "digits")
        (root / "info").mkdir()

    monkeypatch.setattr(embedded, "_write_tree", meanwhile)
    assert write_embedded(tmp_path / "digits") == tmp_path / "digits"
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
