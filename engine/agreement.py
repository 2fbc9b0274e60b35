"""What any rank wants and all must do at the same step: to stop, for instance."""

import torch
import torch.distributed as dist
from torch import Tensor

from mentorch.engine.distributed import World

_RANKS_A_STEP = 128


class Agreement:
    """Flags that all ranks see raised at the same step.

    The flags of a step are sent when it ends and read when the next one does: a few bytes between
    the hosts, under way while the devices compute, so that nobody waits. They go round a ring of
    the ranks, so a thousand of them send less often.

    Args:
        world: the ranks.
        names: of the flags.
    """

    def __init__(self, world: World, *names: str) -> None:
        self.world = world
        self.names = names
        self._sent: tuple[dist.Work, Tensor] | None = None
        self._calls = 0

    def exchange(self, *flags: bool) -> dict[str, bool]:
        """What was raised on any rank when last sent, a step ago or more; alone, by this very call.

        Args:
            flags: what this rank raises, by the order of the names; it goes on raising them.
        """
        if self.world.world_size == 1:
            return dict(zip(self.names, flags, strict=True))
        self._calls += 1
        if self._calls % -(-self.world.world_size // _RANKS_A_STEP):
            return dict.fromkeys(self.names, False)
        said = self.finish()
        packed = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(packed, dist.ReduceOp.MAX, group=self.world.patient, async_op=True)
        assert work is not None
        self._sent = work, packed
        return said

    def finish(self) -> dict[str, bool]:
        """What was raised by the last call; nothing is under way afterwards."""
        if self._sent is None:
            return dict.fromkeys(self.names, False)
        work, packed = self._sent
        self._sent = None
        work.wait()
        return dict(zip(self.names, map(bool, packed.tolist()), strict=True))
