"""`Reweight` as a Hugging Face Trainer's loss: scaled as it expects, in its checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mentorch.engine.criterion import Criterion, count_rows

FILE = "criterion.safetensors"
_IGNORED = -100  # the label that the Trainer does not count


class TrainerLoss(TrainerCallback):  # type: ignore[misc]
    """A `Criterion` for `Trainer(compute_loss_func=loss, callbacks=[loss])`.

    The Trainer divides a loss by no number of batches when it accumulates gradients: it expects a
    sum over the micro-batch divided by ``num_items_in_batch``, the labels of all micro-batches and
    ranks. That is what this returns: Σ v ℓ / items. While the model evaluates it is plain
    cross-entropy.

    The Trainer keeps no state of a loss, so every checkpoint folder gets a
    ``criterion.safetensors``, which is read back when training goes on from it.

    Sample ids come with the labels, stacked behind them: labels [B, 2] are [(label, id), …], for
    tokens [B, length, 2]. Where the label is −100 the id must be −100 too.

    Args:
        criterion: the loss; it is moved to the Trainer's device. One for each training run.
        resume_from: the checkpoint folder that training goes on from, where it is not the one in
            the Trainer's ``output_dir``.

    Raises:
        ValueError: a criterion whose ``ignore_index`` is not −100.

    Example:
        >>> loss = TrainerLoss(Reweight("pd", total_steps=39_000))
        >>> Trainer(model, args, train_dataset=data, compute_loss_func=loss, callbacks=[loss])
    """

    def __init__(self, criterion: Criterion, resume_from: str | Path | None = None) -> None:
        if criterion.ignore_index != _IGNORED:
            raise ValueError(
                f"the Trainer ignores labels of {_IGNORED}, this criterion those of "
                f"{criterion.ignore_index}: give it ignore_index={_IGNORED}"
            )
        self.criterion = criterion
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._model: nn.Module | None = None

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            outputs: of the model: with ``logits``, or a tuple that begins with them.
            labels: integers of the logits' shape without the classes, or with ids, as above.
            num_items_in_batch: labels that count, of all micro-batches and ranks of the step.

        Raises:
            ValueError: no labels, or labels that do not fit.
        """
        if labels is None:
            raise ValueError("the batches have no 'labels'; a data set's items need that key")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        training = self._model is not None and self._model.training
        self.criterion.train(training)
        with_ids = labels.ndim == logits.ndim
        given, index = labels.unbind(-1) if with_ids else (labels, None)
        loss: Tensor = self.criterion(logits, given, index)
        if num_items_in_batch is None:
            return loss
        # Counted as the Trainer counts, ids included; only a training step is over the group.
        group = self.criterion.group if training else None
        return loss * (count_rows(labels != _IGNORED, group) / num_items_in_batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Moves the criterion to the device and, if training goes on, reads its state.

        Raises:
            ValueError: a run that this loss cannot be right in, or a file of another run.
            FileNotFoundError: training goes on, but the checkpoint has no state of a criterion.
        """
        _check_run(args, state, kwargs["model"])
        if self._model is not None and state.global_step == 0:
            raise ValueError(
                "this TrainerLoss has trained before, and its criterion would go on where it "
                "stopped: make a new Reweight and a new TrainerLoss for each run"
            )
        self._model = kwargs["model"]
        self.criterion.to(args.device)
        if state.global_step > 0:
            self._load(self.resume_from or _folder(args, state), state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Writes the criterion's state into the checkpoint that was just saved."""
        if args.should_save:
            tensors = {k: v.contiguous().cpu() for k, v in self.criterion.state_dict().items()}
            save_file(tensors, _folder(args, state) / FILE, {"run": _fingerprint(state)})

    def _load(self, folder: Path, state: TrainerState) -> None:
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"training goes on at step {state.global_step:,}, but {path} is missing. Is the "
                "checkpoint elsewhere? Say so: TrainerLoss(criterion, resume_from=FOLDER). One "
                "saved without a TrainerLoss has no such file; begin anew with its weights"
            )
        with safe_open(path, "pt") as file:
            run = (file.metadata() or {}).get("run")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if run != _fingerprint(state):
            raise ValueError(
                f"{path} is of another run than the checkpoint that training goes on from; give "
                "the latter's folder: TrainerLoss(criterion, resume_from=FOLDER)"
            )
        self.criterion.load_state_dict(tensors)


def _check_run(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """ValueError for what would train something else, silently."""
    if state.is_hyper_param_search:
        raise ValueError("a TrainerLoss is for one training run: make one in each trial")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True begins training anew after a failure, but the criterion "
            "would go on: set it to False and give per_device_train_batch_size"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"this one process has {args.n_gpu} GPUs and splits its batches over them "
            "(nn.DataParallel), which a TrainerLoss is not scaled for: start one process a GPU, "
            f"torchrun --nproc-per-node {args.n_gpu} …, or choose one by CUDA_VISIBLE_DEVICES=0"
        )
    if _shifts_labels(model):
        raise ValueError(
            f"{type(model).__name__} predicts the next token: it shifts the labels in its own "
            "loss, but the Trainer gives a compute_loss_func unshifted ones, so the model would "
            "learn to repeat its input. Shift both in your own compute_loss of a Trainer: "
            "criterion(logits[:, :-1], labels[:, 1:]) with Reweight(…, class_dim=-1)"
        )


def _shifts_labels(model: Any) -> bool:
    """Whether it is a causal language model, be it wrapped by PEFT or a subclass."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if any(kind.__name__ in causal for kind in type(inner).__mro__):
        return True
    # Models of images and text decode too; those with an encoder shift their inputs instead.
    decodes = getattr(inner, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
    config = getattr(inner, "config", None)
    return decodes and not getattr(config, "is_encoder_decoder", False)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(state: TrainerState) -> str:
    """What tells two runs at the same step apart: the Trainer does not say where it resumed."""
    log = json.dumps([state.global_step, state.log_history], sort_keys=True)
    return hashlib.sha256(log.encode()).hexdigest()
