"""Where the bytes of images come from. Reading never fails: what is no image gives a reason.

A reader is asked by sample id from many threads at once.
"""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mentorch.engine.data.probe import has_jpeg_end, sniff_format, unfit

Bytes = NDArray[np.uint8]


class Reader(Protocol):
    """Bytes by sample id."""

    def read(self, sample_id: int) -> Bytes | str:
        """The encoded image, or why there is none."""


def checked(data: bytes) -> Bytes | str:
    """Encoded bytes as an array if they may be an image, by their magic bytes and end marker."""
    kind = sniff_format(data[:32])
    if kind is None:
        return "not an image that DALI decodes"
    if kind == "JPEG" and not has_jpeg_end(data):
        return "truncated JPEG"
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
