"""Classes of features that are easy to tell apart, some of the labels wrong."""

import numpy as np


def blobs(n=400, classes=3, rate=0.2, seed=0, spread=0.6):
    """Features [N, 4], given labels and clean labels; which labels are wrong is drawn."""
    random = np.random.default_rng(seed)
    clean = np.arange(n) % classes
    centres = 3 * np.eye(4)[:classes]
    features = (centres[clean] + spread * random.normal(size=(n, 4))).astype(np.float32)
    given = clean.copy()
    wrong = random.random(n) < rate
    given[wrong] = (clean[wrong] + random.integers(1, classes, wrong.sum())) % classes
    return features, given, clean
