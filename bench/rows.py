"""Which rows a benchmark run measures, and which it leaves out by which rule.

No torch here: the plan can be counted, estimated and tested on any machine.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

ITEMSIZE = {"bf16": 2, "fp32": 4}
BATCHES = (64, 128, 256, 1024, 4096)
CLASSES = (10, 100, 1000, 5000, 21841, 100_000)
FP32_BATCHES = (128, 1024)
LOSSES = (128, 1024, 4096, 16384, 65536)  # of the percentile

# Where torch.compile is tried: the usual batch of ImageNet and a large one, ImageNet-21k in both
# dtypes, a language model's head, and one size at which launches are everything.
COMPILED = {
    (128, 100, "fp32"),
    (128, 1000, "bf16"),
    (1024, 1000, "bf16"),
    (256, 21841, "bf16"),
    (1024, 21841, "fp32"),
    (256, 100_000, "bf16"),
}
PROVIDERS = {
    "reweight": (
        "mentorch",
        "mentorch-lagged",
        "mentorch-chip",
        "eager",
        "eager-lean",
        "compile",
        "compile-lean",
        "liger",
        "quack",
    ),
    "cross_entropy": ("mentorch", "eager", "compile", "liger", "quack"),
    "percentile": ("mentorch", "quantile", "sort", "kthvalue"),
    "batch_norm": ("mentorch", "eager", "compile"),
}
# (images, their side, channels) of batch norms in Inception-ResNet-v2 at 299 pixels: the largest,
# and those after the residual blocks. A row has all pixels as its batch, channels as its classes.
IMAGES = ((64, 147, 64), (64, 35, 320), (64, 17, 1088), (64, 17, 192))
# Logits-sized reads and writes that a provider's own code asks for, forward and backward together,
# whichever cache answers. Not listed: what PyTorch and its compiler do is not ours to count.
#   mentorch: two reads, one write. Rows of weight 0 are read once only.
#   mentorch-chip (not listed either): one read and one write, where the batch fits.
#   liger 0.8.5: forward two reads, one write (over the logits); backward one read, one write.
#   quack: forward one read; backward one read, one write.
PASSES = {"mentorch": 3, "mentorch-lagged": 3, "liger": 5, "quack": 3}
# Of images by `batch_norm`: forward x twice, y; backward x and dy twice, dx. At least: each once.
BATCH_NORM_PASSES, BATCH_NORM_IDEAL = {"mentorch": 8}, 5

MOST_LOGITS_BYTES = 2 * 2**30
MOST_ON_CHIP = 2**22  # logits that `mentorch-chip` is tried with: 32 a thread of an H100
MOST_SETS = 128
CALLS_OF_A_HOT_GRAPH = 20
L2_BYTES = 50 * 2**20  # an H100's: for plans made where there is no GPU

RULES = (
    "Logits of more than 2 GiB, or a size whose float64 check (64 B·C bytes) does not fit.",
    "fp32: batches of 128 and 1024 only. Training in fp32 is the exception.",
    "`compile` and `compile-lean`: six sizes only, since each compilation takes seconds.",
    "The MentorNet `pd`: 1000 classes only.",
    "`mentorch-chip`: 1000 classes or more, and up to 2^22 logits, which is what fits.",
    "`liger`: dispatch only. It reads counts back to the host, which no CUDA graph can hold.",
    "Cold L2: in CUDA graphs, and where at most 128 input sets (logits and gradient) make up four "
    "L2 caches. Smaller logits fit into the cache many times over.",
    "Where one set alone is four L2 caches there is no hot row: it would be the same as cold.",
    "`percentile`: hot only, its input is 256 KB at most.",
    "`batch_norm`: bf16 in CUDA graphs only, B all pixels of 64 images and C their channels.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results: what is timed, by whom, at which size and in which state."""

    subject: str
    provider: str
    batch: int
    classes: int = 1
    dtype: str = "fp32"
    mode: str = "dispatch"
    """dispatch: call by call from the host; graph: replayed from a CUDA graph."""
    l2: str = "hot"
    """hot: the same buffers again; cold: nothing of the input is left in the L2 cache."""
    curriculum: str = ""

    def __str__(self) -> str:
        who = f"{self.provider}-{self.curriculum}" if self.curriculum else self.provider
        return f"{who}-B{self.batch}-C{self.classes}-{self.dtype}-{self.mode}-{self.l2}"

    @property
    def cell(self) -> tuple[str, int, int, str]:
        """Rows of one cell share their inputs."""
        return self.subject, self.batch, self.classes, self.dtype

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.classes * ITEMSIZE[self.dtype]

    @property
    def ideal_bytes(self) -> int:
        """Every input byte read once and, but for the percentile, a gradient written once."""
        passes = {"percentile": 1, "batch_norm": BATCH_NORM_IDEAL}.get(self.subject, 2)
        return self.logits_bytes * passes

    @property
    def traffic_bytes(self) -> int | None:
        passes = BATCH_NORM_PASSES if self.subject == "batch_norm" else PASSES
        if self.subject == "percentile" or self.provider not in passes:
            return None
        return self.logits_bytes * passes[self.provider]

    @property
    def launches(self) -> int:
        """The fewest kernel launches that do this work: autograd splits forward from backward."""
        return 1 if self.subject == "percentile" else 2

    @property
    def tier(self) -> int:
        """0: the sizes people train at, measured first, should the time run out."""
        usual = 128 <= self.batch <= 1024 and 1000 <= self.classes <= 21841
        return 0 if usual or self.subject == "percentile" else 1


def sets_for_cold(row: Row, l2_bytes: int) -> int:
    """Input sets that together are four L2 caches."""
    return -(-4 * l2_bytes // row.ideal_bytes)


def calls_of_a_sample(row: Row, l2_bytes: int) -> int:
    """How many steps one sample times, and in a cold row how many input sets it goes through."""
    if row.mode == "dispatch":
        return 1
    if row.l2 == "cold":
        return max(sets_for_cold(row, l2_bytes), 2)
    return CALLS_OF_A_HOT_GRAPH


def _states(row: Row, l2_bytes: int) -> Iterator[Row]:
    """The modes and cache states in which a provider is timed at one size."""
    sets = sets_for_cold(row, l2_bytes)
    modes: tuple[str, ...] = ("dispatch",) if row.provider == "liger" else ("dispatch", "graph")
    for mode in ("graph",) if row.subject == "batch_norm" else modes:
        if row.subject == "percentile" or sets > 1:
            yield replace(row, mode=mode, l2="hot")
        if row.subject != "percentile" and (sets == 1 or (mode == "graph" and sets <= MOST_SETS)):
            yield replace(row, mode=mode, l2="cold")


def gpu_rows(subject: str, l2_bytes: int = L2_BYTES) -> list[Row]:
    """Every row of a subject on a GPU, as RULES say."""
    if subject == "percentile":
        sizes = [Row(subject=subject, provider="", batch=losses) for losses in LOSSES]
    elif subject == "batch_norm":
        sizes = [
            Row(subject=subject, provider="", batch=b * side**2, classes=c, dtype="bf16")
            for b, side, c in IMAGES
        ]
    else:
        sizes = [
            Row(subject=subject, provider="", batch=b, classes=c, dtype=d, curriculum=curriculum)
            for c in CLASSES
            for b in BATCHES
            for d in ITEMSIZE
            if d == "bf16" or b in FP32_BATCHES
            for curriculum in _curricula(subject, c)
        ]
    return [
        state
        for size in sizes
        if size.logits_bytes <= MOST_LOGITS_BYTES
        for provider in PROVIDERS[subject]
        if _takes(provider, size)
        for state in _states(replace(size, provider=provider), l2_bytes)
    ]


def _takes(provider: str, size: Row) -> bool:
    if provider == "mentorch-chip":
        return size.classes >= 1000 and size.batch * size.classes <= MOST_ON_CHIP
    if provider.startswith("compile") and size.subject != "batch_norm":
        return (size.batch, size.classes, size.dtype) in COMPILED
    return True


def _curricula(subject: str, classes: int) -> tuple[str, ...]:
    if subject != "reweight":
        return ("",)
    return ("linear", "pd") if classes == 1000 else ("linear",)


def smoke_rows(subject: str) -> list[Row]:
    """Every provider once or twice at sizes that take a CPU no time; no measurement."""
    if subject == "percentile":
        return [
            Row(subject=subject, provider=p, batch=b) for b in (7, 128) for p in PROVIDERS[subject]
        ]
    if subject == "batch_norm":
        return [
            Row(subject=subject, provider=p, batch=64 * 3**2, classes=c, dtype=d)
            for c, d in ((32, "bf16"), (7, "fp32"))
            for p in PROVIDERS[subject]
        ]
    return [
        Row(subject=subject, provider=p, batch=8, classes=c, dtype=d, curriculum=curriculum)
        for c, d in ((10, "fp32"), (1000, "bf16"))
        for curriculum in _curricula(subject, c)
        for p in PROVIDERS[subject]
    ]


# ---- How long a run will take --------------------------------------------------------------------

# Assumed, not measured: seconds of one core to compile a provider's kernels for one size.
COMPILE_S = {"mentorch": 5, "mentorch-lagged": 6, "mentorch-chip": 6}
COMPILE_S |= {"compile": 12, "compile-lean": 12, "liger": 1, "quack": 5}
ROW_S = 0.2  # 50 ms of samples or 20 of them, warm-up, capture
SETUP_S = 0.2  # inputs and the check, for every provider at every size
WORKER_START_S = 15


def compilations(rows: Iterable[Row]) -> list[Row]:
    """One row for everything that is compiled, the slow ones first."""
    first = {(row.cell, row.provider, row.curriculum): row for row in reversed(list(rows))}
    needed = [row for row in first.values() if row.provider in COMPILE_S]
    return sorted(needed, key=lambda row: (-COMPILE_S[row.provider], row.tier, str(row)))


def estimate_s(rows: list[Row], workers: int) -> float:
    """Seconds a run of these rows may take; from the assumptions above."""
    setups = len({(row.cell, row.provider, row.curriculum) for row in rows})
    compiling = sum(COMPILE_S[row.provider] for row in compilations(rows)) / max(workers, 1)
    start = WORKER_START_S if compiling else 0
    return start + compiling + SETUP_S * setups + ROW_S * len(rows)
