"""The model of docs/scaling.md does its sums with the code's bytes, and the page shows them.

Host counts are tested around a host's eight GPUs: one GPU, one host, one GPU more than that.
"""

import math
import re

import pytest
import scaling
import scaling_model
from scaling_constants import CONSTANTS, value
from scaling_model import Setup, efficiency, flag_steps, lost, step_s, terms

from mentorch.engine import agreement
from mentorch.engine.config import ParallelConfig, TrainConfig
from mentorch.engine.distributed import World
from mentorch.kernels import ledger, weigh

PAGE = (scaling.DOCS / "scaling.md").read_text(encoding="utf-8")
FAST = 165e9  # bytes/s


def test_the_page_shows_what_the_model_says():
    assert scaling.written(PAGE) == PAGE, "python bench/scaling.py --write"


def test_every_section_with_predictions_says_that_they_are_none_but_a_model():
    sections = [part for part in PAGE.split("\n## ") if "<!-- table" in part]
    headings = [part.splitlines()[0] for part in sections]
    assert len(headings) >= 5
    assert [h for h in headings if "model, not measured" not in h] == ["Constants"]


def test_every_constant_has_a_unit_and_a_source_and_no_speed_of_ours_passes_for_measured():
    for name, constant in CONSTANTS.items():
        assert constant.unit, name
        assert len(constant.source) > 10, name
        assert constant.value > 0, name
    for name in ("rate_low", "rate_mid", "rate_high"):
        assert CONSTANTS[name].source.startswith("assumed")


def test_bytes_and_counts_are_those_of_the_code():
    per_sample = scaling_model.checkpoint_bytes(1) - scaling_model.checkpoint_bytes(0)
    assert per_sample == ledger.ROW_BYTES
    assert scaling_model.device_bytes(1) == ledger.ROW_BYTES + 2 * 8  # two int64 labels
    assert value("percentile_keys") == weigh._MOST_KEYS
    assert value("bucket") == ParallelConfig().bucket_mb * 2**20
    assert value("flag_ranks") == agreement._RANKS_A_STEP
    assert value("resume_hashes") == 2 + TrainConfig().keep_checkpoints  # chosen, loaded, others


@pytest.mark.parametrize("gpus", [1, 8, 9, 1024])
def test_a_step_is_the_sum_of_its_terms_and_none_is_negative(gpus):
    parts = terms(Setup(gpus=gpus))
    assert tuple(parts) == scaling_model.TERMS
    assert min(parts.values()) >= 0
    assert step_s(Setup(gpus=gpus)) == pytest.approx(sum(parts.values()))


def test_one_gpu_waits_for_nobody():
    assert efficiency(Setup(gpus=1)) == 1.0
    assert set(terms(Setup(gpus=1)).values()) == {64 / value("rate_mid"), 0.0}


def test_more_gpus_are_never_more_efficient():
    found = [efficiency(Setup(gpus=2**n)) for n in range(13)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_an_all_reduce_moves_a_ring_s_bytes():
    s = Setup(gpus=16, bus=FAST)
    more = scaling_model.all_reduce_s(s, 3e9) - scaling_model.all_reduce_s(s, 1e9)
    assert more == pytest.approx(2 * 15 / 16 * 2e9 / FAST)


def test_latency_grows_with_every_rank_around_a_ring_and_with_the_logarithm_up_a_tree():
    ring = [scaling_model.gather_s(Setup(gpus=n, batch=1, bus=1e15)) for n in (256, 512, 1024)]
    assert ring[2] - ring[1] == pytest.approx(2 * (ring[1] - ring[0]))
    tree = [scaling_model.all_reduce_s(Setup(gpus=n), 0.0) for n in (256, 512, 1024)]
    assert tree[2] - tree[1] == pytest.approx(tree[1] - tree[0])


def test_a_slow_network_shows_what_backward_does_not_hide():
    s = Setup(gpus=1024, bus=1e9)
    buckets = math.ceil(4 * value("parameters") / value("bucket"))
    reduce = scaling_model.all_reduce_s(s, 4 * value("parameters"), buckets)
    hidden = 2 / 3 * (64 / value("rate_mid")) * (1 - 1 / buckets)
    assert terms(s)["all-reduce"] == pytest.approx(reduce - hidden)
    fast = Setup(gpus=1024, bus=FAST)
    assert terms(fast)["all-reduce"] < 0.05 * hidden  # the last bucket only


def test_lagged_takes_the_gather_off_the_step():
    parts = terms(Setup(gpus=1024, lagged=True))
    assert parts["gather"] == parts["percentile"] == 0
    assert step_s(Setup(gpus=1024, lagged=True)) < step_s(Setup(gpus=1024))


def test_flags_have_more_steps_of_time_where_they_go_round_more_ranks():
    hidden = [terms(Setup(gpus=2**n, rate=value("rate_high")))["flags"] for n in range(17)]
    assert set(hidden) == {0.0}  # 64 images take longer than 256 hops, a ring's share of a step
    parts = terms(Setup(gpus=1024, batch=8))  # the shortest step: launches
    rest = sum(parts.values()) - parts["flags"]
    assert parts["flags"] == pytest.approx((2 * 1023 * value("gloo_hop") - 8 * rest) / 8)
    assert parts["flags"] > 0


# One exchange a step up to 128 ranks, one every second step from there on, the page's largest run.
@pytest.mark.parametrize(("gpus", "k"), [(2, 1), (128, 1), (129, 2), (1024, 8)])
def test_a_stop_comes_k_to_2_k_minus_1_steps_later(monkeypatch, gpus, k):
    class Work:
        def wait(self) -> None: ...

    monkeypatch.setattr(agreement.dist, "all_reduce", lambda *_, **__: Work())
    found = []
    for asked in range(1, 2 * k + 1):  # at every place between two exchanges
        flags = agreement.Agreement(World(world_size=gpus), "stop")
        heard = (n for n in range(1, 99) if flags.exchange(n >= asked)["stop"])
        found.append(next(heard) - asked)
    assert flag_steps(Setup(gpus=gpus)) == k
    assert (min(found), max(found)) == (k, 2 * k - 1)


def test_a_resumption_hashes_and_a_checkpoint_is_read_back():
    bytes_ = scaling_model.checkpoint_bytes(10**9)
    s = Setup(gpus=1024, samples=10**9)
    hashing = scaling_model.resume_s(s) - scaling_model.read_s(s)
    assert hashing == pytest.approx(4 * bytes_ / value("sha256"))
    left = scaling_model.written_s(10**9) - bytes_ / value("write") - bytes_ / value("sha256")
    assert left == pytest.approx(bytes_ / value("read_back"))


def test_limits_come_in_order_and_first_finds_them():
    for found in (scaling_model.gpu_limits(), scaling_model.sample_limits()):
        limits = [limit for _, limit in found]
        assert limits == sorted(limits)
    assert scaling_model.first(lambda x: x > 1000, 1, 1e6) == pytest.approx(1000)
    assert scaling_model.first(lambda x: False, 1, 1e6) == math.inf


def test_failures_are_as_many_as_the_source_counted():
    days_54 = 54 * 24 * 3600
    assert days_54 / scaling_model.between_failures_s(16_384) == pytest.approx(419)


@pytest.mark.parametrize("samples", [2_400_000, 100_000_000])  # a small ledger and a large one
def test_youngs_interval_loses_least(samples):
    s = Setup(gpus=64, samples=samples)
    best = scaling_model.interval_s(s)
    assert best > scaling_model.written_s(samples)
    assert lost(s, best) < min(lost(s, best / 2), lost(s, best * 2))


def test_no_checkpoint_begins_before_the_last_is_written():
    s = Setup(gpus=1_000_000, samples=10**9)  # so many fail that Young's is shorter
    assert scaling_model.interval_s(s) == scaling_model.written_s(s.samples)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        Setup(gpus=0)
    with pytest.raises(ValueError, match="no place for the table 'weak'"):
        scaling.written("a page")


def test_the_figure_is_the_same_every_time_and_says_what_it_is(tmp_path):
    for name in ("one.svg", "two.svg"):
        scaling.draw(tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert re.search("Model, not measured", text)
