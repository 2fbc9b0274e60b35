"""Plain PyTorch on wrong labels: `Reweight` in place of cross-entropy, and in the checkpoint.

    python recipes/integrations/plain_torch.py

Digits of scikit-learn, 40% of whose training labels are drawn anew. The same loop under either
loss; the accuracies are on clean test images. What to know: docs/integrations.md.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise

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
    """A small network, always with the same first weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def train(criterion: nn.Module, folder: Path, until: int = EPOCHS) -> nn.Module:
    """Trains to the end of epoch ``until``, and goes on where an earlier call ended."""
    images, labels, *_ = digits()
    model = new_student()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        criterion.load_state_dict(state["criterion"])
        first = state["epochs"]
    for epoch in range(first, until):
        order = torch.Generator().manual_seed(epoch)
        for rows in torch.randperm(len(labels), generator=order).split(BATCH):
            loss = criterion(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": until}
    state["criterion"] = criterion.state_dict()
    torch.save(state, checkpoint)
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
    for name, loss in (("cross-entropy", nn.CrossEntropyLoss()), ("Reweight", criterion)):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {accuracy(train(loss, Path(folder))):.3f} right", flush=True)


if __name__ == "__main__":
    main()
