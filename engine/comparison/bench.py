"""The comparison as a whole: which experiments, their recipe, and running them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mentorch.engine.comparison.grid import read_results, run_grid
from mentorch.engine.comparison.methods import METHODS, method
from mentorch.engine.comparison.report import write_report
from mentorch.engine.comparison.run import Experiment, Task
from mentorch.engine.config import OptimConfig, RunConfig, StudentConfig, TrainConfig
from mentorch.engine.data.images import ImageSetName


@dataclass(frozen=True, kw_only=True)
class NoisyBench:
    """Which experiments: noise × method × seed."""

    dataset: ImageSetName = "fashion_mnist"
    """Image set."""
    root: Path | None = None
    """Folder of its files; None: where its package puts them."""
    train_samples: int = 10_000
    """Training images; 0: all but the validation set."""
    evaluate_on: Literal["test", "validation"] = "test"
    """What accuracies are over; settings are chosen on the validation set."""
    noises: tuple[str, ...] = ("symmetric:0.2", "symmetric:0.4", "symmetric:0.8", "asymmetric:0.4")
    """Kinds and rates of noise, columns of the table."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table; a name may be followed by options of its curriculum, in one word of the
    shell: "mentornet_dd sharpness=1"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of everything random: student, order and noise."""
    student: str = "small_cnn"
    """A model of timm or of ours."""
    epochs: int = 24
    """Passes over the training images."""
    lr: float = 0.05
    """First learning rate; a tenth from half, a hundredth from three quarters of training."""
    jobs: int = 0
    """Runs side by side; 0: one a core."""
    out: Path = Path("runs/noisy_bench")
    """Folder of the results."""


def experiments(bench: NoisyBench) -> list[Experiment]:
    """Every cell of the table, seed by seed."""
    base = Task(
        dataset=bench.dataset, root=bench.root, train_samples=bench.train_samples,
        evaluate_on=bench.evaluate_on,
    )  # fmt: skip
    recipe = RunConfig(
        student=StudentConfig(name=bench.student, drop_rate=0.0),
        optim=OptimConfig(lr=bench.lr, weight_decay=1e-4, warmup_epochs=0, schedule="step"),
        train=TrainConfig(epochs=bench.epochs, batch_size=128, precision="fp32"),
    )
    return [
        Experiment(
            task=task, name=name, method=method(name, task), config=replace(recipe, seed=seed)
        )
        for seed in bench.seeds
        for task in map(base.with_noise, bench.noises)
        for name in bench.methods
    ]


def compare(bench: NoisyBench) -> int:
    """Runs what is missing, then writes and prints the report.

    Returns:
        The process's exit status: 1 when an experiment failed.
    """
    failed = run_grid(experiments(bench), bench.out, bench.jobs)
    print(write_report(read_results(bench.out), bench.out, bench.methods))
    print(f"{bench.out}: results.parquet, table.md, figures", *failed, sep="\nfailed: ")
    return int(bool(failed))
