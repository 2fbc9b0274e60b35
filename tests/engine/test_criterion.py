"""What a criterion bears in another trainer: copies, casts, ranks named late, a ledger."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist

import mentorch
from mentorch.engine.latent_weights import LatentReweight
from mentorch.engine.ledger import table_columns
from mentorch.engine.mentor import MentorNet
from mentorch.engine.report.scores import write_scores
from mentorch.kernels.ledger import new_ledger, record
from mentorch.kernels.mentor import ClosedForm

N, B, C = 23, 8, 5  # more samples than two batches visit


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def new_criterion(**options):
    return mentorch.Reweight("pd", total_steps=10, burn_in=0, **options)


def batch(seed, samples=N):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(samples, generator=generator)[:B]
    return torch.randn(B, C, generator=generator), ids % C, ids


@pytest.mark.parametrize("group", ["world", "object"])
def test_a_copy_shares_the_ranks_and_nothing_else(one_rank, group):
    criterion = new_criterion(
        group=one_rank if group == "object" else group, num_samples=N, ledger=True
    )
    criterion(*batch(0))
    copied = deepcopy(criterion)
    assert copied.group is one_rank
    before = {name: tensor.clone() for name, tensor in copied.state_dict().items()}
    assert torch.equal(criterion(*batch(1)), copied(*batch(1)))
    criterion(*batch(2))
    assert copied.step == 2
    assert criterion.step == 3
    assert before["step"] == 1


def test_world_is_whoever_is_there_at_the_call(tmp_path):
    criterion = new_criterion(group="world")
    assert criterion.group is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert criterion.group is dist.group.WORLD
        assert pickle.loads(pickle.dumps(criterion)).group is dist.group.WORLD  # spawned ranks
    finally:
        dist.destroy_process_group()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'world', a process group or None, not 'all'"):
        new_criterion(group="all")


def test_a_cast_of_the_whole_model_costs_the_state_no_bits():
    plain, cast = new_criterion(), new_criterion()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), cast).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    logits, labels, _ = batch(0)
    for criterion in (plain, cast):
        criterion(logits, labels)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, cast.state_dict()[name]), name
    assert cast.double().loss_moving_avg.dtype == torch.float64, "more bits are no loss"
    assert cast.to("meta").half().loss_moving_avg.device.type == "meta"


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does while it makes a module
    yield
    torch.set_default_dtype(torch.float32)


BY_SAMPLE = {"num_samples": N, "total_steps": 10, "burn_in": 0}
KINDS = {
    "closed form": lambda: mentorch.Reweight("linear", ledger=True, **BY_SAMPLE),
    "history": lambda: mentorch.Reweight(MentorNet(), history_steps=3, **BY_SAMPLE),
    "by class": lambda: mentorch.Reweight(
        "linear", percentile_of="class", num_classes=C, **BY_SAMPLE
    ),
    "latent": lambda: LatentReweight(ClosedForm("linear"), weight_lr=0.5, **BY_SAMPLE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_its_state_is_float32_whatever_pytorchs_default_is(kind, half_by_default):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    expected, batches = KINDS[kind](), [batch(seed) for seed in range(3)]
    losses = [expected(*each) for each in batches]
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    criterion = KINDS[kind]()
    found = [criterion(*each) for each in batches]  # Lightning's steps have that default too
    torch.testing.assert_close(found, losses)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(criterion.state_dict()[name], tensor, equal_nan=True)


@pytest.mark.parametrize("kept", [{"ledger": True}, {"history_steps": 3}], ids=str)
def test_ranks_that_would_lose_what_the_others_note_are_refused(kept, monkeypatch):
    criterion = mentorch.Reweight("linear", burn_in=0, num_samples=N, **kept)
    criterion(*batch(0))  # alone it is right
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(ValueError, match=r'one of 2, and .* give Reweight\(…, group="world"\)'):
        criterion(*batch(1))
    assert criterion.step == 1
    new_criterion()(*batch(1))  # nothing is kept by sample


def test_no_label_that_counts_is_0_to_train_on_and_nan_to_evaluate():
    logits, labels, _ = batch(0)
    criterion = new_criterion()
    ignored = torch.full_like(labels, -100)
    assert criterion(logits, ignored) == 0
    assert criterion.eval()(logits, ignored).isnan()


def test_the_ledger_is_what_the_kernel_notes_and_evaluation_notes_nothing():
    criterion, expected = new_criterion(num_samples=N, ledger=True), new_ledger(N)
    twin = new_criterion()
    for seed in range(3):
        logits, labels, ids = batch(seed)
        out = twin.weigh(logits, labels, ids)
        record(expected, logits, labels, ids, out.sample_loss, out.sample_weight)
        assert torch.equal(criterion(logits, labels, ids), out.loss)
    criterion.eval()
    criterion(*batch(3))
    criterion(*batch(3)[:2])  # no ids are needed
    assert torch.equal(criterion.ledger[:-1], expected[:-1])
    assert torch.equal(criterion.state_dict()["ledger"], criterion.ledger)


def test_tokens_have_ids_of_their_own_and_padding_is_no_visit():
    criterion = new_criterion(num_samples=12, ledger=True, class_dim=-1)
    labels = torch.tensor([[0, 1, 2, -100], [3, 4, -100, -100]])
    criterion(torch.randn(2, 4, C), labels, torch.arange(8).view(2, 4))
    visits = table_columns(criterion.ledger[:-1])["visits"]
    assert visits.tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_scores_are_a_row_a_visited_sample_with_the_wrong_label_first(tmp_path):
    criterion = new_criterion(num_samples=N, ledger=True)
    logits, labels, ids = batch(0)
    logits = 4.0 * torch.nn.functional.one_hot(labels, C)
    given = torch.arange(N) % C
    wrong = ids[3]
    given[wrong] = (given[wrong] + 1) % C
    criterion(logits, given[ids], ids)
    names, clean = list("abcde"), torch.arange(N) % C
    scores = criterion.sample_scores(
        given, names, clean_labels=clean, paths=[f"{i}.jpg" for i in range(N)]
    )
    assert sorted(scores["sample_id"].to_pylist()) == sorted(ids.tolist())
    first = scores.to_pylist()[0]
    assert first["sample_id"] == wrong
    assert first["path"] == f"{wrong}.jpg"
    assert first["given_name"] == names[given[wrong]]
    assert first["predicted_label"] == first["clean_label"] == clean[wrong]
    assert scores["suspect"].to_pylist() == [True] + [False] * (B - 1)
    write_scores(scores, tmp_path / "scores.parquet")
    unnamed = criterion.sample_scores(given.tolist())
    assert unnamed["given_name"].to_pylist()[0] == str(int(given[wrong]))
    assert unnamed["clean_label"].null_count == B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: new_criterion(ledger=True), "needs num_samples"),
        (lambda c: c(*batch(0)[:2]), r"a ledger is kept by sample: call criterion\(logits"),
        (lambda c: c.sample_scores(torch.zeros(N)), "no visited sample"),
        (lambda c: c.sample_scores(torch.zeros(N - 1)), "22 labels for a ledger of 23 samples"),
        (lambda c: new_criterion().sample_scores([0]), "ledger=True"),
        (lambda c: (c(*batch(0)), c.sample_scores(torch.arange(N) % C, ["a"])), "1 class names"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(new_criterion(num_samples=N, ledger=True))
