"""Batches made one ahead, on a stream of their own, while the device works on the one before."""

from collections.abc import Iterable, Iterator

import torch

from mentorch.engine.data.pipelines import Batch


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each begun before the one in front of it is handed out.

    Copying decoded pixels (uint8) to where torch keeps them, or cutting windows out of images that
    lie on the device, then runs beside the step, and the host waits for a decoder while the device
    has work. What is handed out is ready for the current stream.

    Args:
        batches: of a loader, on the device or the host. One more than was asked for is taken from
            it.
        device: of what comes out; on a CPU there is nothing to overlap.
    """
    if device.type != "cuda":
        for batch in batches:  # not `yield from`, which would close what is not ours to close
            yield batch
        return
    stream = torch.cuda.Stream(device)
    source = iter(batches)

    def begin() -> tuple[Batch | None, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch = next(source, None)
            if batch is not None:  # of a set in the host's memory
                batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            return batch, stream.record_event()

    ahead, ready = begin()
    while ahead is not None:
        batch = ahead
        following = begin()
        now = torch.cuda.current_stream(device)
        now.wait_event(ready)
        for tensor in batch:
            tensor.record_stream(now)  # its memory is not free before this stream is done with it
        yield batch
        ahead, ready = following
