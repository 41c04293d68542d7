"""Plans remembered for functions, as long as these live.

A function is known by its code, so that a lambda made anew at each call finds the plan of the last;
whether it still is the same function is for the circumstances of the plan to say.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

from pushforward.errors import PlanError
from pushforward.plans import Plan

# How many plans are remembered for one function: one for each signature.
_REMEMBERED = 32
# And for one signature: one for each branch that was taken.
_VARIANTS = 4
_CACHE: MutableMapping[Any, dict[Any, tuple[Plan, ...]]] = weakref.WeakKeyDictionary()


def cached_plans(function: Callable[..., Any], key: Any) -> list[Plan]:
    """The plans made earlier for the same function, the last one first."""
    owner, own = _owner(function)
    try:
        found = _CACHE.get(owner, {}).get((own, key), ())
    except TypeError:  # not hashable, or no weak references
        return []
    return [plan.of(function) for plan in found]


def store_plan(function: Callable[..., Any], key: Any, plan: Plan) -> None:
    """Remember a plan, but not the function, for as long as that lives."""
    owner, own = _owner(function)
    try:
        plans = _CACHE.setdefault(owner, {})
        if (own, key) not in plans and len(plans) >= _REMEMBERED:
            del plans[next(iter(plans))]
        earlier = plans.get((own, key), ())
        plans[own, key] = (plan.of(_forgotten), *earlier)[:_VARIANTS]
    except TypeError:
        return


def _owner(function: Callable[..., Any]) -> tuple[Any, int]:
    """What plans hang on: code that stays where functions come and go."""
    if isinstance(function, types.FunctionType):
        return function.__code__, 0
    if isinstance(function, types.MethodType):
        return function.__func__.__code__ if hasattr(
            function.__func__, "__code__"
        ) else function, id(function.__self__)
    return function, 0


def _forgotten(*_: Any) -> Any:
    raise PlanError("a remembered plan knows its function only when it is asked for")
