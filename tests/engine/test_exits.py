"""Exit statuses, and what is said of what went wrong."""

import errno
import os
import subprocess
import sys

import pytest

from mentorch.engine.exits import run_cleanly
from mentorch.engine.failure import RunFailed


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("5 is too many"), 2, "error: 5 is too many"),
        (FileNotFoundError("no index there"), 2, "error: no index there"),  # a sentence of ours
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: permission denied; "),
        (FileExistsError(errno.EEXIST, "File exists", "/x"), 2, "/x: file exists; "),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "make room"),
        (ModuleNotFoundError("no", name="pyarrow.lib"), 2, "./setup, or pip install '.[train]'"),
        (ModuleNotFoundError("no", name="sklearn"), 2, "mentorch's extra train: "),
        (ModuleNotFoundError("no", name="nvidia.dali"), 2, "./setup, or pip install '.[dali-cuda1"),
        (ModuleNotFoundError("no", name="lightning"), 2, "dev, or pip install '.[integrations]'"),
        (ModuleNotFoundError("no", name="users_own"), 2, "users_own, which is not installed\n"),
        (ModuleNotFoundError("no", name="torch"), 2, "torch, which is not installed\n"),
        (RunFailed("the images are gone"), 1, "error: the images are gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_statuses(error, status, said, capsys):
    def fail():
        raise error

    assert run_cleanly(fail) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("5"),
        OSError(errno.ENOSPC, "full", "/x"),
        RunFailed("x"),
        ModuleNotFoundError("no", name="users_own"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(("asked", "shown"), [("1", 1), ("0", 0), ("", 0)])
def test_a_traceback_is_shown_where_it_is_asked_for(error, asked, shown, monkeypatch, capsys):
    """What looks like wrong input may be a bug of ours all the same."""

    def where_it_happened():
        raise error

    monkeypatch.setenv("MENTORCH_TRACEBACK", asked)
    run_cleanly(where_it_happened)
    err = capsys.readouterr().err
    assert err.count("Traceback") == err.count("in where_it_happened") == shown
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unforeseen"),
        OSError(errno.EIO, "Input/output error", "/x"),
        OSError(errno.EMFILE, "Too many open files"),  # of no file
        ModuleNotFoundError("no", name="mentorch.engine.nothing"),  # ours: a bug
    ],
)
def test_a_bug_keeps_its_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        run_cleanly(fail)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1), ("table", 0)])
def test_a_command_may_return_its_status(result, status):
    assert run_cleanly(lambda: result) == status


@pytest.mark.parametrize("words", [("--help",), ("doctor", "--help")])  # ours, and tyro's
def test_a_reader_that_goes_away_gets_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    code = "from mentorch.engine.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("error", "rank", "lines"),
    [
        (RunFailed("the images are gone"), "0", 1),
        (RunFailed("the images are gone"), "3", 0),  # all ranks would say the same
        (OSError(errno.ENOSPC, "full", "/x"), "3", 1),  # this host's disk
        (ValueError("no such file there"), "3", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_rank_is_silent_only_where_all_say_the_same(error, rank, lines, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setenv("RANK", rank)
    run_cleanly(fail)
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["nothing"], 2)])
def test_the_output_may_be_closed(words, status):
    """As of a service: Python then has no sys.stdout."""
    code = "from mentorch.engine.cli import main; main()"
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code, *words],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == (status == 2)
