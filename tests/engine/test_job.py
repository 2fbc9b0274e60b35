"""The engine trains, stops, resumes and evaluates: whole runs of a small student on the digits."""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mentorch.engine import job as job_module
from mentorch.engine.checkpoint import checkpoints, load_checkpoint
from mentorch.engine.cli import parse
from mentorch.engine.config import CurriculumConfig, RunConfig, save_config
from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.distributed import World, distributed
from mentorch.engine.job import STOPPED, StopRequest, run
from mentorch.engine.ledger import read_ledger


def _only_run(config):
    (folder,) = config.out.iterdir()
    return folder


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _final(folder):
    path = checkpoints(folder / "checkpoints")[-1]
    return path, *load_checkpoint(path, World())


class StopAfter(StopRequest):
    """Asks to stop after so many steps (a run looks once a step)."""

    def __init__(self, steps):
        self.left = steps - 1

    @property
    def asked(self):
        self.left -= 1
        return self.left < 0

    @asked.setter
    def asked(self, value):
        pass

    @contextmanager
    def listening(self):
        yield self


def test_a_run_trains_evaluates_and_keeps_its_record(small_run, capsys):
    assert run(small_run) == 0
    folder = _only_run(small_run)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "summary.json",
    }
    rows = _metrics(folder)
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
    summary = json.loads((_only_run(small_run) / "summary.json").read_text())
    assert summary["last"]["webvision"]["top1"] > 0.5
    last = [row for row in _metrics(_only_run(small_run)) if row["kind"] == "train"][-1]
    assert last["weight_right"] > last["weight_wrong"] + 0.2, "the curriculum sees no difference"


@pytest.mark.parametrize("stop_after", [3, 12, 14])  # within an epoch, at its end, in the next one
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    small_run, tmp_path, monkeypatch, stop_after, capsys
):
    whole = replace(small_run, out=tmp_path / "whole")
    assert run(whole) == 0

    halved = replace(small_run, out=tmp_path / "halved")
    monkeypatch.setattr(job_module, "StopRequest", lambda: StopAfter(stop_after))
    assert run(halved) == STOPPED
    folder = _only_run(halved)
    stopped_at = load_checkpoint(checkpoints(folder / "checkpoints")[-1], World())[1]["spade"]
    assert stopped_at["step"] == stop_after
    assert f"--resume {folder}" in capsys.readouterr().out

    with (folder / "metrics.jsonl").open("a") as file:  # what a crash would have left
        file.write('{"step": 1000, "kind": "train"}\n{"step": 10')
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on where the generator happens to be
    assert run(parse(RunConfig, RunConfig(), ["--resume", str(folder)])) == 0

    one_path, one_models, one_state, _ = _final(_only_run(whole))
    two_path, two_models, two_state, _ = _final(folder)
    assert one_path.name == two_path.name
    assert one_models.keys() == {"model", "average", "ledger"}
    assert read_ledger(one_path / "ledger.safetensors")["visits"].sum() == 24 * 16
    for name, tensors in one_models.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, two_models[name][key]), (name, key)
    for key in ("loss_moving_avg", "step"):
        one, two = (s["spade"]["criterion"][key] for s in (one_state, two_state))
        assert torch.equal(one, two), key
    assert one_state["scores"] == two_state["scores"]
    by_step = {r["step"]: r for r in _metrics(_only_run(whole)) if r["kind"] == "train"}
    resumed = [r for r in _metrics(folder) if r["kind"] == "train" and r["step"] in by_step]
    assert max(row["step"] for row in _metrics(folder)) == 24
    later = [row for row in resumed if row["step"] > stopped_at["step"] + 5]
    assert later
    for row in later:
        for key in ("lr", "loss", "loss_moving_avg", "mean_weight"):
            assert row[key] == by_step[row["step"]][key], (row["step"], key)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.batch-size", "32", r"train\.batch_size 16, this run has 32"),
        ("--seed", "1", r"seed 0, this run has 1"),
        ("--data.sources", "google", "training samples"),
        ("--optim.average-decay", "0", "an average of the weights True, this run has False"),
    ],
)
def test_resuming_another_run_is_refused(small_run, monkeypatch, option, value, message):
    monkeypatch.setattr(job_module, "StopRequest", lambda: StopAfter(2))
    assert run(small_run) == STOPPED
    arguments = ["--resume", str(_only_run(small_run)), option, value]
    with pytest.raises(ValueError, match=message):
        run(parse(RunConfig, RunConfig(), arguments))


def test_a_run_from_before_the_ledger_goes_on_with_an_empty_one(
    without_evaluation, monkeypatch, capsys
):
    config = replace(without_evaluation, train=replace(without_evaluation.train, ledger=False))
    monkeypatch.setattr(job_module, "StopRequest", lambda: StopAfter(14))
    assert run(config) == STOPPED
    folder = _only_run(config)
    assert "ledger" not in _final(folder)[1]
    monkeypatch.undo()
    assert run(parse(RunConfig, RunConfig(), ["--resume", str(folder), "--train.ledger"])) == 0
    assert "step-00000014 has no ledger" in capsys.readouterr().out
    ledger = read_ledger(_final(folder)[0] / "ledger.safetensors")
    assert ledger["visits"].sum() == 10 * 16
    assert ledger["visits"].max() == 1


def test_the_epoch_is_kept_when_its_evaluation_fails(small_run, monkeypatch):
    monkeypatch.setattr(job_module, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(small_run)
    assert checkpoints(_only_run(small_run) / "checkpoints")[-1].name == "step-00000012"


def test_a_data_set_may_move(small_run, digits, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(digits, moved)
    train = replace(small_run.train, epochs=1)
    data = replace(small_run.data, train=moved, evaluate={"webvision": moved})
    assert run(replace(small_run, data=data, train=train)) == 0
    summary = json.loads((_only_run(small_run) / "summary.json").read_text())
    assert summary["unusable_files"] == 0
    shutil.rmtree(moved / "val_images_256")
    resumed = ["--resume", str(_only_run(small_run)), "--train.epochs", "2"]
    assert run(parse(RunConfig, RunConfig(), resumed)) == 0
    summary = json.loads((_only_run(small_run) / "summary.json").read_text())
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
    folder = _only_run(config)
    found = {line["path"]: line for line in _quarantined(folder)}
    assert set(found) == {str(name.relative_to(root)) for name in names}
    assert [found[str(n.relative_to(root))]["refused"] for n in names] == [False, True]
    assert json.loads((folder / "summary.json").read_text())["unusable_files"] == 2
    rows = [row["unusable"] for row in _metrics(folder) if row["kind"] == "train"]
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
    folder = _only_run(config)
    (root / "flickr").rename(root / "away")
    with pytest.raises(RuntimeError, match=r"100% of the images .* No such file .*quarantine"):
        run(replace(config, resume=folder))
    assert _final(folder)[2]["spade"]["step"] == 12, "kept what steps on placeholders made"
    (root / "away").rename(root / "flickr")
    assert run(replace(config, resume=folder)) == 0
    assert _final(folder)[2]["spade"]["step"] == 24


def test_a_few_bad_files_in_a_short_line_of_metrics_do_not_stop_a_run(own_digits):
    """A line a step: two of 16 images are more than a tenth, but they are not storage gone."""
    config, root = own_digits
    for path in sorted((root / "flickr").rglob("*.jpg"))[::16]:  # 13 of 197: 7%
        path.write_text("<html>")
    assert run(replace(config, train=replace(config.train, log_every=1))) == 0
    rows = [r["unusable"] for r in _metrics(_only_run(config)) if r["kind"] == "train"]
    assert max(rows) > config.data.max_unusable, "no line has more than is allowed"


def test_checkpoints_within_an_epoch(without_evaluation):
    train = replace(without_evaluation.train, epochs=1, checkpoint_steps=5, keep_checkpoints=9)
    assert run(replace(without_evaluation, train=train)) == 0
    found = checkpoints(_only_run(without_evaluation) / "checkpoints")
    assert [path.name[-2:] for path in found] == ["05", "10", "12"]


def test_resuming_with_other_pixels_or_labels_is_refused(own_digits, monkeypatch):
    config, root = own_digits
    monkeypatch.setattr(job_module, "StopRequest", lambda: StopAfter(2))
    assert run(config) == STOPPED
    again = replace(config, resume=_only_run(config))
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
    last = _metrics(_only_run(without_evaluation))[-1]
    assert 0 < last["loss"] < 20


def test_scaled_weight_decay_trains(without_evaluation):
    optim = replace(without_evaluation.optim, scale_weight_decay=True, schedule="step")
    train = replace(without_evaluation.train, epochs=1)
    assert run(replace(without_evaluation, optim=optim, train=train)) == 0


TWO_RANKS = """
import json, os, sys
from pathlib import Path
from mentorch.engine import job
from mentorch.engine.config import RunConfig, load_config
from mentorch.engine.data.pipelines import Loader

seen = []
batches = Loader.batches
def recorded(self, *arguments, **options):
    for batch in batches(self, *arguments, **options):
        if self.train:
            seen.append(batch.sample_ids.tolist())
        yield batch
Loader.batches = recorded
status = job.run(load_config(Path(sys.argv[1]), RunConfig))
rank = os.environ["RANK"]
Path(sys.argv[1]).with_name(f"seen-{rank}.json").write_text(json.dumps(seen))
sys.exit(status)
"""


@pytest.fixture
def torchrun():
    """Starts two ranks of a script; ends them when the test does, or after four minutes."""
    started = []

    def start(*arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        process = subprocess.Popen(
            [*launcher, "--nproc-per-node", "2", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer(240, process.kill)
        timer.start()
        started.append((process, timer))
        return process

    yield start
    for process, timer in started:
        timer.cancel()
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_two_ranks_take_the_same_steps_and_see_each_sample_once(small_run, tmp_path, torchrun):
    save_config(small_run, tmp_path / "config.json")
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    process = torchrun(script, tmp_path / "config.json")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    one, two = (json.loads((tmp_path / f"seen-{r}.json").read_text()) for r in range(2))
    assert len(one) == len(two) == 24
    for epoch in (slice(0, 12), slice(12, 24)):
        ids = [i for batch in one[epoch] + two[epoch] for i in batch]
        assert len(ids) == len(set(ids)) == 12 * 16

    # One rank sees the same global batches in the same order.
    alone = replace(small_run, out=tmp_path / "alone")
    assert run(alone) == 0
    theirs, ours = (_final(_only_run(r))[0] / "ledger.safetensors" for r in (small_run, alone))
    visits = read_ledger(theirs)["visits"]
    assert (visits == read_ledger(ours)["visits"]).all()
    epochs = [{i for batch in one[e] + two[e] for i in batch} for e in (slice(12), slice(12, 24))]
    assert visits.tolist() == [(i in epochs[0]) + (i in epochs[1]) for i in range(len(visits))]
    theirs, ours = _metrics(_only_run(small_run)), _metrics(_only_run(alone))
    assert [r["step"] for r in theirs] == [r["step"] for r in ours]
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=0.05)  # batch norm is per rank
    assert output.count("run folder:") == 1, "more than one rank talks"


KILLED = """
import json, os, signal, sys
from pathlib import Path
from mentorch.engine import job
from mentorch.engine.config import RunConfig, load_config
from mentorch.engine.data.pipelines import Loader

batches = Loader.batches
def until_step_17(self, *arguments, **options):
    for step, batch in enumerate(batches(self, *arguments, **options), 1):
        yield batch
        if step == 17:  # 5 steps into the second epoch, one after a checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
Loader.batches = until_step_17
job.run(load_config(Path(sys.argv[1]), RunConfig))
"""


def test_two_ranks_killed_within_an_epoch_and_one_that_goes_on(
    without_evaluation, tmp_path, torchrun, monkeypatch, capsys
):
    train = replace(without_evaluation.train, checkpoint_steps=4)
    config = replace(without_evaluation, train=train)
    save_config(config, tmp_path / "config.json")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output, _ = torchrun(script, tmp_path / "config.json").communicate()
    folder = _only_run(config)
    assert "SIGKILL" in output, output
    assert checkpoints(folder / "checkpoints")[-1].name == "step-00000016"

    whole = _recorded(monkeypatch, replace(config, out=tmp_path / "whole"))
    rest = _recorded(monkeypatch, parse(RunConfig, RunConfig(), ["--resume", str(folder)]))
    assert rest == whole[16:]
    assert "begun on 2 ranks, going on with 1" in capsys.readouterr().out
    folders = folder, _only_run(replace(config, out=tmp_path / "whole"))
    two, one = (read_ledger(_final(f)[0] / "ledger.safetensors")["visits"] for f in folders)
    assert (two == one).all(), "visits were lost, or counted twice, when ranks went"


def _recorded(monkeypatch, config):
    """The sample ids of a run's batches, in order."""
    seen, batches = [], Loader.batches

    def recorded(self, *arguments, **options):
        for batch in batches(self, *arguments, **options):
            seen.append(batch.sample_ids.tolist())
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batches", recorded)
        assert run(config) == 0
    return seen


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from mentorch.engine import job
from mentorch.engine.config import RunConfig, load_config
from mentorch.engine.data.pipelines import Loader

batches = Loader.batches
def signalled(self, *arguments, **options):
    for step, batch in enumerate(batches(self, *arguments, **options), 1):
        if step == 11 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
Loader.batches = signalled
sys.exit(job.run(load_config(Path(sys.argv[1]), RunConfig)))
"""


def test_sigterm_on_one_rank_stops_all_of_them_resumably(small_run, tmp_path, torchrun):
    """Preemption may reach one rank first; the others must not wait for it for ever."""
    train = replace(small_run.train, epochs=200, log_every=4)
    save_config(replace(small_run, train=train), tmp_path / "config.json")
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    output, _ = torchrun(script, tmp_path / "config.json").communicate()
    folder = _only_run(small_run)
    assert f"torchrun --nproc-per-node 2 {script} --resume {folder}" in output, output
    assert _final(folder)[2]["spade"]["step"] == 12, "not at the next line of metrics"
