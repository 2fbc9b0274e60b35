"""The presets against the numbers that the paper and the released commands give."""

import pytest
import torch

from mentorch.engine.mentor import MentorNet
from mentorch.engine.presets import curriculum_preset, published_percentile
from mentorch.engine.reweight import Reweight


@pytest.mark.parametrize(
    ("method", "rate", "p"),
    [("pd", 0.2, 0.75), ("pd", 0.8, 0.5), ("dd", 0.2, 0.8), ("dd", 0.4, 0.6), ("dd", 0.8, 0.5),
     ("self_paced", 0.8, 0.7), ("focal", 0.4, 0.7), ("dd", 0.65, 0.5), ("dd", 0.0, 0.8)],
)  # fmt: skip
def test_the_percentile_is_that_of_the_nearest_published_noise(method, rate, p):
    assert published_percentile(method, rate) == p
    for preset in ("paper", "released-code"):
        assert curriculum_preset(preset, method, rate).loss_percentile == p


def test_the_paper():
    pd = curriculum_preset("paper", "pd", 0.4)
    assert (pd.name, pd.decay, pd.burn_in, pd.burn_in_dropout) == ("pd", 0.95, 0.2, 0.5)
    assert (pd.exact_dropout, pd.example_dropout, pd.freeze_epoch) == (False, 0.0, False)


def test_the_released_code():
    pd, dd = (curriculum_preset("released-code", name, 0.4) for name in ("pd", "dd"))
    assert (pd.name, pd.decay, pd.burn_in) == ("pd_released", 0.5, 0.17)
    assert (dd.name, dd.decay, dd.burn_in) == ("dd", 0.5, 0.18)
    for found in (pd, dd):
        assert (found.burn_in_dropout, found.example_dropout) == (0.5, 0.05)
        assert found.exact_dropout
    assert dd.freeze_epoch
    assert (dd.burn_in_dropout_until, dd.late_dropout, dd.late_dropout_from) == (0.17, 0.9, 0.95)
    inception = curriculum_preset("released-code", "dd", 0.4, wide_resnet=False)
    assert (pd.late_dropout, inception.late_dropout) == (0.0, 0.0)
    assert not pd.freeze_epoch


def test_full_is_cross_entropy():
    for preset in ("paper", "released-code"):
        found = curriculum_preset(preset, "full", 0.4)
        assert (found.name, found.burn_in) == ("uniform", 0.0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="released-code"):
        curriculum_preset("released", "pd", 0.4)


def test_a_frozen_epoch_stays_where_the_burn_in_ended():
    """Seen by a MentorNet that answers with the epoch it is told."""
    mentor = MentorNet()
    with torch.no_grad():
        for parameter in mentor.parameters():
            parameter.zero_()
        mentor.epoch_embedding[:, 0] = torch.arange(100) / 100
        mentor.fc1.weight[0, 2] = 1.0  # the first component of the epoch's embedding
        mentor.fc2.weight[0, 0] = 1.0
    expected = {True: 30, False: 80}
    for frozen, pct in expected.items():
        criterion = Reweight(mentor, total_steps=10, burn_in=0.3, freeze_epoch=frozen)
        criterion.step.fill_(8)
        weight = criterion.weigh(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).sample_weight
        answer = torch.tensor(pct / 100).tanh().sigmoid()
        assert torch.allclose(weight, answer.expand(4), atol=1e-6)
