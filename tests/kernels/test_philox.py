"""Philox against the published answers of Random123 and a plain-integer implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mentorch.kernels.philox import Stream, philox, to_uniform

M32 = 0xFFFFFFFF


def signed64(value):
    return value - 2**64 if value >= 2**63 else value


def philox_in_integers(counter, key):
    """Salmon et al. 2011, Sec. 3.3, in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M32, (a >> 32) ^ c3 ^ k1, a & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return [c0, c1, c2, c3]


def words(seed, step, sample, stream):
    found = philox(seed, step, torch.tensor([signed64(sample)]), stream)
    return [int(word) for word in found]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123, "philox4x32 10": all zero, all ones, the digits of pi
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [M32, M32, M32, M32],
            [M32, M32],
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, answer):
    seed, sample = key[0] | key[1] << 32, counter[0] | counter[1] << 32
    assert words(seed, counter[2], sample, counter[3]) == answer


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    step=st.integers(0, M32),
    sample=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(list(Stream)),
)
def test_agrees_with_unbounded_integers(seed, step, sample, stream):
    counter = [sample & M32, sample >> 32, step, int(stream)]
    expected = philox_in_integers(counter, [seed & M32, (seed >> 32) & M32])
    assert words(seed, step, sample, stream) == expected


def test_seed_and_step_may_be_tensors():
    sample = torch.arange(5)
    numbers = philox(-3, 17, sample, Stream.CROP)
    tensors = philox(torch.tensor(-3), torch.tensor(17), sample, Stream.CROP)
    assert all(map(torch.equal, numbers, tensors))


def test_int32_sample_ids_draw_the_numbers_of_int64_ones():
    sample = torch.tensor([0, 1, 2**30, 2**31 - 1])
    wide = philox(5, 7, sample, Stream.ORDER)
    narrow = philox(5, 7, sample.to(torch.int32), Stream.ORDER)
    assert all(map(torch.equal, wide, narrow))


def test_shape_is_kept_and_words_are_32_bits():
    for word in philox(1, 2, torch.arange(12).view(3, 4), Stream.FLIP):
        assert word.shape == (3, 4)
        assert word.min() >= 0
        assert word.max() <= M32


def test_streams_steps_and_seeds_do_not_share_numbers():
    sample = torch.arange(1000)
    draws = [philox(seed, step, sample, s)[0] for seed in (0, 1) for step in (0, 1) for s in Stream]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            # Two independent words are equal with chance 2**-32.
            assert (first == second).sum() <= 1


def test_to_uniform_is_exact_and_below_one():
    word = torch.tensor([0, 255, 256, M32])
    # Exactly k · 2**-24: rounding 2**32 − 1 to float32 first would give 1.0.
    assert to_uniform(word).tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]
    assert to_uniform(word).dtype == torch.float32


def test_to_uniform_is_uniform_and_independent():
    n = 200_000
    u, v = (to_uniform(philox(9, step, torch.arange(n), 0)[0]).double() for step in (3, 4))
    # Bounds are five standard errors.
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    for other in (v, u.roll(1)):  # the next step, the next sample
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 5 / n**0.5
    counts = torch.histc(u, 64, 0.0, 1.0)
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert 63 - 5 * 126**0.5 < chi_square < 63 + 5 * 126**0.5  # mean 63, variance 126
