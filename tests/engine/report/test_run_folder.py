"""Reading a run folder: what is missing is said, and labels that changed are noticed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mentorch.engine.checkpoint import pack
from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.pipelines import digest
from mentorch.engine.report.command import report
from mentorch.engine.report.run_folder import read_run


def _checkpoint(folder: Path) -> Path:
    (found,) = (folder / "checkpoints").iterdir()
    return found


@pytest.mark.parametrize(
    ("gone", "kind", "message"),
    [
        (lambda folder: folder / "config.json", FileNotFoundError, "is not a run folder"),
        (_checkpoint, FileNotFoundError, "no complete checkpoint yet"),
        (lambda folder: _checkpoint(folder) / "ledger.safetensors", FileNotFoundError,
         "train.ledger off"),
        (lambda folder: _checkpoint(folder) / "state.json", ValueError, "not the state"),
        (lambda folder: folder.parents[1] / "train.index.parquet", FileNotFoundError,
         "if it has moved, --index FILE"),
    ],
    ids=["config", "checkpoint", "ledger", "state", "index"],
)  # fmt: skip
def test_what_is_missing_is_said(make_run, gone, kind, message):
    folder = make_run()
    path = gone(folder)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(kind, match=message):
        report(folder)
    assert not (folder / "report").exists()


def test_a_negative_number_of_samples(make_run):
    with pytest.raises(ValueError, match="samples must be at least 0, got -1"):
        report(make_run(), samples=-1)


def test_a_folder_without_an_index_is_not_indexed(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no index in .*empty"):
        read_run(make_run(), tmp_path / "empty")


def test_damaged_lines_are_named(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").write_text('{"step": }\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert len(read_run(folder).metrics) == 1  # a line that is being written


def test_names_may_hold_what_python_takes_for_the_end_of_a_line(make_run, tmp_path):
    """JSON leaves U+2028 and U+0085 in its strings; the file is read as a run that goes on does."""
    odd = {"set": "train", "sample_id": 3, "path": "a\u2028b\u0085}.jpg", "reason": "x"}
    run = read_run(make_run(quarantine=[odd, odd]))
    assert run.quarantine == [odd, odd]


def test_another_index_is_noticed(make_run, digits):
    with pytest.raises(ValueError, match=r"an index of 1,547 rows, .* has 250 now"):
        read_run(make_run(), digits / "ilsvrc")


def test_the_images_may_have_moved(make_run, digits, tmp_path):
    """Given the data set's folder, its index is read there, with the images under it."""
    run = read_run(make_run(), digits)
    assert run.index.root == digits


def test_options_of_the_recipe_itself_are_left_aside(make_run):
    folder = make_run()
    values = json.loads((folder / "config.json").read_text())
    values["data"]["max_label"] = 50
    (folder / "config.json").write_text(
        json.dumps(values | {"webvision": None, "protocol": "mini"})
    )
    assert read_run(folder).config.data.max_label == 50


@pytest.fixture
def trained(small_run) -> Path:
    """A real run of one epoch."""
    from mentorch.engine.job import run

    train = replace(small_run.train, epochs=1)
    assert run(replace(small_run, train=train)) == 0
    (folder,) = small_run.out.iterdir()
    return folder


def test_a_real_run_and_its_labels(trained, digits, tmp_path):
    report(trained, out=tmp_path / "out")
    scores = pq.read_table(tmp_path / "out" / "sample_scores.parquet")
    samples = json.loads((trained / "summary.json").read_text())["steps"] * 16
    assert len(scores) == samples  # one epoch: a full batch a step, each sample once
    assert set(scores["visits"].to_pylist()) == {1}
    # Where the given label is predicted, both columns have the one probability (half precision).
    rows = scores.filter(
        np.equal(scores["given_label"].to_numpy(), scores["predicted_label"].to_numpy())
    )
    same = rows["given_probability"].to_numpy(), rows["predicted_probability"].to_numpy()
    np.testing.assert_allclose(*same, atol=4e-3)
    assert (tmp_path / "out" / "report.html").is_file()

    index = Index.read(digits / "webvision.index.parquet")
    labels = index.labels().astype(np.int32)
    labels[0] = (labels[0] + 1) % 10
    at = index.table.schema.get_field_index("label")
    changed = replace(index, table=index.table.set_column(at, "label", [labels]))
    changed.write(tmp_path / "changed.parquet")
    with pytest.raises(ValueError, match=r"labels of .* have changed since the run"):
        report(trained, index=tmp_path / "changed.parquet")


def test_noise_that_the_run_put_on_its_labels_is_put_on_again(make_run, digits_index):
    folder = make_run()
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"noise": "symmetric:0.5", "noise_seed": 3}
    (folder / "config.json").write_text(json.dumps(config))
    noisy = add_noise(digits_index, Noise("symmetric", 0.5, 3), "train").labels()
    state = {"fingerprint": {"training labels": digest(noisy)}}
    checkpoint = folder / "checkpoints" / "step-00000012"
    (checkpoint / "state.json").write_text(json.dumps(pack(state, {})))
    assert (read_run(folder).index.labels() == noisy).all()
    config["data"]["noise_seed"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"labels .* have changed"):
        read_run(folder)
