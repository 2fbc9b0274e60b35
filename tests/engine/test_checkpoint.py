import json

import pytest
import torch

from mentorch.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    pack,
    prune,
    save_checkpoint,
    unpack,
)
from mentorch.engine.distributed import World


def _state():
    return {
        "step": 12,
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(2, 3)}, 1: {}}, "lr": [0.1]},
        "scaler": {},
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(5),
        "best": None,
        "flag": True,
    }


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other and type(one) is type(other)


def test_packing_is_undone_through_json():
    state, tensors = _state(), {}
    skeleton = json.loads(json.dumps(pack(state, tensors)))
    assert _equal(unpack(skeleton, tensors), state)
    assert len(tensors) == 3


def test_a_checkpoint_restores_models_state_and_random_numbers(tmp_path):
    models = {"model": {"w": torch.randn(4, 5).T}, "average": {"w": torch.randn(5, 4)}}
    state = _state()
    path = save_checkpoint(tmp_path, 12, models, state, {"avg": torch.tensor(1.5)}, World())
    expected = torch.randn(3)
    torch.randn(100)
    loaded_models, loaded_state, own = load_checkpoint(path, World())
    assert _equal(own, {"avg": torch.tensor(1.5)})
    assert _equal(loaded_models, models)
    assert _equal(loaded_state, state)
    assert torch.equal(torch.randn(3), expected)
    assert list(tmp_path.iterdir()) == [path], "something temporary is left"


def test_what_is_not_complete_is_no_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"model": {}}, {}, {}, World())
    monkeypatch.setattr("mentorch.engine.checkpoint.pack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, 2, {"model": {}}, {}, {}, World())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step in range(6):
        save_checkpoint(tmp_path, step, {"model": {}}, {}, {}, World())
    prune(tmp_path, 2, "step-00000001")
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept == ["step-00000001", "step-00000004", "step-00000005"]


def test_nothing_pickled_is_written(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(1)}}, _state(), {}, World())
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
