"""Accelerate on wrong labels: `Reweight` in place of cross-entropy, and in `save_state`.

    python recipes/integrations/accelerate_loop.py

Digits of scikit-learn, 40% of whose training labels are drawn anew. The same loop under either
loss; the accuracies are on clean test images. What to know: docs/integrations.md.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise

EPOCHS, BATCH, NOISE = 60, 64, 0.4


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images [N, 1, 8, 8] with given labels to train on, and with clean labels to test on."""
    found = load_images("digits")
    given = Noise("symmetric", NOISE, seed=1).apply(found.labels.numpy(), found.num_classes)
    train, test = (
        x.movedim(-1, 1).float() / 255 for x in (found.images, found.test_images)
    )  # fmt: skip
    labels = torch.from_numpy(given)
    return TensorDataset(train, labels), TensorDataset(test, found.test_labels)


def new_student() -> nn.Module:
    """A small network, always with the same first weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def train(
    accelerator: Accelerator,
    criterion: nn.Module,
    folder: Path,
    first: int = 0,
    until: int = EPOCHS,
) -> nn.Module:
    """Trains epochs ``first`` to ``until`` − 1; from what `folder` holds if not from the first."""
    criterion.to(accelerator.device)
    accelerator.register_for_checkpointing(criterion)
    model = new_student()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(digits()[0], BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if first:
        accelerator.load_state(str(folder))
    for epoch in range(first, until):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return accelerator.unwrap_model(model)


def accuracy(model: nn.Module) -> float:
    """The share of clean test images that is recognised."""
    images, labels = digits()[1].tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Prints both accuracies."""
    steps = EPOCHS * -(-len(digits()[0]) // BATCH)
    criterion = mentorch.Reweight("pd", total_steps=steps, loss_percentile=0.6)
    for name, loss in (("cross-entropy", nn.CrossEntropyLoss()), ("Reweight", criterion)):
        with tempfile.TemporaryDirectory() as folder:
            model = train(Accelerator(cpu=True), loss, Path(folder))
            print(f"{name}: {accuracy(model):.3f} right", flush=True)


if __name__ == "__main__":
    main()
