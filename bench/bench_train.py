"""Images a second of whole training steps, beside timm's loop, eager and compiled.

    pytest bench/bench_train.py                          # all: results/ and RESULTS.md
    pytest bench/bench_train.py -k end_to_end            # from JPEG files
    pytest bench/bench_train.py -k "not end_to_end" --bench-part eager       # each of these three
    pytest bench/bench_train.py -k "not end_to_end" --bench-part compiled    # < 10 min on an H100
    pytest bench/bench_train.py --bench-quick            # a smoke of minutes, nothing is written
    pytest bench/bench_train.py --bench-plan -q          # which processes an H100 would run

Its figures are written without a GPU too, of smaller sizes (`train_subjects`): other work on the
machine spoils them. A process that runs longer than `fresh.LIMIT_S` is left out.
"""

import shutil
import time
from dataclasses import asdict

import data_session
import fresh
import photographs
import pytest
import torch
import train_report
import train_subjects
from harness import LeftOut

from mentorch.engine.data.folder import index_folder

QUICK_ROUNDS, QUICK_SAMPLE_S = 2, 0.0
IMAGES, QUICK_IMAGES = 1024, 64
END_ENGINES = ("eager", "compile-graph")
END_STEPS_ON_GPU, END_STEPS_ON_CPU = 20, 2


def _quick(config):
    return config.getoption("--bench-quick")


def step_groups(config):
    """The processes of this machine, or those of an H100 for a plan."""
    on_gpu = torch.cuda.is_available() or config.getoption("--bench-plan")
    if not _quick(config):
        subjects = train_subjects.ON_GPU if on_gpu else train_subjects.ON_CPU
        return train_subjects.groups(subjects, config.getoption("--bench-part"))
    # Compiling alone would take longer than a minute.
    return train_subjects.groups(train_subjects.QUICK, "eager")


def _why_missing(model, engine):
    compiler = any(map(shutil.which, ("g++", "clang++")))
    has_gpu = torch.cuda.is_available()
    return train_subjects.why_missing(model, engine, has_gpu=has_gpu, has_compiler=compiler)


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        metafunc.parametrize("group", step_groups(metafunc.config), ids=str)


class Session(data_session.Session):
    """A run of processes that measure several providers each.

    Args:
        config: says whether the run is a quick one, and after how many seconds nothing is begun.
        rest: what `data_session.Session` takes.
    """

    def __init__(self, config, *rest):
        super().__init__(*rest)
        self.quick, self.budget_s = _quick(config), config.getoption("--bench-budget-s")
        self.end = time.monotonic() + self.budget_s
        self.absent = {}  # reasons by provider, of processes that ran without it

    def measure_group(self, group, benchmark):
        """Measures a process, less the providers that cannot be had here."""
        model = group.subject.model
        missing = {p: _why_missing(model, train_subjects.split(p)[1]) for p in group.providers}
        able = [provider for provider in group.providers if not missing[provider]]
        if len(able) > 1:  # else the whole process has that reason
            mine = {f"{group.subject.name}/{p}": why for p, why in missing.items() if why}
            self.absent.update(mine)
        self.measure_or_skip(
            str(group),
            "" if len(able) > 1 else next(filter(None, missing.values())),
            benchmark,
            subject=asdict(group.subject),
            providers=able,
            budget_s=max(0.0, self.end - time.monotonic()),
        )

    def measure_or_skip(self, name, missing, benchmark, **more):
        """Skips the test, with the reason, where there is no measurement."""
        spent = train_subjects.why_spent(self.end, time.monotonic(), self.budget_s)
        try:
            self.measure(0, name, missing or spent, benchmark, **more)
        except LeftOut as reason:
            benchmark.skipped = True  # or pytest-benchmark warns that it was not used
            pytest.skip(str(reason))

    def measure(self, round_, provider, missing, benchmark, **more):
        # A minute over the budget, or whoever has lent the machine ends the run, and all is lost.
        limit_s = min(fresh.LIMIT_S, max(30.0, self.end + 60 - time.monotonic()))
        try:
            super().measure(round_, provider, missing, benchmark, limit_s=limit_s, **more)
        except fresh.TooLong as problem:  # a compiler's time is no defect of ours
            self.left_out[provider] = str(problem)
            raise LeftOut(str(problem)) from problem
        except fresh.Failed as problem:  # the test fails, and the others' results are written
            self.left_out[provider] = f"FAILED: {problem}"
            raise

    def ours(self, provider):
        return not provider.endswith("/timm-compile")

    def is_whole(self, plan):
        return not self.quick and super().is_whole(plan)

    def result(self):
        """The processes' records in one list, and everything that was left out."""
        found = super().result()
        processes, gone = found["records"], found["left_out"]
        found["records"] = [{"group": p["provider"], **r} for p in processes for r in p["records"]]
        absent = dict(self.absent)
        for process in processes:
            subject = process["provider"].partition("/")[0]
            absent |= {f"{subject}/{name}": why for name, why in process["left_out"].items()}
        found["left_out"] = gone + [{"provider": p, "reason": why} for p, why in absent.items()]
        return found


@pytest.fixture(scope="module")
def steps(request):
    quick = _quick(request.config)
    rounds, sample_s = (
        (QUICK_ROUNDS, QUICK_SAMPLE_S)
        if quick
        else (train_subjects.ROUNDS, train_subjects.SAMPLE_S)
    )
    part = request.config.getoption("--bench-part")
    return Session(
        request.config,
        "train" if part == "all" else f"train-{part}",
        {"rounds": rounds, "seconds a sample": sample_s, "threads of a CPU's operators": 1},
        ("train_measure", "measure"),
        # In bf16 the losses of so few and small images need not agree.
        {"rounds": rounds, "sample_s": sample_s, "precision": "fp32" if quick else "auto"},
    )


def test_step(steps, group, benchmark):
    steps.measure_group(group, benchmark)


def test_step_results_are_written(steps, request):
    plan = [(0, str(group)) for group in step_groups(request.config)]
    steps.finish(plan, request.config)
    if steps.is_whole(plan):
        train_report.plot_all()


@pytest.fixture(scope="module")
def from_files(request, tmp_path_factory):
    """Makes the images and their index."""
    quick, on_gpu = _quick(request.config), torch.cuda.is_available()
    subjects = train_subjects.ON_GPU if on_gpu else train_subjects.ON_CPU
    root = tmp_path_factory.mktemp("photographs")
    size = photographs.write(root, QUICK_IMAGES if quick else IMAGES)
    index_folder(root, workers=0)
    rounds = QUICK_ROUNDS if quick else train_subjects.ROUNDS
    count = 1 if quick else END_STEPS_ON_GPU if on_gpu else END_STEPS_ON_CPU
    return Session(
        request.config,
        "train-end-to-end",
        {"rounds": rounds, "steps a sample": count, "mean bytes a file": size},
        ("train_end_to_end", "measure"),
        {
            "subject": asdict((train_subjects.QUICK if quick else subjects)[0]),
            "index": str(root / "folder.index.parquet"),
            "rounds": rounds,
            "steps": count,
        },
    )


@pytest.mark.parametrize("engine", END_ENGINES)
def test_end_to_end(from_files, engine, benchmark):
    from_files.measure_or_skip(engine, _why_missing(train_subjects.LARGE, engine), benchmark)


def test_end_to_end_results_are_written(from_files, request):
    from_files.finish([(0, engine) for engine in END_ENGINES], request.config)
