"""Label noise: both conventions, its statistics, and that it depends on seed and sample id only."""

import numpy as np
import pytest

from mentorch.engine.data.index import Index
from mentorch.engine.data.noise import add_symmetric_noise, symmetric_noise
from mentorch.engine.data.webvision import index_webvision

N, C = 100_000, 10
LABELS = np.arange(N) % C


@pytest.mark.parametrize(
    ("kind", "wrong"), [("symmetric", 0.4 * (1 - 1 / C)), ("symmetric-other", 0.4)]
)
def test_share_of_wrong_labels(kind, wrong):
    noisy = symmetric_noise(LABELS, C, 0.4, kind=kind, seed=1)
    assert (noisy != LABELS).mean() == pytest.approx(wrong, abs=5 * np.sqrt(0.25 / N))


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-other"])
def test_new_labels_are_uniform(kind):
    """All replaced: each of the C (or C − 1) classes as often, for every old label."""
    noisy = symmetric_noise(LABELS, C, 1.0, kind=kind, seed=1)
    counts = np.zeros((C, C))
    np.add.at(counts, (LABELS, noisy), 1)
    expected = np.full((C, C), N / C / C)
    if kind == "symmetric-other":
        expected = (1 - np.eye(C)) * N / C / (C - 1)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(N / C / (C - 1))
    if kind == "symmetric-other":
        assert (noisy != LABELS).all()


def test_whether_and_what_are_independent():
    noisy = symmetric_noise(LABELS, C, 0.1, kind="symmetric", seed=1)
    changed = noisy[noisy != LABELS]
    shares = np.bincount(changed, minlength=C) / len(changed)
    assert shares == pytest.approx(np.full(C, 1 / C), abs=0.02)


def test_depends_on_seed_and_sample_id_only():
    ids = np.arange(N)
    whole = symmetric_noise(LABELS, C, 0.4, seed=7)
    some = np.random.default_rng(0).permutation(ids)[:1000]
    assert (symmetric_noise(LABELS[some], C, 0.4, seed=7, sample_ids=some) == whole[some]).all()
    other = symmetric_noise(LABELS, C, 0.4, seed=8)
    assert (other != whole).mean() > 0.4
    # More noise keeps what less noise replaced.
    less = symmetric_noise(LABELS, C, 0.2, seed=7)
    assert (whole[less != LABELS] == less[less != LABELS]).all()


def test_these_numbers_are_part_of_the_format():
    """An index made today is the index made tomorrow: the first labels, written down."""
    first = [9, 8, 0, 0, 9, 0, 0, 1, 0, 3, 0, 2]
    assert symmetric_noise(np.zeros(12, np.int64), C, 0.5, seed=0).tolist() == first


def test_none_and_all():
    assert (symmetric_noise(LABELS, C, 0.0) == LABELS).all()
    assert (symmetric_noise(np.zeros(9, np.int64), 2, 1.0, kind="symmetric-other") == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rate": 1.2}, "noise rate is 1.2"),
        ({"rate": float("nan")}, "noise rate is nan"),
        ({"rate": 0.4, "kind": "pair"}, "noise kind 'pair' is unknown; it is one of"),
        ({"rate": 0.4, "kind": "symmetric-other", "num_classes": 1}, "at least two classes"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(ValueError, match=error):
        symmetric_noise(**{"labels": LABELS, "num_classes": C, **arguments})


def test_an_index_keeps_its_old_labels(webvision, put):
    put("info/clean_labels.txt", "google/q0002/same name 0.jpg 3\n")
    index = index_webvision(webvision)
    noisy = add_symmetric_noise(index, 1.0, "symmetric-other", seed=3)
    assert (noisy.labels()[:9] != index.labels()[:9]).all()
    assert (noisy.labels()[9:] == index.labels()[9:]).all()  # validation
    expected = index.labels()[:9].copy()
    expected[1] = 3  # known before
    assert noisy.clean_labels().tolist() == expected.tolist() + [-1] * 4
    wrong = float((noisy.labels()[:9] != expected).mean())
    assert noisy.noise == {
        "kind": "symmetric-other",
        "rate": 1.0,
        "seed": 3,
        "split": "train",
        "max_label": None,
        "wrong_share": wrong,
    }
    noisy.write(webvision / "noisy.parquet")
    read = Index.read(webvision / "noisy.parquet")
    assert read.table.equals(noisy.table)
    assert read.noise == noisy.noise


def test_max_label_keeps_the_mini_protocol_closed(webvision):
    index = index_webvision(webvision)
    noisy = add_symmetric_noise(index, 1.0, "symmetric-other", max_label=2)
    rows = np.flatnonzero(index.labels()[:9] < 2)
    assert (noisy.labels()[rows] == 1 - index.labels()[rows]).all()
    others = np.setdiff1d(np.arange(13), rows)
    assert (noisy.labels()[others] == index.labels()[others]).all()
    with pytest.raises(ValueError, match="max_label is 5; the index has 4 classes"):
        add_symmetric_noise(index, 0.4, max_label=5)


def test_noise_on_noise_is_refused(webvision):
    noisy = add_symmetric_noise(index_webvision(webvision), 0.4)
    with pytest.raises(ValueError, match=r"has symmetric noise of rate 0\.4 already"):
        add_symmetric_noise(noisy, 0.4)


def test_an_unknown_split_is_refused(webvision):
    with pytest.raises(ValueError, match="no samples with split='test'"):
        add_symmetric_noise(index_webvision(webvision), 0.4, split="test")
