"""Time and memory of a rank with an index of 2.4 M samples, step by step (`index_steps`).

    pytest bench/bench_index.py                   # three rounds: results/ and RESULTS.md
    pytest bench/bench_index.py --bench-quick     # one round of few rows, nothing is written

Goals: a rank is ready within 10 s and 1 GiB.
"""

import data_session
import index_steps
import pytest

ROUNDS = 3
ROWS, QUICK_ROWS = 2_400_000, 20_000  # WebVision 1.0 has 2.44 M training images


def plan(rounds: int) -> list[tuple[int, str]]:
    """(round, step); a round begins by writing the index that its other steps read."""
    return [(n, step) for n in range(rounds) for step in index_steps.STEPS]


def pytest_generate_tests(metafunc):
    if "measured" in metafunc.fixturenames:
        rows = plan(1 if metafunc.config.getoption("--bench-quick") else ROUNDS)
        metafunc.parametrize("measured", rows, ids=[f"round{n}-{step}" for n, step in rows])


@pytest.fixture(scope="module")
def session(request, tmp_path_factory):
    rows = QUICK_ROWS if request.config.getoption("--bench-quick") else ROWS
    file = tmp_path_factory.mktemp("index") / "made-up.index.parquet"
    return data_session.Session(
        "index",
        {"rows": rows, "classes": index_steps.CLASSES},
        ("index_steps", "run"),
        {"file": str(file), "rows": rows},
    )


def test_index(session, measured, benchmark):
    session.measure(*measured, missing="", benchmark=benchmark)


def test_results_are_written(session, request):
    session.finish(plan(ROUNDS), request.config)
