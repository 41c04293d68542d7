"""What Gaussian noise on activations amounts to: the penalty that it is on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from pushforward.errors import InputError, ShapeError
from pushforward.path.record import Crossing
from pushforward.purity import outside_inference
from pushforward.regularizers.jacobian import all_outputs, stop
from pushforward.regularizers.pair import Pair
from pushforward.regularizers.randomness import Penalty, Source, checked_projections
from pushforward.regularizers.sites import INPUT, Layers, Sigma, Sites
from pushforward.tape import explained, nodes_behind

_LOSSES = ("cross_entropy", "mse")


class NoisePenalty(Penalty):
    r"""What the loss gains on average from Gaussian noise on activations, to second order.

    .. math::
        \frac{1}{2} \sum_k \sigma_k^2 \, \frac{1}{B} \sum_b \operatorname{tr}(J_k^\top H J_k)

    J_k is the Jacobian of the model's output by its k-th place, H the Hessian of the loss by the
    output: diag(p) - p p^T for cross entropy, the identity for 1/2 |z - y|^2. It is estimated with
    one vector-Jacobian product for all places together, of u = L r with L L^T = H and r random
    signs.

    Args:
        sigma: the standard deviations, as in `GaussianNoise`.
        layers: the places, as in `GaussianNoise`.
        loss: "cross_entropy" of logits ``(B, classes, ...)``, averaged over the batch and all that
            follows the classes, or "mse": 1/2 |z - y|^2, summed over outputs, averaged over the
            batch.
        full: add what the Gauss-Newton form above leaves out, so that the whole is
            1/2 sum_k sigma_k^2 tr of the Hessian of the loss by the k-th place. It needs targets,
            ``penalty(model, x, y)``, and one more backward pass.
        projections: how many vectors r to average over, or "exact".
        seed: of a generator that belongs to this penalty.
        generator: drawn from instead; with neither of them torch's default generator is.

    ``penalty(model, x)`` evaluates the model, of which nothing stays visible, and returns ``()``.
    Where samples influence each other, as in batch norm in training mode, or share a place, it is
    the penalty of the whole batch, which is what noise amounts to there.

    Cost: one evaluation, one backward pass for each projection, and one through it later. "exact"
    takes as many as there are outputs, of all samples where they influence each other; with
    ``full`` as many as there are scalars in all places.

    Raises:
        InputError: arguments out of range, an unknown loss, ``full`` without targets.
        ShapeError: cross entropy of less than two logits.
        PushforwardError: for the reasons that `GaussianNoise` and `JacobianPenalty` have.

    From Camuto et al., "Explicit regularisation in Gaussian noise injections", NeurIPS 2020.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> penalty = NoisePenalty(0.1, loss="mse", projections="exact")
        >>> round(penalty(model, torch.randn(4, 2)).item(), 4)
        0.03
    """

    def __init__(
        self,
        sigma: Sigma,
        layers: Layers = None,
        loss: str = "cross_entropy",
        full: bool = False,
        *,
        projections: int | str = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(seed, generator)
        if loss not in _LOSSES:
            raise InputError(f'loss expects "cross_entropy" or "mse", got {loss!r}')
        checked_projections(projections)
        self.sites, self.loss, self.full = Sites(sigma, layers), loss, full
        self.projections = projections

    def forward(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty of a model at ``x``, ``(B, *in)``; with targets ``y`` where it is full."""
        source = self._drawing(seed, generator)
        wanted = checked_projections(self.projections)
        if self.full and y is None:
            raise InputError("full=True expects targets, penalty(model, x, y), and got none")
        with outside_inference():
            run = _Evaluation.of(model, x, self.sites, source)
            return self._of(run, y, wanted, source)

    def _of(self, run: _Evaluation, y: Any, wanted: int | None, source: Source) -> Tensor:
        if not run.places:
            return torch.zeros((), dtype=run.pair.y.dtype, device=run.pair.y.device)
        if self.full:
            with torch.enable_grad():
                total = _total_loss(run.pair.y, y, self.loss)
            trace = run.hessian_trace(total, wanted, source)
        else:
            trace = run.gauss_newton_trace(self.loss, wanted, source)
        return trace / 2 if run.pair.attached else trace.detach() / 2

    def extra_repr(self) -> str:
        return f"sigma={self.sites.sigma}, layers={self.sites.layers}, loss={self.loss!r}"


class _Evaluation:
    """A model at a point, with the places where its noise would go."""

    def __init__(
        self, pair: Pair, places: Sequence[tuple[str, Crossing]], variances: Sequence[float]
    ) -> None:
        self.pair, self.places, self.variances = pair, places, variances

    @staticmethod
    def of(model: nn.Module, x: Tensor, sites: Sites, source: Source) -> _Evaluation:
        found: list[tuple[str, Crossing]] = []

        def visit(name: str, value: Tensor) -> Tensor:
            # A node of its own: what else uses the value gets no noise.
            copy = value.clone() if value.requires_grad else value.clone().requires_grad_()
            found.append((name, Crossing.of(copy)))
            return copy

        def run(point: Tensor) -> Any:
            found.clear()
            with sites.visiting(model, visit):
                return model(point)

        pair = Pair.made(run, x, source.state(), model)
        behind = set(nodes_behind([pair.y.grad_fn], set()))
        live = [(name, place) for name, place in found if place.node in behind]
        variances = [sites.sigma_at(name) ** 2 for name, _ in live]
        return _Evaluation(pair, live, variances)

    @property
    def edges(self) -> list[GradientEdge]:
        return [place.edge for _, place in self.places]

    def gauss_newton_trace(self, loss: str, wanted: int | None, source: Source) -> Tensor:
        """sum_k sigma_k^2 tr(J_k^T H J_k), the mean over the batch."""
        y = self.pair.y
        if wanted is None:
            vectors = self._all_outputs().reshape(-1, *y.shape)
        else:
            vectors = source.signs((wanted, *y.shape), y).to(y.dtype)
        with torch.enable_grad():
            cotangents = _through_root(vectors, y, loss)
        # A batch of images goes back to the input by a way of its own.
        ends = [
            stop(self.pair, len(cotangents)) if name == INPUT else (place.edge, _square_sum)
            for name, place in self.places
        ]
        pulled = self.pair.pull_to([place for place, _ in ends], cotangents)
        squares = [
            variance * norm(rows)
            for variance, (_, norm), rows in zip(self.variances, ends, pulled, strict=True)
        ]
        return torch.stack(squares).sum() / (self.pair.batch * (wanted or 1))

    def _all_outputs(self) -> Tensor:
        """One vector for each output; for each of each sample, where samples meet in a place."""
        if self.pair.separates([place for _, place in self.places]):
            return all_outputs(self.pair.y)
        y = self.pair.y
        units = torch.eye(y.numel(), dtype=y.dtype, device=y.device)
        return units.reshape(-1, len(y), self.pair.outputs)

    def hessian_trace(self, loss: Tensor, wanted: int | None, source: Source) -> Tensor:
        """sum_k sigma_k^2 times the trace of the Hessian of the loss by the k-th place."""
        try:
            gradients = torch.autograd.grad(loss, self.edges, create_graph=True)
            if wanted is None:
                return self._exact_trace(gradients)
            draws = [self._drawn_trace(gradients, source) for _ in range(wanted)]
        except RuntimeError as error:
            raise explained(error) from error
        return torch.stack(draws).mean()

    def _drawn_trace(self, gradients: Sequence[Tensor], source: Source) -> Tensor:
        """v^T H v for signs v at all places at once: those of two places are independent."""
        vectors = [
            source.signs(tuple(g.shape), g).to(g.dtype) * variance**0.5
            for g, variance in zip(gradients, self.variances, strict=True)
        ]
        products = _differentiated(gradients, self.edges, vectors)
        return torch.stack(
            [(v * p).sum() for v, p in zip(vectors, products, strict=True) if p is not None]
            or [gradients[0].new_zeros(())]
        ).sum()

    def _exact_trace(self, gradients: Sequence[Tensor]) -> Tensor:
        """One pass for each scalar of each place and sample: right for coupled samples too."""
        total = gradients[0].new_zeros(())
        for gradient, edge, variance in zip(gradients, self.edges, self.variances, strict=True):
            for i in range(gradient.numel()):
                unit = torch.zeros_like(gradient)
                unit.view(-1)[i] = 1
                (row,) = _differentiated([gradient], [edge], [unit])
                if row is not None:
                    total = total + variance * row.reshape(-1)[i]
        return total


def _square_sum(rows: Tensor) -> Tensor:
    return rows.square().sum()


def _differentiated(
    gradients: Sequence[Tensor], edges: Sequence[GradientEdge], vectors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The product of the Hessian with vectors; None where it is zero."""
    live = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not live:
        return [None] * len(edges)
    return torch.autograd.grad(
        [g for g, _ in live],
        edges,
        [v for _, v in live],
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )


def _through_root(vectors: Tensor, y: Tensor, loss: str) -> Tensor:
    """L r, ``(k, *y)``, with L L^T the Hessian of the loss by the outputs of a sample.

    For p = softmax(y), L = diag(sqrt p) - p sqrt(p)^T.
    """
    if loss == "mse":
        return vectors
    _check_logits(y)
    log = y.log_softmax(dim=1)
    root, positions = (log / 2).exp(), y[0, 0].numel()
    scaled = root * vectors
    return (scaled - log.exp() * scaled.sum(dim=2, keepdim=True)) / positions**0.5


def _total_loss(z: Tensor, y: Any, loss: str) -> Tensor:
    """The loss itself, its mean over the batch."""
    if loss == "mse":
        if not isinstance(y, Tensor) or y.shape != z.shape:
            raise ShapeError(
                f"mse expects targets shaped like the output, {tuple(z.shape)}, got "
                f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
            )
        return (z - y).square().sum() / (2 * len(z))
    _check_logits(z)
    return nn.functional.cross_entropy(z, y)


def _check_logits(z: Tensor) -> None:
    if z.dim() < 2 or z.shape[1] < 2:
        raise ShapeError(
            f"cross_entropy expects logits (B, classes, ...) of at least two classes, got shape "
            f'{tuple(z.shape)}; take loss="mse" for other outputs'
        )
