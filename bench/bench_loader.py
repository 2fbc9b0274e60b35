"""Images a second and CPU time an image of our loader and of what else is used (`loader_peers`).

    pytest bench/bench_loader.py                  # five rounds of all: results/ and RESULTS.md
    pytest bench/bench_loader.py --bench-quick    # one round of a few images, nothing is written
    pytest bench/bench_loader.py -k "gpu"         # the GPU's decoder alone, printed only

Its figures are of this machine's CPU, so they are written without a GPU too; other work on the
machine spoils them. Goals: at least 1.5 times `pil`, at least 0.95 times `dali`.
"""

from pathlib import Path
from typing import Any

import data_session
import loader_peers
import photographs
import pytest
import torch
from harness import LeftOut

from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index
from mentorch.engine.data.shards import write_shards

ROUNDS = 5
IMAGES = 1024
# Half an epoch is looked at, two are timed. DataLoader's queue holds 2 batches a worker.
BATCHES = {"seen": 8, "drained": 8, "timed": 32}
QUICK_IMAGES, QUICK_BATCHES = 128, {"seen": 2, "drained": 1, "timed": 2}


def plan(rounds: int) -> list[tuple[int, str]]:
    """(round, provider); every other round backwards, so that a trend of the machine cancels."""
    providers = (*loader_peers.PROVIDERS, *loader_peers.GPU_PROVIDERS)
    return [(n, p) for n in range(rounds) for p in (providers if n % 2 == 0 else providers[::-1])]


def pytest_generate_tests(metafunc):
    if "measured" in metafunc.fixturenames:
        rows = plan(1 if metafunc.config.getoption("--bench-quick") else ROUNDS)
        metafunc.parametrize("measured", rows, ids=[f"round{n}-{p}" for n, p in rows])


def same_work(records: list[dict[str, Any]]) -> None:
    """Asserts that all providers' pixels have about the same mean and spread.

    Crops are random, so means of some hundred images differ by about one; without antialiasing, or
    with another range of crops, the standard deviation differs by more than three in a hundred.
    """
    for key, allowed in (("mean", 4.0), ("std", 0.03 * records[0]["std"])):
        values = {record["provider"]: record[key] for record in records}
        assert max(values.values()) - min(values.values()) <= allowed, f"{key}: {values}"


@pytest.fixture(scope="module")
def session(request, tmp_path_factory):
    """Makes the images, their index and shards."""
    quick = request.config.getoption("--bench-quick")
    images, batches = (QUICK_IMAGES, QUICK_BATCHES) if quick else (IMAGES, BATCHES)
    root = tmp_path_factory.mktemp("photographs")
    size = photographs.write(root, images)
    index = index_folder(root, workers=0)
    shards = _write_shards(index, root / "shards", round(images * size / 4e6))
    return data_session.Session(
        "loader",
        {"images": images, "mean bytes a file": size, "batches timed": batches["timed"]},
        ("loader_peers", "measure"),
        {
            "index": str(root / "folder.index.parquet"),
            "shards": shards,
            "threads": data_session.cores(),
            **batches,
        },
    )


def _write_shards(index: Index, folder: Path, shard_mb: int) -> str:
    """Where the shards are, some four of them: a worker of webdataset reads whole ones."""
    write_shards(index, str(folder), shard_mb=max(1, shard_mb))
    return str(folder)


def test_loader(session, measured, benchmark):
    round_, provider = measured
    missing = loader_peers.why_missing(provider, has_gpu=torch.cuda.is_available())
    try:
        session.measure(round_, provider, missing, benchmark)
    except LeftOut as reason:
        benchmark.skipped = True  # or pytest-benchmark warns that it was not used
        pytest.skip(str(reason))
    assert session.records[-1]["images"] == session.arguments["timed"] * loader_peers.BATCH


def test_all_did_the_same_work_and_results_are_written(session, request):
    same_work(session.records)
    session.finish(plan(ROUNDS), request.config)
