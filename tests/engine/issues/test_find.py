"""`find_label_issues` and `mentorch find-issues`, from data to page."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

import mentorch
from mentorch.engine import cli
from mentorch.engine.issues import command, find
from mentorch.engine.issues.recipe import Recipe

# On the CPU, also where there is a GPU: ranks of other tests are forked from this process.
QUICK = {"epochs": 6, "batch_size": 32, "folds": 3, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    features, given, clean = data
    out = tmp_path_factory.mktemp("out") / "new"
    names = [f"class <{c}>" for c in range(3)]
    return mentorch.find_label_issues(
        features, given, clean_labels=clean, class_names=names, out=out, **QUICK
    ), out


def test_wrong_labels_come_first(found, data):
    _, given, clean = data
    wrong = given != clean
    scores = found[0].scores.sort_by("sample_id").to_pydict()
    assert scores["sample_id"] == list(range(len(given)))
    assert roc_auc_score(wrong, scores["suspicion"]) > 0.98
    np.testing.assert_array_equal(np.array(scores["suspect"]), wrong)
    assert found[0].noise.rate == pytest.approx(wrong.mean(), abs=0.05)


def test_the_table_is_of_the_probabilities(found, data):
    _, given, _ = data
    rows = found[0].scores.to_pydict()
    ids = np.array(rows["sample_id"])
    of_given = found[0].probabilities[ids, given[ids]]
    np.testing.assert_allclose(rows["suspicion"], 1 - of_given, atol=1e-6)
    assert (np.diff(of_given) >= 0).all()
    assert rows["rank"] == list(range(1, len(ids) + 1))
    assert rows["predicted_label"] == found[0].probabilities[ids].argmax(1).tolist()
    # Of the same students: together they are no more than all.
    np.testing.assert_allclose(rows["given_probability"], of_given, atol=1e-6)
    of_predicted = found[0].probabilities[ids].max(1)
    np.testing.assert_allclose(rows["predicted_probability"], of_predicted, atol=1e-6)
    assert set(rows["visits"]) == {QUICK["epochs"]}


def test_clean_labels_decide_nothing(found, data):
    features, given, _ = data
    again = mentorch.find_label_issues(features, given, **QUICK)
    np.testing.assert_array_equal(again.probabilities, found[0].probabilities)


def test_suspects_are_what_students_do_not_believe(found, data):
    _, given, _ = data
    ids = found[0].suspects["sample_id"].to_numpy()
    probabilities = found[0].probabilities
    rows = np.arange(len(given))
    wanted = (probabilities.argmax(1) != given) & (probabilities[rows, given] < 0.5)
    assert sorted(ids) == np.flatnonzero(wanted).tolist()


def test_what_is_written(found):
    made, out = found
    assert {path.name for path in out.iterdir()} == {
        "sample_scores.parquet", "label_issues.html", "settings.json",
    }  # fmt: skip
    assert pq.read_table(out / "sample_scores.parquet").equals(made.scores)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["found"]["noise_rate"] == made.noise.rate
    assert settings["recipe"]["epochs"] == QUICK["epochs"]
    assert settings["recipe"]["student"] == "a hidden layer of 256"  # what "auto" was
    page = (out / "label_issues.html").read_text()
    assert "class &lt;1&gt;" in page
    assert "class <1>" not in page
    assert f"{made.noise.rate:.1%}" in page
    assert "How well wrong labels are found" in page  # clean labels were given
    assert re.search(r'(?:href|src)="https?:', page) is None
    assert set(re.findall(r'href="#([a-z-]+)"', page)) <= set(re.findall(r'id="([a-z-]+)"', page))


def test_random_numbers_of_the_caller_go_on(data):
    features, given, _ = data
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()
    mentorch.find_label_issues(features, given, **QUICK)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_a_student_of_the_callers(data):
    features, given, _ = data
    asked = []

    def make(num_classes):
        asked.append(num_classes)
        return nn.Linear(4, num_classes)

    found = mentorch.find_label_issues(features, given, student=make, **QUICK)
    assert asked == [3] * QUICK["folds"]
    assert found.student.endswith("make")  # and no address, which would differ every time


class Images:
    """A data set of PyTorch's kind."""

    def __len__(self):
        return 60

    def __getitem__(self, row):
        return np.full((28, 28), 60 + 120 * (row % 2), np.uint8), row % 2


def test_a_data_set_and_pictures(tmp_path):
    found = mentorch.find_label_issues(Images(), out=tmp_path, samples_shown=5, **QUICK)
    assert found.noise.rate == 0
    assert (tmp_path / "label_issues.html").read_text().count("data:image/jpeg") == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, g, out: mentorch.find_label_issues(f), "arrays need labels"),
        (lambda f, g, out: mentorch.find_label_issues(f, g, epoch=3), "no option 'epoch'.*epochs"),
        (lambda f, g, out: mentorch.find_label_issues(str(out), g), "labels go with arrays"),
        (lambda f, g, out: mentorch.find_label_issues(f, g, max_label=2), "max_label is for"),
        (lambda f, g, out: mentorch.find_label_issues(f, 0 * g), "one class only"),
        (
            lambda f, g, out: mentorch.find_label_issues(f, 0 * g, class_names=["a", "b"]),
            "one class only",
        ),
        (lambda f, g, out: mentorch.find_label_issues(Images(), g), "labels go with arrays"),
        (
            lambda f, g, out: mentorch.find_label_issues(f[:7], [0, 0, 0, 1, 1, 1, 2]),
            "1 classes have a single sample, such as 2",
        ),
        (lambda f, g, out: mentorch.find_label_issues(f, g, student=nn.Linear(4, 3)), "a module"),
        pytest.param(
            lambda f, g, out: mentorch.find_label_issues(f, g, device="cuda"),
            "no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (lambda f, g, out: mentorch.find_label_issues(f, g, student="resnet18"), "is for images"),
        (lambda f, g, out: mentorch.find_label_issues(f, g, curriculum="none"), "'none'"),
        (lambda f, g, out: mentorch.find_label_issues(out, class_names=["a"]), "no class_names"),
        (
            lambda f, g, out: mentorch.find_label_issues(
                f, g, student=lambda c: nn.Linear(4, c), weights=out
            ),
            "load them in the function",
        ),
        (lambda f, g, out: mentorch.find_label_issues(f, g, folds=400), "too few for 400 folds"),
        (
            lambda f, g, out: mentorch.find_label_issues([torch.ones(2), torch.ones(3)], [0, 1]),
            r"several shapes, such as \[\(2,\), \(3,\)\]",
        ),
    ],
)
def test_what_cannot_be_done_is_said(call, message, data, tmp_path):
    features, given, _ = data
    with pytest.raises(ValueError, match=message):
        call(features, given, tmp_path)


def test_a_place_that_cannot_be_written_is_found_before_training(data, tmp_path, monkeypatch):
    features, given, _ = data
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(find, "judge", lambda *_: pytest.fail("trained first"))
    with pytest.raises(FileExistsError):
        mentorch.find_label_issues(features, given, out=tmp_path / "file", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": "restnet18"}, "no model 'restnet18'.*resnet18"),
        ({"weights": "no.safetensors"}, "no file of weights no.safetensors"),
        ({"burn_in": 2.0}, "burn_in"),
        ({"curriculum": "none"}, "'none'"),
        ({"image_size": 4}, "image_size is 4 pixels"),
        ({"samples_shown": -1}, "at least 0, got -1"),
    ],
)
def test_wrong_options_are_found_before_anything_is_read(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "from_folder", lambda *_: pytest.fail("read first"))
    options = {n: Path(v) if n == "weights" else v for n, v in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mentorch.find_label_issues(tmp_path, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights_of_images_are_not_for_features(data, tmp_path):
    features, given, _ = data
    file = tmp_path / "some.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"some\.safetensors is for images.*features of 4"):
        mentorch.find_label_issues(features, given, weights=file, **QUICK)


def test_what_no_student_could_judge_has_no_prediction(data, monkeypatch):
    features, given, _ = data

    def judge_all_but_one(*arguments, **options):
        found = judge(*arguments, **options)
        found.probabilities[7] = np.nan
        return found

    judge = find.judge
    monkeypatch.setattr(find, "judge", judge_all_but_one)
    found = mentorch.find_label_issues(features, given, **QUICK)
    row = found.scores.filter(pc.equal(found.scores["sample_id"], 7)).to_pylist()[0]
    assert row["predicted_label"] is None
    assert not row["suspect"]


def test_the_table_is_there_before_the_page(found, tmp_path, monkeypatch):
    """Hours of training are not lost to a picture."""
    monkeypatch.setattr("mentorch.engine.issues.page.render_issues", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found[0].write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sample_scores.parquet", "settings.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bright and dark images; one bright image in ten lies among the dark."""
    root = tmp_path_factory.mktemp("data") / "photos"
    noise = np.random.default_rng(0)
    for row in range(80):
        bright = row % 2
        pixels = noise.integers(0, 100, (12, 12, 3)) + 150 * bright
        label = "dark" if not bright or row % 20 == 1 else "bright"
        path = root / label / f"{row:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    (root / "dark" / "page.jpg").write_bytes(b"<html>")
    return root


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(epochs=8, batch_size=16, folds=2)
    command.find_issues(folder, image_size=28, samples=3, device="cpu", recipe=recipe)
    said = capsys.readouterr().out
    assert "1 files could not be used" in said
    top = [line.split()[-1] for line in said.splitlines() if re.match(r" +\d+  ", line)][:4]
    assert set(top) == {f"dark/{row:02d}.jpg" for row in (1, 21, 41, 61)}
    out = tmp_path / "issues-photos"  # also for the index in that folder
    for written in out.iterdir():
        written.rename(written.with_suffix(".before"))
    index = folder / "folder.index.parquet"
    command.find_issues(index, image_size=28, samples=3, device="cpu", recipe=recipe)
    page = (out / "label_issues.html").read_text()
    assert page.count("data:image/jpeg") == 3
    assert "page.jpg" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "no data set or index at missing"),
        ([".", "--samples", "-1"], "samples shown must be at least 0"),
        ([".", "--image-size", "4"], "at least 8"),
        ([".", "--folds", "1"], "folds is 1"),
    ],
)
def test_wrong_words_are_answered_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mentorch", "find-issues", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert list(tmp_path.iterdir()) == []
