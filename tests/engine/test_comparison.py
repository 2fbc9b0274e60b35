"""Experiments on the digits: what is prepared, run, kept and reported."""

import json
import os
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from mentorch.engine.comparison.gather import gather_visits, points_between
from mentorch.engine.comparison.grid import read_results, run_grid
from mentorch.engine.comparison.methods import METHODS, method
from mentorch.engine.comparison.report import table, write_report
from mentorch.engine.comparison.run import Experiment, Method, Task, prepare, run_experiment
from mentorch.engine.comparison.weight_log import WeightLog
from mentorch.engine.config import (
    CurriculumConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.data.images import load_images
from mentorch.kernels.reweight import Reweighted

CPU = torch.device("cpu")
TASK = Task(dataset="digits", noise="symmetric", rate=0.4, train_samples=640)
RECIPE = RunConfig(
    student=StudentConfig(name="small_mlp", drop_rate=0.0),
    optim=OptimConfig(lr=0.02, warmup_epochs=0, schedule="step"),
    train=TrainConfig(epochs=4, batch_size=64, precision="fp32"),
)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Tests run side by side: two threads of a grid's run would wait for the other tests' turn."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def _experiment(name="self_paced", **changes):
    return Experiment(task=TASK, name=name, method=method(name, TASK), config=RECIPE, **changes)


def test_training_validation_and_test_images_are_disjoint():
    everything = load_images("digits")
    whole = prepare(replace(TASK, train_samples=0), 0, CPU)
    held_out = prepare(replace(TASK, train_samples=0, evaluate_on="validation"), 0, CPU).held_out
    assert len(whole.images) + len(held_out) == len(everything.images)
    rows = [set(map(bytes, part.flatten(1).numpy())) for part in (whole.images, held_out)]
    assert rows[0].isdisjoint(rows[1])
    assert torch.equal(whole.held_out, everything.test_images)
    first, second = (
        prepare(TASK, 0, CPU),
        prepare(replace(TASK, skip=640, train_samples=500), 0, CPU),
    )
    assert set(map(bytes, first.images.flatten(1).numpy())).isdisjoint(
        set(map(bytes, second.images.flatten(1).numpy()))
    )
    with pytest.raises(ValueError, match=r"1,189 training images"):
        prepare(replace(TASK, skip=1000), 0, CPU)


def test_the_noise_is_the_tasks_and_the_seeds():
    one, same, other = (prepare(TASK, seed, CPU) for seed in (0, 0, 1))
    assert 0.28 < (one.given != one.clean).float().mean() < 0.44  # 36% in expectation
    assert torch.equal(one.given, same.given)
    assert torch.equal(one.clean, other.clean)
    assert not torch.equal(one.given, other.given)
    assert TASK.expected_right() == pytest.approx(0.64)
    assert TASK.with_noise("asymmetric:0.4").expected_right() == pytest.approx(0.8)
    with pytest.raises(ValueError, match="KIND:RATE"):
        TASK.with_noise("symmetric")


def test_some_classes_only_are_renumbered():
    data = prepare(replace(TASK, classes=(3, 5, 8), train_samples=300), 0, CPU)
    assert data.num_classes == 3
    assert set(data.clean.tolist()) == set(data.held_out_labels.tolist()) == {0, 1, 2}
    digits = load_images("digits")
    threes = set(map(bytes, digits.test_images[digits.test_labels == 3].flatten(1).numpy()))
    assert set(map(bytes, data.held_out[data.held_out_labels == 0].flatten(1).numpy())) == threes


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    record = run_experiment(_experiment(name))
    assert len(record["curves"]["top1"]) == 4
    assert record["last"] == record["curves"]["top1"][-1]
    assert record["best"] == max(record["curves"]["top1"])
    assert record["best"] == record["curves"]["top1"][record["best_epoch"] - 1]
    assert record["best"] > 0.3, "a tenth is chance"
    json.dumps(record, default=str)


LEARNS_TWICE = "mentornet_dd learn_at=[0.2,0.6]"  # four times, as by default, takes twice as long


def test_a_run_is_a_function_of_its_seed():
    first, again = (run_experiment(_experiment(LEARNS_TWICE)) for _ in range(2))
    assert first["curves"] == again["curves"]
    other = replace(_experiment(LEARNS_TWICE), config=replace(RECIPE, seed=1))
    assert run_experiment(other)["curves"] != first["curves"]


def test_corrected_labels_are_the_trusted_ones():
    plain, corrected = (run_experiment(_experiment(name)) for name in ("full", "corrected"))
    wrong = round(640 * plain["wrong_share"])
    # A tenth is corrected: 64 samples, of which about 36% were wrong.
    assert 10 <= wrong - round(640 * corrected["wrong_share"]) <= 40


def test_the_grid_goes_on_where_it_was(tmp_path):
    experiments = [_experiment(name) for name in ("full", "self_paced")]
    assert run_grid(experiments[:1], tmp_path, jobs=1) == []
    before = (tmp_path / f"{experiments[0].key}.json").stat().st_mtime_ns
    broken = replace(
        _experiment("gce"), config=replace(RECIPE, student=StudentConfig(name="nonesuch"))
    )
    assert run_grid([*experiments, broken], tmp_path, jobs=2) == [broken.key]
    assert (tmp_path / f"{experiments[0].key}.json").stat().st_mtime_ns == before
    assert "nonesuch" in (tmp_path / f"{broken.key}.error.txt").read_text()
    assert len(read_results(tmp_path)) == 2
    text = write_report(read_results(tmp_path), tmp_path, tuple(METHODS))
    assert "| full |" in text
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 2
    assert (tmp_path / "symmetric-0.4.curves.png").stat().st_size > 10_000
    longer = replace(RECIPE, train=replace(RECIPE.train, epochs=5))
    with pytest.raises(ValueError, match="made by another recipe"):
        run_grid([replace(experiments[0], config=longer)], tmp_path)


def test_a_learning_run_leaves_its_mentornets_and_their_pictures(tmp_path):
    assert run_grid([_experiment(LEARNS_TWICE)], tmp_path, jobs=1) == []
    assert len(list(tmp_path.glob("*.at-*.safetensors"))) == 2
    write_report(read_results(tmp_path), tmp_path)
    assert (tmp_path / "surfaces.png").stat().st_size > 10_000
    assert (tmp_path / "objectives.png").stat().st_size > 10_000


def _record(name, seed, last, best, auroc):
    return {
        "experiment": {"name": name, "task": {"noise": "pair", "rate": 0.2}},
        "last": last,
        "best": best,
        "curves": {"auroc_weight": [0.1, auroc]},
    }


def test_the_table_has_means_and_deviations():
    from mentorch.engine.comparison.report import _accuracy, _detection

    records = [_record("b", 0, 0.5, 0.6, 0.9), _record("a", 0, 0.1, 0.3, 0.5)]
    records.append(_record("b", 1, 0.7, 0.8, 0.7))
    lines = table(records, _accuracy, ("a", "b")).splitlines()
    assert lines[0] == "| method | pair 0.2 |"
    assert lines[2] == "| a | 10.0 (30.0) |"
    assert lines[3] == "| b | 60.0 ± 14.1 (70.0 ± 14.1) |"
    assert table(records, _detection).splitlines()[2] == "| b | 80.0 ± 14.1 |"


def test_the_weight_log_detects_what_there_is_to_detect():
    log = WeightLog(torch.tensor([True, True, False, False]))
    ids, labels = torch.tensor([0, 1, 2, 3, -1]), torch.zeros(5, dtype=torch.int64)
    weight = torch.tensor([0.9, 0.8, 0.1, 0.85, 1.0])
    log(ids, torch.zeros(5, 2), labels, Reweighted(None, 1 - weight, weight, None))
    found = log.snapshot(1)
    assert found["auroc_weight"] == found["auroc_loss"] == 0.75
    assert sum(log.histograms["right"][0]) == sum(log.histograms["wrong"][0]) == 2
    assert log.histograms["wrong"][0][2] == 1  # 0.1 is in the third of 20 bins


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="mentornet_pd"):
        method("nonesuch", TASK)


def test_methods_that_differ_only_in_what_they_say():
    assert METHODS["forgetting"](0.6).drop_rate == 0.5
    assert METHODS["full"](0.6) == Method(curriculum=CurriculumConfig(name="uniform", burn_in=0.0))
    assert METHODS["self_paced"](0.6).curriculum.loss_percentile == 0.6


def test_gathered_visits_are_those_of_training():
    source = replace(
        _experiment("mentornet_pd"), task=replace(TASK, classes=(0, 1, 2), train_samples=192)
    )
    visits, is_right = gather_visits(source)
    assert visits.shape == (192, 4, 4)
    assert not visits.isnan().any(), "192 samples fill three batches: each is seen every epoch"
    assert (visits[:, :, 2] // 25 == torch.arange(4)).all(), "one visit in each quarter"
    loss = visits[:, -1, 0]
    assert loss[~is_right].mean() > 2 * loss[is_right].mean()
    features, target = points_between([(visits, is_right)] * 2, 25, 75)
    assert len(target) == 2 * 2 * 192
    assert features.epoch_pct.unique().tolist() == [25, 33, 41, 50, 58, 66]
    assert target.mean().item() == pytest.approx(is_right.float().mean().item())


def test_a_method_takes_options_of_its_curriculum():
    found = method("mentornet_dd sharpness=1 learn_at=[0.1,0.4]", TASK).curriculum
    assert (found.sharpness, found.learn_at, found.trusted) == (1.0, (0.1, 0.4), 0.1)
    assert method("mentornet_dd", TASK).curriculum.sharpness != 1.0
    for wrong in ("sharpnes=1", "sharpness=x", "sharpness", "trusted=2"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            method(f"mentornet_dd {wrong}", TASK)
