"""Colourings: every entry comes back exactly, from as few passes as is known to be possible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pushforward.coloring import (
    Coloring,
    acyclic,
    by_both,
    by_columns,
    by_rows,
    diagonal,
    direct,
    greedy,
    lattice,
    recover,
    seeds,
    star,
    stars,
    symmetric,
)
from pushforward.coloring.cliques import largest_clique
from pushforward.errors import DimensionError, InputError, ShapeError
from pushforward.pattern import Pattern

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=10))
SQUARES = st.integers(0, 10).flatmap(lambda n: arrays(bool, (n, n)))


def grid_pattern(grid, offsets, periodic: bool = False) -> Pattern:
    """Each place of a grid depends on the places at the offsets."""
    places = np.indices(grid).reshape(len(grid), -1)
    sizes = np.array(grid)[:, None]
    rows, columns = [], []
    for offset in offsets:
        reached = places + np.array(offset)[:, None]
        inside = np.ones(places.shape[1], bool)
        if not periodic:
            inside = ((reached >= 0) & (reached < sizes)).all(0)
        rows.append(np.flatnonzero(inside))
        columns.append(np.ravel_multi_index(tuple((reached % sizes)[:, inside]), grid))
    size = places.shape[1]
    return Pattern.of(np.concatenate(rows), np.concatenate(columns), (size, size))


def cross(axes: int) -> list[tuple[int, ...]]:
    steps = np.eye(axes, dtype=int)
    return [(0,) * axes, *map(tuple, steps), *map(tuple, -steps)]


def banded(n: int, width: int) -> Pattern:
    return grid_pattern((n,), [(k,) for k in range(-width, width + 1)])


def ring(n: int) -> Pattern:
    return grid_pattern((n,), cross(1), periodic=True)


def brusselator(side: int) -> Pattern:
    """Two species on a periodic grid: each diffuses and reacts with the other in place."""
    alone = grid_pattern((side, side), cross(2), periodic=True)
    rows, columns = alone.nonzero()
    size, places = side**2, np.arange(side**2)
    return Pattern.of(
        np.concatenate([rows, rows + size, places, places + size]),
        np.concatenate([columns, columns + size, places + size, places]),
        (2 * size, 2 * size),
    )


def arrow(n: int) -> Pattern:
    places, hub = np.arange(n), np.zeros(n, dtype=int)
    return Pattern.of(
        np.concatenate([places, places, hub]), np.concatenate([places, hub, places]), (n, n)
    )


def block_diagonal(blocks: int, m: int, n: int) -> Pattern:
    return Pattern.of_dense(np.kron(np.eye(blocks), np.ones((m, n))))


def convolutions(channels: int, side: int, radius: int) -> Pattern:
    near = range(-radius, radius + 1)
    offsets = itertools.product(range(1 - channels, channels), near, near)
    return grid_pattern((channels, side, side), offsets)


def random_mask(m: int, n: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((m, n)) < density


def filled(pattern: Pattern, symmetrically: bool = False) -> np.ndarray:
    """A matrix with this pattern of small integers other than zero: sums of them are exact."""
    entries = np.random.default_rng(3).integers(1, 10, pattern.shape).astype(float)
    if symmetrically:
        entries = np.triu(entries) + np.triu(entries, 1).T
    return entries * pattern.todense()


def passes_of(coloring: Coloring, matrix: np.ndarray) -> tuple[np.ndarray | None, ...]:
    pushed = pulled = None
    if coloring.column_colors is not None:
        pushed = seeds(coloring.column_colors) @ matrix.T
    if coloring.row_colors is not None:
        pulled = seeds(coloring.row_colors) @ matrix
    return pushed, pulled


def assert_recovers(pattern: Pattern, coloring: Coloring) -> None:
    matrix = filled(pattern, symmetrically=coloring.kind in ("star", "acyclic"))
    expected = matrix[pattern.nonzero()]
    if coloring.kind == "diagonal":
        expected = matrix.diagonal()
    np.testing.assert_array_equal(recover(coloring, *passes_of(coloring, matrix)), expected)
    assert coloring.passes >= coloring.lower_bound
    assert_no_pass_is_empty(coloring)


def assert_no_pass_is_empty(coloring: Coloring) -> None:
    for colors in (coloring.column_colors, coloring.row_colors):
        if colors is not None:
            assert set(colors.tolist()) - {-1} == set(range(int(colors.max(initial=-1)) + 1))


@given(MASKS)
def test_any_pattern_is_recovered_by_columns_and_by_rows(mask: np.ndarray):
    pattern = Pattern.of_dense(mask)
    for coloring in (by_columns(pattern), by_rows(pattern)):
        assert_recovers(pattern, coloring)
        assert coloring.source.dtype == np.int64


@given(MASKS)
def test_any_split_into_rows_and_columns_is_recovered(mask: np.ndarray):
    pattern = Pattern.of_dense(mask)
    one_sided = min(by_columns(pattern).passes, by_rows(pattern).passes)
    for limit in (None, one_sided, one_sided + 3):
        found = by_both(pattern, fewer_than=limit)
        if found is not None:
            assert_recovers(pattern, found)
            assert limit is None or found.passes < limit
            assert min(found.jvps, found.vjps) > 0


@given(SQUARES, st.sampled_from(["columns", "rows"]))
def test_any_diagonal_is_recovered(mask: np.ndarray, by: str):
    pattern = Pattern.of_dense(mask)
    coloring = diagonal(pattern, by=by)
    assert_recovers(pattern, coloring)
    assert (coloring.row_colors is None) == (by == "columns")
    np.testing.assert_array_equal(coloring.source >= 0, mask.diagonal())


@given(SQUARES)
def test_any_symmetric_pattern_is_recovered(mask: np.ndarray):
    pattern = Pattern.of_dense(mask | mask.T)
    assert_recovers(pattern, star(pattern))
    assert_recovers(pattern, acyclic(pattern))


@pytest.mark.parametrize("patient", [True, False])
@given(mask=SQUARES, random=st.randoms(use_true_random=False))
def test_greedy_star_colours_are_star_colours_in_any_order(patient: bool, mask, random):
    pattern = Pattern.of_dense(mask | mask.T | np.eye(len(mask), dtype=bool))
    order = list(range(len(mask)))
    random.shuffle(order)
    colors = stars.star_colors(pattern, np.array(order, dtype=int), patient)
    assert_star_coloring(pattern.todense(), colors)


def assert_star_coloring(graph: np.ndarray, colors: np.ndarray) -> None:
    """Neighbours differ, and of each two colours every component is a star: by definition."""
    graph = graph & ~np.eye(len(graph), dtype=bool)
    for one, other in itertools.combinations(np.unique(colors), 2):
        chosen = np.isin(colors, [one, other])
        degrees = (graph & chosen & chosen[:, None]).sum(1)
        ends = graph & chosen & chosen[:, None]
        assert not (ends & (degrees > 1) & (degrees > 1)[:, None]).any()
    assert not (graph & (colors == colors[:, None])).any()


@pytest.mark.parametrize("colour", [greedy._greedy_in_integers, greedy._greedy_in_words])
def test_both_ways_to_be_greedy_give_the_same_colours(colour):
    pattern = Pattern.of_dense(random_mask(60, 90, 0.4))
    order = greedy.largest_first(pattern)
    assert_distance_two(pattern, colour(pattern.T, order))
    np.testing.assert_array_equal(colour(pattern.T, order), greedy.greedy(pattern.T, order))


def test_words_grow_beyond_sixty_four_colours():
    pattern = Pattern.of_dense(np.ones((2, 150)))
    colors = greedy._greedy_in_words(pattern.T, np.arange(150))
    np.testing.assert_array_equal(colors, np.arange(150))


def assert_distance_two(pattern: Pattern, colors: np.ndarray) -> None:
    for row in pattern.todense():
        assert len(set(colors[row])) == row.sum()


@pytest.mark.parametrize("order", greedy.ORDERS)
def test_orders_hold_each_column_with_entries_once(order):
    pattern = Pattern.of_dense(random_mask(40, 70, 0.05))
    np.testing.assert_array_equal(np.sort(order(pattern)), np.flatnonzero(pattern.column_lengths))


def test_neighbours_are_counted_once_or_for_each_row():
    mask = random_mask(30, 20, 0.2).astype(int)
    pattern, shared = Pattern.of_dense(mask), mask.T @ mask
    np.testing.assert_array_equal(greedy.distinct_neighbours(pattern), (shared > 0).sum(1))
    np.testing.assert_array_equal(greedy.neighbours(pattern), shared.sum(1) - mask.sum(0))


FEWEST = {
    "nothing": (Pattern.of([], [], (3, 5)), 0),
    "no rows": (Pattern.of([], [], (0, 5)), 0),
    "one": (Pattern.of_dense(np.ones((1, 1))), 1),
    "identity": (Pattern.of_dense(np.eye(7)), 1),
    "permutation": (Pattern.of_dense(np.eye(7)[[3, 1, 0, 2, 6, 5, 4]]), 1),
    "full": (Pattern.of_dense(np.ones((4, 6))), 6),
    "tridiagonal": (banded(1000, 1), 3),
    "heat on a ring": (ring(200), 4),
    "ring, divisible": (ring(201), 3),
    "long ring": (ring(1001), 4),
    "band of 9": (banded(300, 4), 9),
    "5-point": (grid_pattern((30, 30), cross(2)), 5),
    "5-point, periodic": (grid_pattern((30, 40), cross(2), periodic=True), 5),
    "9-point": (grid_pattern((17, 30), itertools.product((-1, 0, 1), repeat=2)), 9),
    "7-point": (grid_pattern((10, 11, 12), cross(3)), 7),
    "blocks": (block_diagonal(16, 7, 5), 5),
    "convolutions": (convolutions(2, 16, 3), 98),
}


@pytest.mark.parametrize(("pattern", "fewest"), FEWEST.values(), ids=FEWEST)
def test_the_lower_bound_is_met(pattern: Pattern, fewest: int):
    coloring = by_columns(pattern)
    assert (coloring.passes, coloring.lower_bound) == (fewest, fewest)
    assert_recovers(pattern, coloring)
    assert by_rows(pattern.T).passes == fewest


GRIDS = {
    "5-point": ((30, 30), grid_pattern((30, 30), cross(2)), 5),
    "7-point": ((10, 10, 10), grid_pattern((10, 10, 10), cross(3)), 7),
    "convolutions": ((3, 24, 24), convolutions(3, 24, 5), 363),
    "axis of one": ((1, 40, 1), banded(40, 2), 5),
}


@pytest.mark.parametrize(("grid", "pattern", "fewest"), GRIDS.values(), ids=GRIDS)
def test_grids_may_be_given(grid, pattern: Pattern, fewest: int):
    assert by_columns(pattern, grid=grid).passes == fewest
    assert by_rows(pattern, grid=grid).passes == fewest


BIG = {
    "Burgers": (banded(10**5, 1), None, 3),
    "7-point": (grid_pattern((40, 40, 40), cross(3)), (40, 40, 40), 7),
    "five convolutions": (convolutions(3, 64, 5), (3, 64, 64), 363),
    "blocks": (block_diagonal(64, 32, 32), None, 32),
}


@pytest.mark.parametrize(("pattern", "grid", "fewest"), BIG.values(), ids=BIG)
def test_large_stencils_need_no_greedy_order(
    pattern: Pattern, grid, fewest: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(direct, "greedy", None)
    assert by_columns(pattern, grid=grid).passes == fewest


def test_the_brusselator_takes_eight_passes():
    pattern = brusselator(32)
    for coloring in (by_columns(pattern), by_rows(pattern), by_columns(pattern, (2, 32, 32))):
        assert coloring.passes <= 8
        assert_recovers(pattern, coloring)


@pytest.mark.parametrize("n", [5, 500])
def test_an_arrow_of_any_size_takes_three_passes(n: int):
    coloring = by_both(arrow(n))
    assert coloring.passes == 3
    assert_recovers(arrow(n), coloring)
    assert by_columns(arrow(n)).passes == n


@pytest.mark.parametrize("mirrored", [False, True])
def test_several_long_rows_are_taken_apart(mirrored: bool):
    mask = np.eye(60, 40) + np.eye(60, 40, k=1) + np.eye(60, 40, k=-30)
    mask[[3, 31, 50]] = 1
    pattern = Pattern.of_dense(mask.T if mirrored else mask)
    coloring = by_both(pattern, fewer_than=20)
    assert (coloring.vjps, coloring.jvps) == (3, 3)
    assert_recovers(pattern, coloring)


def test_no_split_is_made_that_does_not_pay():
    assert by_both(banded(50, 1)) is None
    assert by_both(arrow(20), fewer_than=3) is None


def test_many_different_lengths_are_thinned_out():
    mask = np.tril(np.ones((80, 80)))
    found = by_both(Pattern.of_dense(mask), fewer_than=200)
    assert_recovers(Pattern.of_dense(mask), found)


DIAGONALS = {
    "nothing": (Pattern.of([], [], (3, 3)), 0),
    "off the diagonal": (Pattern.of([0], [1], (2, 2)), 0),
    "identity": (Pattern.of_dense(np.eye(5)), 1),
    "full": (Pattern.of_dense(np.ones((6, 6))), 6),
    "triangular": (Pattern.of_dense(np.tril(np.ones((6, 6)))), 6),
    "tridiagonal": (banded(1000, 1), 2),
    "5-point": (grid_pattern((30, 30), cross(2)), 2),
    "9-point": (grid_pattern((30, 30), itertools.product((-1, 0, 1), repeat=2)), 4),
    "arrow": (arrow(50), 2),
    "odd ring": (ring(7), 3),
    "blocks": (block_diagonal(8, 5, 5), 5),
}


@pytest.mark.parametrize(("pattern", "fewest"), DIAGONALS.values(), ids=DIAGONALS)
def test_diagonals_take_fewer_passes(pattern: Pattern, fewest: int):
    assert diagonal(pattern).passes == fewest
    assert diagonal(pattern).passes <= by_columns(pattern).passes
    assert_recovers(pattern, diagonal(pattern))


def test_cliques_are_cliques():
    pairs = Pattern.of_dense([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    assert largest_clique(pairs) == 3


HESSIANS = {
    "nothing": (Pattern.of([], [], (4, 4)), 0, 0),
    "diagonal": (Pattern.of_dense(np.eye(4)), 1, 1),
    "without diagonal": (Pattern.of_dense(1 - np.eye(3)), 3, 3),
    "tridiagonal": (banded(100, 1), 3, 2),
    "long tridiagonal": (banded(1000, 1), 3, 3),
    "arrow": (arrow(500), 2, 2),
    "ring": (ring(200), 3, 3),
    "full": (Pattern.of_dense(np.ones((5, 5))), 5, 5),
    "5-point": (grid_pattern((30, 30), cross(2)), 5, 4),
    "7-point": (grid_pattern((6, 7, 8), cross(3)), 7, 6),
}


@pytest.mark.parametrize(("pattern", "by_star", "by_trees"), HESSIANS.values(), ids=HESSIANS)
def test_symmetry_saves_passes(pattern: Pattern, by_star: int, by_trees: int):
    direct_one, substituted = star(pattern), acyclic(pattern)
    assert direct_one.passes <= by_star
    assert substituted.passes <= by_trees
    assert_recovers(pattern, direct_one)
    assert_recovers(pattern, substituted)
    assert len(substituted.steps) <= symmetric.LEVELS


def test_steps_subtract_only_what_earlier_steps_have_found():
    coloring = acyclic(grid_pattern((12, 12), cross(2)))
    assert coloring.steps
    final = set(range(len(coloring.source)))
    for step in coloring.steps[::-1]:
        final -= set(step.targets.tolist())
        assert set(step.operands.tolist()) <= final
        assert step.targets.shape == step.operands.shape


def test_steps_are_index_add_of_torch():
    torch = pytest.importorskip("torch")
    pattern = grid_pattern((9, 8), cross(2))
    coloring = acyclic(pattern)
    matrix = filled(pattern, symmetrically=True)
    pushed, _ = passes_of(coloring, matrix)
    values = torch.from_numpy(pushed.ravel())[torch.from_numpy(coloring.source)]
    for step in coloring.steps:
        targets, operands = map(torch.from_numpy, step)
        values = values.index_add(-1, targets, values.index_select(-1, operands), alpha=-1)
    np.testing.assert_array_equal(values.numpy(), matrix[pattern.nonzero()])


def test_colourings_are_the_same_every_time():
    pattern = Pattern.of_dense(random_mask(50, 80, 0.1))
    first, second = by_columns(pattern), by_columns(pattern)
    np.testing.assert_array_equal(first.column_colors, second.column_colors)


# What a widely used largest-first search needs on these, by columns and by rows.
LARGEST_FIRST = {
    (200, 300, 0.01, 10): (9, 6),
    (200, 300, 0.02, 20): (13, 12),
    (200, 300, 0.03, 30): (20, 19),
    (200, 300, 0.05, 50): (39, 38),
    (400, 400, 0.01, 110): (10, 11),
    (400, 400, 0.03, 130): (37, 36),
}


@pytest.mark.parametrize(("case", "known"), LARGEST_FIRST.items(), ids=str)
def test_random_patterns_take_no_more_than_is_known(case, known: tuple[int, int]):
    *size_and_density, seed = case
    pattern = Pattern.of_dense(random_mask(*size_and_density, seed))
    assert by_columns(pattern).passes <= known[0]
    assert by_rows(pattern).passes <= known[1]


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(5, 7), (8, 8), (3, 4, 5)]),
    st.booleans(),
    st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=6),
)
def test_lattices_are_right_on_any_stencil(grid, periodic: bool, offsets):
    pattern = grid_pattern(grid, [offset[: len(grid)] for offset in offsets], periodic)
    found = lattice.lattice_colors(pattern, grid, 1, pattern.shape[1] + 1)
    if found is not None:
        assert_distance_two(pattern, found)


def test_an_entry_out_of_line_refutes_a_lattice():
    rows, columns = banded(3000, 1).nonzero()
    pattern = Pattern.of([*rows, 1234], [*columns, 1239], (3000, 3000))
    coloring = by_columns(pattern)
    assert coloring.passes == 4
    assert len(lattice.clashing_rows(pattern, np.arange(3000) % 3)) == 1
    assert_recovers(pattern, coloring)


def test_clashes_are_found_among_few_entries_and_many_colours():
    pattern = Pattern.of([5, 5, 9000], [0, 3, 2], (10_000, 1000))
    colors = np.arange(1000)
    assert not len(lattice.clashing_rows(pattern, colors))
    colors[3] = 0
    assert lattice.clashing_rows(pattern, colors).tolist() == [5]


REFUSED = {
    "grid": (lambda: by_columns(banded(6, 1), grid=(2, 4)), ShapeError, "product 6"),
    "not square": (lambda: diagonal(Pattern.of([], [], (2, 3))), DimensionError, "square"),
    "star": (lambda: star(Pattern.of([0], [1], (2, 2))), InputError, "pattern.union"),
    "acyclic": (lambda: acyclic(Pattern.of([0], [1], (2, 2))), InputError, "symmetric"),
    "seeds": (lambda: seeds(np.array([0, 3]), 2), InputError, "at least 4 passes"),
    "pushed": (
        lambda: recover(by_columns(banded(5, 1)), np.ones((2, 5))),
        ShapeError,
        r"pushed expects \(3, size\)",
    ),
    "pulled": (lambda: recover(by_rows(banded(5, 1))), ShapeError, "pulled expects"),
    "no star": (
        lambda: stars.read_either_end(banded(4, 1), np.array([0, 1, 0, 1])),
        InputError,
        "expected a star colouring",
    ),
}


@pytest.mark.parametrize(("act", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_coloured_is_refused(act, error, words: str):
    with pytest.raises(error, match=words):
        act()


def test_trees_too_deep_or_patterns_too_large_are_given_up(monkeypatch: pytest.MonkeyPatch):
    chain = banded(40, 1)
    monkeypatch.setattr(symmetric, "LEVELS", 3)
    assert acyclic(chain).passes == 3
    monkeypatch.setattr(symmetric, "TREES", ())
    assert acyclic(chain) is None
    monkeypatch.setattr(symmetric, "MOST_ENTRIES", 10)
    assert acyclic(chain) is None


def test_a_colouring_says_what_it_is():
    assert repr(by_columns(banded(5, 1))) == "Coloring(columns: 3 J v + 0 J^T u, at least 3)"
    assert seeds(np.array([1, -1, 0])).tolist() == [[False, False, True], [True, False, False]]
    assert seeds(np.array([0]), 2).tolist() == [[True], [False]]


def test_no_search_is_made_where_all_columns_meet(monkeypatch: pytest.MonkeyPatch):
    mask = random_mask(60, 40, 0.6)
    monkeypatch.setattr(direct, "LARGE", 0)
    monkeypatch.setattr(direct, "greedy", None)
    assert by_columns(Pattern.of_dense(mask)).passes == 40
    monkeypatch.undo()
    assert by_columns(Pattern.of_dense(mask)).passes == 40


def test_large_patterns_are_split_only_where_passes_may_halve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pushforward.coloring.both.LARGE", 0)
    assert by_both(arrow(20), fewer_than=7) is None
    assert by_both(arrow(20), fewer_than=8).passes == 3
