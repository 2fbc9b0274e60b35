"""Where a step's time goes, from a trace of a few steps (`mentorch.engine.profile`)."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import profiler

from mentorch.engine.profile import summarise

STEPS_ON_GPU, STEPS_ON_CPU = 5, 1


def wait(device: torch.device) -> None:
    """For what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Traces some steps after one that does not count: the first under a profiler is slower.

    Returns:
        launches and host_launches a step; busy, a share; families_ms, milliseconds a step by kernel
        family (operators on a CPU). See `mentorch.engine.profile.Summary`.
    """
    on_gpu = device.type == "cuda"
    steps = STEPS_ON_GPU if on_gpu else STEPS_ON_CPU
    plan = profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    # On a GPU kernels alone: noting operators slows the host, for which an eager device waits.
    activities = [profiler.ProfilerActivity.CUDA if on_gpu else profiler.ProfilerActivity.CPU]
    with profiler.profile(activities=activities, schedule=plan) as traced:
        step()
        wait(device)
        traced.step()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        wall_s = time.perf_counter() - start
    found = summarise(traced, steps, device, wall_s)
    return {
        "launches": found.launches,
        "host_launches": found.host_launches,
        "busy": found.busy,
        "families_ms": {cost.name: cost.ms for cost in found.families},
    }
