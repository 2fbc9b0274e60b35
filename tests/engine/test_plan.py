"""The dry run: what it says is what the run is, it leaves nothing, and it finds what is wrong."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from mentorch.engine import pace, plan
from mentorch.engine.config import OptimConfig, StudentConfig
from mentorch.engine.data.pipelines import Normalise
from mentorch.engine.distributed import World
from mentorch.engine.footprint import optimizer_bytes, size_of, trace
from mentorch.engine.job import run
from mentorch.engine.optim import create_optimizer
from mentorch.engine.prepared import Prepared
from mentorch.engine.student import create_student
from mentorch.kernels import batch_norm, residual

from .runs import only_run

CPU = torch.device("cpu")


@pytest.fixture
def dry(small_run):
    """The small run, dry; its steps are timed for no longer than is needed."""
    return replace(small_run, dry_run=True)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pace, "_LEAST_S", 0.0)


def said(config, capsys):
    """The plan's lines by title; those below a title belong to it."""
    assert run(config) == 0
    found, title = {}, ""
    for line in capsys.readouterr().out.splitlines()[2:]:
        title = line[:12].strip() or title
        found[title] = found.get(title, "") + line[12:] + "\n"
    return found


def test_the_plan_is_what_the_run_then_is(dry, capsys, tmp_path):
    planned = said(dry, capsys)
    assert not (tmp_path / "runs").exists()
    assert run(replace(dry, dry_run=False)) == 0
    out = capsys.readouterr().out
    steps = re.search(r"([\d,]+) steps an epoch, ([\d,]+) in all", out)
    assert planned["steps"].startswith(f"{steps[2]}: 2 epochs of {steps[1]}, 384 images")
    assert planned["training"].startswith("197 images of 10 classes")
    assert planned["evaluation"].count("250 images, 2 times") == 2
    assert "burn-in 7 steps with 50%" in planned["curriculum"]  # 0.3 of 24
    assert re.search(r"min|s: .* training at [\d,.]+ images/s", planned["time"])
    size = sum(f.stat().st_size for f in only_run(dry).glob("checkpoints/step-00000024/*"))
    number, unit = re.match(r"([\d.]+) (\w+) a checkpoint", planned["disk"]).groups()
    planned_size = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert planned_size == pytest.approx(size, rel=0.15)  # headers and JSON come on top


def test_a_run_that_goes_on_has_fewer_steps_to_take(dry, capsys):
    begun = replace(dry, dry_run=False, train=replace(dry.train, epochs=1))
    assert run(begun) == 0
    capsys.readouterr()
    folder = only_run(begun)
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    assert "12 are taken" in said(replace(dry, resume=folder), capsys)["steps"]
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before
    with pytest.raises(ValueError, match="was made with seed 0, this run has 5"):
        run(replace(dry, resume=folder, seed=5))


def test_what_is_not_indexed_is_not_counted(dry, digits, tmp_path, capsys):
    (tmp_path / "new" / "info").mkdir(parents=True)
    for name in ("synsets.txt", "train_filelist_google.txt"):
        (tmp_path / "new" / "info" / name).touch()
    planned = said(replace(dry, data=replace(dry.data, train=tmp_path / "new")), capsys)
    assert "mentorch index webvision" in planned["index"]
    assert not {"steps", "memory", "time", "disk"} & planned.keys()
    assert "burn-in 30% of training" in planned["curriculum"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["info"]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("student", {"name": "no_such_model"}, "there is no model 'no_such_model'"),
        ("curriculum", {"name": "mine.safetensors"}, "mine.safetensors"),
        ("optim", {"implementation": "apex"}, "apex"),
        ("train", {"batch_size": 1600}, "batch"),  # more than there are samples
        ("train", {"accumulate": 3}, "train.batch_size is 16"),
        ("data", {"sources": ("bing",)}, "no usable sample"),
        ("data", {"noise": "symmetric:0.4:2"}, "noise"),
    ],
)
def test_it_fails_as_the_run_would(dry, part, values, message):
    config = replace(dry, **{part: replace(getattr(dry, part), **values)})
    for once in (config, replace(config, dry_run=False)):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(once)


def test_a_place_that_cannot_be_written_to(dry, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="give another --out"):
        run(replace(dry, out=tmp_path / "file"))


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_the_first_rank_plans_for_all(rank, dry, monkeypatch, capsys):
    """Two ranks: half of the batch each; nobody waits for the others, who say nothing."""
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    if rank:
        assert run(dry) == 0
        assert capsys.readouterr().out == ""
        return
    planned = said(dry, capsys)
    assert "16 images = 2 × 8" in planned["batch"]
    assert "on 2 × cpu" in planned["student"]
    assert planned["steps"].startswith("24: 2 epochs of 12")


def test_a_batch_that_ranks_cannot_share(dry, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="16, which 3 ranks cannot share out evenly"):
        run(dry)


# ---- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "side", "dtype"),
    [
        ("test_resnet", 16, 32, torch.float32),
        ("cifar_resnet20", 8, 32, torch.float32),
        ("cifar_resnet20", 8, 32, torch.bfloat16),
        ("small_cnn", 64, 28, torch.float32),
    ],
)
def test_the_trace_without_data_is_that_of_real_passes(name, images, side, dtype):
    student = create_student(StudentConfig(name=name), 10, CPU).train()
    normalise = Normalise((0.5,) * 3, (0.5,) * 3)
    before = [parameter.clone() for parameter in student.state_dict().values()]
    fake = trace(student, normalise, dtype, images, side)
    assert all(map(torch.equal, before, student.state_dict().values()))
    assert all(parameter.grad is None for parameter in student.parameters())
    real = trace(student, normalise, dtype, images, side, fake=False)
    assert fake.activations == pytest.approx(real.activations, rel=0.02)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)
    assert fake.peak > fake.activations > images * side * side * 3


def test_fused_norms_are_traced_without_their_kernels(monkeypatch):
    """As on a GPU, where those would be launched, on tensors without data."""
    for module in (batch_norm, residual):
        monkeypatch.setattr(module, "runs_kernels", lambda *tensors: True)
    config = StudentConfig(name="inception_resnet_v2_fast", fused_norms=True)
    student = create_student(config, 10, CPU).train()
    for stage in ("repeat", "repeat_1", "repeat_2"):  # a block each, to be quick
        setattr(student, stage, getattr(student, stage)[:1])
    there = set(student.modules())
    student._units = [unit for unit in student._units if unit in there]
    normalise = Normalise((0.5,) * 3, (0.5,) * 3)
    found = trace(student, normalise, torch.float32, 2, 75)
    assert student.fused_norms
    student.fused_norms = False
    assert found == trace(student, normalise, torch.float32, 2, 75)
    assert not student.fused_norms


@pytest.mark.parametrize("fused", [False, True])
def test_the_plan_says_what_stands_for_fused_norms(fused, dry):
    found = Prepared(dry, World(device=CPU), 1, 16)
    other = replace(found, config=replace(dry, student=StudentConfig(fused_norms=fused)))
    for name in ("data", "weights", "trace"):  # of a student that is quick to make
        other.__dict__[name] = getattr(found, name)
    said = " ".join(text for _, text in plan._memory(other))
    assert ("with PyTorch's norms for the fused ones" in said) == fused


def test_activations_are_what_autograd_saves():
    """Linear, ReLU, linear: the input, the first output's sign and the second input are kept."""
    student = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 1000), torch.nn.Sigmoid(),
        torch.nn.Linear(1000, 10),
    )  # fmt: skip
    found = trace(student, Normalise((0.5,) * 3, (0.5,) * 3), torch.float32, 128, 8)
    pixels, hidden = 128 * 192 * 4, 128 * 1000 * 4
    assert pixels + hidden <= found.activations <= 2 * pixels + hidden + 128 * 300


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(),
        OptimConfig(momentum=0.0),
        OptimConfig(name="lars"),
        OptimConfig(name="lamb"),
    ],
    ids=lambda o: f"{o.name} {o.momentum}",
)
def test_the_optimisers_bytes_are_exact(optim):
    student = create_student(StudentConfig(name="test_resnet"), 10, CPU)
    optimizer = create_optimizer(optim, student)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    slots = [v for state in optimizer.state.values() for v in state.values()]
    real = size_of(v for v in slots if isinstance(v, torch.Tensor) and v.ndim)
    assert optimizer_bytes(optim, student) == real
    assert (real > 0) == (optim.name == "lamb" or optim.momentum > 0)


# ---- Disk ---------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_curriculums_tables(dry):
    """Latent weights are two numbers a sample, float32, and a scratch row of each."""
    tables = replace(dry, curriculum=replace(dry.curriculum, weight_lr=0.1))
    with_tables, without = (Prepared(config, World(device=CPU), 1, 16) for config in (tables, dry))
    rows = len(without.data.train.labels_N) + 1
    assert with_tables.checkpoint_bytes - without.checkpoint_bytes == 2 * 4 * rows


# ---- Time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("an_image_s", "timed"),
    [(0.001, [2, 8, 32, 64]), (1.0, [2, 8]), (20.0, [2])],
    ids=["all of it fits", "some", "hardly any"],
)
def test_what_is_not_timed_is_on_the_line_through_what_is(an_image_s, timed, dry, monkeypatch):
    """Steps of 0.5 s + so much an image: however far the timing got, 64 images follow."""
    asked = []

    def step_s(config, spade, samples, world, images, most):
        asked.append(images)
        return 1, 0.5 + an_image_s * images

    monkeypatch.setattr(pace, "_time_steps", step_s)
    data = type("Data", (), {"train": None, "evaluate": {}})
    found = pace.measure_pace(dry, None, data, World(), share=64, room=1000)
    assert asked == timed
    assert found.step_s == pytest.approx(
        0.5 + an_image_s * 64, rel=0.01 if len(timed) > 1 else 0.02
    )


def test_memory_limits_the_images_that_are_timed(dry, monkeypatch):
    monkeypatch.setattr(pace, "_time_steps", lambda *rest: (1, 0.1 * rest[4]))
    data = type("Data", (), {"train": None, "evaluate": {}})
    found = pace.measure_pace(dry, None, data, World(), share=64, room=4)
    assert found.images == 4
    assert found.step_s == pytest.approx(6.4)


@pytest.mark.parametrize(
    ("share", "parts", "room", "timed"),
    [
        (8, 1, 1, False),
        (8, 1, 2, True),
        (1, 1, 0, False),  # the whole share is smaller than two images
        (1, 1, 1, True),
        (4, 4, 0, False),  # and than two images a part
        (4, 4, 4, True),
    ],
)
def test_steps_that_do_not_fit_are_not_timed(share, parts, room, timed, dry, monkeypatch):
    config = replace(dry, train=replace(dry.train, batch_size=share, accumulate=parts))
    monkeypatch.setattr(plan, "_room", lambda found: room)
    asked = []

    def measure(*arguments):
        asked.append(arguments[-1])
        return pace.Pace(room, 3, 1.0, {})

    monkeypatch.setattr(plan, "measure_pace", measure)
    monkeypatch.setattr(plan, "_evaluation_s", lambda found, pace: 0.0)
    ((_, said), *_) = plan._time(Prepared(config, World(device=CPU), 1, share))
    assert asked == ([room] if timed else [])
    if not timed:
        assert f"even a step of {min(2 * parts, share)} images does not fit" in said


@pytest.mark.parametrize(("ranks", "why"), [(1, "needs a GPU"), (2, "of 2 ranks")])
def test_steps_are_timed_as_the_run_would_take_them(ranks, why, dry):
    """One rank alone could capture its steps where two of a run cannot."""
    config = replace(dry, train=replace(dry.train, engine="graph"))
    found = Prepared(config, World(device=CPU), ranks, 16 // ranks)
    said = [text for title, text in plan._time(found) if title == "engine"]
    assert len(said) == 1
    assert why in said[0]
    assert found.spade.config.train.engine == ("graph" if ranks == 1 else "eager")


@pytest.mark.parametrize(
    ("engine", "kind", "untimed"),
    [
        ("eager", "cuda", 1),
        ("compile", "cuda", 1),
        ("graph", "cuda", 4),  # three warm ones, and the one that is captured
        ("compile-graph", "cuda", 4),
        ("graph", "cpu", 1),  # nothing is captured there
    ],
)
def test_steps_before_the_engine_is_at_work_are_not_timed(engine, kind, untimed, dry, monkeypatch):
    """Of those 100 s each on a made-up clock, of the others 1 s: what is timed is 1 s."""
    clock, asked = [0.0], []

    class Loader:
        def __init__(self, *arguments, **settings):
            pass

        def close(self):
            pass

        def batches(self, epochs):
            asked.append(epochs)
            return range(epochs)

    def train(batches):
        for at, _ in enumerate(batches):
            clock[0] += 100.0 if at < untimed else 1.0
            yield at

    monkeypatch.setattr(pace, "Loader", Loader)
    monkeypatch.setattr(pace, "_now", lambda world: clock[0])
    spade = type("Spade", (), {"train": staticmethod(train)})
    samples = type("Samples", (), {"index": None, "sample_ids": None})
    config = replace(dry, train=replace(dry.train, engine=engine))
    found = pace._time_steps(config, spade, samples, World(device=torch.device(kind)), 8, 3)
    assert found == (3, 1.0)
    assert asked == [3 + untimed]  # enough, should an epoch be a single step


@pytest.mark.parametrize("timing", ["steps", "evaluation"])
def test_a_loader_is_closed_when_the_student_fails(timing, dry, monkeypatch):
    """Its threads and pipelines would be there until the process ends."""
    found = Prepared(dry, World(device=CPU), 1, 8)
    name, samples = next(iter(found.data.evaluate.items()))
    closed = []

    class Loader(pace.Loader):
        def close(self):
            closed.append(self)
            super().close()

    def fail(*arguments):
        raise RuntimeError("the student fails")

    monkeypatch.setattr(pace, "Loader", Loader)
    monkeypatch.setattr(found.spade, "train", fail)
    monkeypatch.setattr(pace, "evaluate", fail)
    run_timing = {
        "steps": partial(pace._time_steps, dry, found.spade, samples, found.world, 8, 1),
        "evaluation": partial(
            pace._time_evaluation, dry, found.spade, name, samples, found.world, 8
        ),
    }
    with pytest.raises(RuntimeError, match="the student fails"):
        run_timing[timing]()
    assert len(closed) == 1


@pytest.mark.parametrize("taken", [0, 11, 12, 24])  # none, within an epoch, at its end, all
def test_evaluations_that_are_past_are_not_counted(taken, dry):
    """Two sets of 250 images, at 0.1 s an image after 1 s, in epochs of 12 steps."""
    found = Prepared(dry, World(device=CPU), 1, 16)
    found.__dict__["done"] = taken  # as if a checkpoint told
    each = dict.fromkeys(found.data.evaluate, (1.0, 0.1))
    times = 2 - taken // 12
    assert plan._evaluation_s(found, pace.Pace(16, 1, 1.0, each)) == times * 2 * 26


@pytest.mark.parametrize(
    ("size", "words"),
    [(500, "500 B"), (2048, "2 KiB"), (3.5 * 2**20, "3.5 MiB"), (2**31, "2.00 GiB")],
)
def test_bytes_in_words(size, words):
    assert plan.in_words(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(90, "90.0 s"), (600, "10.0 min"), (36000, "10.0 h"), (864000, "10.0 days")],
)
def test_durations_in_words(seconds, words):
    assert plan.duration(seconds) == words
