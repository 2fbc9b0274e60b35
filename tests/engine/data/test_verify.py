"""Many images at once: workers, the journal, and workers that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mentorch.engine.data import verify
from mentorch.engine.data.index import STATUSES
from mentorch.engine.data.journal import Journal, known_from
from mentorch.engine.data.probe import Probe
from mentorch.engine.data.verify import CHUNK, verify_images


@pytest.fixture
def many(put, tmp_path):
    """Four chunks of images, one of them broken and one missing."""
    n = 4 * CHUNK - 3
    paths = [f"{k:04d}.jpg" for k in range(n)]
    for path in paths:
        put(path)
    put(paths[70], "<html>")
    (tmp_path / paths[200]).unlink()
    return tmp_path, pa.array(paths)


def _statuses(verified):
    return [STATUSES[k] for k in verified.status]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_result_is_in_its_row(many, workers):
    root, paths = many
    verified = verify_images(root, paths, workers=workers)
    expected = ["ok"] * len(paths)
    expected[70], expected[200] = "broken", "missing"
    assert _statuses(verified) == expected
    assert sorted(verified.reasons) == [70, 200]
    assert verified.width.tolist() == [20 if s == "ok" else 0 for s in expected]
    assert verified.height.sum() == 10 * expected.count("ok")


def test_a_negative_number_of_workers_is_refused(many):
    with pytest.raises(ValueError, match="workers is -1"):
        verify_images(*many, workers=-1)


def test_a_killer_file_costs_itself_only(many, tmp_path, monkeypatch):
    """A file that takes the process with it is found, and every other file has its result."""
    root, paths = many
    (tmp_path / "killer_check.py").write_text(
        "import os\n"
        "from mentorch.engine.data.probe import probe_images\n"
        "def check(root, paths, known):\n"
        "    if {'0100.jpg', '0101.jpg'} & set(paths):\n"
        "        os._exit(1)\n"
        "    return probe_images(root, paths, known)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from killer_check import check

    verified = verify_images(root, paths, workers=2, check=check)
    bad = {k: s for k, s in enumerate(_statuses(verified)) if s != "ok"}
    assert bad == {70: "broken", 100: "broken", 101: "broken", 200: "missing"}
    assert "kills" in verified.reasons[100]


def test_the_journal_keeps_good_results_and_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "j", Path("/data"))
    journal.open()
    journal.append(["a", "b"], [Probe("ok", 3, 2, 1, ""), Probe("missing", 0, 0, 0, "gone")])
    journal.append(["c"], [Probe("ok", 6, 5, 4, "")])
    journal.close()
    with journal.path.open("a") as file:
        file.write('\n{"path": ["d"], "byt')  # killed here
    journal.open()
    journal.append(["e"], [Probe("ok", 9, 8, 7, "")])
    journal.close()
    assert journal.read()["path"].to_pylist() == ["a", "c", "e"]
    known = known_from(journal.read(), pa.array(["x", "c", "a"]))
    assert known.bytes.tolist() == [-1, 6, 3]
    assert known.get(1) == Probe("ok", 6, 5, 4, "")
    assert known.get(0) is None


@pytest.mark.parametrize("other", [("/elsewhere", False), ("/data", True)])
def test_the_journal_of_another_run_is_not_used(tmp_path, other):
    journal = Journal(tmp_path / "j", Path("/data"))
    journal.open()
    journal.append(["a"], [Probe("ok", 3, 2, 1, "")])
    journal.close()
    root, reverify = other
    assert Journal(tmp_path / "j", Path(root), reverify=reverify).read().num_rows == 0


def test_ctrl_c_leaves_a_journal_to_go_on_from(put, tmp_path):
    """A real SIGINT in the middle; the second run decodes only the rest and the journal goes."""
    for k in range(600):
        put(f"data/a/{k:04d}.jpg")
    script = put(
        "slow.py",
        # No __main__ guard on purpose: workers must not import the main program.
        "import sys, time\n"
        "from mentorch.engine.data import verify\n"
        "from mentorch.engine.data.folder import index_folder\n"
        "append = verify.Journal.append\n"
        "def slow(*a):\n"
        "    append(*a)\n"
        "    time.sleep(0.3)\n"
        "verify.Journal.append = slow\n"
        "index_folder(sys.argv[1], workers=2)\n",
    )
    journal = tmp_path / "data/folder.index.journal.jsonl"
    run = subprocess.Popen(
        [sys.executable, script, tmp_path / "data"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(200):
        if journal.is_file() and journal.read_text().count("\n") >= 4:
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert run.returncode != 0
    assert f"interrupted; {journal} keeps what is done" in out, err
    done = Journal(journal, tmp_path / "data").read()["path"].to_pylist()
    assert 0 < len(done) < 600
    decoded = []

    def spy(root, paths, known):
        decoded.extend(p for p, k in zip(paths, known, strict=True) if k is None)
        return probe(root, paths, known)

    from mentorch.engine.data.folder import index_folder

    probe = verify.probe_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "probe_images", spy)
        index = index_folder(tmp_path / "data", workers=0)
    assert sorted(decoded + done) == sorted(index.paths().to_pylist())
    assert not journal.exists()


def test_workers_import_neither_torch_nor_arrow():
    code = (
        "import sys, mentorch.engine.data.probe; "
        "assert not {'torch', 'pyarrow', 'tqdm'} & set(sys.modules), 'a worker would be heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_no_images_at_all():
    assert len(verify_images(Path("/"), pa.array([], pa.string())).status) == 0


def test_sizes_survive_int32(tmp_path):
    verified = verify.Verified.empty(1)
    verified.put(0, [Probe("ok", 2**33, 40_000, 2, "")])  # a file of 8 GiB
    assert verified.bytes[0] == 2**33
    assert verified.width.dtype == np.int32
