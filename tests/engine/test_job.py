"""The engine trains, stops, resumes and evaluates: whole runs of a small student on the digits."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from mentorch.engine import job as job_module
from mentorch.engine.checkpoint import checkpoints
from mentorch.engine.cli import parse
from mentorch.engine.config import CurriculumConfig, RunConfig
from mentorch.engine.config_files import save_config
from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.distributed import distributed
from mentorch.engine.evaluate import evaluate
from mentorch.engine.job import run
from mentorch.engine.launch import STOPPED
from mentorch.engine.ledger import read_ledger

from .runs import assert_same_run, final_checkpoint, only_run, read_metrics, read_status


@pytest.fixture
def stop_after(monkeypatch):
    """Asks a run to stop after so many steps."""

    def at(step):
        batches = Loader.batches

        def asking(self, *arguments, **options):
            for count, batch in enumerate(batches(self, *arguments, **options), 1):
                if self.train and count == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(Loader, "batches", asking)

    return at


def test_a_run_trains_evaluates_and_keeps_its_record(small_run, capsys):
    assert run(small_run) == 0
    folder = only_run(small_run)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "summary.json",
        "status.json",
    }
    rows = read_metrics(folder)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [5, 10, 12, 15, 20, 24]
    assert train[-1]["weighted_loss"] < train[-1]["loss"]
    assert 0.05 < train[0]["data_utilization"] < 0.95, "burn-in drops about half of the samples"
    assert {"loss_moving_avg", "lr", "images_per_s"} <= train[0].keys()
    for row in train:  # both are means over their own samples, so the mean of all lies between
        low, high = sorted((row["weight_right"], row["weight_wrong"]))
        assert low <= row["mean_weight"] <= high
    assert [r["step"] for r in rows if r["kind"] == "eval/imagenet"] == [12, 24]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 24
    assert summary["last"]["webvision"]["images"] == 250
    assert summary["last"]["imagenet"]["images"] == 250
    assert summary["best"]["webvision"]["top1"] >= summary["last"]["webvision"]["top1"]
    assert list((folder / "tensorboard").glob("events*"))
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]

    printed = capsys.readouterr().out
    assert printed.count(": broken") == 2, "the two broken files are not named"
    assert "are wrong" in printed
    assert "best top-1" in printed


def test_the_student_learns(small_run):
    """Ten classes, so chance is 0.1; a few epochs of a tiny network reach far more."""
    train = replace(small_run.train, epochs=8, evaluate_every=8, batch_size=32)
    curriculum = CurriculumConfig(name="linear")
    optim = replace(small_run.optim, lr=0.1, average_decay=0.0)
    data = replace(small_run.data, sources=("google",))
    changes = {"train": train, "curriculum": curriculum, "optim": optim, "data": data}
    assert run(replace(small_run, **changes)) == 0
    summary = json.loads((only_run(small_run) / "summary.json").read_text())
    assert summary["last"]["webvision"]["top1"] > 0.5
    last = [row for row in read_metrics(only_run(small_run)) if row["kind"] == "train"][-1]
    assert last["weight_right"] > last["weight_wrong"] + 0.2, "the curriculum sees no difference"


@pytest.mark.parametrize("stopped", [3, 12, 14])  # within an epoch, at its end, in the next one
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    small_run, tmp_path, monkeypatch, stop_after, stopped, capsys
):
    whole = replace(small_run, out=tmp_path / "whole")
    assert run(whole) == 0

    halved = replace(small_run, out=tmp_path / "halved")
    stop_after(stopped)
    assert run(halved) == STOPPED
    folder = only_run(halved)
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert status["step"] == status["checkpoint"] == stopped
    assert status["resume"].endswith(f"--resume {folder}")
    assert f"--resume {folder}" in capsys.readouterr().out

    with (folder / "metrics.jsonl").open("a") as file:  # what a crash would have left
        file.write('{"step": 1000, "kind": "train"}\n{"step": 10')
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on where the generator happens to be
    assert run(parse(RunConfig, RunConfig(), ["--resume", str(folder)])) == 0
    assert_same_run(only_run(whole), folder)
    assert read_status(folder)["state"] == "finished"
    path, models, *_ = final_checkpoint(folder)
    assert models.keys() == {"model", "average", "ledger"}
    assert read_ledger(path / "ledger.safetensors")["visits"].sum() == 24 * 16


def test_an_evaluation_that_was_cut_off_is_made_up_for(small_run, tmp_path, monkeypatch):
    """Killed between an epoch's checkpoint and its evaluation, or between two of its sets."""
    whole = replace(small_run, out=tmp_path / "whole")
    assert run(whole) == 0
    evaluations = []

    def failing(*arguments):
        evaluations.append(1)
        if len(evaluations) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(job_module, "evaluate", failing)
    cut = replace(small_run, folder=tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert [r["kind"] for r in read_metrics(cut.folder)][-1] == "eval/webvision"
    monkeypatch.undo()
    assert run(cut) == 0
    assert_same_run(only_run(whole), cut.folder)
    best = only_run(whole) / "checkpoints" / "best"
    assert (cut.folder / "checkpoints" / "best").read_text() == best.read_text()


def test_a_best_checkpoint_that_was_not_marked_yet_is_marked(small_run, tmp_path, monkeypatch):
    """Killed between the evaluation's line of metrics and that."""
    whole = replace(small_run, folder=tmp_path / "whole")
    assert run(whole) == 0

    def die(self, step):
        self._writer.wait()
        os._exit(9)

    monkeypatch.setattr(job_module.Saver, "mark_best", die)
    cut = replace(small_run, folder=tmp_path / "cut")
    killed = multiprocessing.get_context("fork").Process(target=run, args=(cut,))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    monkeypatch.undo()
    marks = [f / "checkpoints" / "best" for f in (whole.folder, cut.folder)]
    assert not marks[1].exists()
    assert run(replace(cut, train=replace(cut.train, epochs=1))) == 0
    assert marks[1].read_text() == "step-00000012\n"


def test_a_folder_is_started_in_and_gone_on_in(without_evaluation, tmp_path, stop_after, capsys):
    """The same command again, as a cluster's queue does it."""
    arguments = ["--folder", str(tmp_path / "mine")]
    command = partial(parse, RunConfig, without_evaluation, arguments)
    stop_after(5)
    assert run(command()) == STOPPED
    assert run(command()) == STOPPED
    assert run(command()) == STOPPED
    assert read_status(tmp_path / "mine")["step"] == 15
    assert "24 in all; 10 taken" in capsys.readouterr().out
    with pytest.raises(ValueError, match="are two run folders"):
        replace(command(), resume=tmp_path / "other")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.batch-size", "32", r"train\.batch_size 16, this run has 32"),
        ("--seed", "1", r"seed 0, this run has 1"),
        ("--data.sources", "google", "training samples"),
        ("--optim.average-decay", "0", "an average of the weights True, this run has False"),
    ],
)
def test_resuming_another_run_is_refused(small_run, stop_after, option, value, message):
    stop_after(2)
    assert run(small_run) == STOPPED
    arguments = ["--resume", str(only_run(small_run)), option, value]
    with pytest.raises(ValueError, match=message):
        run(parse(RunConfig, RunConfig(), arguments))


def test_a_run_from_before_the_ledger_goes_on_with_an_empty_one(
    without_evaluation, monkeypatch, stop_after, capsys
):
    config = replace(without_evaluation, train=replace(without_evaluation.train, ledger=False))
    stop_after(14)
    assert run(config) == STOPPED
    folder = only_run(config)
    assert "ledger" not in final_checkpoint(folder)[1]
    monkeypatch.undo()
    assert run(parse(RunConfig, RunConfig(), ["--resume", str(folder), "--train.ledger"])) == 0
    assert "step-00000014 has no ledger" in capsys.readouterr().out
    ledger = read_ledger(final_checkpoint(folder)[0] / "ledger.safetensors")
    assert ledger["visits"].sum() == 10 * 16
    assert ledger["visits"].max() == 1


def test_the_epoch_is_kept_when_its_evaluation_fails(small_run, monkeypatch):
    monkeypatch.setattr(job_module, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(small_run)
    assert checkpoints(only_run(small_run) / "checkpoints")[-1].name == "step-00000012"


def test_a_data_set_may_move(small_run, digits, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(digits, moved)
    train = replace(small_run.train, epochs=1)
    data = replace(small_run.data, train=moved, evaluate={"webvision": moved})
    assert run(replace(small_run, data=data, train=train)) == 0
    summary = json.loads((only_run(small_run) / "summary.json").read_text())
    assert summary["unusable_files"] == 0
    shutil.rmtree(moved / "val_images_256")
    resumed = ["--resume", str(only_run(small_run)), "--train.epochs", "2"]
    assert run(parse(RunConfig, RunConfig(), resumed)) == 0
    summary = json.loads((only_run(small_run) / "summary.json").read_text())
    assert summary["unusable_files"] == 250, "the images were read from the old place"


@pytest.fixture
def own_digits(digits, without_evaluation, tmp_path):
    """A run on a copy of the digits, whose files a test may spoil."""
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    return replace(without_evaluation, data=replace(without_evaluation.data, train=copy)), copy


def _quarantined(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_bad_files_are_quarantined_and_the_run_goes_on(own_digits, monkeypatch):
    config, root = own_digits
    names = sorted(path for path in (root / "flickr").rglob("*.jpg"))[:2]
    names[0].write_text("<html>")
    scan_of_noise = b"\xff\xd8\xff\xdb\x00\x04\x00\x00\xff\xda\x00\x02\x00\xff\xd9"
    names[1].write_bytes(scan_of_noise)
    assert run(config) == 0
    folder = only_run(config)
    found = {line["path"]: line for line in _quarantined(folder)}
    assert set(found) == {str(name.relative_to(root)) for name in names}
    assert [found[str(n.relative_to(root))]["refused"] for n in names] == [False, True]
    assert json.loads((folder / "summary.json").read_text())["unusable_files"] == 2
    rows = [row["unusable"] for row in read_metrics(folder) if row["kind"] == "train"]
    assert max(rows) == pytest.approx(1 / 16, abs=1 / 16)
    assert min(rows) < max(rows)
    # A resumed run knows what DALI refuses.
    train = replace(config.train, epochs=3)
    monkeypatch.setattr("mentorch.engine.data.pipelines.refused_rows", lambda *_: 1 / 0)
    assert run(replace(config, resume=folder, train=train)) == 0
    assert len(_quarantined(folder)) == 2


def test_a_run_whose_images_are_gone_stops_and_can_go_on(own_digits):
    config, root = own_digits
    assert run(replace(config, train=replace(config.train, epochs=1))) == 0
    folder = only_run(config)
    (root / "flickr").rename(root / "away")
    with pytest.raises(RuntimeError, match=r"100% of the images .* No such file .*quarantine"):
        run(replace(config, resume=folder))
    assert final_checkpoint(folder)[2]["spade"]["step"] == 12, (
        "kept what steps on placeholders made"
    )
    (root / "away").rename(root / "flickr")
    assert run(replace(config, resume=folder)) == 0
    assert final_checkpoint(folder)[2]["spade"]["step"] == 24


def test_a_few_bad_files_in_a_short_line_of_metrics_do_not_stop_a_run(own_digits):
    """A line a step: two of 16 images are more than a tenth, but they are not storage gone."""
    config, root = own_digits
    for path in sorted((root / "flickr").rglob("*.jpg"))[::16]:  # 13 of 197: 7%
        path.write_text("<html>")
    assert run(replace(config, train=replace(config.train, log_every=1))) == 0
    rows = [r["unusable"] for r in read_metrics(only_run(config)) if r["kind"] == "train"]
    assert max(rows) > config.data.max_unusable, "no line has more than is allowed"


def test_checkpoints_within_an_epoch(without_evaluation):
    train = replace(without_evaluation.train, epochs=1, checkpoint_steps=5, keep_checkpoints=9)
    assert run(replace(without_evaluation, train=train)) == 0
    found = checkpoints(only_run(without_evaluation) / "checkpoints")
    assert [path.name[-2:] for path in found] == ["05", "10", "12"]


def test_resuming_with_other_pixels_or_labels_is_refused(own_digits, stop_after):
    config, root = own_digits
    stop_after(2)
    assert run(config) == STOPPED
    again = replace(config, resume=only_run(config))
    with pytest.raises(
        ValueError, match=r"data\.crop_scale '\(0\.08, 1\.0\)', this run has '\(0\.5"
    ):
        run(replace(again, data=replace(config.data, crop_scale=(0.5, 1.0))))
    index_file = root / "webvision.index.parquet"
    noisy = add_noise(Index.read(index_file), Noise("symmetric-other", 0.5, 1, None), "train")
    noisy.write(index_file)
    with pytest.raises(ValueError, match="training labels"):
        run(again)


def test_a_run_without_a_checkpoint_cannot_be_resumed(small_run, tmp_path):
    save_config(small_run, tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run(parse(RunConfig, RunConfig(), ["--resume", str(tmp_path)]))


def test_nothing_is_left_behind_when_the_data_is_wrong(small_run, tmp_path):
    config = replace(small_run, data=replace(small_run.data, train=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(config)
    assert not small_run.out.exists()
    with distributed("cpu") as world:  # the process group was left: another can be made
        assert world.world_size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_label": 0}, "no usable sample"),
        ({"sources": ("bing",)}, "no usable sample"),
        ({"train": None}, "no training data: give --data.train"),
    ],
)
def test_a_selection_without_samples_is_an_error(small_run, change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(small_run, data=replace(small_run.data, **change)))


def test_an_unknown_student_is_an_error_that_suggests(small_run):
    config = replace(small_run, student=replace(small_run.student, name="inception_v2_resnet"))
    with pytest.raises(ValueError, match="inception_resnet_v2"):
        run(config)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(without_evaluation, precision):
    train = replace(without_evaluation.train, precision=precision, epochs=1)
    assert run(replace(without_evaluation, train=train)) == 0
    last = read_metrics(only_run(without_evaluation))[-1]
    assert 0 < last["loss"] < 20


def test_scaled_weight_decay_trains(without_evaluation):
    optim = replace(without_evaluation.optim, scale_weight_decay=True, schedule="step")
    train = replace(without_evaluation.train, epochs=1)
    assert run(replace(without_evaluation, optim=optim, train=train)) == 0
