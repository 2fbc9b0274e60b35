"""What `mentorch index …`, `noise` and `shard` run: functions whose signatures are the options.

They import what they need themselves, so that their --help is there at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from mentorch.engine.data.noise_kinds import NoiseKind, read_matrix

if TYPE_CHECKING:
    from mentorch.engine.data.index import Index
else:
    Index = object  # tyro evaluates the signatures; what is returned means nothing to it


def webvision(
    root: Positional[Path],
    *,
    out: Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
) -> Index:
    """Index WebVision 1.0 and verify every image.

    Args:
        root: the folder that holds info/ (the lists), google/, flickr/ and val_images_256/.
        out: the Parquet file to write; by default ROOT/webvision.index.parquet.
        workers: processes that verify; by default one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.
    """
    from mentorch.engine.data.webvision import index_webvision

    return index_webvision(root, out=out, workers=workers, reverify=reverify)


def imagenet(
    root: Positional[Path],
    *,
    out: Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
    val_list: Path | None = None,
    synsets: Path | None = None,
) -> Index:
    """Index ImageNet (ILSVRC-2012: train/, val/ or both) and verify every image.

    Args:
        root: the folder that holds train/<wnid>/, val/ or both.
        out: the Parquet file to write; by default ROOT/imagenet.index.parquet.
        workers: processes that verify; by default one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.
        val_list: the labels of a val/ without class folders, if they are not found by themselves.
        synsets: the class list, a line "wnid names…" a class, if it is not found by itself.
    """
    from mentorch.engine.data.imagenet import index_imagenet

    return index_imagenet(
        root, out=out, workers=workers, reverify=reverify, val_list=val_list, synsets=synsets
    )


def folder(
    root: Positional[Path],
    *,
    out: Path | None = None,
    workers: int | None = None,
    reverify: bool = False,
) -> Index:
    """Index a folder of class folders and verify every image.

    Args:
        root: the folder that holds train/<class>/… (and val/<class>/…), or <class>/….
        out: the Parquet file to write; by default ROOT/folder.index.parquet.
        workers: processes that verify; by default one a core, 0 is none besides this one.
        reverify: decode every image again, also those that an earlier index knows.
    """
    from mentorch.engine.data.folder import index_folder

    return index_folder(root, out=out, workers=workers, reverify=reverify)


def noise(
    index: Positional[Path],
    *,
    rate: float | None = None,
    kind: NoiseKind = "symmetric",
    seed: int = 0,
    mapping: str | None = None,
    matrix: Path | None = None,
    split: str = "train",
    max_label: int | None = None,
    out: Path | None = None,
) -> Index:
    """Inject label noise into an index; the images are not touched.

    Args:
        index: the Parquet file of an index without injected noise.
        rate: probability that a label is replaced, from 0 to 1; not for matrix, which says it.
        kind: symmetric draws from all classes (the paper), symmetric-other from the others; pair
            makes class c the class c + 1; asymmetric follows --mapping, matrix follows --matrix;
            instance depends on the image, of which it reads a grey thumbnail.
        seed: what the noise depends on, besides each sample's id.
        mapping: confusable classes: mnist, fashion_mnist, cifar10, cifar100, or pairs "3:5,5:3".
        matrix: a .npy or .csv file, row i the probabilities of the given labels of class i.
        split: the split that gets noise.
        max_label: noise only among the labels below this; 50 is the mini protocol.
        out: the Parquet file to write; by default beside INDEX, named by kind, rate and seed.
    """
    from mentorch.engine.data.index import Index
    from mentorch.engine.data.noise import Noise, add_noise

    strength = matrix.stem if matrix is not None else "none" if rate is None else f"{rate:g}"
    out = out or index.with_name(f"{index.stem}.{kind}-{strength}-seed{seed}.parquet")
    if out.exists() and out.samefile(index):
        raise ValueError(f"--out {out} is the index without noise itself; give it another name")
    table = read_matrix(matrix) if matrix is not None else None
    what = Noise(kind, rate, seed, mapping, table)
    noisy = add_noise(Index.read(index, need_root=kind == "instance"), what, split, max_label)
    noisy.write(out)
    assert noisy.noise is not None
    wrong, changed, expected = (
        noisy.noise[f"{share}_share"] for share in ("wrong", "changed", "expected")
    )
    print(
        f"{out}: {wrong:.4f} of the labels of {split} are wrong "
        f"({changed:.4f} changed, {expected:.4f} expected)"
    )
    return noisy


def shard(
    index: Positional[Path],
    out: Positional[str],
    *,
    shard_mb: int = 512,
    seed: int = 0,
    read_threads: int = 16,
) -> Index:
    """Write the images of an index as tar shards, for storage that reads large files best.

    The same command goes on from where a run was stopped.

    Args:
        index: the Parquet file of an index; sample ids and labels stay as they are in it.
        out: a new folder for the shards and their index, or a URL such as s3://bucket/folder.
        shard_mb: size of a shard, at most about this, 10^6 bytes.
        seed: of the distribution of samples over shards.
        read_threads: images read at the same time.
    """
    from mentorch.engine.data.index import Index
    from mentorch.engine.data.shards import index_name, write_shards

    sharded = write_shards(
        Index.read(index), out, shard_mb=shard_mb, seed=seed, read_threads=read_threads
    )
    held = sharded.places()[0] >= 0
    gigabytes = sharded.table["bytes"].to_numpy()[held].sum() / 1e9
    print(
        f"{out}: {held.sum():,} images, {gigabytes:.2f} GB, in {len(sharded.shards):,} shards; "
        f"their index is {index_name(sharded)}"
    )
    if "://" in out:
        print(
            "Copy or mount that folder, whole, where you train; give it to a recipe: --webvision …"
        )
    else:
        print(f"Give it to a recipe in place of the data set, for example --webvision {out}")
    return sharded
