"""What a run has reached: last and best accuracy on each validation set."""

from dataclasses import asdict, dataclass, field

from mentorch.engine.evaluate import Accuracy


@dataclass
class Scores:
    """Last and best accuracy on each validation set."""

    last: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    best_checkpoint: str | None = None

    def add(self, name: str, accuracy: Accuracy, epoch: int) -> bool:
        """Notes a result; True when it is the best of its set so far."""
        row = {"epoch": epoch, **asdict(accuracy)}
        self.last[name] = row
        if name in self.best and accuracy.top1 <= self.best[name]["top1"]:
            return False
        self.best[name] = row
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
