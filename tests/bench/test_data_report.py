"""Tables of the data path from made-up records: the numbers here are nobody's."""

import json

import data_report
import data_session
import pytest
import report
from harness import LeftOut

LOADER = {
    "subject": "loader",
    "device": "Made-up CPU, 2 cores",
    "date": "2020-01-01",
    "commit": "abc",
    "load_before": 0.1,
    "load_after": 0.2,
    "torch": "2.0",
    "work": {"images": 1024, "mean bytes a file": 90_000.4},
    "left_out": [{"provider": "webdataset", "reason": "not installed"}],
}


def record(provider, round_=0, images_s=100.0, **other):
    figures = {"images_s": images_s, "cpu_ms": 2.0, "first_s": 1.0, "mean": 118.0, "std": 28.0}
    return {"provider": provider, "round": round_, **figures, **other}


def step(name, seconds=1.0, **other):
    return {"provider": name, "round": 0, "seconds": seconds, "peak_mib": 10.0, **other}


def cells(lines, name):
    header, *rows = lines
    (found,) = [row for row in rows if row[0] == name]
    return dict(zip(header, found, strict=True))


def test_ratios_are_of_the_same_round():
    # The machine is twice as fast in the second round, for both: the ratio stays 2.
    records = [
        record("pil", 0, 100.0),
        record("mentorch", 0, 200.0),
        record("mentorch", 1, 400.0),
        record("pil", 1, 200.0),
        record("mentorch", 2, 999.0),  # a round without pil counts for nothing here
    ]
    assert data_report.ratios(records, "mentorch", "pil") == [2.0, 2.0]
    assert data_report.ratios(records, "mentorch", "dali") == []


def test_the_fastest_comes_first_and_losing_rows_are_there():
    records = [record("mentorch", images_s=50.0), record("dali"), record("pil", images_s=75.0)]
    lines = list(data_report.loader_table(records))
    assert [line[0] for line in lines[1:]] == ["dali", "pil", "mentorch"]
    assert cells(lines, "mentorch")["× dali"] == "0.50"
    assert cells(lines, "mentorch")["× pil"] == "0.67"


def test_the_gpus_rows_are_held_against_dali_on_the_gpu():
    records = [record("dali", images_s=1.0), record("dali-gpu"), record("mentorch-gpu")]
    assert cells(data_report.loader_table(records), "mentorch-gpu")["× dali"] == "1.00"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([1.234], "1.23"),  # one round has no spread
        ([3.0, 1.0, 2.0], "2.00 (1.00–3.00)"),
    ],
)
def test_spread(values, text):
    assert data_report.spread(values, 2) == text


def test_the_goals_stand_beside_the_figures_and_the_ledger_beside_its_criterion():
    ledger = step("ledger", bytes=24 * 2**20, record_us=50.0, criterion_us=200.0)
    lines = list(data_report.index_table([step("read", 12.0), step("rank"), ledger]))
    assert cells(lines, "read")["goal"] == "≤ 10 s"
    assert cells(lines, "rank")["goal"] == "≤ 10 s, ≤ 1024 MiB"
    assert cells(lines, "ledger")["file or table MiB"] == "24.0"
    assert "record 50 µs, its criterion 200 µs" in cells(lines, "ledger")["besides"]


def test_a_section_names_the_machine_its_load_and_what_is_missing():
    text = data_report.section({**LOADER, "records": [record("mentorch")]})
    assert text.startswith("## loader, Made-up CPU, 2 cores, 2020-01-01\n")
    assert "images 1,024, mean bytes a file 90,000; load 0.1 before, 0.2 after; torch 2.0" in text
    assert "- `webdataset`: not installed" in text


def test_results_of_a_cpu_do_not_look_like_those_of_kernels(tmp_path):
    result = {**LOADER, "records": [record("mentorch")]}
    path = data_session.write(result, tmp_path)
    assert path.name == "loader-made-up-cpu-2-cores-2020-01-01.json"
    assert json.loads(path.read_text()) == result
    text = report.render(tmp_path)
    assert "Nothing has been measured yet on a GPU" in text
    assert report.INTRODUCTION not in text
    assert text.index("# The data path") < text.index("## loader, Made-up CPU")


class Benchmark:
    """pytest-benchmark's fixture: gives back what was asked for, or fails."""

    def __init__(self, failing=()):
        self.failing, self.extra_info = failing, {}

    def pedantic(self, call, args, kwargs):
        if kwargs["provider"] in self.failing:
            raise data_session.fresh.Failed("killed")
        return {"images_s": 1.0}


@pytest.fixture
def session():
    return data_session.Session("loader", {}, ("loader_peers", "measure"), {})


def test_a_peer_that_fails_is_left_out_for_good_and_ours_is_an_error(session):
    session.measure(0, "pil", "", Benchmark())
    for failing in (("pil",), ()):  # once failed, not measured again
        with pytest.raises(LeftOut, match="failed: killed"):
            session.measure(1, "pil", "", Benchmark(failing))
    assert session.result()["records"] == []
    assert session.result()["left_out"] == [{"provider": "pil", "reason": "failed: killed"}]
    with pytest.raises(data_session.fresh.Failed, match="killed"):
        session.measure(0, "mentorch-shards", "", Benchmark(("mentorch-shards",)))


def test_only_a_whole_run_is_written(session):
    plan = [(0, "mentorch"), (0, "dali"), (1, "dali"), (1, "mentorch")]
    session.measure(0, "mentorch", "", Benchmark())
    with pytest.raises(LeftOut):
        session.measure(0, "dali", "not installed", Benchmark())
    assert not session.is_whole(plan)
    session.measure(1, "mentorch", "", Benchmark())
    assert session.is_whole(plan)
