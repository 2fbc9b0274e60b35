"""The method's settings by name: the paper's text, and its released code, quirk by quirk.

Where the two differ, the paper's way is the default of every option. What the released code does
otherwise, and the option that does it:

    ℓ_pt forgets by 0.5 a step, not 0.95                               curriculum.decay
    an exact count of samples is dropped, not a coin tossed for each   curriculum.exact_dropout
    5% of the samples are dropped after burn-in, too                   curriculum.example_dropout
    the first rate of dropout ends before DD's burn-in does       curriculum.burn_in_dropout_until
    DD on the wide resnet drops 90% of the samples in the last 5%      curriculum.late_dropout
    the epoch that DD reads stays where burn-in ended                  curriculum.freeze_epoch
    weight decay is multiplied by the mean sample weight               optim.scale_weight_decay
    PD is a mixture that changes with the epoch                        curriculum.name=pd_released
    the MentorNet is never told the label                              MentorNet(use_label=False)
    the LSTM passes on its cell state                                  MentorNet(lstm_output="c")

The released nets' output bias was added to fc2's weights: another fc2 without a bias, which needs
no option.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mentorch.engine.config import CurriculumConfig

PresetName = Literal["paper", "released-code"]
PublishedMethod = Literal["full", "self_paced", "focal", "pd", "dd"]


@dataclass(frozen=True)
class Published:
    """What the released commands give for CIFAR-10 and CIFAR-100 alike.

    Attributes:
        rates: noise rate → p of ℓ_pt.
        burn_in: share of training.
        drops: whether samples are dropped at random.
    """

    rates: dict[float, float]
    burn_in: float
    drops: bool


PUBLISHED: dict[str, Published] = {
    "self_paced": Published({0.2: 0.7, 0.4: 0.7, 0.8: 0.7}, burn_in=0.0, drops=False),
    "focal": Published({0.2: 0.7, 0.4: 0.7, 0.8: 0.7}, burn_in=0.0, drops=False),
    "pd": Published({0.2: 0.75, 0.4: 0.75, 0.8: 0.5}, burn_in=0.17, drops=True),
    "dd": Published({0.2: 0.8, 0.4: 0.6, 0.8: 0.5}, burn_in=0.18, drops=True),
}


def published_percentile(method: str, rate: float) -> float:
    """p of ℓ_pt for a noise rate, that of the nearest published one."""
    rates = PUBLISHED[method].rates
    return rates[min(rates, key=lambda published: abs(published - rate))]


def curriculum_preset(
    preset: PresetName, method: PublishedMethod, rate: float, wide_resnet: bool = True
) -> CurriculumConfig:
    """A method's curriculum with the published hyper-parameters.

    Args:
        preset: the paper's text (burn-in 20% by coins, whose probability it does not print: ½, as
            released; ℓ_pt by 0.95), or the released code.
        method: of Table 2.
        rate: of the noise, for p of ℓ_pt; the paper cross-validates p and names no values, so
            those of the released commands serve both.
        wide_resnet: the student is ``mentornet_resnet101``, whose released commands differ in DD's
            dropout.

    Raises:
        ValueError: an unknown preset or method.
    """
    if preset not in get_args(PresetName) or method not in get_args(PublishedMethod):
        raise ValueError(
            f"no preset {preset!r} of {method!r}: presets are {', '.join(get_args(PresetName))}, "
            f"methods {', '.join(get_args(PublishedMethod))}"
        )
    if method == "full":
        return CurriculumConfig(name="uniform", burn_in=0.0)
    published, p = PUBLISHED[method], published_percentile(method, rate)
    if preset == "paper":
        burn_in = 0.2 if published.drops else 0.0
        return CurriculumConfig(name=method, loss_percentile=p, burn_in=burn_in)
    return CurriculumConfig(
        name={"pd": "pd_released"}.get(method, method),
        loss_percentile=p,
        decay=0.5,
        burn_in=published.burn_in,
        burn_in_dropout=0.5 if published.drops else 0.0,
        example_dropout=0.05 if published.drops else 0.0,
        exact_dropout=published.drops,
        freeze_epoch=method == "dd",
        burn_in_dropout_until=0.17 if published.drops else None,
        late_dropout=0.9 if method == "dd" and wide_resnet else 0.0,
        late_dropout_from=0.95,
    )
