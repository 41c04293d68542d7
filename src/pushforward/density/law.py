"""The law of f(z) for a random z: densities of flows, of embeddings and of their compositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pushforward import linalg
from pushforward.density.bases import (
    found_in,
    image_shape,
    is_inside,
    moved,
    quiet_draws,
    require_continuous,
)
from pushforward.density.events import Events, Shape, Views, require_shape, worst_index
from pushforward.density.inversion import distance, invert, is_off, ranked
from pushforward.density.transforms import given_inverse, require_callables
from pushforward.errors import DimensionError, InputError, ShapeError
from pushforward.plans import function_name

# Draws of the base among which the numerical inverse chooses where to start: by the distance of
# their images, the nearest ones and some far ones, which may lie in another valley.
_CANDIDATES = 32
_RANKS = [0, 1, 2, 4, 8, 16, 24, 31]


class Pushforward(Distribution, nn.Module):
    """The law of f(z), z ~ base: a distribution of torch.distributions.

    ``log_prob(y) = base.log_prob(x) - 1/2 log det(J^T J)`` at the x with f(x) = y. Where f keeps
    the dimension this is the usual change of variables, ``- log|det J|``. Where f raises it (m > n)
    the law lives on a surface, and log_prob is with respect to the surface (Hausdorff) measure of
    the image: it integrates to 1 over the surface.

    Where `base` is a `Pushforward` too, the Jacobian is that of the whole composition: after a map
    that raises the dimension, log-volumes do not add up. `TransformedDistribution` adds them, and
    is wrong on such a base: compose with `Pushforward` instead.

    Args:
        base: a distribution. Its event_shape says what f sees as one event: for a vector of
            independent numbers take ``Independent(base, 1)``.
        f: a map from (*batch, *event) tensors to (*batch, *new_event) tensors that is one-to-one
            on the support of `base` and treats each event of the batch by itself.
        inverse: its inverse, if known: used on the image of f only. Without one x is found by
            (Gauss-)Newton with the exact Jacobian, started at draws of `base`, and differentiated
            implicitly. In a chain of `Pushforward` the inverses are used if every one is given.
        validate_args: as in torch.distributions: whether a y off the image is an error. If not,
            its log_prob is -inf.

    Raises:
        DimensionError: f lowers the dimension. The density of y is then an integral over the fibre
            {x: f(x) = y}.
        ShapeError: f does not keep the batch dimensions; y has the wrong shape.
        InputError: in log_prob, where y has a NaN, lies off the image or f(inverse(y)) is not y.
        ConvergenceError: in log_prob, where the numerical inverse finds no solution.
        CouplingError: in log_prob, where events of a batch influence each other.

    It is an `nn.Module`: ``parameters()`` finds those of f, of the inverse and of the base, and
    ``.to()`` moves them and the tensors of the base. Derivatives of log_prob are exact with respect
    to y and all of these, up to the third order where x is found numerically; for a y that a moving
    surface leaves, they are those of the nearest point. Sampling draws from torch's default
    generator; nothing else does.

    Where f is one-to-one on the support of `base` only, x is looked for there first. For m > n "off
    the image" means that no start led to y: least squares can end in a wrong valley of a strongly
    bent surface, and `inverse` then settles it.

    Cost: log_prob takes n backward passes and a QR or an LU; a numerical inverse five to ten times
    that.

    Source: Federer, Geometric Measure Theory (1969), 3.2 (the area formula).

    >>> from torch.distributions import Normal
    >>> circle = Pushforward(Normal(0.0, 0.1), lambda t: torch.stack([t.cos(), t.sin()], -1))
    >>> circle.event_shape, circle.log_prob(torch.tensor([1.0, 0.0]))
    (torch.Size([2]), tensor(1.3836))
    """

    arg_constraints = {}  # noqa: RUF012  # pyrefly: ignore[bad-override]

    def __init__(
        self,
        base: Distribution,
        f: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        require_continuous(base)
        require_callables(f, inverse)
        event_shape = image_shape(base, f)
        super().__init__(base.batch_shape, event_shape, validate_args=validate_args)
        self.base = base
        self.f = f
        self.inverse = inverse
        self._views = Views()
        if not isinstance(base, nn.Module):
            self._base_modules = nn.ModuleList(found_in(base, nn.Module))
            self._base_parameters = nn.ParameterList(found_in(base, nn.Parameter))
        self._require_dimensions()

    @property
    def has_rsample(self) -> bool:  # pyrefly: ignore[bad-override]
        return self.base.has_rsample

    @property
    def support(self) -> constraints.Constraint:  # pyrefly: ignore[bad-override]
        """The space that the image of f lies in."""
        if not self.event_shape:
            return constraints.real
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws f(z): (*sample, *batch, *event), without a graph."""
        with torch.no_grad():
            return self._image(self.base.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws f(z), differentiable with respect to f and the base: (*sample, *batch, *event)."""
        return self._image(self.base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the density at y: (..., *event) -> (..., *batch)."""
        y = self._broadcast(value)
        events = self._events(tuple(y.shape[: y.dim() - len(self.event_shape)]))
        if events.samples == 0:  # which the constraints of torch cannot check
            return events.per_sample(events.flatten(y).sum(-1))
        x, lost = self._locate_finite(events, y)
        inside = self._accepts(events, events.flatten(x.detach())) & ~lost
        x = self._safe(events, x, ~inside)
        J = events.jacobian(events.flatten(x))
        matrix = J.matrix()
        off = lost | (inside & is_off(J.value, matrix.detach(), events.flatten(y.detach())))
        self._validate(events, off, inside)
        log_base = self._root.log_prob(self._safe(events, x, off))
        nowhere = (off | ~inside).reshape(events.batch) | (log_base.detach() == -math.inf)
        log_volume = events.per_sample(_log_volume(matrix))
        return (log_base - log_volume.masked_fill(nowhere, 0.0)).masked_fill(nowhere, -math.inf)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Pushforward:
        """The same law with more batch dimensions."""
        base = self.base.expand(torch.Size(batch_shape))
        return Pushforward(base, self.f, self.inverse, self._validate_args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pushforward:
        """What ``.to()``, ``.double()`` and their like do; the base follows in a copy."""
        super()._apply(fn, recurse)
        if not isinstance(self.base, nn.Module):
            self.base = moved(self.base, fn)
        return self

    def __repr__(self) -> str:
        inverse = "numerical" if self.inverse is None else function_name(self.inverse)
        return (
            f"Pushforward({self.base}, {function_name(self.f)}, inverse={inverse}, "
            f"event_shape={tuple(self.event_shape)})"
        )

    @property
    def _chain(self) -> tuple[Pushforward, ...]:
        """The maps from the innermost base to here, the first one first."""
        return (*self.base._chain, self) if isinstance(self.base, Pushforward) else (self,)

    @property
    def _root(self) -> Distribution:
        return self._chain[0].base

    def _require_dimensions(self) -> None:
        n, m = math.prod(self._root.event_shape), math.prod(self.event_shape)
        if m < n:
            raise DimensionError(
                "Pushforward expects a map that keeps or raises the dimension, got "
                f"{function_name(self.f)} from R^{n} to R^{m}; the density of y is then the "
                "integral of base.prob(x) / sqrt(det(J J^T)) over the fibre {x: f(x) = y}, not its "
                "value at one x. Add outputs that make f one-to-one, and integrate them out"
            )
        if any(law._raises_dimension for law in found_in(self._root, Pushforward)):
            raise DimensionError(
                "Pushforward expects a base with a density on all of R^n, got one made of a "
                "Pushforward that raises the dimension; log-volumes do not add up after it: "
                "compose the maps, Pushforward(Pushforward(base, f), g) or Pushforward(base, g o f)"
            )

    @property
    def _raises_dimension(self) -> bool:
        return math.prod(self.event_shape) > math.prod(self._root.event_shape)

    def _image(self, z: Tensor) -> Tensor:
        y = self.f(z)
        batch = tuple(z.shape[: z.dim() - len(self.base.event_shape)])
        require_shape(y, (*batch, *self.event_shape), function_name(self.f), z)
        return y

    def _whole(self, z: Tensor) -> Tensor:
        """The composition of all maps of the chain."""
        for law in self._chain:
            z = law.f(z)
        return z

    def _events(self, batch: Shape) -> Events:
        domain, codomain = tuple(self._root.event_shape), tuple(self.event_shape)
        return self._views.at(self._whole, batch, domain, codomain, function_name(self.f))

    def _broadcast(self, value: Tensor) -> Tensor:
        """Check y and give it all batch dimensions."""
        event = tuple(self.event_shape)
        cut = value.dim() - len(event) if isinstance(value, Tensor) else -1
        if cut < 0 or tuple(value.shape[cut:]) != event:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"log_prob expects a tensor (..., *{event}), got {got}")
        try:
            batch = torch.broadcast_shapes(value.shape[:cut], self.batch_shape)
        except RuntimeError as error:
            raise ShapeError(
                f"log_prob expects a value that broadcasts with batch_shape "
                f"{tuple(self.batch_shape)} and event_shape {event}, got {tuple(value.shape)}"
            ) from error
        if not value.isfinite().all():
            raise InputError("log_prob expects finite values, got NaN or infinity among them")
        return value.expand((*batch, *event))

    def _locate(self, events: Events, y: Tensor) -> Tensor:
        """The x with f(x) = y, or the nearest one, (*batch, *event of the root)."""
        inverses = [law.inverse for law in reversed(self._chain) if law.inverse is not None]
        if len(inverses) == len(self._chain):
            return given_inverse(partial(_compose, inverses), events, y)
        flat = events.flatten(y)
        starts = self._starts(events, flat)
        return events.unflatten(invert(events, flat, starts, partial(self._accepts, events)))

    def _locate_finite(self, events: Events, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, and (B,) where there is none; an image of the base is looked up there instead, so that
        no NaN comes near the gradients of the others."""
        x = self._locate(events, y)
        lost = ~x.detach().isfinite().reshape(events.samples, -1).all(-1)
        if lost.any():
            with torch.no_grad():
                draw = self._safe(events, torch.zeros_like(x), torch.ones_like(lost))
                image = events.evaluate(events.flatten(draw))
            flat = torch.where(lost[:, None], image.to(y.dtype), events.flatten(y))
            x = self._locate(events, flat.reshape(y.shape))
        return x, lost

    def _accepts(self, events: Events, x: Tensor) -> Tensor:
        return is_inside(self._root, events.unflatten(x)).reshape(-1)

    def _starts(self, events: Events, y: Tensor) -> list[Tensor]:
        """Draws of the base whose images are near y, the nearest first."""
        batch = (_CANDIDATES, *self.batch_shape)
        alike = Events.of(self._whole, batch, events.domain, events.codomain, events.name)
        draws = quiet_draws(self._root, (_CANDIDATES,))
        with torch.no_grad():
            images = alike.evaluate(alike.flatten(draws)).reshape(_CANDIDATES, -1, events.m)
            place = self._place(events, y)
            distances = [distance(image[place], y.detach()) for image in images]
            order = torch.stack(distances).nan_to_num(math.inf).argsort(dim=0)[_RANKS]
        starts = list(draws.reshape(_CANDIDATES, -1, events.n)[order, place])
        same = events.domain == events.codomain
        return ranked(events, y, [*starts, y.to(draws.dtype)]) if same else starts

    def _place(self, events: Events, x: Tensor) -> Tensor:
        """Which entry of the law's own batch each flat sample belongs to."""
        return torch.arange(events.samples, device=x.device) % math.prod(self.batch_shape)

    def _safe(self, events: Events, x: Tensor, bad: Tensor) -> Tensor:
        """x with draws of the base in place of the bad ones."""
        if not bad.any():
            return x
        draw = quiet_draws(self._root, (1,)).reshape(-1, events.n)[self._place(events, x)]
        flat = torch.where(bad[:, None], draw.to(x.dtype), events.flatten(x))
        return events.unflatten(flat)

    def _validate(self, events: Events, off: Tensor, inside: Tensor) -> None:
        """Refuse points outside of the image, if arguments are to be validated."""
        if not self._validate_args or not bool((off | ~inside).any()):
            return
        if off.any():
            raise InputError(
                f"log_prob expects points of the image of {events.name}, got "
                f"{int(off.sum())} of {len(off)} that are off it, the first at index "
                f"{worst_index(off.double(), events.batch)}; project them first, give inverse= if "
                "they do lie there, or get -inf with validate_args=False"
            )
        raise InputError(
            "log_prob expects points f(x) with x in the support of the base, "
            f"{self._root.support}, but x of the value at index "
            f"{worst_index((~inside).double(), events.batch)} is not; get -inf with "
            "validate_args=False"
        )


def _compose(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def _log_volume(matrix: Tensor) -> Tensor:
    """By LU where the map keeps the dimension: it stands bad scaling better than QR."""
    square = matrix.shape[-2] == matrix.shape[-1]
    return linalg.slogdet(matrix)[1] if square else linalg.logvol(matrix)
