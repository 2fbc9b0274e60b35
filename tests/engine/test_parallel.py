"""Several ranks train as one does."""

import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mentorch.engine import data_driven
from mentorch.engine.agreement import Agreement
from mentorch.engine.config import (
    CurriculumConfig,
    OptimConfig,
    ParallelConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.distributed import World, distributed
from mentorch.engine.parallel import flatten_buffers, share_buffers, synchronise_batch_norms
from mentorch.engine.student import create_student

from .small_spade import BATCH, batches, config_of, new_spade, train


def _assert_same_models(one, other, **tolerance):
    for name in ("model", "average"):
        for key, tensor in one[name].items():
            torch.testing.assert_close(other[name][key], tensor, **tolerance)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"curriculum": CurriculumConfig(name="linear", burn_in=0.1, moving_avg="lagged")},
        {"optim": OptimConfig(lr=0.02, clip_norm=0.5, scale_weight_decay=True, average_decay=0.9)},
        {"train": TrainConfig(epochs=1, batch_size=BATCH, precision="fp32", accumulate=4)},
    ],
    ids=["pd", "lagged", "clipped", "accumulated"],
)
def test_two_ranks_take_the_steps_of_one(ranks, parts, device):
    """The global batch is the same, so is everything else, but for the order of sums."""
    config = config_of(**parts, device=device)
    (alone,) = ranks(train, config, world_size=1).results()
    one, two = ranks(train, config).results()
    torch.testing.assert_close(one["curve"], alone["curve"], rtol=1e-4, atol=1e-5)
    assert torch.equal(one["curve"], two["curve"])
    _assert_same_models(one, two, rtol=0, atol=0)
    _assert_same_models(one, alone, rtol=1e-3, atol=1e-5)
    *_, right, wrong = alone["curve"][-10:].mean(0)
    assert right > wrong + 0.2, "nothing was learned"


def test_a_local_percentile_is_another_one(ranks):
    """Each rank compares its samples with its own: the weights differ from those of one rank."""
    local = config_of(curriculum=CurriculumConfig(name="pd", percentile_over="local", burn_in=0.0))
    as_one = replace(local, curriculum=replace(local.curriculum, percentile_over="global"))
    alone = train(as_one, 20)
    one, two = ranks(train, local, 20).results()
    assert one["state"]["loss_moving_avg"] != two["state"]["loss_moving_avg"]
    assert (one["curve"][:, 1] - alone["curve"][:, 1]).abs().max() > 1e-3
    _assert_same_models(one, two, rtol=0, atol=0)  # gradients are averaged all the same


@pytest.mark.parametrize(
    "curriculum",
    [
        CurriculumConfig(name="linear", weight_lr=0.3, burn_in=0.1),
        CurriculumConfig(name="dd", trusted=0.2, burn_in=0.5, learn_at=(0.5,)),
        CurriculumConfig(name="dd", trusted=0.2, history_steps=3, burn_in=0.5, learn_at=(0.5,)),
        CurriculumConfig(name="noise_layer"),
    ],
    ids=["latent weights", "data-driven", "history", "noise layer"],
)
def test_what_a_curriculum_knows_is_the_same_on_every_rank(ranks, curriculum, monkeypatch):
    """A checkpoint is the main rank's, and another rank may see a sample next."""
    monkeypatch.setattr(data_driven, "fit_visits", partial(data_driven.fit_visits, steps=60))
    config = config_of(curriculum=curriculum)
    one, two = ranks(train, config, 16).results()
    assert one["state"].keys() == two["state"].keys()
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=0, atol=0, equal_nan=True)
    alone = train(config, 16)
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(
            one["state"][name], tensor, rtol=2e-2, atol=2e-2, equal_nan=True, msg=name
        )


def test_the_loss_scale_shrinks_and_is_kept():
    """A scale of 2³⁰ overflows at once: steps are skipped until it fits."""
    config = config_of(train=TrainConfig(epochs=1, batch_size=BATCH, precision="fp16"))
    steps, world = 12, World()
    spade, pixels = new_spade(config, world, steps)
    spade.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    start = [p.clone() for p in spade.student.parameters()]
    of_run = batches(world, steps, pixels)
    assert next(spade.train(of_run)) == 1
    assert spade.metrics()["skipped"] == 1
    assert all(map(torch.equal, start, spade.student.parameters()))
    for _ in spade.train(of_run):
        pass
    assert 0 < spade.metrics()["skipped"] < 11
    again, _ = new_spade(config, world, steps)
    again.load(spade.models(), spade.state(), spade.own())
    assert again.scaler.get_scale() == spade.scaler.get_scale() < 2.0**30
    assert not any(map(torch.equal, start, spade.student.parameters()))


@pytest.mark.parametrize("shared", [{"weight_lr": 0.1}, {"percentile_of": "class"}])
def test_a_local_percentile_refuses_what_must_be_shared(shared):
    with pytest.raises(ValueError, match="percentile_over='local' does not go with"):
        train(config_of(curriculum=CurriculumConfig(percentile_over="local", **shared)), 1)


def test_half_the_bytes_round_the_gradients(ranks):
    plain = config_of()
    halved = replace(plain, parallel=ParallelConfig(gradients="bf16", bucket_mb=0.01))
    one, two = ranks(train, halved, 20).results()
    _assert_same_models(one, two, rtol=0, atol=0)
    exact = train(plain, 20)
    difference = (one["curve"] - exact["curve"]).abs().max()
    assert 1e-7 < difference < 0.05


def test_accumulating_is_the_same_step_where_no_percentile_matters():
    """Plain cross-entropy: the mean of the parts' means, where all parts have all their rows."""
    plain = config_of(curriculum=CurriculumConfig(name="uniform", burn_in=0.0))
    parts = replace(plain, train=replace(plain.train, accumulate=4))
    one, other = train(plain, 10, padding=False), train(parts, 10, padding=False)
    _assert_same_models(one, other, rtol=1e-4, atol=1e-6)


def _syncs(config, steps):
    """How often gradients are exchanged."""
    with distributed("cpu") as world:
        spade, pixels = new_spade(config, world, steps)
        calls = []

        def count(state, bucket):
            calls.append(bucket.buffer().numel())
            return (
                dist.all_reduce(bucket.buffer() / 2, async_op=True)
                .get_future()
                .then(lambda future: future.value()[0])
            )

        spade.replica.register_comm_hook(None, count)
        for _ in spade.train(batches(world, steps, pixels)):
            pass
        return len(calls), sum(calls), sum(p.numel() for p in spade.student.parameters())


@pytest.mark.parametrize("static_graph", [True, False])
def test_accumulating_exchanges_gradients_once_a_step(ranks, static_graph):
    in_parts = TrainConfig(epochs=1, batch_size=BATCH, precision="fp32", accumulate=4)
    parallel = ParallelConfig(static_graph=static_graph)
    (buckets, sent, parameters), _ = ranks(
        _syncs, config_of(train=in_parts, parallel=parallel), 5
    ).results()
    assert sent == 5 * parameters
    assert buckets <= 2 * 5


def test_batch_norms_are_synchronised_on_gpus_only():
    student = create_student(StudentConfig(name="test_resnet"), 10, torch.device("cpu"))
    config = ParallelConfig(sync_batchnorm=True)
    assert synchronise_batch_norms(student, config, World()) is student  # one rank: nothing to do
    with pytest.raises(ValueError, match="SyncBatchNorm takes no CPU tensors"):
        synchronise_batch_norms(student, config, World(world_size=2))
    gpu = World(world_size=2, device=torch.device("cuda"))
    found = synchronise_batch_norms(student, config, gpu)
    assert any("SyncBatchNorm" in type(module).__name__ for module in found.modules())


def test_flat_buffers_are_the_buffers():
    student = create_student(StudentConfig(name="test_resnet"), 10, torch.device("cpu"))
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    flat = flatten_buffers(student)
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, before[name])
    student(torch.randn(2, 3, 32, 32))
    means = [b for name, b in student.named_buffers() if name.endswith("running_mean")]
    assert all((mean != 0).any() for mean in means)
    flat.zero_()
    assert all((mean == 0).all() for mean in means)
    assert flatten_buffers(nn.Linear(2, 2)) is None


def _share():
    with distributed("cpu") as world:
        norm = nn.BatchNorm2d(3)
        norm.running_mean.fill_(world.rank)
        norm.num_batches_tracked.fill_(7 + world.rank)
        share_buffers(norm, world)
        return norm.running_mean.tolist(), norm.num_batches_tracked.item()


def test_the_main_ranks_statistics_are_shared(ranks):
    assert ranks(_share).results() == [([0.0] * 3, 7)] * 2


def _agree():
    with distributed("cpu") as world:
        agreement, heard = Agreement(world, "stop", "other"), []
        for step in range(4):
            if world.rank == 1:
                time.sleep(0.05)
            said = agreement.exchange(world.rank == 1 and step == 1, False)
            heard.append((said["stop"], said["other"]))
        return heard, agreement.finish()


def test_ranks_agree_a_step_later(ranks):
    one, two = ranks(_agree).results()
    assert one == two
    assert one == ([(False, False), (False, False), (True, False), (False, False)],
                   {"stop": False, "other": False})  # fmt: skip


def test_alone_a_flag_is_heard_at_once():
    assert Agreement(World(), "stop").exchange(True) == {"stop": True}


def _meet(delay):
    time.sleep(delay * int(os.environ["RANK"]))
    with distributed("cpu") as world:
        world.notices.set(str(world.rank), f"here {world.rank}")
        world.wait()
        return world.notices.get(str(1 - world.rank)).decode(), world.gather(world.rank)


def test_ranks_meet_whoever_comes_first(ranks):
    assert ranks(_meet, 0.3).results() == [("here 1", [0, 1]), ("here 0", [0, 1])]
