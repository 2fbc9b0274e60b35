"""Token classification on wrong labels, in plain PyTorch: `Reweight` in place of cross-entropy.

    python recipes/integrations/token_classification.py

The text is generated: a token's tag follows from the token and the one before it, and 40% of the
training tags are drawn anew. A small GRU learns them under either loss; the accuracies are on
clean tags of new sentences. Sentences differ in length, and padding (tag −100) counts nowhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mentorch

WORDS, TAGS, LENGTH = 40, 8, 16
IGNORED = -100  # both losses know it as their default
SENTENCES, BATCH, EPOCHS, NOISE = 256, 32, 20, 0.4


class Tagger(nn.Module):
    """Token ids [B, L] to logits [B, L, C]."""

    def __init__(self, units: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, units)
        self.gru = nn.GRU(units, units, batch_first=True)
        self.head = nn.Linear(units, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Every token's logits; the classes come last."""
        return self.head(self.gru(self.embedding(tokens))[0])


def draw(sentences: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and given tags, [sentences, L] each; the tags of the padding are ``IGNORED``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (sentences, LENGTH), generator=generator)
    tags = (tokens + 3 * (tokens.roll(1, 1) % 2)) % TAGS
    anew = torch.rand(tags.shape, generator=generator) < noise
    tags = torch.where(anew, torch.randint(TAGS, tags.shape, generator=generator), tags)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (sentences, 1), generator=generator)
    return tokens, tags.masked_fill(torch.arange(LENGTH) >= lengths, IGNORED)


def train(criterion: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Accuracy on the clean tags of new sentences, after the last epoch."""
    torch.manual_seed(0)
    tagger = Tagger()
    optimizer = torch.optim.Adam(tagger.parameters(), lr=3e-3)
    tokens, tags = draw(SENTENCES, NOISE, seed=1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(SENTENCES).split(BATCH):
            loss = criterion(tagger(tokens[rows]), tags[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tokens, tags = draw(1000, 0.0, seed=2)
    right = tagger(tokens).argmax(-1) == tags
    return (right.sum() / (tags != IGNORED).sum()).item()


def cross_entropy(logits: Tensor, tags: Tensor) -> Tensor:
    """The plain loss; PyTorch wants the classes in the second dimension."""
    return nn.functional.cross_entropy(logits.movedim(-1, 1), tags)


def main() -> None:
    """Prints both accuracies."""
    steps = EPOCHS * SENTENCES // BATCH
    # loss_percentile: roughly the share of tags that is right.
    reweight = mentorch.Reweight("pd", total_steps=steps, loss_percentile=0.6, class_dim=-1)
    print(f"cross-entropy: {train(cross_entropy):.3f} of the clean tags right", flush=True)
    print(f"Reweight:      {train(reweight):.3f}")


if __name__ == "__main__":
    main()
