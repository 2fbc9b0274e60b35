"""How our students enter timm's registry, and what they share."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

Entrypoint = Callable[..., nn.Module]

STUDENTS: list[str] = []
"""Names of our students, in the order they were registered."""


def student(entrypoint: Entrypoint) -> Entrypoint:
    """Registers ``entrypoint`` with timm, under its own name."""
    register_model(entrypoint)
    STUDENTS.append(entrypoint.__name__)
    return entrypoint


def cfg(in_chans: int, img_size: int) -> dict[str, Any]:
    """timm's description of a model without published weights.

    Args:
        in_chans: channels of the images it was designed for; the default of `create_model`.
        img_size: side of those images, pixels.
    """
    return {"num_classes": 10, "input_size": (in_chans, img_size, img_size), "pool_size": None}


def build(model: type[nn.Module], name: str, pretrained: bool, **arguments: object) -> nn.Module:
    """timm's builder: takes what `create_model` passes besides the model's own arguments.

    Raises:
        RuntimeError: ``pretrained`` is set: none of our students has published weights.
    """
    built: nn.Module = build_model_with_cfg(model, name, pretrained, **arguments)
    return built


def check_size(images: Tensor, img_size: int) -> None:
    """Refuses ``images`` [B, C, H, W] of another size than the first linear layer was made for.

    Raises:
        ValueError: height or width is not ``img_size``.
    """
    height, width = images.shape[-2:]
    if height != img_size or width != img_size:
        raise ValueError(
            f"this student was made for images of {img_size}×{img_size} and got {height}×{width}: "
            f"make it with img_size={height}"
        )
