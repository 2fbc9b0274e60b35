"""Colours: read in light and dark, told apart by those who do not see red or green."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from mentorch.engine.report import drawing, templates

CSS = (Path(templates.__file__).parent / "look.css.jinja").read_text(encoding="utf-8")

# Machado et al. 2009, of the whole severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]],
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
}  # fmt: skip
XYZ = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]


def scheme(number):
    """The page's colours: 0 for light, 1 for dark, 2 for print."""
    rule = re.findall(r":root \{(.*?)\}", CSS)[number]
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", rule))
    return {name: c if len(c) == 7 else "#" + 2 * c[1:] for name, c in found.items()}


def linear(color):
    c = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG's ratio of luminances, 1 to 21."""
    dark, light = sorted(linear(c) @ np.array([0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def difference(one, other, sight):
    """CIE76's ΔE of what is seen; 2 to 3 is just noticed."""

    def lab(color):
        seen = np.clip(np.array(SIGHT[sight]) @ linear(color), 0, 1)
        t = np.array(XYZ) @ seen / np.array([0.9505, 1.0, 1.0888])
        x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
        return np.array([116 * y, 500 * (x - y), 200 * (y - z)])

    return np.linalg.norm(lab(one) - lab(other))


def test_contrast_of_known_colors():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_is_read(number):
    """WCAG AA: 4.5. `soft` also stands on `line`, where there is no picture of a sample."""
    colors = scheme(number)
    pairs = [(ink, "paper") for ink in ("ink", "soft", "bad", "good")]
    pairs += [(ink, "card") for ink in ("ink", "soft", "bad", "good")] + [("soft", "line")]
    assert {pair for pair in pairs if contrast(*(colors[name] for name in pair)) < 4.5} == set()


@pytest.mark.parametrize("number", [0, 1, 2], ids=["light", "dark", "print"])
def test_lines_are_seen(number):
    """WCAG asks 3 of graphics."""
    card = scheme(number)["card"]
    assert all(contrast(color, card) >= 3 for color in drawing.CYCLE)


@pytest.mark.parametrize("sight", SIGHT)
def test_lines_are_told_apart(sight):
    for one, other in itertools.combinations(drawing.CYCLE, 2):
        assert difference(one, other, sight) > 20, (one, other)


def test_figures_follow_the_pages_scheme():
    """The ink of axes and text is swapped on dark screens, for one that is read on dark cards."""
    style = drawing._dark_style()
    assert "prefers-color-scheme: dark" in style
    assert contrast(drawing._INK, scheme(0)["card"]) >= 4.5
    assert contrast(drawing._INK_IN_THE_DARK, scheme(1)["card"]) >= 4.5


def test_print_and_narrow_screens_are_thought_of():
    assert "@media print" in CSS
    assert "size: A4" in CSS
    assert "break-inside: avoid" in CSS
    assert re.search(r"@media \(max-width: \d+rem\)", CSS)
