"""From a configuration to its criterion: `Reweight`, its kin, or a baseline."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mentorch.engine.baselines import Bootstrap, GeneralisedCrossEntropy, NoiseLayer
from mentorch.engine.config import CurriculumConfig
from mentorch.engine.criterion import Criterion
from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.data_driven import DataDriven, Trusted
from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.mentor import MentorNet
from mentorch.engine.reweight import Reweight
from mentorch.kernels.mentor import ClosedForm
from mentorch.kernels.philox import Stream, philox

IGNORED = -100
BASELINES: dict[str, Callable[..., Criterion]] = {  # each takes C and what `Criterion` takes
    "reed_soft": lambda classes, **rest: Bootstrap("soft", **rest),
    "reed_hard": lambda classes, **rest: Bootstrap("hard", **rest),
    "noise_layer": NoiseLayer,
    "gce": lambda classes, **rest: GeneralisedCrossEntropy(**rest),
}


_SAME_NAMES = (  # options of `Reweight` that the configuration calls the same
    "loss_percentile", "decay", "moving_avg", "burn_in", "burn_in_dropout",
    "burn_in_dropout_until", "example_dropout", "late_dropout", "late_dropout_from",
    "exact_dropout", "freeze_epoch",
)  # fmt: skip


def choose_trusted(
    labels_N: Tensor, clean_labels_N: Tensor, sample_ids: Tensor, share: float, seed: int
) -> Trusted:
    """D': samples with a known clean label, drawn by the seed.

    Args:
        labels_N: [N] int64, the given labels.
        clean_labels_N: [N] int64; −1 where unknown.
        sample_ids: [n] int64, the samples trained on.
        share: of them all, how many to draw.
        seed: which ones.

    Raises:
        ValueError: fewer than that have a known clean label.
    """
    ids = sample_ids[clean_labels_N[sample_ids] >= 0].cpu()
    count = round(share * len(sample_ids))
    if count > len(ids):
        raise ValueError(
            f"{count:,} trusted samples were asked for, but {len(ids):,} of the "
            f"{len(sample_ids):,} training samples have a known clean label"
        )
    chosen = ids[philox(seed, 0, ids, Stream.TRUSTED)[0].argsort(stable=True)[:count]]
    chosen = chosen.sort().values.to(labels_N.device)
    return Trusted(chosen, clean_labels_N[chosen] == labels_N[chosen], labels_N[chosen])


def _curriculum(config: CurriculumConfig) -> ClosedForm | MentorNet:
    found = resolve_curriculum(config.name)
    if isinstance(found, ClosedForm):
        found = replace(found, lambda1=config.lambda1, lambda2=config.lambda2, gamma=config.gamma)
    return found


def create_criterion(
    config: CurriculumConfig,
    *,
    labels_N: Tensor,
    clean_labels_N: Tensor,
    sample_ids: Tensor,
    num_classes: int,
    total_steps: int,
    seed: int = 0,
) -> Criterion:
    """The criterion of a run.

    Args:
        config: which.
        labels_N: [N] int64 on the device, the given label of every row of the index.
        clean_labels_N: likewise the labels known to be right; −1 where unknown.
        sample_ids: [n] int64, the rows trained on.
        num_classes: C.
        total_steps: of training.
        seed: of the dropout, and of which samples are trusted.

    Raises:
        ValueError: an unknown name, or options that do not go together.
    """
    group = dist.group.WORLD if config.percentile_over == "global" else None
    by_sample = config.trusted or config.weight_lr or config.history_steps > 1
    if config.percentile_over == "local" and (by_sample or config.percentile_of == "class"):
        raise ValueError(
            "percentile_over='local' does not go with trusted, weight_lr, history_steps or "
            "percentile_of='class': what is known about a sample or a class must be the same on "
            "every rank; take 'global'"
        )
    if config.percentile_of == "class" and (config.trusted or config.weight_lr):
        raise ValueError(
            "percentile_of='class' does not go with trusted or weight_lr, which compare losses "
            "with the percentile of the batch; take 'batch'"
        )
    device = labels_N.device
    if config.name in BASELINES:
        # Averaging over ranks is over the global batch in any case.
        shared: dict[str, Any] = {"ignore_index": IGNORED, "group": dist.group.WORLD}
        return BASELINES[config.name](num_classes, **shared).to(device)
    settings: dict[str, Any] = {
        "total_steps": total_steps,
        "seed": seed,
        "ignore_index": IGNORED,
        "group": group,
        **{name: getattr(config, name) for name in _SAME_NAMES},
    }
    if config.trusted:
        trusted = choose_trusted(labels_N, clean_labels_N, sample_ids, config.trusted, seed)
        return DataDriven(
            trusted,
            num_samples=len(labels_N),
            learn_at=config.learn_at,
            history_steps=config.history_steps,
            lstm_units=config.lstm_units,
            num_labels=num_classes if config.use_label else 0,
            use_loss=config.use_loss,
            sharpness=config.sharpness,
            **settings,
        ).to(device)
    curriculum = _curriculum(config)
    if config.weight_lr:
        if not isinstance(curriculum, ClosedForm):
            raise ValueError("weight_lr follows the gradient of a G, which a MentorNet has not")
        return LatentReweight(
            curriculum, num_samples=len(labels_N), weight_lr=config.weight_lr, **settings
        ).to(device)
    settings |= {"history_steps": config.history_steps, "num_samples": len(labels_N)}
    settings |= {"percentile_of": config.percentile_of, "num_classes": num_classes}
    return Reweight(curriculum, **settings).to(device)
