"""timm's training task with a loss that has a state: in its checkpoints, and with sample ids."""

from typing import Any

from timm.task import ClassificationTask
from torch import Tensor, nn

if not hasattr(ClassificationTask, "get_task_state"):
    raise ImportError("this timm's tasks have no state, so none would be saved: 1.0.31's have one")

_KEY = "criterion"


class WeightedTask(ClassificationTask):  # type: ignore[misc]
    """`timm.task.ClassificationTask`, whose checkpoints hold the criterion's state too.

    Arguments as there; ``criterion`` is a `mentorch.Reweight`. In eval mode the loss is plain
    cross-entropy, so call ``task.train()`` before training goes on.

    Raises:
        ValueError: a criterion that is a function, so that it has no state.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not isinstance(self.criterion, nn.Module):
            raise ValueError(
                "the criterion's state goes into the checkpoints, so it must be an nn.Module such "
                f"as mentorch.Reweight, not {self.criterion!r}; for a function take timm's "
                "ClassificationTask"
            )

    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """A pass through the model, and the loss.

        Args:
            input: [B, C, H, W] images.
            target: [B] integers, the given labels.
            index: [B] int64 sample ids, for what is kept by sample.

        Returns:
            "loss", to call ``backward`` on, and "output", the logits.
        """
        output = self.trainable_module(input)
        ids = () if index is None else (index,)
        return {"loss": self.criterion(output, target, *ids), "output": output}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What timm writes into a checkpoint beside the model."""
        return {} if ema else {_KEY: self.criterion.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Puts it back.

        Raises:
            ValueError: the checkpoint has none of it.
        """
        if ema:
            return
        if not state or _KEY not in state:
            raise ValueError(
                "the checkpoint has no state of the criterion, so it is not of a WeightedTask. To "
                "begin with its weights alone, load its 'state_dict' into the model"
            )
        self.criterion.load_state_dict(state[_KEY], strict=strict)
