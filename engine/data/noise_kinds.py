"""The kinds of label noise that a transition matrix describes, and the usual confusable classes.

T is [C, C], a row a clean label: T[i, j] = P(given label j | clean label i). Sources:
    symmetric        uniform over all C classes: MentorNet, Jiang et al., ICML 2018, section 4
    symmetric-other  uniform over the C − 1 other classes
    pair             class c becomes c + 1 mod C: Han et al., "Co-teaching", NeurIPS 2018
    asymmetric       named pairs of confusable classes: Patrini et al., "Making deep neural networks
                     robust to label noise", CVPR 2017 (MNIST, CIFAR-10, CIFAR-100); Zhang and
                     Sabuncu, "Generalized cross entropy loss", NeurIPS 2018 (Fashion-MNIST)
    matrix           any T
    instance         depends on the image besides: engine/data/instance_noise.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

NoiseKind = Literal["symmetric", "symmetric-other", "pair", "asymmetric", "matrix", "instance"]
Matrix = npt.NDArray[np.float64]

ROW_SUM_TOLERANCE = 1e-6

_CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""


def parse_noise(text: str) -> tuple[str, float]:
    """Kind and rate of a text such as ``symmetric:0.4``; whether they exist, `Noise` checks.

    Raises:
        ValueError: it is not KIND:RATE.
    """
    kind, _, rate = text.partition(":")
    try:
        return kind, float(rate)
    except ValueError:
        raise ValueError(f"a noise is KIND:RATE, e.g. symmetric:0.4, not {text!r}") from None


def _next_in_superclass() -> dict[int, int]:
    """CIFAR-100: a class becomes the next of its superclass, the last one the first."""
    groups = [line.split() for line in _CIFAR100_SUPERCLASSES.split("\n") if line]
    names = sorted(name for group in groups for name in group)  # the data set's own order
    return {
        names.index(name): names.index(group[(k + 1) % len(group)])
        for group in groups
        for k, name in enumerate(group)
    }


# Name → (number of classes, clean class → the class it is taken for), by number.
MAPPINGS: dict[str, tuple[int, dict[int, int]]] = {
    # 2 → 7, 3 → 8, 5 ↔ 6, 7 → 1
    "mnist": (10, {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}),
    # ankle boot → sneaker → sandal, pullover → shirt, coat ↔ dress
    "fashion_mnist": (10, {9: 7, 7: 5, 2: 6, 4: 3, 3: 4}),
    # truck → automobile, bird → airplane, deer → horse, cat ↔ dog
    "cifar10": (10, {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
    "cifar100": (100, _next_in_superclass()),
}


def transition_matrix(
    kind: NoiseKind,
    rate: float,
    num_classes: int,
    mapping: str | Mapping[int, int] | None = None,
) -> Matrix:
    """T of a kind that a rate describes.

    Args:
        kind: "symmetric", "symmetric-other", "pair" or "asymmetric".
        rate: probability p that a label is replaced, in [0, 1]; for "asymmetric" that of the
            classes in ``mapping``, the others stay.
        num_classes: C.
        mapping: for "asymmetric": see `resolved_mapping`.

    Returns:
        float64 [C, C], T[i, j] = P(given j | clean i).

    Raises:
        ValueError: an argument is out of range, or the kind has no such matrix.
    """
    check_kind(kind, num_classes)
    check_rate(rate)
    keep = np.eye(num_classes)
    if kind == "symmetric":
        return (1 - rate) * keep + rate / num_classes
    if kind == "symmetric-other":
        return (1 - rate) * keep + rate / (num_classes - 1) * (1 - keep)
    if kind == "pair":
        return (1 - rate) * keep + rate * np.roll(keep, 1, axis=1)
    if kind == "asymmetric":
        for source, target in resolved_mapping(mapping, num_classes).items():
            keep[source, source] -= rate
            keep[source, target] += rate
        return keep
    raise ValueError(f"{kind} noise is not described by a rate alone, so it has no matrix here")


def measured_matrix(
    given: npt.NDArray[np.int64], clean: npt.NDArray[np.int64], num_classes: int
) -> Matrix:
    """The transition matrix that labels show.

    Args:
        given: the labels as given, [N].
        clean: the right ones, [N]; samples with -1, unknown, do not count.
        num_classes: C.

    Returns:
        float64 [C, C], of the samples of class i the share that is labelled j; NaN in the rows of
        classes without samples.
    """
    known = clean >= 0
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean[known], given[known]), 1)
    totals = counts.sum(axis=1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)


def resolved_mapping(mapping: str | Mapping[int, int] | None, num_classes: int) -> dict[int, int]:
    """Clean class → the class it is taken for.

    Args:
        mapping: a name in `MAPPINGS`, text such as "3:5,5:3", or the mapping itself.
        num_classes: C.

    Raises:
        ValueError: it is no mapping, or names a class that is not there.
    """
    if mapping is None:
        raise ValueError(
            "asymmetric noise needs a mapping of confusable classes: "
            f'one of {", ".join(MAPPINGS)}, or your own such as "3:5,5:3"'
        )
    if isinstance(mapping, str) and mapping in MAPPINGS:
        expected, mapping = MAPPINGS[mapping]
        if expected != num_classes:
            raise ValueError(
                f"that mapping is for {expected} classes, and there are {num_classes}; "
                'give your own, such as "3:5,5:3"'
            )
    pairs = _parsed(mapping) if isinstance(mapping, str) else dict(mapping)
    for source, target in pairs.items():
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise ValueError(
                f"the mapping sends class {source} to {target}; the classes are "
                f"0 to {num_classes - 1}"
            )
    return {int(source): int(target) for source, target in pairs.items()}


def checked_matrix(matrix: npt.ArrayLike | None, num_classes: int) -> Matrix:
    """A user's T as float64 [C, C], once it is one.

    Raises:
        ValueError: the shape is not [C, C], an entry is negative or not a number, or a row does not
            sum to 1 within 1e-6.
    """
    if matrix is None:
        raise ValueError("matrix noise needs the transition matrix; read_matrix reads a file")
    T = np.asarray(matrix, np.float64)
    if T.shape != (num_classes, num_classes):
        raise ValueError(
            f"the transition matrix has the shape {T.shape}; "
            f"{num_classes} classes need {(num_classes, num_classes)}"
        )
    bad = ~(np.isfinite(T) & (T >= 0))
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(f"the transition matrix has {T[i, j]} at [{i}, {j}]; it is a probability")
    off = np.abs(T.sum(axis=1) - 1) > ROW_SUM_TOLERANCE
    if off.any():
        row = int(off.argmax())
        raise ValueError(
            f"row {row} of the transition matrix sums to {T[row].sum():.8g}; row i has the "
            "probabilities of the given labels of a sample of class i, and these sum to 1"
        )
    return T


def read_matrix(path: str | Path) -> Matrix:
    """Reads a transition matrix from a ``.npy`` file, or from ``.csv`` with a line a clean class.

    Raises:
        ValueError: the file is of another kind, or does not hold numbers.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"{path} is neither .npy nor .csv, the files a matrix is read from")
    try:
        if path.suffix == ".npy":  # a pickle could run code, so it is refused
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        return np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} does not hold a matrix of numbers: {error}") from error


def check_kind(kind: str, num_classes: int | None = None) -> None:
    """Raises ValueError if the kind is unknown or needs more classes."""
    if kind not in get_args(NoiseKind):
        raise ValueError(f"noise kind {kind!r} is unknown; it is one of {get_args(NoiseKind)}")
    needs_two = kind in ("symmetric-other", "pair", "instance")
    if num_classes is not None and num_classes < 1 + needs_two:
        raise ValueError(
            f"{kind} noise needs at least {'two classes' if needs_two else 'one class'}, "
            f"not {num_classes}"
        )


def check_rate(rate: float | None) -> None:
    """Raises ValueError if the rate is not a probability."""
    if rate is None or not 0 <= rate <= 1:
        raise ValueError(f"noise rate is {rate}; it is a probability, from 0 to 1")


def _parsed(text: str) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for part in text.split(","):
        source, colon, target = part.strip().partition(":")
        if not (colon and source.strip().isdecimal() and target.strip().isdecimal()):
            raise ValueError(
                f"{part.strip()!r} in the mapping {text!r} is not a pair of classes; write "
                f'"3:5,5:3", or one of the names {", ".join(MAPPINGS)}'
            )
        if int(source) in pairs:
            raise ValueError(f"the mapping {text!r} has class {int(source)} twice")
        pairs[int(source)] = int(target)
    return pairs
