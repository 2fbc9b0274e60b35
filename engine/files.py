"""Files that are whole at any time."""

import os
from pathlib import Path


def whole_lines(path: Path) -> tuple[list[str], str]:
    """A text file's lines, and what there is of one that a kill has cut or that is being written.

    ``str.splitlines`` would cut lines at U+2028 too, which JSON leaves in its strings.
    """
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    return lines, torn


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that whoever reads it, whenever, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
