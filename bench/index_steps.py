"""What a rank does with a WebVision-sized index, one function a step; each runs alone (`fresh`).

The index has made-up rows: paths like ``google/q0001/k3Vd0pQwX2aB_9.jpg``, 1000 classes, 2.4 M
samples of which one in a thousand is unusable. A step gives its seconds and by how much the
process's memory grew at the most while it ran.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from fresh import forget_peak, resident_bytes
from numpy.typing import NDArray

from mentorch.engine.config import DataConfig
from mentorch.engine.data.imagenet import match_labels
from mentorch.engine.data.index import SCHEMA, STATUSES, Index
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.order import shuffled
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.distributed import World
from mentorch.engine.ledger import Ledger
from mentorch.engine.reweight import Reweight

CLASSES = 1000
BATCH = 128  # of a rank
STEPS = ("write", "read", "rank", "select", "shuffle", "noise", "match", "ledger")
SOURCES = ("google", "flickr")
_LETTERS = np.frombuffer(
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", np.uint8
)
_NAME = 14  # letters of a file's name


def run(provider: str, file: str, rows: int) -> dict[str, Any]:
    """Measures the step ``provider``: seconds, peak_mib and what else there is to say of it."""
    step = provider
    if step == "write":
        return _write(Path(file), rows)
    if step == "read":
        return _measured(lambda: Index.read(file))
    if step == "rank":
        return _measured(lambda: _rank(file))
    if step == "ledger":
        return _ledger(rows)
    index = Index.read(file)
    ids = np.arange(len(index))
    steps: dict[str, Callable[[], Any]] = {
        "select": lambda: index.select("train", sources=("google",), max_label=50),
        "shuffle": lambda: shuffled(ids, seed=1, epoch=3),
        "noise": lambda: add_noise(index, Noise("symmetric", 0.4, seed=1)),
        "match": lambda: match_labels(index, index.classes[:50]),
    }
    return _measured(steps[step])


def _measured(step: Callable[[], Any]) -> dict[str, Any]:
    forget_peak()
    before, start = resident_bytes(), time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    peak = resident_bytes(peak=True) - before
    del result
    return {"seconds": seconds, "peak_mib": max(peak, 0) / 2**20}


def _rank(file: str) -> Loader:
    """Everything a rank holds of its data set, and the order of its first epoch."""
    index = Index.read(file)
    ids = index.select("train")
    return Loader(index, ids, batch_size=BATCH, config=DataConfig(), train=True)


def _write(file: Path, rows: int) -> dict[str, Any]:
    start = time.perf_counter()
    index = made_up(rows, file.parent)
    making_s = time.perf_counter() - start
    return {
        **_measured(lambda: index.write(file)),
        "making_s": making_s,
        "bytes": file.stat().st_size,
    }


def made_up(rows: int, root: Path) -> Index:
    """An index of so many rows; the same for the same number."""
    random = np.random.default_rng(0)
    source = random.integers(len(SOURCES), size=rows, dtype=np.int32)
    status = np.where(random.random(rows) < 1e-3, 1 + source, 0).astype(np.int32)
    size = np.where(status == 0, random.integers(200, 1600, size=(2, rows)), 0).astype(np.int32)
    labels = np.sort(random.integers(CLASSES, size=rows)).astype(np.int32)
    columns = {
        "sample_id": np.arange(rows, dtype=np.int64),
        "path": _paths(random, source, labels),
        "label": labels,
        "clean_label": pa.nulls(rows, pa.int32()),
        "split": _category(np.zeros(rows, np.int32), ("train",)),
        "source": _category(source, SOURCES),
        "status": _category(status, STATUSES),
        "bytes": random.integers(20_000, 200_000, size=rows),
        "width": size[0],
        "height": size[1],
    }
    wnids = tuple(f"n{i:08}" for i in range(CLASSES))
    return Index(pa.table(columns, schema=SCHEMA), root, "webvision", wnids, wnids)


def _category(codes: NDArray[np.int32], names: tuple[str, ...]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(codes, list(names))


def _paths(
    random: np.random.Generator, source: NDArray[np.int32], labels: NDArray[np.int32]
) -> pa.Array:
    letters = _LETTERS[random.integers(len(_LETTERS), size=(len(labels), _NAME))]
    names = letters.view(f"S{_NAME}")[:, 0].astype(str)
    folders = np.array([[f"{s}/q{q:04}/" for q in range(CLASSES)] for s in SOURCES])
    return pa.array(np.char.add(np.char.add(folders[source, labels], names), ".jpg"), pa.string())


def _ledger(rows: int, batch: int = 256, calls: int = 50) -> dict[str, Any]:
    """The ledger's memory, and the time of a record beside that of the criterion that it follows.

    ``seconds`` is the time of making the table.
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, CLASSES, generator=random)
    labels = torch.randint(CLASSES, (batch,), generator=random)
    ids = torch.randint(rows, (batch,), generator=random)
    criterion = Reweight("linear", total_steps=10**6).train()
    out = criterion.weigh(logits, labels, ids)
    made = _measured(lambda: Ledger(rows, World()))
    ledger = Ledger(rows, World())
    return {
        **made,
        "bytes": ledger.table.nbytes,
        "record_us": _median_us(lambda: ledger(ids, logits, labels, out), calls),
        "criterion_us": _median_us(lambda: criterion.weigh(logits, labels, ids), calls),
    }


def _median_us(call: Callable[[], Any], calls: int) -> float:
    times = []
    for _ in range(calls + 3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times[3:]))  # the first few find cold caches
