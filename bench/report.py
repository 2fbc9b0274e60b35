"""RESULTS.md from every file under results/.

python bench/report.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_report
import train_report
from rows import RULES

HERE = Path(__file__).parent
NOTHING = """Nothing has been measured yet on a GPU. Where there is one,

    .venv/bin/pytest bench

measures the kernels in less than 8 minutes, then the data path with the GPU's decoder, and writes
`bench/results/*.json` and this file.
"""
INTRODUCTION = """Median and p99 of one step in µs, by CUDA events. *dispatch*: call by call from an
idle queue, so host time that the device waits for counts. *graph*: replayed from a CUDA graph of
several steps, the time divided by their number (p99 is of such means). *hot*: the same buffers
again; *cold*: no input is left in the L2 cache. Every provider was checked against the float64
reference before it was timed; *error* is the largest ‖out − ref‖ / ‖ref‖ of its outputs.

The *floor* is the larger of two times measured in the same run: as many empty launches as the work
needs at least (two; one for the percentile), and its *ideal* bytes (every input byte read once,
every gradient byte written once) at the bandwidth of a device-to-device copy. A hot row whose data
fit into the L2 cache can be faster than that bandwidth allows. *traffic*: logits-sized reads and
writes that the provider's code asks for, whichever cache answers; – where it is not ours to count.
"""
COLUMNS = (
    "provider",
    "B",
    "C",
    "dtype",
    "mode",
    "L2",
    "median µs",
    "p99 µs",
    "floor µs",
    "of",
    "× floor",
    "× faster than eager",
    "ideal MB",
    "traffic MB",
    "error",
)
# What a subject is measured against in the column of speed-ups, where nothing is called eager.
_BASELINE = {"percentile": "sort"}


def _size(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows that do the same work in the same state."""
    return tuple(row[k] for k in ("curriculum", "classes", "batch", "dtype", "mode", "l2"))


def _who(row: dict[str, Any]) -> str:
    return f"{row['provider']} ({row['curriculum']})" if row["curriculum"] else row["provider"]


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.3g}"


def _cells(row: dict[str, Any], eager_us: float | None) -> list[str]:
    faster = "–" if eager_us is None else f"{eager_us / row['median_us']:.2f}"
    return [
        _who(row),
        str(row["batch"]),
        str(row["classes"]),
        row["dtype"],
        row["mode"],
        row["l2"],
        f"{row['median_us']:.2f}",
        f"{row['p99_us']:.2f}",
        f"{row['floor_us']:.2f}",
        row["floor_is"],
        f"{row['ratio_to_floor']:.2f}",
        faster,
        _megabytes(row["ideal_bytes"]),
        _megabytes(row["traffic_bytes"]),
        f"{row['error']:.0e}",
    ]


def one_line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return f"{row['subject']:14}" + " ".join(f"{cell:>8}" for cell in _cells(row, None))


def _table(result: dict[str, Any]) -> Iterator[str]:
    baseline = _BASELINE.get(result["subject"], "eager")
    rows = sorted(result["rows"], key=lambda row: (_size(row), row["median_us"]))
    eager = {_size(row): row["median_us"] for row in rows if row["provider"] == baseline}
    names = [name.replace("eager", baseline) for name in COLUMNS]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(_cells(row, eager.get(_size(row)))) + " |"


def _left_out(result: dict[str, Any]) -> Iterator[str]:
    """Reasons with the number of rows, the most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for row in result["left_out"]:
        key = row["provider"], row["reason"]
        counts[key] = counts.get(key, 0) + 1
    for (provider, reason), count in sorted(counts.items(), key=lambda item: -item[1]):
        yield f"- {count} × `{provider}`: {reason}"


def _section(result: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {result[name]}"
        for name in ("torch", "triton", "cuda", "liger-kernel", "quack-kernels")
        if result.get(name)
    )
    lines = [
        f"## {result['subject']}, {result['device']}, {result['date']}",
        "",
        f"{versions}; commit {result['commit'] or 'unknown'}; device-to-device copy "
        f"{result['copy_gb_s']:.0f} GB/s, read plus written.",
        "",
        *_table(result),
        "",
        *_left_out(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def section(result: dict[str, Any]) -> str:
    """A result's part of RESULTS.md."""
    if result["subject"] in train_report.SUBJECTS:
        return train_report.section(result)
    data = result["subject"] in data_report.SUBJECTS
    return data_report.section(result) if data else _section(result)


def render(folder: Path = HERE / "results") -> str:
    """The text of RESULTS.md."""
    paths = (
        path for path in sorted(folder.glob("*.json")) if path.stem.split("-")[0] != "roofline"
    )
    results = [json.loads(path.read_text()) for path in paths]
    others = [result for result in results if result["subject"] in data_report.SUBJECTS]
    steps = [result for result in results if result["subject"] in train_report.SUBJECTS]
    kernels = [result for result in results if result not in others + steps]
    body = [INTRODUCTION, *map(_section, kernels)] if kernels else [NOTHING]
    rules = "## What is left out\n\n" + "\n".join(f"- {rule}" for rule in RULES) + "\n"
    data = ["# The data path\n", *map(section, others)] if others else []
    training = ["# The training step\n", *map(section, steps)] if steps else []
    head = "# Results\n\nWritten by `python bench/report.py`; not to be edited.\n"
    return "\n".join([head, *body, rules, *data, *training])


def write(folder: Path = HERE / "results", target: Path = HERE / "RESULTS.md") -> Path:
    """Writes RESULTS.md."""
    target.write_text(render(folder))
    return target


if __name__ == "__main__":
    print(write())
