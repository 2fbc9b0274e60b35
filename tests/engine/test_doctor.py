"""`mentorch doctor`: every row is a finding, whatever the machine is like; nothing is a traceback.

Checks run here as they do there, in forked processes, so what a test patches holds in them too.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mentorch.engine import cli, doctor_checks, doctor_gpu, doctor_trials
from mentorch.engine import doctor as command
from mentorch.engine.doctor import Check, examine, run_checks, table
from mentorch.engine.doctor_checks import Finding

FINE = Finding("fine", "ok", "all well")


def by_name(rows):
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


@pytest.fixture
def few_checks(monkeypatch):
    """The doctor with these checks alone; returns what sets them."""

    def put(*checks):
        monkeypatch.setattr(command, "basics", lambda out: list(checks))
        monkeypatch.setattr(command, "tries", lambda full: [])

    return put


def distribution(folder: Path, name: str, version: str) -> None:
    """What importlib.metadata finds of an installed package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


# ---- Running ------------------------------------------------------------------------------------


def raises() -> list[Finding]:
    raise RuntimeError("first line\nsecond line")


def exits() -> list[Finding]:
    sys.exit("no")


def crashes() -> list[Finding]:
    print("what it said last", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hangs() -> list[Finding]:
    time.sleep(45)
    return []


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (raises, "RuntimeError: first line"),
        (exits, "SystemExit: no"),
        (crashes, "its process died: SIGSEGV. what it said last"),
        (hangs, "did not end within 0.5 s"),
    ],
)
def test_a_check_that_fails_is_a_row_and_the_others_go_on(run, found):
    failing = Check("failing", run, "do this", limit_s=0.5 if run is hangs else 60.0)
    started = time.monotonic()
    rows = run_checks([failing, Check("fine", lambda: [FINE], "")])
    assert time.monotonic() - started < 30  # nothing waits for what hangs
    assert rows == [Finding("failing", "bad", found, "do this"), FINE]


def test_what_a_hanging_check_started_ends_with_it(tmp_path):
    """Compilers and the like: a process of a process must not stay."""
    written = tmp_path / "pid"

    def starts_another():
        child = os.fork()
        if child:
            written.write_text(str(child))
        return hangs()

    # Time enough to fork; the row comes when the limit does.
    (row,) = run_checks([Check("hangs", starts_another, "do this", limit_s=2.0)])
    assert row.status == "bad"
    pid, deadline = int(written.read_text()), time.monotonic() + 10
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)


def test_nothing_is_said_beside_the_table(capfd, few_checks):
    def chatters():
        os.system("echo noise; echo noise >&2")
        return [FINE]

    few_checks(Check("fine", chatters, ""))
    assert command.doctor() == 0
    assert "noise" not in "".join(capfd.readouterr())


def test_without_torch_only_what_needs_it_is_left_out(monkeypatch, few_checks):
    few_checks(Check("fine", lambda: [FINE], ""))
    monkeypatch.setattr(command, "tries", lambda full: [Check("GPU", raises, "")])
    monkeypatch.setattr(doctor_trials, "import_torch", crashes)
    rows = by_name(examine(Path("runs"), False))
    assert [rows[name].status for name in ("import torch", "fine", "GPU")] == [
        "bad",
        "ok",
        "absent",
    ]


# ---- Telling ------------------------------------------------------------------------------------

BAD = Finding("broken", "bad", "found this", "do that")
WARN = Finding("odd", "warn", "found this", "do that")
ABSENT = Finding("none", "absent", "found nothing", "need not be")


@pytest.mark.parametrize(
    ("row", "status"), [(FINE, 0), (WARN, 0), (ABSENT, 0), (BAD, 1)], ids=lambda x: str(x)[:20]
)
def test_only_bad_is_a_failure(row, status, few_checks, monkeypatch, capsys):
    few_checks(Check(row.name, lambda: [row], ""))
    monkeypatch.setattr(sys, "argv", ["mentorch", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert row.found in capsys.readouterr().out


def test_json_has_every_row(few_checks, capsys):
    few_checks(*[Check(row.name, lambda row=row: [row], "") for row in (FINE, BAD, WARN, ABSENT)])
    assert command.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [row["name"] for row in told["rows"]] == [
        "import torch",
        "fine",
        "broken",
        "odd",
        "none",
    ]
    assert told["rows"][2] == {
        "name": "broken", "status": "bad", "found": "found this", "way_out": "do that"
    }  # fmt: skip


def test_the_table_is_aligned_plain_text_with_the_way_out_below():
    lines = table([FINE, BAD, WARN], 1.25).splitlines()
    assert lines == [
        "ok      fine    all well",
        "bad     broken  found this",
        "                -> do that",
        "warn    odd     found this",
        "                -> do that",
        "1 ok, 1 warn, 1 bad, 0 absent; 1.2 s",
    ]


def test_the_doctor_starts_where_the_libraries_of_training_are_missing(tmp_path):
    """`python -m mentorch.engine.doctor` must get as far as saying what is missing."""
    program = (
        "import sys\n"
        "class Refuses:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'tyro', 'cattrs', 'numpy', 'nvidia', 'timm'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Refuses())\n"
        "from mentorch.engine.doctor import main\n"
        "sys.exit(main(['--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["import torch"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert rows["process group"]["status"] == "absent"
    assert rows["python"]["status"] == "ok"


# ---- Versions and this installation -------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "floor", "status"),
    [
        ("2.11.0+cu130", "2.11", "ok"),  # a local label
        ("2.9.1", "2.11", "bad"),  # older, though greater as text
        ("3", "2.11", "ok"),
        (None, "2.11", "absent"),
    ],
)
def test_versions_are_compared_as_numbers(version, floor, status, tmp_path, monkeypatch):
    if version:
        distribution(tmp_path, "some-package", version)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = doctor_checks.package("some-package", floor, needed=False)
    assert row.status == status
    assert status == "ok" or "./setup" in row.way_out


def test_floors_are_those_of_our_metadata():
    rows = by_name(doctor_checks.packages())
    assert {"torch", "triton", "numpy", "safetensors", "timm", "pyarrow"} <= set(rows)
    assert "pytest" not in rows  # of the extra "dev"


def test_python_older_than_the_floor(monkeypatch):
    monkeypatch.setattr(doctor_checks.platform, "python_version", lambda: "3.9.18")
    assert doctor_checks.python()[0].status == "bad"


def test_parts_of_two_installations_are_told(monkeypatch, tmp_path):
    real = doctor_checks._folder_of
    other = {"mentorch.kernels": tmp_path / "mentorch" / "kernels"}
    monkeypatch.setattr(doctor_checks, "_folder_of", lambda name: other.get(name) or real(name))
    (row,) = doctor_checks.installation()
    assert row.status == "bad"
    assert str(tmp_path) in row.found


def test_standing_in_another_checkout_is_told(monkeypatch, tmp_path):
    (tmp_path / "mentorch").mkdir()
    (tmp_path / "mentorch" / "__init__.py").touch()
    assert doctor_checks.installation()[0].status == "ok"
    monkeypatch.chdir(tmp_path)
    assert doctor_checks.installation()[0].status == "warn"


def test_our_kernels_under_hugging_faces_name(monkeypatch, tmp_path):
    """With the repository's root on the path `import kernels` would be ours."""
    ours = Path(doctor_checks.__file__).resolve().parents[1]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor_checks.kernels_name()[0].status == "ok"  # Hugging Face's
    monkeypatch.syspath_prepend(str(ours))
    (row,) = doctor_checks.kernels_name()
    assert (row.status, row.found) == ("warn", f"{ours / 'kernels'}, ours")


# ---- The machine --------------------------------------------------------------------------------


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    row = doctor_checks.compiler()[0]
    assert (row.status, row.found) == ("warn", "no g++ or clang++")
    assert "apt-get install g++" in row.way_out


def cgroups(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor_checks, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    lines = "4:memory:/job\n1:cpu,cpuacct:/job\n0::/job/step\n"
    read = Path.read_text
    text = {"/proc/self/cgroup": lines}
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: text.get(str(self)) or read(self, **how)
    )


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"job/cpu.max": "250000 100000\n", "job/step/cpu.max": "max 100000\n"}, "gives 2.5"),
        ({"cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
          "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, "gives 3"),  # version 1
        ({"job/cpu.max": "max 100000\n"}, None),
        ({"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
          "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, None),
    ],
    ids=["v2, of the group around", "v1", "v2, none", "v1, none"],
)  # fmt: skip
def test_a_cgroup_that_gives_fewer_cores(files, found, tmp_path, monkeypatch):
    cgroups(tmp_path, monkeypatch, files)
    (row,) = doctor_checks.cores()
    assert row.status == ("warn" if found else "ok")
    assert found is None or found in row.found


def test_a_cgroup_with_little_memory(tmp_path, monkeypatch):
    cgroups(tmp_path, monkeypatch, {"job/memory.max": f"{2**30}\n"})
    (row,) = doctor_checks.memory()
    assert (row.status, row.found) == ("warn", "1.0 GiB available of 1.0")


def test_an_out_folder_that_is_not_there_yet_is_tried_and_not_made(tmp_path):
    (row,) = doctor_checks.out_folder(tmp_path / "a" / "runs")
    assert row.status in ("ok", "warn")  # the disk may be full
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "runs"])
def test_an_out_folder_that_is_a_file(below, tmp_path):
    """What a permission would do, and holds for root too."""
    (tmp_path / "file").touch()
    (row,) = doctor_checks.out_folder(tmp_path / "file" / below)
    assert row.status == "bad"
    assert "cannot be written" in row.found


# ---- What is tried ------------------------------------------------------------------------------


def test_the_registrys_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    # In a process of its own, because timm, where it is installed, imports whatever has that name.
    (row,) = run_checks([Check("apex", doctor_trials.apex, "do this")])
    assert row.status == "warn"
    assert "pip uninstall apex" in row.way_out


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (["nvidia-dali"], {"nvidia-dali": "bad", "DALI": "absent"}),
        ([], {"DALI": "absent"}),
        (["nvidia-dali", "nvidia-dali-cuda130"], {"nvidia-dali": "warn", "DALI": "ok"}),
    ],
)
def test_the_dali_that_is_none(installed, expected, tmp_path, monkeypatch):
    for name in installed:
        distribution(tmp_path, name, "2.4.0")
    find = doctor_trials.metadata.distributions
    monkeypatch.setattr(doctor_trials.metadata, "distributions", lambda: find(path=[str(tmp_path)]))
    monkeypatch.setattr(doctor_trials.metadata, "version", lambda name: "2.4.0")
    monkeypatch.setattr(doctor_trials, "_decoding", list)
    rows = by_name(doctor_trials.dali())
    assert {name: row.status for name, row in rows.items()} == expected


def test_pixels_that_are_off(monkeypatch):
    assert doctor_trials.decoding_error(torch.device("cpu")) <= 1
    monkeypatch.setattr(doctor_trials, "decoding_error", lambda device: 9)
    assert doctor_trials._decoding()[0].status == "bad"


def test_no_gpu(monkeypatch):
    """Nothing of it is bad: the engine runs on CPUs."""
    absent = Finding("driver", "absent", "none", "none is needed")
    monkeypatch.setattr(doctor_gpu, "driver", lambda: [absent])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = by_name([*doctor_gpu.cuda(), *doctor_gpu.reweight_kernel()])
    assert (rows["GPU"].status, rows["fused loss"].status) == ("absent", "absent")


@pytest.mark.parametrize(("gpu", "status"), [("ok", "bad"), ("absent", "warn")])
def test_a_torch_without_cuda(gpu, status, monkeypatch):
    """Beside a GPU it is what is wrong; without one it only keeps torchvision from importing."""
    row = Finding("driver", gpu, "found", "" if gpu == "ok" else "none is needed")
    monkeypatch.setattr(doctor_gpu, "driver", lambda: [row])
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "init", raises)
    rows = by_name(doctor_gpu.cuda())
    assert rows["torch build"].status == status
    assert rows["GPU"].status == ("bad" if gpu == "ok" else "absent")


def test_the_fused_losss_error_is_seen(monkeypatch):
    """The comparison itself, of the definition in fp32; and with weights that are wrong."""
    from mentorch.kernels import reweight as module

    assert doctor_gpu.reweight_error(torch.device("cpu")) <= doctor_gpu._ERROR
    right = module.reweight

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return out._replace(sample_weight=out.sample_weight * 1.001)

    monkeypatch.setattr(module, "reweight", wrong)
    assert doctor_gpu.reweight_error(torch.device("cpu")) > doctor_gpu._ERROR


def test_this_machine(tmp_path):
    """All of it, once, started as people start it: a process that has run nothing else, whose
    forks find no lock held by a thread of an earlier test. Nothing is left behind."""
    program = "import sys; from mentorch.engine.doctor import main; sys.exit(main(['--json']))"
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.stdout, done.stderr.decode()
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert {"Triton kernel", "JPEG on the CPU", "process group", "--out runs"} <= set(rows)
    assert [row for row in rows.values() if row["status"] == "bad"] == []
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_this_gpu():
    rows = by_name([*doctor_gpu.driver(), *doctor_gpu.cuda(), *doctor_gpu.triton_kernel()])
    assert {row.status for row in rows.values()} <= {"ok", "warn"}
    assert doctor_gpu.reweight_kernel()[0].status == "ok"
    assert doctor_trials.decoding_error(torch.device("cuda:0")) <= 1
