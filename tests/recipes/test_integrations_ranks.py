"""The loss over two ranks of other people's trainers: what one rank with the whole batch gets.

torchrun starts this file once; in each process the trainers take their turns.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import mentorch
from mentorch.engine.integrations.timm import WeightedTask
from mentorch.engine.ledger import table_columns

N, B, C, RATE = 64, 8, 4, 0.5  # four steps of two ranks
WEIGHTED_STEPS = N // (2 * B)


class Student(nn.Module):
    """One layer, called as any trainer may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, C)

    def forward(self, images, labels=None):
        return self.layer(images)


class Model(Student):
    """As Transformers wants it."""

    def forward(self, images, labels=None):
        return {"logits": self.layer(images)}


def data():
    torch.manual_seed(1)
    return torch.randn(N, 6), torch.randint(C, (N,)), torch.arange(N)


def new_criterion():
    return mentorch.Reweight(
        "linear", burn_in=0, loss_percentile=0.5, num_samples=N, ledger=True, group="world"
    )


def batches(rank):
    """Every rank's share of a step; a rank takes B rows in a row, as Accelerate gives them out."""
    for rows in torch.arange(N).view(-1, 2, B)[:, rank]:
        yield [column[rows] for column in data()]


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def with_plain_torch(rank, folder):
    student, criterion = Student(), new_criterion()
    model = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for images, labels, ids in batches(rank):
        step(optimizer, criterion(model(images), labels, ids))
    return student, criterion


def with_timm(rank, folder):
    student, criterion = Student(), new_criterion()
    task = WeightedTask(student, criterion).prepare_distributed()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=RATE)
    for images, labels, ids in batches(rank):
        step(optimizer, task(images, labels, ids)["loss"])
    return student, criterion


def with_accelerate(rank, folder):
    from accelerate import Accelerator

    student, criterion = Student(), new_criterion()
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(criterion)
    model, optimizer, loader = accelerator.prepare(
        student, optimizer, DataLoader(TensorDataset(*data()), B)
    )
    for images, labels, ids in loader:
        loss = criterion(model(images), labels, ids)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder / "accelerate")
    accelerator.wait_for_everyone()
    again = new_criterion()
    accelerator._custom_objects[:] = [again]
    accelerator.load_state(folder / "accelerate")
    return student, again


def with_hf(rank, folder):
    from transformers import Trainer, TrainingArguments

    from mentorch.engine.integrations.transformers import TrainerLoss

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    student, criterion = Model(), new_criterion()
    loss = TrainerLoss(criterion)
    images, labels, ids = data()
    items = [
        {"images": x, "labels": y}
        for x, y in zip(images, torch.stack([labels, ids], -1), strict=True)
    ]
    args = TrainingArguments(
        str(folder / "hf"), num_train_epochs=1, per_device_train_batch_size=B, learning_rate=RATE,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
        use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    InOrder(student, args, train_dataset=items, compute_loss_func=loss, callbacks=[loss]).train()
    return student, criterion


def with_lightning(rank, folder):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.student, self.criterion = Student(), new_criterion()

        def training_step(self, batch, batch_idx):
            images, labels, ids = batch
            return self.criterion(self.student(images), labels, ids)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    dataset = TensorDataset(*data())
    in_order = DistributedSampler(dataset, shuffle=False)  # Lightning's own would shuffle
    trainer.fit(module, DataLoader(dataset, B, sampler=in_order))
    return module.student, module.criterion


HOSTS = {
    "plain_torch": with_plain_torch,
    "timm": with_timm,
    "accelerate": with_accelerate,
    "hf": with_hf,
    "lightning": with_lightning,
}


def be_a_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for host, train in HOSTS.items():
        student, criterion = train(rank, folder)
        state = {"student": student.state_dict(), "criterion": criterion.state_dict()}
        torch.save(state, folder / f"{host}-{rank}.pt")
    dist.destroy_process_group()


def alone():
    student, criterion = Student(), new_criterion()
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for images, labels, ids in zip(*(column.split(2 * B) for column in data()), strict=True):
        step(optimizer, criterion(student(images), labels, ids))
    return student, criterion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            __file__, str(folder),
        ],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_train_as_one_with_the_whole_batch(folder, host):
    first, second = (torch.load(folder / f"{host}-{rank}.pt") for rank in range(2))
    for name, tensor in first["criterion"].items():
        assert torch.equal(tensor, second["criterion"][name]), name
    student, criterion = alone()
    torch.testing.assert_close(first["student"], dict(student.state_dict()))
    assert first["criterion"]["step"] == WEIGHTED_STEPS
    torch.testing.assert_close(first["criterion"]["loss_moving_avg"], criterion.loss_moving_avg)
    found, expected = (
        table_columns(x[:-1]) for x in (first["criterion"]["ledger"], criterion.ledger)
    )
    assert (found["visits"] == 1).all()
    for name in ("loss_mean", "weight_mean"):
        torch.testing.assert_close(*map(torch.from_numpy, (found[name], expected[name])))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
