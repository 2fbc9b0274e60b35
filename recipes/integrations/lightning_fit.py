"""Lightning on wrong labels: the loss is a part of the module, so its checkpoints have its state.

    python recipes/integrations/lightning_fit.py

Digits of scikit-learn, 40% of whose training labels are drawn anew. The same module under either
loss; the accuracies are on clean test images. What to know: docs/integrations.md.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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


class Classifier(lightning.LightningModule):
    """A small network and its loss."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip
        self.criterion = criterion

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A step under either loss."""
        images, labels = batch
        return self.criterion(self.student(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Lightning has called ``eval()``: `Reweight` is plain cross-entropy here."""
        images, labels = batch
        logits = self.student(images)
        self.log("val_loss", self.criterion(logits, labels))
        self.log("accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The criterion's MentorNet is frozen: it may be among the parameters."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(module: Classifier, folder: Path, until: int = EPOCHS, **options: Any) -> float:
    """Trains to the end of epoch ``until``, and goes on where an earlier call ended."""
    given, clean = digits()
    order = DistributedSampler(given, num_replicas=1, rank=0)  # an order an epoch, also resumed
    trainer = lightning.Trainer(
        max_epochs=until, default_root_dir=folder, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        check_val_every_n_epoch=EPOCHS, **options,
    )  # fmt: skip
    checkpoint = folder / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(given, BATCH, sampler=order),
        ckpt_path=checkpoint if checkpoint.exists() else None,
    )
    trainer.save_checkpoint(checkpoint)
    return trainer.validate(module, DataLoader(clean, BATCH), verbose=False)[0]["accuracy"]


def main() -> None:
    """Prints both accuracies."""
    steps = EPOCHS * -(-len(digits()[0]) // BATCH)
    criterion = mentorch.Reweight("pd", total_steps=steps, loss_percentile=0.6)
    for name, loss in (("cross-entropy", nn.CrossEntropyLoss()), ("Reweight", criterion)):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {train(Classifier(loss), Path(folder)):.3f} right", flush=True)


if __name__ == "__main__":
    main()
