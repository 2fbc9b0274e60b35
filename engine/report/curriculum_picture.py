"""A curriculum's pictures: PNG, or a page with what is known of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mentorch.engine.mentor import MentorNet
from mentorch.engine.report.drawing import draw, rendered
from mentorch.engine.report.templates import render
from mentorch.engine.report.weight_map import (
    Surface,
    paint_bound,
    paint_row,
    paint_weights,
    surfaces_at,
)
from mentorch.kernels.mentor import EPOCHS, ClosedForm

_POINTS = 201  # of each axis
_PARAMETERS = {  # that a closed form has
    "self_paced": ("lambda1",),
    "linear": ("lambda1", "lambda2"),
    "focal": ("gamma",),
    "hard_example": ("lambda1",),
    "pd_mixture": ("lambda1", "lambda2"),
}


@dataclass(frozen=True, kw_only=True)
class View:
    """What of a curriculum is drawn.

    Raises:
        ValueError: a range or an epoch that cannot be drawn.
    """

    epochs: tuple[int, ...] = (0, 50, 99)
    """Epoch percentages, 0 to 99."""
    loss_max: float = 10.0
    """Losses from 0 to this, nats."""
    diff_range: tuple[float, float] = (-5.0, 5.0)
    """Loss differences ℓ − ℓ_pt from–to, nats."""
    numbers: bool = False
    """Write the weight on every level line."""
    history_steps: int = 1
    """Visits of a sample that a MentorNet looks at, all alike."""
    label: int = 0
    """Given label, for a MentorNet that reads it."""

    def __post_init__(self) -> None:
        for epoch in self.epochs:
            if not 0 <= epoch < EPOCHS:
                raise ValueError(f"epoch is a percentage of training, 0 to 99, got {epoch}")
        if not self.epochs:
            raise ValueError("epoch needs at least one percentage of training, 0 to 99")
        if not 0 < self.loss_max < math.inf:
            raise ValueError(f"loss_max must be above 0 nats and finite, got {self.loss_max}")
        low, high = self.diff_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"diff_range must be from < to, both finite, got {low} {high}")

    @property
    def losses(self) -> Tensor:
        """ℓ of the columns, nats."""
        return torch.linspace(0, self.loss_max, _POINTS)

    @property
    def differences(self) -> Tensor:
        """ℓ − ℓ_pt of the rows, nats."""
        return torch.linspace(*self.diff_range, _POINTS)


def with_parameters(
    found: ClosedForm | MentorNet, given: dict[str, float]
) -> ClosedForm | MentorNet:
    """A curriculum with its parameters set.

    Args:
        found: the curriculum.
        given: parameters by name.

    Raises:
        ValueError: a parameter that it has not, or out of range.
    """
    known = _PARAMETERS.get(found.kind, ()) if isinstance(found, ClosedForm) else ()
    kind = found.kind if isinstance(found, ClosedForm) else "a MentorNet"
    for name, value in given.items():
        if name not in known:
            has = ", ".join(known) or "no parameters"
            raise ValueError(f"{kind} has {has}: leave out {name}={value:g}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    return replace(found, **given) if isinstance(found, ClosedForm) else found  # type: ignore[arg-type]


def history_steps_of(found: ClosedForm | MentorNet, asked: int | None) -> int:
    """T to draw a curriculum with: what was asked for, or else the fewest it works with.

    Args:
        found: the curriculum.
        asked: T, if anybody asked.

    Raises:
        ValueError: a T that it does not take.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"history_steps must be at least 1, got {asked}")
    if isinstance(found, ClosedForm):
        if asked is not None and asked > 1:
            raise ValueError(f"{found.kind} looks at one visit: leave out history_steps={asked}")
        return 1
    if asked is None:
        embedded = found.label_embedding.shape[1] + found.epoch_embedding.shape[1]
        return (found.fc1.in_features - embedded) // 2 if found.encoder == "none" else 1
    found.weights().check_steps(asked)
    return asked


def check_label(found: ClosedForm | MentorNet, label: int) -> None:
    """Whether a curriculum can be drawn for a given label.

    Args:
        found: the curriculum.
        label: 0, or one that it has learned.

    Raises:
        ValueError: it cannot.
    """
    reads = isinstance(found, MentorNet) and found.use_label
    count = found.label_embedding.shape[0] if isinstance(found, MentorNet) and reads else 1
    if label and not reads:
        raise ValueError(f"this curriculum reads no label: leave out given_label={label}")
    if not 0 <= label < count:
        raise ValueError(f"given_label must be in 0 to {count - 1}, got {label}")


def _caption(found: ClosedForm | MentorNet, view: View) -> str:
    """What one must know to read the picture, plain text."""
    said = "Lines: weights 0.1, 0.25, 0.5, 0.75, 0.9. Dotted: ℓ_pt = 0, above it are no samples."
    if view.history_steps > 1:
        said += f" All of a sample's {view.history_steps} visits are taken to be alike."
    if isinstance(found, MentorNet) and found.use_label:
        said += f" Given label: {view.label}."
    return said


def _title(name: str, found: ClosedForm | MentorNet) -> str:
    if isinstance(found, MentorNet):
        return f"{name} (MentorNet)"
    symbols = {"lambda1": "λ1", "lambda2": "λ2", "gamma": "γ"}
    values = [f"{symbols[p]} = {getattr(found, p):g}" for p in _PARAMETERS.get(found.kind, ())]
    return f"{name} ({', '.join(values)})" if values else name


def picture(name: str, found: ClosedForm | MentorNet, view: View) -> bytes:
    """A PNG with a heat map for each point of training, side by side.

    Args:
        name: of the curriculum.
        found: the curriculum.
        view: what of it.
    """
    surfaces = _surfaces(found, view)
    title, caption = _title(name, found), _caption(found, view)
    paint = partial(
        paint_row, surfaces=surfaces, losses=view.losses, differences=view.differences,
        title=title, caption=caption, numbers=view.numbers,
    )  # fmt: skip
    alt = " ".join(_alt(surface, view) for surface in surfaces)
    about = {"Title": title, "Description": f"{alt} {caption}"}
    size = (1.9 + 2.5 * len(surfaces), 3.2)
    return rendered(paint, size, metadata=about, format="png", dpi=200)


def page(name: str, found: ClosedForm | MentorNet, view: View) -> bytes:
    """An HTML page with a heat map for each point of training, and what is known of the curriculum.

    Args:
        name: of the curriculum.
        found: the curriculum.
        view: what of it.
    """
    axes_of = view.losses, view.differences

    def paint(surface: Surface, axes: Any) -> None:
        paint_weights(axes, surface.weight, *axes_of, numbers=view.numbers)
        paint_bound(axes, view.losses)

    pictures = [
        draw(f"Weight {surface.title}", _alt(surface, view), partial(paint, surface), (3.8, 3.0))
        for surface in _surfaces(found, view)
    ]
    html = render(
        "show.html.jinja",
        name=name,
        title=_title(name, found),
        caption=_caption(found, view),
        pictures=pictures,
        facts=facts(found),
    )
    return html.encode()


def facts(found: ClosedForm | MentorNet) -> dict[str, str]:
    """Parameters of a closed form; what a MentorNet was learnt from, and how well it fits.

    Args:
        found: the curriculum.
    """
    if isinstance(found, ClosedForm):
        parameters = {name: getattr(found, name) for name in _PARAMETERS.get(found.kind, ())}
        return {"kind": f"closed form {found.kind}", **_flat(parameters)}
    units = found.weights().lstm_units
    encoder = f"bi-LSTM of {units} a direction" if units else "no LSTM"
    return {
        "kind": "MentorNet",
        "architecture": f"{encoder}, {found.fc1.out_features} {found.activation} units",
        "reads the label": "yes" if found.use_label else "no",
        **_flat(found.card),
    }


def _flat(card: Mapping[str, object], within: str = "") -> dict[str, str]:
    """Nested values as text, each under its whole name."""
    found: dict[str, str] = {}
    for key, value in card.items():
        name = f"{within}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}: ")
        elif isinstance(value, bool):
            found[name] = "yes" if value else "no"
        elif isinstance(value, int):
            found[name] = f"{value:,}"
        else:
            found[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return found


def _surfaces(found: ClosedForm | MentorNet, view: View) -> list[Surface]:
    return surfaces_at(
        found if isinstance(found, ClosedForm) else found.weights(),
        view.epochs,
        history_steps=view.history_steps,
        losses=view.losses,
        differences=view.differences,
        label=view.label,
    )


def _alt(surface: Surface, view: View) -> str:
    weight = surface.weight
    low, high = view.diff_range
    return (
        f"Heat map of the weight {surface.title} over loss (0 to {view.loss_max:g} nats) and loss "
        f"difference ({low:g} to {high:g} nats): from {float(weight.min()):.2f} to "
        f"{float(weight.max()):.2f}, {float(weight.mean()):.2f} on average."
    )
