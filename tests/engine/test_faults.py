"""Whole runs that something happens to: signals, hanging ranks, full disks, NaN."""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mentorch.engine.checkpoint_files import checkpoints
from mentorch.engine.config import StudentConfig
from mentorch.engine.config_files import save_config
from mentorch.engine.data.pipelines import Loader, Normalise
from mentorch.engine.failure import RunFailed
from mentorch.engine.job import run
from mentorch.engine.launch import STOPPED
from mentorch.engine.watchdog import HUNG

from .runs import (
    assert_same_run,
    final_checkpoint,
    only_run,
    read_metrics,
    read_status,
    wait_until,
)


@pytest.fixture
def config(without_evaluation, tmp_path, device):
    """Two epochs of 12 steps, a checkpoint every 4."""
    train = replace(without_evaluation.train, checkpoint_steps=4, keep_checkpoints=9, log_every=4)
    return replace(without_evaluation, train=train, folder=tmp_path / "mine", device=device)


@pytest.fixture
def at_step(monkeypatch):
    """Does something on one rank when a batch of training comes; forked ranks inherit it."""

    def arrange(step, action, rank=0):
        batches = Loader.batches

        def acting(self, first=0, *arguments, **options):
            for count, batch in enumerate(batches(self, first, *arguments, **options), first + 1):
                if self.train and count == step and self.world.rank == rank:
                    action()
                yield batch

        monkeypatch.setattr(Loader, "batches", acting)

    return arrange


def _signal(number):
    return lambda: os.kill(os.getpid(), number)


# ---- Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_any_rank_stops_all_of_them_within_two_steps(
    config, at_step, ranks, number, monkeypatch, tmp_path
):
    at_step(5, _signal(number), rank=1)
    group = ranks(run, config)
    group.results()
    assert group.wait() == [0, 0]
    status = read_status(config.folder)
    assert status["state"] == "stopped"
    assert status["reason"] == number.name
    assert 5 <= status["step"] == status["checkpoint"] <= 7
    monkeypatch.undo()

    whole = replace(config, folder=tmp_path / "whole")
    assert ranks(run, whole).results() == [0, 0]
    assert ranks(run, config).results() == [0, 0]
    assert read_status(config.folder)["state"] == "finished"
    assert_same_run(whole.folder, config.folder)


def test_a_stopped_run_is_no_failure_where_torchrun_would_restart_it(config, at_step, monkeypatch):
    at_step(2, _signal(signal.SIGTERM))
    assert run(config) == STOPPED
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    again = replace(config, folder=config.folder.with_name("again"))
    assert run(again) == 0
    assert read_status(again.folder)["state"] == "stopped"


def _launch(config, pids):
    """Starts a run as a launcher does, and waits."""
    gc.freeze()  # see `ranks`
    os.environ["TORCHELASTIC_RUN_ID"] = "job-1"
    worker = multiprocessing.get_context("fork").Process(target=run, args=(config,))
    worker.start()
    pids.put(worker.pid)
    worker.join()


def test_a_run_whose_launcher_is_gone_stops(config, monkeypatch):
    """kill −9 of torchrun, or a signal that it does not handle: nobody would end its workers."""
    endless = replace(config, train=replace(config.train, epochs=5000))
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    launcher = context.Process(target=_launch, args=(endless, pids))
    launcher.start()
    worker = pids.get(timeout=60)
    try:
        wait_until((config.folder / "checkpoints/latest").exists)
        launcher.kill()
        launcher.join()
        wait_until(lambda: read_status(config.folder)["state"] == "stopped", 20)
        status = read_status(config.folder)
        assert "launcher" in status["reason"]
        assert status["checkpoint"] == status["step"] > 4
        wait_until(lambda: not _alive(worker), 20)
    finally:
        if _alive(worker):
            os.kill(worker, signal.SIGKILL)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


WORKER = """
import sys
from pathlib import Path
from mentorch.engine import job
from mentorch.engine.config import RunConfig
from mentorch.engine.config_files import load_config
sys.exit(job.run(load_config(Path(sys.argv[1]), RunConfig)))
"""


@pytest.mark.slow
def test_torchrun_passes_sigusr1_on_and_leaves_no_orphans(config, tmp_path):
    """Slurm's warning before it preempts a job, as docs/clusters.md says to start one."""
    endless = replace(config, folder=None, train=replace(config.train, epochs=5000))
    save_config(endless, tmp_path / "config.json")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    process = subprocess.Popen(
        [*torchrun, str(tmp_path / "worker.py"), str(tmp_path / "config.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    killer = threading.Timer(180, process.kill)
    killer.start()
    try:
        wait_until(lambda: list(config.out.glob("*/checkpoints/latest")), 120)
        folder = only_run(config)
        children = _children(process.pid)
        assert len(children) == 2
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate()
    finally:
        killer.cancel()
        process.kill()
    status = read_status(folder)
    assert (status["state"], status["reason"]) == ("stopped", "SIGUSR1"), output
    assert status["checkpoint"] == status["step"] == final_checkpoint(folder)[2]["spade"]["step"]
    assert f"torchrun --nproc-per-node 2 {tmp_path / 'worker.py'} --resume {folder}" in output
    assert not any(map(_alive, children))


def _children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


# ---- Ranks that hang ----------------------------------------------------------------------------


def _impatient(config):
    return replace(config, train=replace(config.train, step_timeout=2.0))


def test_a_rank_that_hangs_is_named_and_all_end(config, at_step, ranks, capfd):
    at_step(6, lambda: time.sleep(300), rank=1)
    assert ranks(run, _impatient(config)).wait(60) == [HUNG, HUNG]
    printed = capfd.readouterr().err
    assert "rank 1 of 2" in printed
    assert "rank 1 is behind: waiting for images (training), step 5" in printed
    assert "rank 0 of 2" in printed
    stacks = (config.folder / "hang-rank-1.txt").read_text()
    assert "in acting" in stacks
    assert "time.sleep" in stacks or "test_faults.py" in stacks
    status = read_status(config.folder)
    assert status["state"] == "failed"
    assert "made no progress for" in status["reason"]
    assert checkpoints(config.folder / "checkpoints")[-1].name == "step-00000004"


def test_a_rank_without_a_sign_of_life_is_named(config, at_step, ranks, capfd):
    """The other one's process is stopped as a whole, its watchdog too."""
    at_step(6, _signal(signal.SIGSTOP), rank=1)
    group = ranks(run, _impatient(config))
    group.processes[0].join(60)
    assert group.processes[0].exitcode == HUNG
    assert "rank 1 gives no sign of life; it was " in capfd.readouterr().err


def test_a_stop_that_no_step_answers_ends_the_rank(config, at_step, ranks, capfd, monkeypatch):
    """Its peers are gone and its collective does not end: torchrun would wait before it kills."""
    monkeypatch.setattr("mentorch.engine.watchdog._GRACE_S", 1.0)
    at_step(6, _signal(signal.SIGSTOP), rank=1)
    group = ranks(run, config)
    wait_until((config.folder / "checkpoints/latest").exists)
    time.sleep(1)
    group.processes[0].terminate()
    group.processes[0].join(30)
    assert group.processes[0].exitcode == HUNG
    assert "was asked to stop and for" in capfd.readouterr().err


# ---- Disks --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def _fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up_costs_nothing_but_time(
    config, at_step, small_disk, capsys, tmp_path, monkeypatch
):
    whole = replace(config, folder=tmp_path / "whole")
    assert run(whole) == 0
    train = replace(config.train, keep_checkpoints=1)
    tight = replace(config, folder=small_disk / "run", train=train)

    def fill_behind_the_first_checkpoint():
        wait_until(lambda: checkpoints(tight.folder / "checkpoints"))  # of step 4, in background
        _fill(small_disk)

    at_step(6, fill_behind_the_first_checkpoint)
    with pytest.raises(RunFailed, match=r"No space left on device.*\n.*--resume"):
        run(tight)
    assert "a checkpoint could not be written" in capsys.readouterr().out
    assert checkpoints(tight.folder / "checkpoints")[-1].name == "step-00000004"
    assert not list((tight.folder / "checkpoints").glob(".*"))
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    assert run(tight) == 0
    assert_same_run(whole.folder, tight.folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard
def test_metrics_that_find_no_room_are_written_later(config, at_step, small_disk):
    """The checkpoints elsewhere: only the lines meet the full disk."""
    (small_disk / "run").mkdir()
    (config.folder / "checkpoints").mkdir(parents=True)
    (small_disk / "run/checkpoints").symlink_to(config.folder / "checkpoints")
    tight = replace(config, folder=small_disk / "run", train=replace(config.train, log_every=1))
    filler = small_disk / "filler"
    clear = [6, lambda: _fill(small_disk)], [12, filler.unlink]
    for step, action in clear:
        at_step(step, action)
    assert run(tight) == 0
    steps = [row["step"] for row in read_metrics(tight.folder) if row["kind"] == "train"]
    assert steps == list(range(1, 25))


# ---- Damaged checkpoints ------------------------------------------------------------------------


def _cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _cut(folder / "step-00000024/model.safetensors"), "model.safetensors"),
        (lambda folder: _flip(folder / "step-00000024/state.safetensors"), "state.safetensors"),
        (lambda folder: shutil.rmtree(folder / "step-00000024"), "latest"),
    ],
    ids=["cut by a byte", "a bit flipped", "latest points nowhere"],
)
def test_the_previous_good_checkpoint_is_taken(config, tmp_path, damage, message, capsys):
    assert run(config) == 0
    shutil.copytree(config.folder, tmp_path / "whole")
    damage(config.folder / "checkpoints")
    capsys.readouterr()
    assert run(config) == 0
    printed = capsys.readouterr().out
    assert message in printed
    assert "24 in all; 20 taken" in printed
    assert_same_run(tmp_path / "whole", config.folder)


# ---- Numbers that are none ----------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the images of some steps NaN on one rank."""

    def arrange(steps, rank=1):
        forward, calls = Normalise.forward, []

        def poison(self, images):
            calls.append(1)
            normalised = forward(self, images)
            mine = os.environ.get("RANK", "0") == str(rank)
            if not (mine and len(calls) in steps):
                return normalised
            spoilt = normalised.clone()
            spoilt[3] = torch.nan
            return spoilt

        monkeypatch.setattr(Normalise, "forward", poison)

    return arrange


@pytest.mark.parametrize("rank", [0, 1])  # the one whose statistics are kept, or the other
def test_a_nan_on_one_rank_skips_the_step_on_all_of_them(config, poisoned, ranks, capfd, rank):
    poisoned({6}, rank)
    batch_norms = replace(config, student=StudentConfig(name="test_resnet", drop_rate=0.2))
    assert ranks(run, batch_norms).results() == [0, 0]
    _, models, state, *_ = final_checkpoint(config.folder)
    tensors = [t for model in models.values() for t in model.values() if t.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert state["spade"]["criterion"]["loss_moving_avg"].isfinite()
    rows = [row for row in read_metrics(config.folder) if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0, 0, 0]
    assert all(row["loss"] == row["loss"] for row in rows)
    lines = (config.folder / "nonfinite.jsonl").read_text().splitlines()
    assert len(lines) == 8, "the batch norms have spread it over the rank's batch"
    named = json.loads(lines[0])
    assert (named["step"], named["rank"]) == (5, rank)
    assert named["path"].startswith("flickr/")
    assert named["loss"] != named["loss"]
    assert f"because of {named['path']} (rank {rank}, loss nan)" in capfd.readouterr().out


def test_the_skipped_step_changes_nothing(config, poisoned, monkeypatch):
    """Weights before and after are the same; the next step is taken from there."""
    from mentorch.engine import spade as module

    poisoned({6}, rank=0)
    seen = {}
    update = module.Spade._update

    def noting(self, found):
        if self.step_count == 5:
            seen["before"] = self.guard._kept.clone(), self._weights()
        finite = update(self, found)
        if self.step_count == 5:
            seen["after"] = self.guard._buffers.clone(), self._weights()
        return finite

    def weights(self):
        momenta = [s["momentum_buffer"].clone() for s in self.optimizer.state.values()]
        return [p.detach().clone() for p in self.student.parameters()] + momenta

    monkeypatch.setattr(module.Spade, "_update", noting)
    monkeypatch.setattr(module.Spade, "_weights", weights, raising=False)
    assert run(config) == 0
    (buffers, before), (buffers_after, after) = seen["before"], seen["after"]
    assert torch.equal(buffers, buffers_after)
    assert all(map(torch.equal, before, after))


def test_the_first_step_can_be_skipped(config, poisoned):
    """torch leaves an optimiser that skips its first step with momenta that nobody has written."""
    poisoned({1}, rank=0)
    train = replace(config.train, epochs=1)
    assert run(replace(config, train=train)) == 0
    assert final_checkpoint(config.folder)[1]["model"]["fc.weight"].isfinite().all()


def test_too_many_of_them_end_the_run_on_all_ranks(config, poisoned, ranks, capfd):
    poisoned(set(range(6, 100)))
    impatient = replace(config, train=replace(config.train, max_skipped=5))
    assert ranks(run, impatient).wait() == [1, 1]
    printed = capfd.readouterr().err
    assert printed.count("the gradients of 7 steps in short order were not finite") == 2
    status = read_status(config.folder)
    assert status["state"] == "failed"
    assert "nonfinite.jsonl names their samples" in status["reason"]
    assert len((config.folder / "nonfinite.jsonl").read_text().splitlines()) == 7 * 8
