"""Whether two runs are the same run, to the last bit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mentorch.engine.checkpoint import checkpoints, load_checkpoint
from mentorch.engine.status import read_status

_TIMED = ("images_per_s", "eta_s")


def difference(one: Path, other: Path, ranks: int) -> str:
    """The first thing in which two finished runs differ; empty if there is none.

    Compared are the last checkpoint (weights, averaged weights, ledger, optimiser, criterion, and
    of every rank its random states and sums), the metrics without times, the summary, and what
    ``latest`` and ``best`` name.

    Args:
        one: a run folder.
        other: another.
        ranks: of both.
    """
    states = [read_status(folder).get("state") for folder in (one, other)]
    if states != ["finished"] * 2:
        return f"status.json: {states[0]}, {states[1]}"
    return (
        _checkpoints(one / "checkpoints", other / "checkpoints", ranks)
        or tree_difference(_metrics(one), _metrics(other), "metrics.jsonl")
        or tree_difference(_summary(one), _summary(other), "summary.json")
    )


def order_difference(one: Sequence[Any], other: Sequence[Any], ranks: int) -> str:
    """The first difference in the samples of the steps that two runs took.

    Args:
        one: notes of a run (`soak_worker`), by rank.
        other: of another.
        ranks: of both.
    """
    for rank in range(ranks):
        orders: list[dict[int, Any]] = []
        for notes in (one[rank], other[rank]):
            orders.append({})
            for note in (note for note in notes if note["what"] == "taken"):
                before = orders[-1].setdefault(note["step"], note["ids"])
                if before != note["ids"]:
                    return f"rank {rank}, step {note['step']}: other samples when taken again"
        if found := tree_difference(orders[0], orders[1], f"samples of rank {rank}, step"):
            return found
    return ""


def _checkpoints(one: Path, other: Path, ranks: int) -> str:
    for pointer in ("latest", "best"):
        named = [(folder / pointer).read_text() for folder in (one, other)]
        if named[0] != named[1]:
            return f"{pointer}: {named[0].strip()}, {named[1].strip()}"
    last = checkpoints(one)[-1].name, checkpoints(other)[-1].name
    if last[0] != last[1]:
        return f"last checkpoint: {last[0]}, {last[1]}"
    for rank in range(ranks):
        here, there = (load_checkpoint(f / last[0], rank)._asdict() for f in (one, other))
        if found := tree_difference(here, there, f"rank {rank}"):
            return found
    return ""


def tree_difference(one: Any, other: Any, where: str) -> str:
    """Where nested values and tensors differ first, and how; empty if they do not."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if _same_bits(one, other) else f"{where}: other values"
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))[:3]} in one of them only"
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} of them"
        pairs = [(at, *pair) for at, pair in enumerate(zip(one, other, strict=True))]
    else:
        return "" if one == other else f"{where}: {str(one)[:200]} and {str(other)[:200]}"
    return next(filter(None, (tree_difference(a, b, f"{where}/{at}") for at, a, b in pairs)), "")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)  # NaN equals itself


def _metrics(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in _TIMED} for row in rows]


def _summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())
