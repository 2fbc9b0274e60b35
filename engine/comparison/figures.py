"""The paper's figures, from the results of a comparison (matplotlib)."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mentorch.engine.comparison.report import Record, method_of, noise_of
from mentorch.engine.mentor import MentorNet
from mentorch.kernels.mentor import ClosedForm

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _groups(records: Sequence[Record], methods: Sequence[str]) -> dict[str, list[Record]]:
    names = [*methods, *(method_of(r) for r in records)]
    groups = {name: [r for r in records if method_of(r) == name] for name in dict.fromkeys(names)}
    return {name: found for name, found in groups.items() if found}


def _curve(records: Sequence[Record], name: str) -> npt.NDArray[np.float64]:
    """Mean over seeds of a curve by epoch."""
    curves = np.asarray([record["curves"][name] for record in records], np.float64)
    mean: npt.NDArray[np.float64] = curves.mean(axis=0)
    return mean


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def error_curves(records: Sequence[Record], path: Path, methods: Sequence[str] = ()) -> Path:
    """Fig. 3: test error, and the weighted training loss Σ v ℓ / B, by epoch.

    Args:
        records: of one noise.
        path: of the picture.
        methods: order of the lines.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for number, (name, found) in enumerate(_groups(records, methods).items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        error = 1 - _curve(found, "top1")
        left.plot(np.arange(1, len(error) + 1), error, label=name, **style)
        right.plot(np.arange(1, len(error) + 1), _curve(found, "weighted_loss"), **style)
    left.set(xlabel="epoch", ylabel="error on clean images")
    right.set(xlabel="epoch", ylabel="training loss Σvℓ/B, nats", yscale="log")
    figure.suptitle(noise_of(records[0]))
    figure.legend(loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=8)
    return _save(figure, path)


def weight_histograms(record: Record, path: Path) -> Path:
    """Weights of right and wrong labels at four epochs of a run."""
    histograms = record["weight_histograms"]
    epochs = len(histograms["right"])
    chosen = sorted({max(1, round(share * epochs)) for share in (0.15, 0.3, 0.6, 1.0)})
    figure, axes = plt.subplots(1, len(chosen), figsize=(3 * len(chosen), 2.8), squeeze=False)
    for axis, epoch in zip(axes[0], chosen, strict=True):
        for name, color in (("right", "C0"), ("wrong", "C3")):
            counts = np.array(histograms[name][epoch - 1], dtype=float)
            if len(counts):
                centres = (np.arange(len(counts)) + 0.5) / len(counts)
                axis.bar(centres, counts / counts.sum(), 1 / len(counts), alpha=0.6, color=color,
                         label=f"{name} labels")  # fmt: skip
        axis.set(title=f"epoch {epoch}", xlabel="weight", ylim=(0, 1))
    axes[0][0].set_ylabel("share of samples")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{method_of(record)}, {noise_of(record)}", y=1.05)
    return _save(figure, path)


@torch.no_grad()
def surface(mentor: MentorNet, epoch_pct: int, loss: Tensor, diff: Tensor) -> Tensor:
    """Weights over a grid, [len(diff), len(loss)], at a point of training."""
    columns = torch.meshgrid(diff, loss, indexing="ij")
    flat_diff, flat_loss = (column.flatten() for column in columns)
    labels = torch.zeros(len(flat_loss), dtype=torch.int64)
    weight: Tensor = mentor(flat_loss, flat_diff, labels, torch.tensor(epoch_pct))
    return weight.reshape(len(diff), len(loss))


def curriculum_surfaces(mentors: Sequence[tuple[str, MentorNet, int]], path: Path) -> Path:
    """Fig. 4: the weight over loss and loss difference.

    Args:
        mentors: title, MentorNet and epoch percentage, one a panel.
        path: of the picture.
    """
    loss, diff = torch.linspace(0, 8, 81), torch.linspace(-4, 4, 81)
    figure, axes = plt.subplots(
        1, len(mentors), figsize=(4.5 * len(mentors), 4), subplot_kw={"projection": "3d"},
        squeeze=False,
    )  # fmt: skip
    for axis, (title, mentor, pct) in zip(axes[0], mentors, strict=True):
        x, y = np.meshgrid(loss.numpy(), diff.numpy())
        weight = surface(mentor, pct, loss, diff).numpy()
        axis.plot_surface(x, y, weight, cmap="viridis", vmin=0, vmax=1)
        axis.set(xlabel="loss ℓ", ylabel="ℓ − ℓ_pt", zlim=(0, 1), title=title)
    axes[0][-1].set_zlabel("weight")
    return _save(figure, path)


@torch.no_grad()
def objectives(mentor: MentorNet, loss_moving_avg: float, epoch_pct: int, path: Path) -> Path:
    """Fig. 2: what a sample's loss contributes to the objective, curriculum by curriculum.

    Args:
        mentor: a data-driven one; as its G is unknown, v ℓ is drawn, as in the paper.
        loss_moving_avg: ℓ_pt it is drawn at, nats.
        epoch_pct: likewise.
        path: of the picture.
    """
    from mentorch.engine.objectives import robust_objective

    loss = torch.linspace(0, 8, 161, dtype=torch.float64)
    labels = torch.zeros(len(loss), dtype=torch.int64)
    learned = mentor(loss.float(), loss.float() - loss_moving_avg, labels, torch.tensor(epoch_pct))
    lines = {
        "cross-entropy": loss,
        "self-paced, Eq. 2": robust_objective(
            ClosedForm("self_paced", lambda1=loss_moving_avg, on="loss"), loss
        ),
        "linear, Eq. 11": robust_objective(
            ClosedForm("linear", lambda1=loss_moving_avg, lambda2=1.0, on="loss"), loss
        ),
        "Huber": torch.where(loss <= 1, loss, 2 * loss.clamp(min=1).sqrt() - 1),
        "log-sum penalty": torch.log1p(loss),
        "data-driven, vℓ": learned.double() * loss,
    }
    figure, axis = plt.subplots(figsize=(5.5, 4))
    for name, values in lines.items():
        axis.plot(loss, values, label=name)
    axis.set(xlabel="sample loss ℓ, nats", ylabel="objective", ylim=(0, 5))
    axis.legend(fontsize=8)
    return _save(figure, path)


def write_figures(records: Sequence[Record], folder: Path, methods: Sequence[str] = ()) -> None:
    """Every figure the results allow: KIND-RATE.*.png, surfaces.png, objectives.png."""
    for noise in dict.fromkeys(noise_of(record) for record in records):
        found = [record for record in records if noise_of(record) == noise]
        stem = noise.replace(" ", "-")
        error_curves(found, folder / f"{stem}.curves.png", methods)
        for name, runs in _groups(found, methods).items():
            weight_histograms(runs[0], folder / f"{stem}.{name.replace(' ', '_')}.weights.png")
    learned = _learned(records, folder)
    if learned:
        record, mentors = learned
        curriculum_surfaces(
            [(f"learned at {pct}%", m, pct) for pct, m in mentors], folder / "surfaces.png"
        )
        pct, mentor = mentors[-1]
        average = record["curves"]["loss_moving_avg"][-1]
        objectives(mentor, average, pct, folder / "objectives.png")


def _learned(
    records: Sequence[Record], folder: Path
) -> tuple[Record, list[tuple[int, MentorNet]]] | None:
    """The first run that learned MentorNets, and these: the first and the last of them."""
    for record in records:
        key = escape(record["experiment"]["key"])  # a method's options may have brackets
        paths = folder.glob(f"{key}.at-*.safetensors")
        by_pct = sorted((int(path.stem.rpartition("-")[2]), path) for path in paths)
        if by_pct:
            ends = [by_pct[0], by_pct[-1]] if len(by_pct) > 1 else by_pct
            return record, [(pct, MentorNet.load(path)) for pct, path in ends]
    return None
