"""`find_label_issues`: which labels of a data set are most likely wrong, and how many."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mentorch.engine.data.index import replacing
from mentorch.engine.issues.cross_validation import Judgement, check_classes, judge
from mentorch.engine.issues.noise_rate import NoiseEstimate, estimate_noise
from mentorch.engine.issues.recipe import (
    MakeStudent,
    Recipe,
    check_recipe,
    steps_of,
    student_name,
    with_epochs,
)
from mentorch.engine.issues.samples import Samples, from_arrays, from_dataset, from_folder
from mentorch.engine.report.scores import score_samples, write_scores

IMAGE_SIZE = 32
_SMALLEST = 8  # images, pixels a side
PAGE = "label_issues.html"
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """What `find_label_issues` found.

    Attributes:
        scores: a row a sample, the most suspicious label first; the columns of docs/report.md, of
            which losses and predictions are out of sample (docs/finding_issues.md).
        noise: how many labels are wrong, and which classes they were taken from and given to.
        probabilities: [N, C] float32, out of sample, in the order of the samples; for cleanlab too.
        judgement: what else the students said.
        samples: the samples.
        recipe: how the students were trained.
        student: what they were.
        seconds: that it took.
    """

    scores: pa.Table
    noise: NoiseEstimate
    probabilities: NDArray[np.float32]
    judgement: Judgement
    samples: Samples
    recipe: Recipe
    student: str
    seconds: float

    @property
    def suspects(self) -> pa.Table:
        """The rows of ``scores`` whose label the students do not believe."""
        return self.scores.filter(self.scores["suspect"])

    def write(self, folder: str | Path, samples: int = 60) -> Path:
        """Writes the table, the page and what they were made with.

        Args:
            folder: made if it is not there; ``sample_scores.parquet``, ``label_issues.html`` and
                ``settings.json`` are put there.
            samples: pictures on the page.

        Returns:
            The page.
        """
        from mentorch.engine.issues.page import render_issues  # matplotlib takes a second

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(self.scores, folder / "sample_scores.parquet")
        _write(folder / "settings.json", self._settings())
        _write(folder / PAGE, render_issues(self, samples, folder.resolve().name))
        return folder / PAGE

    def _settings(self) -> str:
        recipe = asdict(self.recipe) | {"student": self.student}
        moved = self.noise.transition.copy()
        np.fill_diagonal(moved, 0)
        found = {
            "noise_rate": self.noise.rate,
            "standard_error": self.noise.standard_error,
            "is an upper bound": self.noise.is_upper_bound,
            # Right class, given label, share of the class; what is not here is 0.
            "moved": [[int(k), int(y), moved[k, y]] for k, y in np.argwhere(moved)],
            "prior": self.noise.prior.tolist(),
            "percentiles": self.judgement.percentiles,
            "agreement": self.judgement.agreement,
            "samples": len(self.probabilities),
            "unusable": self.samples.unusable,
            "source": self.samples.source,
            "seconds": self.seconds,
        }
        return json.dumps({"recipe": recipe, "found": found}, indent=2, default=str) + "\n"


def find_label_issues(
    samples: Any,
    labels: ArrayLike | Tensor | None = None,
    *,
    class_names: Sequence[str] | None = None,
    clean_labels: ArrayLike | Tensor | None = None,
    paths: Sequence[str] | None = None,
    image_size: int = IMAGE_SIZE,
    max_label: int | None = None,
    student: str | MakeStudent | None = None,
    recipe: Recipe | None = None,
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    samples_shown: int = 60,
    progress: bool = True,
    **options: Any,
) -> LabelIssues:
    """Finds the labels that are most likely wrong, by cross-validation under a curriculum.

    Args:
        samples: images [N, H, W] or [N, H, W, channels] uint8, or features [N, D] (embeddings of a
            pretrained model); or a data set of PyTorch's kind; or the path of a folder of
            class folders, of another data set that training takes, or of an index.
        labels: [N] integers from 0; for arrays only.
        class_names: by label.
        clean_labels: [N], labels known to be right, below 0 where unknown: the page then shows how
            well wrong ones are found. They decide nothing. For arrays only.
        paths: [N], what to call the samples. For arrays only.
        image_size: side that images from files are brought to, pixels.
        max_label: only labels below this; for folders only.
        student: name of a model of timm's or ours, or a function from the number of classes to a
            module; by default the recipe's.
        recipe: how students are trained.
        device: where; by default a GPU if there is one.
        out: folder for the table, the page and the settings; None: nothing is written.
        samples_shown: pictures of the most suspicious on the page.
        progress: show how far it is.
        options: of `Recipe`, in place of the recipe's: ``epochs=30``, ``folds=10``.

    Returns:
        Scores, noise rate, probabilities.

    Raises:
        ValueError: samples, labels or options that cannot be used.
        FileNotFoundError: nothing at the path.

    Example:
        >>> found = mentorch.find_label_issues(images, labels, out="issues")
        >>> found.noise.rate, found.suspects["sample_id"].to_numpy()[:10]
    """
    started = time.monotonic()
    if isinstance(student, nn.Module):
        raise ValueError(
            "student is a module: give a function from the number of classes to a fresh one, since "
            "every fold needs its own"
        )
    make_student = None if isinstance(student, str) else student
    if isinstance(student, str):
        options["student"] = student
    recipe = replace(recipe or Recipe(), **_known(options))
    where = _device(device)
    _check(recipe, make_student, image_size, samples_shown)
    bar = _Bar(progress)
    opened = _open(
        samples, labels, class_names, clean_labels, paths, image_size, max_label, bar.say
    )
    recipe = with_epochs(recipe, len(opened.values))
    check_classes(opened.named.given, opened.named.class_names, recipe.folds)
    name = _qualname(make_student) if make_student else student_name(recipe, opened.values)
    if out is not None:  # now, not after hours of training
        Path(out).mkdir(parents=True, exist_ok=True)
    judgement = _judge(opened, recipe, where, bar, make_student)
    noise = estimate_noise(judgement.probabilities, opened.named.given)
    scores = score_samples(_columns(judgement, opened.named.given), opened.named)
    seconds = time.monotonic() - started
    found = LabelIssues(
        scores, noise, judgement.probabilities, judgement, opened, recipe, name, seconds
    )
    if out is not None:
        found.write(out, samples_shown)
    return found


def _known(options: dict[str, Any]) -> dict[str, Any]:
    names = list(Recipe.__dataclass_fields__)
    for name in options:
        if name not in names:
            raise ValueError(f"there is no option {name!r}; there are {', '.join(names)}")
    return options


def _device(device: torch.device | str | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {found}: torch finds no GPU here (mentorch doctor says why)")
    return found


def _check(
    recipe: Recipe, make_student: MakeStudent | None, image_size: int, samples_shown: int
) -> None:
    """Before anything is read, which may take long."""
    if make_student and recipe.weights:
        raise ValueError("weights are for students by name; load them in the function instead")
    check_recipe(recipe)
    if image_size < _SMALLEST:
        raise ValueError(f"image_size is {image_size} pixels; give at least {_SMALLEST}")
    if samples_shown < 0:
        raise ValueError(f"samples shown must be at least 0, got {samples_shown}")


def _qualname(make_student: MakeStudent) -> str:
    return str(getattr(make_student, "__qualname__", type(make_student).__qualname__))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _open(
    samples: Any,
    labels: Any,
    class_names: Sequence[str] | None,
    clean_labels: Any,
    paths: Sequence[str] | None,
    image_size: int,
    max_label: int | None,
    say: Progress,
) -> Samples:
    """From whatever a caller has to samples in memory."""
    if isinstance(samples, list | tuple) and labels is not None:
        samples = _stacked(samples)
    for_arrays = {"labels": labels, "clean_labels": clean_labels, "paths": paths}
    is_path = isinstance(samples, str | Path)
    if not _is_array(samples):
        extra = [name for name, value in for_arrays.items() if value is not None]
        if extra:
            raise ValueError(
                f"{', '.join(extra)} go with arrays, not with {type(samples).__name__}"
            )
    if is_path:
        if class_names is not None:
            raise ValueError("a data set on disk knows the names of its classes: no class_names")
        return from_folder(Path(samples), image_size, max_label, say)
    if max_label is not None:
        raise ValueError("max_label is for folders and indexes")
    if _is_array(samples):
        if labels is None:
            raise ValueError("arrays need labels: find_label_issues(images, labels)")
        return from_arrays(samples, labels, class_names, clean_labels, paths)
    return from_dataset(samples, image_size, class_names)


def _stacked(samples: Sequence[Any]) -> Any:
    """One array of many."""
    shapes = {tuple(np.shape(sample)) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"samples have several shapes, such as {sorted(shapes)[:3]}: resize them")
    tensors = samples and all(isinstance(sample, Tensor) for sample in samples)
    return torch.stack(list(samples)) if tensors else np.asarray(samples)


def _is_array(samples: Any) -> bool:
    return isinstance(samples, Tensor) or hasattr(samples, "__array__")


def _judge(
    opened: Samples,
    recipe: Recipe,
    device: torch.device,
    bar: "_Bar",
    make_student: MakeStudent | None,
) -> Judgement:
    labels = torch.from_numpy(opened.named.given).to(device)
    # The caller's random numbers go on as they were, on every device: a seed is for all of them.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), bar.over(steps_of(recipe, len(labels))):
        classes = len(opened.named.class_names)
        values = opened.values.to(device) if _fits(opened.values, device) else opened.values
        return judge(values, labels, classes, recipe, device, bar.step, make_student)


def _fits(values: Tensor, device: torch.device) -> bool:
    """Whether the samples leave half of a GPU's free memory for training."""
    if device.type != "cuda":
        return True
    # What this process has taken and does not use is free, too.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return values.nbytes < (torch.cuda.mem_get_info(device)[0] + unused) / 2


def _columns(judgement: Judgement, given: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """As a ledger has them; loss and prediction are of students that did not see the sample."""
    rows = np.arange(len(given))
    probabilities = judgement.probabilities
    known = np.isfinite(probabilities).all(1)
    predicted = np.where(known, probabilities.argmax(1), -1)
    loss = -np.log(np.maximum(probabilities[rows, given], np.finfo(np.float32).tiny))
    return {
        "loss_mean": loss,
        "loss": loss,
        "loss_var": judgement.loss_var,
        "predicted": predicted,
        "probability": probabilities[rows, predicted],
        "weight": judgement.weight,
        "weight_mean": judgement.weight_mean,
        "weight_var": judgement.weight_var,
        "visits": np.full(len(given), min(judgement.epochs, 255), np.uint8),
        "forgetting": judgement.forgetting.clip(max=255).astype(np.uint8),
    }


class _Bar:
    """How far it is, for people; nothing where they do not want it."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    @contextmanager
    def over(self, steps: int) -> Iterator[None]:
        """Shows how many of the training steps are done."""
        from tqdm import tqdm

        hidden = None if self.wanted else True  # None: where nobody looks
        with tqdm(total=steps, unit=" steps", disable=hidden, leave=False) as self.bar:
            yield

    def step(self, what: str) -> None:
        """A training step was made."""
        self.bar.set_description(what, refresh=False)
        self.bar.update()

    def say(self, line: str) -> None:
        """Something else goes on."""
        if self.wanted:
            print(line, flush=True)
