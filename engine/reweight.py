"""`Reweight`: the loss to drop into any loop in place of `nn.CrossEntropyLoss`."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

from mentorch.engine.criterion import Criterion, Ranks
from mentorch.engine.curricula import resolve_curriculum
from mentorch.engine.ledger import merge_rows, table_columns
from mentorch.engine.mentor import MentorNet
from mentorch.kernels.class_percentile import ClassLosses, new_class_losses
from mentorch.kernels.example_dropout import ExampleDropout
from mentorch.kernels.history import new_history
from mentorch.kernels.ledger import new_ledger, record
from mentorch.kernels.mentor import EPOCHS, ClosedForm, Curriculum
from mentorch.kernels.percentile import check_moving_average
from mentorch.kernels.reweight import MovingAverage, Reweighted, progress_pct, reweight

if TYPE_CHECKING:
    import pyarrow as pa

PercentileOf = Literal["batch", "class"]

_NEEDS_STEPS = (
    "total_steps is needed: the burn-in, burn_in_dropout_until, late_dropout_from, a MentorNet's "
    "epoch input and pd_mixture count in shares of training. Give the number of training steps, or "
    "use another closed form with burn_in=0 and without those two"
)


def _are_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reads_progress(curriculum: ClosedForm | MentorNet) -> bool:
    return isinstance(curriculum, MentorNet) or curriculum.kind == "pd_mixture"


def _check_shares(below_1: bool = False, **shares: float | None) -> None:
    """Raises ValueError unless every share that is given is in [0, 1], or in [0, 1)."""
    for name, share in shares.items():
        if share is not None and (not 0.0 <= share <= 1.0 or (below_1 and share == 1.0)):
            raise ValueError(f"{name} is a share in [0, 1{')' if below_1 else ']'}, got {share}")


def _check_needs(
    total_steps: int | None,
    counts_steps: bool,
    moving_avg: str,
    percentile_of: str,
    num_classes: int | None,
    num_samples: int | None,
    kept_by_sample: dict[str, bool],
) -> None:
    """Raises ValueError for an option of an unknown name, or that lacks what it needs."""
    if total_steps is None and counts_steps:
        raise ValueError(_NEEDS_STEPS)
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if moving_avg not in get_args(MovingAverage):
        raise ValueError(f"moving_avg is 'updated' or 'lagged', not {moving_avg!r}")
    if percentile_of not in get_args(PercentileOf):
        raise ValueError(f"percentile_of is 'batch' or 'class', not {percentile_of!r}")
    if percentile_of == "class" and (num_classes is None or moving_avg == "lagged"):
        raise ValueError(
            "percentile_of='class' needs num_classes, and moving_avg='updated': a class's "
            "percentile is of its last losses"
        )
    for name, kept in kept_by_sample.items():
        if kept and num_samples is None:
            raise ValueError(f"{name} needs num_samples, the data set's size")


class Reweight(Criterion):
    """Cross-entropy weighted sample by sample by a curriculum (MentorNet, ICML 2018).

    In training mode every call is one step: it updates ℓ_pt, counts the step and returns Σ v ℓ / B.
    In eval mode it is plain mean cross-entropy. All state is in device buffers, nothing syncs with
    the host, and ``state_dict`` resumes exactly. On one GPU a step is two launches, gradient
    included (`mentorch.kernels.reweight`).

    Args:
        curriculum: a closed form's name (``"linear"``), a shipped MentorNet's name, a
            ``.safetensors`` file, or a `ClosedForm` / `MentorNet` (copied).
        total_steps: training steps in all, from which the epoch percentage 0..99 is computed.
        loss_percentile: p of ℓ_pt, in [0, 1]: roughly the share of labels that is right.
        decay: of ℓ_pt's moving average, in [0, 1).
        moving_avg: "updated": losses are compared with ℓ_pt after their batch, as in the paper;
            "lagged": with ℓ_pt before it, which saves a GPU one pass over the logits where the loss
            goes into ``backward`` as it is, neither scaled nor divided.
        percentile_of: "batch": the percentile is over the batch, as in the paper; "class": over
            the last ``class_window`` losses of the sample's class, for data whose classes differ
            much in size: what is rare is learnt late, and would be dropped. Needs ``num_classes``;
            on a GPU some twenty launches more.
        num_classes: C, for that.
        class_window: losses kept of every class, for that.
        history_steps: T, how many visits of a sample a MentorNet's bi-LSTM looks at. Above 1,
            ``num_samples`` is needed and every call takes ``index``.
        num_samples: N of the data set, for the history (8 T bytes a sample) and the ledger.
        ledger: keep what `sample_scores` tells about every sample, 24 bytes each, in the state;
            ``num_samples`` is needed and every call takes ``index``. Ranks of a ``group`` send each
            other what they note, 32 bytes a row.
        label_smoothing: ε of the targets, in [0, 1].
        burn_in: share of training before the curriculum sets in (the paper's first 20%), rounded to
            whole percents.
        burn_in_dropout: share of samples dropped at random during burn-in (1 − the paper's p).
        burn_in_dropout_until: share of training at which ``burn_in_dropout`` gives way to
            ``example_dropout``, in whole percents; by default with the end of the burn-in.
        example_dropout: share dropped afterwards.
        late_dropout: share dropped from ``late_dropout_from`` of training on.
        late_dropout_from: share of training, in whole percents; 1: never.
        freeze_epoch: after burn-in a MentorNet goes on reading the epoch percentage at which that
            ended, as released for DD: late in the run it was learned from, losses were memorised.
        exact_dropout: drop an exact count, as the released code does, instead of tossing coins.
        seed: of the dropout's random numbers.
        ignore_index: label of rows that do not count.
        group: process group whose ranks' batches form one: percentile and mean are then over the
            global batch. "world": all ranks, if there are several when a step is taken, so it may
            be said before the host has set them up. None (which ``dist.group.WORLD`` is before
            that): each rank for itself. Every rank brings the same number of labels, so pad what
            differs in length.
        class_dim: which dimension of the logits the classes are in: 1 as for `nn.CrossEntropyLoss`
            ([B, C], [B, C, H, W]), −1 where they come last ([B, length, C]). A label is a sample.
        one_launch: see `mentorch.kernels.reweight.reweight`.

    Raises:
        ValueError: an unknown curriculum or a parameter out of range.

    Example:
        >>> criterion = Reweight("linear", total_steps=39_000)
        >>> loss = criterion(logits, labels)          # like nn.CrossEntropyLoss()
    """

    step: Tensor
    history: Tensor | None
    ledger: Tensor | None
    class_losses: Tensor | None
    class_seen: Tensor | None
    class_shares: Tensor | None

    def __init__(
        self,
        curriculum: str | Path | ClosedForm | MentorNet,
        *,
        total_steps: int | None = None,
        loss_percentile: float = 0.75,
        decay: float = 0.95,
        moving_avg: MovingAverage = "updated",
        percentile_of: PercentileOf = "batch",
        num_classes: int | None = None,
        class_window: int = 128,
        history_steps: int = 1,
        num_samples: int | None = None,
        ledger: bool = False,
        label_smoothing: float = 0.0,
        burn_in: float = 0.2,
        burn_in_dropout: float = 0.5,
        burn_in_dropout_until: float | None = None,
        example_dropout: float = 0.0,
        late_dropout: float = 0.0,
        late_dropout_from: float = 1.0,
        exact_dropout: bool = False,
        freeze_epoch: bool = False,
        seed: int = 0,
        ignore_index: int = -100,
        group: Ranks = None,
        class_dim: int = 1,
        one_launch: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, group=group, class_dim=class_dim)
        resolved = resolve_curriculum(curriculum)
        check_moving_average(loss_percentile, decay)
        _check_shares(
            burn_in=burn_in, burn_in_dropout_until=burn_in_dropout_until,
            late_dropout_from=late_dropout_from, label_smoothing=label_smoothing,
        )  # fmt: skip
        _check_shares(
            below_1=True, burn_in_dropout=burn_in_dropout, example_dropout=example_dropout,
            late_dropout=late_dropout,
        )  # fmt: skip
        changes = burn_in > 0 or (burn_in_dropout_until or 0) > 0 or late_dropout_from < 1
        _check_needs(
            total_steps, changes or _reads_progress(resolved), moving_avg, percentile_of,
            num_classes, num_samples,
            {f"history_steps={history_steps}": history_steps > 1, "ledger=True": ledger},
        )  # fmt: skip
        # A copy: the caller may go on training theirs.
        self.mentor = (
            deepcopy(resolved).requires_grad_(False) if isinstance(resolved, MentorNet) else None
        )
        self.closed_form = resolved if isinstance(resolved, ClosedForm) else None
        self.total_steps = total_steps or EPOCHS
        self.loss_percentile = loss_percentile
        self.decay = decay
        self.moving_avg = moving_avg
        self.label_smoothing = label_smoothing
        self.dropout = ExampleDropout(
            round(burn_in * EPOCHS),
            burn_in_dropout,
            example_dropout,
            exact_dropout,
            None if burn_in_dropout_until is None else round(burn_in_dropout_until * EPOCHS),
            round(late_dropout_from * EPOCHS),
            late_dropout,
        )
        self.freeze_epoch = freeze_epoch
        self.seed = seed
        self.one_launch = one_launch
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        of_classes = num_classes if percentile_of == "class" else None
        window, seen, share = (
            (None, None, None)
            if of_classes is None
            else new_class_losses(of_classes, class_window, loss_percentile)
        )
        of_samples = num_samples if history_steps > 1 else None
        history = None if of_samples is None else new_history(of_samples, history_steps)
        noted = num_samples if ledger else None
        self.register_buffer("class_losses", window)
        self.register_buffer("class_seen", seen)
        self.register_buffer("class_shares", share)
        self.register_buffer("history", history)
        self.register_buffer("ledger", None if noted is None else new_ledger(noted))

    def curriculum(self) -> Curriculum:
        """The curriculum in force, as the kernels take it."""
        if self.closed_form is not None:
            return self.closed_form
        assert self.mentor is not None
        weights = self.mentor.weights()
        if self.freeze_epoch:
            last = min(self.dropout.burn_in_pct, EPOCHS - 1)
            weights = weights._replace(last_epoch_pct=last)
        return weights

    def epoch_pct(self) -> Tensor:
        """Training progress, an integer 0..99 (0-d tensor on the device)."""
        return progress_pct(self.step, self.total_steps)

    def weigh_rows(self, logits: Tensor, labels: Tensor, index: Tensor | None = None) -> Reweighted:
        """The fused step; arguments as `Criterion.weigh_rows`.

        ``index`` makes example dropout a property of the sample. With a history or a ledger no
        sample may come twice in a batch, over all ranks.

        Raises:
            ValueError: a history or a ledger, but no ``index``, or several ranks and no group.
        """
        self._check_kept_by_sample(index)
        out = reweight(
            logits,
            labels,
            self.curriculum(),
            self.loss_moving_avg,
            step=self.step,
            total_steps=self.total_steps,
            loss_percentile=self.loss_percentile,
            decay=self.decay,
            moving_avg=self.moving_avg,
            dropout=self.dropout,
            seed=self.seed,
            sample_ids=index,
            history=self.history,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            group=self.group,
            advance=True,
            one_launch=self.one_launch,
            class_losses=self._kept_by_class(),
        )
        if index is not None:
            self._note(logits, labels, index, out)
        return out

    def _check_kept_by_sample(self, index: Tensor | None) -> None:
        for kept, name in ((self.history, "history"), (self.ledger, "ledger")):
            if kept is not None and index is None:
                raise ValueError(
                    f"a {name} is kept by sample: call criterion(logits, labels, index)"
                )
            if kept is not None and self._ranks is None and _are_several_ranks():
                raise ValueError(
                    f"with group=None the {name} would be of this rank alone, one of "
                    f"{dist.get_world_size()}, and a host that copies or saves one rank's state "
                    'loses what the others noted: give Reweight(…, group="world")'
                )

    def _note(self, logits: Tensor, labels: Tensor, index: Tensor, out: Reweighted) -> None:
        """Adds a step to the ledger, if there is one; afterwards that of all ranks is the same."""
        if self.ledger is None:
            return
        loss, weight = out.sample_loss, out.sample_weight
        record(self.ledger, logits, labels, index, loss, weight, self.ignore_index)
        group = self.group
        if group is not None and dist.get_world_size(group) > 1:
            # At once: a host may save one rank's state at any moment, as if it were everyone's.
            merge_rows(self.ledger, index, group)

    def sample_scores(
        self,
        labels: ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        clean_labels: ArrayLike | None = None,
        paths: Sequence[str] | None = None,
    ) -> "pa.Table":
        """What training knows about every sample, the most suspicious label first.

        Args:
            labels: [N] integers, the given labels by sample id; of tokens or pixels flat.
            class_names: [C], by label; by default the labels' numbers.
            clean_labels: [N], those known to be right; below 0 where unknown.
            paths: [N], what to call the samples.

        Returns:
            A row a visited sample, with the columns of docs/report.md;
            `mentorch.engine.report.scores.write_scores` writes it as Parquet.

        Raises:
            ValueError: no ledger, no sample visited yet, or labels that do not fit.
            ImportError: pyarrow is missing.
        """
        if self.ledger is None:
            raise ValueError("nothing is kept by sample: make it with Reweight(…, ledger=True)")
        try:
            from mentorch.engine.report.arrays import score_arrays
        except ImportError as error:
            raise ImportError(
                "the table needs pyarrow: pip install '.[train]' in a clone of the repository"
            ) from error
        columns = table_columns(self.ledger[:-1])
        return score_arrays(columns, labels, class_names, clean_labels, paths)

    def set_class_percentiles(self, loss_percentiles: Tensor) -> None:
        """Gives every class a p of its own, from the next step on. Waits for the device.

        Args:
            loss_percentiles: [C] in [0, 1]: of the samples labelled c, the share that is right.

        Raises:
            ValueError: ``percentile_of`` is not "class", another number of them, or one that is
                not in [0, 1].
        """
        if self.class_shares is None:
            raise ValueError('percentiles by class need percentile_of="class"')
        classes = len(self.class_shares) - 1
        if loss_percentiles.shape != (classes,):
            raise ValueError(
                f"give one percentile a class, [{classes}], not {list(loss_percentiles.shape)}"
            )
        if bad := [p for p in loss_percentiles.tolist() if not 0.0 <= p <= 1.0]:
            raise ValueError(f"loss_percentiles are in [0, 1], got {bad[0]}")
        self.class_shares[:-1] = loss_percentiles

    def _kept_by_class(self) -> ClassLosses | None:
        if self.class_losses is None or self.class_seen is None or self.class_shares is None:
            return None
        return ClassLosses(self.class_losses, self.class_seen, self.class_shares)

    def extra_repr(self) -> str:
        """What `print(criterion)` shows."""
        what = self.closed_form or "MentorNet"
        return f"{what}, loss_percentile={self.loss_percentile}, decay={self.decay}, {self.dropout}"
