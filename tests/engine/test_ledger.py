"""The ledger over ranks and files. What a visit writes: tests/kernels/test_ledger.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mentorch.engine import ledger as module
from mentorch.engine.distributed import World
from mentorch.engine.ledger import Ledger, read_ledger
from mentorch.kernels.ledger import new_ledger
from mentorch.kernels.reweight import Reweighted

N, B, C = 23, 4, 5
EPOCHS, STEPS = 3, 2  # 16 of 23 samples an epoch: some are left out each time


def batches(epoch):
    """[STEPS, 2 B] sample ids of both ranks: another order each epoch; the last row is padding."""
    generator = torch.Generator().manual_seed(epoch)
    ids = torch.randperm(N, generator=generator)[: STEPS * 2 * B].view(STEPS, 2 * B).clone()
    ids[1, 6:] = -1
    return ids


def visit(ledger, ids, step):
    """What a sample is given depends on it and the step, not on who visits it."""
    torch.manual_seed(step)
    logits, labels = torch.randn(N + 1, C)[ids], ids.abs() % C
    loss, weight = torch.rand(2, N + 1)[:, ids]
    labels = labels.masked_fill(ids < 0, -100)
    ledger(ids, logits, labels, Reweighted(loss.sum(), loss, weight, torch.zeros(())))


def be_a_rank(rank, folder):
    """Trains three epochs; in the last one, saves in its middle too, as a stop does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module._CHUNK = 3  # the 8 ids of an epoch in three chunks, the last not full
    ledger = Ledger(N, World(rank, 2))
    for epoch in range(EPOCHS):
        for step, ids in enumerate(batches(epoch)):
            visit(ledger, ids[rank * B : (rank + 1) * B], epoch * STEPS + step)
            if epoch == 2:
                ledger.merge()
        ledger.merge()
        ledger.merge()  # nothing new: nothing happens
    ledger.save(folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def alone(first_epoch=0, last_epoch=EPOCHS, ledger=None):
    ledger = ledger or Ledger(N, World())
    for epoch in range(first_epoch, last_epoch):
        for step, ids in enumerate(batches(epoch)):
            visit(ledger, ids, epoch * STEPS + step)
        ledger.merge()
    return ledger


def test_merged_ledgers_are_that_of_one_rank(tmp_path):
    moved = [set(batches(e)[:, :B].flatten().tolist()) for e in range(EPOCHS)]
    assert moved[0] != moved[1] != moved[2], "samples must change their rank"
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (load_file(tmp_path / f"{rank}.safetensors")["table"] for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, alone().state_dict()["table"])
    assert read_ledger(tmp_path / "0.safetensors")["visits"].sum() == EPOCHS * (STEPS * 2 * B - 2)


def test_a_saved_ledger_goes_on_as_it_was(tmp_path):
    path = tmp_path / "ledger.safetensors"
    alone(0, 2).save(path)
    resumed = Ledger(N, World())
    resumed.load_state_dict(load_file(path))
    assert torch.equal(alone(2, 3, resumed).state_dict()["table"], alone().state_dict()["table"])


def test_columns_have_a_row_a_sample_and_survive_the_file(tmp_path):
    ledger = alone()
    ledger.save(tmp_path / "ledger.safetensors")
    read, here = read_ledger(tmp_path / "ledger.safetensors"), ledger.columns()
    assert list(read) == list(here)
    for name, column in here.items():
        assert column.shape == (N,)
        np.testing.assert_array_equal(column, read[name])
    never = np.setdiff1d(np.arange(N), np.concatenate([batches(e).flatten() for e in range(3)]))
    assert len(never) > 0, "nothing to see"
    assert (here["visits"] > 0).sum() == N - len(never)
    assert np.isnan(here["loss"][never]).all()
    assert (here["predicted"][never] == -1).all()


def test_what_one_rank_visits_is_not_kept_for_later():
    assert not alone()._visited, "the ids of a run would pile up on the device"


def test_a_ledger_of_another_index_is_refused():
    with pytest.raises(ValueError, match="has 23 samples, the training index 24"):
        Ledger(N + 1, World()).load_state_dict(alone().state_dict())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2)}, "no ledger: 'table'"),
        ({"table": new_ledger(3)[:, :20].clone()}, r"\[4, 20\] torch.uint8"),
        ({"table": torch.zeros(4, 24)}, r"\[4, 24\] torch.float32"),
    ],
)
def test_files_that_are_no_ledger_are_refused(tensors, message, tmp_path):
    path = tmp_path / "ledger.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        read_ledger(path)


def test_a_torn_or_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
        read_ledger(tmp_path / "nowhere.safetensors")
    path = tmp_path / "ledger.safetensors"
    path.write_bytes(b"no such format")
    with pytest.raises(ValueError, match="is no ledger"):
        read_ledger(path)


if __name__ == "__main__":
    be_a_rank(int(sys.argv[2]), Path(sys.argv[1]))
