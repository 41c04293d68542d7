"""Where one starts: the Jacobian and the Hessian of a map at a point, and the plan of either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pushforward.boundary import Arguments
from pushforward.errors import InputError, PlanError
from pushforward.jacobians import Jacobian
from pushforward.meter import Cost, measure
from pushforward.passes import Linearization
from pushforward.planning import Recipe, cached_recipe, check_again, choose, store_recipe
from pushforward.plans import Plan
from pushforward.problems import Problem, check_memory, check_quantity
from pushforward.tape import Tape, record, record_gradient


def jacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    plan: str | Plan = "auto",
    memory: int | None = None,
) -> Jacobian:
    """The Jacobian of ``f`` at a point: d out_i / d in_j, lazy and exact.

    Args:
        f: a callable or module, from tensors or pytrees of them to the same.
        *args: the point. Integer tensors and other objects are passed on, not differentiated.
        argnums: which arguments to differentiate with respect to.
        batch_dim: None for one map; 0 where dimension 0 of input and output is a batch of
            independent samples, and every result is then per sample.
        plan: "auto", the name of a strategy ("reverse", "forward", "loop"), or a `Plan`.
        memory: a budget in bytes for what is allocated.

    Returns:
        A `Jacobian`. Its results are differentiable with respect to the inputs and to every
        parameter that ``f`` closes over, under the usual grad mode.

    Raises:
        InputError: nothing to differentiate, or arguments that do not fit together.
        CouplingError: ``batch_dim=0`` and samples that influence each other.
        PlanError: a plan that does not hold here.
        MemoryBudgetError: ``memory`` is too small for a single pass.
        DifferentiationError: an op without a derivative.

    Cost: one evaluation of ``f``; then min(m, n) passes for all entries, one per product.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> jacobian(lambda x: x.prod() * x[:2], x).dense()
        tensor([[12.,  3.,  2.],
                [12., 12.,  4.]])
    """
    return _at(f, args, argnums, batch_dim, plan, memory, "jacobian")


def hessian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    plan: str | Plan = "auto",
    memory: int | None = None,
) -> Jacobian:
    """The Hessian of a scalar ``f`` at a point: d^2 f / d in_i d in_j, lazy, exact, symmetric.

    Args:
        f: a callable or module with one output scalar (per sample with ``batch_dim=0``).
        *args, argnums, batch_dim, plan, memory: as in `jacobian`; "reverse" or "loop" for plan.

    Returns:
        A `Jacobian` of the gradient, n x n; ``dense()`` is ``in.shape + in.shape``, ``value`` is
        ``f(*args)``.

    Raises:
        ShapeError: more than one output scalar.
        PushforwardError: for the reasons that `jacobian` has.

    Cost: one evaluation and one gradient; then n Hessian-vector products for all entries. Reverse
    mode over reverse mode: the nested forward modes of torch are wrong for several ops.

    Example:
        >>> import torch
        >>> hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).dense()
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return _at(f, args, argnums, batch_dim, plan, memory, "hessian")


def plan(
    f: Callable[..., Any],
    *example_args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    quantity: str = "jacobian",
    memory: int | None = None,
) -> Plan:
    """Plan the Jacobian (or Hessian) of ``f`` for arguments like these, and print it if you like.

    Args:
        f, argnums, batch_dim, memory: as in `jacobian`.
        *example_args: arguments with the shapes and dtypes that are to come.
        quantity: "jacobian" or "hessian".

    Returns:
        A `Plan`: ``plan(*args)`` is the Jacobian at other arguments.

    Raises:
        PushforwardError: for the reasons that `jacobian` has.

    Example:
        >>> import torch
        >>> plan(torch.sin, torch.zeros(3)).passes
        3
    """
    check_quantity(quantity)
    return _at(f, example_args, argnums, batch_dim, "auto", memory, quantity).plan


def _at(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int],
    batch_dim: int | None,
    wanted: str | Plan,
    memory: int | None,
    quantity: str,
) -> Jacobian:
    if not callable(f):
        raise InputError(f"expected a function or module to differentiate, got {type(f).__name__}")
    check_memory(memory)
    arguments = Arguments.of(args, argnums, batch_dim)
    linear, recorded = _linearise(f, arguments, batch_dim, quantity, memory)
    if isinstance(wanted, Plan):
        _refuse_other_terms(wanted, arguments.argnums, memory)
        return _follow(replace(wanted, function=f), linear, quantity)
    problem = Problem(linear, quantity, memory, recorded)
    recipe = _recipe(problem, f, wanted, arguments)
    made = Plan(
        f,
        arguments.argnums,
        batch_dim,
        quantity,
        memory,
        arguments.domain,
        linear.tape.codomain,
        recipe,
        linear.tape.mode,
        _replan,
    )
    return _jacobian(linear, made)


def _refuse_other_terms(plan: Plan, argnums: int | tuple[int, ...], memory: int | None) -> None:
    if plan.argnums != argnums:
        raise PlanError(
            f"the plan expects argnums={plan.argnums}, got {argnums}; make a plan with these"
        )
    if memory not in (None, plan.memory):
        raise PlanError(
            f"the plan expects memory={plan.memory}, got {memory}; give memory= to pf.plan"
        )


def _linearise(
    f: Callable[..., Any],
    arguments: Arguments,
    batch_dim: int | None,
    quantity: str,
    memory: int | None,
) -> tuple[Linearization, Cost | None]:
    make: Callable[..., Tape] = record_gradient if quantity == "hessian" else record
    if memory is None:
        return Linearization(make(f, arguments, batch_dim)), None
    tape, cost = measure(lambda: make(f, arguments, batch_dim))
    return Linearization(tape), cost


def _recipe(problem: Problem, f: Callable[..., Any], wanted: str, arguments: Arguments) -> Recipe:
    key = (
        wanted,
        problem.quantity,
        problem.memory,
        arguments.argnums,
        arguments.domain.signature,
        problem.linear.tape.codomain.signature,
        problem.linear.tape.census.ops,
        problem.linear.tape.mode,
    )
    recipe = cached_recipe(f, key)
    if recipe is None:
        recipe = choose(problem, wanted)
        store_recipe(f, key, recipe)
    else:
        check_again(problem, recipe)
    return recipe


def _jacobian(linear: Linearization, plan: Plan) -> Jacobian:
    linear.batched = linear.batched and plan.recipe.batched
    return Jacobian(linear, plan)


def _replan(plan: Plan, args: tuple[Any, ...]) -> Jacobian:
    arguments = Arguments.of(args, plan.argnums, plan.batch_dim)
    linear, _ = _linearise(plan.function, arguments, plan.batch_dim, plan.quantity, plan.memory)
    return _follow(plan, linear, plan.quantity)


def _follow(plan: Plan, linear: Linearization, quantity: str) -> Jacobian:
    """Use a plan where it still holds."""
    tape = linear.tape
    for what, planned, came in (
        ("quantity", plan.quantity, quantity),
        ("input", plan.domain.signature, tape.domain.signature),
        ("output", plan.codomain.signature, tape.codomain.signature),
        ("training mode", plan.mode, tape.mode),
    ):
        if planned != came:
            raise PlanError(_misfit(what, plan, tape, quantity))
    check_again(Problem(linear, quantity, plan.memory, None), plan.recipe)
    return _jacobian(linear, plan)


def _misfit(what: str, plan: Plan, tape: Tape, quantity: str) -> str:
    planned, came = {
        "quantity": (plan.quantity, quantity),
        "input": (plan.domain.describe(), tape.domain.describe()),
        "output": (plan.codomain.describe(), tape.codomain.describe()),
    }.get(what, ("that of the time of planning", "another"))
    return f"the plan expects the {what} {planned}, got {came}; make a plan for these arguments"
