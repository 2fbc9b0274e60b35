"""Runs on two hosts: to the end, through a bad network, and on again when a host was lost.

The hosts are network namespaces (`hosts.py`). Every run must end in the very same weights as the
one that nothing happened to.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mentorch.engine.checkpoint import checkpoints
from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.config_files import save_config
from mentorch.engine.job import run
from mentorch.engine.ledger import read_ledger

from .hosts import Hosts, Started, wait_for, why_not
from .runs import assert_same_run

STEPS = 24  # two epochs of 12
WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# Notes every step with its samples, and takes its time, so that a test can step in between.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from mentorch.engine import job
from mentorch.engine.config import RunConfig
from mentorch.engine.config_files import load_config
from mentorch.engine.data.pipelines import Loader

config = Path(sys.argv[1])
batches = Loader.batches
def recorded(self, first, *arguments, **options):
    for step, batch in enumerate(batches(self, first, *arguments, **options), first + 1):
        with config.with_name(f"steps-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(json.dumps([step, batch.sample_ids.tolist()]) + "\\n")
        time.sleep(0.1)
        yield batch
Loader.batches = recorded
sys.exit(job.run(load_config(config, RunConfig)))
"""

# What a cluster manager does: the same command again until it succeeds, three times at most.
UNTIL = 'for attempt in 1 2 3; do "$@" && exit; echo "ended with $?"; sleep 0.5; done; exit 1'


def _config(digits: Path, out: Path, device: str) -> RunConfig:
    return RunConfig(
        name="hosts",
        out=out,
        device=device,
        data=DataConfig(
            train=digits, sources=("flickr",), max_label=50, image_size=32, resize=36, threads=1
        ),
        student=StudentConfig(name="test_resnet", drop_rate=0.2),
        curriculum=CurriculumConfig(name="linear", burn_in=0.3, example_dropout=0.1),
        optim=OptimConfig(lr=0.05, average_decay=0.9),
        train=TrainConfig(
            epochs=2, batch_size=16, precision="fp32", log_every=5, checkpoint_steps=4
        ),
    )


@dataclass
class Job:
    """One run on two hosts: its folders, and how its processes are started and looked at."""

    hosts: Hosts
    folder: Path
    config: RunConfig

    def start(self, host: int) -> Started:
        """Starts torchrun on a host, again and again until it succeeds."""
        (self.folder / "script.py").write_text(SCRIPT)
        save_config(self.config, self.folder / "config.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        torchrun += ["--nproc-per-node", "1", "--rdzv-id", "one-job"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400"]
        script = [str(self.folder / "script.py"), str(self.folder / "config.json")]
        env = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        env |= _one_gpu(host) if self.config.device == "cuda" else {}
        return self.hosts.start(host, ["sh", "-c", UNTIL, "sh", *torchrun, *script], env)

    def steps(self, rank: int) -> list[list]:
        """[step, sample ids] of every batch that a rank took, over all attempts."""
        path = self.folder / f"steps-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def at_step(self, step: int) -> bool:
        """True when both ranks have come so far."""
        return all(any(s >= step for s, _ in self.steps(rank)) for rank in range(2))

    def wait_for_step(self, step: int) -> float:
        return wait_for(lambda: self.at_step(step), f"step {step}")

    @property
    def run_folder(self) -> Path:
        (folder,) = self.config.out.iterdir()
        return folder

    def interruptible(self, **train: float) -> None:
        """Makes a relaunch go on in the same folder, and changes these training options."""
        changed = replace(self.config.train, **train)
        self.config = replace(self.config, folder=self.config.out / "run", train=changed)

    def visits(self):
        last = checkpoints(self.run_folder / "checkpoints")[-1]
        return read_ledger(last / "ledger.safetensors")["visits"]


def _one_gpu(host: int) -> dict[str, str]:
    """A GPU of its own for each host, and no way to the other but the cable."""
    ways = {f"NCCL_{way}_DISABLE": "1" for way in ("P2P", "SHM", "IB")}
    return ways | {
        "CUDA_VISIBLE_DEVICES": str(host),
        "NCCL_HOSTID": f"host{host}",
        "NCCL_SOCKET_IFNAME": "=eth0",
    }


@pytest.fixture
def whole(digits, device, tmp_path, ranks):
    """The run that nothing happens to, two ranks on one host."""
    out = tmp_path / "whole"
    config = _config(digits, out, device)
    assert ranks(run, config).results() == [0, 0]
    (folder,) = out.iterdir()
    return folder


@pytest.fixture
def job(digits, device, tmp_path):
    with Hosts(tmp_path) as hosts:
        yield Job(hosts, tmp_path, _config(digits, tmp_path / "runs", device))


def _ends_well(launchers: list[Started]) -> None:
    for launcher in launchers:
        assert launcher.wait(120) == 0, "\n".join(one.output for one in launchers)


@pytest.mark.slow
@pytest.mark.soak
def test_two_hosts_see_each_sample_once_and_write_one_record(job, whole):
    launchers = [job.start(host) for host in range(2)]
    _ends_well(launchers)
    assert_same_run(whole, job.run_folder)
    one, two = job.steps(0), job.steps(1)
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, STEPS + 1))
    for epoch in (slice(0, 12), slice(12, 24)):
        ids = [i for _, batch in one[epoch] + two[epoch] for i in batch]
        assert len(ids) == len(set(ids)) == 12 * 16
    assert job.visits().sum() == STEPS * 16
    assert json.loads((job.run_folder / "summary.json").read_text())["steps"] == STEPS
    together = "".join(launcher.output for launcher in launchers)
    assert together.count("run folder:") == 1, "more than one rank talks"
    assert "ended with" not in together, "a launcher had to try twice"


@pytest.mark.slow
@pytest.mark.soak
def test_a_network_that_is_away_for_seconds_costs_those_seconds_only(job, whole):
    """TCP sends again: nothing is lost, so nothing may give up."""
    launchers = [job.start(host) for host in range(2)]
    job.wait_for_step(6)
    job.hosts.cut()
    time.sleep(0.5)
    before = [len(job.steps(rank)) for rank in range(2)]
    time.sleep(2.5)
    assert [len(job.steps(rank)) for rank in range(2)] == before, "the cable was not needed"
    assert max(before) < STEPS, "the run had ended before the cable was pulled"
    job.hosts.mend()
    _ends_well(launchers)
    assert [step for step, _ in job.steps(0)] == list(range(1, STEPS + 1)), "a step was repeated"
    assert_same_run(whole, job.run_folder)


@pytest.mark.slow
def test_a_network_that_stays_away_ends_both_hosts_and_the_job_goes_on(job, whole):
    job.interruptible(step_timeout=3.0)
    launchers = [job.start(host) for host in range(2)]
    job.wait_for_step(6)
    job.hosts.cut()
    waited = wait_for(lambda: all("no progress" in one.output for one in launchers), "a message")
    print(f"{waited:.1f} s from the cut to a message on both hosts")
    job.hosts.mend()
    one, two = (launcher.output for launcher in launchers)
    assert "rank 0 of 2 (host host0) made no progress" in one
    assert "rank 1 gives no sign of life" in one
    assert "(host host1, pid" in one
    assert "rank 1 of 2 (host host1) made no progress" in two
    assert "host0, where they meet, is silent" in two, "it serves the store: who would know more?"
    before = len(job.steps(0))
    ended = wait_for(lambda: all("ended with" in one.output for one in launchers), "the end")
    again = wait_for(lambda: len(job.steps(0)) > before, "a step after that")
    print(f"{ended:.1f} s later both launchers had ended, {again:.1f} s later was the next step")
    _ends_well(launchers)
    _went_on_from_a_checkpoint(job)
    assert_same_run(whole, job.run_folder)


@pytest.mark.slow
@pytest.mark.soak
def test_a_host_that_dies_and_is_started_again(job, whole):
    """The one that they meet on. The other sees closed connections: it need not wait long."""
    job.interruptible()
    first, second = (job.start(host) for host in range(2))
    job.wait_for_step(6)
    before = len(job.steps(1))
    job.hosts.kill(0)
    waited = wait_for(lambda: "ended with" in second.output, "the end of the other launcher")
    assert first.wait() == -9
    launchers = [job.start(0), second]
    again = wait_for(lambda: len(job.steps(1)) > before + 1, "a step after that")
    print(f"{waited:.1f} s from the kill to the other launcher's end, {again:.1f} s to a step")
    _ends_well(launchers)
    _went_on_from_a_checkpoint(job)
    assert_same_run(whole, job.run_folder)


def _went_on_from_a_checkpoint(job: Job) -> None:
    """Each rank began once more, at the step after one that was saved (4, 8, …)."""
    for rank in range(2):
        steps = [step for step, _ in job.steps(rank)]
        (again,) = (at for at in range(1, len(steps)) if steps[at] <= steps[at - 1])
        assert steps[:again] == list(range(1, again + 1))
        assert steps[again:] == list(range(steps[again], STEPS + 1))
        assert steps[again] % 4 == 1
        assert steps[again] > 1, "from the beginning"
