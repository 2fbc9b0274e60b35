"""What samples of known truth look like to a student, visit by visit: D' of MentorNet DD."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mentorch.engine.comparison.run import Experiment, prepare, trainer
from mentorch.engine.data_driven import Trusted, VisitLog, features_of
from mentorch.engine.distributed import World
from mentorch.engine.mentor_training import Features
from mentorch.kernels.mentor import EPOCHS
from mentorch.kernels.reweight import Reweighted


def gather_visits(experiment: Experiment) -> tuple[Tensor, Tensor]:
    """Trains a student and notes every visit of every sample.

    Args:
        experiment: the source task and the method its student is trained by.

    Returns:
        [N, epochs, 4] as `VisitLog.latest`, on the CPU, and [N] bool: the given label is right.
    """
    config = experiment.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = prepare(experiment.task, config.seed, device)
    spade, loader, _ = trainer(experiment, data, World(device=device))
    is_right = data.given == data.clean
    everything = Trusted(torch.arange(len(is_right), device=device), is_right)
    log = VisitLog(everything, len(is_right), config.train.epochs).to(device)
    total = spade.total_steps

    def note(sample_ids: Tensor, logits: Tensor, labels: Tensor, out: Reweighted) -> None:
        step = torch.tensor(spade.step_count, device=device)
        diff = out.sample_loss - out.loss_moving_avg
        log.record(sample_ids, out.sample_loss, diff, step * EPOCHS // total, step)

    spade.observers = [note]
    for _ in spade.train(loader.batches(0, config.train.epochs)):
        pass
    return log.latest().cpu(), is_right.cpu()


def points_between(
    sources: Sequence[tuple[Tensor, Tensor]], start_pct: int, end_pct: int
) -> tuple[Features, Tensor]:
    """The visits of a stretch of training, of all sources together.

    Args:
        sources: what `gather_visits` returned.
        start_pct: first epoch percentage that counts.
        end_pct: first one that does not.

    Returns:
        Features and v* of every visit.
    """
    found = []
    for visits, is_right in sources:
        pct = visits[:, :, 2:3]
        inside = (pct >= start_pct) & (pct < end_pct)
        found.append(features_of(torch.where(inside, visits, torch.nan), is_right))
    columns = zip(*(features for features, _ in found), strict=True)
    return Features(*map(torch.cat, columns)), torch.cat([target for _, target in found])
