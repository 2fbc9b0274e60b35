"""`mentorch find-issues`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from mentorch.engine.issues.find import IMAGE_SIZE, PAGE, LabelIssues, find_label_issues
from mentorch.engine.issues.recipe import Recipe

_SHOWN = 10
_RECIPE = Recipe()


def find_issues(
    folder: Positional[Path],
    *,
    out: Path | None = None,
    image_size: int = IMAGE_SIZE,
    max_label: int | None = None,
    samples: int = 60,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = _RECIPE,
) -> None:
    """Find the labels of a data set that are most likely wrong, without a run of your own.

    Students are trained on parts of the data and judge the other part. Writes sample_scores.parquet
    (a row a sample), label_issues.html (a page to look at) and settings.json.

    Args:
        folder: class folders (FOLDER/CLASS/IMAGE), another data set that training takes, or an
            index.
        out: folder of the results; by default issues-NAME-OF-THE-FOLDER here.
        image_size: side that images are brought to, pixels.
        max_label: only labels below this number.
        samples: how many of the most suspicious samples the page shows.
        device: where students are trained; auto: a GPU if there is one.
        recipe: how students are trained.
    """
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    if image_size < 8:
        raise ValueError(f"image_size is {image_size} pixels; give at least 8")
    name = folder.resolve().name
    out = out or Path(f"issues-{name.split('.')[0] if folder.is_file() else name}")
    found = find_label_issues(
        folder,
        image_size=image_size,
        max_label=max_label,
        recipe=recipe,
        device=None if device == "auto" else device,
        out=out,
        samples_shown=samples,
    )
    _print(found, out)


def _print(found: LabelIssues, out: Path) -> None:
    noise, suspects = found.noise, found.suspects
    about = "at most" if noise.is_upper_bound else "about"
    print(
        f"{about} {noise.rate:.1%} ± {noise.standard_error:.1%} of {len(found.scores):,} labels "
        f"are wrong; {len(suspects):,} suspects; {found.seconds:,.0f} s"
    )
    if found.samples.unusable:
        print(f"{len(found.samples.unusable):,} files could not be used: {out / 'settings.json'}")
    print(f"{out / 'sample_scores.parquet'}\n{out / PAGE}")
    print(f"\n{'rank':>4}  {'suspicion':>9}  {'given':<20}  {'predicted':<20}  path")
    for row in found.scores.slice(0, _SHOWN).to_pylist():
        given, predicted = (f"{row[f'{w}_name'][:20]:<20}" for w in ("given", "predicted"))
        print(f"{row['rank']:>4}  {row['suspicion']:>9.4f}  {given}  {predicted}  {row['path']}")
