"""mentorch: train image classifiers on partly wrong labels, learning how much to trust each.

Names are imported on first use, so ``import mentorch`` costs nothing and needs no GPU and no DALI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mentorch.engine.issues.find import find_label_issues as find_label_issues
    from mentorch.engine.mentor import MentorNet as MentorNet
    from mentorch.engine.reweight import Reweight as Reweight

__version__ = "0.1.0"

_HOME = {
    "Reweight": "mentorch.engine.reweight",
    "MentorNet": "mentorch.engine.mentor",
    "find_label_issues": "mentorch.engine.issues.find",
}
__all__ = ["MentorNet", "Reweight", "__version__", "find_label_issues"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mentorch' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
