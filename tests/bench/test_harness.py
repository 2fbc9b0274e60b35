"""A whole GPU session without a GPU: a made-up clock, tiny sizes, every planned row."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import compile_ahead
import harness
import pytest
import torch
from clocks import Sampler
from harness import LeftOut, Session
from peers import Call
from rows import PROVIDERS, Row, calls_of_a_sample, gpu_rows, smoke_rows

ALL = [row for subject in PROVIDERS for row in gpu_rows(subject)]
HERE = {
    "mentorch",
    "mentorch-lagged",
    "mentorch-chip",
    "eager",
    "eager-lean",
    "quantile",
    "sort",
    "kthvalue",
}


class MadeUpClock:
    """Says that it measures, and that every sample takes 10 µs."""

    device = torch.device("cpu")
    measures = True
    l2_bytes, memory_bytes = 64, 80 * 2**30

    def sampler(self, calls, mode, keep):
        self.asked = len(calls), mode, keep
        sampler = Sampler(calls[:3])  # a hot graph's 20 calls are all the same
        sampler.timed = lambda: [call.run() for call in sampler.calls] and 10.0
        sampler.rounds = lambda: 1
        return sampler

    def empty_launches_us(self, launches, mode):
        return 2.0 * launches

    def copy_bytes_a_us(self):
        return 1e6


class Benchmark(SimpleNamespace):
    """As much of pytest-benchmark's fixture as a session uses."""

    def __init__(self):
        super().__init__(extra_info={})

    def pedantic(self, function, setup, rounds):
        for _ in range(rounds):
            setup()
            function()


def subject_of(row: Row):
    return import_module(f"bench_{row.subject}")


def measure(session, row, tolerance=None):
    benchmark = Benchmark()
    session.measure(row, subject_of(row), benchmark, tolerance)
    return benchmark.extra_info


def tiny(row: Row) -> Row:
    return replace(row, batch=min(row.batch, 5), classes=min(row.classes, 7))


def test_every_kind_of_row_is_set_up_checked_and_recorded():
    """All planned rows at tiny sizes; each that differs in more than its size is run."""
    session = Session(MadeUpClock())
    kinds = {tiny(row) for row in ALL}
    run = [row for row in kinds if row.provider in HERE]
    assert {row.provider for row in run} == HERE
    for row in sorted(run, key=str):
        # So that a cold row goes through three input sets.
        session.clock.l2_bytes = row.ideal_bytes * 3 // 4
        info = measure(session, row, 0.0 if row.subject == "percentile" else None)
        calls, mode, keep = session.clock.asked
        assert mode == row.mode
        assert calls == calls_of_a_sample(row, session.clock.l2_bytes)
        assert keep == (row.l2 == "cold" and row.mode == "graph")
        assert info["median_us"] == info["p99_us"] == 10.0
        assert info["floor_us"] == 2.0 * row.launches
        assert info["ratio_to_floor"] == 10.0 / info["floor_us"]
        assert info["error"] <= harness.TOLERANCE[row.dtype]
        assert {"device", "torch", "date", "commit", "ideal_bytes", "provider"} <= set(info)
    for row in kinds - set(run):
        with pytest.raises(LeftOut, match=r"needs a GPU|smoke test"):
            measure(session, row)


def test_a_cold_row_never_uses_an_input_twice():
    session = Session(MadeUpClock())
    row = next(tiny(r) for r in ALL if r.l2 == "cold" and r.mode == "graph" and r.provider in HERE)
    session.clock.l2_bytes = row.ideal_bytes * 3 // 4
    measure(session, row)
    pointers = {given.logits.data_ptr() for given in session._sets}
    assert len(pointers) == 3
    assert not torch.equal(session._sets[0].logits, session._sets[1].logits)


def test_the_floor_of_large_sizes_is_bytes():
    clock = MadeUpClock()
    clock.copy_bytes_a_us = lambda: 1.0
    row = Row(subject="cross_entropy", provider="eager", batch=5, classes=7)
    info = measure(Session(clock), row)
    assert (info["floor_us"], info["floor_is"]) == (2 * 5 * 7 * 4, "bytes")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_gradient_is_not_timed(monkeypatch, factor):
    subject = import_module("bench_cross_entropy")
    right = subject.setup

    def wrong(row, given):
        call = right(row, given)
        return Call(lambda: (call.run()[0], call.run()[1] * factor), call.restore)

    monkeypatch.setattr(subject, "setup", wrong)
    session = Session(MadeUpClock())
    row = Row(subject="cross_entropy", provider="mentorch", batch=5, classes=7)
    with pytest.raises(AssertionError, match="allowed"):
        measure(session, row)
    assert not session.records
    assert "FAILED" in session.left_out[0]["reason"]


def test_a_peer_that_breaks_is_left_out_and_one_of_ours_is_an_error(monkeypatch):
    def broken(row, given):
        raise RuntimeError("no kernel for this size")

    monkeypatch.setattr(import_module("bench_cross_entropy"), "setup", broken)
    row = Row(subject="cross_entropy", provider="eager", batch=5, classes=7)
    with pytest.raises(LeftOut, match="eager failed: RuntimeError: no kernel"):
        measure(Session(MadeUpClock()), row)
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(Session(MadeUpClock()), replace(row, provider="mentorch"))


def test_rows_that_cannot_be_measured_say_why():
    row = Row(subject="cross_entropy", provider="eager", batch=5, classes=7)
    late = Session(MadeUpClock(), budget_s=-1.0)
    with pytest.raises(LeftOut, match="time budget"):
        measure(late, row)
    assert late.left_out[0]["provider"] == "eager"
    small = Session(MadeUpClock())
    small.clock.memory_bytes = 64 * 5 * 7
    with pytest.raises(LeftOut, match="memory"):
        measure(small, row)


def test_a_file_is_written_for_whole_subjects_only(tmp_path, monkeypatch):
    planned = [Row(subject="percentile", provider=p, batch=7) for p in ("mentorch", "sort")]
    monkeypatch.setattr(harness.rows, "gpu_rows", lambda subject, l2_bytes: planned)
    session = Session(MadeUpClock())
    measure(session, planned[0], 0.0)
    assert session.write(tmp_path) == []
    measure(session, planned[1], 0.0)
    (path,) = session.write(tmp_path)
    assert path.name == f"percentile-cpu-{session.facts['date']}.json"
    written = json.loads(path.read_text())
    assert [row["provider"] for row in written["rows"]] == ["mentorch", "sort"]
    assert torch.__version__.startswith(written["torch"])


def test_the_median_and_the_p99_by_nearest_rank():
    sampler = Sampler([Call(lambda: ())])
    sampler.times_us = [float(n) for n in range(200, 0, -1)]
    summary = sampler.summary()
    assert (summary["median_us"], summary["p99_us"], summary["samples"]) == (100.5, 198.0, 200)


def test_few_samples_are_taken_of_a_slow_step_and_many_of_a_fast_one():
    sampler = Sampler([Call(lambda: ())])
    for step_us, wanted in ((1e6, 20), (1000.0, 50), (1.0, 200)):
        sampler.timed = lambda step_us=step_us: step_us
        assert sampler.rounds() == wanted


@pytest.mark.slow
def test_without_a_gpu_pytest_bench_is_a_smoke_test():
    bench = harness.HERE
    before = sorted(bench.rglob("*.json")), (bench / "RESULTS.md").read_bytes()
    done = subprocess.run(
        [Path(sys.executable).with_name("pytest"), bench, "-q", "-k", "B7 or B8"],
        cwd=bench.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "no GPU: smoke test, not a measurement" in done.stdout
    assert "passed" in done.stdout
    assert "µs" not in done.stdout
    assert before == (sorted(bench.rglob("*.json")), (bench / "RESULTS.md").read_bytes())


def test_a_compile_worker_goes_on_after_a_row_that_fails(monkeypatch, capsys):
    rows = [row for row in smoke_rows("percentile") if row.provider == "mentorch"]
    done = []
    monkeypatch.setattr(compile_ahead, "run_once", lambda row, device: done.append(row) or 1 / 0)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([asdict(row) for row in rows])))
    compile_ahead.main()
    assert done == rows
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_compile_worker_runs_the_step(monkeypatch):
    row = Row(subject="reweight", provider="mentorch", batch=5, classes=7, curriculum="linear")
    subject = import_module("bench_reweight")
    right, ran = subject.setup, []

    def watched(row, given):
        call = right(row, given)
        return Call(lambda: ran.append(row) or call.run())

    monkeypatch.setattr(subject, "setup", watched)
    compile_ahead.run_once(row, torch.device("cpu"))
    assert ran == [row]
