"""A run folder by hand: what a run leaves behind, with losses that are chosen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mentorch.engine.checkpoint import pack
from mentorch.engine.config import CurriculumConfig, DataConfig, RunConfig
from mentorch.engine.config_files import save_config
from mentorch.engine.data.index import Index
from mentorch.kernels.ledger import fields, new_ledger

METRICS = [
    {"step": 6, "kind": "train", "loss": 2.0, "weighted_loss": 1.0, "mean_weight": 0.5,
     "data_utilization": 0.5, "loss_moving_avg": 1.8},
    {"step": 6, "kind": "eval/webvision", "top1": 0.5, "top5": 0.9, "images": 250},
    {"step": 12, "kind": "train", "loss": 1.5, "weighted_loss": 0.7, "mean_weight": 0.6,
     "data_utilization": 0.7, "loss_moving_avg": 1.2, "weight_right": 0.9, "weight_wrong": 0.1},
    {"step": 12, "kind": "eval/webvision", "top1": 0.8, "top5": 1.0, "images": 250},
]  # fmt: skip


@pytest.fixture
def losses(digits_index):
    """Mean loss of every row, NaN where never visited: wrong labels 3 to 4 nats, right ones 0 to 1.

    Only the 197 images of source flickr are visited, so that reading them takes no time.
    """
    ids = digits_index.select("train", sources=["flickr"])
    wrong = digits_index.labels()[ids] != digits_index.clean_labels()[ids]
    found = np.full(len(digits_index), np.nan, np.float32)
    found[ids] = 3.0 * wrong + np.random.default_rng(0).random(len(ids))
    return found


@pytest.fixture
def make_run(tmp_path, digits_index, losses):
    """Writes a run folder: ``make_run(curriculum=…, index=…, metrics=…, quarantine=…,
    total_steps=…)``."""

    def make(curriculum=None, index=digits_index, metrics=METRICS, quarantine=(), total_steps=12):
        folder = tmp_path / "runs" / "a-run"
        checkpoint = folder / "checkpoints" / "step-00000012"
        checkpoint.mkdir(parents=True)
        path = tmp_path / "train.index.parquet"
        index.write(path)
        data = DataConfig(train=path, sources=("flickr",))
        config = RunConfig(data=data, curriculum=curriculum or CurriculumConfig(name="linear"))
        save_config(config, folder / "config.json")
        save_file({"table": _table(index, losses)}, checkpoint / "ledger.safetensors")
        state = {"fingerprint": {"seed": 0}, "spade": {}}
        (checkpoint / "state.json").write_text(json.dumps(pack(state, {})))
        for name, lines in (("metrics", metrics), ("quarantine", quarantine)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"{name}.jsonl").write_text(text)
        if total_steps is not None:
            (folder / "status.json").write_text(json.dumps({"total_steps": total_steps}))
        return folder

    return make


def _table(index: Index, losses) -> torch.Tensor:
    """A ledger in which a student that does not know the label predicts the clean one."""
    table = new_ledger(len(index), torch.device("cpu"))[:-1].clone()
    seen = np.flatnonzero(~np.isnan(losses))
    loss = torch.from_numpy(losses[seen])
    given, clean = (labels[seen] for labels in (index.labels(), index.clean_labels()))
    unsure = losses[seen] > 1
    values = {
        "loss": loss, "loss_mean": loss, "loss_var": 0.1 * loss, "visits": 12, "forgetting": 2,
        "weight": (loss < 1).float(), "weight_mean": (1 - loss / 4).clamp(0, 1), "weight_var": 0.1,
        "predicted": torch.from_numpy(np.where(unsure, clean, given)),
        "probability": torch.where(loss > 1, 0.9, (-loss).exp()),
    }  # fmt: skip
    for name, column in fields(table).items():
        value = values[name]
        column[seen] = (
            value.to(column.dtype)
            if isinstance(value, torch.Tensor)
            else torch.tensor(value, dtype=column.dtype)
        )
    return table


@pytest.fixture
def renamed(digits_index):
    """The digits with hostile class names, and hostile paths that lead to no image."""
    names = ('<script>alert("a")</script>', "$x$ & y", *digits_index.class_names[2:])
    paths = [
        f'<img src="http://a.b/{i}">/{p}' for i, p in enumerate(digits_index.paths().to_pylist())
    ]
    table = digits_index.table
    at = table.schema.get_field_index("path")
    table = table.set_column(at, table.schema.field(at), [paths])
    return replace(digits_index, class_names=names, table=table)
