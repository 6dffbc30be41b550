"""Best-fit-decreasing packing: what always holds, known answers, and how close to full the bins get."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing import pack_best_fit, packing_efficiency


def naive_best_fit(lengths, capacity):
    """The definition, in O(n * bins): the fullest bin that still has room, else a new one."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = [members for members in bins if sum(members) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 200))
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


@given(problems())
@settings(max_examples=200, deadline=None)
def test_what_always_holds(problem):
    lengths, capacity = problem
    bins = pack_best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[index] for index in members) <= capacity for members in bins)
    assert bins == pack_best_fit(lengths, capacity)
    fewest = math.ceil(sum(lengths) / capacity)
    assert fewest <= len(bins) <= 2 * fewest  # two bins half empty would have been one


@given(problems())
@settings(max_examples=200, deadline=None)
def test_it_is_best_fit_decreasing(problem):
    lengths, capacity = problem
    packed = [sum(lengths[index] for index in members) for members in pack_best_fit(lengths, capacity)]
    assert sorted(packed) == sorted(map(sum, naive_best_fit(lengths, capacity)))


def test_known_answer():
    assert pack_best_fit([4, 8, 1, 4, 2, 1], capacity=10) == [[1, 2, 5], [0, 3, 4]]
    assert pack_best_fit([3, 3, 3], capacity=3) == [[0], [1], [2]]
    assert pack_best_fit([], capacity=5) == []


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_documents_that_fit_no_bin(lengths):
    with pytest.raises(ValueError, match=r"document \d has (11|0) tokens, a bin takes 1 to 10"):
        pack_best_fit(lengths, capacity=10)


def test_chat_like_lengths_fill_the_bins_in_little_time():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, size=50_000), 8, 4096).astype(int).tolist()
    started = time.perf_counter()
    bins = pack_best_fit(lengths, capacity=4096)
    assert time.perf_counter() - started < 5  # quadratic search over open bins would take minutes
    assert packing_efficiency(lengths, len(bins), 4096) > 0.99


def test_efficiency():
    assert packing_efficiency([4, 8, 4, 2], bins=2, capacity=10) == 0.9
    assert packing_efficiency([], bins=0, capacity=10) == 1.0
