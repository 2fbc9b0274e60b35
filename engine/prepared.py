"""A run put together on one rank but not begun: what a dry run looks at."""

from dataclasses import dataclass, replace
from functools import cached_property

from mentorch.engine.assembly import assemble
from mentorch.engine.checkpoint import load_checkpoint
from mentorch.engine.checkpoint_choice import choose_checkpoint
from mentorch.engine.config import RunConfig
from mentorch.engine.data.datasets import Datasets, open_datasets
from mentorch.engine.data.pipelines import Loader, Normalise
from mentorch.engine.distributed import World
from mentorch.engine.fingerprint import check_fingerprint, fingerprint
from mentorch.engine.footprint import Trace, optimizer_bytes, size_of, trace
from mentorch.engine.ledger import Ledger
from mentorch.engine.spade import Spade
from mentorch.engine.watchdog import Progress


@dataclass(frozen=True)
class Prepared:
    """A run on one rank, ready to train, and how many ranks it is meant for."""

    config: RunConfig
    world: World
    ranks: int
    share: int
    """Images of a rank's part of the batch."""

    @cached_property
    def data(self) -> Datasets:
        """Its data sets."""
        return open_datasets(self.config.data, self.world)

    @cached_property
    def loader(self) -> Loader:
        """Of the training images, with the steps that the run would have."""
        config, train = self.config, self.data.train
        return Loader(
            train.index, train.sample_ids, batch_size=config.train.batch_size, config=config.data,
            train=True, seed=config.seed, world=self.world,
        )  # fmt: skip

    @cached_property
    def ledger(self) -> Ledger | None:
        """What is noted of every sample."""
        wanted = self.config.train.ledger
        return Ledger(len(self.data.train.labels_N), self.world) if wanted else None

    @cached_property
    def spade(self) -> Spade:
        """What trains, in the way that steps of so many ranks are run."""
        observers = [self.ledger] if self.ledger else []
        steps, train, news = self.loader.steps_per_epoch, self.config.train, []
        if self.ranks > 1 and train.engine.endswith("graph"):  # as `why_not_captured` says
            news.append(f"the step is not captured in a CUDA graph: of {self.ranks} ranks")
            train = replace(train, engine="compile" if "compile" in train.engine else "eager")
        config = replace(self.config, train=train)
        spade = assemble(config, self.data, steps, self.world, observers, Progress())
        spade.news += news
        return spade

    @cached_property
    def done(self) -> int:
        """Steps that the run has taken already, if it is one that goes on."""
        folder = self.config.resume or self.config.folder
        if folder is None:
            return 0
        checkpoint, _ = choose_checkpoint(folder / "checkpoints", self.world)
        if checkpoint is None:
            if self.config.resume:
                raise FileNotFoundError(f"{folder} has no complete checkpoint to go on from")
            return 0
        _, state, *_ = load_checkpoint(checkpoint)
        here = fingerprint(self.config, self.data, self.spade, self.loader)
        check_fingerprint(checkpoint, state["fingerprint"], here)
        return int(state["spade"]["step"])

    @cached_property
    def trace(self) -> Trace:
        """The passes over one part of a rank's share."""
        config, spade = self.config, self.spade
        normalise = Normalise(config.data.mean, config.data.std).to(self.world.device)
        images = self.share // config.train.accumulate
        student = spade.student.train()
        return trace(student, normalise, spade.dtype, images, config.data.image_size)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes that stay on the device throughout, by what they are."""
        student, data = self.spade.student, self.data.train
        average, criterion = self.spade.average, self.spade.criterion
        kept = [*criterion.parameters(), *criterion.buffers()]
        return {
            "weights": size_of([*student.parameters(), *student.buffers()]),
            "gradients": size_of(student.parameters()),
            "optimiser": optimizer_bytes(self.config.optim, student),
            "averaged weights": size_of(average.module.state_dict().values()) if average else 0,
            "samples": 16 * len(data.labels_N) + size_of(kept) + self.ledger_bytes,
        }

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint's tensors, the curriculum's own tables among them."""
        kept = ("weights", "optimiser", "averaged weights")
        of_curriculum = size_of(self.spade.criterion.state_dict().values())
        return sum(self.weights[name] for name in kept) + of_curriculum + self.ledger_bytes

    @cached_property
    def ledger_bytes(self) -> int:
        """Of the ledger."""
        return size_of([self.ledger.table]) if self.ledger else 0
