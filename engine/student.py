"""StudentNets (g_s): models of timm's registry by name, ready to train."""

import inspect
from difflib import get_close_matches

import timm
import torch
from torch import Tensor, nn

from mentorch.engine.config import Precision, StudentConfig
from mentorch.engine.students import STUDENTS  # importing it registers them with timm


def create_student(
    config: StudentConfig,
    num_classes: int,
    device: torch.device,
    in_chans: int = 3,
    img_size: int | None = None,
) -> nn.Module:
    """A student with fresh weights.

    Args:
        config: which model.
        num_classes: width of its classifier.
        device: where it shall live.
        in_chans: channels of the images.
        img_size: side of the images, pixels. Only those of our students that depend on it are told
            it; None leaves them at their own.

    Raises:
        ValueError: there is no such model; the message has the nearest names.
    """
    if not timm.is_model(config.name):
        raise ValueError(_unknown(config.name))
    arguments = {"num_classes": num_classes, "drop_rate": config.drop_rate, "in_chans": in_chans}
    # timm's entrypoints hide img_size behind **kwargs, and most of its models reject it; ours that
    # depend on it name it.
    named = inspect.signature(timm.models.model_entrypoint(config.name)).parameters
    if img_size is not None and "img_size" in named:
        arguments["img_size"] = img_size
    student: nn.Module = timm.create_model(config.name, pretrained=False, **arguments)
    student.to(device)
    if config.channels_last:
        student.to(memory_format=torch.channels_last)
    return student


def _unknown(name: str) -> str:
    near = get_close_matches(name, STUDENTS) + timm.list_models(f"*{name.split('_')[0]}*")
    return (
        f"there is no model {name!r}. Near it: {', '.join(dict.fromkeys(near[:8])) or 'nothing'}; "
        f"timm.list_models() lists timm's, and ours are {', '.join(STUDENTS)}"
    )


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
