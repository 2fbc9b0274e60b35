"""Training from JPEG files beside training on a batch that is always there, and the loader alone.

    loader        `Loader`: read, cut, decode; the images are thrown away
    synthetic     `Spade` on one made-up batch
    end-to-end    `Spade` on the loader's batches

The three take turns in one process, with the same engine.
"""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from train_profile import wait
from train_providers import SpadeLoop, Work, make_work, why_another
from train_subjects import Subject

from mentorch.engine.config import DataConfig
from mentorch.engine.data.index import Index
from mentorch.engine.data.pipelines import Batch, Loader
from mentorch.engine.distributed import World
from mentorch.engine.student import autocast_dtype

ENDLESS = 10**6  # epochs
WARM_STEPS = 5
DRAINED = 8  # batches that the loader has ready after a pause, and one more


def measure(
    provider: str, subject: dict[str, Any], index: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Measures the three with one engine.

    Args:
        provider: the engine.
        subject: the fields of a `Subject`.
        index: Parquet index of the image files.
        rounds: samples of each.
        steps: batches of a sample.

    Returns:
        records, images/s of each by round; left_out, why the engine cannot be had, if so.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    wanted = Subject(**subject)
    work = make_work(wanted, autocast_dtype("auto", device), device)
    loader = _loader(Path(index), wanted, device)
    batches = loader.batches(epochs=ENDLESS)
    first = next(batches)
    # A lookup by sample id: the made-up labels serve the real index, too.
    assert int(first.sample_ids.max()) < len(work.labels_N)
    loops = {
        "synthetic": SpadeLoop(work, "mentorch", provider),
        "end-to-end": SpadeLoop(work, "mentorch", provider, chain([first], batches)),
    }
    for loop in loops.values():
        for _ in range(WARM_STEPS):
            loop.step()
    if another := next(filter(None, map(why_another, loops.values())), ""):
        return {"records": [], "left_out": {provider: another}}
    return {"records": _rounds(work, loops, batches, rounds, steps, provider), "left_out": {}}


def _loader(file: Path, subject: Subject, device: torch.device) -> Loader:
    index = Index.read(file)
    return Loader(
        index,
        index.select("train"),
        batch_size=subject.batch,
        config=DataConfig(image_size=subject.size),
        train=True,
        world=World(device=device),
    )


def _rounds(
    work: Work,
    loops: dict[str, SpadeLoop],
    batches: Iterator[Batch],
    rounds: int,
    steps: int,
    engine: str,
) -> list[dict[str, Any]]:
    calls = {
        "loader": lambda: next(batches),
        "synthetic": loops["synthetic"].step,
        "end-to-end": loops["end-to-end"].step,
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            # What was made ready while another was timed must not count.
            for _ in range(DRAINED if name != "synthetic" else 0):
                next(batches)
            wait(work.device)
            start = time.perf_counter()
            for _ in range(steps):
                call()
            wait(work.device)
            found[name].append(steps * work.subject.batch / (time.perf_counter() - start))
    dtype = str(work.dtype).removeprefix("torch.")
    shape = {"size": work.subject.size, "batch": work.subject.batch, "dtype": dtype}
    return [
        {"provider": name, "engine": engine, **shape, "images_s": values}
        for name, values in found.items()
    ]
