"""The penalty of contractive autoencoders, and one with the curvature of the encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import InputError
from pushforward.purity import outside_inference
from pushforward.regularizers.jacobian import all_outputs, mean_squared_norm
from pushforward.regularizers.onelayer import OneLayer
from pushforward.regularizers.pair import Pair
from pushforward.regularizers.randomness import Penalty, Source, checked_projections, directions


class ContractivePenalty(Penalty):
    r"""The squared Frobenius norm of an encoder's Jacobian, averaged over the batch.

    .. math::
        \frac{1}{B} \sum_b \|J(x_b)\|_F^2 \; + \;
        E_{e \sim N(0, s^2 I)} \frac{1}{B} \sum_b \|J(x_b) - J(x_b + e)\|_F^2

    the second term with ``hessian_noise=s`` alone; for small s it is s^2 times the squared norm of
    the Hessian.

    Args:
        hessian_noise: s, the standard deviation of the noise; None leaves the second term out.
        projections: "exact", or k random directions as in `JacobianPenalty`. An encoder that is one
            elementwise function of one linear or convolutional layer is exact in any case.
        hessian_weight: a factor before the second term.
        corruptions: how many noisy points the second term is averaged over.
        seed: of a generator that belongs to this penalty.
        generator: drawn from instead; with neither of them torch's default generator is.

    ``penalty(encoder, x)`` with ``x``, ``(B, *in)``, evaluates the encoder and leaves no trace of
    that; ``penalty(x, h)`` takes codes ``h`` that were computed from an ``x`` that requires
    gradients, without a second term. It returns ``()``.

    Cost: for h = s(W x + b) a closed form, sum_j s'(a_j)^2 |W_j|^2: one evaluation and one backward
    pass of the elementwise function, found in the graph of any code (``nn.Sequential``, functions,
    convolutions). Otherwise that of `JacobianPenalty`, for each noisy point once more.

    Raises:
        InputError: arguments out of range, or of another kind.
        PushforwardError: for the reasons that `JacobianPenalty` has. Batch norm in training mode is
            a CouplingError, but for random projections.

    From Rifai, Vincent, Muller, Glorot and Bengio, "Contractive auto-encoders", ICML 2011, and
    Rifai et al., "Higher order contractive auto-encoder", ECML 2011.

    Example:
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Identity())
        >>> _ = torch.nn.init.ones_(encoder[0].weight)
        >>> round(ContractivePenalty()(encoder, torch.randn(5, 2)).item(), 4)
        6.0
    """

    def __init__(
        self,
        hessian_noise: float | None = None,
        projections: int | str = "exact",
        *,
        hessian_weight: float = 1.0,
        corruptions: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(seed, generator)
        checked_projections(projections)
        _check(hessian_noise, corruptions)
        self.hessian_noise, self.projections = hessian_noise, projections
        self.hessian_weight, self.corruptions = hessian_weight, corruptions

    def forward(
        self,
        encoder: Tensor | Callable[[Tensor], Any],
        x: Tensor,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty on ``(encoder, x)``, or on a pair ``(x, h)``."""
        source = self._drawing(seed, generator)
        wanted = checked_projections(self.projections)
        with outside_inference():
            if isinstance(encoder, Tensor):
                return self._of_pair(encoder, x, wanted, source)
            return self._of_encoder(encoder, x, wanted, source)

    def _of_encoder(
        self, encoder: Callable[[Tensor], Any], x: Tensor, wanted: int | None, source: Source
    ) -> Tensor:
        state = source.state()
        pair = Pair.made(encoder, x, state)
        layer = OneLayer.of(pair)
        total = _mean(pair, layer, wanted, source)
        if self.hessian_noise is None:
            return total
        others = []
        for _ in range(self.corruptions):
            noise = self.hessian_noise * source.normal(tuple(x.shape), x)
            # From the same state: dropout is to be the same at both points.
            others.append(Pair.made(encoder, x + noise.to(x.dtype), state))
        distances = [_mean_distance(pair, layer, other, wanted, source) for other in others]
        return total + self.hessian_weight * torch.stack(distances).mean()

    def _of_pair(self, x: Tensor, h: Any, wanted: int | None, source: Source) -> Tensor:
        if self.hessian_noise is not None:
            raise InputError(
                "hessian_noise expects penalty(encoder, x), got a pair of tensors; the encoder is "
                "evaluated at noisy points"
            )
        pair = Pair.given(x, h)
        return _mean(pair, OneLayer.of(pair), wanted, source)

    def extra_repr(self) -> str:
        return f"hessian_noise={self.hessian_noise}, projections={self.projections!r}"


def _mean(pair: Pair, layer: OneLayer | None, wanted: int | None, source: Source) -> Tensor:
    if layer is None:
        return mean_squared_norm(pair, wanted, source)
    return layer.squared_norm() / pair.batch


def _mean_distance(
    pair: Pair, layer: OneLayer | None, other: Pair, wanted: int | None, source: Source
) -> Tensor:
    """The mean over the batch of ||J - J'||_F^2."""
    there = None if layer is None else OneLayer.of(other)
    if layer is not None and there is not None:
        return layer.squared_distance(there) / pair.batch
    if wanted is None:
        chosen, scale = all_outputs(pair.y), 1.0
    else:
        chosen, scale = directions(wanted, pair.y, source), pair.outputs / wanted
    difference = pair.pull(chosen) - other.pull(chosen)
    return difference.square().sum() * (scale / pair.batch)


def _check(hessian_noise: float | None, corruptions: int) -> None:
    if hessian_noise is not None and not (
        isinstance(hessian_noise, int | float) and 0 < hessian_noise < math.inf
    ):
        raise InputError(
            f"hessian_noise expects a positive finite number or None, got {hessian_noise!r}"
        )
    if isinstance(corruptions, bool) or not isinstance(corruptions, int) or corruptions < 1:
        raise InputError(f"corruptions expects a whole number of at least 1, got {corruptions!r}")
