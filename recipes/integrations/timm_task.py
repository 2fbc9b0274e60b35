"""timm's training task on wrong labels: its checkpoints hold the loss's state too.

    python recipes/integrations/timm_task.py

Digits of scikit-learn, 40% of whose training labels are drawn anew. The same task under either
loss; the accuracies are on clean test images. What to know: docs/integrations.md.
"""

import tempfile
from pathlib import Path

import torch
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise
from mentorch.engine.integrations.timm import WeightedTask

EPOCHS, BATCH, NOISE = 60, 64, 0.4


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, 1, 8, 8] and given labels [N], test images and clean labels."""
    found = load_images("digits")
    given = Noise("symmetric", NOISE, seed=1).apply(found.labels.numpy(), found.num_classes)
    train, test = (
        x.movedim(-1, 1).float() / 255 for x in (found.images, found.test_images)
    )  # fmt: skip
    return train, torch.from_numpy(given), test, found.test_labels


def new_student() -> nn.Module:
    """A small network, always with the same first weights; any model of timm would do."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def train(task: ClassificationTask, folder: Path, until: int = EPOCHS) -> nn.Module:
    """Trains to the end of epoch ``until``, and goes on where an earlier call ended."""
    images, labels, *_ = digits()
    model = task.get_trainable_module()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(folder))
    checkpoint = folder / "last.pth.tar"
    first = resume_task_checkpoint(task, checkpoint, optimizer) if checkpoint.exists() else 0
    task.train()
    for epoch in range(first, until):
        order = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(len(labels), generator=order).split(BATCH):
            loss = task(images[rows], labels[rows])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    saver.save_checkpoint(until - 1)
    return model


def accuracy(model: nn.Module) -> float:
    """The share of clean test images that is recognised."""
    *_, images, labels = digits()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Prints both accuracies."""
    steps = EPOCHS * -(-len(digits()[1]) // BATCH)
    criterion = mentorch.Reweight("pd", total_steps=steps, loss_percentile=0.6)
    task = WeightedTask(new_student(), criterion)
    plain = ClassificationTask(new_student(), nn.CrossEntropyLoss())
    for name, chosen in (("cross-entropy", plain), ("Reweight", task)):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {accuracy(train(chosen, Path(folder))):.3f} right", flush=True)


if __name__ == "__main__":
    main()
