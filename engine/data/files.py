"""Lists image files below folders, in a fixed order and with what was ignored."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)


@dataclass
class Ignored:
    """Files that were not taken for images, by suffix, and those whose name is not UTF-8."""

    suffixes: Counter[str] = field(default_factory=Counter)
    not_utf8: list[str] = field(default_factory=list)

    def print(self) -> None:
        """Says what was ignored, if anything was."""
        if self.suffixes:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.suffixes.items()))
            print(f"ignored files that are not images by their name: {kinds}")
        if self.not_utf8:
            print(f"ignored {len(self.not_utf8):,} names that are not UTF-8: {self.not_utf8[0]}, …")


def folders_in(folder: Path) -> list[str]:
    """The sorted names of the folders (or links to such) in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return sorted(name for name in names if _is_utf8(name))


def images_below(folder: Path, ignored: Ignored, *, recursive: bool = True) -> list[str]:
    """The sorted paths of the images below a folder, relative to it, with "/" between names.

    Links to folders are followed, except those that lead back to a folder above them.
    """
    found: list[str] = []
    _walk(folder, "", (), recursive, found, ignored)
    return sorted(found)


def _walk(
    folder: Path,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    recursive: bool,
    found: list[str],
    ignored: Ignored,
) -> None:
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_utf8(entry.name):
                ignored.not_utf8.append(ascii(prefix + entry.name))
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append(prefix + entry.name)  # also a folder or a broken link named like one
            elif not entry.is_dir():
                ignored.suffixes[Path(entry.name).suffix or "without a suffix"] += 1
            elif recursive:
                chain = (*above, (here.st_dev, here.st_ino))
                _walk(Path(entry.path), f"{prefix}{entry.name}/", chain, recursive, found, ignored)


def _is_utf8(name: str) -> bool:
    return not any("\udc80" <= c <= "\udcff" for c in name)
