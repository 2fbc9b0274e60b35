"""Which checkpoint a run goes on from, and what becomes of the others."""

import os
import re
import socket
from itertools import count
from pathlib import Path

from mentorch.engine.checkpoint_files import (
    BEST,
    LATEST,
    DamagedCheckpoint,
    checkpoints,
    is_checkpoint_name,
    point,
    pointed,
    remove,
    step_of,
    to_disk,
    verify,
)
from mentorch.engine.distributed import World

_LEFTOVER = re.compile(r"\.(step-[0-9]{8,}\.(tmp|old)|latest\.tmp|best\.tmp)")
_SHARE = "the run folder must be on storage that all hosts share"


def choose_checkpoint(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint that all ranks go on from; every rank calls it and gets the same answer.

    It is the first that every rank can verify: the one that ``latest`` names, then the others from
    the newest to the oldest. Each rank reads all of it.

    Args:
        folder: the run's checkpoints.
        world: the ranks.

    Returns:
        The checkpoint, None if there is none at all; and notes for the user on what was rejected.

    Raises:
        DamagedCheckpoint: there are checkpoints, but none is good; the message names them all.
    """
    names, notes, problem = world.from_main(_candidates(folder) if world.is_main else ([], [], ""))
    problem = problem or _missing_on_main(folder, names, world)
    if problem:
        raise DamagedCheckpoint(problem)
    rejected: list[str] = []
    for name in names:
        reason = _rejection(folder / name, world)
        if not reason:
            return folder / name, [*notes, *rejected]
        rejected.append(reason)
    if rejected:
        lines = "\n    ".join(rejected)
        raise DamagedCheckpoint(f"{folder} has no checkpoint to go on from:\n    {lines}")
    return None, notes


def _candidates(folder: Path) -> tuple[list[str], list[str], str]:
    """Names by the order in which they are tried, notes, and what makes them useless."""
    try:
        names = [path.name for path in reversed(checkpoints(folder))]
        first, wrong = pointed(folder, LATEST)
        if not first and not names and not (folder / LATEST).is_file():
            return [], [], ""  # a new run
    except OSError as error:
        return [], [], f"{folder} cannot be read: {error}"
    if first:
        return [first, *(name for name in names if name != first)], [], ""
    return names, [f"{wrong}; the newest good checkpoint is taken instead"], ""


def _missing_on_main(folder: Path, names: list[str], world: World) -> str:
    """Starting anew because just the main rank sees no checkpoints would throw a run away."""
    try:
        mine = bool(checkpoints(folder))
    except OSError:
        mine = False  # `_rejection` will say it, if there is anything to go on from
    seen = world.gather((socket.gethostname(), mine))
    for rank, (host, some) in enumerate(seen):
        if some and not names:
            return (
                f"rank {rank} on {host} sees checkpoints in {folder}, the main rank on "
                f"{seen[0][0]} sees none: {_SHARE}"
            )
    return ""


def _rejection(path: Path, world: World) -> str:
    """Why a checkpoint cannot be gone on from; empty if it can."""
    there = os.path.isdir(path)  # noqa: PTH112 – it never raises: all ranks must get to the gather
    answers = world.gather((socket.gethostname(), there, _damage(path) if there else ""))
    for rank, (host, has_it, damage) in enumerate(answers):
        who = f"rank {rank} on {host}"
        if not has_it and answers[0][1]:
            return f"{path}: {who} has no such folder, the main rank has: {_SHARE}"
        if damage or not has_it:
            return (damage or f"{path}: is gone") + (f" (says {who})" if rank else "")
    return ""


def _damage(path: Path) -> str:
    try:
        verify(path)
    except DamagedCheckpoint as error:
        return str(error)
    return ""


def clean(folder: Path, keep: Path | None) -> None:
    """Leaves in a folder what a run that goes on can be mixed up with least; main rank only.

    Deletes what a write that was broken off left behind. Damaged checkpoints, and those newer than
    the chosen one, are kept under another name, ``step-….set-aside``. ``latest`` names the chosen
    one.

    Args:
        folder: the run's checkpoints.
        keep: the one that the run goes on from; None sets all aside.

    Raises:
        OSError: the folder cannot be changed.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)
    for path in checkpoints(folder):
        if keep and path.name == keep.name:
            continue
        if not keep or step_of(path.name) > step_of(keep.name) or _damage(path):
            path.rename(_free_name(path))
    to_disk(folder)
    _clean_pointers(folder, keep)


def _free_name(path: Path) -> Path:
    for number in count():
        name = path.with_name(f"{path.name}.set-aside" + (f".{number}" if number else ""))
        if not os.path.lexists(name):
            return name
    raise AssertionError("count has no end")


def _clean_pointers(folder: Path, keep: Path | None) -> None:
    if keep:
        assert is_checkpoint_name(keep.name), keep
        point(folder, LATEST, keep.name)
    for pointer in (LATEST, BEST):
        if not pointed(folder, pointer)[0]:
            remove(folder / pointer)
