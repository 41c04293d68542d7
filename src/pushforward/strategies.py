"""The strategies, each exact: what each would cost, or why it does not apply.

A strategy is one function from a `Problem` to a `Candidate`, or to the reason why it does not
apply. All stand in `STRATEGIES`; the cheapest candidate wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pushforward.checks import why_not_forward
from pushforward.coloring import Coloring, acyclic, by_both, by_columns, by_rows, diagonal, star
from pushforward.coloring.scheme import read_columns, read_rows
from pushforward.compressed import Compressed
from pushforward.errors import DimensionError
from pushforward.factors import Split
from pushforward.meter import Cost
from pushforward.pattern import Pattern
from pushforward.problems import Problem
from pushforward.structure.cuts import chain, cuts

# How much dearer one kind of pass can be than the other: beyond it the count of passes decides.
_PASS_RATIO = 8
# Beyond this many bytes held by one pass, passes run faster one by one than in a batch.
_LARGE_PASS = 1 << 21
# A constant Jacobian with more entries than this is not kept.
_KEPT_ENTRIES = 1 << 23
# Up to so many times the passes, a kind of pass may still turn out to be the cheaper one.
_RIVAL = 1.6
# Patterns with more entries are coloured by one kind of pass alone.
_COLORED_TWICE = 1 << 20
# What the plain route must cost, as a multiple, for another to be worth its bookkeeping.
WORTHWHILE = 1.3


@dataclass(frozen=True)
class Candidate:
    """A strategy that applies, and its cost.

    Attributes:
        jvps, vjps: products J v and J^T u that one evaluation makes.
        work: what everything costs together, to compare by.
        cost: what one pass costs.
        scheme: how entries are found, where they are not simply rows or columns.
        rivals: the same by other passes at about the same cost: which is cheaper, their programs
            tell.
    """

    strategy: str
    jvps: int
    vjps: int
    work: float
    cost: Cost | None = None
    scheme: Compressed | Split | None = None
    rivals: tuple[Candidate, ...] = ()

    @property
    def passes(self) -> int:
        return self.jvps + self.vjps

    @property
    def compressed(self) -> Compressed | None:
        return self.scheme if isinstance(self.scheme, Compressed) else None

    @property
    def split(self) -> Split | None:
        return self.scheme if isinstance(self.scheme, Split) else None


def reverse(problem: Problem) -> Candidate | str:
    """Row by row: one backward pass for each output, many in one batch."""
    if not problem.linear.batched:
        return "not all of its ops can run under vmap"
    return _by_rows(problem, "reverse", small=1.0, large=1.3)


def loop(problem: Problem) -> Candidate | str:
    """Row by row through plain ``autograd.grad``, with nothing of ``torch.func``."""
    return _by_rows(problem, "loop", small=4.0, large=1.0)


def _by_rows(problem: Problem, name: str, small: float, large: float) -> Candidate:
    """Rows at what they cost, times how badly this way suits passes of that size.

    A small pass is mostly overhead, which a batch shares; a large one falls out of the cache when
    others run beside it.
    """
    passes = problem.m
    if problem.is_small:
        return Candidate(name, 0, passes, passes * small)
    cost = problem.pull_cost
    suits = large if cost.peak > _LARGE_PASS and problem.m > 1 else small
    return Candidate(name, 0, passes, passes * cost.work * suits, cost)


def forward(problem: Problem) -> Candidate | str:
    """Column by column: the transposed backward pass for each input, many in one batch."""
    if problem.quantity == "hessian":
        return "a Hessian is symmetric: its columns are its rows"
    # A forward pass stands on a second derivative, and has a graph of its own to build first.
    hopeless = problem.m <= problem.n if problem.is_small else problem.m * _PASS_RATIO <= problem.n
    if hopeless:
        return f"{problem.n} passes, and rows take no more: {problem.m}"
    refusal = why_not_forward(problem)
    if refusal is not None:
        return refusal
    if problem.is_small:
        return Candidate("forward", problem.n, 0, problem.n)
    cost = problem.push_cost
    return Candidate("forward", problem.n, 0, (problem.n + 1) * cost.work, cost)


def constant(problem: Problem) -> Candidate | str:
    """No pass at all: the map is affine, and its entries are found when the plan is made."""
    pattern = problem.structure.pattern
    if pattern is None:
        return "no structure is known"
    if not problem.structure.graph.affine:
        return "the map is not affine"
    if pattern.nnz > _KEPT_ENTRIES:
        return f"{pattern.nnz} entries are too many to keep"
    best = _fewest(problem, pattern)
    if isinstance(best, str):
        return best
    free = [replace(each, strategy="constant", work=0.0) for each in (best, *best.rivals)]
    return replace(free[0], rivals=tuple(free[1:]))


def batch(problem: Problem) -> Candidate | str:
    """Samples that do not meet: one pass serves a row, or a column, of all of them."""
    samples, pattern = problem.structure.samples, problem.structure.pattern
    if problem.linear.tape.domain.batch is not None:
        return "samples are apart already, by batch_dim=0"
    if samples is None or pattern is None:
        return "no batch of independent samples was found"
    tape = problem.linear.tape
    rows = _within_samples([leaf.size for leaf in tape.codomain.active], samples)
    columns = _within_samples([leaf.size for leaf in tape.domain.active], samples)
    colorings = [
        Coloring("rows", None, rows, read_rows(pattern, rows), int(rows.max(initial=-1)) + 1),
    ]
    if problem.quantity != "hessian":
        least = int(columns.max(initial=-1)) + 1
        colorings.append(Coloring("columns", columns, None, read_columns(pattern, columns), least))
    return _cheapest(problem, pattern, colorings, "batch")


def _within_samples(sizes: list[int], samples: int) -> np.ndarray:
    """The place of each scalar within its sample, over all leaves."""
    places, start = [], 0
    for size in sizes:
        width = size // samples
        places.append(np.tile(np.arange(start, start + width), samples))
        start += width
    return np.concatenate(places)


def sparse(problem: Problem) -> Candidate | str:
    """Columns or rows (or both) that share no entry share a pass."""
    pattern = problem.structure.pattern
    if pattern is None:
        return problem.structure.note or "no structure is known"
    if pattern.nnz == pattern.shape[0] * pattern.shape[1]:
        return "every entry may be nonzero"
    least = _least_share(pattern)
    if least * WORTHWHILE > 1 and not _is_arrow(pattern):
        return f"any colouring takes {least:.0%} of the passes or more"
    return _fewest(problem, pattern)


def _least_share(pattern: Pattern) -> float:
    """The share of rows, or of columns, that must stay passes of their own."""
    m, n = pattern.shape
    return min(
        _longest(pattern.column_lengths) / max(m, 1), _longest(pattern.row_lengths) / max(n, 1)
    )


def _fewest(problem: Problem, pattern: Pattern) -> Candidate | str:
    if problem.quantity == "hessian":
        return _cheapest(problem, _symmetric(pattern), _hessian_colorings(pattern), "sparse")
    return _cheapest(problem, pattern, _colorings(problem, pattern), "sparse")


def _colorings(problem: Problem, pattern: Pattern) -> list[Coloring]:
    """By the kind of pass that is cheaper first; by the other where that may take less work."""
    tape = problem.linear.tape
    ways = {
        "rows": lambda: by_rows(pattern, _grid(tape.codomain, pattern.shape[0])),
        "columns": lambda: by_columns(pattern, _grid(tape.domain, pattern.shape[1])),
    }
    least = {"rows": _longest(pattern.column_lengths), "columns": _longest(pattern.row_lengths)}
    first = min(ways, key=lambda way: least[way])
    (second,) = ways.keys() - {first}
    found = [ways[first]()]
    if least[second] <= _RIVAL * found[0].passes and pattern.nnz <= _COLORED_TWICE:
        found.append(ways[second]())
    fewest = min(coloring.passes for coloring in found)
    mixed = by_both(pattern, fewest) if fewest > 3 and _is_arrow(pattern) else None
    return found if mixed is None or mixed.passes >= fewest else [*found, mixed]


def _longest(lengths: np.ndarray) -> int:
    return int(lengths.max(initial=0))


def _is_arrow(pattern: Pattern) -> bool:
    """Whether a few rows, and a few columns, are much longer than most."""
    return all(
        _longest(lengths) > 2 * lengths.mean()
        for lengths in (pattern.row_lengths, pattern.column_lengths)
    )


def _grid(side: object, size: int) -> tuple[int, ...] | None:
    """The shape of the only leaf of a side, where the colours of a grid can be tried on it."""
    leaves = side.active  # type: ignore[attr-defined]
    shape = leaves[0].real_shape if len(leaves) == 1 else ()
    return tuple(shape) if len(shape) > 1 and int(np.prod(shape)) == size else None


def _symmetric(pattern: Pattern) -> Pattern:
    rows, columns = pattern.nonzero()
    both = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    return Pattern.of(*both, pattern.shape)


def _hessian_colorings(pattern: Pattern) -> list[Coloring]:
    """Products with a symmetric matrix are its rows."""
    symmetric = _symmetric(pattern)
    direct, substituted = star(symmetric), acyclic(symmetric)
    found = [direct] if substituted is None else [direct, substituted]
    return [replace(c, column_colors=None, row_colors=c.column_colors) for c in found]


def diagonal_only(problem: Problem) -> Candidate | str:
    """The diagonal alone: columns share a pass unless one pollutes the other's entry there."""
    if problem.quantity != "diagonal":
        return "all entries are wanted"
    if problem.m != problem.n:
        raise DimensionError(
            f"a diagonal expects as many outputs as inputs, got {problem.m} outputs and "
            f"{problem.n} inputs; plan the Jacobian"
        )
    pattern = problem.structure.pattern
    if pattern is None:
        return problem.structure.note or "no structure is known"
    grid = _grid(problem.linear.tape.domain, pattern.shape[1])
    colorings = [_entries_only(diagonal(pattern, grid, by)) for by in ("rows", "columns")]
    size = len(pattern.indptr) - 1
    present = np.flatnonzero(diagonal(pattern, grid).source >= 0)
    return _cheapest(problem, Pattern.of(present, present, (size, size)), colorings, "diagonal")


def _entries_only(coloring: Coloring) -> Coloring:
    """Without the places on the diagonal that hold no entry."""
    return replace(coloring, source=coloring.source[coloring.source >= 0])


def _cheapest(
    problem: Problem, pattern: Pattern, colorings: list[Coloring], name: str
) -> Candidate | str:
    """The colouring whose passes cost least; columns only where J v can be trusted."""
    reasons, candidates = [], []
    for coloring in colorings:
        refusal = why_not_forward(problem) if coloring.jvps else None
        if refusal is None:
            candidates.append(_candidate(problem, pattern, coloring, name))
        else:
            reasons.append(refusal)
    if not candidates:
        return "; ".join(reasons)
    best, *others = sorted(candidates, key=lambda c: c.work)
    close = tuple(c for c in others if c.passes <= _RIVAL * best.passes)
    return replace(best, rivals=close)


def _candidate(problem: Problem, pattern: Pattern, coloring: Coloring, name: str) -> Candidate:
    tape = problem.linear.tape
    scheme = Compressed(pattern, coloring, tape.domain.dtype, tape.domain.device)
    jvps, vjps = coloring.jvps, coloring.vjps
    if problem.is_small:
        return Candidate(name, jvps, vjps, jvps + vjps, None, scheme)
    push = problem.push_cost if jvps else None
    pull = problem.pull_cost if vjps else None
    work = (jvps * push.work if push else 0.0) + (vjps * pull.work if pull else 0.0)
    return Candidate(name, jvps, vjps, work, push or pull, scheme)


def split(problem: Problem) -> Candidate | str:
    """J as a product of factors, cut where the graph is narrow."""
    if problem.quantity != "jacobian":
        return "only for a Jacobian as a whole"
    if not problem.linear.batched:
        return "not all of its ops can run under vmap"
    graph, tape = problem.structure.graph, problem.linear.tape
    if problem.is_small or not graph.steps:
        return "too small to gain by it" if graph.steps else "no graph is known"
    found = cuts(graph, problem.samples)
    if not found:
        return "no tensor that everything goes through"
    links = chain(graph, found, problem.n, problem.m, problem.samples)
    way = links.best(0, len(links.widths) - 1)
    if way.kind != "product":
        return f"the narrowest cut has width {min(cut.width for cut in found)}: nothing to gain"
    if why_not_forward(problem) is not None and any(p.kind == "columns" for p in way.leaves):
        return "no second derivative to push forward with"
    jvps = sum(links.widths[p.start] for p in way.leaves if p.kind == "columns")
    vjps = sum(links.widths[p.stop] for p in way.leaves if p.kind == "rows")
    plain = links.widths[-1] * links.ends[-1]
    work = way.work / max(plain, 1.0) * problem.m * problem.pull_cost.work
    scheme = Split(tuple(found), way, tape.domain.lead)
    return Candidate("split", jvps, vjps, work, problem.pull_cost, scheme)


Strategy = Callable[[Problem], Candidate | str]
STRATEGIES: dict[str, Strategy] = {
    "constant": constant,
    "diagonal": diagonal_only,
    "batch": batch,
    "sparse": sparse,
    "split": split,
    "reverse": reverse,
    "forward": forward,
    "loop": loop,
}
PLAIN = ("reverse", "forward", "loop")
