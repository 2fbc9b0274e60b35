"""A folder, here or in object storage, that files are put into whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mentorch.engine.data.index import replacing


class ShardStore:
    """Where shards are written to.

    Args:
        out: a folder, or a URL that fsspec knows: s3://bucket/folder, gs://…, memory://….

    Attributes:
        root: the folder as an index records it.

    Raises:
        ImportError: the package for this kind of URL is missing; the message names it.
        ValueError: no such kind of URL.
    """

    def __init__(self, out: str) -> None:
        try:
            self._fs, self._folder = url_to_fs(out)
        except ImportError as error:
            raise ImportError(f"cannot write to {out}, a package is missing: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"cannot write to {out}: {error}; give a folder, or a URL such as s3://bucket/folder"
            ) from error
        self.out = out
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.root = Path(self._folder if self.is_local else out)

    def __str__(self) -> str:
        return str(self.root) if self.is_local else self.out

    def make(self) -> None:
        """Makes the folder, if need be."""
        self._fs.makedirs(self._folder, exist_ok=True)

    def size(self, name: str) -> int | None:
        """The size of a file, bytes; None where there is none."""
        path = self._path(name)
        return int(self._fs.size(path)) if self._fs.isfile(path) else None

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        path = self._path(name)
        return bytes(self._fs.cat_file(path)) if self._fs.isfile(path) else None

    def remove(self, name: str) -> None:
        """Takes a file away, if it is there."""
        if self._fs.isfile(self._path(name)):
            self._fs.rm_file(self._path(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a local file to write that is put into the folder if the block succeeds."""
        if self.is_local:
            with replacing(self.root / name) as temporary:
                yield temporary
            return
        # Not streamed: a file that is closed half-way would stand there as if it were whole.
        with tempfile.TemporaryDirectory(prefix="mentorch-shard-") as folder:
            yield Path(folder, name)
            self._fs.put_file(str(Path(folder, name)), self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"
