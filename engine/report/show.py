"""`mentorch show`."""

from pathlib import Path

from tyro.conf import Positional


def curriculum(
    name: Positional[str],
    *,
    out: Path | None = None,
    epoch: tuple[int, ...] = (0, 50, 99),
    loss_max: float = 10.0,
    diff_range: tuple[float, float] = (-5.0, 5.0),
    labels: bool = False,
    lambda1: float | None = None,
    lambda2: float | None = None,
    gamma: float | None = None,
    history_steps: int | None = None,
    given_label: int = 0,
) -> None:
    """Draw a curriculum: the weight over loss and loss difference, at some points of training.

    Args:
        name: a closed form, a MentorNet that ships with the package, or a .safetensors file.
        out: picture.png or page.html; by default curriculum-NAME.png in the current folder.
        epoch: percentages of training, 0 to 99. Where the weights are equal they share a picture.
        loss_max: losses are drawn from 0 to this, nats.
        diff_range: loss differences ℓ − ℓ_pt are drawn from–to, nats.
        labels: write the weight on every level line.
        lambda1: λ1 of a closed form, nats.
        lambda2: λ2 of a closed form, nats.
        gamma: γ of focal.
        history_steps: visits of a sample that a MentorNet looks at, all taken to be alike; by
            default 1, or what one without an LSTM was made for.
        given_label: label of the samples, for a MentorNet that reads it.
    """
    # Here, so that --help is there at once: torch and matplotlib take seconds.
    from mentorch.engine.curricula import resolve_curriculum
    from mentorch.engine.data.index import replacing
    from mentorch.engine.report import curriculum_picture as pictures

    out = Path(f"curriculum-{Path(name).stem}.png") if out is None else out
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"a picture's name ends in .png, a page's in .html: not {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} into")
    given = {"lambda1": lambda1, "lambda2": lambda2, "gamma": gamma}
    found = pictures.with_parameters(
        resolve_curriculum(name), {k: v for k, v in given.items() if v is not None}
    )  # fmt: skip
    view = pictures.View(
        epochs=epoch, loss_max=loss_max, diff_range=diff_range, numbers=labels,
        history_steps=pictures.history_steps_of(found, history_steps), label=given_label,
    )  # fmt: skip
    pictures.check_label(found, given_label)
    make = pictures.picture if out.suffix == ".png" else pictures.page
    data = make(Path(name).stem, found, view)
    with replacing(out) as temporary:
        temporary.write_bytes(data)
    print(out)
