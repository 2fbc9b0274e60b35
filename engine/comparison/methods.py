"""The methods of Table 2 of the paper, by name, and one later one."""

from collections.abc import Callable
from dataclasses import replace

from mentorch.engine.comparison.run import Method, Task
from mentorch.engine.config import CurriculumConfig
from mentorch.engine.config_files import with_options

DROP_RATE = 0.5  # Forgetting: the paper searches 0.2 to 0.9
TRANSFERRED_P = 0.75  # p of a transferred MentorNet over the share of right labels
TRUSTED_SHARE = 0.1  # of the training set: the paper's 5,000 of 50,000

_Make = Callable[[float], Method]  # from p of ℓ_pt


def _curriculum(name: str, **options: object) -> _Make:
    return lambda p: Method(
        curriculum=CurriculumConfig(name=name, loss_percentile=p, **options)  # type: ignore[arg-type]
    )


def _without_burn_in(name: str, **options: object) -> _Make:
    return _curriculum(name, burn_in=0.0, **options)


METHODS: dict[str, _Make] = {
    "full": lambda p: Method(),
    "forgetting": lambda p: Method(drop_rate=DROP_RATE),
    "self_paced": _curriculum("self_paced"),
    "focal": _without_burn_in("focal"),
    "reed_soft": _without_burn_in("reed_soft"),
    "reed_hard": _without_burn_in("reed_hard"),
    "noise_layer": _without_burn_in("noise_layer"),
    "gce": _without_burn_in("gce"),
    "mentornet_pd": _curriculum("pd"),
    "mentornet_dd": _curriculum("dd", trusted=TRUSTED_SHARE),
    # Its threshold on ℓ − ℓ_pt is lenient elsewhere: docs/data_driven.md has the study of p.
    "mentornet_dd_transferred": lambda p: _curriculum("dd")(round(TRANSFERRED_P * p, 2)),
    "corrected": lambda p: Method(corrected=TRUSTED_SHARE),
}


def method(text: str, task: Task) -> Method:
    """A method with its hyper-parameters for a task.

    Those with a loss percentile are told the noise: p is the share of labels that is expected to be
    right. (The paper cross-validates p for each noise.)

    Args:
        text: a name, perhaps followed by options of its curriculum: ``mentornet_dd sharpness=1
            learn_at=[0.2]``; values are JSON.
        task: what it is for.

    Raises:
        ValueError: an unknown name or option.
    """
    name, *options = text.split()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    found = METHODS[name](round(task.expected_right(), 2))
    return replace(found, curriculum=with_options(found.curriculum, options))
