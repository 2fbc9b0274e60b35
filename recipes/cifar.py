"""CIFAR under label noise by the published recipe (Sec. 5.1 of the paper).

    python recipes/cifar.py --root /data/cifar10 --method pd --noise symmetric:0.4
    python recipes/cifar.py --root /data/cifar10 --human-labels CIFAR-10_human.pt:worse_label

ROOT holds the binary version (cifar-10-binary.tar.gz, unpacked). 39,000 steps of 128 images; the
learning rate falls tenfold after steps 19,531, 25,000 and 30,000. A GPU is wanted.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from mentorch.engine.cli import run_cleanly
from mentorch.engine.comparison.run import Experiment, Method, Task, run_experiment
from mentorch.engine.config import OptimConfig, RunConfig, StudentConfig, TrainConfig
from mentorch.engine.presets import PresetName, PublishedMethod, curriculum_preset

STEPS, BATCH = 39_000, 128
MILESTONES = tuple(step / STEPS for step in (19_531, 25_000, 30_000))


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """A method on CIFAR."""

    root: Path
    """Folder of the binary files."""
    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which of the two."""
    noise: str = "symmetric:0.4"
    """Kind and rate of injected noise; symmetric draws from all classes, as in the paper."""
    human_labels: str | None = None
    """CIFAR-N's FILE:NAME instead of injected noise, e.g. CIFAR-10_human.pt:worse_label."""
    method: PublishedMethod = "pd"
    """Row of Table 2; full is plain cross-entropy."""
    preset: PresetName = "paper"
    """The paper's settings, or those of its released code."""
    student: str = "mentornet_resnet101"
    """mentornet_resnet101 (84 M), mentornet_inception (1.7 M), cifar_resnet32, …"""
    seed: int = 0
    """Of student, order and noise."""
    epochs: int = 100
    """Passes over the images; 100 are the published 39,000 steps."""
    out: Path = Path("runs/cifar")
    """Folder of the results."""


def experiment(cifar: Cifar) -> Experiment:
    """The run that the options ask for."""
    task = Task(dataset=cifar.dataset, root=cifar.root, validation=0).with_noise(cifar.noise)
    if cifar.human_labels:
        task = replace(task, human_labels=cifar.human_labels)
    released = cifar.preset == "released-code"
    config = RunConfig(
        seed=cifar.seed,
        student=StudentConfig(name=cifar.student),
        optim=OptimConfig(
            lr=0.1, weight_decay=2e-4, warmup_epochs=0, schedule="step", milestones=MILESTONES,
            scale_weight_decay=released,
        ),
        train=TrainConfig(epochs=cifar.epochs, batch_size=BATCH),
    )  # fmt: skip
    wide = cifar.student == "mentornet_resnet101"
    method = Method(curriculum=curriculum_preset(cifar.preset, cifar.method, task.rate, wide))
    name = f"{cifar.method}-{cifar.preset}-{cifar.student}"
    return Experiment(
        task=task, name=name, method=method, config=config, pad=4, mirror=True, standardise=True
    )


def main() -> int:
    """Trains, evaluates on the test set every epoch, writes one JSON file."""
    cifar = tyro.cli(Cifar, description=__doc__)
    wanted = experiment(cifar)
    cifar.out.mkdir(parents=True, exist_ok=True)
    record = run_experiment(wanted, cifar.out, progress=True)
    path = cifar.out / f"{wanted.key}.json"
    path.write_text(json.dumps(record, default=str, indent=1))
    print(f"last {record['last']:.4f}, best {record['best']:.4f} ({record['best_epoch']}): {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
