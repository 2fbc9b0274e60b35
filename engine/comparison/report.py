"""Results of a comparison as a Parquet file and as tables; `figures` draws the rest."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Record = dict[str, Any]
"""What `run_experiment` returned."""


def noise_of(record: Record) -> str:
    """Kind and rate of a run's noise, as in a table's head."""
    task = record["experiment"]["task"]
    return f"{task['noise']} {task['rate']:g}"


def method_of(record: Record) -> str:
    """A run's method."""
    name: str = record["experiment"]["name"]
    return name


def _row(record: Record) -> dict[str, Any]:
    experiment, curves = record["experiment"], record["curves"]
    task, config = experiment["task"], experiment["config"]
    return {
        "dataset": task["dataset"],
        "evaluated_on": task["evaluate_on"],
        "noise": task["noise"],
        "rate": task["rate"],
        "wrong_share": record["wrong_share"],
        "method": experiment["name"],
        "seed": config["seed"],
        "noise_seed": record["noise_seed"],
        "last_top1": record["last"],
        "best_top1": record["best"],
        "best_epoch": record["best_epoch"],
        "auroc_weight": curves.get("auroc_weight", [None])[-1],
        "auroc_loss": curves.get("auroc_loss", [None])[-1],
        "seconds": record["seconds"],
        "device": record["device"],
        "torch": record["torch"],
    }


def write_parquet(records: Sequence[Record], path: Path) -> None:
    """One row a run."""
    pq.write_table(pa.Table.from_pylist([_row(record) for record in records]), path)


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent points."""
    deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{deviation}"


def _accuracy(records: Sequence[Record]) -> str:
    last, best = ([record[name] for record in records] for name in ("last", "best"))
    return f"{_spread(last)} ({_spread(best)})"


def _detection(records: Sequence[Record]) -> str:
    found = [r["curves"]["auroc_weight"][-1] for r in records if "auroc_weight" in r["curves"]]
    return _spread(found) if found else "–"


def _in_order(records: Sequence[Record], name: Callable[[Record], str]) -> list[str]:
    return list(dict.fromkeys(name(record) for record in records))


def table(
    records: Sequence[Record],
    cell: Callable[[Sequence[Record]], str],
    methods: Sequence[str] = (),
) -> str:
    """A Markdown table, methods × noises.

    Args:
        records: of one data set and recipe.
        cell: the text of a method's runs with one noise, one a seed.
        methods: the rows' order; those not named come last.
    """
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        cells[method_of(record), noise_of(record)].append(record)
    noises, found = _in_order(records, noise_of), _in_order(records, method_of)
    ordered = [m for m in methods if m in found] + [m for m in found if m not in methods]
    lines = [["method", *noises], ["---"] * (1 + len(noises))]
    for method in ordered:
        runs = [cells.get((method, noise)) for noise in noises]
        lines.append([method, *(cell(found) if found else "" for found in runs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(records: Sequence[Record], methods: Sequence[str] = ()) -> str:
    """Both tables with what they are over, in Markdown."""
    first = records[0]["experiment"]
    task, config = first["task"], first["config"]
    seeds = sorted({record["experiment"]["config"]["seed"] for record in records})
    wrong = ", ".join(
        # Not the mean: labels that a method puts right are no property of the noise.
        f"{noise} {100 * max(r['wrong_share'] for r in records if noise_of(r) == noise):.1f}%"
        for noise in _in_order(records, noise_of)
    )
    images, epochs = task["train_samples"] or "all", config["train"]["epochs"]
    return f"""Top-1 on the {task["evaluate_on"]} set in %, last epoch (best epoch), mean ± standard
deviation over seeds {", ".join(map(str, seeds))}, which are the noise's seeds too.
{task["dataset"]}, {images} training images, {epochs} epochs, student {config["student"]["name"]}.
Wrong labels: {wrong}.

{table(records, _accuracy, methods)}

Area under the ROC curve, in %, of the weight as a detector of wrong labels, at the last epoch (50:
it says nothing).

{table(records, _detection, methods)}
"""


def write_report(records: Sequence[Record], folder: Path, methods: Sequence[str] = ()) -> str:
    """Writes results.parquet, table.md and the figures; returns the tables."""
    from mentorch.engine.comparison import figures  # matplotlib takes a second

    text = summary(records, methods)
    write_parquet(records, folder / "results.parquet")
    (folder / "table.md").write_text(text)
    figures.write_figures(records, folder, methods)
    return text
