"""The embedded data set and a run small enough for tests."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.data.embedded import write_embedded
from mentorch.engine.data.imagenet import index_imagenet
from mentorch.engine.data.index import Index
from mentorch.engine.data.webvision import index_webvision

torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded digits in WebVision's layout, indexed."""
    root = write_embedded(tmp_path_factory.mktemp("cache") / "digits")
    index_webvision(root, workers=0)
    index_imagenet(root / "ilsvrc", workers=0)
    return root


@pytest.fixture(scope="session")
def digits_index(digits) -> Index:
    return Index.read(digits / "webvision.index.parquet")


@pytest.fixture
def small_run(digits, tmp_path) -> RunConfig:
    """Two epochs of 12 steps with everything switched on that a run can resume wrongly."""
    return RunConfig(
        name="small",
        out=tmp_path / "runs",
        device="cpu",
        data=DataConfig(
            train=digits,
            evaluate={"webvision": digits, "imagenet": digits / "ilsvrc"},
            sources=("flickr",),
            max_label=50,
            image_size=32,
            resize=36,
            threads=1,
        ),
        student=StudentConfig(name="test_resnet", drop_rate=0.2),
        curriculum=CurriculumConfig(name="linear", burn_in=0.3, example_dropout=0.1),
        optim=OptimConfig(lr=0.05, average_decay=0.9, clip_norm=5.0, warmup_epochs=0.5),
        train=TrainConfig(
            epochs=2, batch_size=16, eval_batch_size=64, precision="fp32", log_every=5
        ),
    )


@pytest.fixture
def without_evaluation(small_run) -> RunConfig:
    return replace(small_run, data=replace(small_run.data, evaluate={}))
