import numpy as np

from mentorch.engine.data.crops import centre, random_resized

FULL = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def _pixels(windows, sizes):
    """Top, left, height and width in pixels."""
    size_HW = sizes[:, ::-1]
    return np.hstack([windows.start_HW * size_HW, windows.shape_HW * size_HW])


def test_the_centre_is_that_of_resize_and_crop():
    sizes = np.array([[500, 375], [375, 500], [320, 320]], np.int32)
    pixels = _pixels(centre(sizes, 299 / 320), sizes)
    side = 375 * 299 / 320
    expected = [
        [(375 - side) / 2, (500 - side) / 2, side, side],
        [(500 - side) / 2, (375 - side) / 2, side, side],
        [10.5, 10.5, 299, 299],
    ]
    assert np.allclose(pixels, expected, atol=1e-3)


def test_random_windows_are_whole_pixels_inside_the_image_and_as_large_as_asked():
    rng = np.random.default_rng(0)
    sizes = rng.integers(40, 600, (5000, 2)).astype(np.int32)
    windows = random_resized(sizes, np.arange(5000), 0, 0, FULL, RATIO)
    top, left, height, width = _pixels(windows, sizes).T
    assert np.allclose([top, left, height, width], np.rint([top, left, height, width]), atol=1e-3)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= sizes[:, 1] + 1e-3).all()
    assert (left + width <= sizes[:, 0] + 1e-3).all()
    share = height * width / sizes.prod(axis=1)
    assert share.min() > 0.07
    assert (np.abs(np.log(width / height)) < np.log(4 / 3) + 0.1).all()


def test_the_distribution_is_torchvisions():
    """Mean and spread of area, ratio and place against RandomResizedCrop.get_params."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, 375, 500)
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(FULL), list(RATIO)) for _ in range(4000)]
    )
    sizes = np.tile(np.array([[500, 375]], np.int32), (4000, 1))
    ours = _pixels(random_resized(sizes, np.arange(4000), 3, 5, FULL, RATIO), sizes)
    spread = theirs.std(axis=0)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * spread / 4000**0.5 * 2**0.5).all()
    assert (np.abs(ours.std(axis=0) / spread - 1) < 0.06).all()


def test_windows_belong_to_sample_epoch_and_seed_not_to_the_batch():
    sizes = np.tile(np.array([[500, 375]], np.int32), (8, 1))
    ids = np.arange(8)
    all_at_once = random_resized(sizes, ids, 0, 0, FULL, RATIO)
    reversed_ = random_resized(sizes, ids[::-1].copy(), 0, 0, FULL, RATIO)
    assert np.array_equal(all_at_once.start_HW, reversed_.start_HW[::-1])
    assert np.array_equal(all_at_once.flip, reversed_.flip[::-1])
    for seed, epoch in ((1, 0), (0, 1)):
        other = random_resized(sizes, ids, seed, epoch, FULL, RATIO)
        assert not np.array_equal(all_at_once.start_HW, other.start_HW)


def test_half_of_the_images_are_mirrored():
    sizes = np.tile(np.array([[50, 50]], np.int32), (10000, 1))
    flip = random_resized(sizes, np.arange(10000), 0, 0, FULL, RATIO).flip
    assert abs(flip.mean() - 0.5) < 0.025  # five standard deviations


def test_extreme_shapes_fall_back_to_the_largest_centred_window():
    sizes = np.array([[1000, 10], [10, 1000], [1, 1]], np.int32)
    pixels = _pixels(random_resized(sizes, np.arange(3), 0, 0, (0.9, 1.0), RATIO), sizes)
    assert np.allclose(pixels[0], [0, 494, 10, 13], atol=1)  # a row of 1000 by 10: 13 by 10
    assert np.allclose(pixels[1], [494, 0, 13, 10], atol=1)
    assert np.allclose(pixels[2], [0, 0, 1, 1])


def test_the_centre_of_a_line_is_a_whole_pixel():
    sizes = np.array([[100, 1], [1, 100]], np.int32)
    assert np.allclose(_pixels(centre(sizes, 299 / 320), sizes), [[0, 49.5, 1, 1], [49.5, 0, 1, 1]])
