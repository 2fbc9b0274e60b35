"""torch.distributed, always: under torchrun with any number of ranks, and alone with one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from mentorch.engine.rendezvous import fresh_store, second_connection

T = TypeVar("T")

DAY = timedelta(days=1)
JOINING = timedelta(minutes=15)  # for all ranks to come: images are pulled, queues are waited in


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patient: dist.ProcessGroup | None = None
    """CPU group with a day's time-out, for waiting on one rank's file work."""
    notices: Store | None = None
    """Where ranks leave word for each other outside of all collectives (`Watchdog`)."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all ranks, for as long as indexing or a checkpoint may take."""
        if self.patient is not None:
            dist.barrier(group=self.patient)

    def from_main(self, value: T) -> T:
        """The main rank's value, on every rank (anything JSON-like)."""
        if self.patient is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank (anything JSON-like)."""
        values: list[Any] = [value] * self.world_size
        if self.patient is not None:
            dist.all_gather_object(values, value, group=self.patient)
        return values


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cuda":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but torch sees no CUDA GPU here")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"rank {local_rank} of this host has no GPU: there are {gpus} of them")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def distributed(device: str = "auto", timeout: timedelta | None = None) -> Iterator[World]:
    """Joins the ranks torchrun started (or makes a world of one) and leaves them at the end.

    Args:
        device: "auto" takes a GPU a rank where there are any, otherwise the CPU.
        timeout: of a collective. `Watchdog` ends a rank that hangs, and can say more about it than
            the backend, so this should be longer than what that allows; None is a day.

    Raises:
        ValueError: a device that is not there.
        RuntimeError: ranks that did not come.
    """
    chosen = _device(device)
    notices = _join(chosen, timeout or DAY)
    try:
        patient = dist.new_group(backend="gloo", timeout=DAY)
        assert isinstance(patient, dist.ProcessGroup)  # every rank is in it
        yield World(dist.get_rank(), dist.get_world_size(), chosen, patient, notices)
    except BaseException:
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise  # among several, leaving would wait for the others: dying is what torchrun sees
    dist.destroy_process_group()


def _join(device: torch.device, timeout: timedelta) -> Store | None:
    """Makes the process group; returns what `World.notices` holds."""
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = fresh_store(rank, world_size, JOINING)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    return second_connection(store) if world_size > 1 else None
