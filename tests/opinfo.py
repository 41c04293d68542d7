"""PyTorch's own database of ops as a judge of structure: what was followed against dense Jacobians.

Every op that supports autograd is called on its samples, plainly, in place, through its gradient
and with complex numbers. What the structure engine says is compared with Jacobians of plain
``autograd.grad``, row by row, at the sample and at other points: a missed entry is a bug, one too
many is an over-approximation.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.boundary import Arguments
from pushforward.pattern import Pattern
from pushforward.structure.detection import Detector, Structure
from pushforward.tape import record

# Entries smaller than this, relative to the largest, are rounding.
ROUNDING = 1e-12
# At so many points an entry that was found has the chance to be other than zero; then each element
# that is left is made the largest or the smallest, up to so many elements.
TRIES, RAISED = 30, 200


@dataclass(frozen=True)
class Effort:
    """How much of the database is run: samples per op and variant, rows of each Jacobian."""

    samples: int
    rows: int
    variants: tuple[str, ...]


COMPACT = Effort(2, 12, ("plain", "in place", "gradient"))
COMPLETE = Effort(40, 24, ("plain", "first", "in place", "gradient", "complex"))
# Jacobians of which one row is longer than this are left out.
LONGEST = 20_000


@dataclass(frozen=True)
class Case:
    """One call as a map from real tensors to real tensors, and the point where it is made."""

    function: Callable[..., tuple[Tensor, ...]]
    point: tuple[Tensor, ...]


@dataclass
class Finding:
    """What came out for one op and one variant, over all samples."""

    op: str
    variant: str
    samples: int = 0
    missed: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    dense_ops: set[str] = field(default_factory=set)
    unfollowed: set[str] = field(default_factory=set)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@cache
def database() -> tuple[Any, ...]:
    """All ops with a derivative in float64, in the order of the database."""
    frozen = torch.backends.__allow_nonbracketed_mutation_flag
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    # Importing it forbids to set flags of backends outside of a context, for the whole process.
    torch.backends.__allow_nonbracketed_mutation_flag = frozen
    return tuple(op for op in op_db if op.supports_autograd and op.supports_dtype(torch.float64, "cpu"))


def name_of(op: Any) -> str:
    """The name, with that of the variant: ``linalg.norm (subgradients_at_zero)``."""
    return f"{op.name} ({op.variant_test_name})" if op.variant_test_name else op.name


def findings(op: Any, effort: Effort) -> Iterator[Finding]:
    """What comes out for every variant of an op."""
    for variant in effort.variants:
        finding = Finding(name_of(op), variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _judge_all(op, variant, effort, finding)
        yield finding


def _judge_all(op: Any, variant: str, effort: Effort, finding: Finding) -> None:
    if not _has(op, variant):
        finding.skip("no such variant")
        return
    for sample in _samples(op, torch.complex128 if variant == "complex" else torch.float64):
        if finding.samples >= effort.samples:
            return
        case = _case(op, sample, variant, finding)
        if case is not None:
            judge(case, effort, finding)


def _has(op: Any, variant: str) -> bool:
    supported = {
        "in place": lambda: op.get_inplace() is not None and op.supports_inplace_autograd,
        "gradient": lambda: op.supports_gradgrad,
        "complex": lambda: torch.complex128 in op.supported_backward_dtypes("cpu"),
    }
    return supported.get(variant, lambda: True)()


def _samples(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    return iter(op.sample_inputs("cpu", dtype, requires_grad=True))


def _case(op: Any, sample: Any, variant: str, finding: Finding) -> Case | None:
    """The sample as a map; None, with the reason noted, where it cannot be one."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if variant == "first" and len(places) < 2:
        finding.skip("one argument")
        return None
    if variant == "in place" and (sample.broadcasts_input or not isinstance(sample.input, Tensor)):
        finding.skip("the result is larger than the input")
        return None
    if not places or any(leaves[i].layout != torch.strided for i in places):
        finding.skip("no dense tensor to differentiate")
        return None
    places = places[:1] if variant == "first" else places
    fixed = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    called = _Called(op, sample, spec, fixed, places, variant)
    point = tuple(_as_real(fixed[i]).clone() for i in places)
    if variant != "gradient":
        return Case(called, point)
    return _gradient_case(called, point, finding)


def _gradient_case(called: _Called, point: Sequence[Tensor], finding: Finding) -> Case | None:
    try:
        outs = called(*[x.clone().requires_grad_() for x in point])
    except Exception as error:
        finding.skip(f"raises {type(error).__name__}")
        return None
    weights = [torch.randn_like(y) for y in outs if y.requires_grad]
    return Case(_Gradient(called, len(point)), (*point, *(w.detach() for w in weights)))


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class _Called:
    """An op on a sample, as a function of the real tensors in some places."""

    op: Any
    sample: Any
    spec: Any
    fixed: list[Any]
    places: list[int]
    variant: str

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.fixed)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = torch.view_as_complex(value) if leaves[place].is_complex() else value
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if self.variant == "in place":
            result = self.op.get_inplace()(first.clone(), *args, **kwargs)
        else:
            result = self.op(first, *args, **kwargs)
        outs = pytree.tree_leaves(self.sample.output_process_fn_grad(result))
        return tuple(
            _as_real(y.to_dense() if y.layout != torch.strided else y)
            for y in outs
            if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())
        )


@dataclass(frozen=True)
class _Gradient:
    """The gradient of a weighted sum of outputs, in inputs and weights."""

    called: _Called
    count: int

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        inputs, weights = values[: self.count], values[self.count :]
        outs = [y for y in self.called(*inputs) if y.requires_grad]
        found = torch.autograd.grad(outs, inputs, weights, create_graph=True, allow_unused=True)
        return tuple(g for g in found if g is not None)


def judge(case: Case, effort: Effort, finding: Finding) -> None:
    """Compare the structure at one sample with Jacobians at several points."""
    try:
        oracle = Oracle.of(case, effort.rows)
        first = None if oracle is None else oracle.first()
    except Exception as error:  # ops refuse samples in many ways
        finding.skip(f"raises {type(error).__name__}")
        return
    if oracle is None or first is None:
        finding.skip("no derivative, or a large one")
        return
    finding.samples += 1
    structure = detected(case)
    finding.dense_ops |= {name for name, _ in structure.dense_ops}
    if structure.pattern is None:
        finding.unfollowed.add(structure.note)
        return
    _compare(oracle, first, structure, finding)


def detected(case: Case) -> Structure:
    """What is found by following the call once, input by input."""
    arguments = Arguments.of(case.point, tuple(range(len(case.point))), None)
    detector = Detector(fine=True)
    tape = record(case.function, arguments, None, watch=detector)
    return detector.structure(tape.outputs, tape.domain, tape.codomain)


def _compare(
    oracle: Oracle, first: np.ndarray, structure: Structure, finding: Finding
) -> None:
    found = _chosen(structure.pattern, oracle.rows)
    tally = _Tally(oracle, found, _nonzero(first, 0), _nonzero(first, ROUNDING) & ~found)
    if not structure.guards.at_point:
        _look_elsewhere(tally, finding.variant)
    over, missed = tally.unseen.sum(), tally.missed.sum()
    shapes = " ".join(str(tuple(x.shape)) for x in oracle.case.point)
    if missed:
        finding.missed.append(f"{shapes}: {missed} of {found.sum()}")
    if over and finding.variant != "complex":
        finding.over.append(f"{shapes}: {over} of {found.sum()}")


def _look_elsewhere(tally: _Tally, variant: str) -> None:
    """Two other points always; more while entries have been zero so far."""
    every = np.arange(len(tally.found))
    for tried, point in enumerate(elsewhere(tally.oracle.case.point)):
        if tried >= 2 and (variant == "complex" or tally.missed.any()):
            return
        tally.take(point, every if tried < 2 else tally.open_rows(), tried)
    for place, height in itertools.product(tally.open_places()[:RAISED], (30.0, -30.0)):
        tally.take(raised(tally.oracle.case.point, place, height), tally.open_rows(), 0)


@dataclass
class _Tally:
    """Which entries were found, which have been other than zero, and which of those were missed."""

    oracle: Oracle
    found: np.ndarray
    seen: np.ndarray
    missed: np.ndarray

    @property
    def unseen(self) -> np.ndarray:
        return self.found & ~self.seen

    def open_rows(self) -> np.ndarray:
        return np.flatnonzero(self.unseen.any(1))

    def open_places(self) -> np.ndarray:
        """Inputs that may tell more; the rows of a gradient have the numbers of inputs too."""
        rows = self.oracle.rows[self.open_rows()]
        columns = np.flatnonzero(self.unseen.any(0))
        return np.union1d(columns, rows[rows < self.found.shape[1]])

    def take(self, point: Sequence[Tensor], rows: np.ndarray, seed: int) -> None:
        """Count some rows at another point, if the op is defined there."""
        matrix = self.oracle.at(point, rows, seed) if len(rows) else None
        if matrix is not None:
            self.seen[rows] |= _nonzero(matrix, 0)
            self.missed[rows] |= _nonzero(matrix, ROUNDING) & ~self.found[rows]


def _chosen(pattern: Pattern, rows: np.ndarray) -> np.ndarray:
    """Some rows of a pattern, dense."""
    chosen = np.zeros((len(rows), pattern.shape[1]), bool)
    for place, row in enumerate(rows):
        chosen[place, pattern.indices[pattern.indptr[row] : pattern.indptr[row + 1]]] = True
    return chosen


def _nonzero(matrix: np.ndarray, tolerance: float) -> np.ndarray:
    finite = np.abs(np.where(np.isfinite(matrix), matrix, 0))
    return (finite > tolerance * finite.max(initial=0)) | np.isinf(matrix)


def elsewhere(point: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Other points: near, with the same entries in other places, and anywhere."""
    draw = torch.Generator().manual_seed(1)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw, dtype=x.dtype)

    def shuffled(x: Tensor) -> Tensor:
        return x.reshape(-1)[torch.randperm(x.numel(), generator=draw)].reshape(x.shape)

    ways = (
        lambda x: x + 0.01 * normal(x),
        lambda x: shuffled(x) + 1e-3 * normal(x),
        normal,
        lambda x: x + 0.3 * normal(x),
        lambda x: 3 * normal(x),
        lambda x: torch.sigmoid(normal(x)),
    )
    for way in itertools.islice(itertools.cycle(ways), TRIES):
        yield tuple(way(x) for x in point)


def raised(point: Sequence[Tensor], column: int, height: float) -> tuple[Tensor, ...]:
    """The point with one coordinate moved away from the others."""
    flat = torch.cat([x.reshape(-1) for x in point])
    flat[column] += height
    parts = flat.split([x.numel() for x in point])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, point, strict=True))


@dataclass(frozen=True)
class Oracle:
    """Some rows of the Jacobian of a case by plain ``autograd.grad``, at one point after another."""

    case: Case
    size: int
    rows: np.ndarray

    @staticmethod
    def of(case: Case, most: int) -> Oracle | None:
        """The oracle for at most so many rows; None where there is nothing to differentiate."""
        entries = _entries(case, case.point, 0)[1]
        if not any(y.requires_grad for y in entries) or sum(map(torch.numel, case.point)) > LONGEST:
            return None
        size = sum(map(len, entries))
        rows = np.random.default_rng(0).permutation(size)[:most]
        return Oracle(case, size, np.sort(rows))

    def first(self) -> np.ndarray | None:
        """All rows at the sample itself."""
        return self._matrix(self.case.point, self.rows, 0)

    def at(self, point: Sequence[Tensor], chosen: np.ndarray, seed: int) -> np.ndarray | None:
        """Some of the rows at another point; None where the op is not defined there."""
        try:
            return self._matrix(point, self.rows[chosen], seed)
        except Exception:  # ops refuse points in many ways
            return None

    def _matrix(self, point: Sequence[Tensor], rows: np.ndarray, seed: int) -> np.ndarray | None:
        inputs, outs = _entries(self.case, point, seed)
        ends = np.cumsum([0, *map(len, outs)])
        if ends[-1] != self.size:
            return None
        owners = np.searchsorted(ends, rows, side="right") - 1
        found = [_row(outs[i][row - ends[i]], inputs) for i, row in zip(owners, rows, strict=True)]
        width = sum(map(torch.numel, inputs))
        return torch.stack(found).numpy() if found else np.zeros((0, width))


def _entries(
    case: Case, point: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh inputs at a point, and the outputs there, flat."""
    inputs = [x.detach().clone().requires_grad_() for x in point]
    with torch.enable_grad():
        torch.manual_seed(seed)
        return inputs, [y.reshape(-1) for y in case.function(*inputs)]


def _row(entry: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    if not entry.requires_grad:
        return torch.cat([torch.zeros_like(x).reshape(-1) for x in inputs]).detach()
    found = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled]).detach()
