"""ImageNet: training folders, the three validation layouts, and matching by wnid."""

import pytest

from mentorch.engine.data.imagenet import index_imagenet, match_labels
from mentorch.engine.data.webvision import index_webvision

W = ("n01440764", "n01443537", "n01484850", "n01491361")
VAL = [f"ILSVRC2012_val_{k:08d}" for k in range(1, 5)]  # of the classes 2, 0, 3, 0
LABELS = (2, 0, 3, 0)


@pytest.fixture
def train(put, tmp_path):
    for wnid in W:
        put(f"train/{wnid}/{wnid}_1.JPEG")
    return tmp_path


@pytest.fixture
def flat(put, train):
    for name in VAL:
        put(f"val/{name}.JPEG")
    return train


def _val(index):
    paths, labels = index.paths().to_pylist(), index.labels()
    status = index.table["status"].to_pylist()
    rows = [k for k, split in enumerate(index.table["split"].to_pylist()) if split == "val"]
    return {paths[k]: (int(labels[k]), status[k]) for k in rows}


FLAT = {f"val/{n}.JPEG": (y, "ok") for n, y in zip(VAL, LABELS, strict=True)}


def test_training_folders_alone(train, put):
    put(f"train/{W[0]}/{W[0]}_0.JPEG")
    put(f"train/{W[0]}/notes.txt", "x")
    index = index_imagenet(train)
    assert index.classes == index.class_names == W
    assert index.paths().to_pylist()[:2] == [f"train/{W[0]}/{W[0]}_{k}.JPEG" for k in (0, 1)]
    assert index.labels().tolist() == [0, 0, 1, 2, 3]
    assert index.dataset == "imagenet"


def test_wnid_folders(train, put, capsys):
    put(f"val/{W[2]}/{VAL[0]}.JPEG")
    put(f"val/{W[0]}/{VAL[1]}.JPEG")
    put(f"val/n09999999/{VAL[2]}.JPEG")
    assert _val(index_imagenet(train)) == {
        f"val/{W[2]}/{VAL[0]}.JPEG": (2, "ok"),
        f"val/{W[0]}/{VAL[1]}.JPEG": (0, "ok"),
    }
    assert "1 other classes are left out: ['n09999999']" in capsys.readouterr().out


def test_wnid_folders_without_training_images(put, tmp_path):
    put(f"val/{W[2]}/a.JPEG")
    put(f"val/{W[0]}/b.JPEG")
    index = index_imagenet(tmp_path)
    assert index.classes == (W[0], W[2])
    assert index.labels().tolist() == [0, 1]


@pytest.mark.parametrize("width", [1, 3])
def test_class_index_folders(put, tmp_path, width):
    """10 before 2 would be wrong: labels are numbers, whatever the folder names' order."""
    wnids = [f"n{k:08d}" for k in range(12)]
    put("LOC_synset_mapping.txt", "".join(f"{w} name {k}\n" for k, w in enumerate(wnids)))
    for label in (10, 2, 0):
        put(f"val/{label:0{width}d}/{label}.JPEG")
    index = index_imagenet(tmp_path)
    assert sorted(v[0] for v in _val(index).values()) == [0, 2, 10]
    assert _val(index)[f"val/{10:0{width}d}/10.JPEG"] == (10, "ok")
    assert index.class_names[10] == "name 10"


def test_class_index_folders_need_a_class_list(put, tmp_path):
    put("val/0/a.JPEG")
    with pytest.raises(ValueError, match=r"class-index folders.*--synsets FILE"):
        index_imagenet(tmp_path)
    synsets = put("my_synsets", f"{W[0]} tench\n")
    assert index_imagenet(tmp_path, synsets=synsets).classes == (W[0],)
    put("val/1/a.JPEG")
    with pytest.raises(ValueError, match="label 1 is out of range, there are 1 classes"):
        index_imagenet(tmp_path, synsets=synsets)
    put("val/00/b.JPEG")
    (tmp_path / "val/1/a.JPEG").unlink()
    with pytest.raises(ValueError, match="two folders for one class"):
        index_imagenet(tmp_path, synsets=synsets)


@pytest.mark.parametrize("place", ["", "val/", "info/"])
def test_flat_with_labels(flat, put, place):
    lines = [f"{name}.JPEG {label}\n" for name, label in zip(VAL, LABELS, strict=True)]
    put(f"{place}val.txt", "".join(reversed(lines)))
    assert _val(index_imagenet(flat)) == FLAT


def test_flat_with_wnids_by_name(flat, put):
    lines = [f"./val/{name}.JPEG\t{W[y]}\n" for name, y in zip(VAL, LABELS, strict=True)]
    assert _val(index_imagenet(flat, val_list=put("mine.txt", "".join(lines)))) == FLAT


def test_flat_with_a_wnid_a_line_goes_by_number(flat, put):
    put("imagenet_2012_validation_synset_labels.txt", "".join(f"{W[y]}\n" for y in LABELS))
    (flat / f"val/{VAL[1]}.JPEG").unlink()  # the others must not move up
    expected = {**FLAT, f"val/{VAL[1]}.JPEG": (0, "missing")}
    assert _val(index_imagenet(flat)) == expected


def test_flat_with_a_wnid_a_line_and_other_names(train, put):
    put("val/b.JPEG")
    put("val/a.JPEG")
    labels = put("val/imagenet_2012_validation_synset_labels.txt", f"{W[3]}\n{W[1]}\n")
    expected = {"val/a.JPEG": (3, "ok"), "val/b.JPEG": (1, "ok")}
    assert _val(index_imagenet(train)) == expected
    labels.write_text(f"{W[3]}\n")
    with pytest.raises(ValueError, match="1 wnids for the 2 images"):
        index_imagenet(train)


def test_flat_with_kaggles_solution(flat, put):
    rows = [f"{n},{W[y]} 1 2 3 4 {W[y]} 5 6 7 8\n" for n, y in zip(VAL, LABELS, strict=True)]
    put("LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(rows))
    assert _val(index_imagenet(flat)) == FLAT


@pytest.mark.parametrize("kind", ["by name", "a wnid a line", "kaggle"])
def test_flat_without_training_images_takes_the_lists_classes(put, tmp_path, kind):
    wnids = [W[label] for label in LABELS]
    for name in VAL:
        put(f"val/{name}.JPEG")
    pairs = list(zip(VAL, wnids, strict=True))
    if kind == "by name":
        put("val.txt", "".join(f"{name}.JPEG {wnid}\n" for name, wnid in pairs))
    elif kind == "kaggle":
        rows = "".join(f"{name},{wnid} 1 2 3 4\n" for name, wnid in pairs)
        put("LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}")
    else:
        put("imagenet_2012_validation_synset_labels.txt", "".join(f"{w}\n" for w in wnids))
    index = index_imagenet(tmp_path)
    assert index.classes == (W[0], W[2], W[3])
    given = {path: index.classes[label] for path, (label, _) in _val(index).items()}
    assert given == {f"val/{name}.JPEG": wnid for name, wnid in pairs}


def test_flat_with_numbers_and_nothing_else_needs_a_class_list(put, tmp_path):
    put(f"val/{VAL[0]}.JPEG")
    put("val.txt", f"{VAL[0]}.JPEG 2\n")
    with pytest.raises(ValueError, match=r"nothing says which wnid label 2 is; give --synsets"):
        index_imagenet(tmp_path)


def test_flat_leaves_out_other_classes_and_unlisted_images(flat, put, capsys):
    put("val.txt", f"{VAL[0]}.JPEG {W[2]}\n{VAL[1]}.JPEG n09999999\n")
    assert list(_val(index_imagenet(flat))) == [f"val/{VAL[0]}.JPEG"]
    printed = capsys.readouterr().out
    assert "1 validation images of other classes" in printed
    assert "2 images of val/ are not in" in printed


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a.JPEG 0\na.JPEG\n", r"val\.txt, line 2: 'a.JPEG' is neither"),
        ("a.JPEG 4\n", r"line 1: label 4 is out of range"),
        ("a.JPEG x\n", r"line 1: 'x' is neither a label nor a wnid"),
        ("a.JPEG 0\na.JPEG 1\n", r"line 2: 'a.JPEG' was listed before"),
        ("../a.JPEG 0\n", r"line 1: the path '../a.JPEG' leaves"),
        ("/a.JPEG 0\n", r"line 1: the path '/a.JPEG' leaves"),
        ("490\n361\n", r"line 1: .*development kit.*--val-list"),
        ("ImageId,PredictionString\nx,\n", r"line 2: 'x,' is not"),
        ("", "is empty"),
        ("a.JPEG n09999999\n", "none of its wnids is among the 4 classes"),
    ],
)
def test_a_wrong_validation_list_is_named(flat, put, text, error):
    put("val.txt", text)
    with pytest.raises(ValueError, match=error):
        index_imagenet(flat)


def test_flat_without_a_list(flat, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of val\.txt.*--val-list FILE"):
        index_imagenet(flat)
    with pytest.raises(FileNotFoundError, match=r"--val-list .* is not a file"):
        index_imagenet(flat, val_list=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"--synsets .* is not a file"):
        index_imagenet(flat, synsets=tmp_path / "none")


def test_wrong_root(put, tmp_path):
    put("images/a.JPEG")
    with pytest.raises(FileNotFoundError, match=r"no images under .*/train or .*/val"):
        index_imagenet(tmp_path)


def test_training_folders_outside_the_class_list(train, put):
    put("synset_words.txt", f"{W[0]} tench\n")
    with pytest.raises(ValueError, match=r"folders that are not in .*synset_words\.txt"):
        index_imagenet(train)


def test_match_labels_by_wnid(webvision, put, wnids):
    for wnid in (wnids[3], "n00000001", wnids[1]):
        put(f"ilsvrc/val/{wnid}/a.JPEG")
    index = index_imagenet(webvision / "ilsvrc")
    assert index.classes == ("n00000001", wnids[1], wnids[3])
    labels = match_labels(index, index_webvision(webvision).classes)
    assert labels.tolist() == [-1, 1, 3]
    assert match_labels(index, wnids[:2]).tolist() == [-1, 1, -1]
