"""What must not change between a run and its resumption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mentorch.engine.config import RunConfig
from mentorch.engine.data.datasets import Datasets
from mentorch.engine.data.pipelines import Loader, digest
from mentorch.engine.spade import Spade


def fingerprint(
    config: RunConfig, data: Datasets, spade: Spade, loader: Loader
) -> dict[str, str | int | bool]:
    """What must not change between a run and its resumption, by name. The ranks may.

    Args:
        config: the run.
        data: its data sets.
        spade: what trains.
        loader: of the training samples.
    """
    return {
        "seed": config.seed,
        "train.batch_size": config.train.batch_size,
        "train.accumulate": config.train.accumulate,
        "student.name": config.student.name,
        "classes": len(data.classes),
        "precision": str(spade.dtype),
        "an average of the weights": spade.average is not None,
        **loader.fingerprint(),
        "training labels": digest(data.train.labels_N),
    }


def check_fingerprint(checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Whether a run may go on from a checkpoint.

    Args:
        checkpoint: named in the message.
        saved: the checkpoint's fingerprint; an older run did not note all of it.
        here: this run's.

    Raises:
        ValueError: they differ; the message names the first difference.
    """
    for name, value in here.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"{checkpoint} was made with {name} {saved[name]!r}, this run has {value!r}: it "
                "would not go on as it was. Undo that, or start a new run"
            )
