"""The student on several ranks: gradients averaged while they are computed, buffers shared."""

import warnings

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mentorch.engine.config import ParallelConfig
from mentorch.engine.distributed import World


def synchronise_batch_norms(student: nn.Module, config: ParallelConfig, world: World) -> nn.Module:
    """The student, with batch norms over the global batch if that is asked for.

    Raises:
        ValueError: asked for on CPUs, where torch has none.
    """
    if not config.sync_batchnorm or world.world_size == 1:
        return student
    if world.device.type == "cpu":
        raise ValueError(
            "parallel.sync_batchnorm needs GPUs: torch's SyncBatchNorm takes no CPU tensors"
        )
    synchronised: nn.Module = convert_sync_batchnorm(student)
    return synchronised


def replicate(
    student: nn.Module, config: ParallelConfig, world: World, changes: bool = False
) -> nn.Module:
    """The student with its gradients averaged over the ranks, bucket by bucket during backward.

    - Gradients are views of the buckets that are exchanged: one copy of them less.
    - Buffers are not broadcast before every forward pass: in training nobody reads the running
      statistics, and the main rank's are shared where somebody does (`share_buffers`). torch 2.15
      has another name for that, which 2.11 has not.
    - A static graph lets DDP skip its search for unused parameters, and take students that have
      some, as long as they are the same in every step. Where that ``changes`` it is off: if
      gradients accumulate (a first backward pass under `no_sync` breaks an assertion inside DDP),
      and for a compiled student, whose graph DDP cuts at its buckets.
    """
    if world.world_size == 1:
        return student
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        replica = DistributedDataParallel(
            student,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=True,
            static_graph=config.static_graph and not changes,
        )
    if config.gradients == "bf16":
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


def flatten_buffers(module: nn.Module) -> Tensor | None:
    """One tensor in place of all float32 buffers, which become views of it; None without any.

    So the running statistics of all batch norms can be kept and put back in one operation each.
    """
    buffers = [b for b in module.buffers() if b.dtype == torch.float32 and b.is_contiguous()]
    if not buffers:
        return None
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.data = part.view_as(buffer)
    return flat


def share_buffers(module: nn.Module, world: World) -> None:
    """Gives every rank the main rank's running statistics, in one message a dtype."""
    if world.world_size == 1:
        return
    buffers = list(module.buffers())
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        mine = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in mine])
        dist.broadcast(flat, src=0)
        parts = flat.split([buffer.numel() for buffer in mine])
        for buffer, part in zip(mine, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
