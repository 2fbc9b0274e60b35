"""Which checkpoint a run goes on from, alone and among ranks that see different things."""

import random
import shutil
import threading
from dataclasses import dataclass, field

import pytest
import torch

from mentorch.engine.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    choose_checkpoint,
    clean,
    take_snapshot,
)
from mentorch.engine.checkpoint_writer import CheckpointWriter
from mentorch.engine.distributed import World

STEPS = ("step-00000001", "step-00000002", "step-00000003")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    writer = CheckpointWriter(folder, keep=9)
    models = {name: {"w": torch.ones(40)} for name in ("model", "average", "ledger")}
    for step in (1, 2, 3):
        writer.save(take_snapshot(step, models, {"m": torch.ones(3)}, {}, World()), best=step == 2)
    writer.close()
    assert writer.problem() is None
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """Checkpoints of steps 1 to 3; ``latest`` names 3, ``best`` 2."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def _chosen(folder):
    path, notes = choose_checkpoint(folder, World())
    return path and path.name, notes


def _damage(path):
    (path / "model.safetensors").write_bytes(b"")


# Alone


def test_the_latest_is_chosen(folder):
    assert _chosen(folder) == ("step-00000003", [])
    (folder / "latest").write_text("step-00000001\n")  # 2 and 3 were never reached
    assert _chosen(folder) == ("step-00000001", [])


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_new_run_has_none(tmp_path, name):
    assert choose_checkpoint(tmp_path / name, World()) == (None, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "latest is missing"),
        ("", "latest holds ''"),
        ("\n", "latest holds ''"),
        ("garbage", "latest holds 'garbage'"),
        ("\0\xff" * 9, "latest holds"),
        ("x" * 10_000, "latest holds"),
        ("step-00000004", "latest names step-00000004, which is not there"),
        ("step-00000003.set-aside", "latest holds"),
        ("../step-00000003", "latest holds '../step-00000003'"),
        ("../elsewhere/step-00000009", "latest holds"),
        ("/etc", "latest holds '/etc'"),
        ("step-00000001\nstep-00000002", "latest holds"),
        ("step-000000٣٣", "latest holds"),  # digits, but not ours
    ],
    ids=lambda value: repr(value)[:24],
)
def test_without_a_good_pointer_the_newest_is_chosen(folder, content, said):
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_bytes(content.encode("latin-1", errors="replace"))
    chosen, (note,) = _chosen(folder)
    assert chosen == "step-00000003"
    assert said in note
    assert str(folder) in note


def test_a_pointer_that_is_no_file(folder):
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    assert _chosen(folder)[0] == "step-00000003"


def test_a_pointer_to_what_is_gone_is_said_even_if_there_is_nothing_else(tmp_path):
    (tmp_path / "latest").write_text("step-00000003\n")
    chosen, (note,) = _chosen(tmp_path)
    assert chosen is None
    assert "which is not there" in note


DAMAGES = {
    "truncated": lambda content, _: content[:-1],
    "flipped": lambda content, rng: _flipped(bytearray(content), rng),
    "removed": lambda *_: None,
    "longer": lambda content, _: content + b"\0",
}


def _flipped(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_one_before_is_chosen(folder, damage):
    newest, rng = folder / "step-00000003", random.Random(0)
    files = sorted(newest.iterdir())
    assert len(files) == 7
    for file in files:
        whole = file.read_bytes()
        content = DAMAGES[damage](whole, rng)
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        chosen, (note,) = _chosen(folder)
        assert chosen == "step-00000002"
        assert str(newest) in note
        assert file.name in note
        file.write_bytes(whole)
    assert _chosen(folder) == ("step-00000003", [])


def test_the_latest_is_damaged_and_so_is_the_one_before(folder):
    (folder / "latest").write_text("step-00000002\n")
    _damage(folder / "step-00000002")
    _damage(folder / "step-00000003")
    chosen, notes = _chosen(folder)
    assert chosen == "step-00000001"
    assert ["step-00000002" in notes[0], "step-00000003" in notes[1]] == [True, True]


def test_none_is_good(folder):
    for name in STEPS:
        _damage(folder / name)
    with pytest.raises(DamagedCheckpoint, match=r"(?s)00003: model.*00002: model.*00001: model"):
        choose_checkpoint(folder, World())


def test_a_folder_that_cannot_be_read_is_not_taken_for_a_new_run(folder, monkeypatch):
    def failing(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mentorch.engine.checkpoint_choice.checkpoints", failing)
    with pytest.raises(DamagedCheckpoint, match=r"cannot be read: .*Permission denied"):
        choose_checkpoint(folder, World())


# Among ranks


@dataclass(frozen=True)
class Ranks(World):
    """Ranks that are threads."""

    board: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(20)
        values = list(self.board)
        self.barrier.wait(20)
        return values

    def from_main(self, value):
        return self.gather(value)[0]


def _chosen_by(*folders):
    """What ranks choose that see these folders."""
    ranks, answers = len(folders), [None] * len(folders)
    board, barrier = [None] * ranks, threading.Barrier(ranks)

    def choose(rank):
        try:
            path, notes = choose_checkpoint(
                folders[rank], Ranks(rank, ranks, board=board, barrier=barrier)
            )
            answers[rank] = path and path.name, notes
        except DamagedCheckpoint as error:
            answers[rank] = str(error).replace(str(folders[rank]), "FOLDER")

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(answer == answers[0] for answer in answers), "the ranks disagree"
    return answers[0]


@pytest.fixture
def other(written, tmp_path):
    return shutil.copytree(written, tmp_path / "other")


def test_all_ranks_see_the_same(folder, other):
    assert _chosen_by(folder, other) == ("step-00000003", [])


@pytest.mark.parametrize("main_is_right", [True, False])
def test_one_rank_cannot_verify_what_the_other_can(folder, other, main_is_right):
    _damage((other if main_is_right else folder) / "step-00000003")
    chosen, (note,) = _chosen_by(folder, other)
    assert chosen == "step-00000002"
    assert "model.safetensors" in note
    assert ("rank 1 on " in note) == main_is_right


def test_pointers_of_other_ranks_do_not_count(folder, other):
    (other / "latest").write_text("step-00000001\n")
    assert _chosen_by(folder, other) == ("step-00000003", [])


def test_storage_that_is_not_shared_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    said = _chosen_by(folder, tmp_path / "empty")
    assert "rank 1 on node7 has no such folder" in said
    assert "storage that all hosts share" in said
    assert all(name in said for name in STEPS)


def test_a_main_rank_that_alone_sees_nothing_does_not_start_anew(folder, tmp_path):
    said = _chosen_by(tmp_path / "empty", folder)
    assert "rank 1 on " in said
    assert "storage that all hosts share" in said


def test_no_rank_sees_any(tmp_path):
    assert _chosen_by(tmp_path / "a", tmp_path / "b") == (None, [])


# Cleaning up


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newer_ones_are_set_aside_and_leftovers_deleted(folder):
    for name in (".step-00000004.tmp", ".step-00000001.old", "step-00000003.set-aside"):
        shutil.copytree(folder / "step-00000001", folder / name)
    for name in (".latest.tmp", "notes.txt", ".step-x.tmp"):
        (folder / name).write_text("")
    clean(folder, folder / "step-00000002")
    assert _names(folder) == [
        ".step-x.tmp", "best", "latest", "notes.txt", "step-00000001", "step-00000002",
        "step-00000003.set-aside", "step-00000003.set-aside.1",
    ]  # fmt: skip
    assert _chosen(folder) == ("step-00000002", [])
    assert (folder / "best").read_text() == "step-00000002\n"


def test_what_was_set_aside_is_never_written_over(folder, written):
    for _ in range(3):
        clean(folder, folder / "step-00000002")
        shutil.copytree(written / "step-00000003", folder / "step-00000003")
    assert sorted(folder.glob("*.set-aside*")) == [
        folder / f"step-00000003.set-aside{end}" for end in ("", ".1", ".2")
    ]


def test_damaged_ones_are_set_aside_even_if_older(folder):
    _damage(folder / "step-00000002")
    clean(folder, folder / "step-00000003")
    assert [path.name for path in checkpoints(folder)] == ["step-00000001", "step-00000003"]
    assert (folder / "step-00000002.set-aside").is_dir()
    assert not (folder / "best").exists(), "it names what is not there any more"
    assert (folder / "latest").read_text() == "step-00000003\n"


def test_a_run_that_starts_anew_is_not_mixed_with_an_older_one(folder, tmp_path):
    clean(folder, None)
    assert checkpoints(folder) == []
    assert len(list(folder.glob("*.set-aside"))) == 3
    assert choose_checkpoint(folder, World()) == (None, [])
    clean(tmp_path / "absent", None)
    assert not (tmp_path / "absent").exists()
