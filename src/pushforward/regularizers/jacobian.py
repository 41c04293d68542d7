"""The squared Frobenius norm of a network's Jacobian, as a penalty for training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.derivatives import jacobian
from pushforward.errors import CouplingError, InputError
from pushforward.purity import outside_inference, replayed
from pushforward.regularizers.graph import Affine, Convolution
from pushforward.regularizers.pair import Pair
from pushforward.regularizers.products import squared_norm_of_product, squared_norm_of_transposed
from pushforward.regularizers.randomness import (
    Penalty,
    Source,
    checked_projections,
    directions,
)

_OF = ("logits", "probabilities")
# Up to so many outputs rows to the first layer are the shortest way.
_MANY = 128


class JacobianPenalty(Penalty):
    r"""Half the squared Frobenius norm of the Jacobian, averaged over the batch.

    .. math::
        \frac{1}{2B} \sum_b \|J_b\|_F^2, \quad
        \|J\|_F^2 = \frac{C}{k}\, E \sum_{i=1}^{k} |u_i^\top J|^2

    with ``u_1`` ... ``u_k`` orthonormal and uniform on the sphere of the C outputs, drawn for each
    sample at each call.

    Args:
        projections: k, at most C; k = C leaves nothing out. "exact" takes all C outputs, and sees
            to it that samples are independent.
        of: "logits", the outputs themselves, or "probabilities", their softmax over dimension 1.
        seed: of a generator that belongs to this penalty.
        generator: drawn from instead; with neither of them torch's default generator is.

    The penalty is called in one of two ways, and trains whatever the output depends on:

    - ``penalty(x, y)`` with ``x``, ``(B, *in)``, that requires gradients and ``y``, ``(B, *out)``,
      computed from it: no evaluation of its own. In the place of ``JacobianReg(k)(x, y)``.
    - ``penalty(model, x)``: evaluates the model, of which nothing stays visible (running
      statistics, modes, gradients). Ops without a right second derivative are replaced.

    It returns ``()``.

    Batch norm in training mode lets samples influence each other. Random projections then penalise
    the Jacobian of the whole batch, the sum of ||dy_a/dx_b||_F^2 over all pairs of samples by 2B,
    without bias; "exact" refuses.

    Cost: k backward passes with a graph, all at once, and one through them later. "exact" takes C
    to the first layer alone where that is linear, h = W x: with G = dy/dh the rest is
    <G^T G, W W^T>, or the product G W where that is cheaper. ``penalty(model, x)`` with more
    outputs than inputs, or many, goes by a plan, as `pushforward.jacobian` does.

    Raises:
        InputError: arguments that are neither of the two pairs, an output that is no tensor, more
            projections than outputs.
        GraphError: ``penalty(x, y)`` without a graph from ``x`` to ``y``.
        ShapeError: an empty batch, or an output without the batch of the input.
        CouplingError: "exact" and samples that influence each other.
        DifferentiationError: an op between x and y that torch cannot differentiate twice.

    From Hoffman, Roberts and Yaida, "Robust Learning with Jacobian Regularization", 2019.

    Example:
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> round(JacobianPenalty(projections="exact")(model, torch.randn(5, 2)).item(), 4)
        3.0
    """

    def __init__(
        self,
        projections: int | str = 1,
        of: str = "logits",
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(seed, generator)
        if of not in _OF:
            raise InputError(f'of expects "logits" or "probabilities", got {of!r}')
        self.projections, self.of = projections, of
        checked_projections(projections)

    def forward(
        self,
        model: Tensor | Callable[[Tensor], Any],
        x: Tensor,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty on ``(model, x)``, or on a pair ``(x, y)``."""
        source = self._drawing(seed, generator)
        with outside_inference():
            pair = pair_of(model, x, source)
            if self.of == "probabilities":
                pair = pair.of_probabilities()
            return mean_squared_norm(pair, checked_projections(self.projections), source) / 2

    def extra_repr(self) -> str:
        return f"projections={self.projections!r}, of={self.of!r}"


def pair_of(first: Tensor | Callable[[Tensor], Any], second: Any, source: Source) -> Pair:
    """A pair from ``(x, y)``, or from ``(model, x)``."""
    if isinstance(first, Tensor):
        return Pair.given(first, second)
    return Pair.made(first, second, source.state())


def mean_squared_norm(pair: Pair, projections: int | None, source: Source) -> Tensor:
    """The mean over the batch of ||J||_F^2, ``()``: exact, or from random projections."""
    if not pair.connects:
        return torch.zeros((), dtype=pair.y.dtype, device=pair.y.device)
    if projections is None:
        return _exact(pair) / pair.batch
    if projections > pair.outputs:
        raise InputError(
            f"projections expects at most the number of outputs, {pair.outputs}, got "
            f"{projections}; as many already give the exact value"
        )
    chosen = directions(projections, pair.y, source)
    return _squared_norm(pair, chosen)[0] * (pair.outputs / (projections * pair.batch))


def all_outputs(y: Tensor) -> Tensor:
    """One cotangent for each output, the same for each sample, ``(C, B, C)``."""
    outputs = math.prod(y.shape[1:])
    units = torch.eye(outputs, dtype=y.dtype, device=y.device)
    return units.unsqueeze(1).expand(outputs, len(y), outputs)


def _exact(pair: Pair) -> Tensor:
    by_structure = _by_structure(pair)
    if by_structure is not None:
        return by_structure
    chosen = all_outputs(pair.y)
    total, blocks, place = _squared_norm(pair, chosen)
    pair.refuse_coupled(blocks, place, chosen)
    return total


def _by_structure(pair: Pair) -> Tensor | None:
    """The sum of the squared entries by a plan, where that takes far fewer passes than outputs."""
    origin = pair.origin
    if origin is None or pair.outputs <= min(_MANY, math.prod(pair.x.shape[1:])):
        return None
    if pair.norms:
        raise CouplingError(pair.coupling_message())
    with replayed(origin.state):
        J = jacobian(origin.model, origin.x, batch_dim=0)
        if 2 * J.plan.passes >= pair.outputs:
            return None
        if pair.logits is None:
            return J.fro_norm().square().sum()
        rows = J.matrix().reshape(*pair.y.shape, -1)
    p = pair.y.unsqueeze(-1)
    return (p * (rows - (p * rows).sum(1, keepdim=True))).square().sum()


def _squared_norm(pair: Pair, cotangents: Tensor) -> tuple[Tensor, list[Tensor], Any]:
    """The sum of |u^T J|^2 over samples and cotangents; and what was pulled, to which place."""
    place, norm = stop(pair, len(cotangents))
    # Cotangents that go one by one stay in the cache up to the end.
    together = len(cotangents) == 1 or pair.batched
    groups = [cotangents] if together else cotangents.split(1)
    blocks = [pair.pull_to([place], group)[0] for group in groups]
    return sum((norm(block) for block in blocks[1:]), norm(blocks[0])), blocks, place


def stop(pair: Pair, count: int) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """How far to pull cotangents back, and what the squared norm at x then is."""
    # One row through a linear layer is the product that autograd computes.
    first = pair.first if count > 1 or "ConvolutionBackward0" in pair.ops else None
    if isinstance(first, Affine) and count > 1:
        width, weight = len(first.weight), first.weight
        return first.edge, lambda rows: squared_norm_of_product(rows.reshape(-1, width), weight)
    if isinstance(first, Convolution) and first.has_few_inputs:
        return first.edge, lambda rows: squared_norm_of_transposed(rows.flatten(0, 1), first)
    return pair.x, lambda rows: rows.square().sum()
