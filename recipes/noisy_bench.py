"""Methods against label noise on a small image set: one recipe, several seeds, one table.

    python recipes/noisy_bench.py                                  # Fashion-MNIST, docs/results
    python recipes/noisy_bench.py --dataset digits --student small_mlp --train-samples 0

Fashion-MNIST is Debian's package dataset-fashion-mnist, or --root. A broken-off comparison goes on
where it was. OUT gets a file a run, results.parquet, table.md and figures.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from mentorch.engine.cli import run_cleanly
from mentorch.engine.comparison.grid import read_results, run_grid
from mentorch.engine.comparison.methods import METHODS, method
from mentorch.engine.comparison.report import write_report
from mentorch.engine.comparison.run import Experiment, Task
from mentorch.engine.config import OptimConfig, RunConfig, StudentConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class NoisyBench:
    """Which experiments: task × noise × method × seed."""

    task: tyro.conf.OmitArgPrefixes[Task] = field(
        default_factory=lambda: Task(train_samples=12_000)
    )
    noises: tuple[str, ...] = ("symmetric:0.2", "symmetric:0.4", "symmetric:0.8", "asymmetric:0.4")
    """Kinds and rates of noise."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of everything random: student, order and noise."""
    student: str = "small_cnn"
    """A model of timm or of ours."""
    epochs: int = 30
    """Passes over the training images."""
    lr: float = 0.05
    """First learning rate; a tenth from half, a hundredth from three quarters of training."""
    jobs: int = 0
    """Runs side by side; 0: one a core."""
    out: Path = Path("runs/noisy_bench")
    """Folder of the results."""


def experiments(bench: NoisyBench) -> list[Experiment]:
    """Every cell of the table, seed by seed."""
    recipe = RunConfig(
        student=StudentConfig(name=bench.student, drop_rate=0.0, channels_last=False),
        optim=OptimConfig(lr=bench.lr, weight_decay=1e-4, warmup_epochs=0, schedule="step"),
        train=TrainConfig(epochs=bench.epochs, batch_size=128),
    )
    return [
        Experiment(
            task=task, name=name, method=method(name, task), config=replace(recipe, seed=seed)
        )
        for seed in bench.seeds
        for task in (bench.task.with_noise(text) for text in bench.noises)
        for name in bench.methods
    ]


def main() -> int:
    """Runs what is missing, then writes the report."""
    bench = tyro.cli(NoisyBench, description=__doc__)
    failed = run_grid(experiments(bench), bench.out, bench.jobs)
    print(write_report(read_results(bench.out), bench.out, bench.methods))
    print(f"{bench.out}: results.parquet, table.md, figures", *failed, sep="\nfailed: ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
