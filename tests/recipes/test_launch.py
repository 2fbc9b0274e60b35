"""The launch files for clusters: their options exist, and the Slurm script ends as it should."""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from mentorch.engine.cli import parse

RECIPES = Path(__file__).parents[2] / "recipes"
SLURM, KUBERNETES = RECIPES / "launch" / "slurm.sbatch", RECIPES / "launch" / "kubernetes.yaml"
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "mentorch",
    "SLURM_JOB_NODELIST": "host[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "64",
}

# Stands in for srun and all that it starts: notes its arguments, is told how to end by $ENDING,
# and takes a moment for its checkpoint after a signal.
SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$@" > srun.arguments
state() { mkdir -p run; printf '{\n  "state": "%s",\n  "reason": ""\n}\n' "$1" > run/status.json; }
stop() { echo "$1" > signal; sleep 0.5; state stopped; exit 1; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
case $ENDING in
    finished) state finished; exit 0 ;;
    early) exit 7 ;;
    *) touch ready; while :; do sleep 0.05; done ;;
esac
"""
SCONTROL = r"""#!/usr/bin/env bash
case $1 in
    show) printf 'host0\nhost1\n' ;;
    *) echo "$@, $(grep -o '"state": "[a-z]*"' run/status.json)" >> scontrol.calls ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script in tmp_path, where the stand-ins for srun and scontrol are found."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    started = []

    def start(ending):
        path = f"{tmp_path}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", str(SLURM), "recipe.py", "--data.noise", "two words"],
            cwd=tmp_path,
            env=os.environ | JOB | {"PATH": path, "ENDING": ending, "RUN": "run"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # what a failed test has left
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _requeued(folder):
    calls = folder / "scontrol.calls"
    return calls.read_text() if calls.exists() else ""


def test_a_finished_run_ends_the_slurm_job(slurm, tmp_path):
    process = slurm("finished")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "run run: finished" in output
    assert not _requeued(tmp_path)


def test_a_run_that_ends_by_itself_is_not_queued_again(slurm, tmp_path):
    """Not even where an attempt before it was stopped: it would come back for ever."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{\n  "state": "stopped"\n}\n')
    assert slurm("early").wait(30) == 7
    assert not _requeued(tmp_path)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_is_handed_on_and_the_checkpoint_waited_for(slurm, tmp_path, number, again):
    """USR1 says that time is up: once more. TERM is scancel, or Slurm's own requeueing."""
    process = slurm("never")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline, "srun was not started"
        time.sleep(0.02)
    process.send_signal(number)
    assert (process.wait(30) == 0) == again
    assert (tmp_path / "signal").read_text().strip() == number.name.removeprefix("SIG")
    assert _requeued(tmp_path) == ('requeue 123456, "state": "stopped"\n' if again else "")


def test_torchrun_knows_the_options_that_slurm_starts_it_with(slurm, tmp_path):
    slurm("finished").communicate(timeout=30)
    words = (tmp_path / "srun.arguments").read_text().splitlines()
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.rdzv_endpoint == "host0:23456"
    assert options.nnodes == "2"
    assert options.training_script == "recipe.py"
    assert options.training_script_args == ["--data.noise", "two words", "--folder", "run"]
    assert "SIGUSR1" in options.signals_to_handle
    times = [line for line in SLURM.read_text().splitlines() if "TIMEOUT=" in line]
    assert int(times[0].split("=")[1].split()[0]) < 180, "Slurm kills before the checkpoint is due"
    assert "#SBATCH --signal=B:USR1@180" in SLURM.read_text()


def test_torchrun_and_the_recipe_know_the_options_of_the_kubernetes_job(tmp_path):
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == "torchrun"
    options = get_args_parser().parse_args(container["command"][1:])
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert options.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29400"
    assert options.nnodes == str(spec["completions"]) == str(spec["parallelism"])
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options.max_restarts == 0, "a stopped rank would end with 0, its pod never come back"
    times = {e["name"]: e.get("value") for e in container["env"]}
    seconds = int(times["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert seconds < pod["terminationGracePeriodSeconds"]
    mounts, volumes = container["volumeMounts"], pod["volumes"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}

    recipe = _recipe(options.training_script)
    config = parse(recipe.WebVision, recipe.FULL, options.training_script_args)
    for path in (config.folder, config.webvision):
        assert any(path.is_relative_to(mount["mountPath"]) for mount in mounts), path


def _recipe(path):
    spec = importlib.util.spec_from_file_location("recipe", RECIPES.parent / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_slurm_script_is_a_script():
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    usage = subprocess.run(["bash", str(SLURM)], env=os.environ | JOB, capture_output=True)
    assert usage.returncode == 2
    command = next(x for x in SLURM.read_text().splitlines() if x.startswith("#     sbatch"))
    recipe = shlex.split(command[1:])[4]
    assert (RECIPES.parent / recipe).is_file()
