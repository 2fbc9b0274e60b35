"""Folders of class folders."""

import os

import pytest

from mentorch.engine.data.folder import index_folder


def _rows(index):
    names = ("path", "label", "split")
    return list(zip(*(index.table[n].to_pylist() for n in names), strict=True))


def test_train_and_val(put, tmp_path):
    for path in ("train/b/x.jpg", "train/a/deep/er/y.PNG", "train/a/x.jpg", "val/b/x.jpg"):
        put(path)
    index = index_folder(tmp_path)
    assert index.classes == ("a", "b")
    assert _rows(index) == [
        ("train/a/deep/er/y.PNG", 0, "train"),
        ("train/a/x.jpg", 0, "train"),
        ("train/b/x.jpg", 1, "train"),
        ("val/b/x.jpg", 1, "val"),
    ]
    assert (tmp_path / "folder.index.parquet").is_file()


def test_class_folders_alone(put, tmp_path, capsys):
    for path in ("dog/x.jpg", "Katze ü/x.jpg", "dog/notes.txt", "dog/.hidden.jpg", ".git/x/y.jpg"):
        put(path)
    (tmp_path / "logs").mkdir()
    assert _rows(index_folder(tmp_path)) == [
        ("Katze ü/x.jpg", 0, "train"),
        ("dog/x.jpg", 1, "train"),
    ]
    printed = capsys.readouterr().out
    assert "1 .txt" in printed
    assert "no images in 1 folders" in printed
    assert "logs" in printed


def test_a_class_called_train_is_a_class(put, tmp_path):
    put("train/engine.jpg")
    put("car/x.jpg")
    assert index_folder(tmp_path).classes == ("car", "train")


def test_broken_names_and_links(put, tmp_path, capsys):
    put("a/x.jpg")
    put("elsewhere/y.jpg")
    (tmp_path / "a/link.jpg").symlink_to("nowhere")
    (tmp_path / "a/loop").symlink_to("../a")
    (tmp_path / "b").symlink_to("elsewhere")
    (tmp_path / os.fsdecode(b"a/\xff.jpg")).write_bytes(b"x")
    index = index_folder(tmp_path)
    status = dict(zip(index.paths().to_pylist(), index.table["status"].to_pylist(), strict=True))
    ok = dict.fromkeys(("a/x.jpg", "b/y.jpg", "elsewhere/y.jpg"), "ok")
    assert status == {"a/link.jpg": "missing", **ok}
    assert "names that are not UTF-8" in capsys.readouterr().out


def test_a_validation_class_that_train_lacks(put, tmp_path):
    put("train/a/x.jpg")
    put("val/b/x.jpg")
    with pytest.raises(ValueError, match=r"has classes that .* lacks: b"):
        index_folder(tmp_path)


def test_no_images(put, tmp_path):
    put("a/notes.txt", "x")
    with pytest.raises(FileNotFoundError, match="no class folder with images"):
        index_folder(tmp_path)
