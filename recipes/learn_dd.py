"""Learns a data-driven MentorNet on one image set, to be applied to others.

    python recipes/learn_dd.py --out dd.safetensors            # how the shipped `dd` was made
    python recipes/noisy_bench.py --methods mentornet_dd_transferred

A student is trained on images whose true labels are known, with noise of each of the given kinds;
the MentorNet learns to tell right labels from wrong ones by what the student's losses looked like.
docs/data_driven.md tells why the defaults are what they are.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from mentorch.engine.cli import run_cleanly
from mentorch.engine.comparison.bench import NoisyBench, experiments
from mentorch.engine.comparison.gather import gather_visits, points_between
from mentorch.engine.data_driven import fit_visits


@dataclass(frozen=True, kw_only=True)
class LearnDD(NoisyBench):
    """What is learned from."""

    classes: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Classes of the source; all when empty."""
    skip: int = 6_000
    """Source images left out, so that another task may have them: the table's is among these."""
    between: tuple[int, int] = (20, 100)
    """Stretch of the source's training that is learned from, epoch percentages from–to."""
    use_epoch: bool = False
    """Whether the MentorNet reads the training progress."""
    sharpness: float = 4.0
    """What the logit of the weight is multiplied by."""
    steps: int = 3000
    """Of the MentorNet's optimiser."""


def main() -> int:
    """Trains the students, learns and saves the MentorNet."""
    default = LearnDD(
        train_samples=5_000,
        noises=("symmetric:0.2", "symmetric:0.4", "symmetric:0.8"),
        methods=("mentornet_pd",),
        seeds=(0,),
        out=Path("dd.safetensors"),
    )
    options = tyro.cli(LearnDD, default=default, description=__doc__)
    if options.out.suffix != ".safetensors":
        raise ValueError(f"a MentorNet is read from *.safetensors files only, got {options.out}")
    sources = []
    for found in experiments(options):
        task = replace(found.task, classes=options.classes, skip=options.skip)
        print(f"training a student: {found.key}", flush=True)
        sources.append(gather_visits(replace(found, task=task)))
    features, is_right = points_between(sources, *options.between)
    mentor = fit_visits(
        features, is_right, steps=options.steps, use_epoch=options.use_epoch,
        sharpness=options.sharpness,
    )  # fmt: skip
    mentor.card |= {"source": f"{options.dataset}, classes {options.classes}, {options.noises}"}
    mentor.save(options.out)
    print(f"{options.out}: {mentor.card}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
