"""A student of a few thousand weights under SPADE, on images that are made up."""

from dataclasses import replace

import torch
from timm.models import register_model
from torch import nn

from mentorch.engine.config import (
    CurriculumConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from mentorch.engine.criteria import create_criterion
from mentorch.engine.data.pipelines import Batch
from mentorch.engine.distributed import distributed
from mentorch.engine.spade import Spade
from mentorch.engine.student import create_student

CURVE = ("loss", "weighted_loss", "loss_moving_avg", "weight_right", "weight_wrong")
N, SIDE, CLASSES, BATCH = 512, 8, 10, 32


@register_model
def tiny_norm(num_classes=10, in_chans=1, drop_rate=0.0, **_of_timm):
    """A batch norm, and little else that a compiler would have to think about."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * (SIDE // 2) ** 2, num_classes),
    )  # fmt: skip


def config_of(device="cpu", **parts):
    config = RunConfig(
        device=device,
        student=StudentConfig(name="small_mlp", drop_rate=0.0),
        curriculum=CurriculumConfig(name="pd", burn_in=0.2),
        optim=OptimConfig(lr=0.02, average_decay=0.9, warmup_epochs=0, schedule="constant"),
        train=TrainConfig(epochs=1, batch_size=BATCH, precision="fp32"),
    )
    return replace(config, **parts)


def images():
    """Every class a pattern of its own, plus noise; a third of the labels is wrong."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(N) % CLASSES
    pattern = torch.randint(0, 200, (CLASSES, SIDE, SIDE, 1), generator=generator)
    noise = torch.randint(0, 56, (N, SIDE, SIDE, 1), generator=generator)
    wrong = torch.rand(N, generator=generator) < 0.33
    labels = torch.where(wrong, torch.randint(0, CLASSES, (N,), generator=generator), clean)
    return (pattern[clean] + noise).to(torch.uint8), labels, clean


class ToFloat(nn.Module):
    def forward(self, images):
        return images.permute(0, 3, 1, 2) / 255 - 0.5


def batches(world, steps, pixels, parts=1, padding=True):
    """Global batches that do not depend on the ranks; one id of −1 in each, on the last rank."""
    generator = torch.Generator().manual_seed(1)
    share = BATCH // world.world_size
    for _ in range(steps):
        ids = torch.randperm(N, generator=generator)[:BATCH]
        ids[-1] = -1 if padding else ids[-1]
        mine = ids.view(parts, world.world_size, -1)[:, world.rank].reshape(share)
        mine = mine.to(world.device)
        yield Batch(pixels[mine.clamp(min=0)], mine)


def new_spade(config, world, steps, observers=()):
    pixels, labels, clean = (tensor.to(world.device) for tensor in images())
    torch.manual_seed(config.seed)
    student = create_student(config.student, CLASSES, world.device, in_chans=1, img_size=SIDE)
    criterion = create_criterion(
        config.curriculum,
        labels_N=labels,
        clean_labels_N=clean,
        sample_ids=torch.arange(N, device=world.device),
        num_classes=CLASSES,
        total_steps=steps * config.train.accumulate,
    )
    spade = Spade(
        config, student, criterion, ToFloat(), labels, clean, steps, world, observers=observers
    )
    return spade, pixels


def train(config, steps=50, world=None, padding=True):
    """Losses and ℓ_pt of every step, and what is there at the end."""
    if world is None:
        with distributed(config.device) as joined:
            return train(config, steps, joined, padding)
    trained, pixels = new_spade(config, world, steps)
    curve = []
    for _ in trained.train(batches(world, steps, pixels, config.train.accumulate, padding)):
        metrics = trained.metrics()
        curve.append([metrics[name] for name in CURVE])
    state = trained.criterion.state_dict()
    found = {**trained.models(), "state": state}
    on_host = {
        name: {key: tensor.cpu() for key, tensor in part.items()} for name, part in found.items()
    }
    return {"curve": torch.tensor(curve, dtype=torch.float64), **on_host}
