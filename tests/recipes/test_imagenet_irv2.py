"""ImageNet with noisy labels: the recipe's own part, and that the noise is what it says."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mentorch.engine.config import DataConfig
from mentorch.engine.data.datasets import open_datasets
from mentorch.engine.distributed import World

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "imagenet_irv2.py"))
with_data, recipe = RECIPE["with_data"], RECIPE["RECIPE"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """8 classes of 60 training and 2 validation images of one pixel."""
    root = tmp_path_factory.mktemp("imagenet")
    for label in range(8):
        for split, count in (("train", 60), ("val", 2)):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (1, 1)).save(folder / f"{split}_{label}_{number}.JPEG", "JPEG")
    return root


def test_40_percent_of_the_training_labels_are_drawn_anew(imagenet):
    data = open_datasets(with_data(replace(recipe, imagenet=imagenet)).data, World())
    index = data.train.index
    wrong = data.train.labels_N != index.clean_labels()
    is_train = np.isin(np.arange(len(index)), data.train.sample_ids)
    assert abs(wrong[is_train].mean() - 0.4 * 7 / 8) < 0.07  # 480 samples: 3 deviations
    assert index.noise["kind"] == "symmetric"
    (val,) = data.evaluate.values()
    assert (val.labels_N[val.sample_ids] == np.arange(16) // 2).all(), "noise on validation labels"


def test_the_noise_has_a_seed_and_a_kind(imagenet):
    def labels(**changes):
        config = DataConfig(train=imagenet, **({"noise": "symmetric:0.4"} | changes))
        return open_datasets(config, World()).train.labels_N.tolist()

    assert labels() == labels()
    assert labels() != labels(noise_seed=1)
    assert labels() != labels(noise="pair:0.4")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("0.4", "KIND:RATE"),
        ("odd:0.4", "unknown"),
        ("symmetric:4", "rate"),
        ("matrix:0.4", "matrix"),
    ],
)
def test_a_noise_that_is_none(imagenet, noise, message):
    with pytest.raises(ValueError, match=message):
        open_datasets(DataConfig(train=imagenet, noise=noise), World())


def test_without_imagenet_the_recipe_says_what_it_wants():
    with pytest.raises(ValueError, match="--imagenet"):
        with_data(recipe)
