"""The data path's part of RESULTS.md, from the records that `data_session` keeps."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

PACKAGES = (
    "mentorch",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "pillow",
    "webdataset",
    "numpy",
    "pyarrow",
)
GOALS = {"read": "≤ 10 s", "rank": "≤ 10 s, ≤ 1024 MiB"}
ABOUT_LOADER = """Training crops, uint8 [64, 299, 299, 3], and the CPU time of all threads and
workers an image (`bench/loader_peers.py` says who does what). A round measures every provider once,
each in a fresh process with as many threads or workers as there are cores: medians of the rounds,
lowest to highest in brackets; ratios are of the same round. All files are in the page cache. Mean
and standard deviation are those of the pixels: all do the same work."""
ABOUT_INDEX = """What a rank does with an index of the whole of WebVision (`bench/index_steps.py`),
each step in a fresh process: medians of the rounds, lowest to highest in brackets. *MiB*: by how
much the process grew at the most. *rank* is reading, selecting and making the loader, with the
order of its first epoch; the steps below it come after reading."""


def spread(values: Sequence[float], digits: int) -> str:
    """Median and, of several, the lowest and highest."""
    if not values:
        return "–"
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _of(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in records if record["provider"] == name]


def ratios(records: list[dict[str, Any]], name: str, to: str) -> list[float]:
    """images/s of a provider over another's, for each round that has both."""
    base = {record["round"]: record["images_s"] for record in _of(records, to)}
    return [
        record["images_s"] / base[record["round"]]
        for record in _of(records, name)
        if record["round"] in base
    ]


def providers(records: list[dict[str, Any]]) -> list[str]:
    """Who was measured, in the order of the first round."""
    return list(dict.fromkeys(record["provider"] for record in records))


def loader_table(records: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Header and a line a provider, the fastest first."""
    yield [
        "provider",
        "images/s",
        "× pil",
        "× dali",
        "CPU ms an image",
        "first batch s",
        "mean",
        "std",
    ]
    speed = {n: median(r["images_s"] for r in _of(records, n)) for n in providers(records)}
    for name in sorted(speed, key=speed.__getitem__, reverse=True):
        mine = _of(records, name)
        yield [
            name,
            spread([r["images_s"] for r in mine], 0),
            *(spread(ratios(records, name, to + _gpu(name, to)), 2) for to in ("pil", "dali")),
            spread([r["cpu_ms"] for r in mine], 2),
            f"{median(r['first_s'] for r in mine):.1f}",
            f"{median(r['mean'] for r in mine):.1f}",
            f"{median(r['std'] for r in mine):.1f}",
        ]


def _gpu(name: str, to: str) -> str:
    """DALI on the GPU is what we are held against there; PIL has no such form."""
    return "-gpu" if name.endswith("-gpu") and to == "dali" else ""


def index_table(records: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Header and a line a step, in the order of the steps."""
    yield ["step", "seconds", "MiB", "file or table MiB", "goal", "besides"]
    for name in providers(records):
        mine = _of(records, name)
        size = mine[0].get("bytes")
        yield [
            name,
            spread([r["seconds"] for r in mine], 2),
            f"{median(r['peak_mib'] for r in mine):.0f}",
            "–" if size is None else f"{size / 2**20:.1f}",
            GOALS.get(name, "–"),
            _besides(mine),
        ]


def _besides(records: list[dict[str, Any]]) -> str:
    """The figures that only the ledger has, µs a step."""
    if "record_us" not in records[0]:
        return ""
    record, criterion = (median(r[k] for r in records) for k in ("record_us", "criterion_us"))
    return f"a step's record {record:.0f} µs, its criterion {criterion:.0f} µs (B 256, C 1000)"


SUBJECTS = {"loader": (ABOUT_LOADER, loader_table), "index": (ABOUT_INDEX, index_table)}


def section(result: dict[str, Any]) -> str:
    """A run's part of RESULTS.md."""
    about, table = SUBJECTS[result["subject"]]
    gone = [f"- `{gone['provider']}`: {gone['reason']}" for gone in result["left_out"]]
    lines = [*heading(result, about), *markdown(table(result["records"])), "", *gone]
    return "\n".join(lines).rstrip() + "\n"


def heading(result: dict[str, Any], about: str) -> list[str]:
    """What was measured, where, and with what."""
    versions = ", ".join(f"{name} {result[name]}" for name in PACKAGES if result.get(name))
    work = ", ".join(f"{name} {_number(value)}" for name, value in result["work"].items())
    return [
        f"## {result['subject']}, {result['device']}, {result['date']}",
        "",
        about,
        "",
        f"{work}; load {result['load_before']} before, {result['load_after']} after; "
        f"{versions}; commit {result['commit'] or 'unknown'}.",
        "",
    ]


def markdown(table: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table's header and lines as Markdown."""
    header, *lines = table
    for line in (header, ["---"] * len(header), *lines):
        yield f"| {' | '.join(line)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"
