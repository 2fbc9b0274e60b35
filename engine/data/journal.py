"""What is already known about images: from an interrupted run's journal or an earlier index."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mentorch.engine.data.index import Index
from mentorch.engine.data.probe import Probe

_FIELDS = ("path", "bytes", "width", "height")


@dataclass
class Known:
    """Earlier "ok" results for N paths.

    Attributes:
        bytes: file sizes, int64 [N]; -1 where nothing is known.
        width: int32 [N].
        height: int32 [N].
    """

    bytes: npt.NDArray[np.int64]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]

    def get(self, row: int) -> Probe | None:
        """The earlier result of a row, if there is one."""
        if self.bytes[row] < 0:
            return None
        size, width, height = (int(a[row]) for a in (self.bytes, self.width, self.height))
        return Probe("ok", size, width, height, "")

    def __len__(self) -> int:
        return int((self.bytes >= 0).sum())


def known_from(ok: pa.Table, paths: pa.Array | pa.ChunkedArray) -> Known:
    """Lines earlier results (path, bytes, width, height) up with the paths asked for now."""
    at = pc.index_in(paths, value_set=ok["path"].combine_chunks())

    def take(name: str, unknown: int) -> npt.NDArray[Any]:
        return np.asarray(pc.fill_null(ok[name].take(at), unknown).to_numpy())

    return Known(take("bytes", -1), take("width", 0), take("height", 0))


def ok_rows(index: Index) -> pa.Table:
    """The "ok" rows of an index as (path, bytes, width, height)."""
    return index.table.filter(pc.equal(index.table["status"], "ok")).select(list(_FIELDS))


class Journal:
    """The "ok" results of a run that is not finished, a line of JSON a chunk.

    Only good results are kept: a file that was missing or broken may have been repaired since.
    """

    def __init__(self, path: Path, root: Path, *, reverify: bool = False) -> None:
        self.path = path
        self._header = {"mentorch_journal": 1, "root": str(root), "reverify": reverify}
        self._file: TextIOWrapper | None = None

    def read(self) -> pa.Table:
        """All results noted so far; an unfinished last line does not count."""
        columns: dict[str, list[pa.Array]] = {name: [] for name in _FIELDS}
        for line in self._lines():
            columns["path"].append(pa.array(line["path"], pa.string()))
            columns["bytes"].append(pa.array(line["bytes"], pa.int64()))
            columns["width"].append(pa.array(line["width"], pa.int32()))
            columns["height"].append(pa.array(line["height"], pa.int32()))
        types = (pa.string(), pa.int64(), pa.int32(), pa.int32())
        arrays = [pa.chunked_array(columns[n], t) for n, t in zip(_FIELDS, types, strict=True)]
        return pa.table(arrays, names=list(_FIELDS))

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines after the header; none when the file is not there or of another data set."""
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            lines = filter(None, map(_from_json, file))
            if next(lines, None) == self._header:
                yield from lines

    def open(self) -> None:
        """Makes ready to append; a journal of something else is started afresh."""
        fresh = next(self._lines(), None) is None
        self._file = self.path.open("w" if fresh else "a", encoding="utf-8")
        if fresh:
            self._write(self._header)

    def append(self, paths: Sequence[str], probes: Sequence[Probe]) -> None:
        """Notes the good ones among some results."""
        good = [
            (p, *probe[1:4]) for p, probe in zip(paths, probes, strict=True) if not probe.reason
        ]
        if good:
            self._write(dict(zip(_FIELDS, zip(*good, strict=True), strict=True)))

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(
            "\n" + json.dumps(line)
        )  # the newline first: it ends a torn line before it
        self._file.flush()

    def close(self) -> None:
        """Closes the file and leaves it for the next run."""
        if self._file is not None:
            self._file.close()


def _from_json(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # the run was killed while it wrote this line
        return None
    return line if isinstance(line, dict) else None
