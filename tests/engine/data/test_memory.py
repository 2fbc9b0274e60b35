"""Batches from memory: the order of `order`, crops and flips against a slow reference."""

import math

import numpy as np
import pytest
import torch

from mentorch.engine.data.memory import (
    Augment,
    MemoryLoader,
    Standardise,
    channel_statistics,
    cut,
    windows,
)
from mentorch.engine.data.order import PADDING, shuffled
from mentorch.engine.distributed import World
from mentorch.kernels.philox import Stream, philox

# 103 samples: a prime, so nothing divides it. Height, width and channels differ, so that one taken
# for another shows.
IMAGES = torch.randint(0, 256, (120, 5, 7, 3), generator=torch.Generator().manual_seed(0)).byte()
IDS = np.arange(5, 108)
AUGMENT = Augment(pad=2, mirror=True)


def loader(batch_size=10, train=True, **options):
    options = {"seed": 3, "augment": AUGMENT} | options
    return MemoryLoader(IMAGES, IDS, batch_size=batch_size, train=train, **options)


def joined(batches):
    batches = list(batches)
    return torch.cat([b.images for b in batches]), torch.cat([b.sample_ids for b in batches])


def test_training_comes_in_the_order_of_order():
    _, ids = joined(loader().batches(epochs=2))
    epochs = [shuffled(IDS, 3, epoch)[:100] for epoch in (0, 1)]
    assert loader().steps_per_epoch == 10
    assert ids.dtype == torch.int64
    assert np.array_equal(ids.numpy(), np.concatenate(epochs))


def test_without_augmentation_the_images_are_those_of_the_ids():
    images, ids = joined(loader(augment=Augment()).batches())
    assert images.dtype == torch.uint8
    assert torch.equal(images, IMAGES[ids])


@pytest.mark.parametrize("batch_size", [10, 103, 200])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_covers_each_sample_once_and_as_it_is(batch_size, world_size):
    worlds = [World(rank, world_size) for rank in range(world_size)]
    loaders = [loader(batch_size, train=False, world=world) for world in worlds]
    parts = [joined(each.batches()) for each in loaders]
    images, ids = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert {each.steps_per_epoch for each in loaders} == {-(-103 // (batch_size * world_size))}
    real = ids != PADDING
    assert sorted(ids[real].tolist()) == IDS.tolist()
    assert torch.equal(images[real], IMAGES[ids[real]])
    assert (images[~real] == IMAGES[0]).all()
    if world_size == 1:
        assert ids[:103].tolist() == IDS.tolist()


@pytest.mark.parametrize("start", [0, 3, 9, 10, 17, 30])  # within, at and after an epoch's end
def test_resuming_is_going_on(start):
    whole = list(loader().batches(epochs=3))
    rest = list(loader().batches(start, epochs=3))
    assert len(rest) == 30 - start
    for expected, got in zip(whole[start:], rest, strict=True):
        assert torch.equal(expected.sample_ids, got.sample_ids)
        assert torch.equal(expected.images, got.images)


def test_two_ranks_share_the_global_batch():
    alone = list(loader(20).batches(epochs=2))
    ranks = [loader(10, world=World(rank, 2)).batches(epochs=2) for rank in range(2)]
    for expected, *halves in zip(alone, *ranks, strict=True):
        images, ids = joined(halves)
        assert torch.equal(expected.sample_ids, ids)
        assert torch.equal(expected.images, images)


def by_id(batches):
    images, ids = joined(batches)
    return dict(zip(ids.tolist(), images, strict=True))


def test_a_crop_depends_on_seed_epoch_and_id_only():
    first = by_id(loader().batches())
    other_size = by_id(loader(17).batches())
    common = first.keys() & other_size.keys()
    assert len(common) > 80
    assert all(torch.equal(first[k], other_size[k]) for k in common)
    some = MemoryLoader(IMAGES, IDS[40:60], batch_size=20, train=True, seed=3, augment=AUGMENT)
    assert all(torch.equal(first[k], x) for k, x in by_id(some.batches()).items() if k in first)
    for changed in (by_id(loader().batches(10, epochs=2)), by_id(loader(seed=4).batches())):
        common = first.keys() & changed.keys()
        # Of 5 · 5 · 2 windows two in a row are the same about once in 50.
        assert sum(torch.equal(first[k], changed[k]) for k in common) < 15


def reference(image, pad, top, left, flip):
    """The window pixel by pixel."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row + top - pad, column + left - pad
            if 0 <= y < height and 0 <= x < width:
                out[row, width - 1 - column if flip else column] = image[y, x]
    return out


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 2, 9])  # 9: windows with nothing of the image in them
def test_pad_and_mirror(pad, mirror):
    batches = loader(seed=2**40 + 1, augment=Augment(pad, mirror)).batches(10, epochs=2)
    images, ids = joined(batches)
    crop = philox(2**40 + 1, 1, ids, Stream.CROP)
    flips = philox(2**40 + 1, 1, ids, Stream.FLIP)[0] >= 2**31
    for row, sample in enumerate(ids.tolist()):
        top, left = (int(word[row]) * (2 * pad + 1) // 2**32 for word in crop[:2])
        flip = mirror and bool(flips[row])
        expected = reference(IMAGES[sample].numpy(), pad, top, left, flip)
        assert np.array_equal(images[row].numpy(), expected)


def test_every_window_is_as_likely():
    """χ² over the 5 · 5 · 2 windows of 50,000 samples."""
    top, left, flip = windows(AUGMENT, torch.arange(50_000), 0, 0)
    counts = torch.bincount((top * 5 + left) * 2 + flip, minlength=50).double()
    assert len(counts) == 50
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert abs(chi2 - 49) < 5 * (2 * 49) ** 0.5  # 49 degrees of freedom, five deviations


def test_cut_leaves_its_input_as_it_was():
    images, zeros = IMAGES[:4].clone(), torch.zeros(4, dtype=torch.int64)
    cut(images, zeros, zeros, zeros.bool(), 2)
    assert torch.equal(images, IMAGES[:4])


def test_ids_may_be_a_tensor():
    ids = torch.from_numpy(IDS)
    got = MemoryLoader(IMAGES, ids, batch_size=103, train=False)
    assert joined(got.batches())[1].tolist() == IDS.tolist()
    got.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 200}, "103 samples do not fill one batch of 200"),
        ({"images": IMAGES.float()}, r"images are torch.float32 \[120, 5, 7, 3\]; give uint8"),
        ({"images": IMAGES[0]}, r"images are torch.uint8 \[5, 7, 3\]; give uint8 \[N, H, W, C\]"),
        ({"images": IMAGES[:107]}, "sample_ids are from 5 to 107; .* are from 0 to 106"),
        ({"sample_ids": IDS - 6}, "sample_ids are from -1 to 101; .* are from 0 to 119"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"images": IMAGES, "sample_ids": IDS, "batch_size": 10} | changes
    with pytest.raises(ValueError, match=message):
        MemoryLoader(**arguments, train=True)


def test_a_negative_pad_is_refused():
    with pytest.raises(ValueError, match="pad is -1 pixels"):
        Augment(pad=-1)


@pytest.mark.gpu
def test_an_epoch_does_not_wait_for_the_host():
    """And gives the batches of the CPU."""
    images = IMAGES.cuda()
    on_gpu = MemoryLoader(images, IDS, batch_size=10, train=True, seed=3, augment=AUGMENT)
    batches = on_gpu.batches(epochs=1)
    got = [next(batches)]  # puts the epoch on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected, batch in zip(loader().batches(), got, strict=True):
        assert torch.equal(expected.sample_ids, batch.sample_ids.cpu())
        assert torch.equal(expected.images, batch.images.cpu())


def standardised(images):
    """In float64, [B, C, H, W]."""
    x = images.numpy().astype(np.float64)
    mean, std = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    return ((x - mean) / np.maximum(std, 1 / math.sqrt(x[0].size))).transpose(0, 3, 1, 2)


# A uniform image, and one whose only other pixel leaves the deviation below the floor: there an ulp
# of the mean, 1.5e-5, is 8e-4 of the result.
UNIFORM = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8)
UNIFORM[1, 0, 0, 0] = 254


@pytest.mark.parametrize(
    "images", [IMAGES, IMAGES[..., :1], IMAGES // 255, UNIFORM], ids=["rgb", "grey", "dark", "flat"]
)
def test_standardise(images):
    got = Standardise()(images)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    atol = 2e-3 if images is UNIFORM else 1e-5
    np.testing.assert_allclose(got.numpy(), standardised(images), rtol=1e-5, atol=atol)


def test_standardise_is_that_of_tensorflow():
    """The example of TensorFlow's documentation: the values of 1 to 12, not of pixels in [0, 1]."""
    images = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 2, 2, 3)
    expected = [-1.593255, -1.3035723, -1.0138896, -0.7242068, -0.4345241, -0.14484136]
    got = Standardise()(images).permute(0, 2, 3, 1).ravel().tolist()
    assert got == pytest.approx([*expected, *(-x for x in reversed(expected))], abs=1e-6)


@pytest.mark.parametrize("n", [1, 1500])  # 1,500 are more than a chunk of 1,024
def test_channel_statistics(n):
    images = torch.randint(0, 256, (n, 4, 5, 3), generator=torch.Generator().manual_seed(n)).byte()
    images[..., 1] //= 2
    mean, std = channel_statistics(images)
    x = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(x.mean((0, 1, 2)), rel=1e-14)
    assert std == pytest.approx(x.std((0, 1, 2)), rel=1e-13)


def test_the_deviation_of_a_bright_set_is_exact():
    """Where E[x²] − E[x]² would lose it: one pixel of 3 million off by one."""
    images = torch.full((1000, 32, 32, 3), 255, dtype=torch.uint8)
    images[-1, -1, -1, 2] = 254
    _, std = channel_statistics(images)
    n = 1000 * 32 * 32
    assert std[:2] == (0.0, 0.0)
    assert std[2] == pytest.approx(math.sqrt((n - 1) / n**2) / 255, rel=1e-15)
