"""The files a run could not use: one line of JSON each, in the run's folder.

A file that cannot be read, or is no image, is tried again in the next epoch: storage recovers, and
people repair files. One that only the decoder refuses costs a batch's decoding every time, so it is
not tried again, in a resumed run neither; take its line out of the file to have it tried.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mentorch.engine.files import whole_lines


@dataclass(frozen=True)
class Unusable:
    """A file that was left out, once or for good.

    Attributes:
        set: "train", or the name of a validation set.
        sample_id: row of the set's index.
        path: relative to the index's root.
        reason: a phrase.
        refused: True when the decoder refused it, False when it could not even be read.
    """

    set: str
    sample_id: int
    path: str
    reason: str
    refused: bool


class Quarantine:
    """All files that any rank of a run could not use.

    Args:
        path: the file of a run that goes on is read; new lines are appended.
        write: True on the rank that writes.

    Raises:
        ValueError: the file has a line that is none of ours.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self._write = path, write
        self.found: dict[tuple[str, int], Unusable] = {}
        if path.is_file():
            lines, torn = whole_lines(path)
            if torn and write:  # the run was killed while it wrote this line
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.found = {(u.set, u.sample_id): u for u in map(self._parse, lines)}

    def _parse(self, line: str) -> Unusable:
        try:
            return Unusable(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.path} has a line that is no record of a quarantined file ({error}): {line}"
            ) from error

    def refused(self, name: str) -> dict[int, str]:
        """What the decoder is known to refuse of a set: reason by sample id."""
        mine = (u for u in self.found.values() if u.set == name and u.refused)
        return {u.sample_id: u.reason for u in mine}

    def add(self, found: Iterable[Unusable]) -> None:
        """Notes files; those known already leave no second line."""
        new = {(u.set, u.sample_id): u for u in found}
        lines = [json.dumps(asdict(new[k]), ensure_ascii=False) for k in new if k not in self.found]
        self.found = new | self.found
        if lines and self._write:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")


def beyond_chance(unusable: float, rows: float, allowed: float) -> bool:
    """Whether more is unusable than allowed, by more than few rows may show by chance.

    Args:
        unusable: share of the rows seen.
        rows: how many these are.
        allowed: share that may be.
    """
    return unusable > allowed + 4 * math.sqrt(allowed * (1 - allowed) / max(rows, 1))  # 4 sigma
