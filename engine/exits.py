"""What a command's end tells: one line about what is wrong, and the exit status.

Nothing heavy is imported here: `mentorch --help` imports it.
"""

import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mentorch.engine.failure import RunFailed

# Exit statuses; docs/command_line.md has them for users.
FAILED, USER_ERROR, INTERRUPTED, NO_READER = 1, 2, 130, 141
_FULL = (errno.ENOSPC, errno.EDQUOT)
_IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}


def run_cleanly(function: Callable[[], Any]) -> int:
    """Runs a command; what is wrong with the input becomes one line and exit status 2."""
    try:
        status = _status(function)
        if sys.stdout is not None:  # None where the caller has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return NO_READER
    return status


def _status(function: Callable[[], Any]) -> int:
    """Exit status of a command; anything unforeseen is a bug, and keeps its traceback."""
    try:
        result = function()
    except SystemExit as error:  # the parser's: help was asked for, or the options are wrong
        if not isinstance(error.code, int | None):
            raise
        return error.code or 0
    except ModuleNotFoundError as error:
        return _complain(_what_to_install(error), USER_ERROR)
    except RunFailed as error:  # on all ranks for the same reason
        return _complain(str(error), FAILED, told=os.environ.get("RANK", "0") == "0")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, ImportError) as error:
        return _complain(str(error), USER_ERROR)
    except OSError as error:
        return _complain(_about_file(error), FAILED if error.errno in _FULL else USER_ERROR)
    return result if isinstance(result, int) else 0


def _complain(message: str, status: int, told: bool = True) -> int:
    """Tells what is wrong.

    With ``MENTORCH_TRACEBACK=1`` in the environment every rank shows where it happened, too.
    """
    if os.environ.get("MENTORCH_TRACEBACK") == "1":
        traceback.print_exc()
    if told:
        print(f"error: {message}", file=sys.stderr)
    return status


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more (``… | head -1``); if so, nothing more is said."""
    if sys.stdout is None:
        return False
    out = select.poll()
    out.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in out.poll(0)):
        return False
    # Or Python would try again to write what is left, at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _what_to_install(error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if package in ("mentorch", ""):
        raise error
    missing = f"this needs {error.name}, which is not installed"
    extra = "dali-cuda13" if package == "nvidia" else _extras().get(package)
    if extra is None:
        return missing
    other = " (or dali-cuda12)" if package == "nvidia" else ""
    setup = "./setup" if extra in ("train", "dali-cuda13") else "./setup dev"
    return (
        f"{missing}. It comes with mentorch's extra {extra}{other}: in a clone of the repository "
        f"{setup}, or pip install '.[{extra}]'"
    )


def _extras() -> dict[str, str]:
    """Of each package that an extra brings, by its import name, the first such extra."""
    from importlib import metadata

    try:
        requirements = metadata.requires("mentorch") or []
    except metadata.PackageNotFoundError:  # a tree on the path, not installed
        return {}
    found: dict[str, str] = {}
    for requirement in requirements:
        named = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)", requirement)
        if named:
            found.setdefault(_IMPORTED_AS.get(named[1], named[1]), named[2])
    return found


def _about_file(error: OSError) -> str:
    """A system error as a sentence with its file and a way out; ours are sentences already."""
    if error.filename is None:
        if error.errno is None:
            return str(error)
        raise error  # of no file: not something that the user has named
    ways_out = {
        errno.ENOENT: "look for a slip in the path",
        errno.EEXIST: "a file is where a folder should be; name another one",
        errno.ENOTDIR: "a file is where a folder should be; name another one",
        errno.EISDIR: "name a file in that folder",
        errno.EACCES: "change its permissions, or name another place (most commands take --out)",
        errno.EPERM: "change its permissions, or name another place (most commands take --out)",
        errno.EROFS: "name another place (most commands take --out)",
    } | dict.fromkeys(_FULL, "make room, and give the same command again")
    way_out = ways_out.get(error.errno or 0)
    if way_out is None:
        raise error
    return f"{error.filename}: {(error.strerror or '').lower()}; {way_out}"
