"""The weight each sample had when last seen, against whether its label is right."""

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mentorch.kernels.reweight import Reweighted

BINS = 20


class WeightLog:
    """An observer of `Spade`.

    Args:
        is_right: [N] bool, on the device: the given label is the true one.
    """

    def __init__(self, is_right: Tensor) -> None:
        self.is_right = is_right
        # The last entry is scratch, for rows that are no sample.
        self.weight = torch.zeros(len(is_right) + 1, device=is_right.device)
        self.loss = torch.zeros_like(self.weight)
        self.histograms: dict[str, list[list[int]]] = {"right": [], "wrong": []}

    def __call__(self, sample_ids: Tensor, logits: Tensor, labels: Tensor, out: Reweighted) -> None:
        """Notes a step."""
        self.weight[sample_ids] = out.sample_weight.float()
        self.loss[sample_ids] = out.sample_loss.float()

    def snapshot(self, epoch: int) -> dict[str, float]:
        """How well weight and loss tell right labels from wrong ones; adds to the histograms.

        Args:
            epoch: just ended, from 1.

        Returns:
            Areas under the ROC curve in [0, 1]: ``auroc_weight``, ``auroc_loss`` (of −loss).
            Nothing when all labels are right.
        """
        weight, right = self.weight[:-1], self.is_right
        for name, rows in (("right", right), ("wrong", ~right)):
            counts = torch.histc(weight[rows], BINS, 0.0, 1.0) if bool(rows.any()) else None
            self.histograms[name].append([] if counts is None else counts.long().tolist())
        if bool(right.all()) or not bool(right.any()):
            return {}
        truth = right.cpu().numpy()
        return {
            "auroc_weight": float(roc_auc_score(truth, weight.cpu().numpy())),
            "auroc_loss": float(roc_auc_score(truth, -self.loss[:-1].cpu().numpy())),
        }
