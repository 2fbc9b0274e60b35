"""Whole runs on two ranks, and on another number of them than they were begun with."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from mentorch.engine.checkpoint import load_checkpoint
from mentorch.engine.checkpoint_files import checkpoints, step_of
from mentorch.engine.data.datasets import open_datasets
from mentorch.engine.data.pipelines import Loader, Normalise
from mentorch.engine.distributed import World
from mentorch.engine.evaluate import evaluate
from mentorch.engine.job import run
from mentorch.engine.ledger import read_ledger
from mentorch.engine.student import create_student

from .runs import final_checkpoint, only_run, read_metrics


def _recorded(config, kill_at=None):
    """Runs a job; the sample ids of its batches on this rank, in order."""
    seen, batches = [], Loader.batches

    def recorded(self, first=0, *arguments, **options):
        for step, batch in enumerate(batches(self, first, *arguments, **options), first + 1):
            if self.train:
                seen.append(batch.sample_ids.tolist())
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    Loader.batches = recorded
    try:
        status = run(config)
    finally:
        Loader.batches = batches
    assert status == 0
    return seen


def _visits(folder):
    return read_ledger(final_checkpoint(folder)[0] / "ledger.safetensors")["visits"]


def test_two_ranks_take_the_same_steps_and_see_each_sample_once(small_run, tmp_path, ranks, capfd):
    one, two = ranks(_recorded, small_run).results()
    assert capfd.readouterr().out.count("run folder:") == 1, "more than one rank talks"
    assert len(one) == len(two) == 24
    for epoch in (slice(0, 12), slice(12, 24)):
        ids = [i for batch in one[epoch] + two[epoch] for i in batch]
        assert len(ids) == len(set(ids)) == 12 * 16

    # One rank sees the same global batches in the same order.
    alone = replace(small_run, out=tmp_path / "alone")
    assert [first + second for first, second in zip(one, two, strict=True)] == _recorded(alone)
    assert (_visits(only_run(small_run)) == _visits(only_run(alone))).all()
    theirs, ours = read_metrics(only_run(small_run)), read_metrics(only_run(alone))
    assert [r["step"] for r in theirs] == [r["step"] for r in ours]
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=0.05)  # batch norm is per rank


def test_an_evaluation_by_two_ranks_is_exact(small_run, ranks):
    """250 images in batches of 64 and of 32: the last ones are filled up with rows of no image."""
    assert ranks(run, small_run).results() == [0, 0]
    folder = only_run(small_run)
    _, models, *_ = final_checkpoint(folder)
    data = open_datasets(small_run.data, World())
    student = create_student(small_run.student, len(data.classes), torch.device("cpu"))
    student.load_state_dict(models["average"])
    normalise = Normalise(small_run.data.mean, small_run.data.std)
    rows = [r for r in read_metrics(folder) if r["kind"].startswith("eval/") and r["step"] == 24]
    assert len(rows) == 2
    for row in rows:
        samples = data.evaluate[row["kind"].removeprefix("eval/")]
        loader = Loader(
            samples.index, samples.sample_ids, batch_size=50, config=small_run.data, train=False
        )
        labels = torch.from_numpy(samples.labels_N)
        found = evaluate(student, loader.batches(), labels, normalise, torch.float32, World())
        loader.close()
        assert (row["top1"], row["top5"], row["images"]) == (found.top1, found.top5, 250)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_killed_within_an_epoch_and_gone_on_with_by_another_number_of_ranks(
    without_evaluation, tmp_path, ranks, capfd, before, after
):
    """The same global batches, and nobody's visits are lost or counted twice."""
    train = replace(without_evaluation.train, checkpoint_steps=4)
    config = replace(without_evaluation, train=train, folder=tmp_path / "killed")
    killed = ranks(_recorded, config, 17, world_size=before)  # 5 steps into the second epoch
    assert killed.wait()[0] == -signal.SIGKILL
    last = step_of(checkpoints(config.folder / "checkpoints")[-1].name)
    assert last in (12, 16), "16 may have been half written"
    of_ranks = ranks(_recorded, config, world_size=after).results()
    assert f"begun on {before} ranks, going on with {after}" in capfd.readouterr().out

    whole = replace(config, folder=tmp_path / "whole")
    expected = _recorded(whole)
    rest = [[i for of_rank in step for i in of_rank] for step in zip(*of_ranks, strict=True)]
    assert rest == expected[last:]
    assert (_visits(config.folder) == _visits(whole.folder)).all()
    # The line of metrics of step 20 is summed up from 16 on, by the ranks that were there then.
    rows = {r["step"]: r for r in read_metrics(config.folder)}
    assert rows[20]["rows"] == 5 * 16


def test_a_rank_that_was_not_there_has_nothing_of_its_own(small_run, ranks):
    assert ranks(run, small_run).results() == [0, 0]
    path, *_ = final_checkpoint(only_run(small_run))
    assert load_checkpoint(path, 1).own.keys() == {"loss_moving_avg", "sums"}
    assert not load_checkpoint(path, 2).own
