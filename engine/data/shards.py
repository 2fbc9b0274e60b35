"""Tar shards of a data set: few large files, which storage reads best, and the same sample ids.

    OUT/train-000000.tar, train-000000.idx, …, val-000000.tar, …     the images (tar_shard.py)
    OUT/<dataset>.index.parquet      every row of the index, with the place of each image
    OUT/shards.json                  what the shards are made of: a run that was stopped goes on

Which shard a sample lies in, and where, is random: lists of data sets are sorted by class, and a
shard should be a fair part of the whole. Labels are trained on from the index, never from the tar,
so other labels need no other shards.
"""

import hashlib
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from mentorch.engine.data.build import SHOWN
from mentorch.engine.data.index import SCHEMA, SHARD_SCHEMA, Index
from mentorch.engine.data.order import Ids, shuffled
from mentorch.engine.data.readers import TAR_BLOCK, Bytes, open_reader
from mentorch.engine.data.shard_store import ShardStore
from mentorch.engine.data.tar_shard import Member, TarShard, idx_text, read_idx, tar_size
from mentorch.kernels.philox import Stream

SPLITS = ("train", "val")
PLAN_FILE = "shards.json"

_MB = 10**6
_READ_AHEAD = 64  # images in memory at a time


@dataclass
class _Job:
    """Shards being written.

    Attributes:
        samples: the sample ids of every shard in the order of its tar, by its name without ending.
        reasons: why a sample could not be read, by sample id.
    """

    index: Index
    store: ShardStore
    samples: dict[str, Ids]
    reasons: dict[int, str] = field(default_factory=dict)


def write_shards(
    index: Index, out: str, *, shard_mb: int = 512, seed: int = 0, read_threads: int = 16
) -> Index:
    """Writes the usable images of an index as tar shards, and the index of these.

    Shards that are there and complete, from a run that was stopped, are kept. An image that cannot
    be read loses its place and is "broken" in the new index; the same command tries it again.

    Args:
        index: of files, or of shards.
        out: a folder, or a URL that fsspec knows: s3://bucket/folder, gs://…, memory://….
        shard_mb: size of a shard, at most about this, 10^6 bytes. All of a split are about equal.
        seed: of the distribution of samples over shards.
        read_threads: images read at the same time.

    Returns:
        The new index; it is in ``out`` as ``<dataset>.index.parquet``.

    Raises:
        ValueError: ``out`` holds something else, the index cannot be made into shards, or a whole
            shard is unreadable.
        ImportError: the package for this kind of URL is missing.
    """
    _check(index, shard_mb, read_threads)
    store = ShardStore(out)
    job = _Job(index, store, _planned(index, shard_mb * _MB, seed))
    store.make()
    _claim(job, seed)
    sharded = _with_places(job, _write_all(job, read_threads))
    _write_bad(job)
    with store.writing(index_name(index)) as temporary:
        sharded.write(temporary)
    return sharded


def index_name(index: Index) -> str:
    """The file name of a sharded index."""
    return f"{index.dataset}.index.parquet"


def _check(index: Index, shard_mb: int, read_threads: int) -> None:
    for name, value in (("shard_mb", shard_mb), ("read_threads", read_threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    if not re.fullmatch(r"[\w-]+", index.dataset):
        raise ValueError(f"the index is of data set {index.dataset!r}, which is no file name")
    others = set(pc.unique(index.table["split"]).to_pylist()) - set(SPLITS)
    if others:
        raise ValueError(f"the index has splits {sorted(others)}; shards are for {SPLITS}")


def _planned(index: Index, shard_bytes: int, seed: int) -> dict[str, Ids]:
    """Which samples each shard is to hold: cut where the tar's size passes equal parts."""
    split, size = index.table["split"].to_numpy(), index.table["bytes"].to_numpy()
    ok = index.table["status"].to_numpy() == "ok"
    planned: dict[str, Ids] = {}
    for name in SPLITS:
        ids = shuffled(np.flatnonzero(ok & (split == name)), seed, 0, Stream.SHARD)
        if not len(ids):
            continue
        in_tar = 3 * TAR_BLOCK + -(-size[ids] // TAR_BLOCK) * TAR_BLOCK  # headers and the label too
        begin = np.cumsum(in_tar) - in_tar
        count = -(-int(in_tar.sum()) // shard_bytes)
        cuts = np.searchsorted(begin, np.arange(1, count) * (in_tar.sum() / count))
        parts = (part for part in np.split(ids, cuts) if len(part))
        planned |= {f"{name}-{number:06d}": part for number, part in enumerate(parts)}
    if not planned:
        raise ValueError(f"the index of {index.root} has no usable image to put into shards")
    return planned


def _claim(job: _Job, seed: int) -> None:
    """Notes what the shards are made of; refuses a folder with shards of something else."""
    digest = hashlib.sha256(job.index.labels().tobytes())
    for ids in job.samples.values():
        digest.update(ids.tobytes())
    for path in job.index.paths().to_pylist():
        digest.update(path.encode() + b"\0")
    plan = {"seed": seed, "shards": len(job.samples), "samples_sha256": digest.hexdigest()}
    text = json.dumps(plan, indent=2) + "\n"
    there = job.store.read(PLAN_FILE)
    if there is None and job.store.size(index_name(job.index)) is not None:
        raise ValueError(
            f"{job.store} holds {index_name(job.index)}, which is no index of shards and would be "
            "lost; give another folder"
        )
    if there is not None and there != text.encode():
        raise ValueError(
            f"{job.store} holds shards of another index, seed or size ({PLAN_FILE}); give another "
            "folder, or delete it"
        )
    if there is None:
        with job.store.writing(PLAN_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _write_all(job: _Job, read_threads: int) -> list[list[Member]]:
    """Writes what is missing; what every shard holds."""
    every = 0.5 if sys.stderr.isatty() else 30.0  # s; a log file gets a line every half minute
    total = sum(map(len, job.samples.values()))
    done = []
    with (
        ThreadPoolExecutor(read_threads, thread_name_prefix="mentorch-read") as pool,
        tqdm(total=total, desc="writing shards", unit=" images", mininterval=every) as bar,
        _said_how_to_go_on(job),
    ):
        for name, ids in job.samples.items():
            members = _complete(job.store, name, ids)
            if members is not None:
                bar.update(len(ids))
            else:
                members = _write_shard(job, name, pool, bar.update)
            done.append(members)
    return done


@contextmanager
def _said_how_to_go_on(job: _Job) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {job.store} keeps what is done, the same command goes on from it")
        raise


def _complete(store: ShardStore, name: str, ids: Ids) -> list[Member] | None:
    """What a shard holds, if it was written to its end with every sample it should have."""
    text = store.read(f"{name}.idx")
    members = read_idx(text.decode("utf-8", "replace")) if text is not None else None
    if members is None or [m.sample_id for m in members] != ids.tolist():
        return None
    return members if store.size(f"{name}.tar") == tar_size(members) else None


def _write_shard(
    job: _Job, name: str, pool: ThreadPoolExecutor, advance: Callable[[], object]
) -> list[Member]:
    ids, labels = job.samples[name], job.index.labels()
    job.store.remove(f"{name}.idx")  # of another tar than the one that is written now
    with job.store.writing(f"{name}.tar") as temporary:
        with TarShard(temporary) as tar:
            for sample_id, data in _read(job.index, ids, pool):
                if isinstance(data, str):
                    job.reasons[sample_id] = data
                else:
                    tar.add(sample_id, data, int(labels[sample_id]))
                advance()
        if not tar.members:
            first = int(ids[0])
            raise ValueError(
                f"none of the {len(ids):,} images of shard {name} can be read; the first is "
                f"{job.index.path(first)!r} under {job.index.root}: {job.reasons[first]}. "
                "If its storage is there, `mentorch index` finds out what has become of the images"
            )
    with job.store.writing(f"{name}.idx") as temporary:  # last: it says that the tar is complete
        temporary.write_text(idx_text(tar.members), encoding="ascii")
    return tar.members


def _read(index: Index, ids: Ids, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Bytes | str]]:
    """The images in order, some of them read ahead."""
    reader = open_reader(index)
    waiting: deque[tuple[int, Future[Bytes | str]]] = deque()
    for sample_id in ids.tolist():
        waiting.append((sample_id, pool.submit(reader.read, sample_id)))
        if len(waiting) >= _READ_AHEAD:
            first, data = waiting.popleft()
            yield first, data.result()
    for first, data in waiting:
        yield first, data.result()


def _with_places(job: _Job, done: list[list[Member]]) -> Index:
    """The index of the shards: where each image is, and which could not be read."""
    table, n = job.index.table, len(job.index)
    shard, offset = np.full(n, -1, np.int32), np.full(n, -1, np.int64)
    size = table["bytes"].to_numpy().copy()  # of the file when it was indexed, not when read
    for number, members in enumerate(done):
        rows, offsets, sizes = np.array([(m.sample_id, m.offset, m.size) for m in members]).T
        shard[rows], offset[rows], size[rows] = number, offsets, sizes
    broken = np.zeros(n, bool)
    broken[list(job.reasons)] = True
    status = pc.if_else(broken, "broken", table["status"].cast(pa.string())).dictionary_encode()
    columns = {name: table[name] for name in SCHEMA.names} | {
        "status": status,
        "bytes": size,
        "width": np.where(broken, 0, table["width"].to_numpy()).astype(np.int32),
        "height": np.where(broken, 0, table["height"].to_numpy()).astype(np.int32),
        "shard": shard,
        "offset": offset,
    }
    return replace(
        job.index,
        table=pa.table(columns, schema=SHARD_SCHEMA).combine_chunks(),
        root=job.store.root,
        shards=tuple(f"{name}.tar" for name in job.samples),
    )


def _write_bad(job: _Job) -> None:
    """Lists the images that could not be read; the list goes away when there is none."""
    name = f"{job.index.dataset}.index.quarantine.jsonl"
    bad = [
        {"path": job.index.path(row), "status": "broken", "reason": reason}
        for row, reason in sorted(job.reasons.items())
    ]
    for line in bad[:SHOWN]:
        print(f"  {line['status']}: {line['path']} ({line['reason']})")
    if not bad:
        job.store.remove(name)
        return
    with job.store.writing(name) as temporary:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{len(bad):,} images cannot be read; all of them are named in {name}, in {job.store}")
