"""`TrainerLoss`: its scale, its modes, and what it refuses. In a whole Trainer: tests/recipes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import mentorch
from mentorch.engine.integrations.transformers import FILE, TrainerLoss

B, C = 6, 4


def new_loss(**options):
    return TrainerLoss(mentorch.Reweight("uniform", burn_in=0, **options))


def arguments(folder):
    return SimpleNamespace(
        output_dir=str(folder), device=torch.device("cpu"), should_save=True, n_gpu=0,
        auto_find_batch_size=False,
    )  # fmt: skip


def state(step=0, loss=1.0, search=False):
    history = [{"loss": loss, "step": step}]
    return SimpleNamespace(global_step=step, log_history=history, is_hyper_param_search=search)


def begin(loss, folder, state, training=True):
    model = torch.nn.Linear(1, 1).train(training)
    loss.on_train_begin(arguments(folder), state, None, model=model)
    return loss


def batch():
    torch.manual_seed(0)
    return {"logits": torch.randn(B, C)}, torch.arange(B) % C


@pytest.mark.parametrize("items", [B, 10, torch.tensor(10)], ids=["alone", "of 10", "tensor"])
def test_it_is_the_sum_over_the_batch_by_the_items_of_the_step(items, tmp_path):
    outputs, labels = batch()
    labels[2] = -100
    loss = begin(new_loss(), tmp_path, state())
    expected = F.cross_entropy(outputs["logits"], labels, reduction="sum") / items
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=items), expected)
    torch.testing.assert_close(loss((outputs["logits"],), labels), expected * items / (B - 1))


@pytest.mark.parametrize("begun", [False, True], ids=["never trained", "evaluating"])
def test_an_evaluation_is_cross_entropy_and_no_step(begun, tmp_path):
    outputs, labels = batch()
    loss = TrainerLoss(mentorch.Reweight("self_paced", burn_in=0, loss_percentile=0.5))
    if begun:
        begin(loss, tmp_path, state(), training=False)
    found = loss(outputs, labels, num_items_in_batch=B)
    torch.testing.assert_close(found, F.cross_entropy(outputs["logits"], labels))
    assert loss.criterion.step == 0


def test_ids_come_behind_the_labels_and_the_items_are_counted_with_them(tmp_path):
    outputs, labels = batch()
    both = torch.stack([labels, torch.arange(B) + 3], -1)
    both[1] = -100
    loss = begin(new_loss(num_samples=20, ledger=True), tmp_path, state())
    items = both.ne(-100).sum()  # as the Trainer counts
    expected = F.cross_entropy(outputs["logits"], both[:, 0])
    torch.testing.assert_close(loss(outputs, both, num_items_in_batch=items), expected)
    scores = loss.criterion.sample_scores(torch.zeros(20))
    assert sorted(scores["sample_id"].to_pylist()) == [3, 5, 6, 7, 8]


def saved(folder, step, loss=1.0):
    """A run's state after ``step`` calls, in a checkpoint's folder."""
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    run = begin(new_loss(), folder, state())
    for _ in range(step):
        run(*batch())
    run.on_save(arguments(folder), state(step, loss), None)
    return run.criterion


def test_a_checkpoint_is_found_in_the_output_folder_or_where_it_is_said_to_be(tmp_path):
    before = saved(tmp_path / "old", 2)
    here = begin(new_loss(), tmp_path / "old", state(2))
    elsewhere = TrainerLoss(
        mentorch.Reweight("uniform", burn_in=0), resume_from=tmp_path / "old" / "checkpoint-2"
    )
    begin(elsewhere, tmp_path / "new", state(2))
    for loss in (here, elsewhere):
        assert loss.criterion.step == 2
        assert torch.equal(loss.criterion.loss_moving_avg, before.loss_moving_avg)


def test_a_rank_that_does_not_save_writes_nothing(tmp_path):
    args = arguments(tmp_path)
    args.should_save = False
    new_loss().on_save(args, state(3), None)
    assert not list(tmp_path.iterdir())


def test_it_trains_once_but_may_go_on_from_a_checkpoint(tmp_path):
    saved(tmp_path, 2)
    loss = begin(new_loss(), tmp_path, state())
    loss(*batch())
    with pytest.raises(ValueError, match="has trained before"):
        begin(loss, tmp_path, state())
    begin(loss, tmp_path, state(2))
    assert loss.criterion.step == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"auto_find_batch_size": True}, "set it to False and give per_device_train_batch_size"),
        ({"n_gpu": 2}, "has 2 GPUs .* torchrun --nproc-per-node 2"),
    ],
)
def test_a_trainer_that_would_repeat_or_split_steps_is_refused(option, message, tmp_path):
    args = SimpleNamespace(**{**vars(arguments(tmp_path)), **option})
    with pytest.raises(ValueError, match=message):
        new_loss().on_train_begin(args, state(), None, model=torch.nn.Linear(1, 1))


TINY = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=4, pad_token_id=0)


class Renamed(GPT2LMHeadModel):
    """As users derive one."""


class Wrapped(torch.nn.Module):
    """As PEFT wraps one."""

    def get_base_model(self):
        return GPT2LMHeadModel(TINY)


class Describer(torch.nn.Module):
    """Images and text to text: LLaVA has no encoder, T5 has one, and is given shifted inputs."""

    loss_type = "ForConditionalGeneration"

    def __init__(self, has_encoder):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=has_encoder)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (GPT2LMHeadModel(TINY), "GPT2LMHeadModel"),
        (Renamed(TINY), "Renamed"),
        (Wrapped(), "Wrapped"),
        (Describer(has_encoder=False), "Describer"),
        (Describer(has_encoder=True), None),
        (GPT2ForSequenceClassification(TINY), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_shifts_its_labels_is_refused(model, refused, tmp_path):
    if refused is None:
        new_loss().on_train_begin(arguments(tmp_path), state(), None, model=model)
        return
    with pytest.raises(ValueError, match=f"{refused} predicts the next token.* your own compute_l"):
        new_loss().on_train_begin(arguments(tmp_path), state(), None, model=model)


def test_what_is_refused(tmp_path):
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="another run"):
        begin(new_loss(), tmp_path, state(2, loss=1.25))
    with pytest.raises(FileNotFoundError, match=f"step 4, but .*checkpoint-4/{FILE} is missing"):
        begin(new_loss(), tmp_path, state(4))
    with pytest.raises(ValueError, match="make one in each trial"):
        begin(new_loss(), tmp_path, state(search=True))
    with pytest.raises(ValueError, match="have no 'labels'"):
        new_loss()(batch()[0], None)
    with pytest.raises(ValueError, match="ignore_index=-100"):
        new_loss(ignore_index=0)
