"""A run of measurements of the data path: where it was made, its records, its file.

They are not rows of `harness`: there is no batch × classes, no floor, no float64 reference, and
their figures mean something without a GPU. They share the facts, the folder and the report with it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import data_report
import fresh
import pytest
import report
import torch
from harness import RESULTS, LeftOut, origin

Plan = list[tuple[int, str]]  # (round, provider)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def load() -> float:
    """Processes that ran or wanted to, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def device() -> str:
    """The CPU, its cores, and the GPU if there is one."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = f"{names[0] if names else 'unknown CPU'}, {cores()} cores"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu


class Session:
    """Measures providers, each in a fresh process, and keeps what came out.

    Args:
        subject: "loader" or "index".
        work: what is measured, number by name, for the report.
        call: module and function that measure (`fresh.call`), which take a provider.
        arguments: what else the function takes.
    """

    def __init__(
        self, subject: str, work: dict[str, float], call: tuple[str, str], arguments: dict[str, Any]
    ) -> None:
        self.facts = {
            "subject": subject,
            "device": device(),
            **origin(data_report.PACKAGES),
            "work": work,
            "load_before": load(),
        }
        self.call, self.arguments = call, arguments
        self.records: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def measure(
        self, round_: int, provider: str, missing: str, benchmark: Any, **more: Any
    ) -> None:
        """Keeps one measurement, or why there is none.

        Args:
            round_: its number.
            provider: who is measured.
            missing: why it cannot be, or "".
            benchmark: pytest-benchmark's fixture; its time includes the start of the process.
            more: what the function takes for this provider only.

        Raises:
            LeftOut: there is no measurement.
            fresh.Failed: there is none of ours.
        """
        missing = missing or self.left_out.get(provider, "")
        if not missing:
            arguments = {"provider": provider, **self.arguments, **more}
            try:
                found = benchmark.pedantic(fresh.call, args=self.call, kwargs=arguments)
            except fresh.Failed as problem:
                if self.ours(provider):
                    raise
                missing = f"failed: {problem}"
        if missing:
            self.left_out[provider] = missing
            raise LeftOut(missing)
        self.records.append({"provider": provider, "round": round_, **found})
        benchmark.extra_info.update(found)

    def ours(self, provider: str) -> bool:
        """Whether a failure is a defect of this package and no reason to leave a row out."""
        return self.facts["subject"] == "index" or provider.startswith("mentorch")

    def result(self) -> dict[str, Any]:
        """What is written."""
        records = [r for r in self.records if r["provider"] not in self.left_out]
        left_out = [{"provider": name, "reason": why} for name, why in self.left_out.items()]
        return {**self.facts, "load_after": load(), "records": records, "left_out": left_out}

    def is_whole(self, plan: Plan) -> bool:
        """Whether everything planned was measured, or left out for a reason."""
        done = {(record["round"], record["provider"]) for record in self.records}
        return all(row in done or row[1] in self.left_out for row in plan)

    def finish(self, plan: Plan, config: pytest.Config) -> None:
        """Prints the tables, and writes them after a whole run."""
        result = self.result()
        lines = [report.section(result), "not a whole run: nothing is written"]
        if self.is_whole(plan):
            lines[1] = f"written: {write(result)}, {report.write()}"
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", *lines, sep="\n")


def write(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes the result of a run: one file a subject, device and day."""
    folder.mkdir(exist_ok=True)
    name = "-".join(re.findall(r"[a-z0-9]+", result["device"].lower()))
    path = folder / f"{result['subject']}-{name}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
