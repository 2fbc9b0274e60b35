"""What a run has reached: last and best accuracy on each validation set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KIND = "eval/"
"""Heading of an evaluation among the metrics, before the set's name."""


@dataclass
class Scores:
    """Last and best accuracy on each validation set, made from the lines of metrics."""

    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Scores":
        """From lines of metrics, in order; those of other kinds do not matter."""
        scores = cls()
        for row in rows:
            if row["kind"].startswith(KIND):
                scores.add(row)
        return scores

    def add(self, row: Mapping[str, Any]) -> bool:
        """Notes a line of metrics; True when it is the best of its set so far."""
        name = row["kind"].removeprefix(KIND)
        kept = {key: value for key, value in row.items() if key != "kind"}
        self.last[name] = kept
        if name in self.best and kept["top1"] <= self.best[name]["top1"]:
            return False
        self.best[name] = kept
        return True

    def table(self) -> str:
        """Last and best, a line a set."""
        rows = [
            f"{'validation set':<16}{'images':>8}  last top-1  top-5   best top-1  top-5  (epoch)"
        ]
        for name, last in self.last.items():
            best = self.best[name]
            rows.append(
                f"{name:<16}{last['images']:>8,}  {last['top1']:>10.4f}  {last['top5']:.4f}  "
                f"{best['top1']:>10.4f}  {best['top5']:.4f} ({best['epoch']})"
            )
        return "\n".join(rows)
