"""What the data path's benchmarks measure, and that a process of its own measures it."""

import multiprocessing
import time
from collections import Counter
from importlib import import_module

import fresh
import index_steps
import loader_peers
import numpy as np
import photographs
import pytest
from PIL import Image

from mentorch.engine.data.index import Index

bench_loader = import_module("bench_loader")


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds


def _burn_then_wait(burnt, go_on):
    burn(0.2)
    burnt.set()
    go_on.wait(20)


def test_cpu_time_counts_workers_that_are_still_at_work():
    before = fresh.cpu_s()
    context = multiprocessing.get_context("fork")
    burnt, go_on = context.Event(), context.Event()
    worker = context.Process(target=_burn_then_wait, args=(burnt, go_on))
    worker.start()
    assert burnt.wait(20)
    burn(0.1)
    used = fresh.cpu_s() - before
    go_on.set()
    worker.join()
    assert 0.28 <= used < 1.5
    assert fresh.cpu_s() - before >= 0.28  # and those that have ended


def test_a_fresh_process_returns_json_or_says_what_went_wrong():
    assert 0 < fresh.call("fresh", "resident_bytes", peak=True) < 2**30
    with pytest.raises(fresh.Failed, match=r"fresh.forget_peak ended with 1: TypeError"):
        fresh.call("fresh", "forget_peak", unknown=1)


def test_memory_is_the_peak_since_it_was_asked_for():
    def grow(mib):
        return np.ones(mib * 2**20, np.uint8).sum()

    grow(64)
    fresh.forget_peak()
    before = fresh.resident_bytes()
    assert fresh.resident_bytes(peak=True) - before < 8 * 2**20
    grow(32)
    assert fresh.resident_bytes(peak=True) - before > 24 * 2**20


def test_every_round_has_all_providers_and_no_place_is_the_best():
    plan = bench_loader.plan(4)
    providers = (*loader_peers.PROVIDERS, *loader_peers.GPU_PROVIDERS)
    assert Counter(provider for _, provider in plan) == dict.fromkeys(providers, 4)
    first = [[p for n, p in plan if n == round_] for round_ in range(4)]
    assert first[0] == first[1][::-1] == first[2] == first[3][::-1]


def test_other_work_is_noticed():
    alike = [{"provider": "a", "mean": 118.0, "std": 28.0}, {"provider": "b", "mean": 119.0}]
    bench_loader.same_work([alike[0], {**alike[1], "std": 28.3}])
    with pytest.raises(AssertionError, match="std"):  # no antialiasing
        bench_loader.same_work([alike[0], {**alike[1], "std": 30.0}])
    with pytest.raises(AssertionError, match="mean"):  # black borders, another colour space
        bench_loader.same_work([alike[0], {**alike[1], "mean": 110.0, "std": 28.0}])


def test_what_is_not_here_says_so():
    assert loader_peers.why_missing("dali-gpu", has_gpu=False) == "no GPU"
    assert loader_peers.why_missing("pil", has_gpu=False) == ""


def test_photographs_are_of_a_photographs_size_and_no_two_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "CANVASES", 2)
    size = photographs.write(tmp_path, 2 * photographs.CLASSES)
    assert 60_000 < size < 110_000
    files = sorted(tmp_path.glob("train/c*/*.jpg"))
    assert len({path.read_bytes() for path in files}) == len(files) == 2 * photographs.CLASSES
    assert Image.open(files[0]).size == (photographs.WIDTH, photographs.HEIGHT)


def test_the_made_up_index_is_an_index_like_webvisions(tmp_path):
    rows = 5000  # about five unusable ones
    index_steps.made_up(rows, tmp_path).write(tmp_path / "index.parquet")
    index = Index.read(tmp_path / "index.parquet")
    assert len(set(index.paths().to_pylist())) == rows
    assert index.path(0).split("/")[1] == "q0000"
    counts = index.counts()
    unusable = sum(n for (_, _, status), n in counts.items() if status != "ok")
    assert 0 < unusable < 25
    sizes = index.sizes()
    assert (sizes[np.setdiff1d(np.arange(rows), index.select("train"))] == 0).all()


@pytest.mark.parametrize("step", index_steps.STEPS)
def test_every_step_runs(step, tmp_path):
    file = tmp_path / "index.parquet"
    index_steps.made_up(2000, tmp_path).write(file)
    found = index_steps.run(step, str(file), rows=2000)
    assert found["seconds"] > 0
    assert found["peak_mib"] >= 0
    assert found.get("bytes", 1) > 0
