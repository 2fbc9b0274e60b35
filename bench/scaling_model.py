"""A model of step time, memory and failures against GPUs and samples: docs/scaling.md explains it.

A model, not measured: nothing in it comes from training on a GPU. Times are in seconds, and every
constant says its source (`scaling_constants`). R GPUs, B images a GPU a step, N samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scaling_constants import value

HOST = 8  # GPUs a host
SAMPLES = (2_400_000, 100_000_000, 1_000_000_000)  # WebVision 1.0 has 2.44 M training images
TERMS = ("compute", "slowest rank", "gather", "percentile", "all-reduce", "decoding", "flags")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained on what.

    Attributes:
        gpus: R; eight a host.
        batch: B, images a GPU a step.
        rate: images/s of one GPU by itself.
        samples: N.
        gradient_bytes: of one gradient: 4 for fp32, 2 for bf16.
        lagged: losses are compared with ℓ_pt before their batch, and the engine does not wait for
            the others' then (today it does).
        bus: bandwidth of a bucket's all-reduce, bytes/s; 0 takes what the sources say.
    """

    gpus: int
    batch: int = 64
    rate: float = value("rate_mid")
    samples: int = SAMPLES[0]
    gradient_bytes: int = 4
    lagged: bool = False
    bus: float = 0.0

    def __post_init__(self) -> None:
        if min(self.gpus, self.batch, self.rate, self.samples) <= 0:
            raise ValueError(f"GPUs, batch, rate and samples must be above 0, got {self}")

    @property
    def hosts(self) -> int:
        return -(-self.gpus // HOST)


def bus_bytes_s(s: Setup) -> float:
    """Bus bandwidth of a bucket's all-reduce, bytes/s."""
    peak = value("bus_one_host") if s.hosts == 1 else value("bus_hosts")
    return s.bus or peak * value("bucket_efficiency")


def all_reduce_s(s: Setup, sent: float, messages: int = 1) -> float:
    """A tree's latency a message, and 2 (R − 1)/R of the bytes at bus bandwidth."""
    within = (min(s.gpus, HOST) - 1) * value("tree_nvlink")
    latency = value("tree_base") + 2 * (within + math.log2(s.hosts) * value("tree_network"))
    return messages * latency + 2 * (s.gpus - 1) / s.gpus * sent / bus_bytes_s(s)


def gather_s(s: Setup) -> float:
    """The all-gather of B float32 losses a rank, around a ring."""
    nvlink = value("ring_nvlink" if s.hosts == 1 else "ring_nvlink_hosts")
    steps = (s.gpus - s.hosts) * nvlink + (s.hosts - 1) * value("ring_network")
    return value("ring_base") + steps + 4 * s.batch * (s.gpus - 1) / bus_bytes_s(s)


def percentile_s(s: Setup) -> float:
    """Passes of one program over the global batch, above what its registers hold."""
    losses = s.gpus * s.batch
    read = 0 if losses <= value("percentile_keys") else value("percentile_passes") * 4 * losses
    return read / value("percentile_read")


def flags_s(s: Setup) -> float:
    """The host's all-reduce of a few flags: gloo's ring, 2 (R − 1) hops one after another."""
    return 2 * (s.gpus - 1) * value("gloo_hop")


def flag_steps(s: Setup) -> int:
    """Steps between two exchanges of flags, so the steps that one has time for."""
    return math.ceil(s.gpus / value("flag_ranks"))


def terms(s: Setup) -> dict[str, float]:
    """The parts of a step, seconds, by the names of TERMS; their sum is the step."""
    compute = max(s.batch / s.rate, value("launch_floor"))
    backward = compute * value("backward_share")
    buckets = math.ceil(s.gradient_bytes * value("parameters") / value("bucket"))
    reduce = all_reduce_s(s, s.gradient_bytes * value("parameters"), buckets)
    last = reduce / buckets  # nothing is left to hide the last bucket behind
    exposed = 0.0 if s.gpus == 1 else max(reduce - backward * (1 - 1 / buckets), last)
    # Two waits for the slowest rank, at the gather and at the all-reduce, unless it is lagged.
    waits = [1.0] if s.lagged else [1 - value("backward_share"), value("backward_share")]
    slowest = (
        value("jitter") * compute * math.sqrt(2 * math.log(s.gpus)) * sum(map(math.sqrt, waits))
    )
    device = compute + slowest + exposed
    gather = 0.0 if s.lagged or s.gpus == 1 else gather_s(s)
    percentile = 0.0 if s.lagged else percentile_s(s)
    device += gather + percentile
    decoding = s.batch * HOST * value("decode_cpu") / value("host_cores")
    waits_decoding = max(decoding - device, 0.0)
    flags_each = flag_steps(s)
    waits_flags = max(flags_s(s) / flags_each - device - waits_decoding, 0.0)
    parts = (compute, slowest, gather, percentile, exposed, waits_decoding, waits_flags)
    return dict(zip(TERMS, parts, strict=True))


def step_s(s: Setup) -> float:
    """A step."""
    return sum(terms(s).values())


def efficiency(s: Setup) -> float:
    """Images/s over those of as many GPUs that never waited for each other."""
    return s.batch / s.rate / step_s(s)


def order_s(samples: float) -> float:
    """Sorting an epoch's random keys, on every rank while its GPU waits: c N log2 N."""
    cost = value("order_small") if samples <= value("order_small_up_to") else value("order_large")
    return cost * samples * math.log2(samples)


def merge_s(s: Setup) -> float:
    """The ledger's exchange at an epoch's end: 24 + 8 bytes a visited row, and storing them."""
    return s.samples * (32 / bus_bytes_s(s) + 2 * 64 / value("hbm"))


def checkpoint_bytes(samples: float) -> float:
    """Weights, their average and the momentum in float32, and the ledger."""
    return 3 * 4 * value("parameters") + 24 * samples


def stall_s(samples: float) -> float:
    """The training's wait for a checkpoint: the copy to the host."""
    return checkpoint_bytes(samples) / value("to_host")


def written_s(samples: float) -> float:
    """From the copy to the last fsync, on the main rank, while training goes on.

    It writes and flushes, reads back and compares, and hashes, one after another.
    """
    return checkpoint_bytes(samples) * sum(
        1 / value(speed) for speed in ("write", "read_back", "sha256")
    )


def read_s(s: Setup) -> float:
    """A checkpoint from shared storage, once a host; its ranks share the page cache."""
    return s.hosts * checkpoint_bytes(s.samples) / value("storage")


def resume_s(s: Setup) -> float:
    """Reading the checkpoint, and every rank's hashing of it, one core each."""
    return read_s(s) + value("resume_hashes") * checkpoint_bytes(s.samples) / value("sha256")


def start_s(s: Setup) -> float:
    """A rank's resumption: processes, process groups, the index, an epoch's order, checkpoints."""
    index = s.samples * value("index_rank")
    return value("boot") + index + order_s(s.samples) + resume_s(s)


def steps_s(s: Setup) -> float:
    """The steps of an epoch."""
    return s.samples / (s.gpus * s.batch) * step_s(s)


def epoch_s(s: Setup) -> float:
    """An epoch: order, steps, the ledger's merge, a checkpoint's copy."""
    return order_s(s.samples) + steps_s(s) + merge_s(s) + stall_s(s.samples)


def between_failures_s(gpus: float) -> float:
    """Mean time between failures, 1/(λ R)."""
    return 3600 / (value("failures") * gpus)


def interval_s(s: Setup) -> float:
    """Young's checkpoint interval √(2 δ M), but not below what writing one takes."""
    best = math.sqrt(2 * stall_s(s.samples) * between_failures_s(s.gpus))
    return max(best, written_s(s.samples))


def lost(s: Setup, interval: float) -> float:
    """Share of time lost to checkpoints, to work done again and to restarts."""
    again = interval / 2 + value("detect") + start_s(s)
    return stall_s(s.samples) / interval + again / between_failures_s(s.gpus)


def host_bytes(samples: float) -> float:
    """Of a host at its most, while its ranks read the index."""
    return HOST * samples * value("index_peak")


def device_bytes(samples: float) -> float:
    """Ledger, given and clean labels on every GPU."""
    return samples * (24 + 16)


def first(condition: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition begins to hold, between two numbers; infinite where it never does."""
    if not condition(high):
        return math.inf
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high


def gpu_limits(samples: int = SAMPLES[0]) -> list[tuple[str, float]]:
    """(what gives way, from how many GPUs on), the first one first; 64 images a GPU."""

    def at(gpus: float) -> Setup:
        return Setup(gpus=max(round(gpus), 1), samples=samples)

    conditions: dict[str, Callable[[Setup], bool]] = {
        "order: sorting costs 10% of the steps": lambda s: order_s(s.samples) > 0.1 * steps_s(s),
        "global batch above 8,192": lambda s: s.gpus * s.batch > value("batch_goyal"),
        "shared storage: images need more than 40 GB/s": lambda s: (
            s.gpus * s.rate * value("image_bytes") > value("storage")
        ),
        "gather of losses: 1% of a step": lambda s: gather_s(s) > 0.01 * s.batch / s.rate,
        "percentile: 1% of a step": lambda s: percentile_s(s) > 0.01 * s.batch / s.rate,
        "failures cost 5%": lambda s: lost(s, interval_s(s)) > 0.05,
        "all-reduce: no longer hidden": lambda s: terms(s)["all-reduce"] > 0.1 * s.batch / s.rate,
    }
    found = [
        (name, first(lambda g, c=holds: c(at(g)), 1, 65_536)) for name, holds in conditions.items()
    ]
    return sorted(found, key=lambda row: row[1])


def sample_limits() -> list[tuple[str, float]]:
    """(what gives way, from how many samples on), the first one first; 1,024 GPUs."""

    def at(samples: float) -> Setup:
        return Setup(gpus=1024, samples=round(samples))

    conditions: dict[str, Callable[[float], bool]] = {
        "checkpoint: the ledger outweighs the model": lambda n: 24 * n > checkpoint_bytes(0),
        "start-up above 10 min": lambda n: start_s(at(n)) > 600,
        "resume: reading and hashing checkpoints takes 1 min": lambda n: resume_s(at(n)) > 60,
        "rank 0 writes a checkpoint for 1 min": lambda n: written_s(n) > 60,
        "labels and ledger: 10% of 80 GB of a GPU": lambda n: device_bytes(n) > 8e9,
        "host: the index of 8 ranks passes 2 TB": lambda n: host_bytes(n) > value("host_memory"),
    }
    found = [(name, first(holds, 1e6, 1e11)) for name, holds in conditions.items()]
    return sorted(found, key=lambda row: row[1])
