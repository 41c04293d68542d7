"""What the law of f(z) asks of the distribution of z."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import Transform

from pushforward.density.events import Shape
from pushforward.errors import InputError, ShapeError
from pushforward.purity import replayed, untouched


def require_continuous(base: Any) -> None:
    """Refuse what is no distribution, and what has no density."""
    if not isinstance(base, Distribution):
        raise InputError(f"base expects a distribution, got {type(base).__name__}")
    support = _support(base)
    if support is not None and support.is_discrete:
        raise InputError(
            f"base expects a distribution with a density, got the discrete {base}; f(z) then has "
            "the probabilities of z, with no volume in them"
        )


def is_inside(base: Distribution, x: Tensor) -> Tensor:
    """Which x lie in the support, (*batch, *event) -> (*batch,); all, where it does not say."""
    support = _support(base)
    if support is None:
        return x.new_ones(x.shape[: x.dim() - len(base.event_shape)], dtype=torch.bool)
    return support.check(x)


def _support(base: Distribution) -> constraints.Constraint | None:
    try:
        return base.support
    except NotImplementedError:
        return None


def quiet_draws(base: Distribution, shape: Shape) -> Tensor:
    """Draws that are the same every time and leave the global generators as they were."""
    with torch.no_grad(), replayed():
        torch.default_generator.manual_seed(0)
        return base.sample(torch.Size(shape))


def image_shape(base: Distribution, f: Callable[[Tensor], Tensor]) -> torch.Size:
    """The event shape of f(z), found on one draw."""
    with untouched(f), torch.no_grad():
        z = quiet_draws(base, (1,))
        y = f(z)
    lead = (1, *base.batch_shape)
    if not isinstance(y, Tensor) or tuple(y.shape[: len(lead)]) != lead:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"Pushforward expects f to keep the dimensions before the event, {lead} of a draw "
            f"{tuple(z.shape)} (one sample, batch_shape {tuple(base.batch_shape)}, event_shape "
            f"{tuple(base.event_shape)}), got {got}; what f mixes must belong to the event: "
            "Independent(base, 1)"
        )
    return y.shape[len(lead) :]


def _parts(item: Any) -> Iterator[Any]:
    """What distributions and transforms are made of."""
    if isinstance(item, (list, tuple)):
        yield from item
    elif isinstance(item, (Distribution, Transform)) and not isinstance(item, nn.Module):
        yield from vars(item).values()


def found_in(item: Any, kind: Any) -> list[Any]:
    """All objects of a kind that a distribution holds, not looking into modules."""
    if isinstance(item, kind):
        return [item]
    return [found for part in _parts(item) for found in found_in(part, kind)]


def moved(item: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy with the tensors moved; modules and parameters are moved where they are."""
    if isinstance(item, (nn.Module, nn.Parameter)):
        return item
    if isinstance(item, Tensor):
        return fn(item)
    if isinstance(item, (list, tuple)) and type(item) in (list, tuple):
        return type(item)(moved(part, fn) for part in item)
    if not isinstance(item, (Distribution, Transform)):
        return item
    copied = copy.copy(item)
    for name, part in list(vars(item).items()):
        vars(copied)[name] = moved(part, fn)
    return copied
