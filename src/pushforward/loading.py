"""Plans read from files, and joined to functions again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pushforward.derivatives import replan
from pushforward.errors import InputError, PlanError
from pushforward.plans import Plan
from pushforward.saving import read


def load_plan(path: str | os.PathLike[str], f: Callable[..., Any] | None = None) -> Plan:
    """Read a plan that `Plan.save` wrote, and join it to a function.

    What was decided is not worked out again: neither the structure nor the colouring. At its first
    use the plan is verified: ``f`` has to run the same ops, find the same masks, and products of
    the entries have to agree with a backward pass. Where they do not, the plan is made anew.

    Args:
        path: of the file.
        f: the function. Without one the plan can be printed and looked at, and given as ``plan=``
            to `jacobian`, but not called.

    Returns:
        A `Plan`.

    Raises:
        LoadError: there is no such file, it is no plan, it is damaged, or of a later version.
        InputError: ``f`` cannot be called.
        PlanError: at a call, where the arguments have other shapes or dtypes than those that were
            planned for.

    Cost: the file. The first use adds one evaluation of ``f``, the recording of the program and
    what verification takes.

    Example:
        >>> import tempfile, torch, pushforward as pf
        >>> path = f"{tempfile.mkdtemp()}/roll.plan"
        >>> pf.plan(lambda x: x.roll(1) * x, torch.ones(6)).save(path)
        >>> plan = load_plan(path, lambda x: x.roll(1) * x)
        >>> plan.passes, plan(torch.ones(6)).fro_norm()
        (2, tensor(3.4641))
    """
    if f is not None and not callable(f):
        raise InputError(f"load_plan expects a function or module f, got {type(f).__name__}")
    contents = read(path)
    return Plan(
        function=_unknown(contents.name) if f is None else f,
        domain=contents.domain,
        codomain=contents.codomain,
        recipe=contents.recipe,
        make=_refuse if f is None else replan,
        saved=contents.saved,
        **contents.terms,
    )


def _unknown(name: str) -> Callable[..., Any]:
    """What stands in the place of a function of which only the name is known."""

    def unknown(*_: Any) -> Any:
        raise _missing(name)

    unknown.__name__ = name
    return unknown


def _refuse(plan: Plan, args: tuple[Any, ...]) -> Any:
    raise _missing(plan.name)


def _missing(name: str) -> PlanError:
    return PlanError(
        f"expected the function {name}, which a file does not hold, got none; give it: "
        f"pf.load_plan(path, {name})"
    )
