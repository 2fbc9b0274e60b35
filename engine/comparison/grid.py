"""Many experiments: in parallel, resumable, one failure costing one result only."""

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from mentorch.engine.comparison.run import Experiment, run_experiment


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed comparison leaves nobody working on."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run(experiment: Experiment, folder: Path) -> str | None:
    """Runs and writes one experiment; the traceback if it failed."""
    try:
        record = run_experiment(experiment, folder)
    except Exception:
        return traceback.format_exc()
    temporary = folder / f".{experiment.key}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(record, default=str, indent=1))
    temporary.replace(folder / f"{experiment.key}.json")  # whole, or not there
    return None


def _is_done(experiment: Experiment, folder: Path) -> bool:
    """Whether its results are there.

    Raises:
        ValueError: results of another recipe are there under the same name.
    """
    path = folder / f"{experiment.key}.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text())["experiment"]
    wanted = json.loads(json.dumps(asdict(experiment), default=str))
    changed = sorted(_differences(found, wanted))
    if changed:
        raise ValueError(
            f"{path} was made by another recipe (it differs in {', '.join(changed)}): give "
            "another --out, or delete it"
        )
    return True


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Names of what differs; options that are newer than the results are theirs by default."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() & wanted.keys():
            yield from _differences(found[key], wanted[key], f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name


def run_grid(experiments: Sequence[Experiment], folder: Path, jobs: int = 0) -> list[str]:
    """Runs what has not been run yet.

    Args:
        experiments: with different keys.
        folder: where results are and go, a file an experiment.
        jobs: processes side by side, which share the cores; 0: one a core.

    Returns:
        Keys of the experiments that failed; what they said is in ``KEY.error.txt``.

    Raises:
        ValueError: the folder has results of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [experiment for experiment in experiments if not _is_done(experiment, folder)]
    cores = len(os.sched_getaffinity(0))
    jobs = min(jobs or cores, max(1, len(todo)))
    failed = []
    with (
        tqdm(total=len(experiments), initial=len(experiments) - len(todo), unit="run") as bar,
        ProcessPoolExecutor(
            jobs, get_context("spawn"), _start_worker, (max(1, cores // jobs),)
        ) as pool,
    ):
        running = {pool.submit(_run, experiment, folder): experiment for experiment in todo}
        for done in as_completed(running):
            key, error = running[done].key, done.result()
            bar.update()
            bar.set_postfix_str(key)
            if error is not None:
                (folder / f"{key}.error.txt").write_text(error)
                bar.write(f"{key} failed: {error.strip().splitlines()[-1]}")
                failed.append(key)
    return failed


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, by file name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
