"""Optimisers, the learning-rate schedule, and the weight decay of Eq. 1."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import Lamb, Lars, param_groups_weight_decay
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
    """The optimiser of the student's weights; decay on matrices and filters only.

    What a criterion has to learn (a noise layer) is trained along, without decay.

    With ``scale_weight_decay`` the optimiser itself does not decay: `add_weight_decay` does, by an
    amount that is known on the device only.

    Raises:
        ValueError: apex was asked for and is not there, or has no such optimiser.
    """
    decay = 0.0 if config.scale_weight_decay else config.weight_decay
    groups = param_groups_weight_decay(student, decay)
    own = [] if criterion is None else [p for p in criterion.parameters() if p.requires_grad]
    if own:
        groups.append({"params": own, "weight_decay": 0.0})
    on_gpu = next(student.parameters()).is_cuda
    if _takes_apex(config, on_gpu):
        return _apex(config, groups)
    optimizer: torch.optim.Optimizer
    if config.name == "lars":
        trust = config.trust_coefficient
        optimizer = Lars(
            groups, config.lr, config.momentum, nesterov=config.nesterov, trust_coeff=trust
        )
        return optimizer
    if config.name == "lamb":
        optimizer = Lamb(groups, config.lr, betas=config.betas, max_grad_norm=None)  # we clip
        return optimizer
    return _sgd(config, groups, on_gpu)


def _takes_apex(config: OptimConfig, on_gpu: bool) -> bool:
    if config.implementation == "torch":
        return False
    there = on_gpu and has_nvidia_apex()
    if config.implementation == "apex" and not there:
        raise ValueError(
            "implementation='apex' needs a GPU and NVIDIA apex, built from its source (the package "
            "called apex on the registry is something else). 'auto' does without"
        )
    if config.implementation == "apex" and config.name == "lars":
        raise ValueError("apex has no LARS: take implementation='auto', which is timm's")
    return there and (config.implementation == "apex" or config.name == "lamb")


def _apex(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedLAMB, FusedSGD  # a source build

    optimizer: torch.optim.Optimizer
    if config.name == "lamb":
        optimizer = FusedLAMB(groups, config.lr, betas=config.betas, max_grad_norm=0.0)  # we clip
    else:
        optimizer = FusedSGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
    return optimizer


def _sgd(config: OptimConfig, groups: list[dict[str, Any]], on_gpu: bool) -> torch.optim.SGD:
    sgd = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=True)
    device = sgd.param_groups[0]["params"][0].device
    rate = torch.full((), config.lr, device=device)  # one tensor that all groups share
    for group in sgd.param_groups:
        group["lr"] = rate
        # v ← μ 0 + g is what SGD does at its first step anyway; but if that step is skipped, it
        # leaves buffers behind that nobody has written to.
        for parameter in group["params"] if config.momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def waits_for_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the host must know before a step if the gradients are finite."""
    return not getattr(optimizer, "_step_supports_amp_scaling", False)


def step_unless(
    skip: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Takes the optimiser's step, or leaves everything as it is; only the loss scale may shrink.

    Args:
        skip: 0-d bool on the device. torch's fused optimisers read it there; for LARS, LAMB and
            apex's, which cannot, the host waits.
        optimizer: gradients unscaled.
        scaler: of the loss; switched off for anything but fp16.
    """
    if scaler.is_enabled():  # its own check, of every element, has found what ours of the norm has
        scaler.step(optimizer)
        scaler.update()
    elif not waits_for_device(optimizer):
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
    """Sets the rate of all groups; where it is a tensor, in place and without waiting."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if isinstance(rates[0], Tensor):
        rates[0].fill_(lr)  # shared by all groups
        return
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict, rates as numbers: what a checkpoint holds."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts back what `optimizer_state` gave; a rate that is a tensor stays that tensor."""
    rate = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(state)
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # In the parameter's memory order, or the fused update would sum in another one.
                slots[name] = torch.empty_like(parameter).copy_(value)
    if isinstance(rate, Tensor):
        rate.fill_(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group["lr"] = rate


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
