"""The recipe's own part: from its three options to every run's data options."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mentorch.engine.data.datasets import open_datasets
from mentorch.engine.data.folder import index_folder
from mentorch.engine.distributed import World

REPOSITORY = Path(__file__).parents[2]
RECIPE = runpy.run_path(str(REPOSITORY / "recipes" / "webvision_irv2.py"))
with_data, full, embedded = (RECIPE[name] for name in ("with_data", "FULL", "EMBEDDED"))


def test_mini_and_entire():
    config = replace(full, webvision=Path("/w"), imagenet=Path("/i"))
    mini = with_data(config).data
    assert (mini.train, mini.sources, mini.max_label) == (Path("/w"), ("google",), 50)
    assert mini.evaluate == {"webvision": Path("/w"), "imagenet": Path("/i")}
    entire = with_data(replace(config, protocol="entire")).data
    assert (entire.sources, entire.max_label) == ((), None)
    assert with_data(with_data(config)) == with_data(config), "a resumed run's configuration"


def test_without_data_the_digits_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = with_data(embedded).data
    assert (data.train / "info" / "train_filelist_google.txt").is_file()
    assert data.evaluate["imagenet"].is_dir()
    assert "No --webvision given" in capsys.readouterr().out


@pytest.fixture
def class_folders(tmp_path):
    for row in range(8):
        path = tmp_path / "mine" / ("cat", "dog")[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (31 * row, 0, 0)).save(path)
    return tmp_path / "mine"


def test_class_folders_alone_are_trained_on_and_not_evaluated(class_folders, capsys):
    config = with_data(replace(full, webvision=class_folders, protocol="entire"))
    found = open_datasets(config.data, World())
    assert (found.classes, len(found.train.sample_ids)) == (("cat", "dog"), 8)
    assert found.evaluate == {}
    assert "mine has no validation images: 'webvision' is not evaluated" in capsys.readouterr().out


def test_another_set_without_validation_images_is_refused(class_folders):
    index = class_folders.parent / "folder.index.parquet"
    index_folder(class_folders, out=index)
    data = replace(full.data, train=index, evaluate={"other": class_folders})
    with pytest.raises(ValueError, match="no usable sample has split='val'"):
        open_datasets(data, World())


@pytest.mark.parametrize(
    ("name", "value"),
    [("train", Path("x.parquet")), ("evaluate", {"a": Path("b")}), ("max_label", 10)],
)
def test_data_options_that_the_recipe_sets_are_refused(name, value):
    config = replace(full, webvision=Path("/w"))
    config = replace(config, data=replace(config.data, **{name: value}))
    option = re.escape(f"--data.{name.replace('_', '-')}")
    with pytest.raises(ValueError, match=option):
        with_data(config)


def test_imagenet_alone_is_refused():
    with pytest.raises(ValueError, match="--imagenet is a second validation set"):
        with_data(replace(full, imagenet=Path("/i")))


def test_the_readmes_commands_are_those_of_ci():
    readme = (REPOSITORY / "README.md").read_text()
    (command,) = re.findall(r"^```bash\n(\./setup dev && .*)\n```$", readme, re.MULTILINE)
    assert ".venv/bin/pytest -n 2 &&" in command
    assert "TRITON_INTERPRET=1 .venv/bin/pytest" in command
    assert command in (REPOSITORY / ".ci" / "run").read_text()
    assert "./setup && .venv/bin/torchrun recipes/webvision_irv2.py" in readme
