import json
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest

from mentorch.engine.cli import parse
from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.config_files import load_config, save_config


@dataclass(frozen=True, kw_only=True)
class Recipe(RunConfig):
    extra: Path | None = None
    """A recipe's own option."""


# Every other epoch, and the last, which is none of those; every one; only the last.
@pytest.mark.parametrize(("every", "epochs"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (9, [5])])
def test_epochs_that_are_evaluated(every, epochs):
    train = TrainConfig(epochs=5, evaluate_every=every)
    assert [epoch for epoch in range(1, 6) if train.is_evaluated(epoch)] == epochs


def test_what_is_saved_is_what_is_loaded(tmp_path):
    config = Recipe(
        extra=Path("/somewhere"),
        data=DataConfig(evaluate={"a": Path("b")}, sources=("google",), crop_scale=(0.2, 0.9)),
        optim=OptimConfig(milestones=(0.3, 0.6)),
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json", Recipe) == config


def test_unknown_keys_and_wrong_types_are_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    save_config(Recipe(), path)
    saved = json.loads(path.read_text())
    saved["optim"]["learning_rate"] = 1
    saved["train"]["epochs"] = "many"
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="learning_rate") as error:
        load_config(path, Recipe)
    assert "epochs" in str(error.value)


def test_a_folder_without_a_configuration_is_no_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        parse(Recipe, Recipe(), ["--resume", str(tmp_path)])


def test_resuming_takes_the_saved_values_unless_others_are_given(tmp_path):
    save_config(Recipe(seed=7, train=TrainConfig(epochs=3)), tmp_path / "config.json")
    config = parse(Recipe, Recipe(), ["--resume", str(tmp_path), "--train.epochs", "5"])
    assert (config.seed, config.train.epochs, config.resume) == (7, 5, tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DataConfig, {"image_size": 400}, r"resize \(320\) must be at least image_size \(400\)"),
        (DataConfig, {"crop_scale": (0.5, 1.5)}, r"crop_scale.*1\.5"),
        (DataConfig, {"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        (DataConfig, {"prefetch": 0}, "prefetch must be at least 1, got 0"),
        (TrainConfig, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (OptimConfig, {"average_decay": 1.0}, r"average_decay.*1\.0"),
        (OptimConfig, {"milestones": (0.5, 2.0)}, r"milestones.*2\.0"),
        (OptimConfig, {"lr": -1.0}, "lr must be at least 0"),
        (CurriculumConfig, {"burn_in": 20.0}, "burn_in is a share"),
        (StudentConfig, {"drop_rate": 2.0}, "drop_rate is a share"),
    ],
)
def test_values_out_of_range_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def _options(kind, prefix=""):
    for field in fields(kind):
        if is_dataclass(field.default_factory):
            yield from _options(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


def test_help_lists_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, Recipe(), ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = list(_options(Recipe))
    assert len(options) > 50
    missing = [option for option in options if option not in text]
    assert not missing
    assert "Decay of the moving average of the student" in text.replace("\n", " ")


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, Recipe(), ["--train.epoch", "3"])
    assert stop.value.code == 2
    assert "--train.epochs" in capsys.readouterr().err, "the nearest option is not suggested"


def test_replacing_checks_again():
    with pytest.raises(ValueError, match="epochs"):
        replace(TrainConfig(), epochs=-1)
