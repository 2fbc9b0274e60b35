"""The plan keeps what RULES promise. It needs no GPU: an H100's cache size is assumed."""

from dataclasses import replace

import pytest
import rows
from rows import L2_BYTES, PROVIDERS, Row, gpu_rows

ALL = [row for subject in PROVIDERS for row in gpu_rows(subject)]
WITH_LOGITS = [row for row in ALL if row.subject in ("reweight", "cross_entropy")]


def test_no_row_twice():
    assert len({(row.subject, str(row)) for row in ALL}) == len(ALL)


@pytest.mark.parametrize("subject", ["reweight", "cross_entropy"])
def test_every_size_is_there_in_both_modes(subject):
    ours = [row for row in gpu_rows(subject) if row.provider == "mentorch"]
    for dtype, batches in (("bf16", rows.BATCHES), ("fp32", rows.FP32_BATCHES)):
        for mode in ("dispatch", "graph"):
            sizes = {(r.batch, r.classes) for r in ours if (r.dtype, r.mode) == (dtype, mode)}
            assert sizes == {(b, c) for b in batches for c in rows.CLASSES}


def test_what_is_left_out_is_left_out_by_the_rules():
    assert {row.provider for row in ALL if row.mode == "graph"} == {
        provider for providers in PROVIDERS.values() for provider in providers
    } - {"liger"}
    compiled = {r.cell[1:] for r in WITH_LOGITS if r.provider.startswith("compile")}
    assert compiled == rows.COMPILED
    assert {row.classes for row in ALL if row.curriculum == "pd"} == {1000}
    assert {row.l2 for row in ALL if row.subject == "percentile"} == {"hot"}
    assert max(row.logits_bytes for row in ALL) <= 2 * 2**30


def test_batch_norms_are_few():
    found = gpu_rows("batch_norm")
    assert {(row.mode, row.dtype) for row in found} == {("graph", "bf16")}
    assert len({row.cell for row in found}) == len(rows.IMAGES)
    assert len(found) <= 24


def test_more_than_two_gib_of_logits_are_skipped(monkeypatch):
    monkeypatch.setattr(rows, "BATCHES", (8192,))
    largest = max(row.logits_bytes for row in gpu_rows("cross_entropy"))
    assert 2**30 < largest <= 2 * 2**30, "8192 × 100,000 in bf16 fits"
    monkeypatch.setattr(rows, "BATCHES", (16384,))
    # 16384 × 100,000 in bf16 are 3.05 GiB
    assert {r.classes for r in gpu_rows("cross_entropy") if r.dtype == "bf16"} == {
        c for c in rows.CLASSES if c != 100_000
    }


def test_cold_rows_leave_nothing_in_the_cache():
    cold = [row for row in ALL if row.l2 == "cold"]
    assert cold
    for row in cold:
        sets = rows.sets_for_cold(row, L2_BYTES)
        assert sets * row.ideal_bytes >= 4 * L2_BYTES
        assert sets <= rows.MOST_SETS
        if row.mode == "dispatch":
            assert sets == 1, "a single set must do, since a sample is one call"
        else:
            assert rows.calls_of_a_sample(row, L2_BYTES) >= sets


def test_hot_rows_can_be_hot():
    hot = [row for row in WITH_LOGITS if row.l2 == "hot"]
    assert all(row.ideal_bytes < 4 * L2_BYTES for row in hot)
    assert {row.cell for row in WITH_LOGITS if row.mode == "dispatch"} == {
        row.cell for row in WITH_LOGITS
    }, "every size is dispatched hot or cold"


def test_bytes():
    row = Row(subject="reweight", provider="liger", batch=128, classes=1000, dtype="bf16")
    assert (row.ideal_bytes, row.traffic_bytes) == (512_000, 1_280_000)
    assert replace(row, provider="eager").traffic_bytes is None
    image = replace(row, subject="batch_norm", provider="mentorch")
    assert (image.ideal_bytes, image.traffic_bytes) == (5 * 256_000, 8 * 256_000)
    assert Row(subject="percentile", provider="mentorch", batch=128).ideal_bytes == 512


def test_the_estimate_of_a_16_core_machine_stays_below_8_minutes():
    assert rows.estimate_s(ALL, workers=15) < 8 * 60


def test_what_compiles_alike_is_compiled_once_and_the_slow_first():
    needed = rows.compilations(ALL)
    keys = [(row.cell, row.provider, row.curriculum) for row in needed]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {
        (r.cell, r.provider, r.curriculum) for r in ALL if r.provider in rows.COMPILE_S
    }
    seconds = [rows.COMPILE_S[row.provider] for row in needed]
    assert seconds == sorted(seconds, reverse=True)
