"""`Pattern` against scipy and dense masks."""

import builtins
import sys

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pushforward.errors import InputError, MissingDependencyError, ShapeError
from pushforward.pattern import DOTS_ACROSS, DOTS_DOWN, Pattern

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12))
EMPTY = [(0, 0), (0, 3), (4, 0), (2, 5)]


def banded(n: int) -> Pattern:
    return Pattern.of_dense(sum(np.eye(n, k=k) for k in (-1, 0, 1)))


@given(MASKS)
def test_a_mask_comes_back(mask: np.ndarray):
    pattern = Pattern.of_dense(mask)
    assert pattern.shape == mask.shape
    assert pattern.nnz == mask.sum()
    np.testing.assert_array_equal(pattern.todense(), mask)
    np.testing.assert_array_equal(np.stack(pattern.nonzero()), np.stack(np.nonzero(mask)))


@given(MASKS, st.randoms(use_true_random=False))
def test_order_and_repetition_of_entries_do_not_matter(mask: np.ndarray, random):
    rows, columns = np.nonzero(mask)
    chosen = [*range(len(rows)), *(random.randrange(len(rows)) for _ in rows)]
    random.shuffle(chosen)
    chosen = np.array(chosen, dtype=int)
    pattern = Pattern.of(rows[chosen], columns[chosen], mask.shape)
    assert pattern.same_as(Pattern.of_dense(mask))


@given(MASKS)
def test_it_agrees_with_scipy(mask: np.ndarray):
    theirs = scipy.sparse.csr_array(mask)
    pattern = Pattern.of_dense(mask)
    np.testing.assert_array_equal(pattern.indptr, theirs.indptr)
    np.testing.assert_array_equal(pattern.indices, theirs.indices)
    assert (pattern.to_scipy() != theirs).nnz == 0
    assert pattern.to_scipy().dtype == bool


@given(MASKS)
def test_the_transpose_knows_where_its_entries_come_from(mask: np.ndarray):
    pattern = Pattern.of_dense(mask)
    transpose, order = pattern.transposed()
    np.testing.assert_array_equal(transpose.todense(), mask.T)
    np.testing.assert_array_equal(pattern.rows[order], transpose.indices)
    np.testing.assert_array_equal(pattern.indices[order], transpose.rows)
    assert pattern.T is transpose


def test_a_transpose_with_many_columns_is_sorted_in_several_digits():
    columns = np.random.default_rng(0).integers(0, 300_000, 1000)
    pattern = Pattern.of(np.arange(1000) % 7, columns, (7, 300_000))
    np.testing.assert_array_equal(np.diff(pattern.T.indptr), pattern.column_lengths)
    assert pattern.T.T.same_as(pattern)


@given(MASKS)
def test_blocks_are_the_connected_components(mask: np.ndarray):
    m, n = mask.shape
    joint = np.zeros((m + n, m + n), dtype=int)
    joint[:m, m:] = mask
    _, labels = scipy.sparse.csgraph.connected_components(joint, directed=False)
    rows, columns = mask.any(1), mask.any(0)
    expected = [
        (
            np.flatnonzero((labels[:m] == label) & rows).tolist(),
            np.flatnonzero((labels[m:] == label) & columns).tolist(),
        )
        for label in dict.fromkeys(labels[:m][rows].tolist())
    ]
    found = [(b.rows.tolist(), b.columns.tolist()) for b in Pattern.of_dense(mask).blocks]
    assert found == expected


def test_blocks_of_a_shuffled_chain_are_one():
    n = 2000
    order = np.random.default_rng(1).permutation(n)
    chain = banded(n)
    shuffled = Pattern.of(order[chain.rows], order[chain.indices], (n, n))
    (block,) = shuffled.blocks
    np.testing.assert_array_equal(block.rows, np.arange(n))


def test_rows_without_entries_belong_to_no_block():
    rows, columns = Pattern.of([0, 2], [3, 1], (4, 5)).block_labels
    assert rows.tolist() == [0, -1, 1, -1]
    assert columns.tolist() == [-1, 1, -1, 0, -1]


@given(MASKS, st.data())
def test_covering_and_union_are_those_of_sets(mask: np.ndarray, data):
    other = data.draw(arrays(bool, mask.shape))
    one, two = Pattern.of_dense(mask), Pattern.of_dense(other)
    assert one.covers(two) == bool((mask | ~other).all())
    assert one.same_as(two) == np.array_equal(mask, other)
    np.testing.assert_array_equal(one.union(two).todense(), mask | other)


def test_other_shapes_are_never_covered():
    small, large = Pattern.of_dense(np.eye(2)), Pattern.of_dense(np.ones((2, 3)))
    assert not large.covers(small)
    assert not small.same_as(large)
    with pytest.raises(ShapeError, match=r"shape \(2, 2\), got \(2, 3\)"):
        small.union(large)


@given(MASKS)
def test_entries_are_found_by_their_coordinates(mask: np.ndarray):
    pattern = Pattern.of_dense(mask)
    rows, columns = np.indices(mask.shape).reshape(2, -1)
    expected = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    np.testing.assert_array_equal(pattern.find(rows, columns), expected.ravel())


def test_symmetry_is_of_places():
    assert banded(5).is_symmetric
    assert not Pattern.of([0], [1], (2, 2)).is_symmetric
    assert not Pattern.of_dense(np.ones((2, 3))).is_symmetric


@pytest.mark.parametrize("shape", EMPTY)
def test_patterns_without_entries_work_throughout(shape: tuple[int, int]):
    pattern = Pattern.of([], [], shape)
    assert (pattern.nnz, pattern.density, pattern.blocks) == (0, 0.0, ())
    assert pattern.T.shape == shape[::-1]
    assert str(pattern).startswith(f"{shape[0]} x {shape[1]}, 0 entries, density 0%")
    pattern.plot().figure.clear()


REFUSED = {
    "negative size": (lambda: Pattern.of([], [], (2, -1)), ShapeError, "pair of sizes"),
    "three sizes": (lambda: Pattern.of([], [], (2, 1, 1)), ShapeError, "rows come first"),
    "row outside": (lambda: Pattern.of([2], [0], (2, 1)), InputError, r"rows expects .* \[0, 2\)"),
    "column outside": (lambda: Pattern.of([0], [-1], (2, 1)), InputError, "columns expects"),
    "lengths": (lambda: Pattern.of([0, 1], [0], (2, 1)), ShapeError, "2 rows and 1 columns"),
    "not a matrix": (lambda: Pattern.of_dense(np.ones(3)), ShapeError, "expects a matrix"),
    "indptr": (lambda: Pattern((2, 2), [0, 1], [0]), ShapeError, "indptr expects 3 ascending"),
    "indptr down": (lambda: Pattern((2, 2), [0, 2, 1], [0]), ShapeError, "indptr expects"),
    "indices": (lambda: Pattern((2, 2), [0, 1, 2], [0]), ShapeError, "indices expects 2 columns"),
    "index": (lambda: Pattern((1, 2), [0, 1], [2]), InputError, r"columns in \[0, 2\)"),
    "unsorted": (lambda: Pattern((1, 3), [0, 2], [2, 1]), InputError, "use Pattern.of"),
    "repeated": (lambda: Pattern((2, 3), [0, 2, 3], [1, 1, 0]), InputError, "ascending"),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_pattern_is_refused(make, error, words: str):
    with pytest.raises(error, match=words):
        make()


def test_columns_may_descend_from_one_row_to_the_next():
    pattern = Pattern((4, 3), [0, 1, 1, 2, 3], [2, 0, 0])
    np.testing.assert_array_equal(pattern.rows, [0, 2, 3])


def test_the_representation_is_short():
    assert repr(banded(4)) == "Pattern(4 x 4, nnz=10, density=62.5%)"


def test_the_picture_shows_each_entry_of_a_small_pattern():
    picture = str(Pattern.of([0, 3, 4], [0, 1, 2], (5, 3))).splitlines()
    assert picture == ["5 x 3, 3 entries, density 20%", "⢁⠀", "⠀⠁"]
    assert str(Pattern.of([0], [0], (1, 1))) == "1 x 1, 1 entry, density 100%\n⠁"


@pytest.mark.parametrize("shape", [(1000, 1000), (5000, 3), (3, 5000), (121, 121)])
def test_the_picture_of_a_large_pattern_stays_small_and_misses_nothing(shape: tuple[int, int]):
    corner = Pattern.of([shape[0] - 1], [shape[1] - 1], shape)
    _, *lines = str(corner).splitlines()
    assert len(lines) <= DOTS_DOWN // 4
    assert max(map(len, lines)) <= DOTS_ACROSS // 2
    assert sum(character != "\u2800" for character in "".join(lines)) == 1


def test_notebooks_show_the_picture():
    shown = banded(3)._repr_html_()
    assert "3 x 3, 7 entries" in shown
    assert "<pre" in shown


DRAWN = {
    "cells": (banded(20), "images"),
    "markers": (Pattern.of(np.arange(400), np.arange(400), (400, 900)), "lines"),
    "densities": (banded(4000), "images"),
    "sliver": (Pattern.of(np.arange(900), np.arange(900) % 3, (900, 3)), "lines"),
}


@pytest.mark.parametrize(("pattern", "artist"), DRAWN.values(), ids=DRAWN)
def test_the_plot_chooses_how_to_draw(pattern: Pattern, artist: str):
    axes = pattern.plot()
    assert len(getattr(axes, artist)) == 1
    assert axes.get_title() == str(pattern).splitlines()[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    axes.figure.clear()


def test_the_plot_goes_into_given_axes():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert banded(3).plot(axes) is axes


def test_a_plot_without_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_matplotlib(name: str, *rest, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **keywords)

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        banded(3).plot()
