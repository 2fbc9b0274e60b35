"""How a training step is run: operation by operation, compiled, or captured and replayed.

A captured step is a list of kernels with fixed arguments. So whatever changes from step to step
must be in tensors that keep their places: images and ids are copied into the places they had at the
capture, the learning rate and the average's factor are tensors, and the criterion counts its steps
on the device. Python runs at the capture only: an observer or a criterion sees the same tensors
with new contents at every replay, and what it does besides launching kernels it does once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mentorch.engine.distributed import World
from mentorch.engine.optim import waits_for_device

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Images and sample ids in, tensors out; the same work in every step."""

WARM_STEPS = 3  # kernels are compiled, cuDNN chooses, DDP and the optimiser make their state


class Recorder(Protocol):
    """Something that can repeat a step on the device."""

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

    def warm(self, step: Callable[[], Any]) -> Any:
        """On the stream of the capture: autograd remembers where its nodes were made."""
        now = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            found = step()
        now.wait_stream(self.stream)
        return found

    def record(self, step: Callable[[], Any]) -> Any:
        """A capture runs nothing, so the step is taken by the first replay."""
        with torch.cuda.graph(self.graph, stream=self.stream):
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
    """

    def __init__(
        self, step: Step, new_recorder: Callable[[], Recorder], say: Callable[[str], None]
    ) -> None:
        self._step, self._new_recorder, self._say = step, new_recorder, say
        self._refused = False
        self.forget()

    def forget(self) -> None:
        """What was recorded no longer holds: the next steps are taken anew."""
        self._recorder: Recorder | None = None
        self._warm_steps = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, images: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:
        """Takes a step; what it returns stays as it is when the next one is taken."""
        if self._refused or not self._fits(images, sample_ids):
            return self._step(images, sample_ids)
        if self._warm_steps < WARM_STEPS:
            self._warm_steps += 1
            self._recorder = self._recorder or self._new_recorder()
            found: tuple[Tensor, ...]
            found = self._recorder.warm(lambda: self._step(images, sample_ids))
            return found
        if self._inputs is None:
            return self._record(images, sample_ids)
        assert self._recorder is not None
        for place, tensor in zip(self._inputs, (images, sample_ids), strict=True):
            place.copy_(tensor, non_blocking=True)
        self._recorder.replay()
        return tuple(tensor.clone() for tensor in self._outputs)

    def _fits(self, images: Tensor, sample_ids: Tensor) -> bool:
        """Whether a batch is of the shape that was recorded."""
        if self._inputs is None:
            return True
        shapes = (images.shape, sample_ids.shape)
        return shapes == tuple(tensor.shape for tensor in self._inputs)

    def _record(self, images: Tensor, sample_ids: Tensor) -> tuple[Tensor, ...]:
        inputs = images.clone(), sample_ids.clone()
        assert self._recorder is not None
        try:
            self._outputs = self._recorder.record(lambda: self._step(*inputs))
        except Exception as error:  # a capture says no in many ways; nothing has run yet
            self._refused = True
            self._say(f"the step cannot be captured, and goes on eager: {_in_a_line(error)}")
            return self._step(images, sample_ids)
        self._inputs = inputs
        self._say(f"the step is captured in one CUDA graph, after {WARM_STEPS} eager ones")
        return tuple(tensor.clone() for tensor in self._outputs)


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
    try:
        with _undone(module, images.device):
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
