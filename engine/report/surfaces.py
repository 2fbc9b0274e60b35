"""The run's curriculum as a picture: the weight over loss and loss difference."""

from typing import Any

import torch
from matplotlib.patheffects import withStroke
from safetensors import safe_open
from torch import Tensor

from mentorch.engine.criteria import BASELINES, create_criterion
from mentorch.engine.data_driven import new_mentor
from mentorch.engine.report.drawing import ORANGE, Picture, draw
from mentorch.engine.report.run_folder import Run
from mentorch.engine.report.weight_map import LOSS, paint_weights, weight_surface
from mentorch.engine.reweight import Reweight
from mentorch.kernels.mentor import EPOCHS, Curriculum

_MENTOR = "/spade/criterion/mentor."  # where a checkpoint has the learned one's parameters


def curriculum_of(run: Run) -> Curriculum | None:
    """The run's curriculum where a sample's loss decides its weight, else None.

    None for baselines, for ``uniform`` and for latent weights.
    """
    config = run.config.curriculum
    if config.name in BASELINES or config.name == "uniform" or config.weight_lr:
        return None
    if config.trusted:
        return _learned(run)
    nothing = torch.zeros(1, dtype=torch.int64)
    criterion = create_criterion(
        config,
        labels_N=nothing, clean_labels_N=nothing, sample_ids=nothing, num_classes=1, total_steps=1,
    )  # fmt: skip
    assert isinstance(criterion, Reweight)
    return criterion.curriculum()


def _learned(run: Run) -> Curriculum:
    """The MentorNet learned last in the run itself, from its checkpoint."""
    config = run.config.curriculum
    classes = len(run.index.classes[: run.config.data.max_label])
    mentor = new_mentor(config.lstm_units, classes if config.use_label else 0)
    with safe_open(run.checkpoint / "state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(_MENTOR)]  # noqa: SIM118
        mentor.load_state_dict({n.removeprefix(_MENTOR): file.get_tensor(n) for n in names})
    return mentor.weights()


def surfaces(run: Run) -> list[Picture]:
    """The curriculum at the end of burn-in and of training, with where the samples were then."""
    curriculum = curriculum_of(run)
    if curriculum is None:
        return []
    config = run.config.curriculum
    burn_in = min(round(config.burn_in * EPOCHS), EPOCHS - 1)
    moments = {"at the end of burn-in": burn_in, "at the end of training": EPOCHS - 1}
    return [
        _surface(when, weight_surface(curriculum, pct, config.history_steps), _average(run, pct))
        for when, pct in moments.items()
        if pct or when != "at the end of burn-in"
    ]


def _average(run: Run, epoch_pct: int) -> float | None:
    """ℓ_pt at that share of the training that was planned, nats; None where it is yet to come."""
    train = [line for line in run.metrics if "loss_moving_avg" in line]
    if run.total_steps is None or not train:
        return None
    step = run.total_steps * (epoch_pct + 1) / EPOCHS
    if train[-1]["step"] < step:
        return None
    nearest = min(train, key=lambda line: abs(line["step"] - step))
    return float(nearest["loss_moving_avg"])


def _surface(when: str, weight: Tensor, average: float | None) -> Picture:
    def paint(axes: Any) -> None:
        paint_weights(axes, weight)
        if average is not None:
            halo = [withStroke(linewidth=3.2, foreground="white")]  # seen on any weight
            line = {"color": ORANGE, "linestyle": "--", "linewidth": 1.6, "path_effects": halo}
            axes.plot(LOSS, LOSS - average, **line)

    where = (
        "" if average is None else f" The dashed line is where samples were, ℓ_pt = {average:.2f}."
    )
    alt = f"Heat map of the weight over loss and loss difference {when}.{where}"
    return draw(f"Curriculum {when}", alt, paint)
