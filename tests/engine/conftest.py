"""The embedded data set and a run small enough for tests."""

import contextlib
import gc
import io
import multiprocessing
import os
import queue
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mentorch.engine.config import (
    CurriculumConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.data.embedded import write_embedded
from mentorch.engine.data.imagenet import index_imagenet
from mentorch.engine.data.index import Index
from mentorch.engine.data.webvision import index_webvision

torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded digits in WebVision's layout, indexed."""
    root = write_embedded(tmp_path_factory.mktemp("cache") / "digits")
    index_webvision(root, workers=0)
    index_imagenet(root / "ilsvrc", workers=0)
    return root


@pytest.fixture(scope="session")
def digits_index(digits) -> Index:
    return Index.read(digits / "webvision.index.parquet")


@pytest.fixture
def small_run(digits, tmp_path) -> RunConfig:
    """Two epochs of 12 steps with everything switched on that a run can resume wrongly."""
    return RunConfig(
        name="small",
        out=tmp_path / "runs",
        device="cpu",
        data=DataConfig(
            train=digits,
            evaluate={"webvision": digits, "imagenet": digits / "ilsvrc"},
            sources=("flickr",),
            max_label=50,
            image_size=32,
            resize=36,
            threads=1,
        ),
        student=StudentConfig(name="test_resnet", drop_rate=0.2),
        curriculum=CurriculumConfig(name="linear", burn_in=0.3, example_dropout=0.1),
        optim=OptimConfig(lr=0.05, average_decay=0.9, clip_norm=5.0, warmup_epochs=0.5),
        train=TrainConfig(
            epochs=2, batch_size=16, eval_batch_size=64, precision="fp32", log_every=5
        ),
    )


@pytest.fixture
def without_evaluation(small_run) -> RunConfig:
    return replace(small_run, data=replace(small_run.data, evaluate={}))


def _be_a_rank(rank, world_size, port, function, arguments, results):
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    gc.freeze()  # what the test's process has left behind (pipelines, groups) is not ours to end
    there = {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (here | there).items()}
    pickled = io.BytesIO()  # by bytes: shared memory would end with this process
    torch.save(function(*arguments), pickled)
    results.put((rank, pickled.getvalue()))


def _free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Ranks:
    """Ranks forked from the test's process, so that they start at once; they meet as torchrun's."""

    def __init__(self, function, arguments, world_size):
        context = multiprocessing.get_context("fork")
        self._results = context.Queue()
        shared = world_size, _free_port(), function, arguments, self._results
        self.processes = [
            context.Process(target=_be_a_rank, args=(rank, *shared)) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout=120):
        """What the function returned on every rank."""
        found, deadline = {}, time.monotonic() + timeout
        while len(found) < len(self.processes):
            with contextlib.suppress(queue.Empty):
                found |= dict([self._results.get(timeout=0.2)])
            assert time.monotonic() < deadline, "the ranks take too long"
            assert not any(process.exitcode for process in self.processes), "a rank failed"
        assert self.wait() == [0] * len(self.processes)
        return [torch.load(io.BytesIO(found[rank])) for rank in range(len(self.processes))]

    def wait(self, timeout=120):
        """The exit statuses; minus a signal's number."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]


@pytest.fixture
def ranks():
    """Starts a function on several ranks; ends them when the test does."""
    started = []

    def start(function, *arguments, world_size=2):
        started.append(Ranks(function, arguments, world_size))
        return started[-1]

    yield start
    for process in (process for group in started for process in group.processes):
        if process.is_alive():
            process.kill()
            process.join()


_TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each of two ranks"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _TWO_GPUS])])
def device(request) -> str:
    """gloo on CPUs, NCCL on GPUs."""
    return request.param
