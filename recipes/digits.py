"""Real handwritten digits, 40% of whose labels are drawn anew: two minutes on two CPU cores.

    python recipes/digits.py

It trains a small network on scikit-learn's digits with plain cross-entropy and under three
curricula, and draws what happens: cross-entropy learns the wrong labels by heart, the others do
not. The picture is symmetric-0.4.curves.png in OUT.
"""

import sys
from pathlib import Path

import tyro

from mentorch.engine.cli import run_cleanly
from mentorch.engine.comparison.bench import NoisyBench, compare

DIGITS = NoisyBench(
    dataset="digits",
    train_samples=0,
    noises=("symmetric:0.4",),
    methods=("full", "self_paced", "mentornet_pd", "mentornet_dd"),
    student="small_mlp",
    epochs=60,
    out=Path("runs/digits"),
)


def main() -> int:
    """Runs the comparison; every option of it can be changed."""
    return compare(tyro.cli(NoisyBench, default=DIGITS, description=__doc__))


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
