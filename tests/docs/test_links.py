"""Links in every Markdown file: files and headings exist, and external ones are well formed."""

import re
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from .pages import DOCS, ROOT, markdown, without_code

_LINK = re.compile(r"(?<!`)\[(?:[^][]|\[[^]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)")
_OF_THE_SITE = {"_build", "_ext", "_static"}


def links(page: Path) -> list[str]:
    return _LINK.findall(without_code(page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The names GitHub gives to headings; an equal one gets a number."""
    found, seen = set(), Counter()
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def problem(page: Path, link: str) -> str | None:
    """What is wrong with a link of a page."""
    parts = urlsplit(link)
    if parts.scheme:
        good = parts.scheme == "https" and "." in parts.netloc and " " not in unquote(link)
        return None if good else "an external link is https://host.domain/…"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    if not target.exists():
        return "leads nowhere"
    if parts.fragment and parts.fragment not in anchors(target):
        return f"no such heading; there are {sorted(anchors(target))}"
    return None


@pytest.mark.parametrize("page", markdown(), ids=lambda page: str(page.relative_to(ROOT)))
def test_all_links_of_a_page(page):
    found = {link: problem(page, link) for link in links(page)}
    assert {link: why for link, why in found.items() if why} == {}


def test_links_are_found():
    """Against a pattern that finds none: this page has one to each of the others."""
    assert {"quickstart.md", "limits.md", "api/loss.md"} <= set(links(DOCS / "index.md"))


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("no_such_page.md", "nowhere"),
        ("limits.md#no-such-heading", "no such heading"),
        ("../kernels/no_such_file.py", "nowhere"),
        ("../../elsewhere.md", "out of the repository"),
        ("http://example.org", "https"),
        ("https://nowhere", "https"),
    ],
)
def test_what_is_wrong_is_said(link, why):
    assert why in str(problem(DOCS / "index.md", link))


@pytest.mark.parametrize(
    "link", ["limits.md#never-measured", "../kernels/reweight.py", "../kernels", "api/loss.md"]
)
def test_what_is_right_is_not_complained_about(link):
    assert problem(DOCS / "index.md", link) is None


def test_every_page_is_in_the_table_of_contents():
    contents = re.findall(
        r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.M | re.S
    )
    listed = {line for block in contents for line in block.splitlines()}
    pages = {p.relative_to(DOCS) for p in DOCS.rglob("*.md") if not _OF_THE_SITE & set(p.parts)}
    names = {str(page.with_suffix("")) for page in pages} - {"index"}
    assert {name for name in names if not any(fnmatch(name, line) for line in listed)} == set()
