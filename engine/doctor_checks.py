"""What `mentorch doctor` looks at: versions, this installation, and what the machine offers.

Nothing here needs more than the standard library, so that whatever is missing can be said.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import mentorch

Status = Literal["ok", "warn", "bad", "absent"]

GIB = 2**30
SETUP = "run ./setup in the checkout, or pip install '.[train]'"
_TRITON_FLOOR = "3.6"  # comes with torch, so no metadata name it; Python 3.10 installs it
_CGROUPS = Path("/sys/fs/cgroup")
_LEAST_SHM = GIB  # what NVIDIA advises for NCCL; Docker's own is 64 MiB
_LEAST_MEMORY = 4 * GIB
_LEAST_FREE = 5 * GIB  # some checkpoints of Inception-ResNet-v2: weights, momentum, averages


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table."""

    name: str
    status: Status
    found: str
    """What there is, one line."""
    way_out: str = ""
    """What to do about it, one line; empty where all is well."""

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (not self.way_out), self


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].rstrip(": ")


def installed_version(package: str) -> str | None:
    """A distribution's version; None without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- Versions -----------------------------------------------------------------------------------


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 11, 0) of "2.11.0+cu130"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def python() -> list[Finding]:
    """Python against the floor in our metadata."""
    floor = metadata.metadata("mentorch")["Requires-Python"].removeprefix(">=")
    version = platform.python_version()
    if release(version) < release(floor):
        way_out = f"make the environment with Python {floor} or newer: PYTHON=python3.12 ./setup"
        return [Finding("python", "bad", f"{version}, older than {floor}", way_out)]
    return [Finding("python", "ok", version)]


def packages() -> list[Finding]:
    """What we need (bad without) and what training needs besides (absent without)."""
    rows = [package("triton", _TRITON_FLOOR, needed=False)]
    for requirement in metadata.requires("mentorch") or []:
        found = re.match(r"([\w.-]+)>=([\d.]+)(?:.*extra == [\"'](.+)[\"'])?", requirement)
        if found and found[3] in (None, "train"):
            rows.append(package(found[1], found[2], needed=found[3] is None))
    return rows


def package(name: str, floor: str, needed: bool) -> Finding:
    """A package's version against our floor."""
    version = installed_version(name)
    if version is None:
        return Finding(name, "bad" if needed else "absent", f"needed: {name}>={floor}", SETUP)
    if release(version) < release(floor):
        return Finding(name, "bad", f"{version}, older than {floor}", f"{SETUP}: it brings newer")
    return Finding(name, "ok", version)


# ---- This installation --------------------------------------------------------------------------


def _folder_of(name: str) -> Path | None:
    spec = find_spec(name)
    if spec is None:
        return None
    folders = [*(spec.submodule_search_locations or []), *filter(None, [spec.origin])]
    return Path(folders[0]).resolve() if folders else None


def installation() -> list[Finding]:
    """Our version and commit, and whether what is imported is what it seems to be."""
    home = Path(mentorch.__file__).resolve().parent
    found = f"{mentorch.__version__}{_commit()}, {home}"
    strangers = [
        folder
        for folder in map(_folder_of, ("mentorch.engine", "mentorch.kernels"))
        if folder is None or folder.parent not in (home, home.parent)  # the latter in a checkout
    ]
    if strangers:
        way_out = "take the other one off PYTHONPATH, or pip uninstall it, and run ./setup again"
        return [Finding("mentorch", "bad", f"{found}, but its parts: {strangers[0]}", way_out)]
    installed = installed_version("mentorch")
    if installed != mentorch.__version__:
        found += f"; its metadata say {installed}"
        return [Finding("mentorch", "warn", found, "run ./setup again: it installs anew")]
    here = Path.cwd() / "mentorch"
    if (here / "__init__.py").is_file() and here.resolve() != home:
        way_out = "run .venv/bin/mentorch of the checkout you are in, after ./setup"
        return [Finding("mentorch", "warn", f"{found}, not of this folder's checkout", way_out)]
    return [Finding("mentorch", "ok", found)]


def _commit() -> str:
    try:
        import torch

        from mentorch.engine.telemetry import describe_environment

        environment = describe_environment(torch.device("cpu"))
    except (ImportError, OSError):  # other rows say what is missing or broken
        return ""
    commit, changed = environment["git_commit"], environment["git_changed_files"]
    edits = f" and {len(changed)} changed files" if changed else ""
    return f", commit {commit[:12]}{edits}" if commit else ""


def kernels_name() -> list[Finding]:
    """`import kernels` must be Hugging Face's package or nothing, never a folder of ours."""
    name, found = "import kernels", _folder_of("kernels")
    ours = _folder_of("mentorch.kernels")
    if found is None:
        return [Finding(name, "ok", "nothing, as it should")]
    if (found / "reweight.py").is_file():
        whose = "ours" if found == ours else "of another mentorch"
        way_out = (
            "take the repository's root off PYTHONPATH (say pytest, not python -m pytest): "
            "Transformers would take this folder for Hugging Face's kernels"
        )
        return [Finding(name, "warn", f"{found}, {whose}", way_out)]
    return [Finding(name, "ok", f"Hugging Face's or another, {found}")]


# ---- The machine --------------------------------------------------------------------------------


def compiler() -> list[Finding]:
    """The C++ compiler of torch.compile, and Python's headers for Triton's launcher."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(shlex.split(name)[0]))), None)
    why = "Triton on a GPU and --train.engine compile need it: "
    rows = [Finding("C++ compiler", "ok", f"{found} {_compiler_version(found)}")] if found else []
    if not found:
        way_out = f"{why}apt-get install g++, or point CXX and CC to one"
        rows = [Finding("C++ compiler", "warn", f"no {' or '.join(names)}", way_out)]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        return [*rows, Finding("Python.h", "ok", str(header))]
    way_out = f"{why}apt-get install python{sysconfig.get_python_version()}-dev"
    return [*rows, Finding("Python.h", "warn", f"no {header}", way_out)]


def _compiler_version(path: str) -> str:
    said = subprocess.run(
        [path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
    )
    return said.stdout.strip()


def _limit_files(controller: str, v2_name: str, v1_name: str) -> list[Path]:
    """Where this process's control groups, and those around them, would state a limit."""
    files = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, name = (_CGROUPS / controllers, v1_name) if controllers else (_CGROUPS, v2_name)
        group = root / path.lstrip("/")
        files += [folder / name for folder in (group, *group.parents)]
    return [file for file in files if file.is_relative_to(_CGROUPS) and file.is_file()]


def _cpu_quota(file: Path) -> float | None:
    """Cores' worth of time; None for no limit."""
    words = file.read_text().split()
    if file.name == "cpu.cfs_quota_us":
        words.append(file.with_name("cpu.cfs_period_us").read_text())
    return None if words[0] in ("max", "-1") else int(words[0]) / int(words[1])


def cores() -> list[Finding]:
    """Cores by affinity, which is what the engine counts, and by control group."""
    allowed = len(os.sched_getaffinity(0))
    found = f"{allowed} of {os.cpu_count()}"
    files = _limit_files("cpu", "cpu.max", "cpu.cfs_quota_us")
    quotas = [quota for file in files if (quota := _cpu_quota(file)) is not None]
    if quotas and min(quotas) < allowed:
        quota = max(1, int(min(quotas)))
        way_out = f"threads would be throttled: OMP_NUM_THREADS={quota} and --data.threads {quota}"
        return [Finding("cores", "warn", f"{found}; a cgroup gives {min(quotas):g}", way_out)]
    return [Finding("cores", "ok", found)]


def available_memory() -> tuple[int, int]:
    """Bytes available and in all; of the control group where its limit is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    least, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    for file in _limit_files("memory", "memory.max", "memory.limit_in_bytes"):
        limit = file.read_text().strip()
        if limit.isdecimal():
            total, least = min(total, int(limit)), min(least, int(limit))
    return least, total


def memory() -> list[Finding]:
    """Memory that is available."""
    least, total = available_memory()
    found = f"{least / GIB:.1f} GiB available of {total / GIB:.1f}"
    if least < _LEAST_MEMORY:
        way_out = "end other programs or raise the container's limit (--memory); 4 GiB are little"
        return [Finding("memory", "warn", found, way_out)]
    return [Finding("memory", "ok", found)]


def shared_memory(path: Path = Path("/dev/shm")) -> list[Finding]:
    """/dev/shm, through which NCCL's ranks of one host may talk."""
    size = shutil.disk_usage(path).free
    found = f"{size / GIB:.2f} GiB free"
    if size < _LEAST_SHM:
        way_out = "several GPUs of a host need it for NCCL: docker run --shm-size=1g or --ipc=host"
        return [Finding(str(path), "warn", found, way_out)]
    return [Finding(str(path), "ok", found)]


def out_folder(out: Path) -> list[Finding]:
    """Whether runs can be written there; tried with a temporary folder, and ``out`` is not made."""
    name, out = f"--out {out}", out.absolute()
    nearest = next(folder for folder in (out, *out.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest) as folder:
            (Path(folder) / "probe").write_bytes(b"x" * 4096)
    except OSError as error:
        found = f"{nearest} cannot be written: {error.strerror}"
        return [Finding(name, "bad", found, "name another folder with --out, or free this one")]
    free = shutil.disk_usage(nearest).free
    found = f"{nearest} can be written, {free / GIB:.0f} GiB free"
    if free < _LEAST_FREE:
        way_out = "checkpoints need space: free some, or name a folder elsewhere with --out"
        return [Finding(name, "warn", found, way_out)]
    return [Finding(name, "ok", found)]
