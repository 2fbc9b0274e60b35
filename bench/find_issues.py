"""How well `find_label_issues` finds wrong labels and estimates their share, beside cleanlab.

    python bench/find_issues.py            # some 30 minutes on two cores; what was run is not again

10,000 training images of Fashion-MNIST, drawn by class in a fixed order, noise put on them, and the
same with classes of unequal sizes (the largest has ten times the samples of the smallest). cleanlab
gets out-of-sample probabilities of the same student, trained by plain cross-entropy in as many
folds and epochs; the last epoch's, as is usual, and the mean over epochs that ours takes.

Writes docs/results/find_issues/: results.json, README.md.
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
from mentorch.engine.data.index import replacing
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
        [("symmetric", rate, "self_paced", 1, "class") for rate in (0.4, 0.6, 0.1)],
        [("symmetric", 0.4, "uniform", 1, "batch"), ("asymmetric", 0.4, "self_paced", 1, "class")],
        [("symmetric", rate, "self_paced", 1, "class") for rate in (0.3, 0.5)],
        [("symmetric", 0.2, "pd", 1, "class"), ("asymmetric", 0.4, "uniform", 1, "batch")],
        [("symmetric", 0.6, "uniform", 1, "batch")],
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
                for share in (0.05, 0.1, 0.2, 0.5)
                for name, p in (("mean", mean), ("last", last))
            },
            "standard error": found.noise.standard_error,
            "cleanlab, mean": cleanlabs_rate(mean, given),
            "cleanlab, last": cleanlabs_rate(last, given),
        },
        "versions": {name: version(name) for name in ("torch", "cleanlab", "numpy")},
    }


# ---- Tables -------------------------------------------------------------------------------------

ROWS = {  # name: curriculum, percentile of, score
    "`find_label_issues`": ("self_paced", "class", "mean over epochs"),
    "… last epoch alone": ("self_paced", "class", "last epoch"),
    "… percentile by batch": ("self_paced", "batch", "mean over epochs"),
    "… curriculum `pd`": ("pd", "class", "mean over epochs"),
    "… no curriculum": ("uniform", "batch", "mean over epochs"),
    "… weights in training": ("self_paced", "class", "in training: 1 − mean weight"),
    **{
        f"cleanlab, `{m}`": ("uniform", "batch", f"cleanlab {m}, last epoch")
        for m in (
            "self_confidence", "normalized_margin", "confidence_weighted_entropy",
            "self_confidence, adjusted",
        )
    },
    "cleanlab, `normalized_margin`, on `found.probabilities`": (
        "self_paced", "class", "cleanlab normalized_margin, mean",
    ),
}  # fmt: skip


def chosen(found: list[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    return [one for one in found if wanted.items() <= one["case"].items()]


def over_seeds(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def detections(found: list[dict[str, Any]], noise: str, rate: float, imbalance: int = 1) -> str:
    of_noise = chosen(found, noise=noise, rate=rate, imbalance=imbalance)
    titles = ["score", "AUROC", "wrong among the top k", "top k/2", "accuracy out of sample"]
    titles += ["AUROC, three smallest classes"] if imbalance > 1 else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, (curriculum, of, score) in ROWS.items():
        runs = chosen(of_noise, curriculum=curriculum, percentile_of=of)
        if not runs:
            continue
        at = [run["detection"][score] for run in runs]
        accuracy = "accuracy, last epoch" if "last" in score else "accuracy"
        columns = [
            over_seeds([d["auroc"] for d in at], 4),
            over_seeds([100 * d["precision at all"] for d in at], 1),
            over_seeds([100 * d["precision at half"] for d in at], 1),
            over_seeds([100 * run[accuracy] for run in runs], 1),
        ]
        if imbalance > 1:
            rare = [run["detection, rare classes"][score]["auroc"] for run in runs]
            columns.append(over_seeds(rare, 4))
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def rates(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| noise | wrong, % | `find_label_issues`, % | error | cleanlab, plain, % | error |",
        "|---|---|---|---|---|---|",
    ]
    cases = [(one["case"]["noise"], one["case"]["rate"], one["case"]["imbalance"]) for one in found]
    for noise, rate, imbalance in sorted(set(cases), key=lambda case: (-ord(case[0][0]), *case)):
        about = {"noise": noise, "rate": rate, "imbalance": imbalance}
        ours = chosen(found, **about, curriculum="self_paced", percentile_of="class")
        peer = chosen(found, **about, curriculum="uniform")
        columns = [over_seeds([100 * run["wrong"] for run in ours], 1)]
        for runs, key in ((ours, "anchors 0.1, mean"), (peer, "cleanlab, last")):
            estimates = [100 * run["rate"][key] for run in runs]
            errors = [100 * (run["rate"][key] - run["wrong"]) for run in runs]
            columns += [over_seeds(estimates, 1) or "–", over_seeds(errors, 1) or "–"]
        name = f"{noise} {rate:g}" + (f", {imbalance}:1" if imbalance > 1 else "")
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def report(found: list[dict[str, Any]]) -> str:
    seconds = {
        name: [one["seconds"] for one in chosen(found, curriculum=curriculum, percentile_of=of)]
        for name, (curriculum, of, _) in list(ROWS.items())[:5]
    }
    versions = ", ".join(f"{name} {number}" for name, number in found[0]["versions"].items())
    times = ", ".join(f"{n} {np.median(s):.0f}" for n, s in seconds.items() if s)
    parts = [
        "# Finding wrong labels on Fashion-MNIST",
        "```bash\npython bench/find_issues.py\n```",
        "10,000 training images, student `small_cnn`, 5 folds, 16 epochs. Values of the seeds one "
        f"after the other. k: the number of wrong labels. {versions}. cleanlab's rows: the same "
        "student under plain cross-entropy, its last epoch's out-of-sample probabilities.",
        "## Symmetric 0.2", detections(found, "symmetric", 0.2),
        "## Symmetric 0.2, classes of unequal sizes (10:1)",
        detections(found, "symmetric", 0.2, 10),
        "## Symmetric 0.4", detections(found, "symmetric", 0.4),
        "## Symmetric 0.6", detections(found, "symmetric", 0.6),
        "## Asymmetric 0.4: classes that look alike are confused",
        detections(found, "asymmetric", 0.4),
        "## How many labels are wrong", "\n".join(rates(found)),
        f"Seconds of a case, median, one core of two that had other work too: {times}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(
    seeds: tuple[int, ...] = (0, 1),
    jobs: int = 2,
    runs: Path = Path("runs/find_issues"),
    table_only: bool = False,
) -> None:
    """Runs what is missing.

    Args:
        seeds: of noise, folds and students.
        jobs: cases side by side.
        runs: folder of a file a case.
        table_only: write the tables of what was run, and run nothing.
    """
    runs.mkdir(parents=True, exist_ok=True)
    files = {case: runs / f"{case.key}.json" for case in cases(seeds)}
    missing = [case for case, file in files.items() if not file.is_file() and not table_only]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for case, one in zip(missing, pool.map(run, missing), strict=True):
            with replacing(files[case]) as temporary:
                temporary.write_text(json.dumps(one, indent=1))
            print(case.key, f"{one['seconds']:.0f} s", file=sys.stderr, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    found = [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    if not found:
        raise ValueError(f"{runs} has no run to make tables of; leave --table-only out")
    tables = report(found)
    (OUT / "results.json").write_text(json.dumps(found) + "\n")
    (OUT / "README.md").write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
