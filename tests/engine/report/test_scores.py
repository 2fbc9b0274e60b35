"""The table of scores: exact columns, the order, and what suspicion is worth."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mentorch.engine.data.index import SCHEMA, Index
from mentorch.engine.report.detection import detect, precision_at
from mentorch.engine.report.run_folder import read_run
from mentorch.engine.report.scores import known_wrong, print_top, score_samples, write_scores


def _index(tmp_path, labels=(0, 1, 1, 0), clean=(0, 0, None, None)) -> Index:
    count = len(labels)
    columns = {
        "sample_id": range(count), "path": [f"{i}.jpg" for i in range(count)], "label": labels,
        "clean_label": clean, "split": ["train"] * count, "source": [""] * count,
        "status": ["ok"] * count, "bytes": [1] * count, "width": [1] * count, "height": [1] * count,
    }  # fmt: skip
    arrays = [pa.array(list(columns[field.name]), field.type) for field in SCHEMA]
    return Index(pa.table(arrays, schema=SCHEMA), tmp_path, "folder", ("a", "b"), ("cat", "dog"))


def _ledger(**columns):
    """Four samples: the third is the most suspicious, the last was never visited."""
    found = {
        "loss": [0.5, 2.0, 3.0, math.nan], "loss_mean": [0.25, 1.0, 4.0, math.nan],
        "loss_var": [0.1, 0.2, 0.3, math.nan], "weight": [1.0, 0.0, 0.25, math.nan],
        "weight_mean": [0.9, 0.5, 0.1, math.nan], "weight_var": [0.0, 0.25, 0.1, math.nan],
        "predicted": [0, 0, 0, -1], "probability": [0.6, 0.8, 0.95, math.nan],
        "visits": [7, 6, 255, 0], "forgetting": [1, 0, 3, 0],
    } | columns  # fmt: skip
    return {name: np.array(values) for name, values in found.items()}


def test_the_top_is_printed_whatever_is_unknown(tmp_path, capsys):
    """A student without a prediction, a sample without a path, names that are too long."""
    table = score_samples(_ledger(predicted=[0, 0, -1, -1]), _index(tmp_path))
    table = table.set_column(2, "path", pa.array([None, "1.jpg", "0.jpg"]))
    at = table.schema.get_field_index("given_name")
    table = table.set_column(at, "given_name", pa.array(["dog" * 9, "dog", "cat"]))
    print_top(table, "loss_mean", rows=2)
    empty, head, *rows = capsys.readouterr().out.split("\n")
    assert (empty, head.split()) == ("", ["rank", "mean", "loss", "given", "predicted", "path"])
    assert [row.split() for row in rows] == [
        ["1", "4.0000", ("dog" * 9)[:20], "?", "sample", "2"],
        ["2", "1.0000", "dog", "cat", "1.jpg"],
        [],
    ]
    print_top(table, "suspicion")
    assert "suspicion" in capsys.readouterr().out


def test_columns_and_values(tmp_path):
    found = score_samples(_ledger(), _index(tmp_path)).to_pydict()
    exact = {
        "rank": [1, 2, 3],
        "sample_id": [2, 1, 0],
        "path": ["2.jpg", "1.jpg", "0.jpg"],
        "given_label": [1, 1, 0],
        "given_name": ["dog", "dog", "cat"],
        "predicted_label": [0, 0, 0],
        "predicted_name": ["cat", "cat", "cat"],
        "given_probability": pytest.approx([math.exp(-3), math.exp(-2), math.exp(-0.5)]),
        "predicted_probability": [0.95, 0.8, 0.6],
        "suspicion": pytest.approx([1 - math.exp(-4), 1 - math.exp(-1), 1 - math.exp(-0.25)]),
        "quality": pytest.approx([math.exp(-4), math.exp(-1), math.exp(-0.25)]),
        "suspect": [True, True, False],
        "weight": [0.25, 0.0, 1.0],
        "weight_mean": [0.1, 0.5, 0.9],
        "weight_var": [0.1, 0.25, 0.0],
        "loss": [3.0, 2.0, 0.5],
        "loss_mean": [4.0, 1.0, 0.25],
        "loss_var": [0.3, 0.2, 0.1],
        "visits": [255, 6, 7],
        "forgetting": [3, 0, 1],
        "clean_label": [None, 0, 0],
    }
    assert list(found) == list(exact)
    for name, values in exact.items():
        assert found[name] == values, name


def test_a_suspect_is_predicted_otherwise_and_suspicious(tmp_path):
    """The first is suspicious but predicted as given, the second the other way round."""
    ledger = _ledger(loss_mean=[1.0, 0.6, 4.0, math.nan], predicted=[0, 0, 0, -1])
    scores = score_samples(ledger, _index(tmp_path)).to_pydict()
    assert dict(zip(scores["sample_id"], scores["suspect"], strict=True)) == {
        0: False, 1: False, 2: True,
    }  # fmt: skip


def test_equally_suspicious_samples_are_in_the_order_of_their_ids(tmp_path):
    """The suspicion of the first two is 1.0 in double precision, their losses still differ."""
    ledger = _ledger(loss_mean=[60.0, 61.0, 0.5, 0.5], visits=[1, 1, 1, 1])
    assert score_samples(ledger, _index(tmp_path))["sample_id"].to_pylist() == [1, 0, 2, 3]


def test_a_student_that_gave_no_numbers(tmp_path):
    """Last visit (second row) or all visits (third row) without a finite output."""
    nan = math.nan
    ledger = _ledger(loss=[0.5, nan, nan, nan], loss_mean=[0.25, 1.0, nan, nan],
                     predicted=[0, -1, -1, -1])  # fmt: skip
    scores = score_samples(ledger, _index(tmp_path))
    assert scores["sample_id"].to_pylist() == [1, 0, 2]  # what is not known comes last
    assert scores["predicted_name"].to_pylist() == [None, "cat", None]
    assert not any(scores["suspect"].to_pylist())
    assert detect(scores)[0].auroc == 1.0


def test_nothing_visited_is_said(tmp_path):
    with pytest.raises(ValueError, match="no visited sample"):
        score_samples(_ledger(visits=[0, 0, 0, 0]), _index(tmp_path))


def test_planted_wrong_labels_come_first(make_run, losses):
    run = read_run(make_run())
    scores = score_samples(run.ledger, run.index)
    known, wrong = known_wrong(scores)
    count = int(wrong.sum())
    assert len(scores) == 197  # flickr only
    assert known.all()
    assert 50 < count < 100  # 36 % in expectation
    assert wrong[:count].all()
    assert np.array_equal(scores["suspect"].to_numpy(), wrong)
    suspicion = detect(scores)[0]
    assert suspicion.auroc == 1.0
    assert suspicion.precision == {50: 1.0, 100: count / 100, count: 1.0}


def test_areas_are_scikit_learns(make_run):
    run = read_run(make_run())
    noise = np.random.default_rng(1).normal(0, 3, len(run.index)).astype(np.float32)
    run.ledger["loss_mean"] = run.ledger["loss_mean"] + noise
    scores = score_samples(run.ledger, run.index)
    wrong = known_wrong(scores)[1]
    found = {detection.name: detection.auroc for detection in detect(scores)}
    assert 0.5 < found["suspicion (mean loss)"] < 0.99
    of_weight = roc_auc_score(wrong, -scores["weight"].to_numpy().astype(np.float64))
    assert found["last weight"] == of_weight


@pytest.mark.parametrize("clean", [(None,) * 4, (0, 1, 1, 0)])
def test_no_detection_without_wrong_labels(tmp_path, clean):
    """Nothing known, and all known to be right."""
    assert detect(score_samples(_ledger(), _index(tmp_path, clean=clean))) == []


def test_equal_scores_count_as_in_random_order():
    """One wrong label on top, then a tie of four of which one is wrong; the file has it first."""
    truth = np.array([False, True, True, False, False, False])
    values = np.array([0.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    found = [precision_at(truth, values, k) for k in (1, 2, 5)]
    assert found == [1.0, (1 + 1 / 4) / 2, 2 / 5]


def test_the_file_has_the_table(tmp_path):
    scores = score_samples(_ledger(), _index(tmp_path))
    write_scores(scores, tmp_path / "scores.parquet")
    assert pq.read_table(tmp_path / "scores.parquet").equals(scores)


def test_cleanlab_takes_the_quality(make_run):
    """The example of docs/report.md, with the real cleanlab."""
    rank = pytest.importorskip("cleanlab.rank")
    run = read_run(make_run())
    scores = score_samples(run.ledger, run.index)
    by_sample = scores.sort_by("sample_id")
    worst = rank.find_top_issues(by_sample["quality"].to_numpy(), top=20)
    assert by_sample["rank"].to_numpy()[worst].tolist() == list(range(1, 21))
