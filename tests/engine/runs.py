"""What tests look at in run folders."""

import json
import time

import torch

from mentorch.engine.checkpoint import load_checkpoint
from mentorch.engine.checkpoint_files import checkpoints

TIMED = ("images_per_s", "eta_s")


def only_run(config):
    (folder,) = config.out.iterdir()
    return folder


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_status(folder):
    return json.loads((folder / "status.json").read_text())


def final_checkpoint(folder):
    """Path, models, state, the main rank's own tensors and random states."""
    path = checkpoints(folder / "checkpoints")[-1]
    return path, *load_checkpoint(path)


def wait_until(condition, seconds=60):
    """Waits for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def assert_same_tree(one, other, where=""):
    """Nested values and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_tree(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for at, pair in enumerate(zip(one, other, strict=True)):
            assert_same_tree(*pair, f"{where}/{at}")
    else:
        assert one == other, where


def assert_same_run(one, other):
    """All that checkpoints hold, random states included, and the metrics: equal to the last bit."""
    (path, *found), (other_path, *other_found) = map(final_checkpoint, (one, other))
    assert path.name == other_path.name
    for here, there in zip(found, other_found, strict=True):
        assert_same_tree(here, there, path.name)
    rows, other_rows = map(read_metrics, (one, other))
    assert [_untimed(row) for row in rows] == [_untimed(row) for row in other_rows]


def _untimed(row):
    return {key: value for key, value in row.items() if key not in TIMED}
