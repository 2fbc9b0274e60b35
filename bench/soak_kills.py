"""Runs under kill −9: each goes on until it is finished, and must be the run that was left alone.

Moments are drawn at random. A kill "within a write" has left a broken-off checkpoint or pointer
behind, which is looked for once all ranks have ended; nothing else counts as one.
"""

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import soak_runs as runs
from soak_compare import difference, order_difference
from soak_runs import Place, Ranks, SoakFailed

from mentorch.engine.checkpoint import checkpoints
from mentorch.engine.config import RunConfig

EPOCHS = 4
MOMENTS = {"start-up": 15, "training": 35, "writing": 35, "latest moved": 15}
"""When to kill, and what share of the kills that is (%)."""
# For ranks whose neighbour was killed to end by themselves; at start-up they wait for it
# for minutes, and it takes a launcher to end them.
_SURVIVORS_S, _JOINING_S = 60.0, 2.0


@dataclass(frozen=True)
class Kill:
    """One kill: so long after the first step (or the start), wait for the moment, then so long."""

    moment: str
    first_s: float
    then_s: float
    ranks: tuple[int, ...]


@dataclass
class Struck:
    """What a kill did. `lost_steps`: complete ones that were taken again."""

    run: int
    attempt: int
    moment: str
    ranks: tuple[int, ...]
    found: list[str]
    survivors_s: float | None
    lost_steps: int = 0


@dataclass
class Soak:
    """Kills runs until so many kills were made.

    Args:
        out: for everything; empty, or not there yet.
        kills: how many.
        ranks: of the runs.
        seed: of the moments, and of the runs.
        end: when to stop killing (`time.monotonic`).
        say: told of every kill.
    """

    out: Path
    kills: int
    ranks: int
    seed: int
    end: float
    say: Callable[[str], None] = runs.say
    struck: list[Struck] = field(default_factory=list)
    set_aside: int = 0
    said: Counter[str] = field(default_factory=Counter)
    finished: int = 0

    def run(self) -> dict[str, Any]:
        """All of it; returns what is to be reported.

        Raises:
            SoakFailed: a run differs from the undisturbed one, or ends of itself.
        """
        self.digits = runs.make_digits(self.out / "digits")
        self.random = random.Random(self.seed)
        self.whole = Place.make(self.out / "undisturbed-notes")
        self.start_s, self.train_s = runs.undisturbed(
            self._config("undisturbed"), self.whole, self.ranks
        )
        self.say(f"undisturbed: {self.start_s:.1f} s to the first batch, {self.train_s:.1f} s on")
        while self.wanted() or not self.finished:
            name = f"run-{self.finished:03d}"
            place = Place.make(self.out / f"{name}-notes")
            self._until_finished(self._config(name), place)
            self._check(name, place)
            self.finished += 1
        return self._report()

    def wanted(self) -> bool:
        """Whether there are kills to make, and there is time for them."""
        return len(self.struck) < self.kills and time.monotonic() < self.end

    def _config(self, name: str) -> RunConfig:
        return runs.config(self.digits, EPOCHS, self.seed, folder=self.out / name)

    def _until_finished(self, run: RunConfig, place: Place) -> None:
        assert run.folder is not None
        folder, attempt = run.folder / "checkpoints", 0
        while True:
            before = left_behind(folder)
            with Ranks(run, place, attempt, self.ranks) as group:
                kill = self._plan() if self.wanted() else None
                if kill and strike(group, kill, folder):
                    self._note(group, kill, attempt, folder, before)
                elif not group.end() or any(group.statuses):
                    raise SoakFailed(
                        f"an attempt that nobody killed ended with {group.statuses}: {place.log}"
                    )
                else:
                    return
            attempt += 1

    def _plan(self) -> Kill:
        moment = self.random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        all_ranks = tuple(range(self.ranks))
        one = (self.random.randrange(self.ranks),)
        return Kill(
            moment,
            # A third of the run, so that several kills find room in each.
            self.random.uniform(0, self.start_s if moment == "start-up" else self.train_s / 3),
            self.random.uniform(0, {"writing": 0.02, "latest moved": 0.005}.get(moment, 0)),
            self.random.choice((one, all_ranks)),
        )

    def _note(
        self, group: Ranks, kill: Kill, attempt: int, folder: Path, before: dict[str, set[int]]
    ) -> None:
        killed = time.monotonic()
        by_themselves = group.end(_JOINING_S if kill.moment == "start-up" else _SURVIVORS_S)
        survivors_s = time.monotonic() - killed if len(kill.ranks) < self.ranks else None
        if not by_themselves and kill.moment != "start-up":
            raise SoakFailed(
                f"rank {kill.ranks} was killed, the others did not end within {_SURVIVORS_S:.0f} s:"
                f" {group.place.log}"
            )
        found = [
            what
            for what, inodes in left_behind(folder).items()
            if inodes - before.get(what, set())  # an attempt may be killed before it cleans up
        ]
        self.struck.append(
            Struck(self.finished, attempt, kill.moment, kill.ranks, found, survivors_s)
        )
        self.say(
            f"kill {len(self.struck):3d}  run {self.finished}, attempt {attempt}: {kill.moment}, "
            f"rank {', '.join(map(str, kill.ranks))}; left behind: {', '.join(found) or 'nothing'}"
        )

    def _check(self, name: str, place: Place) -> None:
        """A finished run is the undisturbed one, and has cleaned up."""
        folder = self.out / name
        notes = place.read(self.ranks)
        found = (
            difference(self.out / "undisturbed", folder, self.ranks)
            or order_difference(self.whole.read(self.ranks), notes, self.ranks)
            or self._rest(folder)
            or _strange_notes(notes[0])
        )
        if found:
            raise SoakFailed(f"{folder} differs from {self.out / 'undisturbed'}: {found}")
        self._count(notes[0])
        shutil.rmtree(folder)
        shutil.rmtree(place.notes)

    def _rest(self, folder: Path) -> str:
        """What a run has left behind though it should not.

        A whole checkpoint that ``latest`` did not come to name is set aside by the next attempt;
        more than those would be a leak.
        """
        hidden = sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))
        if hidden:
            return f"left behind: {hidden}"
        aside = len(list((folder / "checkpoints").glob("*.set-aside*")))
        unnamed = [s for s in self.struck if s.run == self.finished and UNNAMED in s.found]
        if aside > len(unnamed):
            return f"{aside} checkpoints set aside, {len(unnamed)} kills before latest named theirs"
        self.set_aside += aside
        return ""

    def _count(self, notes: list[dict[str, Any]]) -> None:
        """Steps that were complete at a kill and had to be taken again; what resuming has said."""
        done: dict[int, int] = {}
        resumed: dict[int, int] = {}
        for note in notes:
            if note["what"] == "done":
                done[note["attempt"]] = note["step"]
            elif note["what"] == "resumed":
                resumed[note["attempt"]] = int((note["checkpoint"] or "-0").rpartition("-")[2])
                self.said.update(text.partition(":")[2] or text for text in note["said"])
        for struck in (s for s in self.struck if s.run == self.finished):
            after = min((a for a in resumed if a > struck.attempt), default=None)
            if struck.attempt in done and after is not None:
                struck.lost_steps = max(done[struck.attempt] - resumed[after], 0)

    def _report(self) -> dict[str, Any]:
        lost = [struck.lost_steps for struck in self.struck]
        survived = [s.survivors_s for s in self.struck if s.survivors_s and s.moment != "start-up"]
        return {
            "kills": len(self.struck),
            "ranks": self.ranks,
            "seed": self.seed,
            "finished_runs": self.finished,
            "of_them_identical": self.finished,
            "kills_by_moment": dict(Counter(s.moment for s in self.struck)),
            "kills_of_all_ranks": sum(len(s.ranks) == self.ranks for s in self.struck),
            "left_behind": dict(Counter(what for s in self.struck for what in s.found)),
            "kills_within_a_write": sum(bool({CUT, CUT_POINTER} & {*s.found}) for s in self.struck),
            "set_aside": self.set_aside,
            "notes_on_resuming": dict(self.said),
            "lost_steps_median": median(lost or [0]),
            "lost_steps_max": max(lost, default=0),
            "survivors_ended_after_s_median": median(survived) if survived else None,
            "survivors_ended_after_s_max": max(survived, default=None),
            "undisturbed_s": {"to the first batch": self.start_s, "from there on": self.train_s},
        }


# Moments


def strike(group: Ranks, kill: Kill, folder: Path) -> bool:
    """Kills at its moment; False if the ranks ended before it came."""
    if kill.moment != "start-up" and not group.until(group.has_begun):
        return False
    if not group.sleep(kill.first_s):
        return False
    named = _named(folder)
    awaited: dict[str, Callable[[], bool]] = {
        "writing": lambda: bool(_hidden(folder, ".tmp")),
        "latest moved": lambda: _named(folder) != named,
    }
    if kill.moment in awaited and not group.until(awaited[kill.moment]):
        return False
    if not group.sleep(kill.then_s):
        return False
    group.kill(kill.ranks)
    return True


CUT, CUT_POINTER = "a checkpoint not whole", "a pointer not moved"
CUT_DELETING, UNNAMED = "an old one half deleted", "a whole one not named"


def _strange_notes(notes: list[dict[str, Any]]) -> str:
    """What an attempt had to say of the checkpoints before it: a kill leaves only good ones.

    But for a kill between the first checkpoint and ``latest``, which is then missing.
    """
    said = [text for note in notes for text in note.get("said", ())]
    return next((text for text in said if f"{os.sep}latest is missing;" not in text), "")


def left_behind(folder: Path) -> dict[str, set[int]]:
    """What writes that were broken off have left among the checkpoints: inodes, by kind."""
    found: dict[str, set[int]] = {}
    whole = checkpoints(folder)
    latest = folder / "latest"
    named = latest.read_text().strip() if latest.is_file() else ""
    if whole and whole[-1].name != named:
        found[UNNAMED] = {whole[-1].stat().st_ino}
    for name in _hidden(folder, ".tmp"):
        kind = CUT if name.startswith(".step-") else CUT_POINTER
        found.setdefault(kind, set()).add((folder / name).stat().st_ino)
    for name in _hidden(folder, ".old"):
        found.setdefault(CUT_DELETING, set()).add((folder / name).stat().st_ino)
    return found


def _hidden(folder: Path, ending: str) -> list[str]:
    if not folder.is_dir():
        return []
    names = os.listdir(folder)  # noqa: PTH208 – a thousand times a second
    return [name for name in names if name.startswith(".") and name.endswith(ending)]


def _named(folder: Path) -> int:
    """Which file ``latest`` is: it is replaced, never changed."""
    try:
        return (folder / "latest").stat().st_ino
    except FileNotFoundError:
        return 0
