"""Writing in the background: what is asked for when, and what is left when it goes wrong."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mentorch.engine import checkpoint_files, checkpoint_writer
from mentorch.engine.checkpoint import (
    Snapshot,
    checkpoints,
    choose_checkpoint,
    clean,
    load_checkpoint,
    take_snapshot,
    verify,
)
from mentorch.engine.checkpoint_writer import CheckpointWriter
from mentorch.engine.distributed import World


def _snapshot(step, floats=8) -> Snapshot:
    state = {"step": step, "momentum": torch.full((4,), float(step))}
    return take_snapshot(
        step, {"model": {"w": torch.full((floats,), float(step))}}, state, {}, World()
    )


def _names(folder):
    return {path.name for path in folder.iterdir()}


def _text(path):
    return path.read_text().strip()


@pytest.fixture
def writer(tmp_path):
    made = CheckpointWriter(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits before the files until the gate is opened."""
    gate, real = threading.Event(), checkpoint_writer.write_files

    def waiting(*args):
        assert gate.wait(60)
        real(*args)

    monkeypatch.setattr(checkpoint_writer, "write_files", waiting)
    yield gate
    gate.set()


# When


def test_writing_goes_on_in_the_background_one_after_another(writer, gate):
    writer.save(_snapshot(1))
    assert writer.writing
    assert checkpoints(writer.folder) == []
    assert writer.last is None
    second = threading.Thread(target=writer.save, args=(_snapshot(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "save has not waited for the write before it"
    gate.set()
    second.join()
    writer.wait()
    assert not writer.writing
    assert writer.last == 2
    assert [path.name for path in checkpoints(writer.folder)] == ["step-00000001", "step-00000002"]


def test_close_waits_for_what_is_written(writer, gate):
    writer.save(_snapshot(1))
    threading.Timer(0.1, gate.set).start()
    writer.close()
    assert load_checkpoint(writer.folder / "step-00000001").state["step"] == 1


def test_the_best_is_marked_after_it_is_complete(writer, gate):
    """An evaluation may end before the checkpoint of its step is on the disk."""
    writer.save(_snapshot(1))
    writer.mark_best(1)
    assert writer.writing
    assert not (writer.folder / "best").exists()
    gate.set()
    writer.wait()
    assert _text(writer.folder / "best") == "step-00000001"


# What is kept


def test_the_newest_and_the_best_are_kept(writer):
    for step in range(1, 5):
        writer.save(_snapshot(step), best=step == 1)
    writer.wait()
    kept = {"step-00000001", "step-00000003", "step-00000004"}
    assert _names(writer.folder) == kept | {"latest", "best"}
    writer.mark_best(4)  # the one that was the best goes
    writer.wait()
    assert _names(writer.folder) == kept - {"step-00000001"} | {"latest", "best"}
    writer.save(_snapshot(5))
    writer.save(_snapshot(6))
    writer.save(_snapshot(7))
    writer.wait()
    assert [path.name for path in checkpoints(writer.folder)] == [
        "step-00000004", "step-00000006", "step-00000007",
    ]  # fmt: skip
    assert _text(writer.folder / "latest") == "step-00000007"
    assert writer.problem() is None


def test_a_best_one_that_was_never_written_does_nothing(writer):
    writer.save(_snapshot(1), best=True)
    writer.mark_best(9)
    writer.wait()
    assert _text(writer.folder / "best") == "step-00000001"
    assert writer.problem() is None


def test_latest_names_what_is_complete_and_nothing_goes_before_it_does(writer, monkeypatch):
    seen, replace = [], Path.replace

    def watching(path, target):
        named = writer.folder / _text(path)
        verify(named)
        seen.append((target.name, named.name, len(checkpoints(writer.folder))))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watching)
    for step in (1, 2, 3, 4):
        writer.save(_snapshot(step), best=step == 4)
    writer.wait()
    assert seen == [
        ("latest", "step-00000001", 1),
        ("latest", "step-00000002", 2),
        ("latest", "step-00000003", 3),  # keep=2: 1 is still there
        ("latest", "step-00000004", 3),
        ("best", "step-00000004", 3),
    ]


def test_a_step_that_is_there_already_is_left_as_it_is(writer):
    writer.save(_snapshot(1))
    writer.wait()
    before = (writer.folder / "step-00000001" / "model.safetensors").stat()
    writer.save(_snapshot(1))
    writer.wait()
    after = (writer.folder / "step-00000001" / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_step_that_is_there_damaged_is_written_again(writer):
    writer.save(_snapshot(1))
    writer.wait()
    (writer.folder / "step-00000001" / "state.json").unlink()
    writer.save(_snapshot(1))
    writer.wait()
    assert writer.problem() is None
    verify(writer.folder / "step-00000001")
    assert _names(writer.folder) == {"step-00000001", "latest"}


def test_a_new_writer_knows_the_last_one(writer):
    writer.save(_snapshot(7))
    writer.wait()
    again = CheckpointWriter(writer.folder, keep=2)
    assert again.last == 7
    again.close()


# What goes wrong


def _failing(real, fails_at, error):
    """``real``, but its call number ``fails_at`` raises."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at:
            raise error
        return real(*args, **kwargs)

    return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))
STAGES = {  # owner, name, number of the call, error, whether the new one is complete then
    "folder": (Path, "mkdir", 1, PermissionError(errno.EACCES, "Permission denied"), False),
    "first file": (Path, "write_bytes", 1, FULL, False),
    "tensors": (checkpoint_writer, "save_file", 2, FULL, False),
    "fsync of a file": (os, "fsync", 1, BROKEN, False),
    "fsync of the hashes": (os, "fsync", 5, BROKEN, False),  # after four files
    "fsync of the folder": (os, "fsync", 6, BROKEN, False),
    "hash": (checkpoint_writer, "file_sha256", 3, BROKEN, False),
    "hashes": (Path, "write_text", 1, FULL, False),
    "rename": (Path, "rename", 1, OSError(errno.EROFS, "Read-only file system"), False),
    "fsync of the parent": (os, "fsync", 7, BROKEN, True),
    "latest": (checkpoint_files, "replace_text", 1, FULL, True),
    "latest's rename": (Path, "replace", 1, FULL, True),
    "a bug": (checkpoint_writer, "pack", 1, TypeError("not for JSON"), False),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_any_stage_leaves_the_older_checkpoint(writer, monkeypatch, stage):
    owner, name, fails_at, error, complete = STAGES[stage]
    writer.save(_snapshot(1))
    writer.wait()
    monkeypatch.setattr(owner, name, _failing(getattr(owner, name), fails_at, error))
    writer.save(_snapshot(2))
    writer.wait()
    monkeypatch.undo()
    assert str(error) in writer.problem()
    assert "step-00000002" in writer.problem()
    assert (writer.failures, writer.last) == (1, 1)
    left = {path for path in _names(writer.folder) if not path.startswith(".latest")}
    assert left == {"step-00000001", "latest"} | ({"step-00000002"} if complete else set())
    chosen, notes = choose_checkpoint(writer.folder, World())
    assert chosen.name == "step-00000001"
    assert notes == []
    assert load_checkpoint(chosen).state["step"] == 1
    writer.save(_snapshot(2))
    writer.wait()
    assert (writer.problem(), writer.failures, writer.last) == (None, 0, 2)
    assert choose_checkpoint(writer.folder, World())[0].name == "step-00000002"


def test_failures_in_a_row_are_counted(writer, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(checkpoint_writer, "write_files", full)
    for step in (1, 2, 3):
        writer.save(_snapshot(step))
    writer.mark_best(3)  # must not hide that
    writer.wait()
    assert writer.failures == 3
    assert "step-00000003" in writer.problem()
    assert writer.last is None


def test_old_checkpoints_that_cannot_be_deleted_are_a_problem(writer, monkeypatch):
    for step in (1, 2):
        writer.save(_snapshot(step))
    writer.wait()
    monkeypatch.setattr(shutil, "rmtree", _failing(shutil.rmtree, 1, BROKEN))
    writer.save(_snapshot(3))
    writer.wait()
    assert "deleting old checkpoints" in writer.problem()
    assert writer.last == 3
    assert choose_checkpoint(writer.folder, World())[0].name == "step-00000003"


def test_a_disk_that_lost_what_it_was_given_is_noticed(writer, monkeypatch):
    """Whether it lost tensors or text."""
    writer.save(_snapshot(1))
    writer.wait()
    for name in ("model.safetensors", "state.json"):

        def losing(path, name=name):
            checkpoint_files.to_disk(path)
            if path.name == name:
                content = bytearray(path.read_bytes())
                content[-3] ^= 1
                path.write_bytes(content)

        monkeypatch.setattr(checkpoint_writer, "to_disk", losing)
        writer.save(_snapshot(2))
        writer.wait()
        assert "what is read is not what was written" in writer.problem()
        assert name in writer.problem()
    assert [path.name for path in checkpoints(writer.folder)] == ["step-00000001"]


def test_a_disk_that_is_really_full(tmp_path):
    """1 MB: the first checkpoint of 0.4 MB fits, one of 4 MB does not, then one of 0.4 MB again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        writer = CheckpointWriter(disk / "checkpoints", keep=2)
        for step, floats in ((1, 100_000), (2, 1_000_000)):
            writer.save(_snapshot(step, floats))
        writer.wait()
        assert "No space left" in writer.problem()
        assert _names(writer.folder) == {"step-00000001", "latest"}
        assert load_checkpoint(choose_checkpoint(writer.folder, World())[0]).state["step"] == 1
        writer.save(_snapshot(3, 100_000))
        writer.close()
        assert writer.problem() is None
    finally:
        subprocess.run(["umount", disk], check=True)


# A process that is killed at its n-th fsync, n = 1 … 9, once it has told so.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from mentorch.engine.checkpoint import take_snapshot
from mentorch.engine.checkpoint_writer import CheckpointWriter
from mentorch.engine.distributed import World

def write(folder, fatal):
    writer, fsync, calls = CheckpointWriter(folder, 1), os.fsync, []
    def counting(descriptor):
        calls.append(descriptor)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    models = {"model": {"w": torch.ones(9)}}
    for step in (1, 2):
        if step == 2:
            os.fsync = counting
        writer.save(take_snapshot(step, models, {"step": step}, {}, World()))
        writer.wait()

for fatal in range(1, 10):
    pid = os.fork()
    if not pid:
        write(Path(sys.argv[1]) / str(fatal), fatal)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, f"fsync {fatal} never came"
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_a_checkpoint(tmp_path):
    """Of four files, the hashes, the new folder, its parent, ``latest``, and the parent again."""
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True)
    for fatal in range(1, 10):
        folder = tmp_path / str(fatal)
        chosen, notes = choose_checkpoint(folder, World())
        step = 1 if fatal <= 8 else 2  # the ninth is the first after `latest` has moved
        assert load_checkpoint(chosen).state["step"] == step
        assert notes == []
        clean(folder, chosen)
        assert not [name for name in _names(folder) if name.startswith(".")]
        writer = CheckpointWriter(folder, keep=1)
        writer.save(_snapshot(2))
        writer.close()
        assert writer.problem() is None
        assert choose_checkpoint(folder, World())[0].name == "step-00000002"
