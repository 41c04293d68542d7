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
ROUNDING = 1e-11
# At so many points an entry that was found has the chance to be other than zero; then each element
# that may matter is made the largest, the smallest, or zero.
TRIES = 40


@dataclass(frozen=True)
class Effort:
    """How much of the database is run: samples per op and variant, rows of each Jacobian, and how
    many rows are computed again to see whether an entry that was found is ever other than zero.
    """

    samples: int
    rows: int
    again: int
    variants: tuple[str, ...]


QUICK = Effort(1, 4, 0, ("plain", "in place"))
COMPACT = Effort(2, 8, 350, ("plain", "in place", "gradient"))
COMPLETE = Effort(20, 16, 0, ("plain", "first", "in place", "gradient", "complex"))
# Jacobians of which one row is longer than this are left out.
LONGEST = 8000


@dataclass(frozen=True)
class Case:
    """One call as a map from real tensors to real tensors, and the point where it is made."""

    function: Callable[..., tuple[Tensor, ...]]
    point: tuple[Tensor, ...]
    complex_inputs: tuple[bool, ...]


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
    at_point: bool = False

    @property
    def verdict(self) -> str:
        """The worst over all samples, in one word or two."""
        if not self.samples:
            return f"none: {next(iter(self.skipped), 'no samples')}"
        words = {
            "missed": self.missed,
            "not followed": self.unfollowed,
            "dense": self.dense_ops,
            "over": self.over,
            "exact here": self.at_point,
        }
        return next((word for word, holds in words.items() if holds), "exact")

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@cache
def database() -> tuple[Any, ...]:
    """All ops with a derivative in float64, in the order of the database."""
    frozen = torch.backends.__allow_nonbracketed_mutation_flag
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as invocations
    # Random ops would get the same seed at every call.
    invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    # Importing it forbids to set flags of backends outside of a context, for the whole process.
    torch.backends.__allow_nonbracketed_mutation_flag = frozen
    return tuple(
        op
        for op in invocations.op_db
        if op.supports_autograd and op.supports_dtype(torch.float64, "cpu")
    )


def name_of(op: Any) -> str:
    """The name, with that of the variant: ``linalg.norm (subgradients_at_zero)``."""
    return f"{op.name} ({op.variant_test_name})" if op.variant_test_name else op.name


# Autograd, which is the oracle here, is wrong about them; the library writes them out.
WRONG_IN_TORCH = {"as_strided_scatter": "wrong in torch, written out"}


def findings(op: Any, effort: Effort) -> Iterator[Finding]:
    """What comes out for every variant of an op."""
    for variant in effort.variants:
        finding = Finding(name_of(op), variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _judge_all(op, variant, effort, finding)
        yield finding


def _judge_all(op: Any, variant: str, effort: Effort, finding: Finding) -> None:
    if op.name in WRONG_IN_TORCH:
        finding.skip(WRONG_IN_TORCH[op.name])
        return
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
    case = Case(called, point, tuple(fixed[i].is_complex() for i in places))
    return _gradient_case(case, finding) if variant == "gradient" else case


def _gradient_case(case: Case, finding: Finding) -> Case | None:
    try:
        outs = case.function(*[x.clone().requires_grad_() for x in case.point])
    except Exception as error:  # ops refuse samples in many ways
        finding.skip(f"raises {type(error).__name__}")
        return None
    weights = [torch.randn_like(y).detach() for y in outs if y.requires_grad]
    whole = tuple(w.is_complex() for w in weights)
    return Case(
        _Gradient(case.function, len(case.point), whole),
        (*case.point, *map(_as_real, weights)),
        (*case.complex_inputs, *whole),
    )


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class _Called:
    """An op on a sample, as a function of the tensors in some places, complex ones as real ones."""

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
            y.to_dense() if y.layout != torch.strided else y
            for y in outs
            if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex())
        )


@dataclass(frozen=True)
class _Gradient:
    """The gradient of a weighted sum of outputs, in inputs and weights."""

    called: Callable[..., tuple[Tensor, ...]]
    count: int
    whole: tuple[bool, ...]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        inputs = values[: self.count]
        given = zip(values[self.count :], self.whole, strict=True)
        weights = [torch.view_as_complex(w) if whole else w for w, whole in given]
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
    finding.at_point |= bool(structure.guards.at_point)
    if structure.pattern is None:
        finding.unfollowed.add(structure.note)
        return
    _compare(oracle, first, structure, effort, finding)


def detected(case: Case) -> Structure:
    """What is found by following the call once, input by input."""
    arguments = Arguments.of(case.point, tuple(range(len(case.point))), None)
    detector = Detector(fine=True)
    tape = record(case.function, arguments, None, watch=detector)
    return detector.structure(tape.outputs, tape.domain, tape.codomain)


def _compare(
    oracle: Oracle, first: np.ndarray, structure: Structure, effort: Effort, finding: Finding
) -> None:
    found = _chosen(structure.pattern, oracle.rows)
    tally = Tally(oracle, found, oracle.whole(_nonzero(first)), _nonzero(first) & ~found)
    if not structure.guards.at_point:
        look_elsewhere(tally, 0 if finding.variant == "complex" else effort.again)
    over, missed = tally.unseen.sum(), tally.missed.sum()
    shapes = " ".join(str(tuple(x.shape)) for x in oracle.case.point)
    if missed:
        finding.missed.append(f"{shapes}: {missed} of {found.sum()}")
    if over and finding.variant != "complex":
        finding.over.append(f"{shapes}: {over} of {found.sum()}")


def look_elsewhere(tally: Tally, again: int) -> None:
    """All rows at two other points; then those with entries that have been zero so far."""
    left = again // 2
    for tried, point in enumerate(elsewhere(tally.oracle.case.point)):
        if tried < 2:
            tally.take(point, np.arange(len(tally.found)), tried)
        else:
            left = _again(tally, point, tally.open_rows(), tried, left)
    left = again
    for way, place in itertools.product(_MOVED, tally.open_places()):
        left = _again(
            tally, moved(tally.oracle.case.point, place, way), tally.rows_that_need(place), 0, left
        )


def _again(tally: Tally, point: Sequence[Tensor], rows: np.ndarray, seed: int, left: int) -> int:
    """Count some rows at another point while enough is left; how much is left then."""
    if len(rows) > left:
        return left
    tally.take(point, rows, seed)
    return left - len(rows)


@dataclass
class Tally:
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

    def rows_that_need(self, place: int) -> np.ndarray:
        """Rows for which an input has done nothing so far, or the gradient by that input."""
        own = self.unseen.any(1) & (self.oracle.rows == place)
        return np.flatnonzero(self.unseen[:, place] | own)

    def take(self, point: Sequence[Tensor], rows: np.ndarray, seed: int) -> None:
        """Count some rows at another point, if the op is defined there."""
        matrix = self.oracle.at(point, rows, seed) if len(rows) else None
        if matrix is not None:
            self.seen[rows] |= _nonzero(matrix)
            self.missed[rows] |= _nonzero(matrix) & ~self.found[rows]
            self.seen = self.oracle.whole(self.seen)


def _chosen(pattern: Pattern, rows: np.ndarray) -> np.ndarray:
    """Some rows of a pattern, dense."""
    chosen = np.zeros((len(rows), pattern.shape[1]), bool)
    for place, row in enumerate(rows):
        chosen[place, pattern.indices[pattern.indptr[row] : pattern.indptr[row + 1]]] = True
    return chosen


def _nonzero(matrix: np.ndarray) -> np.ndarray:
    finite = np.abs(np.where(np.isfinite(matrix), matrix, 0))
    return (finite > ROUNDING * finite.max(initial=0)) | np.isinf(matrix)


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


_MOVED = (lambda x: x + 30, lambda x: x - 30, lambda x: 0 * x + 1e-3)


def moved(
    point: Sequence[Tensor], place: int, way: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """The point with one coordinate moved away from the others."""
    flat = torch.cat([x.reshape(-1) for x in point])
    flat[place] = way(flat[place])
    parts = flat.split([x.numel() for x in point])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, point, strict=True))


@dataclass(frozen=True)
class Oracle:
    """Some rows of the Jacobian of a case by plain ``autograd.grad``, at any point."""

    case: Case
    size: int
    rows: np.ndarray
    row_partners: np.ndarray
    column_partners: np.ndarray

    @staticmethod
    def of(case: Case, most: int) -> Oracle | None:
        """The oracle for about so many rows; None where there is nothing to differentiate."""
        entries, complex_outputs = _entries(case, case.point, 0)[1:]
        if not any(y.requires_grad for y in entries) or sum(map(torch.numel, case.point)) > LONGEST:
            return None
        partners = _partners([len(y) for y in entries], complex_outputs)
        chosen = np.random.default_rng(0).permutation(len(partners))[:most]
        rows = np.union1d(chosen, partners[chosen])
        columns = _partners([x.numel() for x in case.point], case.complex_inputs)
        own = np.searchsorted(rows, partners[rows])
        return Oracle(case, len(partners), rows, own, columns)

    def whole(self, entries: np.ndarray) -> np.ndarray:
        """A complex number is followed as one: what is true of one part is true of the other."""
        entries = entries | entries[self.row_partners]
        return entries | entries[:, self.column_partners]

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
        inputs, outs, _ = _entries(self.case, point, seed)
        ends = np.cumsum([0, *map(len, outs)])
        if ends[-1] != self.size:
            return None
        owners = np.searchsorted(ends, rows, side="right") - 1
        found = [_row(outs[i][row - ends[i]], inputs) for i, row in zip(owners, rows, strict=True)]
        width = sum(map(torch.numel, inputs))
        return torch.stack(found).numpy() if found else np.zeros((0, width))


def _partners(sizes: Sequence[int], are_complex: Sequence[bool]) -> np.ndarray:
    """For each scalar the other part of the same complex number, or itself."""
    numbers = np.arange(sum(sizes))
    flags = np.repeat(are_complex, sizes).astype(bool)
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    return np.where(flags, starts + ((numbers - starts) ^ 1), numbers)


def _entries(
    case: Case, point: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Fresh inputs at a point, the outputs there, flat and real, and which of them are complex."""
    inputs = [x.detach().clone().requires_grad_() for x in point]
    with torch.enable_grad():
        torch.manual_seed(seed)
        outs = case.function(*inputs)
        flat = [_as_real(y).reshape(-1) for y in outs]
    return inputs, flat, [y.is_complex() for y in outs]


def _row(entry: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    if not entry.requires_grad:
        return torch.cat([torch.zeros_like(x).reshape(-1) for x in inputs]).detach()
    found = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled]).detach()
