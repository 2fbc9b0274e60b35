"""How this process was started, and what follows: which run it is of, and how it should end."""

import os
import sys
import time
from pathlib import Path

from mentorch.engine.config import RunConfig
from mentorch.engine.distributed import World
from mentorch.engine.status import read_status

STOPPED = 130
"""Exit status of a run that was asked to stop and can be resumed."""


def launch_id() -> str | None:
    """torchrun's run id (``--rdzv-id``, or its own), the same after restarts; None without one."""
    found = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if found == "none" else found


def run_folder(config: RunConfig, world: World) -> Path:
    """The run's folder, the same on every rank.

    The one that was asked for; or the one of an unfinished run of this very launch, which is how a
    restart by torchrun goes on; or a new one.
    """
    named = config.resume or config.folder
    if named:
        return named
    return Path(world.from_main(str(_of_this_launch(config) or _new(config))))


def _new(config: RunConfig) -> Path:
    return config.out / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _of_this_launch(config: RunConfig) -> Path | None:
    launch = launch_id()
    if launch is None:
        return None
    for path in sorted(config.out.glob(f"{config.name}-*/status.json"), reverse=True):
        status = read_status(path.parent)
        if status.get("launch") == launch and status.get("state") != "finished":
            return path.parent
    return None


def launcher(world: World) -> str:
    """The command that started this process, as far as it matters for starting it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {sys.argv[0]}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    hosts = world.world_size // here
    several = f"--nnodes {hosts} " if hosts > 1 else ""
    return f"torchrun {several}--nproc-per-node {here} {sys.argv[0]}"


def exit_status(finished: bool) -> int:
    """0 at the end of training. A stopped run's `STOPPED`, unless torchrun would restart it for
    that: then 0, and status.json tells."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 0 if finished or restarts else STOPPED
