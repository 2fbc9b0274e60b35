"""Methods against label noise on a small image set: one recipe, several seeds, one table.

    python recipes/noisy_bench.py          # Fashion-MNIST, the table of docs/results
    python recipes/noisy_bench.py --train-samples 0 --epochs 60

Fashion-MNIST is Debian's package dataset-fashion-mnist, or --root. A broken-off comparison goes on
where it was. OUT gets a file a run, results.parquet, table.md and figures.
"""

import sys

import tyro

from mentorch.engine.cli import run_cleanly
from mentorch.engine.comparison.bench import NoisyBench, compare


def main() -> int:
    """Runs the comparison that the command line asks for."""
    return compare(tyro.cli(NoisyBench, description=__doc__))


if __name__ == "__main__":
    sys.exit(run_cleanly(main))
