"""`Reweight` in the loops it is dropped into."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from mentorch.engine.distributed import distributed
from mentorch.engine.mentor import MentorNet
from mentorch.engine.reweight import Reweight
from mentorch.kernels.backend import INTERPRETED
from mentorch.kernels.mentor import ClosedForm


def draw(batch=32, classes=5, step=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(batch, classes, generator=generator, dtype=dtype) * 2
    return logits, torch.randint(classes, (batch,), generator=generator)


def mentor(seed=0, **dims):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MentorNet(**dims)


def curricula():
    return ["linear", ClosedForm("focal", gamma=1.0), mentor()]


# ---------------------------------------------------------------- eval and train mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, -100, 2, -100], [-100] * 4])
def test_in_eval_mode_it_is_cross_entropy(dtype, labels):
    criterion, plain = Reweight("self_paced", total_steps=10).eval(), nn.CrossEntropyLoss()
    logits, _ = draw(4, dtype=dtype)
    logits.requires_grad_()
    labels = torch.tensor(labels)
    ours, theirs = criterion(logits, labels), plain(logits, labels)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    assert torch.equal(*gradients)
    assert criterion.step == 0
    assert criterion.loss_moving_avg == 0


def test_in_eval_mode_half_precision_is_raised_and_ignore_index_holds():
    logits, labels = draw(8)
    criterion = Reweight("linear", total_steps=10, ignore_index=3).eval()
    loss = criterion(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    expected = nn.CrossEntropyLoss(ignore_index=3)(logits.bfloat16().float(), labels)
    assert torch.equal(loss, expected)


def test_uniform_in_training_is_cross_entropy():
    logits, labels = draw()
    loss = Reweight("uniform", burn_in=0)(logits, labels)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss()(logits, labels))


def test_a_training_call_is_one_step():
    criterion = Reweight("linear", burn_in=0, loss_percentile=1.0, decay=0.5)
    average = 0.0
    for step in range(3):
        logits, labels = draw(step=step)
        out = criterion.weigh(logits, labels)
        largest = nn.functional.cross_entropy(logits, labels, reduction="none").max()
        average = average / 2 + largest / 2
        torch.testing.assert_close(criterion.loss_moving_avg, average)
        assert torch.equal(criterion.loss_moving_avg, out.loss_moving_avg)
        assert criterion.step == step + 1


def test_forward_is_the_loss_of_weigh():
    a, b = (Reweight(mentor(), total_steps=10) for _ in range(2))
    data = draw()
    assert torch.equal(a(*data), b.weigh(*data).loss)


def test_what_a_step_returns_is_not_changed_by_the_next():
    criterion = Reweight("linear", burn_in=0)
    out = criterion.weigh(*draw())
    before = out.loss_moving_avg.clone()
    criterion.weigh(*draw(step=1))
    assert torch.equal(out.loss_moving_avg, before)


# ---------------------------------------------------------------- training progress


@pytest.mark.parametrize("total_steps", [1, 7, 99, 100, 101, 250])
def test_epoch_pct_runs_from_0_to_99(total_steps):
    criterion = Reweight("linear", total_steps=total_steps)
    for step in range(total_steps + 3):  # and stays there past the end
        criterion.step.fill_(step)
        assert criterion.epoch_pct() == min(99, math.floor(100 * step / total_steps))
        assert criterion.epoch_pct().dtype == torch.int64


@pytest.mark.parametrize("burn_in", [0.2, 0.5])
def test_burn_in_boundary(burn_in):
    never = ClosedForm("self_paced", lambda1=-1e9)
    steps = 20 if INTERPRETED else 50  # one of them ends at the boundary
    criterion = Reweight(never, total_steps=steps, burn_in=burn_in, burn_in_dropout=0.0)
    weights = [criterion.weigh(*draw(4)).sample_weight.max().item() for _ in range(steps)]
    assert weights == [1.0] * round(steps * burn_in) + [0.0] * round(steps * (1 - burn_in))


def test_burn_in_drops_its_share():
    criterion = Reweight("linear", total_steps=100, burn_in_dropout=0.3, exact_dropout=True)
    assert criterion.weigh(*draw(100)).sample_weight.sum() == 70


# ---------------------------------------------------------------- dropout and sample ids


def test_a_samples_coin_follows_its_id():
    whole, parts = (Reweight("uniform", burn_in=0, example_dropout=0.5) for _ in range(2))
    logits, labels = draw(64)
    ids = torch.arange(64) + 1000
    expected = whole.weigh(logits, labels, ids).sample_weight
    order = torch.randperm(64)
    found = parts.weigh(logits[order], labels[order], ids[order]).sample_weight
    assert torch.equal(found, expected[order])
    assert 0 < expected.sum() < 64


def test_coins_depend_on_seed_and_step():
    draws = []
    for seed in (0, 1):
        criterion = Reweight("uniform", burn_in=0, example_dropout=0.5, seed=seed)
        draws += [criterion.weigh(*draw(64)).sample_weight for _ in range(2)]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert not torch.equal(first, second)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("curriculum", curricula(), ids=["linear", "focal", "mentor"])
def test_state_dict_resumes_bit_exactly_in_the_middle(tmp_path, curriculum):
    steps, cut = (10, 4) if INTERPRETED else (20, 9)

    def new(which):
        return Reweight(which, total_steps=steps, example_dropout=0.25, seed=4)

    whole, first = new(curriculum), new(curriculum)
    expected = [whole.weigh(*draw(step=step)) for step in range(steps)]
    for step in range(cut):
        first.weigh(*draw(step=step))
    save_file(first.state_dict(), tmp_path / "state.safetensors")  # tensors only: no pickle
    # The MentorNet comes from the state too, whatever the new one was built with.
    resumed = new(mentor(seed=1) if isinstance(curriculum, MentorNet) else curriculum)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(cut, steps):
        out = resumed.weigh(*draw(step=step))
        assert all(map(torch.equal, out, expected[step])), step


def test_deepcopies_go_separate_ways():
    criterion = Reweight(mentor(), total_steps=20)
    criterion(*draw())
    twin = copy.deepcopy(criterion)
    assert torch.equal(twin(*draw(step=1)), criterion(*draw(step=1)))
    twin(*draw(step=2))
    assert (criterion.step.item(), twin.step.item()) == (2, 3)


def test_it_brings_nothing_to_the_optimiser_and_leaves_the_callers_mentor_alone():
    mine = mentor()
    criterion = Reweight(mine, total_steps=10)
    assert not any(p.requires_grad for p in criterion.parameters())
    assert all(p.requires_grad for p in mine.parameters())
    logits, labels = draw()
    criterion(logits.requires_grad_(), labels).backward()
    assert all(p.grad is None for p in criterion.parameters())


# ---------------------------------------------------------------- autocast, compile


@pytest.mark.parametrize("curriculum", curricula(), ids=["linear", "focal", "mentor"])
def test_under_autocast_the_mathematics_is_float32(curriculum):
    torch.manual_seed(0)
    student, images = nn.Linear(12, 5), torch.randn(32, 12)
    _, labels = draw()
    inside, outside = (Reweight(curriculum, total_steps=10, burn_in=0) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(images)
        assert logits.dtype == torch.bfloat16
        out = inside.weigh(logits, labels)
    out.loss.backward()
    expected = outside.weigh(logits.detach(), labels)
    assert all(map(torch.equal, out, expected))
    assert student.weight.grad.isfinite().all()
    assert student.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("curriculum", ["linear", mentor()], ids=["linear", "mentor"])
def test_compiles_as_one_graph(curriculum):
    eager, compiled = (
        Reweight(curriculum, total_steps=4, burn_in=0.25, example_dropout=0.25) for _ in range(2)
    )
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(4):  # burn-in, then the curriculum
        logits, labels = draw(step=step)
        gradients = []
        for criterion in (eager, call):
            leaf = logits.clone().requires_grad_()
            criterion(leaf, labels, torch.arange(32)).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
    assert compiled.step == 4
    torch.testing.assert_close(compiled.loss_moving_avg, eager.loss_moving_avg)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curriculum": "spl"}, "'spl'"),
        ({}, "total_steps is needed"),  # burn-in counts in shares of training
        ({"curriculum": mentor(), "burn_in": 0}, "total_steps is needed"),
        ({"burn_in": 0, "late_dropout": 0.5, "late_dropout_from": 0.9}, "total_steps is needed"),
        ({"burn_in": 0, "burn_in_dropout_until": 0.3}, "total_steps is needed"),
        ({"total_steps": 0}, "total_steps.*0"),
        ({"total_steps": -5}, "-5"),
        ({"total_steps": 9, "loss_percentile": 75.0}, "loss_percentile.*75.0"),
        ({"total_steps": 9, "loss_percentile": math.nan}, "nan"),
        ({"total_steps": 9, "decay": 1.0}, "decay.*1.0"),
        ({"total_steps": 9, "decay": -0.5}, "-0.5"),
        ({"total_steps": 9, "burn_in": 20}, "burn_in.*20"),
        ({"total_steps": 9, "burn_in": -0.2}, "-0.2"),
        # By the names that were given, not those of `ExampleDropout`; 1.0: nothing would be left.
        ({"total_steps": 9, "burn_in_dropout": 1.0}, r"^burn_in_dropout .*\[0, 1\), got 1.0"),
        ({"total_steps": 9, "burn_in_dropout_until": 2}, "^burn_in_dropout_until .*got 2"),
        ({"total_steps": 9, "late_dropout_from": math.nan}, "^late_dropout_from .*got nan"),
        ({"total_steps": 9, "late_dropout": -0.1}, "^late_dropout .*got -0.1"),
        ({"total_steps": 9, "label_smoothing": 1.5}, "^label_smoothing .*got 1.5"),
        ({"total_steps": 9, "percentile_of": "class"}, "num_classes"),
        ({"total_steps": 9, "percentile_of": "classes"}, "'classes'"),
        (
            {"total_steps": 9, "percentile_of": "class", "num_classes": 3, "moving_avg": "lagged"},
            "updated",
        ),
        ({"total_steps": 9, "example_dropout": 1.0}, "^example_dropout .*1.0"),
        ({"total_steps": 9, "history_steps": 3}, "history_steps=3 needs num_samples"),
        ({"total_steps": 9, "ledger": True}, "ledger=True needs num_samples"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reweight(**{"curriculum": "linear", **arguments})


@pytest.mark.parametrize("wrong", [1.01, -0.01, math.nan, 75.0])
def test_percentiles_by_class_are_shares(wrong):
    """One out of range would read the windows out of range, a step later."""
    criterion = Reweight("linear", burn_in=0, percentile_of="class", num_classes=2)
    with pytest.raises(ValueError, match=rf"loss_percentiles are in \[0, 1\], got {wrong}"):
        criterion.set_class_percentiles(torch.tensor([0.5, wrong], dtype=torch.float64))
    criterion.set_class_percentiles(torch.tensor([0.0, 1.0]))  # the ends are
    assert criterion.class_shares.tolist() == [0.0, 1.0, 0.75]


@pytest.mark.parametrize(
    "options",
    [
        {"burn_in_dropout": 0.5},  # of a burn-in that there is not
        {"late_dropout": 0.5, "late_dropout_from": 1.0},  # never
        {"burn_in_dropout_until": 0.0},
    ],
)
def test_what_never_counts_steps_needs_no_total(options):
    assert Reweight("linear", burn_in=0, **options)(*draw()).isfinite()


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"dd\.safetensors"):
        Reweight("dd.safetensors", total_steps=9)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), r"float32 of \[4, 3\]: soft targets, as Mixup"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), r"\[4, 3\] and \[4, 3\]"),
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), r"\[3\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "empty"),
    ],
)
def test_bad_batches_are_refused(logits, labels, message):
    criterion = Reweight("linear", burn_in=0)
    with pytest.raises(ValueError, match=message):
        criterion(logits, labels)
    assert criterion.step == 0


def test_it_says_what_it_is():
    assert "linear" in repr(Reweight("linear", burn_in=0))
    assert "MentorNet" in repr(Reweight(mentor(), total_steps=3))


# ---------------------------------------------------------------- two ranks

STEPS, RANKS, ROWS = 4, 2, 24
# No kernel takes float64: the interpreter would say again what is known without it.
DTYPES = [torch.float32] if INTERPRETED else [torch.float64, torch.float32]


def global_batch(step, dtype):
    """Rank 0 has 3 ignored rows, rank 1 has 11: a mean of means would be wrong.

    The samples are dealt anew in every step, so that their history is made on both ranks.
    """
    logits, labels = draw(RANKS * ROWS, step=step, dtype=dtype)
    labels[:3] = -100
    labels[-11:] = -100
    ids = torch.randperm(RANKS * ROWS, generator=torch.Generator().manual_seed(step))
    return logits, labels, ids


def train(group, rows, dtype):
    """Gradients, weights and ℓ_pt of all steps, of the rows of one rank or of all."""
    found = {}
    for name in ("linear", "mentor", "history", "by class"):
        criterion = Reweight(
            name if name == "linear" else mentor(),
            history_steps=3 if name in ("history", "by class") else 1,
            percentile_of="class" if name == "by class" else "batch",
            num_classes=5,
            class_window=8,  # a batch has more of a class than that
            num_samples=RANKS * ROWS,
            total_steps=STEPS,
            burn_in=0.25,
            example_dropout=0.25,
            loss_percentile=0.6,
            group=group,
        )
        for step in range(STEPS):
            logits, labels, ids = global_batch(step, dtype)
            leaf = logits[rows].requires_grad_()
            index = ids[rows] if criterion.history is not None else None
            out = criterion.weigh(leaf, labels[rows], index)
            out.loss.backward()
            found[f"{name}.{step}.gradient"] = leaf.grad
            found[f"{name}.{step}.weight"] = out.sample_weight
            found[f"{name}.{step}.average"] = out.loss_moving_avg
    return found


def be_a_rank():
    with distributed("cpu") as world:
        rows = slice(world.rank * ROWS, (world.rank + 1) * ROWS)
        return [train(dist.group.WORLD, rows, dtype) for dtype in DTYPES]


def test_two_ranks_are_one_batch(ranks):
    for dtype, *found in zip(DTYPES, *ranks(be_a_rank, world_size=RANKS).results(), strict=True):
        assert_one_batch(found, dtype)


def assert_one_batch(found, dtype):
    """What the ranks found is what one process finds with all rows."""
    for key, expected in train(None, slice(None), dtype).items():
        of_ranks = [of_rank[key] for of_rank in found]
        # The history is float32 whatever the logits are.
        rtol = 1e-5 if dtype == torch.float32 or key.startswith(("history", "by class")) else 1e-13
        if key.endswith("average"):
            assert torch.equal(of_ranks[0], of_ranks[1])
            assert torch.equal(of_ranks[0], expected)
        elif key.endswith("weight"):
            torch.testing.assert_close(torch.cat(of_ranks), expected, rtol=rtol, atol=rtol / 10)
        else:  # DDP takes the mean over the ranks
            gradient = torch.cat(of_ranks) / RANKS
            torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol / 1000)
