"""What a run has left behind: its configuration, metrics, ledger, index and quarantined files."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mentorch.engine.checkpoint import checkpoints, unpack
from mentorch.engine.config import RunConfig
from mentorch.engine.config_files import with_options
from mentorch.engine.data.datasets import open_index, with_noise
from mentorch.engine.data.index import Index
from mentorch.engine.data.pipelines import digest
from mentorch.engine.distributed import World
from mentorch.engine.files import whole_lines
from mentorch.engine.ledger import read_ledger
from mentorch.engine.status import read_status

Ledger = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, read.

    Attributes:
        folder: of the run.
        config: the options that every recipe has.
        metrics: lines of metrics.jsonl: step, kind ("train", "eval/NAME") and values.
        checkpoint: the latest one.
        ledger: what training knows of each row of the index, [N] each.
        index: of the training set.
        quarantine: files that could not be used: set, sample_id, path, reason.
        total_steps: of the training that was planned; None: there is no status.json to tell.
    """

    folder: Path
    config: RunConfig
    metrics: list[dict[str, Any]]
    checkpoint: Path
    ledger: Ledger
    index: Index
    quarantine: list[dict[str, Any]]
    total_steps: int | None


def read_run(folder: Path, index: Path | None = None) -> Run:
    """Reads a run folder.

    Args:
        folder: of the run.
        index: the training index (or the folder it describes), if it is elsewhere now.

    Raises:
        FileNotFoundError: no run folder, no checkpoint, no ledger or no index.
        ValueError: a damaged file, or an index that is not the one trained on.
    """
    config = _read_config(folder)
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise FileNotFoundError(
            f"{folder} has no complete checkpoint yet; there is one after the first epoch"
        )
    ledger = _read_ledger(found[-1])
    samples = with_noise(_open_index(config, index, folder), config.data)
    _check_labels(found[-1], ledger, samples)
    metrics = _json_lines(folder / "metrics.jsonl")
    quarantine = _json_lines(folder / "quarantine.jsonl")
    total_steps = read_status(folder).get("total_steps")
    return Run(folder, config, metrics, found[-1], ledger, samples, quarantine, total_steps)


def _read_config(folder: Path) -> RunConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.json. Give the folder that training "
            "named in its line 'run folder: …'"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    shared = {field.name for field in fields(RunConfig)}  # a recipe may have options of its own
    return with_options(RunConfig(), [f"{k}={json.dumps(values[k])}" for k in shared & set(values)])


def _read_ledger(checkpoint: Path) -> Ledger:
    path = checkpoint / "ledger.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {path.name}: the run was made with train.ledger off, or by an "
            "earlier version. Without it nothing is known of single samples; train again with it"
        )
    return read_ledger(path)


def _open_index(config: RunConfig, given: Path | None, folder: Path) -> Index:
    path = given if given is not None else config.data.train
    if path is None:
        raise ValueError(f"{folder}/config.json names no training data; give --index FILE")
    elsewhere = (
        "" if given is not None else f", which {folder} names; if it has moved, --index FILE"
    )
    if not path.exists():
        raise FileNotFoundError(f"there is no index {path}{elsewhere}")
    if path.is_file():
        return Index.read(path, need_root=False)  # a report is possible without the images
    if next(path.glob("*.index.parquet"), None) is None:
        raise FileNotFoundError(f"there is no index in {path}{elsewhere}")
    return open_index(path, World())


def _check_labels(checkpoint: Path, ledger: Ledger, index: Index) -> None:
    rows, recorded = len(ledger["visits"]), _fingerprint(checkpoint).get("training labels")
    if rows != len(index):
        raise ValueError(
            f"the run was trained on an index of {rows:,} rows, that of {index.root} has "
            f"{len(index):,} now. Give the one it was trained on: --index FILE"
        )
    if recorded not in (None, digest(index.labels())):
        raise ValueError(
            f"the labels of {index.root} have changed since the run, and its losses belong to the "
            "old ones. Give the index it was trained on: --index FILE"
        )


def _fingerprint(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8"))["items"])
        found: dict[str, Any] = unpack(state["fingerprint"], {})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not the state of a checkpoint: {error}") from error
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines, _being_written = whole_lines(path)
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
