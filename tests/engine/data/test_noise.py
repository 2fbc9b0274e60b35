"""Label noise: its statistics for every kind, and that it depends on seed and sample id only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mentorch.engine.data import noise as module
from mentorch.engine.data.index import Index
from mentorch.engine.data.instance_noise import thumbnails
from mentorch.engine.data.noise import Noise, add_noise
from mentorch.engine.data.noise_kinds import measured_matrix, transition_matrix
from mentorch.engine.data.webvision import index_webvision

N, C = 100_000, 10
LABELS = np.arange(N) % C
MATRIX = np.random.default_rng(0).dirichlet(np.ones(C), C)  # all entries differ
MATRIX[2] = np.eye(C)[7]  # a certain outcome
MATRIX[4, [0, 3, 9]] = 0  # impossible ones: first, middle, last
MATRIX[4] /= MATRIX[4].sum()
NOISES = {
    "symmetric": Noise("symmetric", 0.4, 7),
    "symmetric-other": Noise("symmetric-other", 0.4, 7),
    "pair": Noise("pair", 0.4, 7),
    "asymmetric": Noise("asymmetric", 0.4, 7, mapping="cifar10"),
    "matrix": Noise("matrix", seed=7, matrix=MATRIX),
}
FIRST = {
    "symmetric": [7, 1, 2, 6, 6, 7, 3, 0, 8, 5, 0, 1],
    "symmetric-other": [8, 1, 3, 6, 7, 7, 2, 0, 8, 4, 1, 1],
    "pair": [0, 2, 2, 3, 4, 5, 6, 7, 8, 0, 0, 2],
    "asymmetric": [0, 1, 0, 3, 4, 3, 6, 7, 8, 1, 0, 1],
    "matrix": [1, 6, 7, 4, 2, 0, 3, 1, 6, 3, 4, 6],
}
by_kind = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


@pytest.mark.parametrize(
    ("kind", "wrong"), [("symmetric", 0.4 * (1 - 1 / C)), ("symmetric-other", 0.4)]
)
def test_share_of_wrong_labels(kind, wrong):
    noisy = Noise(kind, 0.4, 1).apply(LABELS, C)
    assert (noisy != LABELS).mean() == pytest.approx(wrong, abs=5 * np.sqrt(0.25 / N))


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-other"])
def test_new_labels_are_uniform(kind):
    """All replaced: each of the C (or C − 1) classes as often, for every old label."""
    noisy = Noise(kind, 1.0, 1).apply(LABELS, C)
    counts = np.zeros((C, C))
    np.add.at(counts, (LABELS, noisy), 1)
    expected = np.full((C, C), N / C / C)
    if kind == "symmetric-other":
        expected = (1 - np.eye(C)) * N / C / (C - 1)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(N / C / (C - 1))
    if kind == "symmetric-other":
        assert (noisy != LABELS).all()


def test_whether_and_what_are_independent():
    noisy = Noise("symmetric", 0.1, 1).apply(LABELS, C)
    changed = noisy[noisy != LABELS]
    shares = np.bincount(changed, minlength=C) / len(changed)
    assert shares == pytest.approx(np.full(C, 1 / C), abs=0.02)


@by_kind
def test_measured_matrix_is_the_expected_one(noise):
    """N / C = 10,000 samples a row: five standard deviations of an entry are at most 0.025."""
    T = noise.transition(C)
    measured = measured_matrix(noise.apply(LABELS, C), LABELS, C)
    assert (np.abs(measured - T) <= 5 * np.sqrt(T * (1 - T) / (N / C))).all()  # exact for 0 and 1


@by_kind
def test_depends_on_seed_and_sample_id_only(noise):
    whole = noise.apply(LABELS, C)
    some = np.random.default_rng(0).permutation(N)[:1000]
    assert (noise.apply(LABELS[some], C, some) == whole[some]).all()
    other = replace(noise, seed=8).apply(LABELS, C)
    assert (other != whole).mean() > 0.1


def test_the_first_and_last_word_draw_what_is_possible():
    """Chance will not meet them: impossible classes at either end of a row, and between."""
    T = np.array([[0, 0.5, 0, 0.5, 0]] * 5)
    words = np.array([0, 2**31 - 1, 2**31, 2**32 - 1])
    assert module._from_matrix(np.arange(4), T, words).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-other", "pair"])
def test_more_noise_keeps_what_less_noise_replaced(kind):
    more, less = (Noise(kind, rate, 7).apply(LABELS, C) for rate in (0.4, 0.2))
    rows = (less != LABELS) & ((LABELS < C - 1) | (kind != "pair"))
    assert (more[rows] == less[rows]).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(2, 40),
    st.sampled_from(["symmetric", "symmetric-other", "pair", "asymmetric"]),
    st.floats(0, 1),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=50, unique=True),
)
def test_any_seed_ids_and_classes(seed, classes, kind, rate, ids):
    """Labels stay in range, each alone gets what it gets among others, and nothing else moves."""
    mapping = {0: classes - 1} if kind == "asymmetric" else None
    noise = Noise(kind, rate, seed, mapping)
    ids = np.array(ids)
    labels = ids % classes
    noisy = noise.apply(labels, classes, ids)
    assert (transition_matrix(kind, rate, classes, mapping)[labels, noisy] > 0).all()
    for k in range(len(ids)):
        assert noise.apply(labels[k : k + 1], classes, ids[k : k + 1]) == noisy[k]


def test_these_numbers_are_part_of_the_format():
    """An index made today is the index made tomorrow: the first labels, written down."""
    first = [9, 8, 0, 0, 9, 0, 0, 1, 0, 3, 0, 2]
    assert Noise("symmetric", 0.5, 0).apply(np.zeros(12, np.int64), C).tolist() == first


def test_the_other_kinds_numbers_are_too():
    """Written down when the kinds were made: see above."""
    labels = np.arange(12) % C
    found = {kind: noise.apply(labels, C).tolist() for kind, noise in NOISES.items()}
    assert found == FIRST


def test_none_and_all():
    pairs = {0: 1, 1: 0}
    for kind in ("symmetric", "symmetric-other", "pair", "asymmetric"):
        mapping = pairs if kind == "asymmetric" else None
        assert (Noise(kind, 0.0, mapping=mapping).apply(LABELS, C) == LABELS).all()
    zeros = np.zeros(9, np.int64)
    assert (Noise("symmetric-other", 1.0).apply(zeros, 2) == 1).all()
    assert (Noise("pair", 1.0).apply(LABELS, C) == (LABELS + 1) % C).all()
    assert (Noise("asymmetric", 1.0, mapping=pairs).apply(zeros, 3) == 1).all()
    assert not len(Noise("pair", 0.4).apply(zeros[:0], C))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rate": 1.2}, "noise rate is 1.2"),
        ({"rate": float("nan")}, "noise rate is nan"),
        ({}, "noise rate is None"),
        ({"rate": 0.4, "kind": "flip"}, "noise kind 'flip' is unknown; it is one of"),
        ({"kind": "matrix", "matrix": MATRIX, "rate": 0.4}, r"takes no rate \(0.4\)"),
        ({"kind": "matrix"}, "matrix noise needs a matrix"),
        ({"kind": "asymmetric", "rate": 0.4}, "asymmetric noise needs a mapping"),
        ({"kind": "pair", "rate": 0.4, "mapping": "mnist"}, "mapping is for asymmetric noise"),
        ({"kind": "pair", "rate": 0.4, "matrix": MATRIX}, "matrix is for matrix noise"),
    ],
)
def test_bad_noise(arguments, error):
    with pytest.raises(ValueError, match=error):
        Noise(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([0], 1), "symmetric-other noise needs at least two classes, not 1"),
        (([0, 3, 4], 3, [5, 6, 7]), r"label 3 of sample 6 is not in 0\.\.2"),
        (([0, -1], 3), "label -1 of sample 1"),
        (([0, 1], 3, [5]), "1 sample ids do not fit 2 labels"),
        (([0, 1, 2], 3, [5, 6, 6]), "sample id 6 is there twice"),
    ],
)
def test_bad_samples(arguments, error):
    with pytest.raises(ValueError, match=error):
        Noise("symmetric-other", 0.4).apply(*arguments)


@pytest.mark.parametrize("change", [0.36, 0.44])
def test_a_wrong_share_cannot_pass(monkeypatch, change):
    """A defect: 0.4 was asked for and something near it is made."""
    chosen = np.random.default_rng(1).random(N) < change
    monkeypatch.setattr(
        module, "_from_matrix", lambda *_: np.where(chosen, (LABELS + 1) % C, LABELS)
    )
    with pytest.raises(AssertionError, match="labels changed and 40,000"):
        Noise("pair", 0.4).apply(LABELS, C)


def test_an_impossible_change_cannot_pass(monkeypatch):
    """A defect: the share is right and the direction is not."""
    chosen = np.random.default_rng(1).random(N) < 0.4
    monkeypatch.setattr(
        module, "_from_matrix", lambda *_: np.where(chosen, (LABELS - 1) % C, LABELS)
    )
    with pytest.raises(AssertionError, match="cannot become"):
        Noise("pair", 0.4).apply(LABELS, C)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.3])
def test_the_check_lets_chance_pass(rate):
    """Small data sets, where a limit of five standard deviations alone would raise."""
    for seed in range(300):
        Noise("pair", rate, seed).apply(np.arange(9), C)


def test_an_index_keeps_its_old_labels(webvision, put):
    put("info/clean_labels.txt", "google/q0002/same name 0.jpg 3\n")
    index = index_webvision(webvision)
    noisy = add_noise(index, Noise("symmetric-other", 1.0, 3))
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
        "expected_share": 1.0,
        "changed_share": 1.0,
        "wrong_share": wrong,
    }
    noisy.write(webvision / "noisy.parquet")
    read = Index.read(webvision / "noisy.parquet")
    assert read.table.equals(noisy.table)
    assert read.noise == noisy.noise


def test_max_label_keeps_the_mini_protocol_closed(webvision):
    index = index_webvision(webvision)
    noisy = add_noise(index, Noise("symmetric-other", 1.0), max_label=2)
    rows = np.flatnonzero(index.labels()[:9] < 2)
    assert (noisy.labels()[rows] == 1 - index.labels()[rows]).all()
    others = np.setdiff1d(np.arange(13), rows)
    assert (noisy.labels()[others] == index.labels()[others]).all()
    with pytest.raises(ValueError, match="max_label is 5; the index has 4 classes"):
        add_noise(index, Noise("pair", 0.4), max_label=5)


def test_noise_on_noise_is_refused(webvision):
    noisy = add_noise(index_webvision(webvision), Noise("symmetric", 0.4))
    with pytest.raises(ValueError, match=r"has symmetric noise of rate 0\.4 already"):
        add_noise(noisy, Noise("pair", 0.2))


def test_an_unknown_split_is_refused(webvision):
    with pytest.raises(ValueError, match="no samples with split='test'"):
        add_noise(index_webvision(webvision), Noise("pair", 0.4), split="test")


@pytest.mark.parametrize(
    ("noise", "entries"),
    [
        (Noise("asymmetric", 1.0, mapping="3:0,0:3"), {"mapping": {"0": 3, "3": 0}}),
        (Noise("matrix", matrix=np.eye(4)[[1, 2, 3, 0]]), {"rate": None}),
        (Noise("pair", 1.0), {"expected_share": 1.0, "changed_share": 1.0, "wrong_share": 1.0}),
    ],
)
def test_an_index_records_what_makes_its_noise_again(webvision, noise, entries):
    index = index_webvision(webvision)
    add_noise(index, noise).write(webvision / "noisy.parquet")
    read = Index.read(webvision / "noisy.parquet")
    assert read.noise.items() >= entries.items()
    options = {key: read.noise[key] for key in ("kind", "rate", "seed")}
    again = Noise(
        **options,
        mapping={int(k): v for k, v in read.noise.get("mapping", {}).items()} or None,
        matrix=read.noise.get("matrix"),
    )
    assert add_noise(index, again).table.equals(read.table)


def test_matrix_noise_on_noise_is_refused(webvision):
    noisy = add_noise(index_webvision(webvision), Noise("matrix", matrix=np.eye(4)))
    with pytest.raises(ValueError, match="has matrix noise already"):
        add_noise(noisy, Noise("pair", 0.2))


def test_instance_noise_reads_the_images_or_takes_features(webvision):
    index = index_webvision(webvision)
    noise = Noise("instance", 1.0)
    noisy = add_noise(index, noise)
    assert (noisy.labels()[:9] != index.labels()[:9]).all()
    assert noisy.noise["flip_rate_std"] == 0
    small = thumbnails(index, np.arange(9))
    same = add_noise(index, noise, images=lambda ids: small[ids])
    assert same.table.equals(noisy.table)
    other = add_noise(index, noise, images=lambda ids: 255 - small[ids])
    assert not other.table.equals(noisy.table)
