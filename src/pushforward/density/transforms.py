"""Any bijection written in PyTorch, as a `torch.distributions` transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pushforward.density.events import Events, Views, worst_index
from pushforward.density.inversion import invert, ranked, reattach, surface_tolerance
from pushforward.errors import InputError, ShapeError
from pushforward.linalg import slogdet, upcast
from pushforward.plans import function_name


class AutoTransform(Transform, nn.Module):
    """A transform of torch.distributions from any bijection of R^n that is written in PyTorch.

    The log-determinant comes from the exact Jacobian, so that there is none to write by hand:
    ``log|det df/dx|`` per event. Works in `TransformedDistribution`, in `ComposeTransform`, as
    ``.inv`` and with ``cache_size=1``. It is an `nn.Module`, so that the parameters of `f` are
    found by ``parameters()`` and moved by ``.to()``; hash and equality are those of the object.

    Args:
        f: a bijection that keeps the shape of the event. Sees (*batch, *event) tensors, and treats
            each event of the batch by itself.
        inverse: its inverse, if known. Without one it is found by Newton's method with the exact
            Jacobian, and differentiated implicitly: exact first, second and third derivatives with
            respect to y and to whatever `f` closes over. If what a given one returns has no graph,
            derivatives are found in the same way.
        event_dim: how many of the last dimensions are one event; 0 where `f` acts on each number
            by itself.
        cache_size: 1 keeps the last pair (x, y).

    Raises:
        InputError: `f` is not callable, `event_dim` is negative.
        ShapeError: when called, where `f` changes the shape of the event; see `Pushforward`.
        ConvergenceError: when inverted, where Newton's method finds no solution.
        CouplingError: where events of a batch influence each other.

    Cost: n backward passes and an LU for a log-determinant, n the size of the event; a numerical
    inverse takes some five to ten times that.

    >>> bend = AutoTransform(lambda x: x + 0.5 * torch.tanh(x.flip(-1)))
    >>> x = torch.tensor([0.3, -1.2])
    >>> torch.allclose(bend.inv(bend(x)), x)
    True
    """

    bijective = True

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor] | None = None,
        event_dim: int = 1,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        require_callables(f, inverse)
        if not isinstance(event_dim, int) or event_dim < 0:
            raise InputError(f"event_dim expects an integer >= 0, got {event_dim!r}")
        self.f = f
        self.inverse = inverse
        self._event_dim = event_dim
        self._views = Views()

    __hash__ = nn.Module.__hash__

    @property
    def domain(self) -> constraints.Constraint:  # pyrefly: ignore[bad-override]
        return _reals(self._event_dim)

    @property
    def codomain(self) -> constraints.Constraint:  # pyrefly: ignore[bad-override]
        return _reals(self._event_dim)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._cache_size:
            # Tensors of a graph cannot be copied, and the cache is only a shortcut.
            state["_cached_x_y"] = None, None
        return state

    def with_cache(self, cache_size: int = 1) -> AutoTransform:
        """The same transform, which remembers the last (x, y) if ``cache_size`` is 1."""
        if self._cache_size == cache_size:
            return self
        return AutoTransform(self.f, self.inverse, self._event_dim, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        self._require_event(x)
        y = self.f(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(
                f"AutoTransform expects f to keep the shape {tuple(x.shape)}, got {got}; for a map "
                "that changes the shape of the event use Pushforward(base, f)"
            )
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self._require_event(y)
        if self.inverse is not None:
            return given_inverse(self.inverse, self._events(y), y)
        events = self._events(y)
        flat = events.flatten(y)
        x = invert(events, flat, ranked(events, flat, [flat, torch.zeros_like(flat)]))
        return events.unflatten(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det df/dx| at x: (*batch, *event) -> (*batch,). Differentiable; y is not used."""
        self._require_event(x)
        events = self._events(x)
        return events.per_sample(slogdet(events.jacobian(events.flatten(x)).matrix())[1])

    def _require_event(self, x: Tensor) -> None:
        if x.dim() < self._event_dim:
            raise ShapeError(
                f"AutoTransform with event_dim={self._event_dim} expects tensors (*batch, *event) "
                f"of at least so many dimensions, got {tuple(x.shape)}"
            )

    def _events(self, x: Tensor) -> Events:
        """The map for tensors of this shape; kept, so that plans made for it are kept too."""
        cut = x.dim() - self._event_dim
        batch, event = tuple(x.shape[:cut]), tuple(x.shape[cut:])
        return self._views.at(self._call, batch, event, event, function_name(self.f))

    def __repr__(self) -> str:
        inverse = "numerical" if self.inverse is None else function_name(self.inverse)
        return (
            f"AutoTransform({function_name(self.f)}, inverse={inverse}, "
            f"event_dim={self._event_dim})"
        )


def _reals(event_dim: int) -> constraints.Constraint:
    if event_dim == 0:
        return constraints.real
    return constraints.independent(constraints.real, event_dim)


def require_callables(f: Any, inverse: Any) -> None:
    """Refuse a map, or an inverse, that cannot be called."""
    for name, function in (("f", f), ("inverse", inverse)):
        if not callable(function) and (name == "f" or function is not None):
            got = type(function).__name__
            raise InputError(f"{name} expects a function or module of one tensor, got {got}")


def given_inverse(inverse: Callable[[Tensor], Tensor], events: Events, y: Tensor) -> Tensor:
    """The user's inverse at y (*batch, *codomain), checked, with derivatives if it has none.

    Points where it is not finite are passed on: y lies outside the image of f there.
    """
    x = inverse(y)
    expected = (*events.batch, *events.domain)
    if not isinstance(x, Tensor) or tuple(x.shape) != expected:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(
            f"inverse is expected to return {expected} for {tuple(y.shape)}, got {got}"
        )
    if events.m == events.n:
        _require_inverse(events, x, y)
    if torch.is_grad_enabled() and not x.requires_grad and _wants_gradient(events, x, y):
        return events.unflatten(reattach(events, events.flatten(x), events.flatten(y)))
    return x


def _wants_gradient(events: Events, x: Tensor, y: Tensor) -> bool:
    return y.requires_grad or events.evaluate(events.flatten(x)).requires_grad


def _require_inverse(events: Events, x: Tensor, y: Tensor) -> None:
    """Refuse an inverse with f(inverse(y)) != y."""
    with torch.no_grad():
        reached, target = events.evaluate(events.flatten(x)), events.flatten(y)
        error = torch.linalg.vector_norm(upcast(reached - target), dim=-1)
        size = torch.linalg.vector_norm(upcast(target), dim=-1)
        wrong = error > surface_tolerance(y.dtype) * (1 + size)
    if wrong.any():
        worst = torch.where(wrong, error, -1.0)
        raise InputError(
            f"inverse expects to undo f, but at index {worst_index(worst, events.batch)} of the "
            f"batch |f(inverse(y)) - y| = {worst.max().item():.3g} with |y| = "
            f"{size[worst.argmax()].item():.3g}; correct it, or leave it out for a numerical one"
        )
