"""Measures the providers of one process in turns: same work first, then time, then where it goes.

Runs in a process of its own (`fresh`). A round times every provider once, one after another, every
other round backwards; a sample is as many steps as fill a given time, up to the device's end.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import fresh
import timm
import torch
from harness import LeftOut
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_profile import profile, wait
from train_providers import Loop, Work, make_work, setup, why_another
from train_subjects import BASE, MEMORY_WATCHED, Subject, split, why_spent

from mentorch.engine.student import autocast_dtype

WARM_STEPS = 8  # after the two that are checked: what compiles or captures has done so by then
MOST_STEPS = 1000  # of a sample
# Relative to the loss. After an update the rounding of all gradients is in it.
TOLERANCE = {torch.float32: (1e-5, 5e-3), torch.bfloat16: (1e-2, 5e-2)}


@dataclass
class Runner:
    """A provider at work and what is known of it so far."""

    provider: str
    loop: Loop
    record: dict[str, Any]
    steps: int = 1


def measure(
    provider: str,
    subject: dict[str, Any],
    providers: list[str],
    rounds: int,
    sample_s: float,
    budget_s: float,
    precision: str = "auto",
) -> dict[str, Any]:
    """Measures a process's providers.

    Args:
        provider: the group's name, for messages.
        subject: the fields of a `Subject`.
        providers: who, `BASE` first.
        rounds: samples of each.
        sample_s: seconds a sample at least.
        budget_s: no provider is begun after so many seconds.
        precision: as ``TrainConfig.precision``.

    Returns:
        records, a dictionary a provider; left_out, reasons by provider.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as train.py and our job do
    dtype = autocast_dtype(precision, device)  # type: ignore[arg-type]
    if dtype == torch.float32:  # or cuDNN rounds to TF32, each algorithm in its own way
        torch.backends.cudnn.allow_tf32 = False
    wanted = Subject(**subject)
    while True:
        try:
            return _measure(make_work(wanted, dtype, device), providers, rounds, sample_s, budget_s)
        except torch.OutOfMemoryError:
            if wanted.batch == 1:
                raise
        wanted = replace(wanted, batch=wanted.batch // 2)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # or what was compiled is compiled again for batches of any size


def _measure(
    work: Work, providers: list[str], rounds: int, sample_s: float, budget_s: float
) -> dict[str, Any]:
    setup(BASE, work).step()  # what a process loads once must not be counted as the first one's
    runners, left_out = _begin_all(work, providers, budget_s)
    runners = _agreeing(runners, work.dtype, left_out)
    if len(runners) < 2:  # nobody to hold against BASE
        return {"records": [], "left_out": left_out}
    for runner in runners:
        runner.steps = min(MOST_STEPS, max(1, round(sample_s / _timed(runner, work.device))))
    for number in range(rounds):
        for runner in runners if number % 2 == 0 else runners[::-1]:
            runner.record["step_ms"].append(1e3 * _timed(runner, work.device))
    flop = training_flop(work.subject)
    for runner in runners:
        runner.record |= profile(runner.loop.step, work.device)
        runner.record |= _watched(runner, work) | {"flop_image": flop}
    return {"records": [runner.record for runner in runners], "left_out": left_out}


def _begin_all(
    work: Work, providers: list[str], budget_s: float
) -> tuple[list[Runner], dict[str, str]]:
    """Who could begin, and why others could not."""
    runners: list[Runner] = []
    left_out: dict[str, str] = {}
    start = time.monotonic()
    for provider in providers:
        reason = why_spent(start + budget_s, time.monotonic(), budget_s)
        try:
            if reason:
                raise LeftOut(reason)
            runners.append(_begin(provider, work))
        except LeftOut as why:
            left_out[provider] = str(why)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            if provider.startswith("mentorch"):
                raise
            left_out[provider] = f"failed: {type(problem).__name__}: {problem}".splitlines()[0]
    return runners, left_out


def _begin(provider: str, work: Work) -> Runner:
    """Sets a provider up and takes its first steps, whose losses are noted."""
    on_gpu = work.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    before = _memory(on_gpu)
    loop = setup(provider, work)
    losses = []
    for _ in range(2):
        loop.step()
        losses.append(loop.loss())
    idle = _idle(loop.model, work)
    for _ in range(WARM_STEPS if on_gpu else 1):
        loop.step()
    if another := why_another(loop):
        raise LeftOut(another)
    if on_gpu:
        torch.cuda.empty_cache()  # of what cuDNN tried out, as a capture does for a graph
    _forget_peak(on_gpu)
    for _ in range(2):
        loop.step()
    wait(work.device)
    peak = _memory(on_gpu, peak=True)
    parameters = [p for p in loop.model.parameters() if p.requires_grad]
    record = {
        "provider": provider,
        **asdict(work.subject),
        "dtype": str(work.dtype).removeprefix("torch."),
        "loss": losses,
        "parameters": sum(p.numel() for p in parameters),
        "idle": idle,
        "step_ms": [],
        **{f"peak_{name}": peak[name] - before[name] for name in peak},
    }
    return Runner(provider, loop, record)


def _idle(model: nn.Module, work: Work) -> int:
    """How many parameters were not trained: without a gradient, or filters that did not change.

    Where a block begins as nothing (its last norm's weight is 0), or samples weigh little,
    gradients are so small that adding them to another norm's 1 may change nothing.
    """
    return sum(
        parameter.grad is None
        or not bool(parameter.grad.any())
        or (parameter.ndim > 1 and torch.equal(parameter.detach().cpu(), work.weights[name]))
        for name, parameter in model.named_parameters()
    )


def _agreeing(runners: list[Runner], dtype: torch.dtype, left_out: dict[str, str]) -> list[Runner]:
    """Those that did the same work; a peer that did not is left out, one of ours is an error."""
    kept = []
    for runner in runners:
        base = [r for r in runners if r.provider == BASE]
        try:
            if runner.provider.startswith("timm") and runner.provider != BASE:
                agree([*base, runner], dtype)
        except AssertionError as problem:
            left_out[runner.provider] = f"other work: {problem}"
        else:
            kept.append(runner)
    if kept:
        agree(kept, dtype)
    return kept


def agree(runners: list[Runner], dtype: torch.dtype) -> None:
    """Asserts that all have done the same work.

    The first step's loss is everybody's, the second's everybody's with the same weights of samples:
    those of `mentorch` are held against the first of them in the process.
    """
    first, second = TOLERANCE[dtype]
    base = next(runner.record for runner in runners if runner.provider == BASE)
    weighed = [r.record for r in runners if _weighs(r.provider)]
    for runner in runners:
        found = runner.record
        like = weighed[0] if _weighs(runner.provider) else base
        assert _near(found["loss"][0], base["loss"][0], first), f"loss: {found} is not {base}"
        assert _near(found["loss"][1], like["loss"][1], second), f"loss: {found} is not {like}"
        assert found["parameters"] == base["parameters"], f"parameters: {found}, {base}"
        assert found["idle"] == 0, f"parameters that were not trained: {found}"


def _weighs(provider: str) -> bool:
    return split(provider)[0] in ("mentorch", "mentorch-fast", "mentorch-fused")


def _near(one: float, other: float, allowed: float) -> bool:
    return abs(one - other) <= allowed * abs(other)  # NaN is near nothing


def _timed(runner: Runner, device: torch.device) -> float:
    """Seconds a step, over a sample."""
    wait(device)
    start = time.perf_counter()
    for _ in range(runner.steps):
        runner.loop.step()
    wait(device)
    return (time.perf_counter() - start) / runner.steps


def _memory(on_gpu: bool, *, peak: bool = False) -> dict[str, int]:
    """Bytes now or at the most: of tensors and held on a GPU, resident on a CPU."""
    if not on_gpu:
        return {"bytes": fresh.resident_bytes(peak=peak)}
    most = "max_" * peak
    return {
        "bytes": getattr(torch.cuda, f"{most}memory_allocated")(),
        "reserved": getattr(torch.cuda, f"{most}memory_reserved")(),
    }


def _forget_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        fresh.forget_peak()


def _watched(runner: Runner, work: Work) -> dict[str, list[int]]:
    """Memory before and after many steps, bytes, of who is watched."""
    steps = work.subject.watched_steps
    if not steps or runner.provider not in MEMORY_WATCHED:
        return {}
    on_gpu = work.device.type == "cuda"
    return {"memory": list(_at_both_ends(runner, steps, work.device, on_gpu))}


def _at_both_ends(runner: Runner, steps: int, device: torch.device, on_gpu: bool) -> Iterator[int]:
    yield _memory(on_gpu)["bytes"]
    for _ in range(steps):
        runner.loop.step()
    wait(device)
    yield _memory(on_gpu)["bytes"]


def training_flop(subject: Subject) -> float:
    """Floating-point operations of an image's forward and backward pass; a multiply-add is two.

    Of convolutions and matrix products, counted on the meta device.
    """
    with torch.device("meta"):
        model = timm.create_model(subject.model, num_classes=subject.classes, drop_rate=0.0)
        images = torch.empty(2, 3, subject.size, subject.size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / 2
