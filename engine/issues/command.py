"""`mentorch find-issues`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from mentorch.engine.issues.find import IMAGE_SIZE, PAGE, LabelIssues, find_label_issues
from mentorch.engine.issues.recipe import Recipe
from mentorch.engine.report.scores import print_top

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
        out: folder of the results; by default issues-NAME-OF-THE-FOLDER here, of the folder that an
            index is in.
        image_size: side that images are brought to, pixels.
        max_label: only labels below this number.
        samples: how many of the most suspicious samples the page shows.
        device: where students are trained; auto: a GPU if there is one.
        recipe: how students are trained.
    """
    data = folder.resolve()
    out = out or Path(f"issues-{(data.parent if data.is_file() else data).name}")
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
    print_top(found.scores, "suspicion")
