"""StudentNets (g_s): models of timm's registry by name, ready to train."""

import inspect
import pickle
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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
    """A student with fresh weights, or with those of ``config.weights``.

    Args:
        config: which model, and what it starts from.
        num_classes: width of its classifier.
        device: where it shall live.
        in_chans: channels of the images.
        img_size: side of the images, pixels. Only those of our students that depend on it are told
            it; None leaves them at their own.

    Warns:
        UserWarning: the classifier is left fresh, because the one in the file has another width.

    Raises:
        FileNotFoundError: no such file of weights.
        ValueError: there is no such model, the message has the nearest names; or it knows nothing
            of an option asked for; or weights that do not fit it, or that reading would run code
            for.
    """
    require_model(config.name)
    arguments = {"num_classes": num_classes, "drop_rate": config.drop_rate, "in_chans": in_chans}
    # timm's entrypoints hide img_size behind **kwargs, and most of its models reject it; ours that
    # depend on it name it.
    named = inspect.signature(timm.models.model_entrypoint(config.name)).parameters
    if img_size is not None and "img_size" in named:
        arguments["img_size"] = img_size
    if config.fused_norms:
        if "fused_norms" not in named:
            raise ValueError(
                f"{config.name} has no fused norms: student.fused_norms is for "
                "inception_resnet_v2_fast, leave it off"
            )
        arguments["fused_norms"] = True
    student: nn.Module = timm.create_model(config.name, pretrained=False, **arguments)
    if config.checkpointing:
        _checkpoint(student, config.name)
    if config.weights:
        load_weights(student, config.weights)
    student.to(device)
    if config.channels_last:
        student.to(memory_format=torch.channels_last)
    return student


def _checkpoint(student: nn.Module, name: str) -> None:
    """Turns activation checkpointing on; timm's models that have none say so by an assertion."""
    try:
        student.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"{name} cannot recompute its activations: turn student.checkpointing off, or take "
            "another model (inception_resnet_v2_fast can)"
        ) from error


def require_model(name: str) -> None:
    """Raises ValueError with the nearest names if there is no such model, timm's or ours."""
    if timm.is_model(name):
        return
    near = get_close_matches(name, [*STUDENTS, *timm.list_models()])
    near += timm.list_models(f"*{name.split('_')[0]}*")
    raise ValueError(
        f"there is no model {name!r}. Near it: {', '.join(dict.fromkeys(near[:8])) or 'nothing'}; "
        f"timm.list_models() lists timm's, and ours are {', '.join(STUDENTS)}"
    )


def load_weights(student: nn.Module, path: Path) -> None:
    """Starts a student from the weights in a file; see `create_student`.

    Args:
        student: a model of timm's registry.
        path: .safetensors, or a state dict in .pt, .pth or .pth.tar, perhaps under "state_dict" or
            "model", its names perhaps under "module.".
    """
    found, wanted = read_weights(path), student.state_dict()
    classifiers = _classifiers(student)
    fresh = [name for name in wanted if name.rpartition(".")[0] in classifiers]
    if not all(_differs_in_width(found.get(name), wanted[name]) for name in fresh):
        fresh = []
    widths = [len(found.pop(name)) for name in fresh if name in found]
    _check_weights(path, found, {name: v for name, v in wanted.items() if name not in fresh})
    student.load_state_dict(found, strict=False)  # all but a fresh classifier: checked above
    if fresh:
        warnings.warn(
            f"{path}: its classifier is for {widths[0] if widths else 0} classes, not "
            f"{len(wanted[fresh[0]])}: the student's stays fresh",
            stacklevel=3,
        )


def _classifiers(student: nn.Module) -> set[str]:
    """Names of the modules that give the logits: as timm says, or else the last one."""
    named = getattr(student, "default_cfg", {}).get("classifier")
    if named is None:
        named = list(student.state_dict())[-1].rpartition(".")[0]
    return {named} if isinstance(named, str) else set(named)


def _differs_in_width(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None:
        return True  # a file without a classifier
    same_kind = found.ndim == wanted.ndim and found.shape[1:] == wanted.shape[1:]
    return same_kind and len(found) != len(wanted)


def _check_weights(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} has not the weights of this student: {'; '.join(problems[:5])}{more}. Give "
            "weights of the same student.name (and size of images), or none"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, without running code that is in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state dict, or one with more in it than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path} (student.weights)")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    if not path.name.endswith((".pt", ".pth", ".pth.tar")):
        raise ValueError(f"{path}: weights are .safetensors, .pt, .pth or .pth.tar files")
    state = _torch_load(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        raise ValueError(
            f"{path} holds no state dict, neither itself nor under 'state_dict' or 'model': save "
            "model.state_dict()"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises, its contents decide
        reason = str(error)
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reason:
            wanted = reason[reason.index("GLOBAL") :].split(" was not")[0][:100]
            raise ValueError(
                f"{path} was refused: reading it would have run code that it names ({wanted}). If "
                "you trust where it is from, save just its state dict, as .safetensors"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a state dict ({type(error).__name__}: {reason[:200]})"
        ) from error


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
