"""Maps of events, seen as maps of flat samples: (*batch, *event) <-> (B, n).

A flow, a transform or an embedding sees tensors (*batch, *event). Its Jacobian is per event, so
whatever differentiates it wants one batch axis and one axis of scalars. The batch is never cut or
reordered: a map may hold parameters of the shape of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushforward.derivatives import jacobian
from pushforward.errors import CouplingError, ShapeError
from pushforward.jacobians import Jacobian
from pushforward.plans import function_name
from pushforward.purity import untouched

Shape = tuple[int, ...]
_KEPT_VIEWS = 8


@dataclass(frozen=True, eq=False)
class Events:
    """A map from events (*batch, *domain) to events (*batch, *codomain).

    `flat` is the map from (B, n) to (B, m), one object for the life of this one, so that plans made
    for it are found again. `name` is what messages call the map.
    """

    name: str
    batch: Shape
    domain: Shape
    codomain: Shape
    flat: Callable[[Tensor], Tensor]

    @staticmethod
    def of(
        function: Callable[..., Any],
        batch: Shape,
        domain: Shape,
        codomain: Shape,
        name: str | None = None,
    ) -> Events:
        name = name or function_name(function)
        flat = partial(_on_flat, function, batch, domain, codomain, name)
        return Events(name, batch, domain, codomain, flat)

    @property
    def n(self) -> int:
        return math.prod(self.domain)

    @property
    def m(self) -> int:
        return math.prod(self.codomain)

    @property
    def samples(self) -> int:
        return math.prod(self.batch)

    def flatten(self, x: Tensor) -> Tensor:
        """(*batch, *event) -> (B, n), for either side."""
        return x.reshape(self.samples, math.prod(x.shape[len(self.batch) :]))

    def unflatten(self, x: Tensor) -> Tensor:
        """(B, n) -> (*batch, *domain)."""
        return x.reshape((*self.batch, *self.domain))

    def per_sample(self, values: Tensor) -> Tensor:
        """(B,) -> (*batch,)."""
        return values.reshape(self.batch)

    def jacobian(self, x: Tensor) -> Jacobian:
        """The Jacobian per sample at flat points (B, n).

        Raises:
            CouplingError: samples influence each other.
        """
        try:
            return jacobian(self.flat, x, batch_dim=0)
        except CouplingError as error:
            raise CouplingError(
                f"{self.name} expects to act on each event of shape "
                f"{self.domain} of a batch {self.batch} by itself: {error}; where these "
                "dimensions belong to the event, say so: event_dim= of an AutoTransform, "
                "Independent(base, k) for a Pushforward"
            ) from error

    def evaluate(self, x: Tensor) -> Tensor:
        """The value at flat points under the grad mode of the caller, with nothing left behind."""
        wanted = torch.is_grad_enabled()
        with untouched(self.flat), torch.set_grad_enabled(wanted):
            return self.flat(x)


def _on_flat(
    function: Callable[..., Any],
    batch: Shape,
    domain: Shape,
    codomain: Shape,
    name: str,
    x: Tensor,
) -> Tensor:
    given = x.reshape((*batch, *domain))
    y = function(given)
    require_shape(y, (*batch, *codomain), name, given)
    return y.reshape(len(x), math.prod(codomain))


class Views:
    """The `Events` of one map for each shape that it was used at; not copied with their owner."""

    def __init__(self) -> None:
        self._kept: dict[Any, Events] = {}

    def at(
        self,
        function: Callable[..., Any],
        batch: Shape,
        domain: Shape,
        codomain: Shape,
        name: str,
    ) -> Events:
        key = (batch, domain, codomain, name)
        if key not in self._kept:
            if len(self._kept) >= _KEPT_VIEWS:
                self._kept.clear()
            self._kept[key] = Events.of(function, batch, domain, codomain, name)
        return self._kept[key]

    def __deepcopy__(self, memo: Any) -> Views:
        return Views()

    def __reduce__(self) -> Any:
        return Views, ()


def require_shape(y: Any, expected: Shape, name: str, x: Tensor) -> None:
    """Refuse an output that is not a tensor of the expected shape."""
    if not isinstance(y, Tensor) or tuple(y.shape) != tuple(expected):
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"{name} is expected to keep the batch and to return {tuple(expected)} for the events "
            f"{tuple(x.shape)}, got {came}; it sees tensors (*batch, *event)"
        )


def worst_index(sizes: Tensor, batch: Shape) -> Shape:
    """Where in the batch the largest of (B,) values is; NaN counts as the largest."""
    flat = int(sizes.nan_to_num(nan=math.inf).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), batch))
