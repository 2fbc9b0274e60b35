"""From the losses of a batch to its weights, its loss and the next ℓ_pt, by one program.

    q     = the p-th percentile of ℓ over the batch          `percentile`
    ℓ_pt  = decay · ℓ_pt + (1 − decay) · q
    v_i   = g_m(ℓ_i, ℓ_i − ℓ_pt, y_i, epoch %)               `mentor`, over the `history`
    v_i   = burn-in or example dropout applied to v_i        `example_dropout`
    L     = Σ v_i ℓ_i / B                                    rows of v_i = 0 left out: 0 · NaN is 0

It is the end of the fused operation (`reweight`), run by whichever program finishes its rows last,
and a launch of its own where the losses of several ranks are gathered in between, or each is
compared with its class's percentile. Some 40 bytes a
sample. All sums are taken in a fixed order, so results repeat bit by bit.

Shapes: B batch of this rank, W losses of all ranks, M samples of a tile, T history steps.
"""

from dataclasses import dataclass

from mentorch.kernels.backend import float64_bits, next_power_of_2, tl, triton
from mentorch.kernels.example_dropout import (
    ExampleDropout,
    coins,
    how_many_to_keep,
    keep_exact,
)
from mentorch.kernels.history import update_history
from mentorch.kernels.mentor import (
    ClosedForm,
    Curriculum,
    closed_form,
    mentornet,
)
from mentorch.kernels.percentile import block_order_statistic, block_percentile, moving_average


@dataclass(frozen=True)
class Plan:
    """What is fixed for a run, and so compiled into the kernels. Field by field as torch's
    operators take it, so that one definition serves both."""

    kind: str  # a closed form's, or "mentornet"
    lambda1: float
    lambda2: float
    gamma: float
    on_loss: bool
    known_labels: int
    label_dim: int
    epoch_dim: int
    units: int  # H
    hidden: int  # F
    use_label: bool
    lstm_output: str
    encoder: str
    activation: str
    last_epoch_pct: int
    steps: int  # T
    dropout: str  # "none", "coins" or "exact"
    burn_in_pct: int
    burn_in_rate: float
    burn_in_rate_pct: int
    rate: float
    late_pct: int
    late_rate: float
    loss_percentile: float
    decay: float
    label_smoothing: float
    lagged: bool
    advance: bool

    @classmethod
    def of(
        cls,
        curriculum: Curriculum,
        dropout: ExampleDropout | None,
        steps: int,
        **rest: float | bool,
    ) -> "Plan":
        """The plan of a curriculum and a dropout; ``rest``: the fields from the percentile on."""
        fields: dict[str, object] = dict.fromkeys(cls.__dataclass_fields__, 0)
        fields |= {"kind": "mentornet", "lstm_output": "h", "encoder": "lstm"}
        fields |= {"activation": "tanh", "dropout": "none", "steps": steps}
        if isinstance(curriculum, ClosedForm):
            kind = curriculum.kind
            fields |= {
                "kind": "self_paced" if kind == "linear" and curriculum.lambda2 == 0 else kind,
                "lambda1": float(curriculum.lambda1),
                "lambda2": float(curriculum.lambda2),
                "gamma": float(curriculum.gamma),
                "on_loss": curriculum.on == "loss",
            }
        else:
            fields |= {
                "known_labels": curriculum.label_embedding.shape[0],
                "label_dim": curriculum.label_embedding.shape[1],
                "epoch_dim": curriculum.epoch_embedding.shape[1],
                "units": curriculum.lstm_units,
                "hidden": curriculum.fc1_weight.shape[0],
                "use_label": curriculum.use_label,
                "lstm_output": curriculum.lstm_output,
                "encoder": curriculum.encoder,
                "activation": curriculum.activation,
                "last_epoch_pct": curriculum.last_epoch_pct,
            }
        if dropout is not None:
            fields |= {
                "burn_in_pct": dropout.burn_in_pct,
                "burn_in_rate": float(dropout.burn_in_rate),
                "burn_in_rate_pct": dropout.early_pct,
                "rate": float(dropout.rate),
                "late_pct": dropout.late_pct,
                "late_rate": float(dropout.late_rate),
            }
            drops = any(rate > 0 for rate in dropout.rates)
            fields["dropout"] = ("exact" if dropout.exact else "coins") if drops else "none"
        return cls(**(fields | rest))  # type: ignore[arg-type]

    @property
    def smooths(self) -> bool:
        """Whether the targets are smoothed."""
        return self.label_smoothing > 0

    @property
    def percentile_complement(self) -> int:
        """1 − p in float64, as bits."""
        return float64_bits(1.0 - self.loss_percentile)

    @property
    def burn_in_share(self) -> int:
        """Share kept during burn-in in float64, as bits."""
        return float64_bits(1.0 - self.burn_in_rate)

    @property
    def share(self) -> int:
        """Share kept after burn-in in float64, as bits."""
        return float64_bits(1.0 - self.rate)

    @property
    def late_share(self) -> int:
        """Share kept at the end of training in float64, as bits."""
        return float64_bits(1.0 - self.late_rate)

    @property
    def padded_units(self) -> int:
        """H up to a power of two."""
        return next_power_of_2(max(self.units, 1))

    @property
    def padded_hidden(self) -> int:
        """F up to a power of two."""
        return next_power_of_2(max(self.hidden, 1))

    @property
    def decay_complement(self) -> float:
        """1 − decay."""
        return 1.0 - self.decay


_MOST_KEYS = 4096  # losses that the last program of a launch keeps in registers


def batch_tile(plan: Plan, batch: int, losses: int, warps: int) -> dict[str, int | bool]:
    """M, BLOCK and ONE_BLOCK of `weigh_batch`: as many samples a tile as the registers hold."""
    block = min(next_power_of_2(losses), _MOST_KEYS)
    widest = max(plan.padded_units, plan.padded_hidden) if plan.kind == "mentornet" else 1
    most = max(32 * warps * 16 // widest, 16)
    return {
        "M": min(next_power_of_2(batch), most, 1024),
        "BLOCK": block,
        "ONE_BLOCK": losses <= block,
    }


@triton.jit
def epoch_percent(epoch_pct_ptr, step, total_steps):
    """0..99, given or from the step."""
    if epoch_pct_ptr is not None:
        percent = tl.load(epoch_pct_ptr).to(tl.int64)
    else:
        percent = step * 100 // total_steps
    return tl.minimum(tl.maximum(percent, 0), 99)


@triton.jit
def curriculum_weight(
    loss_M, diff_M, label_M, id_M, there_M, epoch_pct, theta, history_ptr, N, PLAN: tl.constexpr
):  # fmt: skip
    """v of a tile before dropout."""
    KIND: tl.constexpr = PLAN.kind
    ON_LOSS: tl.constexpr = PLAN.on_loss
    if KIND == "mentornet":
        T: tl.constexpr = PLAN.steps
        H: tl.constexpr = PLAN.units
        UNITS: tl.constexpr = PLAN.padded_units
        F: tl.constexpr = PLAN.hidden
        HIDDEN: tl.constexpr = PLAN.padded_hidden
        LABEL_DIM: tl.constexpr = PLAN.label_dim
        EPOCH_DIM: tl.constexpr = PLAN.epoch_dim
        USE_LABEL: tl.constexpr = PLAN.use_label
        OUTPUT: tl.constexpr = PLAN.lstm_output
        ENCODER: tl.constexpr = PLAN.encoder
        ACTIVATION: tl.constexpr = PLAN.activation
        known_M = there_M & (id_M >= 0) & (id_M < N)
        past_ptr_M = history_ptr + id_M * (2 * T) if T > 1 else id_M
        label_M = tl.minimum(tl.maximum(label_M, 0), PLAN.known_labels - 1)
        told_pct = tl.minimum(epoch_pct, PLAN.last_epoch_pct)
        weight_M = mentornet(
            loss_M, diff_M, past_ptr_M, known_M, label_M, told_pct, theta, T, H, UNITS, F, HIDDEN,
            LABEL_DIM, EPOCH_DIM, USE_LABEL, OUTPUT, ENCODER, ACTIVATION,
        )  # fmt: skip
    else:
        weight_M = closed_form(
            loss_M, diff_M, epoch_pct, PLAN.lambda1, PLAN.lambda2, PLAN.gamma, KIND, ON_LOSS
        )  # fmt: skip
    if PLAN.burn_in_pct > 0:
        weight_M = tl.where(epoch_pct < PLAN.burn_in_pct, 1.0, weight_M)
    return weight_M


@triton.jit
def final_weight(weight_M, label_M, id_M, ignore_index, N, HISTORY: tl.constexpr):
    """0 in ignored rows; NaN, to be seen, for a sample that the history does not have."""
    if HISTORY:
        weight_M = tl.where(id_M >= N, float("nan"), weight_M)
    return tl.where(label_M == ignore_index, 0.0, weight_M)


@triton.jit
def kept_by_coin(coin_M, epoch_pct, PLAN: tl.constexpr):
    """Bernoulli dropout: which samples stay."""
    rate = tl.where(epoch_pct < PLAN.late_pct, PLAN.rate, PLAN.late_rate)
    rate = tl.where(epoch_pct < PLAN.burn_in_rate_pct, PLAN.burn_in_rate, rate).to(tl.float32)
    return coin_M >= rate


@triton.jit
def sample_id(ids_ptr, row_M, there_M, first_row):
    """The samples' ids; the row numbers in the global batch where none are given."""
    if ids_ptr is None:
        id_M = row_M.to(tl.int64) + first_row
    else:
        id_M = tl.load(ids_ptr + row_M, mask=there_M, other=-1).to(tl.int64)
    return id_M


@triton.jit
def _exact_threshold(
    coin_ptr, labels_ptr, ids_ptr, B, first_row, seed, step, epoch_pct, ignore_index,
    PLAN: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """(threshold, how many of the samples upon it stay) that keep an exact count of valid rows."""
    valid = 0
    for start in range(0, B, M):
        row_M = start + tl.arange(0, M)
        there_M = row_M < B
        label_M = tl.load(labels_ptr + row_M, mask=there_M, other=0).to(tl.int64)
        valid_M = there_M & (label_M != ignore_index)
        coin_M = coins(seed, step, sample_id(ids_ptr, row_M, there_M, first_row))
        tl.store(coin_ptr + row_M, tl.where(valid_M, coin_M, float("nan")), mask=there_M)
        valid += tl.sum(valid_M.to(tl.int32), axis=0)
    tl.debug_barrier()  # the coins are read back by other threads
    BURN_IN: tl.constexpr = PLAN.burn_in_share
    AFTER: tl.constexpr = PLAN.share
    LATE: tl.constexpr = PLAN.late_share
    share = tl.where(
        epoch_pct < PLAN.late_pct, tl.full([], AFTER, tl.int64), tl.full([], LATE, tl.int64)
    )
    burning = epoch_pct < PLAN.burn_in_rate_pct
    share = tl.where(burning, tl.full([], BURN_IN, tl.int64), share)
    kept = how_many_to_keep(valid, share)
    threshold = block_order_statistic(coin_ptr, B, tl.maximum(kept - 1, 0), BLOCK, ONE_BLOCK)
    below = 0
    for start in range(0, B, M):
        row_M = start + tl.arange(0, M)
        coin_M = tl.load(coin_ptr + row_M, mask=row_M < B, other=float("nan"), cache_modifier=".cg")
        below += tl.sum((coin_M < threshold).to(tl.int32), axis=0)
    return tl.where(kept > 0, threshold, -1.0), kept - below


@triton.jit
def weigh_batch(
    loss_ptr,  # [B] float32
    present_ptr,  # [W] float32: as the percentile takes them, NaN for ignored rows
    labels_ptr,  # [B]
    ids_ptr,  # [B], or None: the row numbers from first_row on
    all_ids_ptr,  # [W], whose samples the W losses are; read with a history
    base_ptr,  # [W], what the W losses are compared with; or None: all with ℓ_pt
    weight_ptr,  # [B] float32, written
    total_ptr,  # 0-d, written: L
    new_avg_ptr,  # 0-d, written
    count_ptr,  # 0-d, written: B of the equation, valid rows of all ranks / ranks
    coin_ptr,  # [B] float32, scratch of the exact dropout
    avg_ptr,  # 0-d
    step_ptr,  # 0-d int64
    epoch_pct_ptr,  # 0-d, or None: from the step
    history_ptr,  # [N + 1, T, 2], updated; or None
    theta,
    B,
    W,
    N,
    total_steps,
    first_row,
    seed,
    ignore_index,
    PLAN: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WEIGHED: tl.constexpr,  # the weights are there already: only sum them up
):
    """Everything after the losses, by one program."""
    COMPLEMENT: tl.constexpr = PLAN.percentile_complement
    complement = tl.full([], COMPLEMENT, tl.int64)
    q, present = block_percentile(present_ptr, W, complement, BLOCK, ONE_BLOCK)
    avg = tl.load(avg_ptr).to(tl.float32)
    new_avg = moving_average(avg, q, PLAN.decay, PLAN.decay_complement)
    count = tl.maximum(present, 1).to(tl.float32) / (W // B)
    base = avg if PLAN.lagged else new_avg
    step = tl.load(step_ptr).to(tl.int64)
    epoch_pct = epoch_percent(epoch_pct_ptr, step, total_steps)
    if PLAN.dropout == "exact":
        threshold, of_equals = _exact_threshold(
            coin_ptr, labels_ptr, ids_ptr, B, first_row, seed, step, epoch_pct, ignore_index,
            PLAN, M, BLOCK, ONE_BLOCK,
        )  # fmt: skip
    total = 0.0
    equals = 0
    for start in range(0, B, M):
        row_M = start + tl.arange(0, M)
        there_M = row_M < B
        loss_M = tl.load(loss_ptr + row_M, mask=there_M, other=0.0, cache_modifier=".cg")
        if WEIGHED:
            weight_M = tl.load(weight_ptr + row_M, mask=there_M, other=0.0, cache_modifier=".cg")
        else:
            label_M = tl.load(labels_ptr + row_M, mask=there_M, other=0).to(tl.int64)
            id_M = sample_id(ids_ptr, row_M, there_M, first_row)
            base_M = base
            if base_ptr is not None:
                base_M = tl.load(base_ptr + first_row + row_M, mask=there_M, other=0.0).to(
                    tl.float32
                )
            weight_M = curriculum_weight(
                loss_M, loss_M - base_M, label_M, id_M, there_M, epoch_pct, theta, history_ptr, N,
                PLAN,
            )  # fmt: skip
            if PLAN.dropout == "exact":
                coin_M = tl.load(coin_ptr + row_M, mask=there_M, other=2.0, cache_modifier=".cg")
                kept_M, equals = keep_exact(coin_M, threshold, of_equals, equals)
                weight_M = tl.where(kept_M, weight_M, 0.0)
            elif PLAN.dropout == "coins":
                kept_M = kept_by_coin(coins(seed, step, id_M), epoch_pct, PLAN)
                weight_M = tl.where(kept_M, weight_M, 0.0)
            weight_M = final_weight(
                weight_M, label_M, id_M, ignore_index, N, history_ptr is not None
            )  # fmt: skip
            tl.store(weight_ptr + row_M, weight_M, mask=there_M)
        counted_M = there_M & (weight_M != 0.0)
        total += tl.sum(tl.where(counted_M, weight_M * loss_M, 0.0), axis=0)
    tl.store(total_ptr, total / count)
    tl.store(count_ptr, count)
    tl.store(new_avg_ptr, new_avg)
    if history_ptr is not None:
        STEPS: tl.constexpr = PLAN.steps
        tl.debug_barrier()  # the history has been read by all threads
        for start in range(0, W, M):
            row_M = start + tl.arange(0, M)
            there_M = row_M < W
            loss_M = tl.load(
                present_ptr + row_M, mask=there_M, other=float("nan"), cache_modifier=".cg"
            )
            id_M = sample_id(all_ids_ptr, row_M, there_M, 0)
            base_M = base
            if base_ptr is not None:
                base_M = tl.load(base_ptr + row_M, mask=there_M, other=0.0).to(tl.float32)
            update_history(history_ptr, id_M, loss_M, loss_M - base_M, N, STEPS)
    if PLAN.advance:
        tl.debug_barrier()  # every thread has read them
        tl.store(avg_ptr, new_avg)
        tl.store(step_ptr, step + 1)


@triton.jit(do_not_specialize=["B", "W", "N", "total_steps", "first_row", "seed", "ignore_index"])
def weigh_kernel(
    loss_ptr, present_ptr, labels_ptr, ids_ptr, all_ids_ptr, base_ptr, weight_ptr, total_ptr,
    new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr, theta, B, W, N,
    total_steps, first_row, seed, ignore_index, PLAN: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """`weigh_batch` as a launch of its own."""
    weigh_batch(
        loss_ptr, present_ptr, labels_ptr, ids_ptr, all_ids_ptr, base_ptr, weight_ptr, total_ptr,
        new_avg_ptr, count_ptr, coin_ptr, avg_ptr, step_ptr, epoch_pct_ptr, history_ptr, theta, B,
        W, N, total_steps, first_row, seed, ignore_index, PLAN, M, BLOCK, ONE_BLOCK, False,
    )  # fmt: skip
