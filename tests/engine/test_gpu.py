"""What only a GPU can show: `pytest -m gpu`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

from mentorch import find_label_issues
from mentorch.engine.cli import parse
from mentorch.engine.config import (
    CurriculumConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.data.pipelines import Batch, Loader
from mentorch.engine.data.prefetch import prefetched
from mentorch.engine.distributed import World
from mentorch.engine.issues import find
from mentorch.engine.job import run
from mentorch.engine.ledger import Ledger
from mentorch.engine.reweight import Reweight

from .issues.blobs import blobs
from .small_spade import N, batches, config_of, new_spade

pytestmark = pytest.mark.gpu


@contextmanager
def no_host_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Several rows of a class in every batch, so that p decides.
BY_CLASS = {"percentile_of": "class", "num_classes": 10}


def _batch(dtype=torch.float32, rows=128, classes=1000, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (rows,))
    labels[3] = -100
    return torch.randn(rows, classes, dtype=dtype), labels


@pytest.mark.parametrize("options", [{}, BY_CLASS])
@pytest.mark.parametrize("curriculum", ["linear", "self_paced", "focal", "pd"])
def test_weights_on_the_gpu_are_those_on_the_cpu(curriculum, options):
    on_cpu, on_gpu = (
        Reweight(curriculum, total_steps=10, **options).to(device) for device in ("cpu", "cuda")
    )
    for step in range(10):  # through burn-in, whose coins must be the same
        logits, labels = _batch(classes=options.get("num_classes", 1000), seed=step)
        expected = on_cpu.weigh(logits, labels)
        found = on_gpu.weigh(logits.cuda(), labels.cuda())
        for one, other in zip(expected, found, strict=True):
            assert torch.allclose(one, other.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, BY_CLASS])
@pytest.mark.parametrize("curriculum", ["linear", "pd"])
def test_a_step_does_not_wait_for_the_device(curriculum, options):
    classes = options.get("num_classes", 1000)
    logits, labels = (x.cuda() for x in _batch(torch.bfloat16, classes=classes))
    logits.requires_grad_()
    criterion = Reweight(curriculum, total_steps=100, example_dropout=0.1, **options).cuda()
    criterion(logits, labels).backward()
    with no_host_sync():
        for _ in range(3):
            criterion(logits, labels).backward()


def test_the_ledger_takes_one_launch_and_does_not_wait():
    logits, labels = (x.cuda() for x in _batch(torch.bfloat16))
    ids = torch.arange(len(labels), device="cuda")
    criterion = Reweight("linear", total_steps=100).cuda()
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


@pytest.mark.parametrize("options", [{}, BY_CLASS])
@pytest.mark.parametrize("curriculum", ["linear", "pd"])
def test_a_step_can_be_captured_in_a_graph(curriculum, options):
    classes = options.get("num_classes", 1000)
    logits, labels = (x.cuda() for x in _batch(classes=classes))
    eager = Reweight(curriculum, total_steps=10, **options).cuda()
    captured = Reweight(curriculum, total_steps=10, **options).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.weigh(logits, labels)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.weigh(logits, labels)
    captured.load_state_dict(eager.state_dict())
    for step in range(10):
        for there, new in zip((logits, labels), _batch(classes=classes, seed=step), strict=True):
            there.copy_(new)
        graph.replay()
        expected = eager.weigh(logits, labels)
        assert torch.allclose(out.loss, expected.loss)
        assert torch.allclose(out.sample_weight, expected.sample_weight)
    assert torch.equal(captured.step, eager.step)


def test_wrong_labels_are_found_on_the_gpu(monkeypatch):
    """Also where the samples stay in the host's memory for want of room."""
    features, given, clean = blobs()
    found = []
    for fits in (True, False):
        monkeypatch.setattr(find, "_fits", lambda values, device, fits=fits: fits)
        options = {"device": "cuda", "epochs": 6, "batch_size": 32, "progress": False}
        found.append(find_label_issues(features, given, **options))
    for one in found:
        suspicion = one.scores.sort_by("sample_id")["suspicion"].to_numpy()
        assert roc_auc_score(given != clean, suspicion) > 0.98
    both = (torch.from_numpy(one.probabilities) for one in found)
    torch.testing.assert_close(*both, rtol=0, atol=0.05)


def test_scores_take_labels_on_the_gpu():
    logits, labels = (x.cuda() for x in _batch())
    labels[3] = 0
    criterion = Reweight("pd", total_steps=9, num_samples=len(labels), ledger=True).cuda()
    criterion(logits, labels, torch.arange(len(labels), device="cuda"))
    scores = criterion.sample_scores(labels, clean_labels=labels)
    assert scores.sort_by("sample_id")["given_label"].to_pylist() == labels.tolist()


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


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("curriculum", ["pd", "gce"])
def test_a_run_on_the_gpu_trains_and_resumes(small_run, capsys, engine, curriculum):
    """With DALI's threads at work, evaluations and checkpoints in between, and a process group."""
    train = replace(small_run.train, precision="bf16", engine=engine)
    named = replace(small_run.curriculum, name=curriculum)
    config = replace(small_run, device="cuda", train=train, curriculum=named)
    assert run(config) == 0
    (folder,) = config.out.iterdir()
    arguments = ["--resume", str(folder), "--train.epochs", "3"]
    assert run(parse(RunConfig, RunConfig(), arguments)) == 0
    said = capsys.readouterr().out
    assert "24 taken" in said
    assert said.count("the step is captured") == (2 if engine == "graph" else 0)


ENGINES = ("eager", "compile", "graph", "compile-graph")


def _trained(engine, steps=30, waits_after=5, **parts):
    """A run's end. From a step on, whatever makes the host wait is an error."""
    config = config_of(device="cuda", **parts)
    config = replace(config, train=replace(config.train, engine=engine))
    world = World(device=torch.device("cuda", 0))
    ledger = Ledger(N, world)
    spade, pixels = new_spade(config, world, steps, [ledger])
    try:
        for step in spade.train(list(batches(world, steps, pixels, config.train.accumulate))):
            if step == waits_after:
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = {**spade.models(), "criterion": spade.criterion.state_dict(), "ledger": ledger.table}
    return found, spade.metrics(), spade.news


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"student": StudentConfig(name="cifar_resnet20", drop_rate=0.0)},
        {"curriculum": CurriculumConfig(name="self_paced", example_dropout=0.2, burn_in=0.2)},
        {"optim": OptimConfig(lr=0.02, clip_norm=0.5, scale_weight_decay=True, average_decay=0.9)},
        {"train": TrainConfig(epochs=1, batch_size=32, precision="fp16", accumulate=4)},
        {"curriculum": CurriculumConfig(name="dd", trusted=0.2, burn_in=0.5, learn_at=(0.5,))},
    ],
    ids=["pd", "batch norms", "dropout", "clipped", "fp16 in parts", "re-learned"],
)
def test_every_engine_takes_the_same_steps_and_none_waits(engine, parts):
    relearned = "curriculum" in parts and parts["curriculum"].trusted
    waits_after = 20 if relearned else 5  # learning waits, at step 15; then it is captured anew
    expected, lines, _ = _trained("eager", waits_after=waits_after, **parts)
    found, found_lines, news = _trained(engine, waits_after=waits_after, **parts)
    said = [line for line in news if "not" in line or "cannot" in line]
    assert not said, said
    assert found_lines["loss"] == pytest.approx(lines["loss"], rel=2e-2)
    for name in ("model", "average"):
        for key, tensor in expected[name].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=2e-2, atol=5e-3, msg=key)
    assert torch.equal(found["criterion"]["step"], expected["criterion"]["step"])


def test_a_captured_step_is_one_launch_and_what_the_host_prepares():
    config = config_of(device="cuda", student=StudentConfig(name="cifar_resnet20", drop_rate=0.0))
    config = replace(config, train=replace(config.train, engine="graph"))
    world = World(device=torch.device("cuda", 0))
    spade, pixels = new_spade(config, world, 20)
    of_run = list(batches(world, 20, pixels))
    steps = spade.train(iter(of_run))
    for _ in range(10):
        next(steps)
    with torch.profiler.profile() as profile:
        for _ in range(5):
            next(steps)
    launches = [e for e in profile.events() if e.name.startswith(("cudaLaunch", "cudaGraphLaunch"))]
    assert sum(e.name == "cudaGraphLaunch" for e in launches) == 5
    # Rate, average's share, and clones of what the guard notes; copies are no launches.
    assert len(launches) <= 5 * 8


def test_a_step_that_cannot_be_captured_goes_on_eager():
    """After a capture that broke off: with the same weights, random numbers and dropout."""
    student, found = StudentConfig(name="small_cnn", drop_rate=0.3), {}
    world = World(device=torch.device("cuda", 0))
    for engine in ("eager", "graph"):
        config = config_of(device="cuda", student=student)
        config = replace(config, train=replace(config.train, engine=engine))
        seen = []
        waits = [lambda ids, logits, labels, out, seen=seen: seen.append(float(out.loss))]
        spade, pixels = new_spade(config, world, 10, waits)
        for _ in spade.train(list(batches(world, 10, pixels))):
            pass
        assert len(seen) == 10
        found[engine] = spade.models()["model"], spade.news
    assert "goes on eager" in found["graph"][1][0]
    for name, tensor in found["eager"][0].items():
        torch.testing.assert_close(found["graph"][0][name], tensor, rtol=1e-3, atol=1e-4)


def test_prefetched_batches_are_the_batches_and_made_beside_the_step():
    """Each is made by slow work; the step on the one before takes as long."""
    device, made = torch.device("cuda", 0), []

    def batches():
        for i in range(6):
            torch.cuda._sleep(20_000_000)
            made.append(torch.cuda.current_stream(device).cuda_stream)
            yield Batch(torch.full((4, 2, 2, 3), i, device=device), torch.arange(4).to(device))

    seen, start, end = [], *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for batch in prefetched(batches(), device):
        torch.cuda._sleep(20_000_000)
        seen.append(batch.images.clone())
    end.record()
    torch.cuda.synchronize()
    beside = start.elapsed_time(end)
    assert [images.unique().tolist() for images in seen] == [[i] for i in range(6)]
    assert set(made) != {torch.cuda.current_stream(device).cuda_stream}
    start.record()
    for _ in range(12):
        torch.cuda._sleep(20_000_000)
    end.record()
    torch.cuda.synchronize()
    assert beside < 0.75 * start.elapsed_time(end)
