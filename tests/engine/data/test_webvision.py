"""WebVision's layouts and what can be wrong with them; also what every kind of index shares."""

import json
import shutil

import pytest

from mentorch.engine.data import verify
from mentorch.engine.data.index import Index
from mentorch.engine.data.webvision import index_webvision


def _rows(index):
    names = ("path", "label", "split", "source", "status")
    return list(zip(*(index.table[n].to_pylist() for n in names), strict=True))


def test_rows_are_in_list_order(webvision, wnids, capsys):
    index = index_webvision(webvision)
    rows = _rows(index)
    assert rows[0] == ("google/q0001/same name 0.jpg", 0, "train", "google", "ok")
    assert rows[5] == ("google/q0002/same name 1.jpg", 1, "train", "google", "ok")
    assert rows[6] == ("flickr/q0001/same name 0.jpg", 0, "train", "flickr", "ok")
    assert rows[9] == ("val_images_256/val000001.jpg", 0, "val", "val", "ok")
    assert len(rows) == 13
    assert index.classes == wnids
    assert index.class_names[0] == f"name of {wnids[0]}, other"
    assert index.clean_labels().tolist() == [-1] * 13
    assert index.noise is None
    assert index.table.equals(Index.read(webvision / "webvision.index.parquet").table)
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("Google, listed 6 expected 980,449", "mini protocol, Google 6", "classes 4"):
        assert words in printed


def test_mini_protocol_is_a_selection(webvision):
    index = index_webvision(webvision)
    assert index.select("train", sources=("google",), max_label=2).tolist() == [0, 1, 4, 5]


def test_again_is_the_same_file_and_decodes_nothing(webvision, monkeypatch):
    (webvision / "google/q0001/same name 0.jpg").unlink()
    index_webvision(webvision)
    out = webvision / "webvision.index.parquet"
    first = out.read_bytes()
    decoded = []
    probe = verify.probe_images

    def spy(root, paths, known):
        decoded.extend(p for p, k in zip(paths, known, strict=True) if k is None)
        return probe(root, paths, known)

    monkeypatch.setattr(verify, "probe_images", spy)
    index_webvision(webvision)
    assert out.read_bytes() == first
    assert decoded == ["google/q0001/same name 0.jpg"]  # bad files may have been repaired
    decoded.clear()
    index_webvision(webvision, reverify=True)
    assert len(decoded) == 13
    assert out.read_bytes() == first


def test_a_changed_file_is_decoded_again(webvision, put):
    index_webvision(webvision)
    put("flickr/q0002/same name 0.jpg", "no longer an image")
    assert _rows(index_webvision(webvision))[7][4] == "broken"


def test_bad_files_are_quarantined_and_stop_nothing(webvision, put, capsys):
    put("google/q0001/same name 0.jpg", "<html>")
    put("flickr/q0003/same name 0.jpg", b"")
    (webvision / "val_images_256/val000004.jpg").unlink()
    index = index_webvision(webvision)
    bad = {path: status for path, _, _, _, status in _rows(index) if status != "ok"}
    assert bad == {
        "google/q0001/same name 0.jpg": "broken",
        "flickr/q0003/same name 0.jpg": "broken",
        "val_images_256/val000004.jpg": "missing",
    }
    quarantine = webvision / "webvision.index.quarantine.jsonl"
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["path"]: line["status"] for line in lines} == bad
    assert lines[1]["reason"] == "empty file"
    printed = capsys.readouterr().out
    assert "3 files are left out" in printed
    assert "missing: val_images_256/val000004.jpg (no such file)" in printed
    assert index.sizes()[0].tolist() == [0, 0]


def test_the_quarantine_goes_when_all_is_well(webvision, put):
    put("google/q0001/same name 0.jpg", "<html>")
    index_webvision(webvision)
    put("google/q0001/same name 0.jpg")
    index_webvision(webvision)
    assert not (webvision / "webvision.index.quarantine.jsonl").exists()


@pytest.mark.parametrize("lists_in_root", [False, True])
def test_old_layout(webvision, lists_in_root, put):
    """Train images under train_images_256/, lists in ROOT, val lines that carry their folder."""
    for source in ("google", "flickr"):
        (webvision / "train_images_256").mkdir(exist_ok=True)
        (webvision / source).rename(webvision / "train_images_256" / source)
    lines = (webvision / "info/val_filelist.txt").read_text().splitlines()
    put("info/val_filelist.txt", "".join(f"val_images_256/{line}\n" for line in lines))
    if lists_in_root:
        for file in (webvision / "info").iterdir():
            file.rename(webvision / file.name)
    rows = _rows(index_webvision(webvision))
    assert {row[4] for row in rows} == {"ok"}
    assert rows[0][0] == "train_images_256/google/q0001/same name 0.jpg"
    assert [row[3] for row in rows[:9]] == ["google"] * 6 + ["flickr"] * 3
    assert rows[9][0] == "val_images_256/val000001.jpg"


def test_google_alone_is_enough(webvision, capsys):
    (webvision / "info/train_filelist_flickr.txt").unlink()
    (webvision / "info/val_filelist.txt").unlink()
    rows = _rows(index_webvision(webvision))
    assert [row[3] for row in rows] == ["google"] * 6
    printed = capsys.readouterr().out
    assert "train_filelist_flickr.txt was not found" in printed
    assert "training images only" in printed


def test_the_list_of_all_stands_in_for_both(webvision):
    info = webvision / "info"
    both = [info / f"train_filelist_{source}.txt" for source in ("google", "flickr")]
    (info / "train_filelist_all.txt").write_text("".join(file.read_text() for file in both))
    expected = _rows(index_webvision(webvision))
    for file in both:
        file.unlink()
    assert _rows(index_webvision(webvision)) == expected


def test_clean_labels(webvision, put):
    text = "flickr/q0001/same name 0.jpg 3\ngoogle/q0002/same name 0.jpg 1\n"
    put("info/clean_labels.txt", text)
    clean = index_webvision(webvision).clean_labels()
    assert {row: int(y) for row, y in enumerate(clean) if y >= 0} == {6: 3, 1: 1}
    put("info/clean_labels.txt", text + "google/q0009/other.jpg 1\n")
    with pytest.raises(ValueError, match=r"clean_labels\.txt, line 3: .*in no other list"):
        index_webvision(webvision)


def test_images_in_another_classes_query_folder_are_counted(webvision, put, capsys):
    index_webvision(webvision)
    assert "another label" not in capsys.readouterr().out
    put("info/queries_synsets_map.txt", "1 1\n2 1\nq0003 3\nnonsense\n")
    index_webvision(webvision)
    assert "3 images have another label" in capsys.readouterr().out  # label 1, in q0002


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("train_filelist_google.txt", "google/a.jpg 4\n", r"line 1: label 4 is out of range"),
        ("val_filelist.txt", "val000001.jpg 0\nval000002.jpg\n", r"val_filelist\.txt, line 2"),
        ("train_filelist_flickr.txt", "../../x.jpg 0\n", r"flickr\.txt, line 1: the path"),
        ("train_filelist_google.txt", "a.jpg 0\na.jpg 1\n", r"google\.txt, line 2: 'a\.jpg' was"),
    ],
)
def test_a_wrong_line_is_an_error_before_any_image_is_read(webvision, put, name, text, error):
    put(f"info/{name}", text)
    with pytest.raises(ValueError, match=error):
        index_webvision(webvision)
    assert not list(webvision.glob("*.parquet"))
    assert not list(webvision.glob("*.jsonl"))


def test_wrong_roots(webvision, tmp_path, put):
    with pytest.raises(FileNotFoundError, match=r"ROOT .*nowhere does not exist"):
        index_webvision(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        index_webvision(put("file", "x"))
    with pytest.raises(FileNotFoundError, match="ROOT is the folder that holds info/"):
        index_webvision(webvision / "google")
    (webvision / "info/synsets.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"synsets\.txt is missing"):
        index_webvision(webvision)


def test_only_the_lists_are_there(webvision):
    for folder in ("google", "flickr", "val_images_256"):
        shutil.rmtree(webvision / folder)
    with pytest.raises(ValueError, match=r"none of the 13 images .*same name 0.jpg': no such file"):
        index_webvision(webvision)
    assert not list(webvision.glob("*.parquet"))
    assert not list(webvision.glob("*journal*"))


def test_out(webvision, tmp_path):
    out = tmp_path / "elsewhere.parquet"
    index = index_webvision(webvision, out=out)
    assert Index.read(out).table.equals(index.table)
    with pytest.raises(FileNotFoundError, match=r"folder of --out .* does not exist"):
        index_webvision(webvision, out=tmp_path / "none/x.parquet")
    with pytest.raises(ValueError, match="is a folder; give the name of the Parquet file"):
        index_webvision(webvision, out=tmp_path)


def test_a_root_that_cannot_be_written_names_out(webvision, monkeypatch):
    def read_only(self):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("mentorch.engine.data.journal.Journal.open", read_only)
    with pytest.raises(ValueError, match=r"Read-only file system.*--out FILE"):
        index_webvision(webvision)


def test_what_is_at_out_is_not_lost(webvision, put):
    out = put("notes.parquet", "my notes")
    with pytest.raises(ValueError, match=r"notes\.parquet is in the way"):
        index_webvision(webvision, out=out)
    assert out.read_text() == "my notes"


def test_an_index_of_another_root_is_not_believed(webvision, tmp_path, put):
    out = tmp_path / "shared.parquet"
    index_webvision(webvision, out=out)
    copy = tmp_path / "copy"
    shutil.copytree(webvision, copy)
    size = (copy / "flickr/q0001/same name 0.jpg").stat().st_size
    put("copy/flickr/q0001/same name 0.jpg", b"x" * size)
    assert _rows(index_webvision(copy, out=out))[6][4] == "broken"
