"""StudentNets (g_s): timm models by name, ready to train."""

import timm
import torch
from torch import Tensor, nn

from mentorch.engine.config import Precision, StudentConfig


def create_student(config: StudentConfig, num_classes: int, device: torch.device) -> nn.Module:
    """A student with fresh weights.

    Args:
        config: which model.
        num_classes: width of its classifier.
        device: where it shall live.

    Raises:
        ValueError: timm has no such model; the message has the nearest names.
    """
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('_')[0]}*")[:8]
        raise ValueError(
            f"timm has no model {config.name!r}. Near it: {', '.join(near) or 'nothing'}; "
            "timm.list_models() lists all"
        )
    student: nn.Module = timm.create_model(
        config.name, pretrained=False, num_classes=num_classes, drop_rate=config.drop_rate
    )
    student.to(device)
    if config.channels_last:
        student.to(memory_format=torch.channels_last)
    return student


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the student's forward pass.

    Args:
        precision: as configured; "auto" is bf16 on hardware with bf16 matrix units, else fp32.
        device: where the student lives.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast_bf16 = torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast_bf16 else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def forward(student: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, C] under autocast; float32 means no autocast at all."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits: Tensor = student(images)
    return logits
