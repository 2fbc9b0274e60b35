"""What the tests of the documentation share: the repository, and its Markdown."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def markdown() -> list[Path]:
    """All pages that people read, on the site or on GitHub."""
    pages = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]
    return sorted([*ROOT.glob("*.md"), *pages, *ROOT.glob("recipes/**/*.md")])


def without_code(text: str) -> str:
    """Markdown without its code blocks and comments; code in a line stays."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def code_blocks(page: Path, language: str) -> Iterator[str]:
    """The code blocks of a page in a language."""
    for found, code in _FENCE.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield code
