"""Spectral norms of single ops: bounds on ||d out / d in||_2, from what autograd saved of them.

A rule takes an `Op` and the number of one of its inputs and returns a `Bound` per sample, or None
where it does not hold. All outputs of an op count as one vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pushforward.path import convolution
from pushforward.path.places import Samples, dtype_of, shape_of
from pushforward.path.spectrum import affordable, gram, log_norms_or_more, log_root

# What a rule may raise; a test may narrow it.
TOLERATED: type[Exception] | tuple[type[Exception], ...] = Exception
# An op without a rule is taken row by row, if it is no larger than that.
MOST_ROWS, MOST_COLUMNS = 512, 4096


@dataclass(frozen=True, eq=False)
class Bound:
    """The logarithm of a bound on a norm, (samples,), and whether it is the norm itself."""

    log: Tensor
    exact: bool = False


@dataclass(eq=False)
class Op:
    """A node of the graph, with the edges to those of its inputs that depend on the step's."""

    node: Any
    inputs: dict[int, GradientEdge]
    samples: Samples
    device: torch.device
    saved: Callable[[str], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.saved = lambda name: getattr(self.node, f"_saved_{name}")

    @property
    def kind(self) -> str:
        return kind_of(self.node)

    @property
    def output(self) -> GradientEdge:
        return GradientEdge(self.node, 0)

    @property
    def outputs(self) -> int:
        return len(self.node._input_metadata)

    def shape(self, number: int) -> tuple[int, ...]:
        return shape_of(self.inputs[number])

    def same_shape(self, number: int) -> bool:
        return self.outputs == 1 and self.shape(number) == shape_of(self.output)

    @cached_property
    def sums(self) -> tuple[Tensor | None, ...]:
        """Columns of the local Jacobian summed, by input: J^T 1."""
        return self.pulled(*(self._full(number, 1.0) for number in range(self.outputs)))

    def _full(self, number: int, value: float) -> Tensor:
        edge = GradientEdge(self.node, number)
        return torch.full(shape_of(edge), value, dtype=dtype_of(edge), device=self.device)

    def pulled(self, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Products with the local transposed Jacobian, by input, without the rest of the graph."""
        found = self.node(*cotangents)
        return found if isinstance(found, tuple) else (found,)

    def sum_of(self, number: int) -> Tensor:
        """The same for one input; zeros where it has no gradient."""
        return self._at(number, self.sums[number])

    def _at(self, number: int, found: Tensor | None) -> Tensor:
        """Zeros for no gradient; the node leaves it to the engine to add up what was broadcast."""
        shape = self.shape(number)
        if found is None:
            return torch.zeros(shape, device=self.device)
        return found if found.shape == shape else found.double().sum_to_size(shape)

    def counts(self, number: int) -> Tensor:
        """`sum_of` where many rows may add up at one input, which short dtypes cannot do.

        Raises:
            RuntimeError: an op adds in its own dtype alone, and there are too many.
        """
        if self._dtype.itemsize >= 4:
            return self.sum_of(number)
        if self.kind in COUNTERS:
            return COUNTERS[self.kind](self, number)
        return self._at(number, self._wide_sums[number])

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_of(self.output)

    @cached_property
    def _wide_sums(self) -> tuple[Tensor | None, ...]:
        ones = (self._full(number, 1.0).float() for number in range(self.outputs))
        try:
            return self.pulled(*ones)
        except RuntimeError:  # an op that insists on its own dtype
            epsilon = torch.finfo(self._dtype).eps
            if any(sums is not None and bool((sums >= 1 / epsilon).any()) for sums in self.sums):
                raise
            rounded = 1 + 8 * epsilon
            return tuple(sums if sums is None else sums.float() * rounded for sums in self.sums)

    def most(self, values: Tensor, edge: GradientEdge | None = None, exact: bool = True) -> Bound:
        """The largest for each sample; exact where samples can be told apart."""
        edge = self.output if edge is None else edge
        found = self.samples.most(values, edge)
        return Bound(found.log(), exact and self.samples.tells_apart(edge))

    def same(self, log: float, exact: bool = True) -> Bound:
        """One logarithm for all samples."""
        alike = torch.full((self.samples.count,), log, dtype=torch.float64, device=self.device)
        return Bound(alike, exact)


Rule = Callable[[Op, int], Bound | None]
RULES: dict[str, Rule] = {}


def kind_of(node: Node) -> str:
    """``MulBackward0`` is a ``Mul``."""
    return re.sub(r"Backward\d*$", "", node.name())


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Enter a rule for kinds of ops."""

    def enter(function: Rule) -> Rule:
        RULES.update((kind, function) for kind in kinds)
        return function

    return enter


def bound_of(op: Op, number: int) -> Bound | None:
    """Bound the norm with respect to one input, by a rule or from all rows; None if neither does.

    What an op saved may have been changed in place since, which torch refuses to read; and no rule
    that fails is worth more than the rest of the result.
    """
    try:
        found = RULES.get(op.kind, _unknown)(op, number)
        found = _from_rows(op, number) if found is None else found
        return found if found is None or bool((found.log < torch.inf).all()) else None
    except TOLERATED:
        return None


_MOVES = """
    Alias Cat Chunk ChannelShuffle Clone ConstantPadNd Contiguous Diagonal Flip NativeChannelShuffle
    Narrow Neg Permute PixelShuffle PixelUnshuffle ReshapeAlias Roll Rot90 Select Slice Sort Split
    SplitWithSizes Squeeze Stack Swapaxes T ToCopy Transpose Unbind UnsafeSplit
    UnsafeSplitWithSizes UnsafeView Unsqueeze View
"""
_POINTWISE = """
    Abs Acos Acosh Add Addcdiv Addcmul Alias Asin Asinh Atan Atan2 Atanh Ceil Celu Clamp ClampMax
    ClampMin Clone Copysign Cos Cosh Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmax Fmin
    Fmod Frac Gelu Hardshrink Hardsigmoid Hardswish Hardtanh Hypot LeakyRelu Lerp Lgamma Log Log10
    Log1P Log2 LogSigmoid Logaddexp Logaddexp2 Logit MaskedFill Maximum Minimum Mish Mul NanToNum
    NativeDropout Neg Pow PreluKernel Reciprocal Relu Remainder Round RreluWithNoise Rsqrt Rsub
    Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Tril Triu
    Trunc Where Xlogy
"""
# Ops that move elements, and drop some: their rows are orthonormal, all outputs taken together.
MOVES = frozenset(_MOVES.split())
# Ops that work on each element for itself; other factors may be constants, of any shape.
POINTWISE = frozenset(_POINTWISE.split())


@rule(*MOVES)
def _moves(op: Op, number: int) -> Bound:
    return op.same(0.0)


@rule(*(POINTWISE - MOVES))
def _pointwise(op: Op, number: int) -> Bound | None:
    """The Jacobian is diagonal, and J^T 1 is its diagonal."""
    return op.most(op.sum_of(number).abs()) if op.same_shape(number) else None


@rule("Maximum", "Minimum")
def _larger(op: Op, number: int) -> Bound | None:
    """J = D_a A + D_b B with D_a + D_b = I, where a tie gives half to each: as squares are convex,
    ||J||^2 <= ||D_a^(1/2) A||^2 + ||D_b^(1/2) B||^2. These are the squares that meet."""
    if len(op.inputs) == 1 and op.same_shape(number):
        return _pointwise(op, number)
    return op.most(op.counts(number).sqrt(), op.inputs[number], exact=False)


@rule("Add", "Sub", "Rsub", "Where")
def _added(op: Op, number: int) -> Bound | None:
    """Entries of one size at most; an input that is broadcast meets several outputs."""
    if op.same_shape(number):
        return _pointwise(op, number)
    often = math.prod(shape_of(op.output)) / max(1, math.prod(op.shape(number)))
    largest = max(1.0, abs(float(getattr(op.node, "_saved_alpha", 1))))
    return op.same(math.log(often) / 2 + math.log(largest), exact=False)


@rule("Mul")
def _multiplied(op: Op, number: int) -> Bound | None:
    """d(a b)/da = diag(b): columns are as long as what b is along the dimensions that a lacks."""
    if op.node.name() != "MulBackward0":
        return _pointwise(op, number)
    other = op.saved("other" if number == 0 else "self")
    return None if other is None else _columns(op, number, other)


@rule("Div")
def _divided(op: Op, number: int) -> Bound | None:
    if op.node.name() != "DivBackward0":
        return _pointwise(op, number)
    other = op.saved("other").double()
    if number == 0:
        return _columns(op, number, 1 / other)
    return _columns(op, number, op.saved("self").double() / other**2)


def _columns(op: Op, number: int, factor: Tensor) -> Bound:
    """The longest column, where every output has one entry per input: the root of a sum."""
    squares = factor.detach().double().square().expand(shape_of(op.output))
    lengths = squares.sum_to_size(op.shape(number)).sqrt()
    return op.most(lengths, op.inputs[number])


# Entries are not negative and each row adds up to one at most: ||J||_inf <= 1, so that
# ||J||_2^2 <= ||J||_1. With a single entry per row, or equal ones on inputs of its own, it is the
# norm.
@rule(
    *("Expand", "Repeat", "Index", "IndexSelect", "Gather", "Take", "TakeAlongDim", "AsStrided"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
    *("FractionalMaxPool2D", "FractionalMaxPool3D", "Unfold", "Im2Col", "Embedding"),
    *("ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D"),
    *("ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D"),
    *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D"),
    *("UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
    *("Topk", "Kthvalue", "Median", "Mode", "MaskedSelect", "Mean"),
    *("Amax", "Amin", "Max", "Min"),
)
def _picked(op: Op, number: int) -> Bound:
    return op.most(op.counts(number).sqrt(), op.inputs[number])


@rule(
    *("AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
    *("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleTrilinear3D"),
    "UpsampleBilinear2DAa",
)
def _averaged(op: Op, number: int) -> Bound:
    return op.most(op.counts(number).clamp(min=0).sqrt(), op.inputs[number], exact=False)


@rule("AvgPool2D", "AvgPool3D")
def _average_pool(op: Op, number: int) -> Bound | None:
    """Rows add up to one, unless a divisor was given."""
    return _averaged(op, number) if op.saved("divisor_override") is None else None


@rule("Sum")
def _summed(op: Op, number: int) -> Bound:
    terms = math.prod(op.shape(number)) / max(1, math.prod(shape_of(op.output)))
    return op.same(math.log(terms) / 2 if terms else -math.inf)


@rule("LinalgVectorNorm", "Norm", "Var", "Std", "Logsumexp", "Prod")
def _reduced(op: Op, number: int) -> Bound | None:
    """Each input meets one output: the longest row is the norm."""
    squares = op.sum_of(number).double().square()
    if shape_of(op.output) != ():
        dims = _saved_dims(op, squares.dim())
        if dims is None:
            return None
        squares = squares.sum(dim=dims, keepdim=True)
    else:
        squares = squares.sum()
    return op.most(squares.sqrt(), op.inputs[number])


def _saved_dims(op: Op, total: int) -> tuple[int, ...] | None:
    if not hasattr(op.node, "_saved_dim"):
        return None
    dims = op.saved("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(signed(dim) % total for dim in dims or range(total))


def signed(number: int) -> int:
    """Saved dimensions come as unsigned numbers."""
    return number - 2**64 if number >= 2**63 else number


@rule("Cumsum")
def _accumulated(op: Op, number: int) -> Bound:
    """The triangle of ones has norm 1 / (2 sin(pi / (4n + 2)))."""
    size = op.shape(number)[signed(op.saved("dim"))] if op.shape(number) else 1
    return op.same(-math.log(2 * math.sin(math.pi / (4 * size + 2))))


@rule("Glu")
def _gated(op: Op, number: int) -> Bound:
    halves = op.sum_of(number).double().chunk(2, dim=signed(op.saved("dim")))
    return op.most(torch.hypot(*halves))


# Products with matrices


@rule("Addmm")
def _affine(op: Op, number: int) -> Bound | None:
    if number == 0:
        return None
    matrix = op.saved("mat2" if number == 1 else "mat1")
    return _matrix(op, matrix, abs(float(op.saved("alpha"))))


@rule("Mm")
def _product(op: Op, number: int) -> Bound | None:
    return _matrix(op, op.saved("mat2" if number == 0 else "self"), 1.0)


def _matrix(op: Op, matrix: Tensor | None, factor: float) -> Bound | None:
    if matrix is None:
        return None
    log = float(log_norms_or_more(matrix.detach()[None])[0])
    return op.same(_log(factor) + log, exact=affordable(*matrix.shape))


@rule("Bmm")
def _products(op: Op, number: int) -> Bound | None:
    return _matrices(op, op.saved("mat2" if number == 0 else "self"), 1.0)


@rule("Baddbmm")
def _affine_products(op: Op, number: int) -> Bound | None:
    if number == 0:
        return None
    matrix = op.saved("batch2" if number == 1 else "batch1")
    return _matrices(op, matrix, abs(float(op.saved("alpha"))))


def _matrices(op: Op, matrices: Tensor | None, factor: float) -> Bound | None:
    if matrices is None:
        return None
    return op.most(factor * log_norms_or_more(matrices.detach()).exp())


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf


@rule("Convolution")
def _convolved(op: Op, number: int) -> Bound | None:
    """A transposed convolution is the adjoint of the plain one that goes the other way."""
    weight = op.saved("weight")
    if number != 0 or weight is None:
        return None
    shape = shape_of(op.output) if op.saved("transposed") else op.shape(0)
    dims = weight.dim() - 2
    window = {name: _each(op.saved(name), dims) for name in ("stride", "padding", "dilation")}
    size = tuple(shape[-dims:])
    conv = convolution.Convolution(weight, size, **window, groups=op.saved("groups"))
    return op.same(convolution.log_norm(conv), exact=False)


def _each(saved: Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per dimension; padding="valid" saves a single one."""
    return tuple(saved) * dims if len(saved) == 1 else tuple(saved)


# Normalisation: J = diag(weight) (I - 1 1^T / n - z z^T / n) / sigma, where the bracket projects.


@rule("NativeLayerNorm")
def _layer_norm(op: Op, number: int) -> Bound | None:
    return _scaled(op, op.saved("result2"), op.saved("weight")) if number == 0 else None


def _scaled(op: Op, inverse: Tensor, weight: Tensor | None) -> Bound:
    factor = 1.0 if weight is None else float(weight.abs().max())
    return op.most(inverse.double() * factor, exact=False)


@rule("NativeBatchNorm", "CudnnBatchNorm")
def _batch_norm(op: Op, number: int) -> Bound | None:
    if number != 0:
        return None
    if not op.saved("training"):
        return _pointwise(op, number)
    inverse, weight = op.saved("result2").double(), op.saved("weight")
    channels = inverse if weight is None else inverse * weight.detach().abs()
    shape = (1, -1, *(1 for _ in op.shape(0)[2:]))
    return op.most(channels.reshape(shape).expand(op.shape(0)), exact=False)


@rule("NativeGroupNorm")
def _group_norm(op: Op, number: int) -> Bound | None:
    if number != 0:
        return None
    inverse, weight = op.saved("result2").double(), op.saved("weight")
    if weight is not None:
        inverse = inverse * weight.detach().abs().reshape(inverse.shape[-1], -1).amax(dim=-1)
    return op.most(inverse, exact=False)


@rule("Softmax", "SafeSoftmax", "SoftmaxDataBackward")
def _softmax(op: Op, number: int) -> Bound:
    """diag(p) - p p^T is at most diag(p), and by Gershgorin at most 2 p (1 - p)."""
    p = op.saved("result").double()
    dim = signed(op.saved("dim"))
    largest = torch.minimum(p.amax(dim=dim, keepdim=True), _disc(p).amax(dim=dim, keepdim=True))
    return op.most(largest, exact=False)


def _disc(p: Tensor) -> Tensor:
    return 2 * p * (1 - p)


@rule("LogSoftmax")
def _log_softmax(op: Op, number: int) -> Bound:
    """I - 1 p^T projects obliquely, so its norm is that of 1 p^T."""
    p, dim = op.saved("result").double().exp(), signed(op.saved("dim"))
    size = p.shape[dim] if p.dim() else 1
    if size < 2:
        return op.same(-math.inf)
    return op.most(math.sqrt(size) * p.norm(dim=dim, keepdim=True))


# Sums of rows that autograd makes in the dtype of the input


def _indexed(op: Op, number: int) -> Tensor:
    counts = torch.zeros(op.shape(number), dtype=torch.float64, device=op.device)
    one = torch.ones((), dtype=torch.float64, device=op.device)
    return torch.ops.aten.index_put(counts, list(op.saved("indices")), one, True)


def _taken(op: Op, number: int) -> Tensor:
    counts = torch.zeros(op.shape(number), dtype=torch.float64, device=op.device)
    index = op.saved("index")
    return counts.put_(index, torch.ones_like(index, dtype=torch.float64), accumulate=True)


COUNTERS: dict[str, Callable[[Op, int], Tensor]] = {"Index": _indexed, "Take": _taken}


# Ops without a rule


def _unknown(op: Op, number: int) -> Bound | None:
    return None


def _from_rows(op: Op, number: int) -> Bound | None:
    """All rows of the local Jacobian, if they are few: the whole batch is one matrix."""
    rows, columns = math.prod(shape_of(op.output)), math.prod(op.shape(number))
    if op.outputs != 1 or rows > MOST_ROWS or columns > MOST_COLUMNS:
        return None
    matrix = torch.stack([_row(op, number, seed) for seed in _units(op, rows)])
    log = float(log_root(gram(matrix)))
    return op.same(log, exact=op.samples.count == 1)


def _units(op: Op, rows: int) -> Iterable[Tensor]:
    like = op._full(0, 0.0)
    for row in range(rows):
        seed = like.clone()
        seed.view(-1)[row] = 1
        yield seed


def _row(op: Op, number: int, seed: Tensor) -> Tensor:
    found = op.pulled(seed)[number]
    columns = math.prod(op.shape(number))
    return seed.new_zeros(columns) if found is None else found.reshape(columns)
