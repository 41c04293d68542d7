"""Where one starts: the Jacobian and the Hessian of a map at a point, and the plan of either."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pushforward.boundary import Arguments
from pushforward.building import Map, build, verify
from pushforward.checks import check_samples
from pushforward.circumstances import Circumstances
from pushforward.errors import InputError, PlanError
from pushforward.evaluations import Evaluation, Stale
from pushforward.jacobians import Jacobian
from pushforward.memory import cached_plans, store_plan
from pushforward.meter import Cost, measure
from pushforward.passes import Linearization
from pushforward.planning import Recipe, as_views, check_again, choose, due, plain_again
from pushforward.plans import Plan
from pushforward.problems import Problem, check_memory, check_quantity
from pushforward.recalling import settled
from pushforward.strategies import PLAIN
from pushforward.structure.detection import NOTHING, Detector, Structure, merged
from pushforward.tape import Tape, inside_a_transform


def jacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    plan: str | Plan = "auto",
    memory: int | None = None,
    compile: bool = False,
) -> Jacobian:
    """The Jacobian of ``f`` at a point: d out_i / d in_j, lazy and exact.

    Args:
        f: a callable or module, from tensors or pytrees of them to the same.
        *args: the point. Integer tensors and other objects are passed on, not differentiated.
        argnums: which arguments to differentiate with respect to.
        batch_dim: None for one map; 0 where dimension 0 of input and output is a batch of
            independent samples, and every result is then per sample.
        plan: "auto", the name of a strategy ("sparse", "batch", "split", "constant", "reverse",
            "forward", "loop"), or a `Plan`.
        memory: a budget in bytes for what is allocated.
        compile: hand the program of the plan to ``torch.compile``: slower to make, and faster where
            a program has many small ops.

    Returns:
        A `Jacobian`. Its results are differentiable with respect to the inputs and to every
        parameter that ``f`` closes over, under the usual grad mode.

    Raises:
        InputError: nothing to differentiate, or arguments that do not fit together.
        CouplingError: ``batch_dim=0`` and samples that influence each other.
        PlanError: a plan that does not hold here.
        MemoryBudgetError: ``memory`` is too small for a single pass.
        DifferentiationError: an op without a derivative.

    Cost: the first call evaluates ``f``, looks at its structure, plans and verifies; later ones run
    the plan alone. ``plan.passes`` passes for all entries, one for a product.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> jacobian(lambda x: x.prod() * x[:2], x).dense()
        tensor([[12.,  3.,  2.],
                [12., 12.,  4.]])
    """
    return _at(f, args, argnums, batch_dim, plan, memory, "jacobian", compile)


def hessian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    plan: str | Plan = "auto",
    memory: int | None = None,
    compile: bool = False,
) -> Jacobian:
    """The Hessian of a scalar ``f`` at a point: d^2 f / d in_i d in_j, lazy, exact, symmetric.

    Args:
        f: a callable or module with one output scalar (per sample with ``batch_dim=0``).
        *args, argnums, batch_dim, plan, memory, compile: as in `jacobian`.

    Returns:
        A `Jacobian` of the gradient, n x n; ``dense()`` is ``in.shape + in.shape``, ``value`` is
        ``f(*args)``.

    Raises:
        ShapeError: more than one output scalar.
        PushforwardError: for the reasons that `jacobian` has.

    Cost: as for `jacobian`, with a gradient in the place of an evaluation; ``plan.passes``
    Hessian-vector products for all entries, at most n. Reverse mode over reverse mode: the nested
    forward modes of torch are wrong for several ops.

    Example:
        >>> import torch
        >>> hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).dense()
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    return _at(f, args, argnums, batch_dim, plan, memory, "hessian", compile)


def plan(
    f: Callable[..., Any],
    *example_args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int | None = None,
    quantity: str = "jacobian",
    memory: int | None = None,
    compile: bool = False,
) -> Plan:
    """Plan the Jacobian (or Hessian) of ``f`` for arguments like these, and print it if you like.

    Args:
        f, argnums, batch_dim, memory, compile: as in `jacobian`.
        *example_args: arguments with the shapes and dtypes that are to come.
        quantity: "jacobian", "hessian", or "diagonal" for a Jacobian of which only the diagonal (or
            the trace) is wanted.

    Returns:
        A `Plan`: ``plan(*args)`` is the Jacobian at other arguments.

    Raises:
        PushforwardError: for the reasons that `jacobian` has.

    Example:
        >>> import torch
        >>> plan(torch.sin, torch.zeros(3)).passes
        1
    """
    check_quantity(quantity)
    return _at(f, example_args, argnums, batch_dim, "auto", memory, quantity, compile).plan


def _at(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int],
    batch_dim: int | None,
    wanted: str | Plan,
    memory: int | None,
    quantity: str,
    compiled: bool = False,
) -> Jacobian:
    if not callable(f):
        raise InputError(f"expected a function or module to differentiate, got {type(f).__name__}")
    check_memory(memory)
    arguments = Arguments.of(args, argnums, batch_dim)
    if isinstance(wanted, Plan):
        _refuse_other_terms(wanted, arguments.argnums, memory)
        return _follow(replace(wanted, function=f), arguments, quantity)
    request = _Request(Map(f, batch_dim, quantity), arguments, wanted, memory, compiled)
    return _remembered(request) or _anew(request)


@dataclass(frozen=True)
class _Request:
    """What a call asks for."""

    map: Map
    arguments: Arguments
    wanted: str
    memory: int | None
    compiled: bool = False

    @property
    def key(self) -> Any:
        """What plans are remembered by, for one function."""
        return (
            self.wanted,
            self.map.quantity,
            self.map.batch_dim,
            self.memory,
            self.compiled,
            self.arguments.argnums,
            self.arguments.domain.signature,
        )


def _remembered(request: _Request) -> Jacobian | None:
    """A Jacobian by a plan made earlier, the first that still holds."""
    for plan in cached_plans(request.map.function, request.key):
        if _holds(plan, request.arguments):
            found = _by(plan, request.arguments)
        else:
            found = _by_rows_again(plan, request.arguments)
        if found is not None:
            return found
    return None


def _by_rows_again(plan: Plan, arguments: Arguments) -> Jacobian | None:
    """Rows or columns as before, right for any function, where what it reads cannot be told."""
    if plan.recipe.is_followed or plan.recipe.candidate.scheme is not None:
        return None
    return _by_tape(plan, arguments)


def _holds(plan: Plan, arguments: Arguments) -> bool:
    circumstances, evaluation = plan.recipe.circumstances, plan.recipe.evaluation
    if evaluation is not None and inside_a_transform(arguments.tensors):
        return False
    guarded = evaluation is not None
    return circumstances is not None and circumstances.hold(plan.function, arguments, guarded)


def _by(plan: Plan, arguments: Arguments) -> Jacobian | None:
    """Follow a plan: at once by its program, else with a tape like the planned one."""
    if plan.recipe.evaluation is not None:
        return _by_program(plan, arguments, plan.recipe.evaluation)
    return _by_tape(plan, arguments)


def _by_tape(plan: Plan, arguments: Arguments) -> Jacobian | None:
    linear = plan.linearise(arguments)
    if _misfits(plan, linear.tape):
        return None
    check_again(Problem(linear, plan.quantity, plan.memory, None), plan.recipe)
    return Jacobian(plan, arguments, linear)


def _by_program(plan: Plan, arguments: Arguments, evaluation: Evaluation) -> Jacobian | None:
    """A lazy Jacobian; None where the program's guards, or a check now and then, say no."""
    made = Jacobian(plan, arguments.snapshot(), None)
    try:
        if evaluation.program.guards:
            made.prepare()
        if plan.may_couple:
            check_samples(Problem(plan.linearise(arguments), plan.quantity, plan.memory, None))
        wrong = verify(plan.map, arguments, plan.recipe, once=True) if due(plan.recipe) else None
    except Stale:
        return None
    return made if wrong is None else None


def _misfits(plan: Plan, tape: Tape) -> bool:
    return (
        plan.codomain.signature != tape.codomain.signature
        or plan.mode != tape.mode
        or as_views(plan.recipe.ops) != as_views(tape.census.ops)
    )


def _anew(request: _Request) -> Jacobian:
    """Record the map, look at its structure, plan, verify and remember."""
    arguments, mapping = request.arguments, request.map
    detector = Detector() if request.wanted not in PLAIN else None
    tape, recorded = _recorded(request, detector)
    linear = Linearization(tape)
    structure = NOTHING if detector is None else _structure(request, detector, tape)
    if detector is not None and not tape.census.vmappable:
        # Its backward takes another way where a mode looks on, as it does under vmap.
        tape = mapping.tape(arguments, state=tape.state)
        linear = Linearization(tape)
    again = _as_before(request, tape, structure)
    if again is not None:
        return Jacobian(again, arguments, linear)
    problem = Problem(linear, mapping.quantity, request.memory, recorded, structure)
    recipe = replace(
        choose(problem, request.wanted),
        ops=tape.census.ops,
        circumstances=Circumstances.of(
            mapping.function, structure.guards, arguments, tape.loan.original
        ),
    )
    structure.guards.constants.clear()  # a plan that is remembered keeps no tensor alive
    recipe = build(mapping, arguments, recipe, request.memory, request.compiled)
    if request.wanted == "constant" and recipe.candidate.strategy != "constant":
        raise PlanError(
            "the strategy constant expects a Jacobian that is the same everywhere, and this one "
            'cannot be told to be; use plan="auto"'
        )
    wrong = verify(mapping, arguments, recipe)
    if wrong is not None:
        recipe = plain_again(problem, replace(recipe, evaluation=None), wrong)
    plan = _plan(request, tape, recipe)
    if not inside_a_transform(arguments.tensors):
        store_plan(mapping.function, request.key, plan)
    linear.batched = linear.batched and recipe.batched
    return Jacobian(plan, arguments if recipe.evaluation is None else arguments.snapshot(), linear)


def _as_before(request: _Request, tape: Tape, structure: Structure) -> Plan | None:
    """A plan made earlier for the same structure, where what the function reads cannot be told."""
    for plan in cached_plans(request.map.function, request.key):
        recipe = plan.recipe
        if recipe.is_followed or _misfits(plan, tape) or recipe.candidate.compressed is None:
            continue
        old, new = recipe.structure.pattern, structure.pattern
        if old is not None and new is not None and old.same_as(new):
            return plan
    return None


def _recorded(request: _Request, detector: Detector | None) -> tuple[Tape, Cost | None]:
    if request.memory is None:
        return request.map.tape(request.arguments, watch=detector), None
    return measure(lambda: request.map.tape(request.arguments, watch=detector))


def _structure(request: _Request, detector: Detector, tape: Tape) -> Structure:
    """What was seen of the structure; followed more finely where that promises something."""
    first = detector.structure(tape.outputs, tape.domain, tape.codomain)
    if not detector.promises(tape.outputs, tape.codomain):
        return first
    finer = Detector(fine=True)
    again = request.map.tape(request.arguments, state=tape.state, watch=finer)
    return merged(first, finer.structure(again.outputs, again.domain, again.codomain))


def _plan(request: _Request, tape: Tape, recipe: Recipe) -> Plan:
    mapping, arguments = request.map, request.arguments
    return Plan(
        mapping.function,
        arguments.argnums,
        mapping.batch_dim,
        mapping.quantity,
        request.memory,
        arguments.domain,
        tape.codomain,
        recipe,
        tape.mode,
        replan,
        request.wanted,
        _diagonal_by,
        request.compiled,
        tuple([(weakref.ref(module), module.training) for module in tape.loan.modules]),
    )


def _diagonal_by(plan: Plan, arguments: Arguments) -> Jacobian:
    """The same map at the same point, planned for its diagonal alone."""
    mapping = Map(plan.function, plan.batch_dim, "diagonal")
    request = _Request(mapping, arguments, "auto", plan.memory)
    return _remembered(request) or _anew(request)


def _refuse_other_terms(plan: Plan, argnums: int | tuple[int, ...], memory: int | None) -> None:
    if plan.argnums != argnums:
        raise PlanError(
            f"the plan expects argnums={plan.argnums}, got {argnums}; make a plan with these"
        )
    if memory not in (None, plan.memory):
        raise PlanError(
            f"the plan expects memory={plan.memory}, got {memory}; give memory= to pf.plan"
        )


def replan(plan: Plan, args: tuple[Any, ...]) -> Jacobian:
    """Follow a plan at other arguments."""
    alike = Arguments.like(plan.domain, args, plan.argnums)
    arguments = alike or Arguments.of(args, plan.argnums, plan.batch_dim)
    return _follow(plan, arguments, plan.quantity)


def _follow(plan: Plan, arguments: Arguments, quantity: str) -> Jacobian:
    """Use a plan where it still holds, and make it anew where it does not."""
    if plan.quantity != quantity:
        raise PlanError(_misfit("quantity", plan.quantity, quantity))
    if plan.domain is not arguments.domain and plan.domain.signature != arguments.domain.signature:
        raise PlanError(_misfit("input", plan.domain.describe(), arguments.domain.describe()))
    if plan.saved is not None:
        plan = settled(plan, arguments, replan, _diagonal_by) or plan
    found = _by(plan, arguments) if _holds(plan, arguments) else None
    if found is not None:
        return found
    request = _Request(plan.map, arguments, plan.wanted, plan.memory, plan.compiled)
    made = _remembered(request) or _anew(request)
    if plan.codomain.signature != made.plan.codomain.signature:
        came = made.plan.codomain.describe()
        raise PlanError(_misfit("output", plan.codomain.describe(), came))
    return made


def _misfit(what: str, planned: str, came: str) -> str:
    return f"the plan expects the {what} {planned}, got {came}; make a plan for these arguments"
