"""How well `find_label_issues` finds wrong labels and estimates their share, beside cleanlab.

    python bench/find_issues.py            # some 30 minutes on two cores; what was run is not again

Fashion-MNIST's first 10,000 training images in a fixed order, noise put on them, and the same with
classes of unequal sizes (the largest has ten times the samples of the smallest). cleanlab gets
out-of-sample probabilities of the same student, trained by plain cross-entropy in as many folds and
epochs; the last epoch's, as is usual, and the mean over epochs that ours takes.

Writes docs/results/find_issues/: results.json, table.md.
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

import mentorch
from mentorch.engine.data.images import load_images
from mentorch.engine.data.noise import Noise
from mentorch.engine.issues.noise_rate import estimate_noise
from mentorch.engine.report.detection import precision_at

OUT = Path(__file__).parents[1] / "docs" / "results" / "find_issues"
RARE = 3  # classes, the smallest of the imbalanced set


@dataclass(frozen=True)
class Case:
    """One cross-validation."""

    noise: str
    rate: float
    curriculum: str
    imbalance: int
    percentile_of: str
    seed: int
    samples: int = 10_000

    @property
    def key(self) -> str:
        return "-".join(map(str, asdict(self).values()))


def cases(seeds: tuple[int, ...]) -> list[Case]:
    """What is run, the most important first."""
    kinds = [
        [
            ("symmetric", 0.2, name, imbalance, of)
            for imbalance in (1, 10)
            for name, of in (("self_paced", "class"), ("uniform", "batch"), ("self_paced", "batch"))
        ],
        [("symmetric", rate, "self_paced", 1, "class") for rate in (0.4, 0.6, 0.1, 0.3, 0.5)],
        [("symmetric", 0.4, "uniform", 1, "batch"), ("symmetric", 0.2, "pd", 1, "class")],
        [("asymmetric", 0.4, "self_paced", 1, "class"), ("asymmetric", 0.4, "uniform", 1, "batch")],
        [("symmetric", rate, "uniform", 1, "batch") for rate in (0.6, 0.1)],
    ]
    return [Case(*kind, seed) for part in kinds for seed in seeds for kind in part]


def draw(case: Case) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Images, given labels and clean labels."""
    everything = load_images("fashion_mnist")
    order = np.random.default_rng(2018).permutation(len(everything.labels))
    labels = everything.labels.numpy()[order]
    sizes = case.imbalance ** (-np.arange(10) / 9)
    sizes = np.floor(case.samples * sizes / sizes.sum()).astype(int)
    of_class = [order[labels == c][:size] for c, size in enumerate(sizes)]
    rows = np.sort(np.concatenate(of_class))
    clean = everything.labels.numpy()[rows]
    mapping = "fashion_mnist" if case.noise == "asymmetric" else None
    noise = Noise(case.noise, case.rate, case.seed, mapping)  # type: ignore[arg-type]
    return everything.images[rows], noise.apply(clean, 10, rows), clean


def detection(wrong: NDArray[np.bool_], suspicion: NDArray[np.float64]) -> dict[str, float]:
    count = int(wrong.sum())
    return {
        "auroc": float(roc_auc_score(wrong, suspicion)),
        "precision at all": precision_at(wrong, suspicion, count),
        "precision at half": precision_at(wrong, suspicion, count // 2),
    }


def scores_of(probabilities: NDArray[np.float32], given: NDArray[np.int64]) -> dict[str, Any]:
    """Suspicion by each score that is compared; higher is more suspicious."""
    from cleanlab.rank import get_label_quality_scores

    exact = probabilities.astype(np.float64)
    exact /= exact.sum(1, keepdims=True)
    methods = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
    found = {f"cleanlab {m}": 1 - get_label_quality_scores(given, exact, method=m) for m in methods}
    adjusted = get_label_quality_scores(given, exact, adjust_pred_probs=True)
    return found | {"cleanlab self_confidence, adjusted": 1 - adjusted}


def cleanlabs_rate(probabilities: NDArray[np.float32], given: NDArray[np.int64]) -> float:
    """1 − the trace of cleanlab's joint of given and right labels."""
    from cleanlab.count import estimate_joint

    exact = probabilities.astype(np.float64)
    return float(1 - np.trace(estimate_joint(given, exact / exact.sum(1, keepdims=True))))


def run(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    images, given, clean = draw(case)
    wrong, rows = given != clean, np.arange(len(given))
    started = time.perf_counter()
    found = mentorch.find_label_issues(
        images, given, curriculum=case.curriculum, percentile_of=case.percentile_of,
        seed=case.seed, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    mean, last = found.probabilities, found.judgement.last
    rare = np.isin(clean, np.arange(10 - RARE, 10))
    predicted = mean.argmax(1)
    by_class = [float((predicted == clean)[clean == c].mean()) for c in range(10)]
    suspicion = {
        "mean over epochs": 1 - mean[rows, given],
        "last epoch": 1 - last[rows, given],
        "loss over epochs": -np.log(np.maximum(mean[rows, given], 1e-30)),
        "in training: 1 − mean weight": 1 - found.judgement.weight_mean,
    }
    suspicion |= {f"{name}, last epoch": s for name, s in scores_of(last, given).items()}
    suspicion |= {f"{name}, mean": s for name, s in scores_of(mean, given).items()}
    return {
        "case": asdict(case),
        "wrong": float(wrong.mean()),
        "seconds": seconds,
        "detection": {name: detection(wrong, s) for name, s in suspicion.items()},
        "detection, rare classes": {
            name: detection(wrong[rare], s[rare]) for name, s in suspicion.items()
        },
        "accuracy": float((predicted == clean).mean()),
        "accuracy by class": by_class,
        "accuracy, last epoch": float((last.argmax(1) == clean).mean()),
        "percentiles": found.judgement.percentiles,
        "rate": {
            **{
                f"anchors {share:g}, {name}": estimate_noise(p, given, share).rate
                for share in (0.05, 0.1, 0.2, 0.3, 0.5)
                for name, p in (("mean", mean), ("last", last))
            },
            "find_label_issues": found.noise.rate,
            "standard error": found.noise.standard_error,
            "cleanlab, mean": cleanlabs_rate(mean, given),
            "cleanlab, last": cleanlabs_rate(last, given),
        },
        "versions": {name: version(name) for name in ("torch", "cleanlab", "numpy")},
    }


def main(
    seeds: tuple[int, ...] = (0, 1), jobs: int = 2, runs: Path = Path("runs/find_issues")
) -> None:
    """Runs what is missing.

    Args:
        seeds: of noise, folds and students.
        jobs: cases side by side.
        runs: folder of a file a case.
    """
    runs.mkdir(parents=True, exist_ok=True)
    missing = [case for case in cases(seeds) if not (runs / f"{case.key}.json").is_file()]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for case, found in zip(missing, pool.map(run, missing), strict=True):
            (runs / f"{case.key}.json").write_text(json.dumps(found, indent=1))
            print(case.key, f"{found['seconds']:.0f} s", file=sys.stderr, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    found = [json.loads((runs / f"{case.key}.json").read_text()) for case in cases(seeds)]
    (OUT / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
