"""Checkpoints: everything that makes the next step the same step, in files that cannot run code.

A checkpoint is a folder ``step-00001234`` with

    model.safetensors           the student
    average.safetensors         its moving average, if there is one
    ledger.safetensors          what is known about every sample, unless that was switched off
    state.safetensors + .json   optimiser, loss scale, curriculum, …: tensors and the rest
    ranks.safetensors           what a rank has of its own, by "RANK/": random states, ℓ_pt
    SHA256SUMS                  hashes of all other files, as sha256sum prints and checks them

`mentorch.engine.checkpoint_writer` writes it, `checkpoint_files` verifies it, `checkpoint_choice`
finds the one to go on from. The order of samples and their crops need no state: they are functions
of the seed and the step.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from mentorch.engine.checkpoint_choice import choose_checkpoint, clean
from mentorch.engine.checkpoint_files import MODELS, DamagedCheckpoint, checkpoints, verify
from mentorch.engine.distributed import World

__all__ = [  # what is made here, and of the neighbours what a run needs
    "DamagedCheckpoint", "Loaded", "Snapshot", "Tensors", "checkpoints", "choose_checkpoint",
    "clean", "load_checkpoint", "pack", "restore_random", "take_snapshot", "unpack", "verify",
]  # fmt: skip

Tensors = dict[str, Tensor]
T = TypeVar("T")


class Snapshot(NamedTuple):
    """All that a checkpoint holds, copied to the host: training may go on while it is written.

    Attributes:
        step: training steps taken.
        models: state dicts by file name, of `MODELS`; empty on all ranks but the main one.
        state: nested dicts of tensors and JSON values; likewise.
        ranks: of every rank its random states and, under "own/", its own tensors.
    """

    step: int
    models: dict[str, Tensors]
    state: dict[str, Any]
    ranks: list[Tensors]


class Loaded(NamedTuple):
    """A checkpoint, read by a rank.

    Attributes:
        models: state dicts by file name, of `MODELS`.
        state: nested dicts of tensors and JSON values.
        own: the rank's own tensors; empty for a rank that the saved run did not have.
        random: its random states, for `restore_random`; likewise.
    """

    models: dict[str, Tensors]
    state: dict[str, Any]
    own: Tensors
    random: Tensors


# Nested state as JSON and tensors


def pack(tree: Any, tensors: Tensors, name: str = "") -> Any:
    """Moves the tensors of nested dicts and lists into ``tensors``; returns the JSON-able rest."""
    if isinstance(tree, Tensor):
        while name in tensors:  # {"a/b": …} beside {"a": {"b": …}}
            name += "'"
        tensors[name] = tree.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):  # pairs, because JSON would turn an optimiser's integer keys to text
        return {"items": [[k, pack(v, tensors, f"{name}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [pack(v, tensors, f"{name}/{i}") for i, v in enumerate(tree)]}
    return {"value": tree}


def unpack(skeleton: Any, tensors: Tensors) -> Any:
    """The inverse of `pack` (tuples come back as lists).

    Raises:
        KeyError: a tensor that is not there.
        TypeError: a key that no dict can have.
        ValueError: anything else that `pack` does not make.
    """
    if not isinstance(skeleton, dict) or len(skeleton) != 1:
        raise ValueError(f"expected one of tensor, items, list, value, got {str(skeleton)[:80]}")
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items" and isinstance(content, list):
        return {key: unpack(value, tensors) for key, value in content}
    if kind == "list" and isinstance(content, list):
        return [unpack(value, tensors) for value in content]
    if kind == "value" and not isinstance(content, (dict, list)):
        return content
    raise ValueError(f"expected one of tensor, items, list, value, got {str(skeleton)[:80]}")


# Taking and restoring


def _host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy that shares memory with nothing."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _host_copies(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return _host_copy(tree)
    if isinstance(tree, dict):
        assert all(isinstance(key, (str, int)) for key in tree), f"not for JSON: {list(tree)}"
        return {key: _host_copies(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_host_copies(value) for value in tree]
    # Here, where the one who put it in hears of it, rather than in the thread that writes.
    assert tree is None or isinstance(tree, (str, int, float)), f"not for JSON: {tree!r}"
    return tree


def take_snapshot(
    step: int, models: dict[str, Tensors], state: dict[str, Any], own: Tensors, world: World
) -> Snapshot:
    """Copies to the host what a checkpoint holds; every rank calls it.

    Args:
        step: training steps taken.
        models: state dicts by file name, of `MODELS`; used on the main rank only.
        state: nested dicts of tensors and JSON values; used on the main rank only.
        own: what differs between ranks, besides the random states of torch.
        world: the ranks.
    """
    assert models.keys() <= set(MODELS), models.keys()
    of_rank = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        of_rank["cuda"] = torch.cuda.get_rng_state(world.device)
    of_rank |= {f"own/{name}": _host_copy(tensor) for name, tensor in own.items()}
    ranks = [load(content) for content in world.gather(save(of_rank))]
    if not world.is_main:
        return Snapshot(step, {}, {}, ranks)
    return Snapshot(step, _host_copies(models), _host_copies(state), ranks)


def restore_random(random: Tensors, device: torch.device) -> None:
    """Puts back a rank's random states; one that has none saved keeps those it has.

    Raises:
        DamagedCheckpoint: what is no random state, or one of another release of torch.
    """
    try:
        if "cpu" in random:
            torch.set_rng_state(random["cpu"])
        if "cuda" in random and device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], device)
    except (RuntimeError, TypeError) as error:
        raise DamagedCheckpoint(f"ranks.safetensors: no random state: {error}") from error


# Loading


def load_checkpoint(path: Path, rank: int = 0) -> Loaded:
    """Verifies and reads a checkpoint.

    Args:
        path: its folder.
        rank: whose own tensors and random states are wanted.

    Raises:
        DamagedCheckpoint: it is not what was written, or not what this package writes.
    """
    verify(path)
    tensors = _read(path, "state.safetensors", load_file)
    state = _read(path, "state.json", lambda file: _read_state(file, tensors))
    own, random = _read(path, "ranks.safetensors", lambda file: _read_rank(file, f"{rank}/"))
    there = [name for name in MODELS if (path / f"{name}.safetensors").is_file()]
    models = {name: _read(path, f"{name}.safetensors", load_file) for name in there}
    return Loaded(models, state, own, random)


def _read(path: Path, name: str, read: Callable[[Path], T]) -> T:
    try:
        return read(path / name)
    # The hashes are right, so somebody made the file so; its parser may raise anything.
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise DamagedCheckpoint(f"{path}: {name}: is not of a checkpoint: {problem}") from error


def _read_state(path: Path, tensors: Tensors) -> dict[str, Any]:
    state = unpack(json.loads(path.read_text(encoding="utf-8")), tensors)
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}, not a dict")
    return state


def _read_rank(path: Path, prefix: str) -> tuple[Tensors, Tensors]:
    """A rank's own tensors and its random states."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    random = {name: tensors.pop(name) for name in ("cpu", "cuda") if name in tensors}
    for name, state in random.items():
        if state.dtype != torch.uint8 or state.ndim != 1:
            raise ValueError(f"{prefix}{name} is {list(state.shape)} {state.dtype}, not [N] uint8")
    if "cpu" in random:
        torch.Generator().set_state(random["cpu"])  # raises for what is none
    strange = [name for name in tensors if not name.startswith("own/")]
    if strange:
        raise ValueError(f"has {prefix}{strange[0]}")
    return {name.removeprefix("own/"): tensor for name, tensor in tensors.items()}, random
