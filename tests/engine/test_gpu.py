"""What only a GPU can show: `pytest -m gpu`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mentorch.engine.cli import parse
from mentorch.engine.config import RunConfig
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.distributed import World
from mentorch.engine.job import run
from mentorch.engine.ledger import Ledger
from mentorch.engine.reweight import Reweight

pytestmark = pytest.mark.gpu


@contextmanager
def no_host_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _batch(dtype=torch.float32, rows=128, classes=1000):
    torch.manual_seed(0)
    labels = torch.randint(0, classes, (rows,))
    labels[3] = -100
    return torch.randn(rows, classes, dtype=dtype), labels


@pytest.mark.parametrize("curriculum", ["linear", "self_paced", "focal", "pd"])
def test_weights_on_the_gpu_are_those_on_the_cpu(curriculum):
    logits, labels = _batch()
    on_cpu, on_gpu = (Reweight(curriculum, total_steps=10).to(d) for d in ("cpu", "cuda"))
    for _ in range(10):  # through burn-in, whose coins must be the same
        expected = on_cpu.weigh(logits, labels)
        found = on_gpu.weigh(logits.cuda(), labels.cuda())
        for one, other in zip(expected, found, strict=True):
            assert torch.allclose(one, other.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curriculum", ["linear", "pd"])
def test_a_step_does_not_wait_for_the_device(curriculum):
    logits, labels = (x.cuda() for x in _batch(torch.bfloat16))
    logits.requires_grad_()
    criterion = Reweight(curriculum, total_steps=100, example_dropout=0.1).cuda()
    criterion(logits, labels).backward()
    with no_host_sync():
        for _ in range(3):
            criterion(logits, labels).backward()


def test_the_ledger_takes_one_launch_and_does_not_wait():
    logits, labels = (x.cuda() for x in _batch(torch.bfloat16))
    ids, criterion = torch.arange(len(labels), device="cuda"), Reweight("linear").cuda()
    ledger = Ledger(len(labels), World(device=torch.device("cuda", 0)))
    out = criterion.weigh(logits, labels)
    ledger(ids, logits, labels, out)
    with no_host_sync():
        ledger(ids, logits, labels, out)
    with torch.profiler.profile() as profile:
        ledger(ids, logits, labels, out)
    launched = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert [event.name for event in launched] == ["_record_kernel"]
    assert ledger.columns()["visits"].sum() == 3 * (len(labels) - 1)  # one is ignored


@pytest.mark.parametrize("curriculum", ["linear", "pd"])
def test_a_step_can_be_captured_in_a_graph(curriculum):
    logits, labels = (x.cuda() for x in _batch())
    eager = Reweight(curriculum, total_steps=10).cuda()
    captured = Reweight(curriculum, total_steps=10).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.weigh(logits, labels)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.weigh(logits, labels)
    captured.load_state_dict(eager.state_dict())
    for _ in range(10):
        graph.replay()
        expected = eager.weigh(logits, labels)
        assert torch.allclose(out.loss, expected.loss)
        assert torch.allclose(out.sample_weight, expected.sample_weight)
    assert torch.equal(captured.step, eager.step)


def test_the_gpu_pipeline_yields_the_cpus_images(digits_index, small_run):
    ids = digits_index.select("train", sources=["google"])[:128]
    config = replace(small_run.data, image_size=64, resize=72)
    batches = {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        loader = Loader(
            digits_index,
            ids,
            batch_size=32,
            config=config,
            train=True,
            world=World(device=device),
        )
        batches[device.type] = list(loader.batches(0, epochs=2))
    for one, other in zip(batches["cpu"], batches["cuda"], strict=True):
        assert other.images.is_cuda
        assert torch.equal(one.sample_ids, other.sample_ids.cpu())
        difference = (one.images.float() - other.images.cpu().float()).abs()
        assert difference.mean() < 3


def test_a_run_on_the_gpu_trains_and_resumes(small_run, capsys):
    config = replace(small_run, device="cuda", train=replace(small_run.train, precision="bf16"))
    assert run(config) == 0
    (folder,) = config.out.iterdir()
    arguments = ["--resume", str(folder), "--train.epochs", "3"]
    assert run(parse(RunConfig, RunConfig(), arguments)) == 0
    assert "24 taken" in capsys.readouterr().out
