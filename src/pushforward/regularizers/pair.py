"""An output and the input that it was computed from: given as such, or made by a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pushforward.boundary import Arguments
from pushforward.checks import agree, apart_by_zeros
from pushforward.composites import UNFIT
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    GraphError,
    InputError,
    ShapeError,
)
from pushforward.passes import gradients_of
from pushforward.path.record import Crossing
from pushforward.purity import RandomState
from pushforward.regularizers.graph import Affine, Between, Convolution, first_layer
from pushforward.regularizers.kinks import Evaluated
from pushforward.tape import explained, named_nodes, op_name, record, source_node, take_census

# Kernels without a second derivative, by what their nodes are called.
_FUSED_ATTENTION = ("FlashAttention", "EfficientAttention", "CudnnAttention")
_COMPILED = "CompiledFunctionBackward"


@dataclass(frozen=True, eq=False)
class Origin:
    """What a pair was made by."""

    model: Callable[[Tensor], Any]
    x: Tensor
    state: RandomState


@dataclass(frozen=True, eq=False)
class Pair:
    """``y``, ``(B, *out)``, with the graph that leads to it from ``x``, ``(B, *in)``.

    Attributes:
        ops: names of the nodes of that graph, and of what else ``y`` was computed from.
        connects: whether y depends on x at all.
        norms: names of batch-norm layers that take the mean of the batch, where they are known.
        origin: the model, its input and the random numbers that it drew from; None where the pair
            was given.
        logits: what ``y`` is the softmax of, if it is one.
        attached: whether anybody may want gradients of what is computed.
    """

    x: Tensor
    y: Tensor
    ops: frozenset[str]
    connects: bool
    norms: tuple[str, ...] = ()
    origin: Origin | None = None
    logits: Tensor | None = None
    attached: bool = True

    @staticmethod
    def given(x: Tensor, y: Any) -> Pair:
        """A pair that somebody made; its graph is there, or it is an error."""
        _check_input(x)
        _check_output(y, len(x))
        _check_graph(x, y)
        source = source_node(x)
        nodes = named_nodes([source_node(y)], {source})
        connects = any(n is source for n, _ in nodes) and _leads_to(x, y, [n for n, _ in nodes])
        pair = Pair(x, y, frozenset([name for _, name in nodes]), connects)
        if not pair.connects:
            raise GraphError(
                "expected y to be computed from x, but no graph leads from one to the other; "
                "compute y from this very x, not from a copy or a slice taken before"
            )
        pair._refuse_unfit()
        return pair

    @staticmethod
    def made(
        model: Callable[[Tensor], Any],
        x: Any,
        state: RandomState,
        owner: nn.Module | None = None,
    ) -> Pair:
        """Evaluate a model; nothing of it stays visible. ``owner`` is the module that runs."""
        _check_model(model)
        _check_input(x)
        tape = record(Evaluated(model, owner), Arguments.of((x,), 0, 0), 0, state)
        _check_output(tape.value, len(x))
        y = tape.outputs[0]
        norms = _coupling_norms(model if owner is None else owner, tape.loan.modules)
        census, origin = tape.census, Origin(model, x, state)
        known = census.ops, census.reaches_inputs, norms, origin
        return Pair(tape.inputs[0], y, *known, attached=census.attached)

    @property
    def batch(self) -> int:
        return len(self.y)

    @property
    def outputs(self) -> int:
        return math.prod(self.y.shape[1:])

    @cached_property
    def between(self) -> Between:
        """The nodes on the ways from x to y."""
        return Between.of(self.y, self.x)

    @cached_property
    def first(self) -> Affine | Convolution | None:
        """The layer that x goes into first, where that is linear."""
        return first_layer(self.between, self.batch)

    @cached_property
    def batched(self) -> bool:
        """Whether several cotangents go through one backward pass, rather than one by one.

        On a CPU convolutions gain nothing from that, and lose what stays in the cache.
        """
        start = None if self.first is None else self.first.edge.node
        names = {name for node, name in self.between.names.items() if node is not start}
        convolved = "ConvolutionBackward0" in names and self.y.device.type == "cpu"
        return not convolved and take_census((self.y,), (self.x,)).vmappable

    def of_probabilities(self) -> Pair:
        """The same with softmax over dimension 1 behind it."""
        if self.y.dim() < 2:
            raise ShapeError(
                'of="probabilities" expects logits (B, classes, ...), got shape '
                f'{tuple(self.y.shape)}; take of="logits" for one number per sample'
            )
        with torch.enable_grad():
            y = self.y.softmax(dim=1)
        return replace(self, y=y, logits=self.y)

    def pull(self, cotangents: Tensor, graph: bool | None = None) -> Tensor:
        """u^T dy/dx for ``(k, B, C)`` cotangents, ``(k, *x)``; with a graph if gradients are on."""
        return self.pull_to([self.x], cotangents, graph)[0]

    def pull_to(
        self, places: Sequence[Any], cotangents: Tensor, graph: bool | None = None
    ) -> list[Tensor]:
        """The same for places on the way, tensors or edges."""
        create = (self.attached and torch.is_grad_enabled()) if graph is None else graph
        seeds = cotangents.reshape(-1, *self.y.shape)
        try:
            if len(seeds) > 1:
                return gradients_of((self.y,), places, [seeds], len(seeds), create, self.batched)[0]
            found = torch.autograd.grad(
                self.y, places, seeds[0], retain_graph=True, create_graph=create
            )
        except RuntimeError as error:
            raise explained(error) from error
        return [gradient.unsqueeze(0) for gradient in found]

    def refuse_coupled(self, blocks: Sequence[Tensor], place: Any, cotangents: Tensor) -> None:
        """Raise unless blocks of rows, to which cotangents ``(k, B, C)`` were pulled, scale with
        them sample by sample."""
        if not self._scales(blocks, place, cotangents):
            raise CouplingError(self.coupling_message())

    def separates(self, places: Sequence[Crossing]) -> bool:
        """Whether each place holds a part of its own for each sample, in their order."""
        if any(place.shape[:1] != (self.batch,) for place in places):
            return False
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(1, self.batch, self.outputs, generator=generator)
        cotangent = cotangent.to(self.y.device, self.y.dtype)
        edges = [place.edge for place in places]
        rows = self.pull_to(edges, cotangent, graph=False)
        return all(
            self._scales([block], edge, cotangent) for block, edge in zip(rows, edges, strict=True)
        )

    def _scales(self, blocks: Sequence[Tensor], place: Any, cotangents: Tensor) -> bool:
        """Whether rows scale with cotangents that are weighed sample by sample."""
        if self.batch < 2:
            return True
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(len(cotangents) + self.batch, generator=generator) + 0.5
        # One weight for each sample tells any two apart; one for each row keeps rows apart.
        weights = torch.outer(weights[: len(cotangents)], weights[len(cotangents) :]).to(blocks[0])
        # What is sent to another sample has a component along a random vector.
        look = torch.randn(blocks[0][0].numel() // self.batch, generator=generator).to(blocks[0])
        with torch.no_grad():
            mixed = (weights.unsqueeze(-1) * cotangents).sum(0, keepdim=True)
            came = self.pull_to([place], mixed, graph=False)[0].reshape(self.batch, -1) @ look
            rows = [block.detach().reshape(len(block), self.batch, -1) @ look for block in blocks]
            seen = weights * torch.cat(rows)
        scale = seen.abs().amax() * len(seen)
        return agree(came, seen.sum(0), scale, double=1e-9) or self._apart_by_zeros(place, mixed)

    def _apart_by_zeros(self, place: Any, cotangent: Tensor) -> bool:
        """Whether nothing arrives at samples whose own cotangents ``(1, B, C)`` are zero."""
        if take_census((self.y,), (self.x,)).custom:
            return False
        with torch.no_grad():
            pull = lambda u: self.pull_to([place], u, graph=False)[0]  # noqa: E731
            return apart_by_zeros(cotangent, pull, self.batch)

    def _refuse_unfit(self) -> None:
        """Raise where an op on the way has no second derivative, or a wrong one."""
        if not any(map(_is_unfit, self.ops)):
            return
        met = sorted({op_name(n) for n in self.between.names.values() if _is_unfit(n)})
        if met:
            raise DifferentiationError(
                f"expected ops that can be differentiated twice, got {', '.join(met)} between x "
                "and y; give the model instead, penalty(model, x): there they are replaced"
            )

    def coupling_message(self) -> str:
        """Say which layers let samples influence each other, and what to do."""
        if self.norms:
            culprit, advice = f"batch norm in training mode ({', '.join(self.norms)})", True
        else:
            ops = sorted({op_name(name) for name in self.between.names.values() if "Norm" in name})
            culprit, advice = (" or ".join(ops) if ops else "an op"), bool(ops)
        return (
            "an exact Jacobian per sample expects independent samples, but they influence each "
            f"other through {culprit}; "
            + ("call .eval() on these layers, or " if advice else "")
            + "take random projections, which penalise the Jacobian of the whole batch"
        )


def _check_model(model: Any) -> None:
    if not callable(model):
        raise InputError(
            "expected penalty(x, y) with tensors, or penalty(model, x) with a callable, got "
            f"{type(model).__name__} first"
        )


def _check_input(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise InputError(
            f"expected the input x to be one tensor, got {type(x).__name__}; wrap the model so "
            "that it takes one"
        )
    if not x.is_floating_point():
        raise InputError(f"expected a real floating-point x, got {x.dtype}; convert it")
    if x.dim() == 0 or len(x) == 0:
        raise ShapeError(
            f"expected a batch (B, *in) of at least one sample, got shape {tuple(x.shape)}"
        )


def _check_output(y: Any, batch: int) -> None:
    if not isinstance(y, Tensor):
        raise InputError(
            f"expected one output tensor, got a {type(y).__name__}; penalise one of its tensors, "
            "as in penalty(lambda x: model(x)[0], x)"
        )
    if not y.is_floating_point():
        raise InputError(f"expected a real floating-point output, got {y.dtype}")
    if y.dim() == 0 or len(y) != batch:
        raise ShapeError(
            f"expected an output with the batch of the input, {batch}, as dimension 0, got shape "
            f"{tuple(y.shape)}"
        )
    if y.numel() == 0:
        raise ShapeError(f"expected at least one output, got shape {tuple(y.shape)}")


def _check_graph(x: Tensor, y: Tensor) -> None:
    if not x.requires_grad:
        raise GraphError(
            "expected x to require gradients, but it does not; call x.requires_grad_() before "
            "computing y from it, or give the model: penalty(model, x)"
        )
    if not y.requires_grad:
        raise GraphError(
            "expected y to have a graph that leads to x, but it has none; compute it with "
            "gradients enabled and without detach(), or give the model: penalty(model, x)"
        )


def _leads_to(x: Tensor, y: Tensor, nodes: Sequence[Any]) -> bool:
    """Whether one of the nodes uses x, rather than another result of the node that made it."""
    source, number = get_gradient_edge(x)[:2]
    if y.grad_fn is source:
        return y.output_nr == number
    return any((source, number) in node.next_functions for node in nodes)


def _is_unfit(name: str) -> bool:
    return name in UNFIT or any(part in name for part in (*_FUSED_ATTENTION, _COMPILED))


def _coupling_norms(model: Any, ran: Sequence[nn.Module]) -> tuple[str, ...]:
    """Names of the batch-norm layers that take the statistics of the batch."""
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    names = {module: name or type(module).__name__ for name, module in named}
    kind = nn.modules.batchnorm._BatchNorm
    return tuple(
        names.get(module, type(module).__name__)
        for module in ran
        if isinstance(module, kind) and (module.training or module.running_mean is None)
    )
