"""Pictures in TensorBoard: there when something has changed, and never in training's way."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mentorch.engine import pictures
from mentorch.engine.config import CurriculumConfig, RunConfig, TrainConfig
from mentorch.engine.criteria import create_criterion
from mentorch.engine.job import run
from mentorch.engine.ledger import read_ledger
from mentorch.engine.pictures import Pictures, add_weights, curriculum_image

from .runs import final_checkpoint, only_run

STEPS = 10  # an epoch, of 10: learning at 0.2, 0.3, 0.55 and 0.8 is in steps 21, 31, 56 and 81


def test_a_run_leaves_them_in_tensorboard(without_evaluation):
    assert run(without_evaluation) == 0
    folder = only_run(without_evaluation)
    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0}
    ).Reload()
    (image,) = events.Images("curriculum")
    assert image.step == 0
    criterion = _criterion(without_evaluation.curriculum)
    found = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert np.array_equal(found, curriculum_image(criterion))
    weights = events.Histograms("weights")
    assert [event.step for event in weights] == [12, 24]
    known = read_ledger(final_checkpoint(folder)[0] / "ledger.safetensors")["weight"]
    known = known[~np.isnan(known)].astype(np.float32)
    last = weights[-1].histogram_value
    assert last.num == len(known)
    assert last.sum == pytest.approx(known.sum(), rel=1e-5)


def test_counts_of_weights():
    """0 and 1 in the outer bins; what was never visited in none."""
    weights = torch.tensor([0.0, 1.0, 1.0, 0.51, torch.nan], dtype=torch.float16)
    board = _Board()
    add_weights(board, "weights", weights, 3)
    add_weights(board, "weights", weights[4:], 4)
    ((_, told),) = board.written
    counts = dict(zip(told["bucket_limits"], told["bucket_counts"], strict=True))
    assert {round(limit, 2): n for limit, n in counts.items() if n} == {0.02: 1, 0.52: 1, 1.0: 2}
    assert (told["num"], told["min"], told["max"], told["global_step"]) == (4, 0.0, 1.0, 3)


class _Board:
    """In TensorBoard's place: what is written, as (step, options)."""

    def __init__(self):
        self.written = []

    def add_image(self, name, image, step, dataformats):
        assert (name, dataformats, image.ndim) == ("curriculum", "HWC", 3)
        self.written.append((step, {}))

    def add_histogram_raw(self, name, **options):
        self.written.append((options["global_step"], options))


def _criterion(config):
    labels = torch.arange(8)
    return create_criterion(
        config, labels_N=labels, clean_labels_N=labels, sample_ids=labels, num_classes=8,
        total_steps=10 * STEPS,
    )  # fmt: skip


@pytest.fixture
def watched(monkeypatch):
    """Makes Pictures of a run that only counts: ``watched(curriculum, step, …)``."""
    monkeypatch.setattr(pictures, "curriculum_image", lambda criterion: np.zeros((1, 1, 3)))

    def make(curriculum, step=0, drawn=True, main=True, parts=1):
        board, said = _Board(), []
        train = TrainConfig(pictures=drawn, accumulate=parts)
        spade = SimpleNamespace(
            config=RunConfig(curriculum=curriculum, train=train), criterion=_criterion(curriculum),
            step_count=step, steps_per_epoch=STEPS,
        )  # fmt: skip
        telemetry = SimpleNamespace(
            enabled=main, say=said.append, on_board=lambda write: write(board)
        )  # fmt: skip
        return Pictures(spade, None, telemetry), board, said

    return make


def _go_on(found, until):
    """Takes steps, an epoch's rest at a time, with what follows each epoch's end."""
    while found.spade.step_count < until:
        left = STEPS - found.spade.step_count % STEPS
        found.spade.step_count += left
        found.end_epoch()


LEARNED = CurriculumConfig(name="dd", trusted=1.0)


@pytest.mark.parametrize(
    ("step", "steps"), [(0, [30, 40, 60, 90]), (30, [40, 60, 90]), (55, [60, 90]), (58, [60, 90])]
)
def test_a_learned_curriculum_after_each_learning(watched, step, steps):
    """From the start; gone on with at an epoch's end, and within one before and after learning."""
    found, board, said = watched(LEARNED, step)
    _go_on(found, 100)
    assert [at for at, _ in board.written] == steps
    assert not said


def test_with_parts_calls_are_counted_not_steps(watched):
    """Of 2 parts each: learning is due at calls 20, 30, 55 and 80 of 100, in steps 11 to 41."""
    found, board, _ = watched(LEARNED, parts=2)
    _go_on(found, 50)
    assert [at for at, _ in board.written] == [20, 30, 50]


@pytest.mark.parametrize(
    ("config", "step", "images"),
    [
        (CurriculumConfig(name="pd"), 0, 1),
        (CurriculumConfig(name="linear"), 0, 1),
        (CurriculumConfig(name="linear"), 10, 0),  # drawn when the run was begun
        (CurriculumConfig(name="uniform"), 0, 0),
        (CurriculumConfig(name="gce"), 0, 0),
        (CurriculumConfig(name="linear", weight_lr=0.1), 0, 0),
    ],
)
def test_what_stays_is_drawn_once_at_the_start(watched, config, step, images):
    found, board, said = watched(config, step)
    _go_on(found, 30)
    assert [at for at, _ in board.written] == [0] * images
    assert not said


@pytest.mark.parametrize("options", [{"drawn": False}, {"main": False}])
def test_switched_off_and_on_other_ranks(watched, options):
    found, board, _ = watched(CurriculumConfig(name="linear"), **options)
    _go_on(found, 20)
    assert not board.written


def test_a_picture_that_fails_is_said_once(watched, monkeypatch):
    def fail(criterion):
        raise RuntimeError("no font")

    monkeypatch.setattr(pictures, "curriculum_image", fail)
    found, board, said = watched(LEARNED)
    _go_on(found, 100)
    assert said == ["no pictures in TensorBoard from here: RuntimeError: no font"]
    assert not board.written


def test_a_run_goes_on_without_its_pictures(without_evaluation, monkeypatch, capsys):
    def fail(criterion):
        raise RuntimeError("no font")

    monkeypatch.setattr(pictures, "curriculum_image", fail)
    train = replace(without_evaluation.train, epochs=1)
    assert run(replace(without_evaluation, train=train)) == 0
    assert "RuntimeError: no font" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linear", "pd_mixture", "dd"])
def test_the_image_is_small(name):
    """And with a history, which a MentorNet reads."""
    config = CurriculumConfig(name=name, history_steps=3)
    image = curriculum_image(_criterion(config))
    assert image.dtype == np.uint8
    assert image.shape[0] <= 220
    assert image.shape[1] <= 660
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20, "colours of more than one weight"
