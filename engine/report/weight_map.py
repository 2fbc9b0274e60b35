"""A curriculum's weights as a heat map: over loss and loss difference, with level lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from mentorch.kernels.mentor import ClosedForm, Curriculum, sample_weight_ref

LOSS, DIFF = torch.linspace(0, 8, 161), torch.linspace(-4, 4, 161)  # nats
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
_INK = "black"
_LINES = ("white", "white", "white", _INK, _INK)  # seen on viridis at those weights


@torch.no_grad()
def weight_surface(
    curriculum: Curriculum,
    epoch_pct: int,
    history_steps: int = 1,
    losses: Tensor = LOSS,
    differences: Tensor = DIFF,
    label: int = 0,
) -> Tensor:
    """Weights over a grid of losses and differences, [differences, losses] on the CPU.

    Args:
        curriculum: in force.
        epoch_pct: progress of training, 0 to 99.
        history_steps: visits it looks at; all are taken to be like the last.
        losses: ℓ of the columns, nats.
        differences: ℓ − ℓ_pt of the rows, nats.
        label: given to all samples; read by a MentorNet with ``use_label`` only.

    Raises:
        ValueError: a MentorNet without an LSTM reads another number of visits.
    """
    device = "cpu" if isinstance(curriculum, ClosedForm) else curriculum.fc1_weight.device
    axes = torch.meshgrid(differences.to(device), losses.to(device), indexing="ij")
    diff, loss = (part.flatten() for part in axes)
    if history_steps > 1 and not isinstance(curriculum, ClosedForm):
        loss, diff = (part[:, None].expand(-1, history_steps) for part in (loss, diff))
    labels = torch.full((len(loss),), label, device=device)
    epoch = torch.tensor(epoch_pct, device=device)
    weight = sample_weight_ref(curriculum, loss, diff, labels, epoch)
    return weight.reshape(len(differences), len(losses)).cpu()


@dataclass(frozen=True, eq=False)
class Surface:
    """A curriculum at some points of training at which it is the same.

    Attributes:
        epochs: epoch percentages, 0 to 99.
        weight: [differences, losses].
    """

    epochs: tuple[int, ...]
    weight: Tensor

    @property
    def title(self) -> str:
        """When that is, in words."""
        *first, last = map(str, self.epochs)
        return f"at {', '.join(first) + ' and ' if first else ''}{last}% of training"


def surfaces_at(curriculum: Curriculum, epochs: Sequence[int], **options: Any) -> list[Surface]:
    """What a curriculum does at some points of training; equal neighbours are one.

    Args:
        curriculum: in force.
        epochs: epoch percentages, 0 to 99.
        options: of `weight_surface`.
    """
    found: list[Surface] = []
    for epoch_pct in epochs:
        weight = weight_surface(curriculum, epoch_pct, **options)
        if found and torch.equal(found[-1].weight, weight):
            found[-1] = Surface((*found[-1].epochs, epoch_pct), weight)
        else:
            found.append(Surface((epoch_pct,), weight))
    return found


def paint_weights(
    axes: Any,
    weight: Tensor,
    losses: Tensor = LOSS,
    differences: Tensor = DIFF,
    *,
    numbers: bool = False,
    bar: bool = True,
) -> Any:
    """Draws a surface of `weight_surface` on matplotlib axes; returns the image.

    Args:
        axes: to draw on.
        weight: [differences, losses], in [0, 1].
        losses: ℓ of the columns, nats, evenly spaced.
        differences: ℓ − ℓ_pt of the rows, likewise.
        numbers: write the weight on every level line.
        bar: add the bar that tells weights from colours.
    """
    axes.grid(False)
    extent = (*_edges(losses), *_edges(differences))
    image = axes.imshow(
        weight.numpy(), cmap="viridis", vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto"
    )  # fmt: skip
    _level_lines(axes, weight, losses, differences, numbers)
    axes.set_xlim(float(losses[0]), float(losses[-1]))
    axes.set_ylim(float(differences[0]), float(differences[-1]))
    axes.set(xlabel="loss ℓ, nats", ylabel="ℓ − ℓ_pt, nats")
    if bar:
        axes.figure.colorbar(image, ax=axes, label="weight", ticks=[0, *LEVELS, 1])
    return image


def paint_bound(axes: Any, losses: Tensor = LOSS) -> None:
    """Dots the line ℓ_pt = 0: losses are at least 0, so no sample's difference lies above it."""
    halo = [withStroke(linewidth=2.4, foreground=_INK)]  # seen on dark and light weights alike
    axes.plot(losses, losses, color="white", linestyle=":", linewidth=1.2, path_effects=halo)


def paint_row(
    figure: Figure,
    surfaces: Sequence[Surface],
    losses: Tensor = LOSS,
    differences: Tensor = DIFF,
    *,
    title: str = "",
    caption: str = "",
    numbers: bool = False,
) -> None:
    """Draws surfaces side by side with one bar for all of them.

    Args:
        figure: matplotlib's, to draw on.
        surfaces: from left to right.
        losses: ℓ of the columns, nats.
        differences: ℓ − ℓ_pt of the rows, nats.
        title: above them all, plain text.
        caption: below them all, plain text.
        numbers: write the weight on every level line.
    """
    row = figure.subplots(1, len(surfaces), sharey=True, squeeze=False)[0]
    for axes, surface in zip(row, surfaces, strict=True):
        image = paint_weights(
            axes, surface.weight, losses, differences, numbers=numbers, bar=False
        )  # fmt: skip
        paint_bound(axes, losses)
        axes.set_title(surface.title, fontsize=9)
        axes.label_outer()
    figure.colorbar(image, ax=list(row), pad=0.02, label="weight", ticks=[0, *LEVELS, 1])
    figure.suptitle(title, parse_math=False, fontsize=10, fontweight="bold")
    figure.supxlabel(caption, parse_math=False, fontsize=7)


def _edges(values: Tensor) -> tuple[float, float]:
    """Outer edges of the pixels whose centres are evenly spaced values."""
    half = float(values[1] - values[0]) / 2
    return float(values[0]) - half, float(values[-1]) + half


def _level_lines(
    axes: Any, weight: Tensor, losses: Tensor, differences: Tensor, numbers: bool
) -> None:
    low, high = float(weight.min()), float(weight.max())
    drawn = [at for at, level in enumerate(LEVELS) if low < level < high]
    if not drawn:  # matplotlib would warn
        return
    levels, colors = [LEVELS[at] for at in drawn], [_LINES[at] for at in drawn]
    lines = axes.contour(
        losses.numpy(), differences.numpy(), weight.numpy(), levels, colors=colors, linewidths=0.9
    )  # fmt: skip
    if not numbers:
        return
    for at, level, pieces in zip(drawn, levels, lines.allsegs, strict=True):
        line = max(pieces, key=len)
        # Each level at its own share of its line: where lines are close, numbers still are not.
        x, y = line[int((0.1 + 0.2 * at) * len(line))]
        halo = [withStroke(linewidth=1.6, foreground=_INK)]
        center = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
        axes.text(x, y, f"{level:g}", path_effects=halo, **center)
