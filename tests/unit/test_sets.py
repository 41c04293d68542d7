"""The table of sets against Python's own sets."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pushforward.structure.sets import EMPTY, FIRST, VARIES, Sets, TooManySets

# Few variables stay lists; many, with large unions, become rows of bits.
COUNTS = st.sampled_from([1, 3, 70, 700])
seeds = st.integers(0, 10_000)


def contents(sets: Sets, numbers: np.ndarray) -> list[set[int]]:
    starts, members = sets.members(numbers.reshape(-1))
    assert (np.diff(starts) == sets.sizes(numbers.reshape(-1))).all()
    parts = [members[a:b] for a, b in pairwise(starts)]
    assert all((np.diff(part) > 0).all() for part in parts)  # sorted, each once
    return [set(part.tolist()) for part in parts]


def drawn(sets: Sets, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of sets, empty ones among them, of all sizes that unions have made so far."""
    return rng.integers(0, len(sets), shape).astype(np.int32)


@given(count=COUNTS, seed=seeds, rounds=st.integers(1, 6))
@settings(max_examples=60)
def test_unions_of_pairs(count: int, seed: int, rounds: int):
    rng, sets = np.random.default_rng(seed), Sets(count)
    for _ in range(rounds):
        one, other = drawn(sets, rng, (5, 1)), drawn(sets, rng, (7,))
        before = contents(sets, one), contents(sets, other)
        united = sets.unite(one, other)
        assert united.shape == (5, 7)
        expected = [a | b for a in before[0] for b in before[1]]
        assert contents(sets, united) == expected
        assert contents(sets, one) == before[0]  # what has a number keeps its meaning


@given(count=COUNTS, seed=seeds, length=st.integers(0, 130))
@settings(max_examples=60)
def test_unions_along_an_axis(count: int, seed: int, length: int):
    rng, sets = np.random.default_rng(seed), Sets(count)
    numbers = drawn(sets, rng, (3, length, 2))
    united = sets.unite_axis(numbers, 1)
    for i in range(3):
        for j in range(2):
            parts = contents(sets, numbers[i, :, j])
            assert contents(sets, united[i, j][None]) == [set().union(*parts)]


@given(count=COUNTS, seed=seeds)
@settings(max_examples=40)
def test_unions_of_ragged_groups(count: int, seed: int):
    rng, sets = np.random.default_rng(seed), Sets(count)
    lengths = rng.integers(0, 9, 6)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    numbers = drawn(sets, rng, (int(starts[-1]),))
    united = sets.unite_groups(starts, numbers)
    parts = [contents(sets, numbers[a:b]) for a, b in pairwise(starts)]
    assert contents(sets, united) == [set().union(*part) for part in parts]


@given(count=COUNTS, seed=seeds)
@settings(max_examples=40)
def test_equal_sets_have_one_number(count: int, seed: int):
    """Whatever the order in which a set was made, while the table is small."""
    rng, sets = np.random.default_rng(seed), Sets(count)
    chosen = sets.single(rng.choice(count, min(count, 6), replace=False))
    numbers = {int(sets.unite_axis(rng.permutation(chosen))) for _ in range(4)}
    assert len(numbers) == 1
    one_by_one = chosen[0]
    for each in chosen[1:]:
        one_by_one = sets.unite(np.asarray(one_by_one), each)
    assert int(one_by_one) in numbers


def test_the_two_empty_sets():
    """What varies without a derivative stays so beside a constant, and hides beside a variable."""
    sets = Sets(4)
    assert sets.unite(np.int32(EMPTY), np.int32(VARIES)) == VARIES
    assert sets.unite(np.int32(VARIES), sets.single(np.array(2))) == 2 + FIRST
    assert sets.unite_axis(np.array([EMPTY, VARIES, EMPTY])) == VARIES
    assert sets.unite_axis(np.zeros((0, 3), np.int32), 0).tolist() == [EMPTY] * 3
    assert sets.sizes(np.array([EMPTY, VARIES, FIRST])).tolist() == [0, 0, 1]


def test_lists_become_bits_and_mean_the_same():
    sets, count = Sets(400), 400
    singles = sets.single(np.arange(count))
    prefixes = [singles[0]]
    for each in singles[1:]:
        prefixes.append(sets.unite(np.asarray(prefixes[-1]), each))
    assert sets._bits is not None
    assert contents(sets, np.array(prefixes)) == [set(range(k + 1)) for k in range(count)]


def test_no_variables_at_all():
    sets = Sets(0)
    assert sets.unite(np.zeros(3, np.int32), np.ones(3, np.int32)).tolist() == [VARIES] * 3
    assert contents(sets, np.array([EMPTY, VARIES])) == [set(), set()]


def test_a_table_that_outgrows_its_budget_is_given_up():
    sets = Sets(1000, budget=20_000)
    rng = np.random.default_rng(0)
    with pytest.raises(TooManySets, match="20000 bytes"):
        sets.unite_axis(sets.single(rng.integers(0, 1000, (500, 60))))
