"""Curricula by name: the closed forms, the MentorNets that ship with the package, and files."""

from pathlib import Path
from typing import get_args

from mentorch.engine.mentor import MentorNet
from mentorch.kernels.mentor import ClosedForm, ClosedFormKind

SHIPPED = Path(__file__).parent / "weights"


def shipped_mentornets() -> list[str]:
    """Names of the MentorNets that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def resolve_curriculum(curriculum: str | Path | ClosedForm | MentorNet) -> ClosedForm | MentorNet:
    """What a user means by a curriculum.

    Args:
        curriculum: a closed form or MentorNet (returned as it is), a closed form's name with its
            default parameters (``"linear"``), a shipped MentorNet's name, or a ``.safetensors``
            file.

    Raises:
        ValueError: a name that is none of these; the message lists them.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(curriculum, (ClosedForm, MentorNet)):
        return curriculum
    name = str(curriculum)
    if name in get_args(ClosedFormKind):
        return ClosedForm(name)  # type: ignore[arg-type]  # checked on the line above
    if name in shipped_mentornets():
        return MentorNet.load(SHIPPED / f"{name}.safetensors")
    if name.endswith(".safetensors"):
        return MentorNet.load(name)
    raise ValueError(
        f"unknown curriculum {name!r}. Closed forms: {', '.join(get_args(ClosedFormKind))}. "
        f"MentorNets shipped: {', '.join(shipped_mentornets()) or 'none'}. "
        "Or give the path of a .safetensors file."
    )
