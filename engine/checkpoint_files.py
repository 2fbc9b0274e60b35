"""A run's checkpoints on the disk: their names, their hashes, and which is the latest and the best.

Beside the folders of the checkpoints stand two text files, ``latest`` and ``best``, that name one.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from mentorch.engine.files import replace_text

LATEST, BEST = "latest", "best"
MODELS = ("model", "average", "ledger")
SUMS = "SHA256SUMS"
_REQUIRED = {"model.safetensors", "state.safetensors", "state.json", "ranks.safetensors"}
_KNOWN = _REQUIRED | {f"{name}.safetensors" for name in MODELS}
_NAME = re.compile("step-[0-9]{8,}")
_LINE = re.compile(r"([0-9a-f]{64})  ([a-z.]+)")
_LONGEST = 4096  # bytes of a SHA256SUMS; ours have under 600
_CHUNK = 1 << 20  # bytes hashed at once


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


# Names


def checkpoint_name(step: int) -> str:
    """The name of the folder with the checkpoint of a step."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """True of what `checkpoint_name` gives, and of nothing with a slash or a dot."""
    return _NAME.fullmatch(name) is not None


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    assert is_checkpoint_name(name), name
    return int(name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; `verify` tells whether they are still what was written.

    Raises:
        OSError: a folder that cannot be read. One that does not exist has no checkpoints.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path.name))


# Hashes


def file_sha256(path: Path) -> str:
    """The hash of a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path) -> None:
    """Compares a checkpoint's files with its SHA256SUMS.

    Raises:
        DamagedCheckpoint: it is not what was written; the message names the file.
    """
    name = SUMS
    try:
        if path.is_symlink() or not path.is_dir():
            raise DamagedCheckpoint(f"{path}: is no folder")
        sums = _read_sums(path)
        _compare_names(path, set(sums))
        for name, expected in sums.items():
            if file_sha256(path / name) != expected:
                raise DamagedCheckpoint(f"{path}: {name}: its SHA-256 is not the one in {SUMS}")
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {name}: cannot be read: {error}") from error


def _read_sums(path: Path) -> dict[str, str]:
    """Hashes by file name."""
    file = path / SUMS
    if not os.path.lexists(file):
        raise DamagedCheckpoint(f"{file}: is missing (earlier versions made none)")
    if file.is_symlink() or not file.is_file():
        raise DamagedCheckpoint(f"{file}: is no plain file")
    with file.open("rb") as stream:
        *lines, rest = stream.read(_LONGEST).decode("ascii", errors="replace").split("\n")
    sums: dict[str, str] = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        if not found or found[2] not in _KNOWN or found[2] in sums:
            raise DamagedCheckpoint(f"{file}: has a line that does not belong there: {line[:99]!r}")
        sums[found[2]] = found[1]
    if rest:
        raise DamagedCheckpoint(f"{file}: its last line has no end: {rest[:99]!r}")
    if missing := _REQUIRED - sums.keys():
        raise DamagedCheckpoint(f"{file}: does not list {min(missing)}")
    return sums


def _compare_names(path: Path, listed: set[str]) -> None:
    with os.scandir(path) as entries:
        plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    plain.pop(SUMS, None)
    for name in sorted(listed | plain.keys()):
        if name not in plain:
            raise DamagedCheckpoint(f"{path}: {name}: is missing")
        if name not in listed:
            raise DamagedCheckpoint(f"{path}: {name}: is not listed in {SUMS}")
        if not plain[name]:
            raise DamagedCheckpoint(f"{path}: {name}: is no plain file")


# Pointers: small text files with a checkpoint's name


def point(folder: Path, pointer: str, name: str) -> None:
    """Makes ``latest`` or ``best`` name a checkpoint, at once and lastingly."""
    replace_text(folder / pointer, f"{name}\n")
    to_disk(folder)


def pointed(folder: Path, pointer: str) -> tuple[str | None, str]:
    """What ``latest`` or ``best`` names.

    Returns:
        A checkpoint's name and "", or None and what is wrong.
    """
    path = folder / pointer
    if not path.is_file():
        return None, f"{path} is {'no plain file' if os.path.lexists(path) else 'missing'}"
    try:
        with path.open("rb") as file:
            name = file.read(100).decode("utf-8", errors="replace").strip()
    except OSError as error:
        return None, f"{path} cannot be read: {error}"
    if not is_checkpoint_name(name):
        return None, f"{path} holds {name!r}, which is no name of a checkpoint"
    if not (folder / name).is_dir():
        return None, f"{path} names {name}, which is not there"
    return name, ""


# Files and folders


def to_disk(path: Path) -> None:
    """Flushes a file or a folder, and of a file has the next reading come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hide(path: Path) -> None:
    """Gives a checkpoint that is to be deleted a name that is none of a checkpoint."""
    remove(hidden(path))
    path.rename(hidden(path))


def hidden(path: Path) -> Path:
    """Where `hide` moves a checkpoint."""
    return path.with_name(f".{path.name}.old")
