"""The autograd graph of one evaluation, recorded once and walked, never executed here.

What this library needs to know of torch's graph stands here: which ops it holds, whether anything
beside the inputs can want a gradient, and which op makes samples of a batch depend on each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pushforward.boundary import Arguments, Layout, as_real
from pushforward.composites import UNFIT, UNFIT_THIRD, composites
from pushforward.errors import DifferentiationError, InputError, ShapeError
from pushforward.purity import Loan, RandomState, recording, untouched

# det's backward takes an SVD when it runs under vmap with gradients on, and that SVD has no
# derivative where singular values repeat. One cotangent at a time it solves with LU instead.
# By this name a census has custom functions that say under vmap what they refuse without it: that
# they were differentiated twice.
_ONCE = "once_differentiable"
_NOT_UNDER_VMAP = frozenset({"LinalgDetBackward0", _ONCE})
_ONCE_CODE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__

_LAYER_NORM = "NativeLayerNormBackward0"
# The node at which a gradient arrives at a leaf.
_LEAF = "torch::autograd::AccumulateGrad"
# How many maps are being recorded around the one that is recorded next.
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)


@dataclass(frozen=True)
class Tape:
    """A map at a point: its value, and the graph between its real inputs and real outputs.

    ``mode`` holds the training flags of every module that the function can reach, ``loan`` which
    buffers were copies.
    """

    function: Callable[..., Any]
    arguments: Arguments
    state: RandomState
    value: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    codomain: Layout
    census: Census
    mode: tuple[bool, ...]
    order: int = 1
    is_gradient: bool = False
    composed: bool = False
    loan: Loan = field(default_factory=Loan, repr=False)

    @property
    def domain(self) -> Layout:
        return self.arguments.domain

    @property
    def batch_dim(self) -> int | None:
        return None if self.domain.batch is None else 0


class Watch(Protocol):
    """What may look on while a map is recorded."""

    def start(self, inputs: Sequence[Tensor], arguments: Sequence[Tensor], domain: Layout) -> None:
        """A run begins: from these inputs, with these other tensors among its arguments."""

    def following(self) -> AbstractContextManager[None]:
        """Entered around what is run."""


@dataclass(frozen=True)
class Census:
    """What a walk over the graph found."""

    ops: frozenset[str]
    custom: frozenset[str]
    versions: tuple[tuple[Tensor, int], ...] = field(repr=False)
    attached: bool
    reaches_inputs: bool

    @property
    def vmappable(self) -> bool:
        """Whether several cotangents may be pulled back at once."""
        return not self.ops & _NOT_UNDER_VMAP

    @property
    def stale(self) -> bool:
        """Whether a parameter or an input was changed in place since the graph was recorded."""
        return any(tensor._version != version for tensor, version in self.versions)


def record(
    function: Callable[..., Any],
    arguments: Arguments,
    batch_dim: int | None,
    state: RandomState | None = None,
    order: int = 1,
    watch: Watch | None = None,
) -> Tape:
    """Evaluate a map once and keep its graph; with gradients off, keep only what leads to it.

    ``order`` is how often the graph is to be differentiated, the gradients of results not counted.
    Inside a map that is being recorded itself it is differentiated once more for each such map.
    """
    state = state or RandomState.now()
    order += _DEPTH.get()
    tape = _evaluate(function, arguments, batch_dim, state, order, watch)
    unfit = UNFIT if order == 1 else UNFIT | UNFIT_THIRD
    if tape.census.ops.isdisjoint(unfit):
        return tape
    with composites():
        composed = _evaluate(function, arguments, batch_dim, state, order, watch)
    _refuse_hidden(composed)
    return replace(composed, composed=True)


def _refuse_hidden(tape: Tape) -> None:
    """Raise where an op stayed, in compiled or scripted code, whose third derivative is needed."""
    met = tape.census.ops & UNFIT_THIRD
    if met and tape.order + tape.census.attached >= 3:
        names = ", ".join(sorted(op_name(op) for op in met))
        raise DifferentiationError(
            f"expected ops whose third derivative torch gets right, got {names} inside of code "
            "that they cannot be replaced in (scripted or traced, or a call below torch.nn); pass "
            "the module as it was written, or call under torch.no_grad() where values will do"
        )


@contextmanager
def _nested() -> Iterator[None]:
    """Count a map that is being recorded now."""
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def _evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    batch_dim: int | None,
    state: RandomState,
    order: int,
    watch: Watch | None,
) -> Tape:
    attach = torch.is_grad_enabled()
    given = _active(arguments)
    with untouched(function, state) as loan:
        inputs = tuple(_source(leaf, attach) for leaf in given)
        if watch is not None:
            watch.start(inputs, arguments.others, arguments.domain)
        with _nested(), _watched(watch):
            value = function(*arguments.substitute(_fresh(arguments, inputs)))
            leaves, codomain = _outputs(value, arguments, batch_dim)
            # Watched too: a conjugate that nobody has looked at yet is computed here.
            outputs = tuple(as_real(leaf) for leaf in codomain.select(leaves))
        census = take_census(outputs, inputs, given, attach)
    if not census.attached:
        value = _detached(leaves, codomain)
    mode = tuple([module.training for module in loan.modules])
    made = function, arguments, state, value, inputs, outputs, codomain, census, mode, order
    return Tape(*made, loan=loan)


def _watched(watch: Watch | None) -> AbstractContextManager[None]:
    return nullcontext() if watch is None else watch.following()


def record_gradient(
    function: Callable[..., Any],
    arguments: Arguments,
    batch_dim: int | None,
    state: RandomState | None = None,
    watch: Watch | None = None,
) -> Tape:
    """Record the gradient of a scalar map as a map in its own right, domain to domain."""
    tape = record(function, arguments, batch_dim, state, order=2, watch=watch)
    if tape.codomain.size != 1:
        per = " per sample" if batch_dim == 0 else ""
        raise ShapeError(
            f"a Hessian expects one output scalar{per}, got {tape.codomain.size} "
            f"({tape.codomain.describe()}); sum it, or take pf.jacobian of a gradient"
        )
    with recording(), _watched(watch):
        gradient = _gradient(tape)
        census = take_census(gradient, tape.inputs, _active(arguments), tape.census.attached)
    return replace(tape, outputs=gradient, codomain=tape.domain, census=census, is_gradient=True)


def record_again(tape: Tape, order: int | None = None) -> Tape:
    """Record the same map at the same point with the same random numbers."""
    again = tape.function, tape.arguments, tape.batch_dim, tape.state
    return record_gradient(*again) if tape.is_gradient else record(*again, order or tape.order)


def _gradient(tape: Tape) -> tuple[Tensor, ...]:
    outputs = [y.sum() for y in tape.outputs if y.requires_grad]
    if not outputs:
        return tuple(torch.zeros_like(x) for x in tape.inputs)
    try:
        return torch.autograd.grad(
            outputs, tape.inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        raise explained(error) from error


def _active(arguments: Arguments) -> list[Tensor]:
    return arguments.domain.select(arguments.leaves)


def _source(leaf: Tensor, attach: bool) -> Tensor:
    """The tensor to differentiate with respect to: real, and private to this tape."""
    leaf = as_real(leaf)
    if attach and leaf.requires_grad:
        return leaf.view_as(leaf)
    own = leaf.clone() if leaf.is_inference() else leaf
    try:
        return own.detach().requires_grad_()
    except RuntimeError as error:
        raise InputError(
            "expected plain tensors, got those of a transform of torch.func or of vmap; take "
            "batch_dim=0 instead of vmap, and differentiate results by their own gradients"
        ) from error


def _fresh(arguments: Arguments, inputs: Sequence[Tensor]) -> list[Any]:
    """What the function sees: copies, so that it may work on them in place."""
    rest = iter(inputs)
    leaves = []
    for value, leaf in zip(arguments.leaves, arguments.domain.leaves, strict=True):
        if leaf.differentiable:
            copied = next(rest).clone()
            leaves.append(torch.view_as_complex(copied) if leaf.is_complex else copied)
        else:
            leaves.append(value.clone() if isinstance(value, Tensor) else value)
    return leaves


def _outputs(value: Any, arguments: Arguments, batch_dim: int | None) -> tuple[list[Any], Layout]:
    leaves, codomain = Layout.of(value, batch_dim, "output")
    if not codomain.active:
        raise InputError(
            "expected a function that returns a floating-point or complex tensor, got "
            f"{codomain.describe()} from {type(value).__name__}; return the tensor itself"
        )
    if codomain.batch != arguments.domain.batch:
        raise ShapeError(
            f"batch_dim=0 expects outputs with the batch of the input, "
            f"{arguments.domain.batch}, as dimension 0, got {codomain.describe()}; "
            "reshape the output, or use batch_dim=None for one map"
        )
    return leaves, codomain


def _detached(leaves: Sequence[Any], codomain: Layout) -> Any:
    return codomain.structure.rebuild(
        [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    )


def inside_a_transform(tensors: Sequence[Tensor]) -> bool:
    """Whether some tensors are those of a transform of ``torch.func``: they hide what they hold."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any([wrapped(tensor) for tensor in tensors])  # noqa: C419 (at each evaluation)


def nodes_behind(roots: Sequence[Node | None], stops: set[Any]) -> list[Node]:
    """Every node that the roots depend on, once each, without going past ``stops``."""
    return [node for node, _ in named_nodes(roots, stops)]


def named_nodes(roots: Sequence[Node | None], stops: set[Any]) -> list[tuple[Node, str]]:
    """The same with the names of the nodes. Every call of the library makes this walk."""
    pending = [node for node in roots if node is not None]
    seen = set(pending)
    found = []
    while pending:
        node = pending.pop()
        name = node.name()
        found.append((node, name))
        if name == _LEAF or node in stops:
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return found


def source_node(tensor: Tensor) -> Node:
    """The node at which the gradient of a tensor arrives."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def take_census(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    given: Sequence[Tensor] = (),
    attach: bool = True,
) -> Census:
    """Walk the graph from the outputs back to the inputs.

    ``given`` are the tensors that the inputs were made of; ``attach`` is whether anybody wants
    gradients of what will be computed.
    """
    sources = {source_node(x) for x in inputs}
    ops, custom = set(), set()
    versions = [(x, x._version) for x in given if not x.is_inference()]
    attached = any(x.grad_fn is not None for x in inputs)
    reaches = False
    for node, name in named_nodes([y.grad_fn for y in outputs], sources):
        if node in sources:
            reaches = True
        elif name == _LEAF:
            attached = True
            leaf = cast(Any, node).variable
            versions.append((leaf, leaf._version))
        elif name == _LAYER_NORM and _has_a_bias_alone(node):
            ops.update({name, f"{name} of a bias alone"})
        elif name not in ops:
            ops.add(name)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                custom.add(name)
                ops.update({_ONCE} if _is_once(node) else ())
    return Census(frozenset(ops), frozenset(custom), tuple(versions), attach and attached, reaches)


def _is_once(node: Any) -> bool:
    """Whether the backward of a custom function is marked as one without a derivative."""
    backward = getattr(type(node), "_forward_cls", None) and type(node)._forward_cls.backward
    return getattr(backward, "__code__", None) is _ONCE_CODE


def _has_a_bias_alone(node: Any) -> bool:
    """Whether a layer norm has a bias to differentiate by, and no weight."""
    return node._saved_weight is None and node.next_functions[-1][0] is not None


@dataclass(frozen=True)
class LinearHead:
    """A last linear layer y = h W^T + b, seen from the graph: where h is, and W."""

    edge: GradientEdge
    weight: Tensor
    hidden_shape: tuple[int, ...]


def linear_head(tape: Tape) -> LinearHead | None:
    """Find a last linear layer with one row per sample: identity seeds need no product there."""
    if len(tape.outputs) != 1:
        return None
    node = tape.outputs[0].grad_fn
    while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    if node is None or node.name() != "AddmmBackward0":
        return None
    return _head_of(tape, node)


def _head_of(tape: Tape, node: Any) -> LinearHead | None:
    (bias, _), (hidden, number), (weight, _) = node.next_functions
    sources = {source_node(x) for x in tape.inputs}
    side = nodes_behind([bias, weight], sources)
    if hidden is None or node._saved_alpha != 1 or any(other in sources for other in side):
        return None
    matrix = node._saved_mat2
    rows = tape.codomain.batch or 1
    if matrix.shape[1] != tape.codomain.size or tape.outputs[0].numel() != rows * matrix.shape[1]:
        return None
    return LinearHead(GradientEdge(hidden, number), matrix.t(), (rows, matrix.shape[0]))


def op_name(node_name: str) -> str:
    """``NativeBatchNormBackward0`` is the backward of ``native_batch_norm``."""
    plain = re.sub(r"Backward\d*$", "", node_name)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", plain).lower() or node_name


def coupling_op(tape: Tape, cotangents: Sequence[Tensor], others: Tensor) -> str | None:
    """Name the op that lets a cotangent of some samples reach the others.

    ``cotangents`` are zero at ``others``, a mask (B,); going back from the output, the first op
    whose incoming gradient is zero there and whose outgoing one is not is the culprit.
    """
    found: list[str] = []
    sources = {source_node(x) for x in tape.inputs}
    nodes = nodes_behind([y.grad_fn for y in tape.outputs], sources)
    handles = [node.register_hook(_watch(node.name(), others, found)) for node in nodes]
    try:
        live = [(y, u) for y, u in zip(tape.outputs, cotangents, strict=True) if y.requires_grad]
        outputs, seeds = zip(*live, strict=True)
        torch.autograd.grad(outputs, tape.inputs, seeds, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return op_name(found[0]) if found else None


def _watch(name: str, others: Tensor, found: list[str]) -> Callable[[Any, Any], None]:
    def look(outgoing: Any, incoming: Any) -> None:
        if any(_leaks(g, others) for g in outgoing) and not any(
            _leaks(g, others) for g in incoming
        ):
            found.append(name)

    return look


def _leaks(gradient: Tensor | None, others: Tensor) -> bool:
    """Whether a gradient with the batch in front is not zero at the other samples."""
    if gradient is None or gradient.dim() == 0 or gradient.shape[0] != len(others):
        return False
    return bool(gradient[others.to(gradient.device)].any())


def explained(error: RuntimeError) -> RuntimeError | DifferentiationError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if type(error).__name__ == "CheckpointError":
        return DifferentiationError(
            "expected code that runs the same way again, but what runs inside of a checkpoint "
            "holds an op that is written out here; take the checkpoint away for this call"
        )
    if "functorch transform" in text:
        return DifferentiationError(
            "expected plain tensors, got those of a transform of torch.func; differentiate results "
            "by their own gradients instead"
        )
    if "use_reentrant" in text:
        return DifferentiationError(
            "expected a function that plain gradients go through, got a reentrant checkpoint in "
            "it; call torch.utils.checkpoint.checkpoint with use_reentrant=False"
        )
    signs = ("not implemented", "not differentiable", "once_differentiable", "derivative")
    if isinstance(error, NotImplementedError) or any(sign in text for sign in signs):
        return DifferentiationError(
            f"expected ops that can be differentiated, but torch says: {text}; "
            "replace the op by a composite of differentiable ones"
        )
    return error


def refuse_stale(tape: Tape) -> None:
    """Raise where what the graph was recorded at has changed since, and the graph is lost."""
    if tape.census.stale:
        raise DifferentiationError(
            "expected the parameters and inputs that this Jacobian was taken at, but they were "
            "changed in place since then; call pf.jacobian again after such a step"
        )
