"""What MentorNet is compared with (Sec. 5.1, "Baselines"): losses that bear wrong labels.

    full        plain cross-entropy: `Reweight("uniform", burn_in=0)`, nothing of its own here
    forgetting  the same under a student with dropout (Arpit et al. 2017): an option of the student
    reed_soft   −Σ_k [β t_k + (1 − β) p_k] log p_k            Reed et al. 2014, Eq. 6
    reed_hard   −Σ_k [β t_k + (1 − β) 1[k = argmax p]] log p_k                  Eq. 7
    noise_layer −log Σ_k p_k Q[k, y], Q learned               Goldberger & Ben-Reuven 2017, Eq. 5
    gce         (1 − p_y^q) / q                               Zhang & Sabuncu 2018, Eq. 6

p are the student's probabilities, t the given label as one-hot, y the given label. Each also says
how much it trusts a label: ``sample_weight`` is the share of the target on the label given (Reed),
the posterior that it is right (noise layer), or the weight of its gradient against cross-entropy's
(GCE). Shapes: B batch, C classes.
"""

from abc import abstractmethod
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mentorch.engine.criterion import Criterion, count_rows
from mentorch.kernels.reweight import Reweighted


class Baseline(Criterion):
    """A mean of some loss per sample; a subclass says which."""

    @abstractmethod
    def sample_objective(self, log_p_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [B] that is minimised and the trust [B] in the labels.

        Args:
            log_p_BC: the student's log-probabilities, float32 at least.
            labels_B: the labels given, in [0, C).
        """

    def weigh_rows(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """One training step; arguments as `Criterion.weigh_rows`."""
        valid = labels != self.ignore_index
        labels = labels.long().masked_fill(~valid, 0)
        # Rows that do not count leave the graph before the loss: 0 · NaN must be 0.
        logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
        with torch.autocast(logits.device.type, enabled=False):
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            objective, trust = self.sample_objective(log_p, labels)
            loss = (objective * valid).sum() / count_rows(valid, self.group)
        sample_loss = F.nll_loss(log_p.detach(), labels, reduction="none") * valid
        return Reweighted(loss, sample_loss, trust.detach() * valid, self.loss_moving_avg)


class Bootstrap(Baseline):
    """Reed et al. 2014: the target is partly the student's own opinion.

    Args:
        kind: the student's probabilities ("soft"), or its first choice ("hard").
        beta: β, the label's part; by default the authors' 0.95 (soft) and 0.8 (hard).
    """

    def __init__(
        self,
        kind: Literal["soft", "hard"],
        *,
        beta: float | None = None,
        ignore_index: int = -100,
        group: dist.ProcessGroup | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__(ignore_index=ignore_index, group=group, class_dim=class_dim)
        self.kind = kind
        self.beta = beta if beta is not None else {"soft": 0.95, "hard": 0.8}[kind]
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is a share in [0, 1], got {beta}")

    def sample_objective(self, log_p_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 6 and 7; the soft target is differentiated too."""
        p_BC = log_p_BC.exp()
        if self.kind == "hard":
            p_BC = torch.zeros_like(p_BC).scatter_(1, p_BC.argmax(1, keepdim=True), 1.0)
        of_label = F.nll_loss(log_p_BC, labels_B, reduction="none")
        of_opinion = -(p_BC * log_p_BC).sum(1)
        agreement = p_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        objective = self.beta * of_label + (1 - self.beta) * of_opinion
        return objective, self.beta + (1 - self.beta) * agreement


class NoiseLayer(Baseline):
    """Goldberger & Ben-Reuven 2017, the simple model: a learned transition matrix on the student.

    Q[i, j] = P(given j | true i) is the softmax over j of C² parameters, initially 1 − ε on the
    diagonal and ε / (C − 1) elsewhere.

    Args:
        num_classes: C.
        epsilon: ε in (0, 1), the noise to start from.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        epsilon: float = 0.1,
        ignore_index: int = -100,
        group: dist.ProcessGroup | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__(ignore_index=ignore_index, group=group, class_dim=class_dim)
        if num_classes < 2:
            raise ValueError(f"a noise layer needs at least 2 classes, got {num_classes}")
        if not 0.0 < epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
        start_CC = torch.full((num_classes, num_classes), epsilon / (num_classes - 1)).log()
        start_CC.fill_diagonal_(torch.tensor(1 - epsilon).log().item())
        self.transition_logits = nn.Parameter(start_CC)

    def sample_objective(self, log_p_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5, and P(true = y | x, given = y) by Bayes."""
        into_label_BC = self.transition_logits.log_softmax(1).T[labels_B]
        joint_BC = log_p_BC + into_label_BC  # log P(true, given = y | x)
        log_given = joint_BC.logsumexp(1)
        of_label = joint_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        return -log_given, (of_label - log_given).exp()


class GeneralisedCrossEntropy(Baseline):
    """Zhang & Sabuncu 2018: between cross-entropy (q → 0) and mean absolute error (q = 1).

    Args:
        q: in (0, 1]; the authors' 0.7.
    """

    def __init__(
        self,
        *,
        q: float = 0.7,
        ignore_index: int = -100,
        group: dist.ProcessGroup | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__(ignore_index=ignore_index, group=group, class_dim=class_dim)
        if not 0.0 < q <= 1.0:
            raise ValueError(f"q must be in (0, 1], got {q}")
        self.q = q

    def sample_objective(self, log_p_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 6; its gradient is p_y^q times cross-entropy's."""
        scaled = self.q * log_p_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        return -torch.expm1(scaled) / self.q, scaled.exp()
