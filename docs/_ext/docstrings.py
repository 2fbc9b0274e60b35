"""Reads our docstrings as they are meant: indented blocks are formulas, `names` are looked up."""

import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_SECTION = re.compile(r"(Args|Attributes|Example|Returns|Raises|Yields):$")
_NAME = re.compile(r"[A-Za-z_][\w.]*$")
_CONFIGS = "mentorch.engine.config"


def literal_blocks(lines: list[str]) -> list[str]:
    """Marks indented blocks, which hold formulas and code, as literal.

    Args:
        lines: of a docstring.

    Returns:
        The same with ``::`` before every block that is indented and not of a section.
    """
    found: list[str] = []
    in_section = in_block = False
    for at, line in enumerate(lines):
        indented = line.startswith("    ")
        if line and not indented:
            in_section, in_block = bool(_SECTION.match(line)), False
        elif indented and not in_section and not in_block:
            in_block = True
            before = lines[at - 1].strip() if at else ""
            found += [] if before.endswith("::") else ["", "::", ""]
        found.append(line)
    return found


def _on_docstring(
    _app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    if lines and lines[0].startswith("Alias for field number"):  # Python's own, of named tuples
        lines[:] = [_comment(name), ""]
    # Napoleon takes the "λ1, nats" of "λ1, nats: where …" for a field's type, unless the first
    # line is another one; a backslash at a line's end is nothing.
    lines[:] = [*(["\\"] if what == "attribute" else []), *literal_blocks(lines)]


def _comment(field: str) -> str:
    """The comment behind a named tuple's field, which is where ours are explained."""
    owner, _, name = field.rpartition(".")
    source = inspect.getsource(_imported(owner))
    found = re.search(rf"^    {name}: [^#\n]*# (.+)$", source, re.MULTILINE)
    return found[1].replace("*", "\\*") if found else ""


def _on_signature(
    _app: Sphinx, what: str, name: str, documented: Any, *_rest: object
) -> tuple[str, None] | None:
    """A configuration has dozens of arguments, which are its fields: they follow one by one."""
    if what == "class" and name.startswith(_CONFIGS) and is_dataclass(documented):
        return "", None
    return None


def _here(name: str, module: str | None, of_class: str | None) -> list[Any]:
    """What Python finds under a name, from where it was written."""
    folder = (module or "").rpartition(".")[0]  # a file speaks of those beside it
    places = ["builtins", module, f"{module}.{of_class}", folder]
    if name.startswith("nn."):
        places = ["torch"]
    found = (_imported(text) for text in [name, *(f"{p}.{name}" for p in places if p)])
    return [thing for thing in found if thing is not None]


def _imported(dotted: str) -> Any:
    """The module, or the thing in one; None where there is no such thing."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for name in parts[split:]:
            thing = getattr(found, name, None)
            if thing is None:  # a field may have no value
                thing = getattr(found, "__annotations__", {}).get(name)
            found = thing
        return found
    return None


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """A name that has no entry where it was looked for: an entry elsewhere, or no link.

    Returns:
        None where Python finds no such name either: Sphinx then complains.
    """
    if node.get("refdomain") != "py":
        return None
    target, module, of_class = node["reftarget"], node.get("py:module"), node.get("py:class")
    if not _NAME.match(target):  # `a command line`
        return content
    domain: Any = env.get_domain("py")
    here = _here(target, module, of_class)
    entries = dict(domain.find_obj(env, module, of_class, target, None, 1))
    if here:  # an entry of the same name may be another thing
        entries = {n: entry for n, entry in entries.items() if any(_imported(n) is h for h in here)}
    if len(entries) == 1:
        name, entry = next(iter(entries.items()))
        uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
        return nodes.reference("", "", content, refuri=f"{uri}#{entry.node_id}", reftitle=name)
    return content if here else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _on_signature)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
