"""The device clock's order of work, on a made-up torch.cuda; that it is right needs a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import clocks
import pytest
import torch
from peers import Call

from mentorch.kernels import backend


@pytest.fixture
def log(monkeypatch):
    """What a clock asked of the device, in order; an event is 8 µs after the one before."""
    done = []

    class Event:
        count = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")
            Event.count += 1
            self.ms = 0.008 * Event.count

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, later):
            return later.ms - self.ms

    class Graph:
        def replay(self):
            done.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "graph": lambda graph, stream: done.append("capture") or nullcontext(),
        "synchronize": lambda: done.append("idle"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1, total_memory=2),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return done


def calls(log, count):
    def call(name):
        return Call(lambda: log.append(name) or (name,), lambda: log.append(f"restore {name}"))

    return [call(name) for name in "abcd"[:count]]


def test_a_dispatched_step_begins_on_an_idle_device_with_its_input_restored(log):
    sampler = clocks.DeviceClock().sampler(calls(log, 1), "dispatch", keep=False)
    sampler.prepare()
    sampler.sample()
    assert log == ["restore a", "idle", "event", "a", "event", "wait"]
    assert sampler.times_us == [pytest.approx(8.0)]


@pytest.mark.parametrize("keep", [True, False])
def test_a_graph_holds_every_call_once_and_a_sample_replays_it(log, keep):
    sampler = clocks.DeviceClock().sampler(calls(log, 4), "graph", keep)
    assert log == ["a", "idle", "capture", "a", "b", "c", "d"]
    assert sampler.kept == ([("a",), ("b",), ("c",), ("d",)] if keep else [])
    log.clear()
    sampler.sample()
    assert log == ["event", "replay", "event", "wait"]
    assert sampler.times_us == [pytest.approx(2.0)], "8 µs for four calls"


def test_counters_of_graphs_before_are_given_back(log):
    """A session captures thousands of launches; the pool has 8192 counters, never returned."""
    before = backend.tickets(torch.device("cpu"))
    clocks.DeviceClock().sampler(calls(log, 1), "graph", keep=False)
    assert backend.tickets(torch.device("cpu")).data_ptr() != before.data_ptr()
