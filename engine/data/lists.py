"""Reads "path label" lists of millions of lines as Arrow columns, and says which line is wrong.

Nothing here loops over lines in Python unless there is an error to describe.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mentorch.engine.data.index import escapes_root

_LABEL = r"^[0-9]{1,9}$"


@dataclass
class ImageList:
    """One list file.

    Attributes:
        file: where it was read from.
        paths: Arrow strings without "./" and "//", [N].
        labels: int32 [N].
        lines: line number in the file, from 1, int32 [N]; empty lines do not count as entries.
    """

    file: Path
    paths: pa.Array
    labels: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.file}, line {self.lines[row]}"


def read_lines(file: Path) -> pa.Array:
    """The lines of a UTF-8 text file, as Arrow strings."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line} is not UTF-8 text: {data[error.start : error.start + 16]!r}"
        ) from None
    del data
    lines = pc.split_pattern(pa.array([text.rstrip("\n")], pa.large_string()), pattern="\n")
    return lines.flatten().cast(pa.string())


def read_image_list(file: Path, num_classes: int) -> ImageList:
    """Reads lines "path label" (the path may hold spaces; labels count from 0).

    Raises:
        ValueError: naming file and line: a line that is not "path label", a path that leaves the
            data set's folder, a label that is not a class; or no line at all.
    """
    text = pc.ascii_trim_whitespace(read_lines(file))
    entry = pc.not_equal(pc.binary_length(text), 0)
    lines = (np.flatnonzero(entry.to_numpy(zero_copy_only=False)) + 1).astype(np.int32)
    text = text.filter(entry)
    if not len(text):
        raise ValueError(f"{file} is empty; it should have a line 'path label' for each image")
    words = pc.ascii_split_whitespace(text, max_splits=1, reverse=True)
    _require_readable(file, lines, text, pc.equal(pc.list_value_length(words), 2))
    label = pc.list_element(words, 1)
    _require_readable(file, lines, text, pc.match_substring_regex(label, _LABEL))
    paths = normalised(pc.list_element(words, 0))
    result = ImageList(file, paths, label.cast(pa.int32()).to_numpy(), lines)
    _check(result, num_classes)
    return result


def _require_readable(
    file: Path, lines: npt.NDArray[np.int32], text: pa.Array, readable: pa.Array
) -> None:
    row = readable.index(False).as_py()
    if row >= 0:
        raise ValueError(
            f"{file}, line {lines[row]}: {text[row].as_py()[:200]!r} is not 'path label' "
            "with a label from 0 up"
        )


def normalised(paths: pa.Array) -> pa.Array:
    """The paths without "./" and doubled slashes, so that one file has one name."""
    if not pc.any(pc.match_substring_regex(paths, r"(^|/)\./|//")).as_py():
        return paths
    paths = pc.replace_substring_regex(paths, r"/{2,}", "/")
    return pc.replace_substring_regex(paths, r"(^|/)(\./)+", r"\1")


def check_duplicates(lists: list[ImageList]) -> None:
    """Raises a ValueError when a path stands twice, in one list or in two.

    Paths are compared as they stand in the index, so after a common prefix was put before them.
    """
    paths = pa.concat_arrays([entries.paths for entries in lists])
    if pc.count_distinct(paths).as_py() == len(paths):
        return
    seen: dict[str, str] = {}
    for entries in lists:
        for row, path in enumerate(entries.paths.to_pylist()):
            if path in seen:
                raise ValueError(
                    f"{entries.where(row)}: {path!r} was listed before, in {seen[path]}; "
                    "an image may stand in the lists only once"
                )
            seen[path] = entries.where(row)
    raise AssertionError("count_distinct and the dictionary disagree")


def _check(entries: ImageList, num_classes: int) -> None:
    outside = escapes_root(entries.paths)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"{entries.where(row)}: the path {entries.paths[row].as_py()!r} leaves the data set's "
            "folder; paths must be relative to it and go without '..'"
        )
    too_large = entries.labels >= num_classes
    if too_large.any():
        row = int(too_large.argmax())
        raise ValueError(
            f"{entries.where(row)}: label {entries.labels[row]} is out of range, there are "
            f"{num_classes} classes (labels 0 to {num_classes - 1})"
        )
