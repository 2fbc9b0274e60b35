"""Drawings as SVG inside the page: matplotlib, in the colours of a light or a dark screen."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

# Told apart without seeing red or green, and seen on light and dark cards (tests/…/test_colors.py).
BLUE, ORANGE, PURPLE, BROWN, GREY = "#1f78c1", "#d55e00", "#7c40ff", "#9d7551", "#7d838c"
CYCLE = (BLUE, ORANGE, PURPLE, BROWN, GREY)
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))  # and in black and white

_INK, _INK_IN_THE_DARK = "#24292f", "#d5dae1"
_GRID, _GRID_IN_THE_DARK = "#d8dee4", "#3a414a"
_LOOKS: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: small files, and the reader's own font
    "svg.hashsalt": "mentorch",  # the same report gives the same bytes
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=CYCLE) + cycler(linestyle=DASHES),
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """A drawing on the page.

    Attributes:
        title: above it.
        alt: what it shows, for those who cannot see it.
        uri: ``data:`` URI of the SVG.
    """

    title: str
    alt: str
    uri: str


def draw(
    title: str, alt: str, paint: Callable[[Any], None], size: tuple[float, float] = (4.6, 3.0)
) -> Picture:
    """A drawing of one set of axes.

    Args:
        title: above it.
        alt: what it shows.
        paint: draws on the matplotlib axes it is given.
        size: width and height, inches.
    """
    svg = rendered(
        lambda figure: paint(figure.add_subplot()), size, format="svg", transparent=True
    ).decode()  # fmt: skip
    svg = svg.replace("</svg>", f"{_dark_style()}</svg>")
    return Picture(
        title, alt, "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    )


def rendered(
    paint: Callable[[Figure], None],
    size: tuple[float, float],
    *,
    metadata: Mapping[str, str | None] | None = None,
    **options: Any,
) -> bytes:
    """A figure as a file's bytes.

    Args:
        paint: draws on the matplotlib figure it is given.
        size: width and height, inches.
        metadata: to be written into the file.
        options: of matplotlib's ``savefig``: format, dpi and others.
    """
    buffer = io.BytesIO()
    # No date and no version: the same picture has the same bytes.
    own = ("Software",) if options["format"] == "png" else ("Date", "Creator")
    with mpl.rc_context(_LOOKS):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, metadata=dict.fromkeys(own) | dict(metadata or {}), **options)
    return buffer.getvalue()


def _dark_style() -> str:
    """matplotlib writes colours into style attributes; this swaps two of them on dark screens."""
    rules = [
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in ((_INK, _INK_IN_THE_DARK), (_GRID, _GRID_IN_THE_DARK))
        for what in ("fill", "stroke")
    ]
    return f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
