"""`WeightedTask`: what it adds to timm's task. In a whole loop: tests/recipes."""

import pytest
import torch

import mentorch
from mentorch.engine.integrations.timm import WeightedTask


def new_task(**options):
    return WeightedTask(torch.nn.Linear(3, 4), mentorch.Reweight("uniform", burn_in=0, **options))


def test_ids_reach_the_ledger_and_the_state_the_checkpoint():
    task = new_task(num_samples=9, ledger=True)
    task(torch.randn(2, 3), torch.tensor([0, 1]), torch.tensor([4, 7]))
    found = task.get_checkpoint_state()
    assert task.get_checkpoint_state(ema=True) == {}
    other = new_task(num_samples=9, ledger=True)
    other.load_checkpoint_state(found["state_dict"], found["task_state"])
    assert other.criterion.step == 1
    scores = other.criterion.sample_scores(torch.zeros(9))
    assert sorted(scores["sample_id"].to_pylist()) == [4, 7]


def test_a_function_is_refused_before_it_is_trained_with():
    with pytest.raises(ValueError, match=r"must be an nn\.Module .* not <function cross_entropy"):
        WeightedTask(torch.nn.Linear(3, 4), torch.nn.functional.cross_entropy)


def test_a_checkpoint_of_another_task_is_refused():
    task = new_task()
    with pytest.raises(ValueError, match="not of a WeightedTask"):
        task.load_checkpoint_state(task.get_checkpoint_state()["state_dict"])
