"""`--dry-run` of a recipe: what the run would be, and what is wrong with it, before it is begun.

Options are checked as a real start checks them, by the same functions. Nothing is trained that is
kept, and nothing is written.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mentorch.engine.assembly import per_rank
from mentorch.engine.config import RunConfig
from mentorch.engine.data.datasets import index_of_folder, needs_indexing
from mentorch.engine.distributed import World, distributed
from mentorch.engine.doctor_checks import available_memory
from mentorch.engine.messages import label_notes
from mentorch.engine.pace import Pace, measure_pace
from mentorch.engine.prepared import Prepared

Lines = Iterator[tuple[str, str]]
_ROOM = 0.6  # share of the memory that is there which the timed steps may take


def dry_run(config: RunConfig) -> int:
    """Prints the plan of a run.

    Under torchrun the first rank speaks for all, and plans for as many as there are.

    Returns:
        The process's exit status.

    Raises:
        ValueError, FileNotFoundError: what a real start would raise, too.
    """
    rank = int(os.environ.pop("RANK", "0"))  # without it, this process is a world of its own
    if rank:
        return 0
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    print("Dry run: nothing is trained, nothing is written.\n")
    with distributed(config.device) as world:
        for title, text in plan(config, world, ranks):
            print(f"{title:<12}{text}", flush=True)
    return 0


def plan(config: RunConfig, world: World, ranks: int) -> Lines:
    """The plan as titles and lines.

    Args:
        config: the run.
        world: of one rank.
        ranks: that the run would have.
    """
    of_all = replace(world, world_size=ranks)
    train = config.train
    share = per_rank(train.batch_size, of_all, "train.batch_size", train.accumulate)
    per_rank(train.eval_batch_size or train.batch_size, of_all, "train.eval_batch_size")
    disk = _free_disk(config)
    unseen = [path for path in _paths(config) if needs_indexing(path)]
    if unseen:
        yield from _indexing(unseen)
        yield from _method(config, None)
        yield "", "What depends on the images is known after that: give the same command again."
        return
    found = Prepared(config, world, ranks, share)
    yield from _data(found)
    yield from _method(config, found)
    yield from _memory(found)
    yield from _disk(found, disk)
    yield from _time(found)


def _paths(config: RunConfig) -> list[Path]:
    paths = [config.data.train] if config.data.train else []
    return list(dict.fromkeys([*paths, *config.data.evaluate.values()]))


def _indexing(paths: list[Path]) -> Lines:
    for path in paths:
        kind, file = index_of_folder(path)
        yield "index", f"{path} is indexed first: every image is decoded once, {file} written"
        yield "", f"(mentorch index {kind} {path} does that beforehand)"


def _data(found: Prepared) -> Lines:
    data, config = found.data, found.config
    index = data.train.index
    yield (
        "training",
        f"{len(data.train.sample_ids):,} images of {len(data.classes)} classes, {index.root} "
        f"({index.dataset}{f', {len(index.shards):,} shards' if index.shards else ''})",
    )
    if config.data.noise:
        yield "", f"with label noise {config.data.noise}, seed {config.data.noise_seed}"
    yield from (("", note) for note in label_notes(data))
    times = sum(map(config.train.is_evaluated, range(1, config.train.epochs + 1)))
    for name, samples in data.evaluate.items():
        images = len(samples.sample_ids)
        yield "evaluation", f"{name}: {images:,} images, {times:,} times, {samples.index.root}"


def _method(config: RunConfig, found: Prepared | None) -> Lines:
    train, rule = config.train, config.curriculum
    if found is not None:
        student = found.spade.student
        count = sum(parameter.numel() for parameter in student.parameters())
        yield (
            "student",
            f"{config.student.name}, {count / 1e6:.2f} M parameters, {found.spade.dtype}, on "
            f"{found.ranks} × {found.world.device.type}",
        )
        each, total = found.spade.steps_per_epoch, found.spade.total_steps
        begun = f"; {found.done:,} are taken" if found.done else ""
        yield (
            "steps",
            f"{total:,}: {train.epochs} epochs of {each:,}, {total * train.batch_size:,} images "
            f"seen{begun}",
        )
        burn_in = f"{round(rule.burn_in * total):,} steps"
    else:
        burn_in = f"{rule.burn_in:.0%} of training"
    share = train.batch_size if found is None else found.share
    ranks = 1 if found is None else found.ranks
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    shares = f" = {ranks} × {share}{parts}" if found else ""
    yield "batch", f"{train.batch_size} images{shares}, {config.optim.name}, lr {config.optim.lr:g}"
    yield (
        "curriculum",
        f"{rule.name}, ℓ_pt the {rule.loss_percentile:.0%} percentile; burn-in {burn_in} with "
        f"{rule.burn_in_dropout:.0%} of the samples dropped",
    )


def _memory(found: Prepared) -> Lines:
    weights, traced = found.weights, found.trace
    kept = sum(weights.values()) - weights["gradients"]
    shown = {**weights, "activations": traced.activations}
    yield "memory", ", ".join(f"{name} {in_words(size)}" for name, size in shown.items() if size)
    images = found.share // found.config.train.accumulate
    norms = " with PyTorch's norms for the fused ones" if found.config.student.fused_norms else ""
    yield (
        "",
        f"{in_words(kept + traced.peak)} a rank at the peak, by a trace of the passes over "
        f"{images} images{norms}; libraries' workspaces and the loader's buffers come on top",
    )
    if found.world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(found.world.device)
        yield "", f"the GPU has {in_words(free)} free of {in_words(total)}"
    available, total = available_memory()
    table = found.data.train.index.table.nbytes
    yield (
        "host memory",
        f"the index {in_words(table)}; this host has {in_words(available)} available of "
        f"{in_words(total)}",
    )


def _free_disk(config: RunConfig) -> tuple[Path, int]:
    """The folder that exists where the run folder would be, and bytes free there.

    Raises:
        ValueError: nothing can be written there.
    """
    wanted = (config.resume or config.folder or config.out).absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{wanted} cannot be made or written to ({there}): give another --out")
    return there, shutil.disk_usage(there).free


def _disk(found: Prepared, disk: tuple[Path, int]) -> Lines:
    each, kept = found.checkpoint_bytes, found.config.train.keep_checkpoints + 1
    there, free = disk
    yield (
        "disk",
        f"{in_words(each)} a checkpoint, up to {kept} kept and one being written: "
        f"{in_words(each * (kept + 1))}; {in_words(free)} free at {there}",
    )
    if free < each * (kept + 1):
        yield "", "THAT IS NOT ENOUGH: make room, or lower train.keep_checkpoints"


def _time(found: Prepared) -> Lines:
    room = _room(found)
    parts = found.config.train.accumulate
    fewest = min(2 * parts, found.share)
    if room < fewest:
        yield (
            "time",
            f"not measured: even a step of {fewest} images does not fit into the memory free here",
        )
        return
    pace = measure_pace(
        found.config, found.spade, found.data, found.world, found.share, room // parts * parts
    )
    yield from (("engine", line) for line in found.spade.news)
    seconds = (found.spade.total_steps - found.done) * pace.step_s
    rate = found.config.train.batch_size / pace.step_s
    evaluating = _evaluation_s(found, pace)
    ranks = f", by one rank alone (the run has {found.ranks})" if found.ranks > 1 else ""
    yield (
        "time",
        f"{duration(seconds + evaluating)}: {duration(seconds)} training at {rate:,.1f} images/s, "
        f"{duration(evaluating)} evaluating",
    )
    scaled = "" if pace.images == found.share else f", not the whole {found.share}, and scaled up"
    yield "", f"measured here: {pace.steps} steps of {pace.images} images{scaled}{ranks}"
    yield "", "with their data path; start-up, checkpoints, exchange of gradients not counted"


def _room(found: Prepared) -> int:
    """Images whose passes fit into part of the memory that is free."""
    if found.world.device.type == "cuda":
        free = torch.cuda.mem_get_info(found.world.device)[0]
    else:
        free = available_memory()[0]
    parts = found.config.train.accumulate
    needed = found.trace.activations * parts / found.share  # an image
    left = _ROOM * free - 2 * found.weights["gradients"]
    return int(max(0.0, left) / max(1.0, needed)) * parts


def _evaluation_s(found: Prepared, pace: Pace) -> float:
    """Seconds of all evaluations that are still to come."""
    train, done = found.config.train, found.done // found.spade.steps_per_epoch
    times = sum(map(train.is_evaluated, range(done + 1, train.epochs + 1)))
    images = {name: len(samples.sample_ids) for name, samples in found.data.evaluate.items()}
    return times * sum(
        start_s + images[name] / found.ranks * image_s
        for name, (start_s, image_s) in pace.evaluation_s.items()
    )


def in_words(size: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for least, unit, name in ((86400 * 2, 86400, "days"), (7200, 3600, "h"), (100, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
