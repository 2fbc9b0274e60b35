"""How long a step takes: on the device by CUDA events, without a GPU by the host's clock.

Dispatch is timed from an idle queue, one step a sample, so that host time which the device
waits for counts. A CUDA graph holds several steps; a sample is one replay over their number, so the
launch of the graph itself hardly counts. The same goes for the empty launches of the floor.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from statistics import median
from typing import Any

import torch
from peers import Call
from rows import CALLS_OF_A_HOT_GRAPH

from mentorch.kernels import backend
from mentorch.kernels.backend import triton

SAMPLING_US = 50_000
FEWEST, MOST = 20, 200  # samples of a row


class Sampler:
    """Samples of one row. `sample` waits for the device, so any clock may stand around it."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.times_us: list[float] = []

    def prepare(self) -> None:
        """What comes before a sample, untimed."""
        for call in self.calls:
            call.restore()

    def timed(self) -> float:
        """Takes one sample, µs of a step."""
        start = time.perf_counter()
        for call in self.calls:
            call.run()
        return (time.perf_counter() - start) * 1e6 / len(self.calls)

    def sample(self) -> None:
        self.times_us.append(self.timed())

    def rounds(self) -> int:
        """How many samples fill SAMPLING_US, by a first few that do not count."""
        first = []
        for _ in range(3):
            self.prepare()
            first.append(self.timed())
        wanted = ceil(SAMPLING_US / max(median(first) * len(self.calls), 1.0))
        return min(max(wanted, FEWEST), MOST)

    def summary(self) -> dict[str, float | int]:
        """Median and p99 (nearest rank: of fewer than 100 samples the largest), µs."""
        ordered = sorted(self.times_us)
        rank = ceil(0.99 * len(ordered)) - 1
        return {
            "median_us": median(ordered),
            "p99_us": ordered[rank],
            "samples": len(ordered),
            "calls_per_sample": len(self.calls),
        }


class _EventSampler(Sampler):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def prepare(self) -> None:
        super().prepare()
        torch.cuda.synchronize()

    def work(self) -> None:
        for call in self.calls:
            call.run()

    def timed(self) -> float:
        self.start.record()
        self.work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3 / len(self.calls)


class _GraphSampler(_EventSampler):
    def __init__(self, calls: Sequence[Call], keep: bool) -> None:
        super().__init__(calls)
        # A captured launch keeps its counter as long as the process lives, and a session captures
        # more launches than there are counters; the graphs before this one are not replayed again.
        backend._tickets.clear()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # autograd and cuBLAS must not meet a stream in a capture
            calls[0].run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.kept: list[Any] = []
        with torch.cuda.graph(self.graph, stream=side):
            for call in calls:
                out = call.run()
                if keep:  # or all gradients would go to one buffer, and that one stay in the cache
                    self.kept.append(out)

    def work(self) -> None:
        self.graph.replay()


class HostClock:
    """The CPU smoke test's clock: it says that things run, and nothing about speed."""

    device = torch.device("cpu")
    measures = False
    l2_bytes = memory_bytes = 0

    def sampler(self, calls: Sequence[Call], mode: str, keep: bool) -> Sampler:
        return Sampler(calls)


@triton.jit
def _empty_kernel():
    pass


class DeviceClock:
    """CUDA events on the current GPU."""

    device = torch.device("cuda")
    measures = True

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = properties.L2_cache_size
        self.memory_bytes = properties.total_memory

    def sampler(self, calls: Sequence[Call], mode: str, keep: bool) -> Sampler:
        return _GraphSampler(calls, keep) if mode == "graph" else _EventSampler(calls)

    @cache  # noqa: B019  one clock a session
    def empty_launches_us(self, launches: int, mode: str) -> float:
        """Time of a step that launches so many empty kernels, as any row of this mode is timed."""

        def run() -> tuple[()]:
            for _ in range(launches):
                _empty_kernel[(1,)]()
            return ()

        calls = [Call(run)] * (CALLS_OF_A_HOT_GRAPH if mode == "graph" else 1)
        run()
        return self._median_us(self.sampler(calls, mode, keep=False))

    @cache  # noqa: B019  one clock a session
    def copy_bytes_a_us(self) -> float:
        """Bandwidth of a device-to-device copy of 1 GiB, read plus written."""
        source = torch.randn(2**28, device=self.device)
        target = torch.empty_like(source)

        def run() -> tuple[()]:
            target.copy_(source)
            return ()

        return (
            2 * source.nbytes / self._median_us(self.sampler([Call(run)], "dispatch", keep=False))
        )

    @staticmethod
    def _median_us(sampler: Sampler) -> float:
        rounds: Callable[[], int] = sampler.rounds
        for _ in range(rounds()):
            sampler.prepare()
            sampler.sample()
        return float(sampler.summary()["median_us"])
