"""Hugging Face Trainer on wrong labels: the loss as `compute_loss_func`, saved by its callback.

    python recipes/integrations/hf_trainer.py

Digits of scikit-learn, 40% of whose training labels are drawn anew, and a small ResNet made
from a configuration: nothing is downloaded. The same Trainer under either loss; the accuracies
are on clean test images. What to know: docs/integrations.md.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise
from mentorch.engine.integrations.transformers import TrainerLoss

EPOCHS, BATCH, NOISE = 25, 64, 0.4
Items = list[dict[str, Tensor]]


def digits() -> tuple[Items, Items]:
    """Images with given labels to train on, and with clean labels to test on."""
    found = load_images("digits")
    given = Noise("symmetric", NOISE, seed=1).apply(found.labels.numpy(), found.num_classes)
    train, test = (
        x.movedim(-1, 1).float() / 255 for x in (found.images, found.test_images)
    )  # fmt: skip
    labels = torch.from_numpy(given)
    return as_items(train, labels), as_items(test, found.test_labels)


def as_items(images: Tensor, labels: Tensor) -> Items:
    """Images [N, 1, 8, 8] and labels [N] as the Trainer wants a data set."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def new_student() -> ResNetForImageClassification:
    """A small image classifier, always with the same first weights."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, num_labels=10, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1],
        layer_type="basic",
    )  # fmt: skip
    return ResNetForImageClassification(config)


def make_trainer(folder: Path, options: dict[str, Any], **loss: Any) -> Trainer:
    """A Trainer under its own loss, or under that of ``loss``."""
    given, clean = digits()
    arguments = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 3e-3,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**arguments, **options})
    return Trainer(new_student(), args, train_dataset=given, eval_dataset=clean, **loss)


def accuracy(trainer: Trainer) -> float:
    """The share of clean test images that is recognised."""
    found = trainer.predict(trainer.eval_dataset)
    return float((found.predictions.argmax(1) == found.label_ids).mean())


def main() -> None:
    """Prints both accuracies."""
    steps = EPOCHS * -(-len(digits()[0]) // BATCH)
    loss = TrainerLoss(mentorch.Reweight("pd", total_steps=steps, loss_percentile=0.6))
    with tempfile.TemporaryDirectory() as folder:
        plain = make_trainer(Path(folder), {})
        trainer = make_trainer(
            Path(folder),
            {},
            compute_loss_func=loss,
            callbacks=[loss],
        )
        for name, chosen in (("cross-entropy", plain), ("Reweight", trainer)):
            chosen.train()
            print(f"{name}: {accuracy(chosen):.3f} right", flush=True)


if __name__ == "__main__":
    main()
