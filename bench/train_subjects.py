"""What `bench_train` measures: students at their sizes, who trains them, and in which processes.

A provider is WHO-ENGINE. WHO is one of

    timm              the loop of timm's train.py
    mentorch-plain    Spade with plain cross-entropy (uniform, no burn-in), without the ledger
    mentorch          Spade as in the recipes: the MentorNet pd, the ledger
    mentorch-fast     the same with the student inception_resnet_v2_fast
    mentorch-fused    the same with that student's fused norms

and ENGINE is eager, compile, graph or compile-graph, as in ``TrainConfig.engine``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ROUNDS, SAMPLE_S = 5, 1.0  # samples of a provider; seconds of one at least
BASE = "timm-eager"  # in every process: what its providers are held against, round by round
ENGINES = ("compile-graph", "eager", "compile", "graph")  # "compile-graph" ends like "graph"
LARGE = "inception_resnet_v2"  # has a faster form of ours, and fills a GPU
MEMORY_WATCHED = ("mentorch-eager", "mentorch-graph")


@dataclass(frozen=True)
class Subject:
    """A student at a size.

    Attributes:
        name: in tables.
        model: timm's name of the student.
        size: side of the images, pixels.
        batch: images a step; halved until it fits into the GPU's memory.
        classes: of the classifier.
        watched_steps: over which memory is watched, of those in MEMORY_WATCHED; 0: it is not.
    """

    name: str
    model: str
    size: int
    batch: int
    classes: int = 1000
    watched_steps: int = 0


ON_GPU = (
    Subject("irv2", LARGE, 299, 256),
    Subject("resnet50", "resnet50", 224, 256),
    Subject("small", "cifar_resnet32", 32, 128, 10, watched_steps=2000),
)
ON_CPU = (  # compiling the first takes least
    Subject("small", "cifar_resnet20", 32, 32, 10, watched_steps=60),
    Subject("resnet50", "resnet50", 128, 8),
    Subject("irv2", LARGE, 149, 8),
)
QUICK = (
    # Smaller ones end as single pixels, whose batch norms magnify rounding: no losses agree.
    Subject("irv2", LARGE, 107, 4, 10),
    Subject("small", "cifar_resnet20", 16, 8, 10, watched_steps=5),
)


@dataclass(frozen=True)
class Group:
    """Providers that one process measures in turns.

    Attributes:
        subject: what they train.
        providers: who, `BASE` first.
    """

    subject: Subject
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.subject.name}/{'+'.join(self.providers[1:])}"


def split(provider: str) -> tuple[str, str]:
    """Who, and with which engine.

    Raises:
        ValueError: the name ends in no engine.
    """
    for engine in ENGINES:
        if provider.endswith(f"-{engine}"):
            return provider.removesuffix(f"-{engine}"), engine
    raise ValueError(f"{provider!r} is no provider: it must end in one of {', '.join(ENGINES)}")


def groups(subjects: Iterable[Subject], part: str = "all") -> list[Group]:
    """Who runs with whom: as many as have the room and the time, always beside BASE.

    A CUDA graph keeps its activations for good, so Inception-ResNet-v2's are alone; compiling takes
    minutes on a CPU, and one student's graph is compiled once for a process and read from
    torch.compile's cache after that.

    Args:
        subjects: to train.
        part: "all", or the processes in which something is compiled ("compiled"), or the others
            ("eager"): on a GPU both together take longer than most machines are lent for.

    Returns:
        The subjects' most telling processes first, so that a short budget has something of all.
    """
    found: list[tuple[int, Group]] = []
    for subject in subjects:
        for place, providers in enumerate(_together(subject)):
            found.append((place, Group(subject, (BASE, *providers))))
    every = [group for _, group in sorted(found, key=lambda item: item[0])]
    return [group for group in every if part in ("all", part_of(group))]


def part_of(group: Group) -> str:
    """ "compiled" or "eager", see `groups`."""
    return "compiled" if any("compile" in provider for provider in group.providers) else "eager"


def _together(subject: Subject) -> list[tuple[str, ...]]:
    """Providers but BASE, a process each, in order of interest."""
    eager = ("mentorch-plain-eager", "mentorch-eager")
    if subject.model != LARGE:
        return [
            (*eager, "mentorch-plain-graph", "mentorch-graph"),
            ("timm-compile", "mentorch-compile", "mentorch-compile-graph"),
        ]
    return [
        eager,
        ("mentorch-fast-eager", "mentorch-fused-eager"),
        ("mentorch-fused-graph",),
        ("mentorch-graph",),
        ("mentorch-compile-graph",),
        ("timm-compile",),
        ("mentorch-fast-compile-graph",),
    ]


# ---- How long a run will take --------------------------------------------------------------------

# Assumed, not measured. A sample has a given length, so only the rest has to be guessed.
START_S = 10.0  # of a process: imports, the device, the weights
BUILD_S = 3.0  # of a provider: the student, its first steps, the profile
COMPILE_S = 100.0  # besides, where torch.compile takes part
CAPTURE_S = 5.0  # besides, for a CUDA graph


def estimate_s(wanted: Iterable[Group]) -> float:
    """Seconds that the processes may take, by the assumptions above."""
    return sum(START_S + _process_s(group) for group in wanted)


def _process_s(group: Group) -> float:
    engines = [split(provider)[1] for provider in group.providers]
    compiled = COMPILE_S * any("compile" in engine for engine in engines)  # then it is cached
    captured = CAPTURE_S * sum("graph" in engine for engine in engines)
    return compiled + captured + (BUILD_S + ROUNDS * SAMPLE_S) * len(engines)


def why_missing(model: str, engine: str, *, has_gpu: bool, has_compiler: bool) -> str:
    """Why an engine cannot be had here, or would take too long; "" when it can."""
    if "graph" in engine and not has_gpu:
        return "no GPU, so there are no CUDA graphs"
    if "compile" in engine and not has_compiler:
        return "no C++ compiler, which torch.compile needs"
    if "compile" in engine and not has_gpu and not model.startswith("cifar"):
        return "compiling it for a CPU takes minutes (Inception-ResNet-v2: more than twelve)"
    return ""


def why_spent(end: float, now: float, budget_s: float) -> str:
    """Why nothing more is begun; "" while there is time."""
    return f"the time budget of {budget_s:.0f} s is spent" if now > end else ""
