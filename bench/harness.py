"""A benchmark session: builds, checks and times rows, and keeps what came out.

A subject is a bench file: ``inputs(row, device, seed)``, ``setup(row, inputs)`` → `peers.Call`, and
``reference(row, inputs)``, the float64 outputs that every provider is checked against before its
first sample.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import rows
import torch
from clocks import DeviceClock, HostClock
from peers import Call, why_missing
from rows import Row
from torch import Tensor

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # ‖out − ref‖ / ‖ref‖
_PACKAGES = ("torch", "triton", "mentorch", "liger-kernel", "quack-kernels")


class LeftOut(Exception):
    """A row that is not measured; the message says why."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy of the tree without its history
    return done.stdout.strip()


def origin(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """Versions of the packages that are installed, the date and the commit."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        **{package: found for package in packages if (found := _version(package))},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": f"{commit} with changes" if commit and changed else commit,
    }


def facts(clock: Any) -> dict[str, Any]:
    """What is the same for all rows of a session."""
    on_gpu = clock.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "l2_bytes": clock.l2_bytes,
        "copy_gb_s": clock.copy_bytes_a_us() / 1e3 if clock.measures else None,
        "cuda": torch.version.cuda,
        **origin(),
    }


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖; of two zeros 0."""
    difference = (out.double() - exact.double()).norm()
    norm = exact.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


class Session:
    """Measures rows one after another, until the time is up.

    Args:
        clock: a `DeviceClock`, `HostClock`, or a stand-in with their attributes.
        budget_s: no row is begun after so many seconds.
    """

    def __init__(self, clock: Any, budget_s: float = float("inf")) -> None:
        self.clock = clock
        self.end = time.monotonic() + budget_s
        self.budget_s = budget_s
        self.facts = facts(clock)
        self.records: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self._cell: Any = None
        self._sets: list[Any] = []
        self._checked: dict[Any, float] = {}

    @property
    def on_gpu(self) -> bool:
        return self.clock.device.type == "cuda"

    def measure(
        self, row: Row, subject: ModuleType, benchmark: Any, tolerance: float | None
    ) -> None:
        """Times a row through pytest-benchmark; raises LeftOut where that cannot be."""
        try:
            self._refuse(row)
            calls, error = self._calls(row, subject, tolerance)
            sampler = self._sampler(row, calls)
            rounds = sampler.rounds() if self.clock.measures else 3
            benchmark.pedantic(sampler.sample, setup=sampler.prepare, rounds=rounds)
        except Exception as problem:
            reason = str(problem) if isinstance(problem, LeftOut) else f"FAILED: {problem!r}"
            self.left_out.append({**_columns(row), "reason": reason})
            raise
        self.records.append(self._record(row, sampler, error))
        benchmark.extra_info.update(self.records[-1] | self.facts)

    def _refuse(self, row: Row) -> None:
        if time.monotonic() > self.end:
            raise LeftOut(f"the time budget of {self.budget_s:.0f} s is spent")
        if missing := why_missing(row.provider, self.on_gpu):
            raise LeftOut(missing)
        if self.clock.measures and 64 * row.batch * row.classes > 0.9 * self.clock.memory_bytes:
            raise LeftOut("its float64 check does not fit into the device's memory")

    def _inputs(self, row: Row, subject: ModuleType, count: int) -> list[Any]:
        if row.cell != self._cell:
            self._cell = row.cell
            self._sets.clear()
            self._checked.clear()
            if self.on_gpu:
                torch.cuda.empty_cache()
        for seed in range(len(self._sets), count):
            self._sets.append(subject.inputs(row, self.clock.device, seed))
        return self._sets[:count]

    def _calls(
        self, row: Row, subject: ModuleType, tolerance: float | None
    ) -> tuple[list[Call], float]:
        cold = row.l2 == "cold"
        count = rows.sets_for_cold(row, self.clock.l2_bytes) if cold else 1
        given = self._inputs(row, subject, count)
        try:
            error = self._check(row, subject, given[0], tolerance)
            calls = [subject.setup(row, one) for one in given]
        except Exception as problem:
            if row.provider.startswith("mentorch") or isinstance(problem, AssertionError):
                raise
            raise LeftOut(
                f"{row.provider} failed: {type(problem).__name__}: {problem}"
            ) from problem
        steps = rows.calls_of_a_sample(row, self.clock.l2_bytes) if self.clock.measures else 1
        return (calls * -(-steps // len(calls)))[:steps], error

    def _sampler(self, row: Row, calls: list[Call]) -> Any:
        keep = row.l2 == "cold" and len(set(map(id, calls))) > 1
        try:
            return self.clock.sampler(calls, row.mode, keep)
        except Exception as problem:
            if row.provider.startswith("mentorch"):
                raise
            name = type(problem).__name__
            raise LeftOut(f"{row.provider}: no CUDA graph: {name}: {problem}") from problem

    def _check(self, row: Row, subject: ModuleType, given: Any, tolerance: float | None) -> float:
        """The largest relative error of a provider's outputs, once for each size."""
        key = row.provider, row.curriculum
        if key not in self._checked:
            exact = subject.reference(row, given)
            call = subject.setup(row, given)
            call.restore()
            out = call.run()
            errors = [relative_error(o, e) for o, e in zip(out, exact, strict=True)]
            allowed = TOLERANCE[row.dtype] if tolerance is None else tolerance
            # One by one: NaN fails a comparison, but max() may pass it over.
            assert all(e <= allowed for e in errors), f"{row}: errors {errors}, allowed {allowed}"
            self._checked[key] = max(errors)
        return self._checked[key]

    def _record(self, row: Row, sampler: Any, error: float) -> dict[str, Any]:
        record = {
            **_columns(row),
            **sampler.summary(),
            "ideal_bytes": row.ideal_bytes,
            "traffic_bytes": row.traffic_bytes,
            "error": error,
        }
        if self.clock.measures:
            launches = self.clock.empty_launches_us(row.launches, row.mode)
            moving = row.ideal_bytes / self.clock.copy_bytes_a_us()
            record["floor_us"] = max(launches, moving)
            record["floor_is"] = "launches" if launches > moving else "bytes"
            record["ratio_to_floor"] = record["median_us"] / record["floor_us"]
        return record

    def write(self, folder: Path = RESULTS) -> list[Path]:
        """One file a subject, device and day, unless some of the subject's rows were not asked
        for."""
        folder.mkdir(exist_ok=True)
        device = "-".join(self.facts["device"].lower().split())
        written = []
        for subject in sorted({record["subject"] for record in self.records}):
            seen = [r for r in self.records + self.left_out if r["subject"] == subject]
            if len(seen) < len(rows.gpu_rows(subject, self.clock.l2_bytes)):
                continue  # a part must not take the place of a whole run of the same day
            path = folder / f"{subject}-{device}-{self.facts['date']}.json"
            result = {
                **self.facts,
                "subject": subject,
                "rows": [r for r in self.records if r["subject"] == subject],
                "left_out": [r for r in self.left_out if r["subject"] == subject],
            }
            path.write_text(json.dumps(result, indent=1) + "\n")
            written.append(path)
        return written


def _columns(row: Row) -> dict[str, Any]:
    return {
        "subject": row.subject,
        "provider": row.provider,
        "curriculum": row.curriculum,
        "batch": row.batch,
        "classes": row.classes,
        "dtype": row.dtype,
        "mode": row.mode,
        "l2": row.l2,
    }


def new_session(budget_s: float) -> Session:
    """A session on the GPU, or a smoke test where there is none."""
    if not torch.cuda.is_available():
        return Session(HostClock())
    return Session(DeviceClock(), budget_s)
