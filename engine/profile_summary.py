"""What a finished trace says: time by family of kernels, the costliest of them, how busy it was."""

import resource
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import profile

from mentorch.engine.kernel_families import FAMILIES, family

WAITING = "data: waiting for a batch"
COSTLIEST = 15
# Host calls that put work on the device's queue; a whole CUDA graph is one.
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
# What moves memory and computes little.
_MEMORY = ("batch norm", "pointwise", "reduction", "pooling", "copies and casts")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a family, a kernel or an operator costs a step."""

    name: str
    family: str
    ms: float
    """Milliseconds a step."""
    share: float
    """Of the time of all kernels (operators), in [0, 1]."""
    count: float
    """Kernels a step. Of operators those that do their work themselves: that call none of their
    family, and are no views or allocations."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Steps of training, on average."""

    device: str
    """Name of the GPU, or "cpu"."""
    steps: int
    """Traced."""
    step_ms: float
    """By the wall clock, ms."""
    busy: float
    """Share of the time in which a kernel runs; without a GPU, an operator in the main thread."""
    launches: float
    """Kernels a step; without a GPU operators that do work, see `Cost.count`."""
    host_launches: float
    """Calls a step by which the host starts kernels: far fewer than these under CUDA graphs."""
    waiting_ms: float
    """A step, for a batch from the loader, in the host's main thread."""
    peak_memory_bytes: int
    """The most allocated on the device, or held by the process, since it began."""
    families: list[Cost]
    """By time."""
    costliest: list[Cost]
    """Kernels (operators), by time."""

    @property
    def on_gpu(self) -> bool:
        """Whether these are the times of a GPU."""
        return self.device != "cpu"

    def sentences(self) -> Iterator[str]:
        """What that says, in plain words."""
        yield self._busy_sentence()
        if self.families:
            first = [f"{cost.name} ({cost.share:.0%})" for cost in self.families[:3]]
            yield f"Most of the {self._what} time: {', '.join(first)}."
        moving = sum(cost.share for cost in self.families if cost.name in _MEMORY)
        if moving >= 0.3:
            yield (
                f"{moving:.0%} goes to work that moves memory and computes little "
                f"({', '.join(_MEMORY)}): fusing it with its neighbours saves time."
            )

    @property
    def _what(self) -> str:
        return "device's" if self.on_gpu else "operators'"

    @property
    def _counted(self) -> str:
        return "kernel" if self.on_gpu else "call"

    def _busy_sentence(self) -> str:
        waiting = f"{self.waiting_ms:.3g} ms a step for batches from the loader"
        if not self.on_gpu:
            return (
                f"Operators run {self.busy:.0%} of the time; in the rest the host waits {waiting}, "
                "and runs Python."
            )
        if self.busy >= 0.95:
            return f"The device is busy {self.busy:.0%} of the time: its kernels set the speed."
        return (
            f"The device waits {1 - self.busy:.0%} of the time: launches or data. The host waits "
            f"{waiting}, and makes {self.host_launches:,.0f} launches a step."
        )

    def markdown(self) -> str:
        """A page with the sentences and the tables."""
        by_host = f" · {self.host_launches:,.0f} calls by the host" if self.on_gpu else ""
        facts = (
            f"step {self.step_ms:.2f} ms · {'device' if self.on_gpu else 'operators'} busy "
            f"{self.busy:.1%} · {self.launches:,.0f} {self._counted}s"
            f"{by_host} · waiting for data {self.waiting_ms:.2f} ms · peak memory "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB"
        )
        what = "kernel" if self.on_gpu else "operator"
        parts = (
            f"# {self.steps} steps on {self.device}",
            "\n".join(self.sentences()),
            facts,
            "Kernels that run at the same time all count, so times may sum to more than a step."
            if self.on_gpu
            else "An operator's time is the main thread's, without the operators that it calls.",
            _table("family", self.families, self._counted),
            f"## The {len(self.costliest)} costliest {what}s",
            _table(what, self.costliest, self._counted, with_family=True),
        )
        return "\n\n".join(parts) + "\n"


def _table(what: str, costs: Iterable[Cost], counted: str, with_family: bool = False) -> str:
    of_family = "| family " if with_family else ""
    lines = [f"| {what} {of_family}| ms a step | share | {counted}s a step |"]
    lines.append("| --- " * (5 if with_family else 4) + "|")
    for cost in costs:
        name = cost.name if len(cost.name) <= 100 else cost.name[:99] + "…"
        name = name.replace("|", "\\|")  # a cell's end
        cells = [f"`{name}`", cost.family] if with_family else [name]
        cells += [f"{cost.ms:.3f}", f"{cost.share:.1%}", f"{cost.count:,.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def busy_share(intervals: Iterable[tuple[float, float]]) -> float:
    """Union of intervals (start, end) over the time from the first start to the last end.

    Args:
        intervals: in any order and unit; they may overlap.

    Returns:
        A share in [0, 1]; 0 where there are none, or none with a length.
    """
    covered, begin, reached = 0.0, None, 0.0
    for start, end in sorted(intervals):
        if begin is None:
            begin = reached = start
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered / (reached - begin) if begin is not None and reached > begin else 0.0


def summarise(
    prof: profile, steps: int, device: torch.device, wall_s: float | None = None
) -> Summary:
    """What a finished trace says.

    Args:
        prof: stopped.
        steps: that were traced.
        device: the training device; on a GPU its kernels are summed, else the host's operators.
        wall_s: seconds the steps took, if measured; else from the first event to the last.

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"a profile needs one traced step or more, got {steps}")
    events = list(prof.events() or ())
    on_gpu = device.type == "cuda"
    host = [e for e in events if e.device_type == DeviceType.CPU]
    operators = [] if on_gpu else _of_main_thread([e for e in host if not e.is_user_annotation])
    kernels = [e for e in events if on_gpu and e.device_type == DeviceType.CUDA and not _is_mark(e)]
    work = kernels if on_gpu else operators
    waiting = [e for e in host if e.name == WAITING]
    # Waiting is work to the table without a GPU: it is the main thread's time too.
    families, costliest = _costs(work if on_gpu else [*work, *waiting], steps)
    span_us = max((e.time_range.end for e in events), default=0.0) - min(
        (e.time_range.start for e in events), default=0.0
    )
    return Summary(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        steps=steps,
        step_ms=(span_us / 1e3 if wall_s is None else wall_s * 1e3) / steps,
        busy=busy_share((e.time_range.start, e.time_range.end) for e in work),
        launches=sum(map(_is_launch, work)) / steps,
        host_launches=sum(e.name.startswith(_LAUNCHES) for e in host) / steps,
        waiting_ms=sum(_us(e) for e in waiting) / steps / 1e3,
        peak_memory_bytes=_peak_memory(device),
        families=families,
        costliest=costliest,
    )


def _of_main_thread(events: Sequence[Any]) -> list[Any]:
    """Those of the thread with most events: autograd's own threads, if any, have fewer."""
    threads = Counter(e.thread for e in events).most_common(1)
    return [e for e in events if e.thread == threads[0][0]]


def _is_mark(event: Any) -> bool:
    """A range that record_function has named, drawn over the kernels launched within it."""
    return bool(event.is_user_annotation)


def _is_launch(event: Any) -> bool:
    if event.device_type == DeviceType.CUDA:
        return True
    kind = family(event.name)
    return kind not in ("other", "data") and not _calls(event, kind)


def _calls(event: Any, kind: str) -> bool:
    """Whether an operator calls one of a family, itself or through others."""
    return any(family(e.name) == kind or _calls(e, kind) for e in event.cpu_children)


def _us(event: Any) -> float:
    """A kernel's time; an operator's without those that it calls."""
    if event.device_type == DeviceType.CUDA:
        return float(event.time_range.elapsed_us())
    return float(event.self_cpu_time_total)


def _costs(work: Sequence[Any], steps: int) -> tuple[list[Cost], list[Cost]]:
    """Families, and the costliest kernels or operators."""
    us: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in work:
        us[event.name] += _us(event)
        counts[event.name] += _is_launch(event)
    total = sum(us.values()) or 1.0

    def cost(name: str, of: str, names: Iterable[str]) -> Cost:
        names = list(names)
        time, count = sum(us[n] for n in names), sum(counts[n] for n in names)
        return Cost(
            name=name, family=of, ms=time / steps / 1e3, share=time / total, count=count / steps
        )

    members = {kind: [name for name in us if family(name) == kind] for kind in FAMILIES}
    families = [cost(kind, kind, names) for kind, names in members.items() if names]
    single = [cost(name, family(name), [name]) for name in us]
    return _by_time(families), _by_time(single)[:COSTLIEST]


def _by_time(costs: list[Cost]) -> list[Cost]:
    return sorted(costs, key=lambda cost: cost.ms, reverse=True)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
