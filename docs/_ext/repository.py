"""Links from pages to files of the repository, such as `[rows.py](../kernels/rows.py)`.

GitHub follows them. On the site such a link leads to a page that shows the file, or lists the
folder. A file that stands in ``repository_pages`` has a page of its own. What is not there stays
for Sphinx to complain about.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_FOLDER = "repository"  # of the site
_LARGEST = 200_000  # bytes of a file that is shown
_LINKS = (addnodes.download_reference, addnodes.pending_xref)

Page = tuple[str, dict[str, Any], str]


def _root(app: Sphinx) -> Path:
    return Path(app.srcdir).parent.resolve()


def _shown(app: Sphinx) -> dict[str, list[str]]:
    """Page → files and folders it links to; kept from one build to the next."""
    env: Any = app.env
    if not hasattr(env, "repository_files"):
        env.repository_files = {}
    files: dict[str, list[str]] = env.repository_files
    return files


class RepositoryLinks(SphinxTransform):
    """Turns links to files outside docs/ into links to their pages on the site."""

    default_priority = 200

    def apply(self, **_arguments: object) -> None:
        """Looks at every link of a page, after it was read."""
        found = []
        for node in list(self.document.findall(lambda node: isinstance(node, _LINKS))):
            path = self._path(node)
            if path is not None:
                found.append(path)
                node.replace_self(self._link(node, path))
        _shown(self.app)[self.env.docname] = found

    def _path(self, node: nodes.Element) -> str | None:
        """What it leads to, relative to the repository's root; None if that is not our concern."""
        if node.get("reftype") != "myst" or "://" in node["reftarget"]:
            return None
        target = node["reftarget"].split("#")[0]
        here = Path(self.env.doc2path(self.env.docname)).parent
        if node.get("refdomain") == "doc":  # a page, its path without .md
            here, target = Path("/"), f"{target}.md"
        path = (here / target).resolve()
        if not target or path.is_relative_to(Path(self.app.srcdir).resolve()):
            return None
        root = _root(self.app)
        return str(path.relative_to(root)) if path.is_relative_to(root) and path.exists() else None

    def _link(self, node: nodes.Element, path: str) -> nodes.Element:
        page = self.config.repository_pages.get(path, f"{_FOLDER}/{path}")
        uri = self.app.builder.get_relative_uri(self.env.docname, page)
        return nodes.reference("", "", *node.children, refuri=uri, internal=True)


def _forget(app: Sphinx, _env: object, docname: str) -> None:
    _shown(app).pop(docname, None)


def pages(app: Sphinx) -> Iterator[Page]:
    """The pages of all files and folders that are linked to."""
    wanted = {path for paths in _shown(app).values() for path in paths}
    for path in sorted(wanted - set(app.config.repository_pages)):
        full = _root(app) / path
        body = _listing(full) if full.is_dir() else _source(app, full)
        title = escape(path)
        yield f"{_FOLDER}/{path}", {"title": title, "body": f"<h1>{title}</h1>{body}"}, "page.html"


def _listing(folder: Path) -> str:
    names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir())
    shown = [n for n in names if not n.startswith((".", "__pycache__"))]
    return "<ul>" + "".join(f"<li><code>{escape(name)}</code></li>" for name in shown) + "</ul>"


def _source(app: Sphinx, path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if len(text) > _LARGEST:
        raise ValueError(f"{path} is too large to be shown on the site ({len(text):,} characters)")
    highlighter: Any = app.builder.highlighter  # type: ignore[attr-defined]
    return str(highlighter.highlight_block(text, _language(path), linenos=False, location=path))


def _language(path: Path) -> str:
    try:
        return get_lexer_for_filename(path.name).aliases[0]
    except ClassNotFound:  # scripts without a suffix
        return "bash"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_config_value("repository_pages", {}, "env")
    app.add_transform(RepositoryLinks)
    app.connect("env-purge-doc", _forget)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
