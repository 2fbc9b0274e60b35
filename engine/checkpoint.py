"""Checkpoints: everything that makes the next step the same step, in files that cannot run code.

A checkpoint is a folder ``step-00001234`` with

    model.safetensors           the student
    average.safetensors         its moving average, if there is one
    ledger.safetensors          what is known about every sample, unless that was switched off
    state.safetensors + .json   optimiser, loss scale, curriculum, …: tensors and the rest
    rank-0.safetensors …        what each rank has of its own: random states, a local ℓ_pt

It is written under another name, flushed to the disk and renamed when complete, so a folder of that
name is whole. The order of samples and their crops need no state: they are functions of the seed
and the step.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mentorch.engine.distributed import World

Tensors = dict[str, Tensor]


def pack(tree: Any, tensors: Tensors, name: str = "") -> Any:
    """Moves the tensors of nested dicts and lists into ``tensors``; returns the JSON-able rest."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):  # pairs, because JSON would turn an optimiser's integer keys to text
        return {"items": [[k, pack(v, tensors, f"{name}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [pack(v, tensors, f"{name}/{i}") for i, v in enumerate(tree)]}
    return {"value": tree}


def unpack(skeleton: Any, tensors: Tensors) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    kind, content = next(iter(skeleton.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unpack(value, tensors) for key, value in content}
    if kind == "list":
        return [unpack(value, tensors) for value in content]
    return content


def _random_states(device: torch.device) -> Tensors:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def save_checkpoint(
    folder: Path,
    step: int,
    models: dict[str, Tensors],
    state: dict[str, Any],
    own: Tensors,
    world: World,
) -> Path:
    """Writes a checkpoint; every rank calls it, the main rank writes all that is not its own.

    Args:
        folder: the run's checkpoints.
        step: training steps taken.
        models: state dicts by file name, "model" and perhaps "average" and "ledger".
        state: nested dicts of tensors and JSON values.
        own: what differs between ranks, besides the random states.
        world: the ranks.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.wait()
    of_rank = _random_states(world.device) | {f"own/{k}": v.cpu() for k, v in own.items()}
    save_file(of_rank, temporary / f"rank-{world.rank}.safetensors")
    if world.is_main:
        for name, tensors in models.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(whole, temporary / f"{name}.safetensors")
        tensors = {}
        skeleton = pack(state, tensors)
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(skeleton))
    world.wait()
    if world.is_main:
        _to_disk(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _to_disk(folder)
    world.wait()
    return final


def _to_disk(folder: Path) -> None:
    """Flushes a folder and the files in it."""
    for path in [*filter(Path.is_file, folder.iterdir()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: Path, world: World) -> tuple[dict[str, Tensors], dict[str, Any], Tensors]:
    """Reads a checkpoint and restores this rank's random states.

    A rank that the saved run did not have keeps the random states it has now.

    Returns:
        The models, the state and this rank's own tensors (none for such a rank) that were saved.
    """
    models = {
        name: load_file(path / f"{name}.safetensors")
        for name in ("model", "average", "ledger")
        if (path / f"{name}.safetensors").is_file()
    }
    skeleton = json.loads((path / "state.json").read_text())
    state: dict[str, Any] = unpack(skeleton, load_file(path / "state.safetensors"))
    rank_file = path / f"rank-{world.rank}.safetensors"
    of_rank = load_file(rank_file) if rank_file.is_file() else {}
    if "cpu" in of_rank:
        torch.set_rng_state(of_rank["cpu"])
    if "cuda" in of_rank and world.device.type == "cuda":
        torch.cuda.set_rng_state(of_rank["cuda"], world.device)
    own = {k.removeprefix("own/"): v for k, v in of_rank.items() if k.startswith("own/")}
    return models, state, own


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-????????"))


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Deletes all but the latest ``keep`` checkpoints and the best one."""
    for path in checkpoints(folder)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)
