"""Where the bytes of images come from. Reading never fails: what is no image gives a reason.

A reader is asked by sample id from many threads at once.
"""

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mentorch.engine.data.index import Index
from mentorch.engine.data.probe import has_jpeg_end, sniff_format, unfit, what_it_is

Bytes = NDArray[np.uint8]

TAR_BLOCK = 512  # bytes; a header fills one, and members begin at multiples of it

_AHEAD_BLOCK = 4 << 20  # bytes asked of storage at once
_AHEAD_SECONDS = 30.0  # what was asked for this long ago may have left the page cache
_MAX_OPEN = 128  # shards; a process may commonly have 1,024 files


class Reader(Protocol):
    """Bytes by sample id."""

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image, or why there is none."""


def checked(data: bytes) -> Bytes | str:
    """Encoded bytes as an array if they may be an image, by their magic bytes and end marker."""
    kind = sniff_format(data[:32])
    if kind is None:
        return what_it_is(data) if data else "empty file"
    if kind == "JPEG" and not has_jpeg_end(data):
        return "truncated: a JPEG without its end marker"
    return np.frombuffer(data, np.uint8)


class FileReader:
    """A file a sample.

    Args:
        root: the folder that the paths are relative to.
        paths: by sample id, Arrow strings.
    """

    def __init__(self, root: Path, paths: pa.ChunkedArray) -> None:
        self.root, self.paths = root, paths

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image, or why there is none."""
        return read_file(self.root / self.paths[sample_id].as_py())


class ShardReader:
    """A place in a tar file a sample.

    Args:
        root: the folder of the shards.
        shards: their names.
        shard: by sample id, the number of the name; −1 where the sample is in none.
        offset: likewise, where the image begins, bytes.
        size: likewise, its length, bytes.
    """

    def __init__(
        self,
        root: Path,
        shards: Sequence[str],
        shard: NDArray[np.int32],
        offset: NDArray[np.int64],
        size: NDArray[np.int64],
    ) -> None:
        self.root, self.shards = root, shards
        self.shard, self.offset, self.size = shard, offset, size
        # A shard that leaves the cache is closed when the last thread that reads it lets go of it.
        self._open = lru_cache(_MAX_OPEN)(_OpenShard)

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image, or why there is none."""
        if self.shard[sample_id] < 0:
            return "in no shard"
        name = self.shards[self.shard[sample_id]]
        offset, size = int(self.offset[sample_id]), int(self.size[sample_id])
        try:
            data = self._open(self.root / name).read(offset - TAR_BLOCK, TAR_BLOCK + size)
        except OSError as error:
            return f"shard {name}: {error.strerror or error}"
        if len(data) < TAR_BLOCK + size:
            return f"shard {name} is truncated"
        if not data.startswith(f"{member_stem(sample_id)}.".encode()):
            return f"shard {name} holds something else there: it is not of this index"
        return checked(data[TAR_BLOCK:])


class _OpenShard:
    """An open file, read at any place by many threads at once."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._asked: dict[int, float] = {}  # block → when it was asked for, s

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there; fewer at the end of the file."""
        self._ask_ahead(offset, size)
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # some network file systems give less than they could
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _ask_ahead(self, offset: int, size: int) -> None:
        """Has storage fetch whole blocks up to the one after this, in the background.

        Samples are read in nearly the order in which they lie here, so nearly all of it is used.
        """
        now = time.monotonic()
        last = (offset + size) // _AHEAD_BLOCK + 1
        for block in range(offset // _AHEAD_BLOCK, last + 1):
            if now - self._asked.get(block, -_AHEAD_SECONDS) >= _AHEAD_SECONDS:
                self._asked[block] = now
                os.posix_fadvise(
                    self._descriptor,
                    block * _AHEAD_BLOCK,
                    _AHEAD_BLOCK,
                    os.POSIX_FADV_WILLNEED,
                )


def open_reader(index: Index) -> Reader:
    """What reads the images of an index, from files or from shards."""
    if not index.shards:
        return FileReader(index.root, index.paths())
    size = index.table["bytes"].to_numpy()
    return ShardReader(index.root, index.shards, *index.places(), size)


def member_stem(sample_id: int) -> str:
    """The name of a sample's members in a tar, without the extension."""
    return f"{sample_id:09d}"


def read_file(path: Path) -> Bytes | str:
    """The bytes of an image file, or why they are none."""
    try:
        # Not blocking: a named pipe in an image's place must not stop a reading thread for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            reason = unfit(os.fstat(descriptor))
            data = b"" if reason else file.read()
    except OSError as error:
        return error.strerror or str(error)
    return reason or checked(data)
