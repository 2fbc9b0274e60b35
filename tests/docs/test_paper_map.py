"""docs/paper_map.md: every file is there and defines the names beside it; nothing is left out."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from mentorch.engine.config import RunConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "paper_map.md").read_text(encoding="utf-8")
EQUATIONS, LINES, TABLES, FIGURES = 12, 15, 5, 4  # in the paper
_LINK = re.compile(r"\[([^]]+)\]\(\.\./([^)#]+\.py)\)")
_NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
_OPTION = re.compile(r"`((?:curriculum|optim|train|data|student)\.\w+)`")


def claims() -> list[tuple[str, str]]:
    """(file, name) for every name in a cell that follows a link to a file."""
    found = []
    for line in PAGE.splitlines():
        for cell in line.split("|") if line.startswith("|") else []:
            links = list(_LINK.finditer(cell))
            ends = [*(link.start() for link in links[1:]), len(cell)]
            for link, end in zip(links, ends, strict=False):  # no link: the cell's end alone
                names = _NAME.findall(_OPTION.sub("", cell[link.end() : end]))
                found += [(link[2], name) for name in names]
    return found


@cache
def defined(path: str) -> set[str]:
    """Names that a file defines at its top, and as Class.name those in its classes: methods,
    fields, arguments of ``__init__``."""
    tree = ast.parse((DOCS.parent / path).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        names |= _names(node)
        if isinstance(node, ast.ClassDef):
            inner = {name for statement in node.body for name in _names(statement)}
            inner |= {name for statement in node.body for name in _arguments(statement)}
            names |= {f"{node.name}.{name}" for name in inner}
    return names


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _arguments(node: ast.stmt) -> set[str]:
    if not isinstance(node, ast.FunctionDef) or node.name != "__init__":
        return set()
    return {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}


@pytest.mark.parametrize(("path", "name"), sorted(set(claims())))
def test_the_file_defines_the_name(path, name):
    assert name in defined(path)


def test_enough_is_claimed():
    """Against a pattern that no longer finds the claims: there are more than rows of the paper."""
    assert len(claims()) > EQUATIONS + LINES + TABLES + FIGURES


@pytest.mark.parametrize(
    ("row", "last"),
    [("Eq. {}", EQUATIONS), ("{}", LINES), ("Table {}", TABLES), ("Fig. {}", FIGURES)],
)
def test_everything_of_the_paper_has_a_row(row, last):
    rows = {line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("|")}
    assert {row.format(number) for number in range(1, last + 1)} <= rows
    assert row.format(last + 1) not in rows


def test_the_link_says_where_it_leads():
    for text, path in _LINK.findall(PAGE):
        assert text in (path, "a test", "A test", "its test")


def test_every_option_is_one_of_a_run():
    options = _OPTION.findall(PAGE)
    assert len(options) > 5
    for option in options:
        part, name = option.split(".")
        assert hasattr(getattr(RunConfig(), part), name), option
