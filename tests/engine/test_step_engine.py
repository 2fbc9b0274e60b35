"""However a step is run, it is the same step."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler

from mentorch.engine import data_driven, step_engine
from mentorch.engine.comparison.weight_log import WeightLog
from mentorch.engine.config import CurriculumConfig, OptimConfig, StudentConfig, TrainConfig
from mentorch.engine.distributed import World
from mentorch.engine.ledger import Ledger
from mentorch.engine.step_engine import WARM_STEPS, Captured, compiled
from mentorch.engine.tape import HostWaits, Tape

from .small_spade import BATCH, CLASSES, N, batches, config_of, images, new_spade, train

STEPS = 24
WORLD = World()


def _fp32(**options):
    return TrainConfig(**{"epochs": 1, "batch_size": BATCH, "precision": "fp32", **options})


def _run(config, recorder=None, steps=STEPS, spoil=lambda spade, step: None):
    """Everything that a run leaves, and the spade."""
    ledger, log = Ledger(N, WORLD), WeightLog(images()[1] == images()[2])
    spade, pixels = new_spade(config, WORLD, steps, [ledger, log])
    if recorder is not None:
        spade._prepare(next(batches(WORLD, 1, pixels)))
        spade._engine = Captured(spade._on_device, recorder, spade.news.append)
    lines = []
    for step in spade.train(batches(WORLD, steps, pixels, config.train.accumulate)):
        if step % 5 == 0:
            lines.append(spade.metrics())
        spoil(spade, step)
    state = {**spade.state(), **spade.own()}
    return {**spade.models(), "ledger": ledger.table, "log": log.weight, **state}, lines, spade


def _assert_same(one, other, tolerance):
    torch.testing.assert_close(other, one, **tolerance, equal_nan=True)


EXACT = {"rtol": 0, "atol": 0}
KINDS = {
    "pd, dropout": {"student": StudentConfig(name="small_cnn", drop_rate=0.3)},
    "lagged": {"curriculum": CurriculumConfig(name="linear", burn_in=0.1, moving_avg="lagged")},
    "clipped, scaled decay": {
        "optim": OptimConfig(
            lr=0.02, clip_norm=0.5, scale_weight_decay=True, average_decay=0.9, warmup_epochs=0.2
        )
    },
    "accumulated": {"train": _fp32(accumulate=4)},
    "fp16": {"train": _fp32(precision="fp16")},
    "example dropout": {
        "curriculum": CurriculumConfig(
            name="self_paced", burn_in=0.2, example_dropout=0.2, exact_dropout=True
        )
    },
    "latent weights": {"curriculum": CurriculumConfig(name="linear", weight_lr=0.3, burn_in=0.1)},
    "history": {"curriculum": CurriculumConfig(name="pd", history_steps=3)},
    "by class": {"curriculum": CurriculumConfig(name="pd", percentile_of="class", history_steps=3)},
    **{name: {"curriculum": CurriculumConfig(name=name)} for name in ("reed_hard", "gce")},
    "noise layer": {"curriculum": CurriculumConfig(name="noise_layer")},
}


@pytest.mark.parametrize("parts", KINDS.values(), ids=KINDS)
def test_a_replayed_step_is_the_step(parts):
    """Bit for bit, although Python runs no more: nothing in it is from the host, and none waits."""
    config = config_of(**parts)
    expected, expected_lines, _ = _run(config)
    found, lines, spade = _run(config, Tape)
    assert spade.news == [f"the step is captured in one CUDA graph, after {WARM_STEPS} eager ones"]
    _assert_same(expected, found, EXACT)
    assert lines == expected_lines


def test_a_curriculum_that_is_learned_anew_is_recorded_anew(monkeypatch):
    monkeypatch.setattr(data_driven, "fit_visits", partial(data_driven.fit_visits, steps=20))
    curriculum = CurriculumConfig(name="dd", trusted=0.2, burn_in=0.5, learn_at=(0.5, 0.75))
    config = config_of(curriculum=curriculum)
    expected, _, _ = _run(config)
    found, _, spade = _run(config, Tape)
    _assert_same(expected, found, EXACT)
    assert len(spade.news) == 3


def _spoil_weights(spade, step):
    """One step that overflows, long after the capture."""
    with torch.no_grad():
        if step == 12:
            next(spade.student.parameters()).mul_(1e30)
        if step == 13:
            next(spade.student.parameters()).mul_(1e-30)


def test_a_replayed_step_is_skipped_and_its_samples_named():
    expected, _, eager = _run(config_of(), spoil=_spoil_weights, steps=14)
    found, _, spade = _run(config_of(), Tape, spoil=_spoil_weights, steps=14)
    _assert_same(expected, found, EXACT)
    assert spade.metrics()["skipped"] == eager.metrics()["skipped"] == 1
    suspects = spade.suspects()
    assert {s.step for s in suspects} == {12}
    assert suspects == pytest.approx(eager.suspects())


def test_a_batch_of_another_size_is_not_replayed():
    shapes = []

    def step(images, sample_ids):
        shapes.append(len(sample_ids))
        return (images.sum(),)

    run = Captured(step, Tape, lambda _: None)
    for rows in (4, 4, 4, 4, 4, 2, 4):
        assert run(torch.ones(rows), torch.ones(rows)) == (torch.tensor(float(rows)),)
    assert shapes == [4] * (WARM_STEPS + 1) + [2]


def test_what_a_step_returned_stays():
    run = Captured(lambda x, ids: (x * 2,), Tape, lambda _: None)
    found = [run(torch.tensor([float(i)]), torch.zeros(1))[0] for i in range(8)]
    assert torch.cat(found).tolist() == [2.0 * i for i in range(8)]


def test_a_step_that_waits_goes_on_eager():
    """A criterion of a user's own may look at its loss."""
    news = []
    run = Captured(lambda x, ids: (x * float(x.sum()),), Tape, news.append)
    for i in range(6):
        assert run(torch.tensor([float(i)]), torch.zeros(1))[0].item() == i * i
    (line,) = news
    assert "goes on eager" in line
    assert "float()" in line


def test_what_waits_in_the_last_warm_step_is_not_captured():
    """Older torch cannot go on after a capture that broke off, so none is begun."""

    class Waiting(Tape):
        def warm(self, step):
            self.waits = "called a synchronizing operation (criterion.py:7)"
            return super().warm(step)

        def record(self, step):
            raise AssertionError("it was begun")

    news = []
    run = Captured(lambda x, ids: (x * 2,), Waiting, news.append)
    found = [run(torch.tensor([float(i)]), torch.zeros(1))[0].item() for i in range(6)]
    assert found == [2.0 * i for i in range(6)]
    assert news == [
        "the step cannot be captured, and goes on eager: called a synchronizing operation "
        "(criterion.py:7)"
    ]


def test_a_capture_that_breaks_off_leaves_nothing_behind():
    """fp16: between unscaling and the update the scaler thinks that the step is half done."""

    config = config_of(train=_fp32(precision="fp16"))
    spade, pixels = new_spade(config, WORLD, 8)
    spade._prepare(next(batches(WORLD, 1, pixels)))
    update, calls = type(spade.scaler).update, []

    def broken(scaler, *arguments):
        calls.append(1)
        if len(calls) == WARM_STEPS + 1:
            raise RuntimeError("out of luck")
        return update(scaler, *arguments)

    spade.scaler.update = broken.__get__(spade.scaler)
    spade._engine = Captured(
        spade._on_device, lambda: Tape(allow_waits=True), spade.news.append, spade._undo
    )
    for _ in spade.train(batches(WORLD, 8, pixels)):
        pass
    assert "goes on eager: RuntimeError: out of luck" in spade.news[0]
    assert len(calls) == 9  # eight steps, one of them twice


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.view(3, 1).unique(dim=0),
    "unique neighbours": lambda x: x.unique_consecutive(),
    "numbers from Python": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("what", WAITING.values(), ids=WAITING)
def test_the_tape_refuses_what_a_gpu_would_be_waited_for(what):
    with pytest.raises(HostWaits), Tape():
        what(torch.arange(3.0))
    with Tape(allow_waits=True):
        what(torch.arange(3.0))


def test_a_tape_repeats_random_numbers_as_a_graph_does():
    """Anew at every replay, from where the generator is."""
    x, tape = torch.ones(100), Tape()
    torch.manual_seed(0)
    expected = [nn.functional.dropout(x).clone() for _ in range(3)]
    torch.manual_seed(0)
    out = tape.record(lambda: nn.functional.dropout(x))
    assert torch.equal(out, expected[0])
    for other in expected[1:]:
        tape.replay()
        assert torch.equal(out, other)


# ---- What cannot be had -------------------------------------------------------------------------


def _news(config, steps=2):
    spade, pixels = new_spade(config, WORLD, steps)
    for _ in spade.train(batches(WORLD, steps, pixels)):
        pass
    return spade.news


def test_without_a_gpu_the_step_is_not_captured():
    (line,) = _news(config_of(train=_fp32(engine="graph")))
    assert line == (
        "the step is not captured in a CUDA graph: a CUDA graph needs a GPU, and this run is on "
        "the cpu"
    )


def test_why_a_step_on_gpus_is_not_captured():
    gpu, parameter = torch.device("cuda", 0), [nn.Parameter(torch.zeros(1))]
    sgd = torch.optim.SGD(parameter, 0.1, fused=True)
    assert step_engine.why_not_captured(World(device=gpu), sgd) == ""
    assert "2 ranks" in step_engine.why_not_captured(World(world_size=2, device=gpu), sgd)
    rprop = torch.optim.Rprop(parameter)
    assert "Rprop waits" in step_engine.why_not_captured(World(device=gpu), rprop)


def test_a_student_that_cannot_be_compiled_runs_eager(monkeypatch):
    """Its running statistics, random numbers and gradients are as if nobody had tried."""

    def broken(run, **_options):
        def first_half(images):
            run(images)
            raise RuntimeError("no compiler\nand a long trace")

        return first_half

    monkeypatch.setattr(torch, "compile", broken)
    student = StudentConfig(name="small_cnn", drop_rate=0.3)
    expected, _, _ = _run(config_of(student=student))
    found, _, spade = _run(config_of(student=student, train=_fp32(engine="compile")))
    _assert_same(expected, found, EXACT)
    assert spade.news == ["the student is not compiled, and runs eager: RuntimeError: no compiler"]


# ---- Compiled -----------------------------------------------------------------------------------


def _compiler():
    try:
        return bool(get_cpp_compiler())
    except Exception:  # torch's own kind, by version
        return False


needs_compiler = pytest.mark.skipif(not _compiler(), reason="torch.compile needs a C++ compiler")
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@needs_compiler
@pytest.mark.slow
def test_compiled_steps_are_the_steps():
    """A student with a batch norm: compiled code writes running statistics too."""
    plain = config_of(student=StudentConfig(name="tiny_norm", drop_rate=0.0))
    expected, expected_lines, _ = _run(plain, steps=5)
    found, lines, spade = _run(replace(plain, train=_fp32(engine="compile-graph")), steps=5)
    assert spade.news[0] == "the student is compiled"
    assert "is not captured" in spade.news[1], "on a CPU"
    for name in ("model", "average", "criterion"):
        _assert_same(expected[name], found[name], CLOSE)
    assert lines[0] == pytest.approx(expected_lines[0], rel=1e-4)


@needs_compiler
@pytest.mark.slow
def test_compiled_ranks_take_the_steps_of_one(ranks):
    config = config_of(train=_fp32(engine="compile"))
    one, two = ranks(train, config, 12).results()
    alone = train(config_of(), 12)
    assert torch.equal(one["curve"], two["curve"])
    torch.testing.assert_close(one["curve"], alone["curve"], rtol=1e-4, atol=1e-5)
    _assert_same(alone["model"], one["model"], {"rtol": 1e-3, "atol": 1e-5})


def test_trying_a_compiled_student_leaves_no_trace():
    """With another backend, which needs no C++ compiler."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    images, random = torch.randn(8, 4), torch.get_rng_state()
    run, why = compiled(module, module, images, backend="aot_eager")
    assert why == ""
    assert run is not module
    assert torch.equal(random, torch.get_rng_state())
    _assert_same(before, module.state_dict(), EXACT)
    assert all(parameter.grad is None for parameter in module.parameters())
