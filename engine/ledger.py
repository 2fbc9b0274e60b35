"""The ledger: what training knows about every sample (`mentorch.kernels.ledger`), over all ranks.

Each rank notes the samples that it trains on in a table of its own. `Ledger.merge` makes the tables
equal: ranks exchange the rows of the samples they have visited since the last time. In an epoch no
sample is visited by two ranks, so nobody's visit is lost if that happens at the end of every epoch;
who visits a sample may then change from epoch to epoch, and from a run to its resumption.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mentorch.engine.distributed import World
from mentorch.kernels.history import table_rows
from mentorch.kernels.ledger import ROW_BYTES, fields, new_ledger, record
from mentorch.kernels.reweight import Reweighted

Columns = dict[str, NDArray[np.generic]]
_CHUNK = 4_194_304  # rows that all ranks send at once: 128 MiB with their ids


@torch.no_grad()
def merge_rows(table: Tensor, sample_ids: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Makes the rows of samples the same in the tables of all ranks, in place.

    Args:
        table: [N + 1, 24] uint8.
        sample_ids: [B] int64, those that this rank has visited and no other has; as many on every
            rank. What is outside [0, N) is no sample.
        group: the ranks; None: all.
    """
    ranks = dist.get_world_size(group)
    for chunk in sample_ids.split(max(1, _CHUNK // ranks)):
        rows = table[table_rows(table, chunk)]
        packed = torch.cat([rows, chunk.long().contiguous().view(torch.uint8).view(-1, 8)], dim=1)
        everyones = packed.new_empty(ranks * len(chunk), packed.shape[1])
        dist.all_gather_into_tensor(everyones, packed, group=group)
        rows, of_ids = everyones.split([ROW_BYTES, 8], dim=1)
        everyones_ids = of_ids.contiguous().view(torch.int64).squeeze(1)
        table[table_rows(table, everyones_ids)] = rows


def table_columns(table: Tensor) -> Columns:
    """The columns of a table [N, 24], which `read_ledger` describes, [N] each."""
    return {name: column.contiguous().numpy() for name, column in fields(table.cpu()).items()}


class Ledger:
    """An observer of `Spade` that keeps 24 bytes a sample on the device.

    Args:
        num_samples: N, rows of the index; ids are rows.
        world: the ranks and the device. All ranks must take equally many steps between merges, and
            no two of them may visit the same sample.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, num_samples: int, world: World) -> None:
        self.world = world
        self.table = new_ledger(num_samples, world.device)
        self._visited: list[Tensor] = []  # the batches' ids since the last merge, not copied

    def __call__(self, sample_ids: Tensor, logits: Tensor, labels: Tensor, out: Reweighted) -> None:
        """Notes a step; a label of −100, which is what the engine ignores, is no visit."""
        record(self.table, logits, labels, sample_ids, out.sample_loss, out.sample_weight)
        if self.world.world_size > 1:
            self._visited.append(sample_ids)

    def merge(self) -> None:
        """Makes the tables of all ranks equal; every rank calls it, at least once an epoch."""
        if not self._visited:
            return
        ids = torch.cat(self._visited)
        self._visited.clear()
        merge_rows(self.table, ids)

    def state_dict(self) -> dict[str, Tensor]:
        """The table without its scratch row, as ``ledger.safetensors`` holds it; merge first."""
        return {"table": self.table[:-1]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts back what `state_dict` gave, on any number of ranks.

        Raises:
            ValueError: a table of another number of samples.
        """
        found, here = state["table"].shape, self.table[:-1].shape
        if found != here:
            raise ValueError(
                f"the saved ledger has {found[0]:,} samples, the training index {here[0]:,}: it is "
                "of another index"
            )
        self.table[:-1] = state["table"].to(self.table.device)

    def columns(self) -> Columns:
        """What is known about every sample, [N] each: see `read_ledger`."""
        return table_columns(self.table[:-1])

    def save(self, path: Path) -> None:
        """Writes the table (safetensors); merge first."""
        save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, path)


def read_ledger(path: Path) -> Columns:
    """What a run knew about every sample: the ``ledger.safetensors`` of one of its checkpoints.

    Args:
        path: the file.

    Returns:
        [N] each, a row a row of the training index. NaN, −1 or 0 where a sample was never visited.

        - ``loss``, ``weight``: at the last visit, float16; nats, and the weight v.
        - ``loss_mean``, ``weight_mean`` (float32), ``loss_var``, ``weight_var`` (float16): over all
          visits; nats, nats².
        - ``predicted``: class that the student preferred at the last visit, int32.
        - ``probability``: that it gave to it, float16.
        - ``visits``: uint8; 255 stands for 255 or more, and from there on the means fade.
        - ``forgetting``: how often the given label was predicted and at the next visit was not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no ledger.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no ledger at {path}: look for ledger.safetensors in a run's checkpoints; runs with "
            "--train.no-ledger have none"
        )
    try:
        table = load_file(path)["table"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no ledger: {error}") from error
    if table.dtype != torch.uint8 or table.ndim != 2 or table.shape[1] != ROW_BYTES:
        raise ValueError(
            f"{path} is no ledger: its table is {list(table.shape)} {table.dtype}, not "
            f"[N, {ROW_BYTES}] torch.uint8"
        )
    return table_columns(table)
