"""Pictures of a run in TensorBoard: its curriculum, and the weights of its samples."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.ledger import Ledger
from mentorch.engine.reweight import Reweight
from mentorch.engine.spade import Spade
from mentorch.engine.telemetry import Telemetry
from mentorch.kernels.ledger import fields
from mentorch.kernels.mentor import EPOCHS

_BINS = 50  # of the weights
_DPI = 80


class Pictures:
    """Draws on the main rank; elsewhere, and without ``train.pictures``, it does nothing.

    A curriculum that stays as it is, is drawn when a run starts; one that is learned in the run at
    the end of each epoch in which that happened. A picture never stops a run: the first that fails
    is said, and no more are drawn.

    Args:
        spade: the run.
        ledger: of its samples, if there is one.
        telemetry: of the run.
    """

    def __init__(self, spade: Spade, ledger: Ledger | None, telemetry: Telemetry) -> None:
        self.spade, self.ledger, self.telemetry = spade, ledger, telemetry
        self.enabled = spade.config.train.pictures and telemetry.enabled
        # A run that goes on has drawn what was learned before its last end of an epoch.
        self._drawn = spade.step_count - spade.step_count % spade.steps_per_epoch
        if not spade.step_count and not self._is_learned():
            self._try(curriculum=True)

    def end_epoch(self) -> None:
        """What has changed in the epoch; the ledger is merged before."""
        parts = self.spade.config.train.accumulate
        calls = range(self._drawn * parts, self.spade.step_count * parts)
        self._drawn = self.spade.step_count
        self._try(curriculum=any(map(self.spade.criterion.learns_at, calls)), weights=True)

    def _is_learned(self) -> bool:
        """Whether the run itself learns the curriculum, which until then is in force nowhere."""
        return bool(self.spade.config.curriculum.trusted)

    def _try(self, *, curriculum: bool = False, weights: bool = False) -> None:
        if not self.enabled:
            return
        try:
            if curriculum:
                self._draw_curriculum()
            if weights and self.ledger is not None:
                self._count_weights(self.ledger)
        except Exception as error:  # whatever it is, training is worth more than a picture of it
            self.enabled = False
            self.telemetry.say(
                f"no pictures in TensorBoard from here: {type(error).__name__}: {error}"
            )

    def _draw_curriculum(self) -> None:
        criterion = self.spade.criterion
        if not isinstance(criterion, Reweight) or isinstance(criterion, LatentReweight):
            return  # there a sample's loss alone does not decide its weight
        if criterion.closed_form is not None and criterion.closed_form.kind == "uniform":
            return
        step, image = self.spade.step_count, curriculum_image(criterion)
        self.telemetry.on_board(
            lambda board: board.add_image("curriculum", image, step, dataformats="HWC")
        )

    def _count_weights(self, ledger: Ledger) -> None:
        weights = fields(ledger.table[:-1])["weight"]
        step = self.spade.step_count
        self.telemetry.on_board(lambda board: add_weights(board, "weights", weights, step))


def curriculum_image(criterion: Reweight) -> NDArray[np.uint8]:
    """The curriculum in force over loss and loss difference, [height, width, 3].

    Drawn for the end of burn-in, the middle of what follows and the end of training; where it is
    the same there, once.

    Args:
        criterion: of the run.
    """
    from PIL import Image

    from mentorch.engine.report.drawing import rendered  # matplotlib: not every run draws
    from mentorch.engine.report.weight_map import paint_row, surfaces_at

    start, end = min(criterion.dropout.burn_in_pct, EPOCHS - 1), EPOCHS - 1
    epochs = sorted({start, (start + end) // 2, end})
    steps = 1 if criterion.history is None else criterion.history.shape[1]
    surfaces = surfaces_at(criterion.curriculum(), epochs, history_steps=steps)
    size = (1.4 + 2.2 * len(surfaces), 2.6)
    png = rendered(lambda figure: paint_row(figure, surfaces), size, format="png", dpi=_DPI)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def add_weights(board: SummaryWriter, name: str, weights: Tensor, step: int) -> None:
    """Writes how many samples have which weight, counted on their device.

    Args:
        board: to write to.
        name: of the histogram.
        weights: [N] in [0, 1]; NaN for samples that were never visited.
        step: of training.
    """
    seen = weights[~weights.isnan()].float()
    if not len(seen):
        return
    limits = torch.linspace(0, 1, _BINS + 1)[1:]
    board.add_histogram_raw(
        name,
        min=float(seen.min()),
        max=float(seen.max()),
        num=len(seen),
        sum=float(seen.sum()),
        sum_squares=float(seen.square().sum()),
        bucket_limits=limits.tolist(),
        bucket_counts=seen.histc(_BINS, 0, 1).tolist(),
        global_step=step,
    )
