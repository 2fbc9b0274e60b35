"""Options of a run that texts name are there, spelled as the command line spells them.

`test_quickstart.py` looks at commands; here it is pages' prose, and what the package itself tells
people to type, in its messages and docstrings.
"""

import re
from pathlib import Path

import pytest

from .pages import ROOT, markdown
from .test_quickstart import help_of

_PARTS = "data|student|curriculum|optim|train|parallel"
_OPTION = re.compile(rf"(?<![\w-])--((?:no-)?(?:{_PARTS})\.[a-z][\w-]*)")
_LEAST = 30  # options named; there are some more, and a pattern that finds none would pass


def texts() -> list[Path]:
    """Pages, and the sources whose messages people read; the changelog names what is gone."""
    sources = [path for part in ("engine", "recipes") for path in (ROOT / part).rglob("*.py")]
    return sorted([*(page for page in markdown() if page.name != "CHANGELOG.md"), *sources])


def options(text: str) -> set[str]:
    return set(_OPTION.findall(text))


@pytest.fixture
def known(monkeypatch, capsys) -> set[str]:
    """All options of a run, as a recipe's --help has them."""
    return options(help_of(["recipes/webvision_irv2.py"], monkeypatch, capsys))


def test_options_that_texts_name_exist(known):
    named = {(path, o) for path in texts() for o in options(path.read_text(encoding="utf-8"))}
    assert len({option for _, option in named}) > _LEAST
    wrong = {f"{path.relative_to(ROOT)}: --{o}" for path, o in named if o not in known}
    assert wrong == set()


@pytest.mark.parametrize("text", ["`--no-train.ledger` goes without", "with --no-train.pictures."])
def test_a_wrong_spelling_is_seen(text, known):
    """tyro's is --train.no-ledger."""
    (found,) = options(text)
    part, name = found.removeprefix("no-").split(".")
    assert found not in known
    assert f"{part}.no-{name}" in known
