"""Transition matrices, the mappings of confusable classes, and files that hold a matrix."""

import numpy as np
import pytest

from mentorch.engine.data.noise_kinds import (
    MAPPINGS,
    checked_matrix,
    measured_matrix,
    read_matrix,
    resolved_mapping,
    transition_matrix,
)

# CIFAR-100's coarse label of each fine label, as its files have it; the package has names instead.
COARSE = np.fromstring(
    """
    4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
    5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9
    13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13
    """,
    dtype=int,
    sep=" ",
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = (
    "top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("symmetric", [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]),
        ("symmetric-other", [[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]]),
        ("pair", [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]),
        ("asymmetric", [[1, 0, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]),
    ],
)
def test_matrices_by_hand(kind, expected):
    mapping = {1: 2, 2: 0} if kind == "asymmetric" else None
    assert transition_matrix(kind, 0.3, 3, mapping) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("name", MAPPINGS)
def test_named_mappings_are_matrices_of_their_classes(name):
    classes, pairs = MAPPINGS[name]
    T = checked_matrix(transition_matrix("asymmetric", 0.4, classes, name), classes)
    assert all(T[i, j] == pytest.approx(0.4) and i != j for i, j in pairs.items())
    assert (T > 0).sum() == classes + len(pairs)


def test_cifar10_by_name():
    pairs = {CIFAR10[i]: CIFAR10[j] for i, j in resolved_mapping("cifar10", 10).items()}
    assert pairs == {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }


def test_fashion_mnist_by_name():
    pairs = {FASHION[i]: FASHION[j] for i, j in resolved_mapping("fashion_mnist", 10).items()}
    assert pairs == {
        "boot": "sneaker",
        "sneaker": "sandal",
        "pullover": "shirt",
        "coat": "dress",
        "dress": "coat",
    }


def test_cifar100_goes_round_each_superclass():
    mapping = resolved_mapping("cifar100", 100)
    assert sorted(mapping) == sorted(mapping.values()) == list(range(100))
    for fine, target in mapping.items():
        superclass = COARSE[fine]
        group = np.flatnonzero(superclass == COARSE).tolist()
        assert target == group[(group.index(fine) + 1) % 5]


@pytest.mark.parametrize("mapping", [{3: 5, 5: 3}, "3:5,5:3", " 3 : 5 , 5:3 "])
def test_own_mappings(mapping):
    assert resolved_mapping(mapping, 10) == {3: 5, 5: 3}


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        (None, "needs a mapping of confusable classes: one of mnist, fashion_mnist"),
        ({3: 10}, "sends class 3 to 10; the classes are 0 to 9"),
        ("12:1", "sends class 12 to 1"),
        ({-1: 1}, "sends class -1 to 1"),
        ("3-5", "'3-5' in the mapping '3-5' is not a pair of classes"),
        ("3:5,", "'' in the mapping"),
        ("cifar", "'cifar' in the mapping"),
        ("3:5,3:6", "has class 3 twice"),
        ("cifar100", "that mapping is for 100 classes, and there are 10"),
    ],
)
def test_bad_mappings(mapping, error):
    with pytest.raises(ValueError, match=error):
        transition_matrix("asymmetric", 0.4, 10, mapping)


@pytest.mark.parametrize(
    ("kind", "rate", "classes", "error"),
    [
        ("pair", -0.1, 3, r"noise rate is -0\.1"),
        ("pair", 0.1, 1, "pair noise needs at least two classes, not 1"),
        ("symmetric", 0.1, 0, "needs at least one class, not 0"),
        ("matrix", 0.1, 3, "matrix noise is not described by a rate alone"),
        ("instance", 0.1, 3, "instance noise is not described by a rate alone"),
    ],
)
def test_bad_arguments(kind, rate, classes, error):
    with pytest.raises(ValueError, match=error):
        transition_matrix(kind, rate, classes)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (None, "needs the transition matrix"),
        (np.eye(3), r"has the shape \(3, 3\); 2 classes need \(2, 2\)"),
        ([[1, 0], [-0.5, 1.5]], r"has -0\.5 at \[1, 0\]"),
        ([[1, 0], [0.5, np.nan]], r"has nan at \[1, 1\]"),
        ([[1, 0], [0.5, 0.49]], r"row 1 of the transition matrix sums to 0\.99"),
        ([[1, 0], [0.5, 0.5 + 2e-6]], r"row 1 of the transition matrix sums to 1\.000002"),
    ],
)
def test_bad_matrices(matrix, error):
    with pytest.raises(ValueError, match=error):
        checked_matrix(matrix, 2)


def test_a_rounded_matrix_is_taken():
    assert checked_matrix([[1 / 3 - 3e-7, 2 / 3], [0, 1]], 2).shape == (2, 2)


def test_measured_matrix_counts_what_is_known():
    given = np.array([0, 1, 1, 0, 2])
    clean = np.array([0, 0, 0, -1, 2])
    measured = measured_matrix(given, clean, 3)
    expected = [[1 / 3, 2 / 3, 0], [np.nan] * 3, [0, 0, 1]]
    assert measured == pytest.approx(np.array(expected), nan_ok=True)


def test_files(tmp_path):
    T = np.array([[0.9, 0.1], [0.25, 0.75]])
    np.save(tmp_path / "T.npy", T)
    (tmp_path / "T.csv").write_text("0.9, 0.1\n0.25,0.75\n")
    for name in ("T.npy", "T.csv"):
        assert (read_matrix(tmp_path / name) == T).all()


def test_files_that_hold_no_matrix(tmp_path):
    np.save(tmp_path / "pickle.npy", np.eye(2).astype(object), allow_pickle=True)
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("pickle.npy", "words.csv", "empty.npy"):
        with pytest.raises(ValueError, match=f"{name} does not hold a matrix of numbers"):
            read_matrix(tmp_path / name)
    with pytest.raises(ValueError, match=r"T\.txt is neither \.npy nor \.csv"):
        read_matrix(tmp_path / "T.txt")
    with pytest.raises(FileNotFoundError):
        read_matrix(tmp_path / "none.npy")
