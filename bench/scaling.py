"""The tables and the figure of docs/scaling.md, out of `scaling_model`.

    python bench/scaling.py             # prints the tables
    python bench/scaling.py --write     # puts them into docs/scaling.md and draws docs/scaling.svg

A model, not measured: no figure of it comes from training on a GPU.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import scaling_constants
from matplotlib import rc_context
from matplotlib.figure import Figure
from scaling_constants import value
from scaling_model import (
    SAMPLES,
    TERMS,
    Setup,
    between_failures_s,
    checkpoint_bytes,
    device_bytes,
    efficiency,
    epoch_s,
    gpu_limits,
    host_bytes,
    interval_s,
    lost,
    order_s,
    sample_limits,
    start_s,
    step_s,
    terms,
)

DOCS = Path(__file__).parents[1] / "docs"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
RATES = ("rate_low", "rate_mid", "rate_high")


def tables() -> dict[str, str]:
    """The Markdown tables of docs/scaling.md by name."""
    return {
        "weak": _table(("GPUs", *(f"{t}, ms" for t in TERMS), "step, ms", _EFFICIENCY), _weak()),
        "strong": _table(
            ("GPUs", "images a GPU", "step, ms", "of it all-reduce", "of it flags", "images/s"),
            _strong(),
        ),
        "network": _table(_OF_NETWORK, _of_network()),
        "samples": _table(_OF_SAMPLES, _of_samples()),
        "failures": _table(_OF_FAILURES, _of_failures()),
        "gpus": _table(("what gives way first", "2.4 M samples", "1 B samples"), _of_gpus()),
        "limits": _table(
            ("what gives way first", "from samples"),
            ([name, f"{n / 1e6:,.0f} M"] for name, n in sample_limits()),
        ),
        "constants": _table(("constant", "value", "unit", "source"), scaling_constants.rows()),
    }


_EFFICIENCY = "efficiency low / mid / high rate"
_OF_SAMPLES = (
    "samples", "host at its most, TB", "labels and ledger a GPU, GB", "checkpoint, GB",
    "start, min", "order, s an epoch", "epoch of 8 GPUs, h", "of 1,024, min", "of that order",
)  # fmt: skip
_OF_NETWORK = (
    "bus bandwidth, GB/s", "fp32, 64 images a GPU", "bf16, 64 images", "fp32, 8 images",
    "bf16, 8 images",
)  # fmt: skip
_OF_FAILURES = (
    "GPUs", "between failures, h", "restart, min", "checkpoint every, min", "steps", "lost",
    "lost at one an hour",
)  # fmt: skip


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _weak() -> Iterable[list[str]]:
    for gpus in GPUS:
        setups = [Setup(gpus=gpus, rate=value(rate)) for rate in RATES]
        parts = [f"{1e3 * seconds:.1f}" for seconds in terms(setups[1]).values()]
        efficiencies = " / ".join(f"{efficiency(s):.0%}" for s in setups)
        yield [f"{gpus:,}", *parts, f"{1e3 * step_s(setups[1]):.1f}", efficiencies]


def _strong(total: int = 8192) -> Iterable[list[str]]:
    for gpus in GPUS:
        s = Setup(gpus=gpus, batch=total // gpus)
        step, parts = step_s(s), terms(s)
        yield [
            f"{gpus:,}",
            f"{s.batch:,}",
            f"{1e3 * step:.0f}",
            f"{1e3 * parts['all-reduce']:.1f}",
            f"{1e3 * parts['flags']:.1f}",
            f"{total / step:,.0f}",
        ]


def _of_samples() -> Iterable[list[str]]:
    for n in SAMPLES:
        few, many = (Setup(gpus=gpus, samples=n) for gpus in (8, 1024))
        yield [
            f"{n / 1e6:,.1f} M",
            f"{host_bytes(n) / 1e12:.3f}",
            f"{device_bytes(n) / 1e9:.2f}",
            f"{checkpoint_bytes(n) / 1e9:.2f}",
            f"{start_s(many) / 60:.1f}",
            f"{order_s(n):,.0f}",
            f"{epoch_s(few) / 3600:.2f}",
            f"{epoch_s(many) / 60:.1f}",
            f"{order_s(n) / epoch_s(many):.0%}",
        ]


def _of_network() -> Iterable[list[str]]:
    for bus in (165e9, 40e9, 10e9, 1e9):
        setups = [
            Setup(gpus=1024, batch=batch, gradient_bytes=size, bus=bus)
            for batch in (64, 8)
            for size in (4, 2)
        ]
        yield [f"{bus / 1e9:.0f}", *(f"{1e3 * terms(s)['all-reduce']:,.1f} ms" for s in setups)]


def _of_failures() -> Iterable[list[str]]:
    for gpus in (8, 64, 256, 1024):
        s = Setup(gpus=gpus, samples=SAMPLES[1])
        every = interval_s(s)
        yield [
            f"{gpus:,}",
            f"{between_failures_s(gpus) / 3600:,.0f}",
            f"{(value('detect') + start_s(s)) / 60:.1f}",
            f"{every / 60:.0f}",
            f"{every / step_s(s):,.0f}",
            f"{lost(s, every):.2%}",
            f"{lost(s, 3600):.2%}",
        ]


def _of_gpus() -> Iterable[list[str]]:
    many = dict(gpu_limits(SAMPLES[-1]))
    for name, gpus in gpu_limits():
        yield [name, *(f"{n:,.0f}" if n < math.inf else "–" for n in (gpus, many[name]))]


def written(text: str) -> str:
    """A page with its tables replaced by those of today."""
    for name, table in tables().items():
        start, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"the page has no place for the table {name!r} ({start.strip()})")
        text = before + start + table + "\n" + end + rest.partition(end)[2]
    return text


def draw(path: Path) -> None:
    """What a step of 64 images a GPU is made of, against GPUs."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(GPUS)
    for term in TERMS:
        height = [1e3 * terms(Setup(gpus=gpus))[term] for gpus in GPUS]
        axes.bar([f"{gpus:,}" for gpus in GPUS], height, bottom=bottom, label=term)
        bottom = [b + h for b, h in zip(bottom, height, strict=True)]
    axes.set(xlabel="GPUs", ylabel="ms a step", title="Model, not measured: 64 images a GPU")
    axes.legend(ncols=2, frameon=False)
    # Text stays text; the same bytes every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if "--write" in sys.argv[1:]:
        page = DOCS / "scaling.md"
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
        draw(DOCS / "scaling.svg")
        return
    for name, table in tables().items():
        print(f"{name} (model, not measured)\n\n{table}\n")


if __name__ == "__main__":
    main()
