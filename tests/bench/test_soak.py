"""The soak: killed runs come back as they were, and it would notice if they did not.

The full numbers of kills are for `python bench/soak.py`; here are as few as meet every moment. The
seeds were searched for that: 58 gives one rank all four moments in four kills; 3 gives two ranks a
kill of the main rank, of both within a write, and of the other one.
"""

import json
import math
import time
from pathlib import Path

import pytest
import soak
import torch
from soak_compare import difference, order_difference, tree_difference
from soak_kills import (
    CUT,
    CUT_DELETING,
    CUT_POINTER,
    UNNAMED,
    Soak,
    _strange_notes,
    left_behind,
)
from soak_restarts import Restarts
from soak_runs import Place, SoakFailed

from mentorch.engine import job
from mentorch.engine.checkpoint_files import pointed

EPOCHS = 2  # the fewest in which a kill may fall into an epoch that is not the first


@pytest.fixture
def short_runs(monkeypatch):
    monkeypatch.setattr("soak_kills.EPOCHS", EPOCHS)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills", "seed"), [(1, 4, 58), (2, 3, 3)])
def test_killed_runs_are_the_run_that_was_left_alone(tmp_path, short_runs, ranks, kills, seed):
    out = tmp_path / "out"
    assert soak.kills(kills=kills, ranks=ranks, seed=seed, out=out, results=tmp_path) == 0
    written = json.loads((tmp_path / "kills.json").read_text())[f"{ranks} ranks"]
    assert written["kills"] == kills
    assert written["of_them_identical"] == written["finished_runs"] >= 1
    assert written["environment"]["packages"]["torch"]
    assert not out.exists(), "what was fine is kept"


@pytest.mark.slow
def test_a_run_that_goes_on_wrongly_is_found(tmp_path, short_runs, monkeypatch, capsys):
    """Without the random states other activations are dropped. (Ranks are forked: they have it.)"""
    monkeypatch.setattr(job, "restore_random", lambda *_: None)
    out = tmp_path / "out"
    arguments = {"kills": 2, "ranks": 1, "seed": 58, "out": out, "results": tmp_path / "results"}
    assert soak.kills(**arguments) == 1
    assert "differs from" in capsys.readouterr().err
    assert (out / "run-000" / "checkpoints").is_dir(), "nothing is left to be looked at"
    assert not (tmp_path / "results").exists(), "a result of a soak that failed"
    with pytest.raises(ValueError, match="exists already"):
        soak.kills(**arguments)


@pytest.mark.slow
def test_torchrun_brings_a_killed_worker_back(tmp_path):
    restarts = Restarts(tmp_path, kills=1, ranks=2, seed=0, end=time.monotonic() + 200)
    report = restarts.run()
    assert report["came_back"] == 1
    order = (
        report["kill_to_processes_s_max"],
        report["kill_to_checkpoint_chosen_s_max"],
        report["kill_to_step_s_max"],
    )
    assert 0 < order[0] < order[1] < order[2]
    assert not any(Path("/proc", str(pid)).exists() for pid in _workers(tmp_path))


def _workers(out: Path) -> set[int]:
    return {note["pid"] for note in Place(out / "notes-killed", out / "log").all(2)}


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": [torch.tensor([1.0, math.nan])]}, {"a": [torch.tensor([1.0, math.nan])]}, ""),
        ({"a": [torch.tensor([0.0])]}, {"a": [torch.tensor([-0.0])]}, "x/a/0: other values"),
        (torch.tensor([1]), torch.tensor([1], dtype=torch.int32), "x: other values"),
        ({"a": 1}, {"a": 1, "b": 2}, "x: ['b'] in one of them only"),
        ([1], [1, 2], "x: 1 and 2 of them"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "x/a/1/b: 2 and 3"),
    ],
)
def test_differences_are_found_to_the_last_bit(one, other, found):
    assert tree_difference(one, other, "x") == found


def _taken(*steps: tuple[int, list[int]]) -> list[list[dict]]:
    return [[{"what": "taken", "step": step, "ids": ids} for step, ids in steps]]


def test_the_order_of_samples_is_compared():
    whole = _taken((1, [5, 6]), (2, [7, 8]))
    assert not order_difference(whole, _taken((1, [5, 6]), (1, [5, 6]), (2, [7, 8])), 1)
    again = _taken((1, [5, 6]), (1, [6, 5]), (2, [7, 8]))
    assert order_difference(whole, again, 1) == "rank 0, step 1: other samples when taken again"
    assert "step/2" in order_difference(whole, _taken((1, [5, 6]), (2, [8, 7])), 1)
    assert "['2']" in order_difference(whole, _taken((1, [5, 6])), 1)


def test_a_run_that_is_not_finished_is_another(tmp_path):
    for name, state in (("one", "finished"), ("other", "running")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps({"state": state}))
    found = difference(tmp_path / "one", tmp_path / "other", 1)
    assert found == "status.json: finished, running"


def test_what_a_broken_off_write_leaves_is_recognised(tmp_path):
    assert not left_behind(tmp_path / "nowhere")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "latest").write_text("step-00000003\n")
    assert not left_behind(tmp_path)
    (tmp_path / "step-00000006").mkdir()
    assert set(left_behind(tmp_path)) == {UNNAMED}
    (tmp_path / ".latest.tmp").touch()
    (tmp_path / ".step-00000002.old").mkdir()
    (tmp_path / ".step-00000009.tmp").mkdir()
    assert set(left_behind(tmp_path)) == {CUT, CUT_POINTER, CUT_DELETING, UNNAMED}


def test_a_note_on_a_damaged_checkpoint_is_strange_after_a_kill(tmp_path):
    """A missing ``latest`` is not: the kill came before the first one."""
    _, missing = pointed(tmp_path, "latest")
    (tmp_path / "latest").write_text("step-00000003\n")
    _, dangling = pointed(tmp_path, "latest")
    notes = [{"what": "taken"}, {"what": "resumed", "said": [f"{missing}; the newest is taken"]}]
    assert not _strange_notes(notes)
    notes[-1]["said"].append(dangling)
    assert _strange_notes(notes) == dangling


def test_a_whole_checkpoint_too_many_set_aside_is_a_leak(tmp_path):
    run = Soak(tmp_path, kills=1, ranks=1, seed=0, end=math.inf)
    (tmp_path / "run" / "checkpoints" / "step-00000006.set-aside").mkdir(parents=True)
    assert "1 checkpoints set aside" in run._rest(tmp_path / "run")
    (tmp_path / "run" / ".status.json.tmp").touch()
    assert "left behind" in run._rest(tmp_path / "run")


def test_results_of_other_numbers_of_ranks_stay(tmp_path):
    path = tmp_path / "kills.json"
    for ranks, kills in ((1, 20), (2, 20), (2, 100)):
        soak._write(path, "kills", {"ranks": ranks, "kills": kills})
    written = json.loads(path.read_text())
    assert (written["1 ranks"]["kills"], written["2 ranks"]["kills"]) == (20, 100)


@pytest.mark.parametrize("wrong", [{"kills": 0}, {"ranks": 0}, {"minutes": 0}])
def test_a_soak_of_nothing_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        soak.kills(**wrong, out=tmp_path / "out")


def test_an_attempt_that_fails_of_itself_fails_the_soak(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "run", lambda config: 3)
    with pytest.raises(SoakFailed, match=r"ended with \[3\]"):
        Soak(tmp_path, kills=1, ranks=1, seed=0, end=math.inf).run()
