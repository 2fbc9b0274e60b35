"""The training step's part of RESULTS.md, and the picture of where its time goes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from data_report import heading, markdown, spread
from train_subjects import BASE, split

Records = list[dict[str, Any]]

# Dense bf16 by the data sheets (SXM), FLOP/s: half of what they print with sparsity.
PEAK = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
ABOUT_STEP = f"""Whole training steps from uint8 images on the device: normalise, forward,
backward, SGD with momentum (`bench/train_providers.py` says who does what). Every process measures
`{BASE}` and some others in turns, {{rounds}} rounds; medians, lowest to highest in brackets. Before
that all took the same two steps: losses agree, equally many parameters, each with a gradient, and
all filters and matrices changed. Ratios are of images/s, to `{BASE}` round by round, to
`timm-compile` by way of it; above 1 is faster.
*Memory* is a provider's own peak; *reserved* counts what a CUDA graph keeps, too. *Launches*:
kernels a step, on a CPU operators that call no other. *Busy*: the share of the step in which one
runs. *MFU*: convolutions' and matrix products' operations over the peak's."""
ABOUT_END = """Inception-ResNet-v2 from JPEG files (`bench/photographs.py`): the loader alone, Spade
on one batch that is always there, and Spade on the loader's batches, in turns in one process with
the same engine; medians of the rounds, lowest to highest in brackets."""


def of(records: Records, **wanted: Any) -> Records:
    """The records with these values."""
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def relative(records: Records, record: dict[str, Any]) -> list[float]:
    """Images/s over BASE's, for each round of the same process."""
    (base,) = of(records, group=record["group"], provider=BASE)
    pairs = zip(base["step_ms"], record["step_ms"], strict=True)
    images = record["batch"] / base["batch"]
    return [images * one / other for one, other in pairs]


def to_compile(records: Records, record: dict[str, Any]) -> float | None:
    """Images/s over timm-compile's of the same subject, both by way of BASE."""
    found = of(records, name=record["name"], provider="timm-compile")
    return (
        median(relative(records, record)) / median(relative(records, found[0])) if found else None
    )


def images_s(record: dict[str, Any]) -> list[float]:
    return [1e3 * record["batch"] / ms for ms in record["step_ms"]]


def mfu(record: dict[str, Any], peak: float | None) -> float | None:
    """Share of the peak; None where that is unknown or of another dtype."""
    if peak is None or record["dtype"] != "bfloat16":
        return None
    return record["flop_image"] * median(images_s(record)) / peak


def peak_of(device: str) -> float | None:
    """FLOP/s of a device by its name, as `data_session.device` gives it."""
    return PEAK.get(device.partition(";")[0])


def merged(records: Records) -> Records:
    """BASE once a subject, with the samples of all processes; the others as they are.

    Only of processes whose batch is the largest: another's had to halve it.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    largest = {
        n: max(r["batch"] for r in of(records, name=n)) for n in {r["name"] for r in records}
    }
    for record in records:
        key = record["name"], record["provider"]
        if record["provider"] == BASE and record["batch"] != largest[record["name"]]:
            continue
        first = found.get(key)
        samples = (first["step_ms"] if first else []) + record["step_ms"]
        found[key] = {**(first or record), "step_ms": samples}
    return list(found.values())


def step_table(records: Records, name: str, peak: float | None) -> Iterator[list[str]]:
    """Header and a line a provider of a subject, the fastest (by its ratio to BASE) first."""
    yield [
        "provider",
        "batch",
        "images/s",
        "ms a step",
        f"× {BASE}",
        "× timm-compile",
        "memory MiB",
        "reserved MiB",
        "launches",
        "busy",
        "MFU",
    ]
    speed = {
        r["provider"]: relative(records, r) for r in of(records, name=name) if r["provider"] != BASE
    } | {BASE: [1.0]}
    mine = {r["provider"]: r for r in merged(of(records, name=name))}
    for provider in sorted(mine, key=lambda p: -median(speed[p])):
        record = mine[provider]
        share = mfu(record, peak)
        yield [
            provider,
            str(record["batch"]),
            spread(images_s(record), 1),
            f"{median(record['step_ms']):.2f}",
            spread(speed[provider], 3),
            _number(to_compile(records, of(records, name=name, provider=provider)[0])),
            _mib(record["peak_bytes"]),
            _mib(record.get("peak_reserved")),
            f"{record['launches']:,.0f}",
            f"{record['busy']:.1%}",
            "–" if share is None else f"{share:.1%}",
        ]


def family_table(records: Records, name: str) -> Iterator[list[str]]:
    """Header and a line a provider: milliseconds a step by family, the costliest family first."""
    mine = merged(of(records, name=name))
    total: dict[str, float] = {}
    for record in mine:
        for family, ms in record["families_ms"].items():
            total[family] = total.get(family, 0.0) + ms
    families = sorted(total, key=lambda family: -total[family])
    yield ["provider, ms a step", *families]
    for record in mine:
        yield [record["provider"], *(f"{record['families_ms'].get(f, 0):.2f}" for f in families)]


def reweighting(records: Records, name: str) -> Iterator[str]:
    """What the curriculum and the ledger cost: mentorch ÷ mentorch-plain, time of a step."""
    for record in of(records, name=name):
        who, engine = split(record["provider"])
        plain = of(records, name=name, provider=f"mentorch-plain-{engine}")
        if who == "mentorch" and plain:
            ratio = median(relative(records, plain[0])) / median(relative(records, record))
            yield f"- reweighting, {engine}: a step takes {ratio:.3f} times that of plain"


def memory(records: Records, name: str) -> Iterator[str]:
    for record in of(records, name=name):
        if "memory" in record:
            first, last = (value / 2**20 for value in record["memory"])
            yield (
                f"- memory, {record['provider']}: {first:.1f} MiB before "
                f"{record['watched_steps']:,} steps, {last:.1f} MiB after"
            )


def end_table(records: Records) -> Iterator[list[str]]:
    """Header and a line for each of the three of an engine."""
    yield ["engine", "what", "batch", "images/s", "× synthetic"]
    for record in records:
        (base,) = of(records, engine=record["engine"], provider="synthetic")
        ratios = [a / b for a, b in zip(record["images_s"], base["images_s"], strict=True)]
        yield [
            record["engine"],
            record["provider"],
            str(record["batch"]),
            spread(record["images_s"], 1),
            spread(ratios, 3),
        ]


def left_out(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line a reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(row["reason"], []).append(f"`{row['provider']}`")
    for reason, names in reasons.items():
        yield f"- {', '.join(names)}: {reason}"


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _names(records: Records) -> list[str]:
    return list(dict.fromkeys(record["name"] for record in records))


def _steps(result: dict[str, Any]) -> Iterator[str]:
    records, peak = result["records"], peak_of(result["device"])
    rounds = max((len(record["step_ms"]) for record in records), default=0)
    yield from heading(result, ABOUT_STEP.format(rounds=rounds))
    if peak is not None:
        yield f"The peak of MFU is {peak / 1e12:.1f} TFLOP/s, dense bf16 by the data sheet.\n"
    for name in _names(records):
        first = of(records, name=name)[0]
        dtype = (
            f"{first['size']} px, {first['dtype']}, {first['parameters'] / 1e6:.2f} M parameters"
        )
        yield f"### {name}: {first['model']}, {dtype}\n"
        yield from markdown(step_table(records, name, peak))
        yield ""
        yield from markdown(family_table(records, name))
        yield ""
        yield from reweighting(records, name)
        yield from memory(records, name)
        yield ""


def _end_to_end(result: dict[str, Any]) -> Iterator[str]:
    yield from heading(result, ABOUT_END)
    yield from markdown(end_table(result["records"]))
    yield ""


STEPS = ("train", "train-eager", "train-compiled")  # all processes, or a part of them
SUBJECTS = {**dict.fromkeys(STEPS, _steps), "train-end-to-end": _end_to_end}


def section(result: dict[str, Any]) -> str:
    """A run's part of RESULTS.md."""
    lines = [*SUBJECTS[result["subject"]](result), *left_out(result["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def plot(result: dict[str, Any], path: Path) -> Path:
    """Draws where the step's time goes: stacked bars by kernel family, a bar a provider.

    Args:
        result: of subject "train".
        path: .png to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = result["records"]
    names = _names(records)
    figure, axes = pyplot.subplots(len(names), 1, figsize=(11, 4 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        _bars(axis, merged(of(records, name=name)))
        axis.set_title(f"{name}: where the step's time goes, {result['device']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axis: Any, records: Records) -> None:
    """Stacked bars, and a mark at the step's median by the clock."""
    providers = [record["provider"] for record in records]
    left = [0.0] * len(records)
    families = dict.fromkeys(family for r in records for family in r["families_ms"])
    for number, family in enumerate(families):
        widths = [record["families_ms"].get(family, 0.0) for record in records]
        axis.barh(providers, widths, left=left, label=family, color=f"C{number}", alpha=0.9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.plot([median(r["step_ms"]) for r in records], providers, "k|", ms=18, label="by the clock")
    axis.invert_yaxis()
    axis.set_xlabel("ms a step")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_all(folder: Path = Path(__file__).parent / "results") -> list[Path]:
    """Draws the pictures of all results in a folder, into its folder ``train``."""
    results = {path: json.loads(path.read_text()) for path in sorted(folder.glob("train-*.json"))}
    return [
        plot(result, folder / "train" / f"{path.stem}.png")
        for path, result in results.items()
        if result["subject"] in STEPS
    ]


if __name__ == "__main__":
    print(*plot_all(), sep="\n")
