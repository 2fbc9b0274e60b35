"""Instance noise: its statistics, and that a label depends on seed, sample id and image only."""

import numpy as np
import pytest
from PIL import Image

from mentorch.engine.data import instance_noise as module
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.instance_noise import mean_flip_rate, thumbnails
from mentorch.engine.data.noise import Noise
from mentorch.engine.data.noise_kinds import measured_matrix

N, C, SIDE = 20_000, 10, 8  # 2,000 a class; 64 pixels keep this quick
LABELS = np.arange(N) % C
IMAGES = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE), dtype=np.uint8)
NOISE = Noise("instance", 0.4, 7)


@pytest.fixture(scope="module")
def whole():
    return NOISE.apply(LABELS, C, images=IMAGES)


def test_share_of_wrong_labels(whole):
    assert (whole != LABELS).mean() == pytest.approx(0.4, abs=5 * np.sqrt(0.24 / N))
    own = np.diag(measured_matrix(whole, LABELS, C))
    assert own == pytest.approx(np.full(C, 0.6), abs=5 * np.sqrt(0.24 / (N / C)))  # every class


def test_flip_rates_are_a_truncated_normal():
    """Against samples drawn and rejected, 0.05 being where half a standard deviation is cut."""
    words = module.philox(7, 0, module.torch.arange(N), module.Stream.LABEL_NOISE)[1]
    for rate in (0.05, 0.4, 0.9):
        q = module._flip_rates(words, rate)
        drawn = np.random.default_rng(0).normal(rate, 0.1, 20 * N)
        drawn = drawn[(drawn >= 0) & (drawn <= 1)]
        assert q.min() >= 0
        assert q.max() <= 1
        assert q.mean() == pytest.approx(drawn.mean(), abs=5 * 0.1 / np.sqrt(N))
        assert q.std() == pytest.approx(drawn.std(), abs=5 * 0.1 / np.sqrt(N))
        assert mean_flip_rate(rate) == pytest.approx(drawn.mean(), abs=5 * 0.1 / np.sqrt(20 * N))
    assert mean_flip_rate(0.4) == pytest.approx(0.4, abs=1e-4)


def test_wrong_labels_follow_the_scores():
    """All flipped: the shares are the softmax of x W_y, by the definition and with its own loop."""
    labels, ids = np.full(N, 3), np.arange(N)
    image = np.linspace(0, 0.3, 5).astype(np.float32)
    noisy = Noise("instance", 1.0, 7).apply(labels, C, images=np.tile(image, (N, 1)))
    scores = image @ module._projection(7, 3, 5, C) / 2**12
    p = np.where(ids[:C] == 3, 0, np.exp(scores))
    shares = np.bincount(noisy, minlength=C) / N
    assert shares == pytest.approx(p / p.sum(), abs=5 * np.sqrt(0.25 / N))
    assert shares[3] == 0


def test_projections_are_standard_normal_and_differ_by_class():
    W = np.stack([module._projection(7, y, 300, C) for y in range(3)]) / 2**12
    assert W.mean() == pytest.approx(0, abs=5 / np.sqrt(W.size))
    assert W.std() == pytest.approx(1, abs=5 / np.sqrt(2 * W.size))
    assert np.abs(np.corrcoef(W.reshape(3, -1)) - np.eye(3)).max() < 5 / np.sqrt(W[0].size)


def test_depends_on_seed_sample_id_and_image_only(whole, monkeypatch):
    some = np.random.default_rng(0).permutation(N)[:1000]
    for elements in (2**22, 64 * 7):  # one chunk, and chunks of 7
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        assert (NOISE.apply(LABELS[some], C, some, IMAGES[some]) == whole[some]).all()
    for k in some[:20]:
        one = slice(k, k + 1)
        assert NOISE.apply(LABELS[one], C, np.array([k]), IMAGES[one]) == whole[k]


def test_depends_on_each(whole):
    """Where 40 % are wrong, an image decides what they become; id and seed also, which they are."""
    other_image = NOISE.apply(LABELS, C, images=255 - IMAGES)
    assert (other_image != whole).mean() > 0.1
    assert (NOISE.apply(LABELS, C, np.arange(N) + N, IMAGES) != whole).mean() > 0.3
    assert (Noise("instance", 0.4, 8).apply(LABELS, C, images=IMAGES) != whole).mean() > 0.3


def test_bytes_count_as_0_to_1(whole):
    some = slice(0, 500)
    floats = IMAGES[some].reshape(500, -1) / 255
    assert (NOISE.apply(LABELS[some], C, images=floats) == whole[some]).all()


def test_none_and_all():
    some = slice(0, 500)
    none, all_ = (Noise("instance", r).apply(LABELS[some], C, images=IMAGES[some]) for r in (0, 1))
    assert (none == LABELS[some]).all()
    assert (all_ != LABELS[some]).all()


def test_large_scores_do_not_overflow():
    noisy = Noise("instance", 1.0).apply(LABELS[:500], C, images=IMAGES[:500] * np.float64(100))
    assert (noisy != LABELS[:500]).all()


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (None, "instance noise depends on the images"),
        (np.zeros((3, 5)), "3 images for 2 labels"),
        (np.array([[0, 1], [np.nan, 0]]), "image of sample 9 has values that are not finite"),
        (np.array([[0, 1], [1e9, 0]]), r"sum to more than 67,108,864 \(1e\+09\)"),
    ],
)
def test_bad_images(images, error):
    with pytest.raises(ValueError, match=error):
        NOISE.apply(np.array([0, 0]), C, np.array([8, 9]), images)


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="instance noise needs at least two classes"):
        NOISE.apply(np.array([0]), 1, images=np.zeros((1, 4)))


def test_thumbnails(put, encoded, tmp_path):
    """Dark, bright, broken, and 16 times larger than the thumbnail on one side."""
    for name, value in (("dark", 10), ("bright", 200)):
        Image.new("RGB", (70, 512), (value,) * 3).save(put(f"a/{name}.png"))
    put("a/noise.jpg", encoded(size=(512, 300)))
    put("a/broken.jpg", encoded()[:100])
    index = index_folder(tmp_path, workers=0)
    ids = np.array([3, 0, 1, 2])  # noise, bright, broken, dark
    small = thumbnails(index, ids)
    assert small.shape == (4, 32 * 32)
    assert (small[1] == 200).all()
    assert (small[2] == 0).all()
    assert (small[3] == 10).all()
    assert small[0].std() > 1
