"""RESULTS.md from made-up results: the numbers here are nobody's."""

import json
from pathlib import Path

import report

ROW = {
    "subject": "reweight",
    "provider": "eager",
    "curriculum": "linear",
    "batch": 128,
    "classes": 1000,
    "dtype": "bf16",
    "mode": "graph",
    "l2": "hot",
    "median_us": 40.0,
    "p99_us": 44.0,
    "floor_us": 5.0,
    "floor_is": "launches",
    "ratio_to_floor": 8.0,
    "ideal_bytes": 512_000,
    "traffic_bytes": None,
    "error": 1e-3,
}
FACTS = {
    "device": "Made-up GPU",
    "date": "2020-01-01",
    "commit": "abc",
    "copy_gb_s": 1000.0,
    "torch": "2.0",
}


def write(folder: Path, rows, left_out=(), subject="reweight"):
    result = {**FACTS, "subject": subject, "rows": rows, "left_out": list(left_out)}
    (folder / f"{subject}.json").write_text(json.dumps(result))
    return report.render(folder)


def cells(text: str, provider: str) -> dict[str, str]:
    """The one row of a provider, by column."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    (found,) = [line for line in lines if line[0] == provider]
    return dict(zip(lines[0], found, strict=True))


def test_no_results_says_so_and_how_to_get_them(tmp_path):
    text = report.render(tmp_path)
    assert "Nothing has been measured yet" in text
    assert ".venv/bin/pytest bench" in text
    assert "µs" not in text


def test_the_committed_file_is_what_the_results_say():
    assert (report.HERE / "RESULTS.md").read_text() == report.render()


def test_winning_and_losing_rows_are_printed_alike(tmp_path):
    winner = {**ROW, "provider": "mentorch", "median_us": 10.0, "ratio_to_floor": 2.0}
    loser = {**ROW, "provider": "compile", "median_us": 80.0, "ratio_to_floor": 16.0}
    text = write(tmp_path, [ROW, winner, loser])
    assert "Nothing has been measured" not in text
    assert cells(text, "mentorch (linear)")["× faster than eager"] == "4.00"
    assert cells(text, "compile (linear)")["× faster than eager"] == "0.50"
    assert cells(text, "compile (linear)")["× floor"] == "16.00"
    assert cells(text, "eager (linear)")["traffic MB"] == "–"
    assert cells(text, "eager (linear)")["ideal MB"] == "0.512"


def test_speed_ups_are_of_the_same_work_in_the_same_state(tmp_path):
    for column, value in (("l2", "cold"), ("mode", "dispatch"), ("curriculum", "pd")):
        other = {**ROW, "provider": "mentorch", column: value}
        name = f"mentorch ({other['curriculum']})"
        assert cells(write(tmp_path, [ROW, other]), name)["× faster than eager"] == "–"


def test_the_percentile_is_compared_with_a_sort(tmp_path):
    sort = {**ROW, "subject": "percentile", "provider": "sort", "curriculum": ""}
    ours = {**sort, "provider": "mentorch", "median_us": 10.0}
    text = write(tmp_path, [sort, ours], subject="percentile")
    assert cells(text, "mentorch")["× faster than sort"] == "4.00"


def test_what_was_left_out_is_listed_with_its_reason(tmp_path):
    gone = {"provider": "quack", "reason": "not installed"}
    text = write(tmp_path, [ROW], [gone, gone, {"provider": "mentorch", "reason": "FAILED: x"}])
    assert "- 2 × `quack`: not installed" in text
    assert "- 1 × `mentorch`: FAILED: x" in text
    for rule in report.RULES:
        assert rule in text
