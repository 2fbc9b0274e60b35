"""The loss in other people's trainers: resumed by their checkpoints, accumulated, compiled.

Over two ranks: test_integrations_ranks.py.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mentorch

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "integrations"
PAGE = ROOT / "docs" / "integrations.md"
# An epoch of the 1,297 digits; the last batch is smaller, so not all micro-batches count equally.
STEPS = {"hf_trainer": 6}  # in batches of 256, for its student is slower; the others take 64
EPOCHS = 2


def steps(host):
    return STEPS.get(host, 21)


def example(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weighted(host):
    return mentorch.Reweight("pd", total_steps=EPOCHS * steps(host), loss_percentile=0.6)


def over_all_items(outputs, labels, num_items_in_batch):
    """Cross-entropy as Transformers' documentation says that a `compute_loss_func` is scaled."""
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def like_cross_entropy():
    return mentorch.Reweight("uniform", burn_in=0)


def train_plain(folder, criterion, until):
    return example("plain_torch").train(criterion, folder, until)


def train_timm(folder, criterion, until):
    module = example("timm_task")
    return module.train(module.WeightedTask(module.new_student(), criterion), folder, until)


def train_lightning(folder, criterion, until, **options):
    module = example("lightning_fit")
    classifier = module.Classifier(criterion)
    module.train(classifier, folder, until, **options)  # it validates too
    return classifier.student


def new_accelerator(**options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    return Accelerator(cpu=True, **options)


def train_accelerate(folder, criterion, until, **options):
    first = EPOCHS - 1 if until == EPOCHS and any(folder.iterdir()) else 0
    train = example("accelerate_loop").train
    return train(new_accelerator(**options), criterion, folder, first, until)


def train_hf(folder, criterion, until, **options):
    module = example("hf_trainer")
    chosen = {"compute_loss_func": criterion}
    if isinstance(criterion, mentorch.Reweight):
        loss = module.TrainerLoss(criterion)
        chosen = {"compute_loss_func": loss, "callbacks": [loss]}
    # In the middle of the second epoch, so that it skips batches; it has evaluated before.
    saving = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "epoch"}
    options = {
        "num_train_epochs": until, "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 500, **saving, **options,
    }  # fmt: skip
    new_accelerator()
    saved = folder / "checkpoint-8"
    trainer = module.make_trainer(folder, options, **chosen)
    trainer.train(resume_from_checkpoint=str(saved) if saved.exists() else None)
    return trainer.model


HOSTS = {
    "plain_torch": train_plain,
    "timm_task": train_timm,
    "lightning_fit": train_lightning,
    "accelerate_loop": train_accelerate,
    "hf_trainer": train_hf,
}


def states(model, criterion):
    return {**model.state_dict(), **{f"loss.{k}": v for k, v in criterion.state_dict().items()}}


def different(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("host", HOSTS)
def test_resumed_by_the_hosts_checkpoint_it_is_the_uninterrupted_run(host, tmp_path):
    train, whole, parts = HOSTS[host], tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    criterion = weighted(host)
    expected = states(train(whole, criterion, EPOCHS), criterion)
    assert criterion.step == EPOCHS * steps(host), "validation, which some do, is no step"
    if host == "hf_trainer":  # its learning rates depend on the end, so it has to go there
        parts = whole
    else:
        train(parts, weighted(host), EPOCHS - 1)
    resumed = weighted(host)
    found = states(train(parts, resumed, EPOCHS), resumed)
    assert different(expected, found) == []


def test_averaged_weights_leave_the_state_alone_if_buffers_are_not_averaged(tmp_path):
    """As the page says; by default Lightning would average the step and the ledger's bytes too."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    criterions = weighted("lightning_fit"), weighted("lightning_fit")
    averaging = EMAWeightAveraging(decay=0.9, use_buffers=False)
    for criterion, callbacks in zip(criterions, ([], [averaging]), strict=True):
        folder = tmp_path / str(len(callbacks))
        folder.mkdir()
        train_lightning(folder, criterion, 1, callbacks=callbacks)
    plain, averaged = (criterion.state_dict() for criterion in criterions)
    kept = [name for name, _ in criterions[0].named_buffers()]
    assert not {*different(plain, averaged)} & {*kept}
    torch.testing.assert_close(averaged, plain)  # a frozen MentorNet's averages are rounded
    assert averaged["step"] == steps("lightning_fit")


ACCUMULATED = {
    "lightning_fit": ({"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}),
    "accelerate_loop": ({"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}),
    "hf_trainer": ({"gradient_accumulation_steps": 2, "eval_strategy": "no"}, {"bf16": True}),
}


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("host", ACCUMULATED)
def test_where_all_weights_are_one_accumulated_steps_are_those_of_cross_entropy(
    host, amp, tmp_path
):
    accumulate, precision = ACCUMULATED[host]
    options = {**accumulate, **(precision if amp else {})}
    criterion, folders = like_cross_entropy(), [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    ours = HOSTS[host](folders[0], criterion, 1, **options).state_dict()
    plain = over_all_items if host == "hf_trainer" else nn.CrossEntropyLoss()
    theirs = HOSTS[host](folders[1], plain, 1, **options).state_dict()
    assert criterion.step == steps(host), "every part is a step"
    begun = new_student(host).state_dict()
    for name in filter(lambda name: theirs[name].is_floating_point(), theirs):
        off, moved = (ours[name] - theirs[name]).norm(), (theirs[name] - begun[name]).norm()
        assert off <= 1e-3 * moved, (name, off / moved)


def new_student(host):
    module = example(host)
    if host == "lightning_fit":
        return module.Classifier(nn.CrossEntropyLoss()).student
    return module.new_student()


def test_a_scaled_float16_loss_has_the_float32_gradient():
    torch.manual_seed(0)
    images, labels = torch.rand(32, 64), torch.arange(32) % 10
    gradients = []
    for scaled in (False, True):
        torch.manual_seed(1)
        student, criterion = nn.Linear(64, 10), weighted("plain_torch")
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = criterion(student(images), labels)
        scaler.scale(loss).backward()
        optimizer = torch.optim.SGD(student.parameters())
        scaler.unscale_(optimizer)
        assert loss.dtype == torch.float32
        gradients.append(student.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("together", [False, True], ids=["model alone", "model and loss"])
def test_compiled_without_a_break_it_gives_the_same_losses(backend, together):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        criterion = mentorch.Reweight("pd", total_steps=6, num_samples=40, ledger=True)

        def step(images, labels, ids, student=student, criterion=criterion):
            return criterion(student(images), labels, ids)

        if compiled and together:
            step = torch.compile(step, backend=backend, fullgraph=True)
        elif compiled:
            student.compile(backend=backend, fullgraph=True)
        optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.1), []
        for _ in range(4):  # one in burn-in
            ids = torch.randperm(40)[:16]
            loss = step(torch.rand(16, 64), ids % 10, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append((torch.stack(losses), criterion.loss_moving_avg, criterion.step))
    torch.testing.assert_close(*found)


def diffs():
    """The diff blocks of the page by the example that each stands for."""
    text = PAGE.read_text()
    blocks = re.findall(
        r"\(\.\./recipes/integrations/(\w+)\.py\).*?```diff\n(.*?)```", text, re.DOTALL
    )
    return dict(blocks)


@pytest.mark.parametrize("host", HOSTS)
def test_the_pages_diff_has_three_lines_and_they_are_in_the_example(host):
    lines = [line.strip() for line in (RECIPES / f"{host}.py").read_text().splitlines()]
    added = [line[1:].strip() for line in diffs()[host].splitlines() if line[0] == "+"]
    assert 1 <= len(added) <= 3
    for line in added:
        assert line in lines, line


# The others take minutes together; their code runs above, for fewer epochs.
AS_STARTED = [
    pytest.param(name, marks=pytest.mark.slow if name == "plain_torch" else pytest.mark.soak)
    for name in HOSTS
]


@pytest.mark.parametrize("name", AS_STARTED)
def test_an_example_as_a_user_starts_it(name):
    found = run_example(name)
    plain, ours = map(float, re.findall(r": (0\.\d+) right", found))
    assert 0.5 < plain < ours - 0.05  # both far above chance, 0.1


@pytest.mark.slow
def test_the_example_with_sample_ids(tmp_path):
    found = run_example("sample_scores", tmp_path / "scores.parquet")
    assert float(re.search(r"0\.\d+", found)[0]) > 0.9  # 0.36 of all are
    assert (tmp_path / "scores.parquet").stat().st_size > 0


def run_example(name, *arguments):
    done = subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", *arguments],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
