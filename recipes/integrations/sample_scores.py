"""Which labels are wrong? Plain PyTorch with sample ids: the loss keeps a ledger of every sample.

    python recipes/integrations/sample_scores.py [OUT.parquet]

Digits of scikit-learn, 40% of whose training labels are drawn anew. What the loss has seen of every
sample becomes a table, the most suspicious label first. Other hosts: docs/integrations.md.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise
from mentorch.engine.report.scores import write_scores

EPOCHS, BATCH, NOISE = 40, 64, 0.4


def main() -> None:
    """Prints how many of the most suspicious labels are wrong."""
    found = load_images("digits")
    noise = Noise("symmetric", NOISE, seed=1)
    labels = torch.from_numpy(noise.apply(found.labels.numpy(), 10))
    images = found.images.flatten(1).float() / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = mentorch.Reweight(
        "pd", total_steps=EPOCHS * -(-len(labels) // BATCH), loss_percentile=0.6,
        num_samples=len(labels), ledger=True,
    )  # fmt: skip
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = criterion(model(images[rows]), labels[rows], rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    scores = criterion.sample_scores(labels, found.classes, clean_labels=found.labels)
    wrong = (labels != found.labels).numpy()
    worst = scores["sample_id"].to_numpy()[: wrong.sum()]
    print(f"{wrong[worst].mean():.3f} of the {len(worst)} most suspicious labels are wrong")
    if len(sys.argv) > 1:
        write_scores(scores, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
