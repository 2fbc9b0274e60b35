"""From a configuration to a criterion, and whole runs under those that learn something."""

import json
from dataclasses import replace

import pytest
import torch

from mentorch.engine.baselines import Bootstrap, GeneralisedCrossEntropy, NoiseLayer
from mentorch.engine.config import CurriculumConfig
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.index import Index
from mentorch.engine.data_driven import DataDriven
from mentorch.engine.job import run
from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.reweight import Reweight

N, C = 40, 5
LABELS = torch.arange(N) % C
CLEAN = torch.where(torch.arange(N) < 20, LABELS, (LABELS + 1) % C)


def _create(**options):
    return create_criterion(
        CurriculumConfig(**options),
        labels_N=LABELS,
        clean_labels_N=CLEAN,
        sample_ids=torch.arange(N),
        num_classes=C,
        total_steps=100,
        seed=3,
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"name": "reed_soft"}, Bootstrap),
        ({"name": "reed_hard"}, Bootstrap),
        ({"name": "noise_layer"}, NoiseLayer),
        ({"name": "gce"}, GeneralisedCrossEntropy),
        ({"name": "pd"}, Reweight),
        ({"name": "linear", "weight_lr": 0.5}, LatentReweight),
        ({"name": "dd", "trusted": 0.5}, DataDriven),
    ],
)
def test_every_name_makes_its_criterion(options, kind):
    criterion = _create(**options)
    assert type(criterion) is kind
    loss = criterion(torch.randn(8, C), LABELS[:8], torch.arange(8))
    assert torch.isfinite(loss)


def test_a_closed_form_gets_its_parameters():
    form = _create(name="linear", lambda1=0.3, lambda2=2.0).closed_form
    assert (form.lambda1, form.lambda2) == (0.3, 2.0)
    assert _create(name="focal", gamma=3.0).closed_form.gamma == 3.0


def test_data_driven_is_told_what_was_asked_for():
    criterion = _create(
        name="dd", trusted=0.5, learn_at=(0.1, 0.6), sharpness=2.0, history_steps=2, lstm_units=3
    )
    assert len(criterion.trusted_ids) == 20
    assert torch.equal(criterion.is_right, criterion.trusted_ids < 20)
    assert criterion.learn_steps == {10, 60}
    assert criterion.history.shape == (N + 1, 2, 2)
    assert criterion.mentor.forward_lstm.weight_hh.shape[1] == 3
    assert criterion.fit_options["sharpness"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pd", "weight_lr": 0.5}, "a MentorNet has not"),
        ({"name": "focal", "weight_lr": 0.5}, "has no G"),
        ({"name": "pd", "trusted": 0.1}, "curriculum dd"),
        ({"name": "nonesuch"}, "unknown curriculum"),
        ({"name": "dd", "trusted": 1.5}, "share"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _create(**options)


def _summary(config):
    folder = next(config.out.iterdir())
    return json.loads((folder / "summary.json").read_text()), folder


@pytest.mark.parametrize("name", ["noise_layer", "gce"])
def test_a_run_under_a_baseline(without_evaluation, name):
    config = replace(without_evaluation, curriculum=CurriculumConfig(name=name))
    assert run(config) == 0
    summary, _ = _summary(config)
    assert summary["steps"] == 24


def test_a_run_that_learns_its_curriculum(without_evaluation, digits_index):
    """D' are samples with a known clean label: the index gets some."""
    noisy = without_evaluation.out.parent / "known.parquet"
    labels = digits_index.labels()
    clean = labels.copy()
    clean[::3] = (clean[::3] + 1) % 10
    _with_clean(digits_index, clean).write(noisy)
    curriculum = CurriculumConfig(name="dd", trusted=0.4, burn_in=0.3, learn_at=(0.3, 0.6))
    config = replace(
        without_evaluation,
        curriculum=curriculum,
        data=replace(without_evaluation.data, train=noisy),
    )
    assert run(config) == 0
    assert _summary(config)[0]["steps"] == 24


def _with_clean(index: Index, clean) -> Index:
    import pyarrow as pa

    at = index.table.schema.get_field_index("clean_label")
    column = pa.array(clean, pa.int32())
    return replace(index, table=index.table.set_column(at, index.table.schema.field(at), column))
