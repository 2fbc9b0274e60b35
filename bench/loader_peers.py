"""Every loader with the same work: JPEGs in, random resized crops out, uint8 [B, 299, 299, 3].

Training crops as `DataConfig` has them (share 0.08 to 1 of the area, ratio 3/4 to 4/3), linear with
antialiasing, mirrored at random, shuffled, without end. As many decoding threads or workers for
each as there are cores. Each runs in a process of its own (`fresh`).

    mentorch          our Loader: files read by threads of ours, windows by Philox, DALI decodes
    mentorch-shards   the same from tar shards
    dali              readers.file and the decoder's own random crop: what DALI can do alone
    pil               torchvision's ImageFolder and transforms in a DataLoader, PIL images
    tv-io             torchvision.io's decoder and transforms v2 on tensors, in a DataLoader
    webdataset        the shards by the webdataset library, PIL images, in a DataLoader
    …-gpu             decoded by the GPU ("mixed")
"""

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fresh import cpu_s
from torch import Tensor

from mentorch.engine.config import DataConfig

SIZE, BATCH = 299, 64
ENDLESS = 10**6  # epochs
PROVIDERS = ("mentorch", "mentorch-shards", "dali", "pil", "tv-io", "webdataset")
GPU_PROVIDERS = ("mentorch-gpu", "dali-gpu")
_CONFIG = DataConfig(image_size=SIZE)
_MODULES = {
    "dali": "nvidia.dali",
    "pil": "torchvision",
    "tv-io": "torchvision",
    "webdataset": "webdataset",
    "mentorch": "nvidia.dali",
}


class Work(NamedTuple):
    """One measurement's images and how many of them."""

    index: str
    """Parquet index of the image files."""
    shards: str
    """Folder of tar shards and of their index."""
    threads: int
    seen: int
    """First batches, whose pixels are looked at."""
    drained: int
    """Batches after them, not timed: while pixels are looked at, loaders fill their queues."""
    timed: int
    """Batches that are timed."""

    @property
    def root(self) -> Path:
        return Path(self.index).parent


def why_missing(provider: str, *, has_gpu: bool) -> str:
    """Why a provider cannot be measured here; "" when it can."""
    module = _MODULES[provider.removesuffix("-gpu").removesuffix("-shards")]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        return f"{module} is not installed"
    if provider.endswith("-gpu") and not has_gpu:
        return "no GPU"
    return ""


def setup(provider: str, work: Work) -> Iterator[Tensor]:
    """A provider's batches, without end."""
    device = torch.device("cuda", 0) if provider.endswith("-gpu") else torch.device("cpu")
    name = provider.removesuffix("-gpu")
    if name == "mentorch":
        return _mentorch(Path(work.index), work, device)
    if name == "mentorch-shards":
        return _mentorch(_index_of_shards(work), work, device)
    if name == "dali":
        return _dali(work, device)
    return {"pil": _pil, "tv-io": _tv_io, "webdataset": _webdataset}[name](work)


def measure(provider: str, **work: Any) -> dict[str, float]:
    """Times a provider.

    Returns:
        images_s; cpu_ms, CPU time of all its threads and workers an image; first_s, seconds to the
        first batch; mean and std of the untimed batches' pixels.

    Raises:
        ValueError: a batch is not what all providers have to make.
    """
    plan = Work(**work)
    begin = time.perf_counter()
    batches = setup(provider, plan)
    first = _checked(next(batches))
    first_s = time.perf_counter() - begin
    pixels = [_moments(first), *map(_moments, map(_checked, islice(batches, plan.seen - 1)))]
    for _ in islice(batches, plan.drained):
        pass
    start, used = time.perf_counter(), cpu_s()
    count = sum(len(_checked(images)) for images in islice(batches, plan.timed))
    if first.is_cuda:
        torch.cuda.synchronize()
    seconds, used = time.perf_counter() - start, cpu_s() - used
    mean, square = torch.tensor(pixels).mean(dim=0).tolist()
    return {
        "images": count,
        "images_s": count / seconds,
        "cpu_ms": 1e3 * used / count,
        "first_s": first_s,
        "mean": mean,
        "std": (square - mean**2) ** 0.5,
    }


def _checked(images: Tensor) -> Tensor:
    wanted = (BATCH, SIZE, SIZE, 3)
    if tuple(images.shape) != wanted or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(f"a batch is {tuple(images.shape)} {images.dtype}, not {wanted} uint8")
    return images


def _moments(images: Tensor) -> tuple[float, float]:
    values = images.double()
    return float(values.mean()), float(values.square().mean())


def _index_of_shards(work: Work) -> Path:
    (index,) = Path(work.shards).glob("*.parquet")
    return index


def _mentorch(file: Path, work: Work, device: torch.device) -> Iterator[Tensor]:
    from dataclasses import replace

    from mentorch.engine.data.index import Index
    from mentorch.engine.data.pipelines import Loader
    from mentorch.engine.distributed import World

    index = Index.read(file)
    loader = Loader(
        index,
        index.select("train"),
        batch_size=BATCH,
        config=replace(_CONFIG, threads=work.threads),
        train=True,
        world=World(device=device),
    )
    return (batch.images for batch in loader.batches(epochs=ENDLESS))


def _dali(work: Work, device: torch.device) -> Iterator[Tensor]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    on_gpu = device.type == "cuda"
    pipe = Pipeline(
        batch_size=BATCH,
        num_threads=work.threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=_CONFIG.prefetch,
        seed=0,
    )
    with pipe:
        files, _ = fn.readers.file(file_root=str(work.root / "train"), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            files,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            random_area=list(_CONFIG.crop_scale),
            random_aspect_ratio=list(_CONFIG.crop_ratio),
            num_attempts=10,
        )
        images = fn.resize(
            images,
            resize_x=SIZE,
            resize_y=SIZE,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        pipe.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()))
    return (batch[0]["images"] for batch in DALIGenericIterator(pipe, ["images"]))


def _stream(dataset: Any, work: Work) -> Iterator[Tensor]:
    """A DataLoader's batches, drawn without a pause between the epochs."""
    from torch.utils.data import DataLoader, RandomSampler

    # More than is taken, so that the workers are at work until the end.
    drawn = BATCH * (work.seen + work.drained + work.timed + 64)
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=RandomSampler(dataset, num_samples=drawn),  # whole permutations, one by one
        num_workers=work.threads,
        collate_fn=torch.stack,
    )
    return iter(loader)


def _from_pil() -> Callable[[Any], Tensor]:
    import numpy as np
    from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

    return Compose(
        [
            RandomResizedCrop(SIZE, _CONFIG.crop_scale, _CONFIG.crop_ratio),
            RandomHorizontalFlip(),
            np.array,
            torch.from_numpy,
        ]
    )


def _folder(work: Work, **options: Any) -> Any:
    from torchvision.datasets import ImageFolder

    class Images(ImageFolder):
        def __getitem__(self, i: int) -> Tensor:
            image: Tensor = super().__getitem__(i)[0]
            return image

    return Images(str(work.root / "train"), **options)


def _pil(work: Work) -> Iterator[Tensor]:
    return _stream(_folder(work, transform=_from_pil()), work)


def _tv_io(work: Work) -> Iterator[Tensor]:
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    cut = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, _CONFIG.crop_scale, _CONFIG.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(),
            lambda image: image.permute(1, 2, 0).contiguous(),
        ]
    )
    return _stream(
        _folder(
            work,
            loader=lambda path: decode_image(read_file(path), ImageReadMode.RGB),
            transform=cut,
        ),
        work,
    )


def _webdataset(work: Work) -> Iterator[Tensor]:
    import webdataset
    from torch.utils.data import DataLoader

    tars = sorted(map(str, Path(work.shards).glob("train-*.tar")))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_from_pil())
        .repeat()
    )
    workers = min(work.threads, len(tars))  # a worker reads whole shards
    return iter(
        DataLoader(
            dataset,
            BATCH,
            num_workers=workers,
            collate_fn=lambda rows: torch.stack([row[0] for row in rows]),
        )
    )
