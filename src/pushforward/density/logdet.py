"""The log-determinant of a map, and the check of one that was written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pushforward.density.events import Events, Shape, worst_index
from pushforward.derivatives import jacobian
from pushforward.errors import DimensionError, InputError, LogDetError, ShapeError
from pushforward.linalg import slogdet
from pushforward.plans import function_name
from pushforward.purity import untouched


def value_and_logabsdet(
    f: Callable[..., Any], x: Any, batch_dim: int | None = 0
) -> tuple[Any, Tensor]:
    """f(x) and log|det J| at x, from one evaluation.

    Args:
        f: a map that keeps the number of scalars (per sample with ``batch_dim=0``).
        x: a tensor, or a pytree of tensors.
        batch_dim: 0 where dimension 0 is a batch of independent samples, None for one map.

    Returns:
        f(x), and log|det df/dx|: (B,), or () without a batch; -inf where J is singular. Both are
        differentiable with respect to x and to whatever f closes over.

    Raises:
        DimensionError: f changes the number of scalars.
        CouplingError: samples of the batch influence each other.

    Cost: n backward passes for the whole batch, and one LU of n x n for each sample.

    >>> y, logabsdet = value_and_logabsdet(lambda x: 2 * x, torch.zeros(5, 3))
    >>> logabsdet / torch.tensor(2.0).log()
    tensor([3., 3., 3., 3., 3.])
    """
    J = jacobian(f, x, batch_dim=batch_dim)
    m, n = J.shape
    if m != n:
        raise DimensionError(
            f"value_and_logabsdet expects a map that keeps the dimension, got R^{n} to R^{m}; "
            "pf.jacobian(f, x).logvol() is its volume, Pushforward the law of its image"
        )
    return J.value, J.logabsdet()


def logdetcheck(
    transform: Transform | Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    rtol: float | None = None,
    atol: float | None = None,
) -> float:
    """Compare a hand-written log|det J| with the exact one, sample by sample.

    Args:
        transform: a transform of torch.distributions, with x (*batch, *event) and a log-determinant
            for each event; or any callable x -> (y, logabsdet) with x (B, *event) and logabsdet
            (B,).
        x: where to compare.
        rtol, atol: the largest error that passes is ``atol + rtol * |exact|``. Defaults: the root
            of eps, and that times the size of an event.

    Returns:
        The largest error.

    Raises:
        LogDetError: a log-determinant is wrong; names the worst point.
        ShapeError: it has the wrong shape: a missing sum over the dimensions of the event.
        DimensionError: the transform changes the number of scalars of an event.

    Cost: n backward passes for the whole batch, and one LU for each sample.

    >>> from torch.distributions.transforms import TanhTransform
    >>> logdetcheck(TanhTransform(), torch.linspace(-2, 2, 5)) < 1e-6
    True
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"logdetcheck expects a floating point tensor x, got {got}")
    claim = _claim(transform, x.detach())
    exact = claim.exact()
    got = claim.logabsdet.to(exact.dtype)
    eps, size = torch.finfo(x.dtype).eps, claim.event_size
    rtol = eps**0.5 if rtol is None else rtol
    atol = eps**0.5 * max(size, 1) if atol is None else atol
    error = torch.where(got == exact, 0.0, (got - exact).abs()).nan_to_num(math.inf, math.inf)
    excess = error - (atol + rtol * exact.abs().nan_to_num(0.0, 0.0))
    if (excess > 0).any():
        raise LogDetError(claim.verdict(exact, error, excess))
    return error.max().item() if error.numel() else 0.0


@dataclass(frozen=True)
class _Claim:
    """What a transform says of itself at some points."""

    name: str
    function: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    logabsdet: Tensor
    event_dim: int

    @property
    def batch(self) -> Shape:
        return tuple(self.x.shape[: self.x.dim() - self.event_dim])

    @property
    def event_size(self) -> int:
        return math.prod(self.x.shape[len(self.batch) :])

    def exact(self) -> Tensor:
        """log|det J| by the Jacobian, (*batch,)."""
        domain = tuple(self.x.shape[len(self.batch) :])
        codomain = tuple(self.y.shape[len(self.batch) :])
        events = Events.of(self.function, self.batch, domain, codomain, self.name)
        if events.m != events.n:
            raise DimensionError(
                f"logdetcheck expects a transform that keeps the dimension of an event, got "
                f"{self.name} from {domain} to {codomain}; there is no determinant of an "
                f"{events.m} x {events.n} Jacobian"
            )
        with torch.no_grad():
            matrix = events.jacobian(self._finest(events)).matrix()
            return events.per_sample(slogdet(matrix)[1])

    def _finest(self, events: Events) -> Tensor:
        """The points in double precision, where the transform takes it: near saturation a Jacobian
        in single precision is worse than many a formula."""
        flat = events.flatten(self.x)
        try:
            with untouched(self.function):
                wide = events.flat(flat.double())
        except (RuntimeError, TypeError, ValueError):
            return flat
        return flat.double() if wide.dtype == torch.float64 else flat

    def require_shape(self) -> None:
        if tuple(self.logabsdet.shape) == self.batch:
            return
        hint = f"one number for each event of shape {tuple(self.x.shape[len(self.batch) :])}"
        if self.event_dim and self.logabsdet.shape == self.x.shape:
            hint += f": the sum over the last {self.event_dim} dimensions is missing"
        raise ShapeError(
            f"{self.name} expects a log-determinant of shape {self.batch} at x of shape "
            f"{tuple(self.x.shape)}, got {tuple(self.logabsdet.shape)}; {hint}"
        )

    def verdict(self, exact: Tensor, error: Tensor, excess: Tensor) -> str:
        """Name the worst point, and what the error looks like."""
        index = worst_index(excess.reshape(-1), self.batch)
        wrong = int((excess > 0).sum())
        point = ", ".join(f"{value:.6g}" for value in self.x[index].reshape(-1)[:8].tolist())
        flipped = torch.allclose(self.logabsdet.to(exact.dtype), -exact, rtol=1e-3, atol=1e-3)
        hint = "; it is that of the inverse: change its sign" if flipped else ""
        return (
            f"{self.name} expects log|det J| = {exact[index].item():.9g}, got "
            f"{self.logabsdet[index].item():.9g}, off by {error[index].item():.3g}, at index "
            f"{index} with x = ({point}{', ...' if self.event_size > 8 else ''}); "
            f"{wrong} of {exact.numel()} points are wrong{hint}"
        )


def _claim(transform: Any, x: Tensor) -> _Claim:
    """Ask a transform for its value and its log-determinant."""
    if not callable(transform):
        got = type(transform).__name__
        raise InputError(f"logdetcheck expects a transform or a callable, got {got}")
    name = function_name(transform)
    event_dim = transform.domain.event_dim if isinstance(transform, Transform) else x.dim() - 1
    if x.dim() < event_dim:
        raise ShapeError(f"{name} expects events of {event_dim} dimensions, got {tuple(x.shape)}")
    with untouched(transform), torch.no_grad():
        if isinstance(transform, Transform):
            function = partial(_call, transform)
            y = function(x)
            logabsdet = _own_logabsdet(transform, x, y)
        else:
            function = partial(_first, transform)
            y, logabsdet = _pair(transform(x), name)
    claim = _Claim(name, function, x, y, logabsdet, max(event_dim, 0))
    claim.require_shape()
    return claim


def _own_logabsdet(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    try:
        return transform.log_abs_det_jacobian(x, y)
    except NotImplementedError as error:
        raise InputError(
            "logdetcheck expects a transform with a log-determinant, but "
            f"{function_name(transform)} has no log_abs_det_jacobian"
        ) from error


def _call(transform: Any, x: Tensor) -> Tensor:
    return transform(x)


def _first(transform: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    return transform(x)[0]


def _pair(result: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(result, tuple) and len(result) == 2:
        y, logabsdet = result
        if isinstance(y, Tensor) and isinstance(logabsdet, Tensor):
            return y, logabsdet
    raise InputError(
        f"logdetcheck expects {name}(x) to be a pair of tensors (y, logabsdet), got "
        f"{type(result).__name__}; wrap it so that it is"
    )
