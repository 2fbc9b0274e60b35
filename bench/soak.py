"""Does a run survive kill −9? Small runs on two cores, killed at random, compared to the last bit.

    python bench/soak.py kills --kills 100 --ranks 2        # kills ranks, starts the run again
    python bench/soak.py restarts --kills 20 --ranks 2      # torchrun starts it again

Weights, averaged weights, ledger, optimiser, random states, sample order and metrics of every run
must be those of a run that was left alone. The exit status is 1 at the first difference, and the
folder stays to be looked at. Results go to bench/results/soak/ (times are upper bounds if something
else runs meanwhile; nothing here says anything about GPUs).
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro
from soak_kills import Soak
from soak_restarts import Restarts
from soak_runs import SoakFailed

from mentorch.engine.cli import run_cleanly
from mentorch.engine.telemetry import describe_environment

RESULTS = Path(__file__).parent / "results" / "soak"


def kills(
    kills: int = 100,
    ranks: int = 2,
    seed: int = 0,
    minutes: float = 60,
    out: Path | None = None,
    results: Path = RESULTS,
) -> int:
    """Kills ranks of a run, or all, at random moments, and has it go on, until it is finished.

    Args:
        kills: how many, over as many runs as it takes.
        ranks: of each run.
        seed: of the moments, and of the runs.
        minutes: no more kills after that; the run at hand is finished.
        out: a folder to be made for the runs; otherwise a temporary one.
        results: folder for the figures, kills.json.
    """
    return _soak("kills", results, out, minutes, (kills, ranks, seed), Soak)


def restarts(
    kills: int = 20,
    ranks: int = 2,
    seed: int = 0,
    minutes: float = 60,
    out: Path | None = None,
    results: Path = RESULTS,
) -> int:
    """Kills workers of torchrun, which starts them again.

    Args:
        kills: how many, one after every start.
        ranks: of the run.
        seed: of the moments, and of the run.
        minutes: after that the soak has failed.
        out: a folder to be made for the run; otherwise a temporary one.
        results: folder for the figures, restarts.json.
    """
    return _soak("restarts", results, out, minutes, (kills, ranks, seed), Restarts)


def _soak(
    name: str,
    results: Path,
    out: Path | None,
    minutes: float,
    plan: tuple[int, int, int],
    kind: Callable[..., Any],
) -> int:
    if out is not None and out.exists():
        raise ValueError(f"--out: {out} exists already; name a folder that can be made")
    if min(plan[:2]) < 1 or minutes <= 0:
        raise ValueError(f"kills {plan[0]}, ranks {plan[1]}, minutes {minutes}: must be above 0")
    folder = out or Path(tempfile.mkdtemp(prefix=f"soak-{name}-"))
    before = {"environment": _environment(), "load_before": os.getloadavg()[0]}
    started = time.monotonic()
    try:
        report = kind(folder.resolve(), *plan, end=started + 60 * minutes).run()
    except SoakFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report["took_s"] = time.monotonic() - started
    print(_table(report))
    _write(results / f"{name}.json", name, before | report)
    shutil.rmtree(folder)
    if report["kills"] < plan[0]:
        print(f"error: {minutes} minutes were not enough for {plan[0]} kills", file=sys.stderr)
    return int(report["kills"] < plan[0])


def _write(path: Path, name: str, report: dict[str, Any]) -> None:
    """Puts a result into a file, beside those of other numbers of ranks."""
    file = json.loads(path.read_text()) if path.is_file() else {"subject": f"soak {name}"}
    file[f"{report['ranks']} ranks"] = report
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(file, indent=2) + "\n")


def _environment() -> dict[str, Any]:
    here = {"date": date.today().isoformat(), "cores": os.cpu_count()}
    return here | describe_environment(torch.device("cpu"))


def _table(report: dict[str, Any]) -> str:
    rows = []
    for name, value in report.items():
        several = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name} {key}".strip().replace("_", " "), v) for key, v in several]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{n:{width}}  {_short(v)}" for n, v in rows)


def _short(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> int:
    """What the command line asks for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the ranks
    app = tyro.extras.SubcommandApp()
    app.command(kills)
    app.command(restarts)
    return int(app.cli(description=__doc__) or 0)


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
