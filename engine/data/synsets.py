"""Class lists: a line a class, "n01440764 tench, Tinca tinca"; the line number is the label."""

from pathlib import Path

from mentorch.engine.data.lists import read_lines


def read_synsets(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class ids and names by label; a class without a name is named by its id.

    Raises:
        ValueError: naming file and line: an empty line between classes, or a class listed twice.
    """
    ids: dict[str, str] = {}
    lines = [line.strip() for line in read_lines(file).to_pylist()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{file} is empty; it should have a line 'wnid names' for each class")
    for number, line in enumerate(lines, 1):
        wnid, _, names = line.partition(" ")
        if not wnid or wnid in ids:
            problem = f"{wnid} stands there twice" if wnid else "the line is empty"
            raise ValueError(f"{file}, line {number}: {problem}; the line number is the label")
        ids[wnid] = names.strip() or wnid
    return tuple(ids), tuple(ids.values())
