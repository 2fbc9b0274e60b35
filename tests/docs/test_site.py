"""The site's own extensions (docs/_ext), with docs/conf.py, on a small site built for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from .pages import DOCS

_GOOD = """# A page

[The code](../kernels/tiny.py), [the folder](../kernels),
[a heading](other.md#a-heading), [a file](data.csv)

```{toctree}
other
```
"""
_OTHER = """# Other

## A heading

```{eval-rst}
.. automodule:: tiny
   :members: f, Config
```
"""
_MODULE = '''"""A module about `f`.

    f(x) = x *2    a formula * with stars

`json` is a module, `mentorch report` a command, `Config.least` a field.
"""

from dataclasses import dataclass


def f(x: int) -> int:
    """Nothing.

    Args:
        x: any, of `f`.

    Raises:
        ValueError: never.
    """
    return x


@dataclass
class Config:
    """Numbers."""

    least: float = 0.5
    """λ, nats: where it starts."""
'''


def site(folder: Path, page: str, module: str) -> Path:
    """A repository with docs/ and kernels/; returns docs/."""
    for name in ("docs", "kernels"):
        (folder / name).mkdir()
    (folder / "kernels" / "tiny.py").write_text(module, encoding="utf-8")
    (folder / "docs" / "index.md").write_text(page, encoding="utf-8")
    (folder / "docs" / "other.md").write_text(_OTHER, encoding="utf-8")
    (folder / "docs" / "data.csv").write_text("a,b\n")
    return folder / "docs"


def build(docs: Path) -> subprocess.CompletedProcess[str]:
    """What .ci/run does, with the real conf.py and another source folder."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n"]
    return subprocess.run(
        [*command, "-c", str(DOCS), str(docs), str(docs / "_build")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(docs.parent / "kernels")},
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    docs = site(tmp_path_factory.mktemp("good"), _GOOD, _MODULE)
    done = build(docs)
    assert done.returncode == 0, done.stderr
    return docs / "_build"


def test_a_file_of_the_repository_has_a_page(good):
    assert 'href="repository/kernels/tiny.py.html"' in (good / "index.html").read_text()
    shown = (good / "repository/kernels/tiny.py.html").read_text()
    assert "a formula" in shown
    assert 'class="highlight' in shown


def test_a_folder_of_the_repository_is_listed(good):
    assert 'href="repository/kernels.html"' in (good / "index.html").read_text()
    assert "tiny.py" in (good / "repository/kernels.html").read_text()


def test_headings_and_files_of_the_docs_are_links(good):
    page = (good / "index.html").read_text()
    assert 'href="other.html#a-heading"' in page
    assert "data.csv" in page


def test_formulas_stay_as_they_are(good):
    assert "f(x) = x *2    a formula * with stars" in (good / "other.html").read_text()


def test_names_lead_to_their_entries(good):
    page = (good / "other.html").read_text()
    assert page.count('href="#tiny.f"') >= 2  # in the module's text and in f's own
    assert "report</span></code>" in page  # no link, and no complaint


def test_a_fields_text_is_not_taken_for_its_type(good):
    assert "λ, nats: where it starts." in (good / "other.html").read_text()


def test_what_is_broken_fails_the_build(tmp_path):
    """A file, a page, a heading, a picture and a name that are not there: each is complained of."""
    page = _GOOD + "\n".join(
        f"\n{link}\n"
        for link in (
            "[x](../kernels/gone.py)",
            "[x](no_page.md)",
            "[x](other.md#no-heading)",
            "![x](gone.png)",
        )
    )
    done = build(site(tmp_path, page, _MODULE.replace("of `f`", "of `no_such_name`")))
    assert done.returncode != 0
    for broken in ("gone.py", "no_page", "no-heading", "gone.png", "no_such_name"):
        assert broken in done.stderr, broken
