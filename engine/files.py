"""Files that are whole at any time."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that whoever reads it, whenever, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
