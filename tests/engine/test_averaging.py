import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from mentorch.engine.averaging import WeightAverage


@pytest.mark.parametrize("decay", [0.5, 0.999])  # reached during the warm-up, or not
def test_the_average_is_timms(decay):
    """Weights, running statistics and counters, over a warm-up."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ours, timms = WeightAverage(student, decay), ModelEmaV3(student, decay, use_warmup=True)
    for step in range(6):
        student(torch.randn(8, 4))
        with torch.no_grad():
            student[0].weight += torch.randn(3, 4)
        ours.prepare(step)
        ours.update(student)
        timms.update(student, step=step + 1)
        for name, tensor in timms.module.state_dict().items():
            torch.testing.assert_close(ours.module.state_dict()[name], tensor)


def test_an_average_is_for_evaluation():
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    average = WeightAverage(student, 0.9)
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
