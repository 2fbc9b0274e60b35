"""How a training step is run: operation by operation, compiled, or captured and replayed.

A captured step is a list of kernels with fixed arguments. So whatever changes from step to step
must be in tensors that keep their places: images and ids are copied into the places they had at the
capture, the learning rate and the average's factor are tensors, and the criterion counts its steps
on the device. Python runs at the capture only: an observer or a criterion sees the same tensors
with new contents at every replay, and what it does besides launching kernels it does once.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from mentorch.engine.distributed import World
from mentorch.engine.optim import waits_for_device

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Images and sample ids in, tensors out; the same work in every step."""

# Before it a capture that breaks off leaves the random numbers and the allocator as if it went on.
_RECOVERS = TorchVersion("2.15")
WARM_STEPS = 3  # kernels are compiled, cuDNN chooses, DDP and the optimiser make their state


class Recorder(Protocol):
    """Something that can repeat a step on the device."""

    waits: str
    """What made the host wait in the last warm step; "" for nothing."""

    def warm(self, step: Callable[[], Any]) -> Any:
        """Runs a step as the recording will run."""

    def record(self, step: Callable[[], Any]) -> Any:
        """Takes a step and remembers how; returns what it returned."""

    def replay(self) -> None:
        """Takes it again, on the same tensors."""


class CudaGraph:
    """A `Recorder`: everything that a step launches on one GPU, launched again by one call."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()
        self.waits = ""

    def warm(self, step: Callable[[], Any]) -> Any:
        """On the stream of the capture: autograd remembers where its nodes were made."""
        now = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(now)
        before = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        now.wait_stream(self.stream)
        lines = (f"{line.message} ({line.filename}:{line.lineno})" for line in told)
        self.waits = next((line for line in lines if "synchronizing" in line), "")
        return found

    def record(self, step: Callable[[], Any]) -> Any:
        """A capture runs nothing, so the step is taken by the first replay.

        Other threads go on meanwhile (DALI's decode and allocate): only what this one does counts.
        """
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            found = step()
        self.graph.replay()
        return found

    def replay(self) -> None:
        """One launch."""
        self.graph.replay()


class Captured:
    """A step that is recorded once and then replayed.

    Args:
        step: to be recorded.
        new_recorder: called for every recording.
        say: told what happens.
        undo: puts right what a step leaves that broke off in the middle.
    """

    def __init__(
        self,
        step: Step,
        new_recorder: Callable[[], Recorder],
        say: Callable[[str], None],
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self._step, self._new_recorder, self._say, self._undo = step, new_recorder, say, undo
        self._refused = False
        self.forget()

    def forget(self) -> None:
        """What was recorded no longer holds: the next steps are taken anew."""
        self._recorder: Recorder | None = None
        self._warm_steps = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, images: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:
        """Takes a step; what it returns stays as it is when the next one is taken."""
        if self._refused or not self._take(images, sample_ids):
            return self._step(images, sample_ids)
        if self._recorder is None:
            self._recorder = self._new_recorder()
        if self._warm_steps < WARM_STEPS:
            self._warm_steps += 1
            found: tuple[Tensor, ...] = self._recorder.warm(lambda: self._step(*self._inputs))
            if self._warm_steps == WARM_STEPS and self._recorder.waits:
                self._refuse(self._recorder.waits)
            return found
        if not self._outputs:
            return self._record(self._recorder)
        self._recorder.replay()
        return tuple(tensor.clone() for tensor in self._outputs)

    def _take(self, *batch: Tensor) -> bool:
        """Copies a batch to where the recording finds it, if it is of the shape recorded."""
        if not self._inputs:  # from the first step on: kernels are compiled for where they lie
            self._inputs = tuple(tensor.clone() for tensor in batch)
            return True
        if any(p.shape != t.shape for p, t in zip(self._inputs, batch, strict=True)):
            return False
        for place, tensor in zip(self._inputs, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        return True

    def _record(self, recorder: Recorder) -> tuple[Tensor, ...]:
        inputs = self._inputs
        try:
            self._outputs = recorder.record(lambda: self._step(*inputs))
        except Exception as error:  # a capture says no in many ways; nothing has run yet
            reason = _in_a_line(error)
            if isinstance(recorder, CudaGraph) and torch.__version__ < _RECOVERS:
                raise RuntimeError(
                    f"the step cannot be captured ({reason}), and torch {torch.__version__} cannot "
                    "go on after that: take train.engine eager or compile"
                ) from error
            self._undo()
            self._refuse(reason)
            return self._step(*inputs)
        self._say(f"the step is captured in one CUDA graph, after {WARM_STEPS} eager ones")
        return tuple(tensor.clone() for tensor in self._outputs)

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._say(f"the step cannot be captured, and goes on eager: {reason}")
        self.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def why_not_captured(world: World, optimizer: torch.optim.Optimizer) -> str:
    """Why the whole step cannot be one CUDA graph here; "" when it can."""
    if world.device.type != "cuda":
        return f"a CUDA graph needs a GPU, and this run is on the {world.device.type}"
    if world.world_size > 1:
        return f"of {world.world_size} ranks; the exchange of gradients is not captured"
    if waits_for_device(optimizer):
        return (
            f"{type(optimizer).__name__} waits for the device in every step; torch's SGD does not"
        )
    return ""


def compiled(
    run: Callable[[Tensor], Tensor], module: nn.Module, images: Tensor, backend: str = "inductor"
) -> tuple[Callable[[Tensor], Tensor], str]:
    """A forward pass by torch.compile, tried out on a batch, backward pass included.

    Args:
        run: the forward pass.
        module: what it runs, in training; left as it was.
        images: a batch. Only batches of its shape are to come.
        backend: of torch.compile.

    Returns:
        The compiled pass and ""; or ``run`` itself and why it cannot be compiled here.
    """
    found = torch.compile(run, dynamic=False, backend=backend)
    # Without an exchange of gradients: a rank that fails here must not leave others waiting in it.
    alone = module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
    try:
        with _undone(module, images.device), alone:
            found(images).float().sum().backward()
    except Exception as error:  # a compiler has many ways to fail (no C++ compiler is one)
        return run, _in_a_line(error)
    return found, ""


@contextmanager
def _undone(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts running statistics, random state and gradients back."""
    kept = [buffer.clone() for buffer in module.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for buffer, before in zip(module.buffers(), kept, strict=True):
            buffer.copy_(before)
        for parameter in module.parameters():
            parameter.grad = None


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
