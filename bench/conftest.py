"""`pytest bench`: on a GPU all rows, then results/ and RESULTS.md; elsewhere a smoke test.

That is said of the kernels. The data path (bench_loader, bench_index) is measured on any machine,
by a session of its own (`data_session`).

    pytest bench                                # everything
    pytest bench -k "mentorch and B256"         # some rows, timed and printed, nothing written
    pytest bench --bench-plan -q                # which rows an H100 would get, and how long

A row is one test. What pytest-benchmark times is one sample up to the device's end, by the host's
clock; the device's own time of the same sample is in `benchmark.extra_info` and in results/.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # as `python bench/x.py` would

import compile_ahead
import harness
import report
import rows
import train_subjects

_SESSION = pytest.StashKey[harness.Session]()
_WRITTEN = pytest.StashKey[list[Path]]()
_SUBJECT = "bench_"


def pytest_addoption(parser):
    group = parser.getgroup("mentorch benchmarks")
    group.addoption(
        "--bench-budget-s", type=float, default=450.0, help="begin no row after so many seconds"
    )
    group.addoption("--bench-plan", action="store_true", help="list the rows for an H100 and stop")
    group.addoption(
        "--bench-part", choices=("all", "eager", "compiled"), default="all",
        help="bench_train: only the processes that compile nothing, or the others",
    )  # fmt: skip
    group.addoption(
        "--bench-quick", action="store_true", help="data path: one small round, nothing is written"
    )


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table would be of host times
    if config.getoption("--bench-plan"):
        config.option.collectonly = True


def _rows(config, subject):
    if config.getoption("--bench-plan"):
        return rows.gpu_rows(subject)
    if not torch.cuda.is_available():
        return rows.smoke_rows(subject)
    return rows.gpu_rows(subject, torch.cuda.get_device_properties(0).L2_cache_size)


def pytest_generate_tests(metafunc):
    subject = metafunc.module.__name__.rpartition(".")[2].removeprefix(_SUBJECT)
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", _rows(metafunc.config, subject), ids=str)


def _row_of(item):
    return item.callspec.params["row"]


def pytest_collection_modifyitems(items):
    """The usual sizes of all subjects first; rows that share inputs side by side."""
    measured = [item for item in items if "row" in getattr(item, "fixturenames", ())]
    others = [item for item in items if item not in set(measured)]
    measured.sort(key=lambda item: (_row_of(item).tier, _row_of(item).cell))
    items[:] = others + measured


def pytest_report_header(config):
    if not torch.cuda.is_available():
        return "bench: no GPU: smoke test, not a measurement, of the kernels"
    return f"bench: {torch.cuda.get_device_name()}, at most {_budget_s(config):.0f} s"


def _budget_s(config):
    return config.getoption("--bench-budget-s")


def pytest_collection_finish(session):
    config = session.config
    wanted = [_row_of(item) for item in session.items if "row" in getattr(item, "fixturenames", ())]
    # On a GPU only what can run is compiled and counted; a plan counts every peer.
    on_gpu = torch.cuda.is_available()
    if on_gpu and not config.getoption("--bench-plan"):
        wanted = [row for row in wanted if not harness.why_missing(row.provider, True)]
    if on_gpu or config.getoption("--bench-plan"):
        workers = compile_ahead.workers() if on_gpu else compile_ahead.MOST_WORKERS
        minutes = rows.estimate_s(wanted, workers) / 60
        config.get_terminal_writer().line(
            f"bench: {len(wanted)} rows, {len(rows.compilations(wanted))} sizes to compile by "
            f"{workers} processes: about {minutes:.1f} min by the assumptions in bench/rows.py"
        )
    _estimate_training(session.items, config)
    if config.option.collectonly:
        return
    config.stash[_SESSION] = harness.new_session(_budget_s(config))
    if on_gpu and wanted:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            compile_ahead.compile_rows(wanted, limit_s=_budget_s(config) / 3)


def _estimate_training(items, config):
    """How long the processes of bench_train may take on a GPU."""
    processes = [
        i.callspec.params["group"] for i in items if "group" in getattr(i, "fixturenames", ())
    ]
    if processes and (torch.cuda.is_available() or config.getoption("--bench-plan")):
        config.get_terminal_writer().line(
            f"bench: {len(processes)} processes of bench_train: about "
            f"{train_subjects.estimate_s(processes) / 60:.1f} min by the assumptions in "
            "bench/train_subjects.py"
        )


@pytest.fixture
def measure(request, benchmark):
    """measure(row, tolerance=None): times the row, or skips it and says why."""
    session = request.config.stash[_SESSION]

    def measure_row(row, tolerance=None):
        try:
            session.measure(row, request.module, benchmark, tolerance)
        except harness.LeftOut as reason:
            benchmark.skipped = True  # or pytest-benchmark warns that it was not used
            pytest.skip(str(reason))

    return measure_row


def pytest_sessionfinish(session):
    config = session.config
    done = config.stash.get(_SESSION, None)
    if done is None or not done.on_gpu:
        return
    if written := done.write():
        config.stash[_WRITTEN] = [*written, report.write()]


def pytest_terminal_summary(terminalreporter, config):
    done = config.stash.get(_SESSION, None)
    if done is None:
        return
    if not (done.records or done.left_out):
        return  # no row of a kernel was asked for
    if not done.on_gpu:
        terminalreporter.section("no GPU: smoke test, not a measurement; nothing was written")
        return
    for record in done.records:
        terminalreporter.line(report.one_line(record))
    written = ", ".join(map(str, config.stash.get(_WRITTEN, []))) or "nothing: a part of the rows"
    terminalreporter.section(f"{len(done.left_out)} rows left out; written: {written}")
