"""What a run tells: its folder, its metrics (JSON lines, TensorBoard), its progress on screen."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mentorch
from mentorch.engine.files import replace_text

_PACKAGES = (
    "torch", "triton", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
    "numpy", "pyarrow", "safetensors",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None  # installed, not a checkout
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and device: what one must know to repeat a run."""
    return {
        "mentorch": mentorch.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain") or "").splitlines(),
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name))},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


class Telemetry:
    """Metrics of a run, written by the main rank; on the other ranks every method does nothing.

    Args:
        folder: the run folder.
        enabled: True on the main rank.
        start_step: steps already taken; metrics of later steps, which a broken-off run may have
            left, are taken out.
        total_steps: of training, for the time that is left.
    """

    def __init__(self, folder: Path, enabled: bool, start_step: int, total_steps: int) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self.kept: list[dict[str, Any]] = []
        """Lines of metrics that a run which goes on has written before."""
        if not enabled:
            return
        self._path = folder / "metrics.jsonl"
        self.kept = self._drop_after(start_step)
        self._file = self._path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._board: SummaryWriter | None = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_step + 1
        )
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._time, self._step = time.monotonic(), start_step

    def _drop_after(self, step: int) -> list[dict[str, Any]]:
        """Takes later lines out of the file, and one that a crash has cut; returns the others."""
        if not self._path.is_file():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        kept = [row for row in rows if row["step"] <= step]
        replace_text(self._path, "".join(map(_line, kept)))
        return kept

    def restart_clock(self) -> None:
        """Leaves what happened since the last line of metrics (an evaluation) out of the speed."""
        if self.enabled:
            self._time = time.monotonic()

    def speed(self, step: int, images_per_step: int) -> dict[str, float]:
        """Images a second and seconds left, since the last call."""
        if not self.enabled:
            return {}
        now = time.monotonic()
        seconds, steps = max(now - self._time, 1e-9), step - self._step
        self._time, self._step = now, step
        left = (self.total_steps - step) * seconds / max(steps, 1)
        return {"images_per_s": steps * images_per_step / seconds, "eta_s": left}

    def log(self, step: int, kind: str, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Writes metrics of a step under a heading ("train", "eval/…"); returns the line.

        While the disk is full lines are kept, and written when there is room again.
        """
        row = {"step": step, "kind": kind, **metrics}
        if self.enabled:
            self._unwritten.append(_line(row).encode())
            self._write()
            self._to_board(step, kind, metrics)
        return row

    def _write(self) -> None:
        while self._unwritten:
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = self._file.write(self._unwritten[0])
            except OSError as error:
                self._say_once(f"{self._path} cannot be written for now: {error}")
                return
            if written < len(self._unwritten[0]):  # no half lines
                self._file.truncate(end)
                self._say_once(f"{self._path} cannot be written for now: no space left")
                return
            self._unwritten.pop(0)

    def _to_board(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        def write(board: SummaryWriter) -> None:
            for name, value in metrics.items():
                board.add_scalar(f"{kind}/{name}", value, step)

        self.on_board(write)

    def on_board(self, write: Callable[[SummaryWriter], None]) -> None:
        """Lets a function write to TensorBoard, as long as that can be written."""
        if not self.enabled or self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:  # its writing thread has died of it, for good
            self._board = None
            self.say(f"no TensorBoard from here: {error}; metrics.jsonl goes on")

    def _say_once(self, text: str) -> None:
        if len(self._unwritten) == 1:
            self.say(text)

    def to_disk(self) -> None:
        """What is written so far survives a power cut; a checkpoint relies on it."""
        if self.enabled:
            os.fsync(self._file.fileno())

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar."""
        if self.enabled:
            self._bar.update(steps)

    def say(self, text: str) -> None:
        """Prints a line without tearing the progress bar."""
        if self.enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flushes everything."""
        if self.enabled:
            self._bar.close()
            self._write()
            self._file.close()
            if self._board is not None:
                with contextlib.suppress(OSError):
                    self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
