"""SGD with momentum, its learning-rate schedule, and the weight decay of Eq. 1."""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mentorch.engine.config import OptimConfig


def has_nvidia_apex() -> bool:
    """True when NVIDIA's apex is installed, not the unrelated package of that name on the registry.

    Nothing is imported: NVIDIA's has optimizers/fused_sgd.py and the compiled extension amp_C.
    """
    spec = find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    has_file = any((Path(folder) / "optimizers" / "fused_sgd.py").is_file() for folder in folders)
    return has_file and find_spec("amp_C") is not None


def create_optimizer(
    config: OptimConfig, student: nn.Module, criterion: nn.Module | None = None
) -> torch.optim.Optimizer:
    """SGD over the student's weights; decay on matrices and filters only.

    What a criterion has to learn (a noise layer) is trained along, without decay.

    With ``scale_weight_decay`` the optimiser itself does not decay: `add_weight_decay` does, by an
    amount that is known on the device only.

    Raises:
        ValueError: apex was asked for and is not there.
    """
    decay = 0.0 if config.scale_weight_decay else config.weight_decay
    groups = param_groups_weight_decay(student, decay)
    own = [] if criterion is None else [p for p in criterion.parameters() if p.requires_grad]
    if own:
        groups.append({"params": own, "weight_decay": 0.0})
    on_gpu = next(student.parameters()).is_cuda
    if config.implementation == "apex" and not (on_gpu and has_nvidia_apex()):
        raise ValueError(
            "implementation='apex' needs a GPU and NVIDIA apex, built from its source (the package "
            "called apex on the registry is something else). 'auto' does without"
        )
    if config.implementation != "torch" and on_gpu and has_nvidia_apex():
        from apex.optimizers import FusedSGD  # a source build

        apex_sgd: torch.optim.Optimizer = FusedSGD(
            groups, config.lr, config.momentum, nesterov=config.nesterov
        )
        return apex_sgd
    sgd = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        # v ← μ 0 + g is what SGD does at its first step anyway; but if that step is skipped, it
        # leaves buffers behind that nobody has written to.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def step_unless(
    skip: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Takes the optimiser's step, or leaves everything as it is; only the loss scale may shrink.

    Args:
        skip: 0-d bool on the device. torch's fused optimisers read it there; for apex's, which
            cannot, the host waits.
        optimizer: gradients unscaled.
        scaler: of the loss; switched off for anything but fp16.
    """
    if scaler.is_enabled():  # its own check has found the same as ours
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(skip):
        optimizer.step()


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of a step: a pure function, so there is no scheduler state to resume.

    Args:
        config: warm-up and schedule.
        step: counted from 0.
        steps_per_epoch: for the warm-up's length.
        total_steps: of training.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "step":
        passed = sum(step >= share * total_steps for share in config.milestones)
        return config.lr * config.gamma**passed
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def add_weight_decay(
    student: nn.Module, weight_decay: float, weight_and_count: Tensor, world_size: int
) -> None:
    """Adds weight_decay · v̄ · w to the gradients, v̄ the mean sample weight of the global batch.

    The released code's form: a batch of which little is trusted decays little. Nothing syncs with
    the host.

    Args:
        student: whose optimiser was made with ``scale_weight_decay``. What has one dimension
            (norms, biases) does not decay: timm's rule.
        weight_decay: θ of Eq. 1.
        weight_and_count: [2], Σv and the number of samples of this rank.
        world_size: number of ranks.
    """
    if world_size > 1:
        dist.all_reduce(weight_and_count)
    mean_weight = weight_and_count[0] / weight_and_count[1].clamp(min=1)
    pairs = [(p, p.grad) for p in student.parameters() if p.ndim > 1 and p.grad is not None]
    weights: list[Tensor] = [parameter for parameter, _ in pairs]
    gradients = [gradient for _, gradient in pairs]
    decay = list(torch._foreach_mul(weights, mean_weight * weight_decay))
    torch._foreach_add_(gradients, decay)
