"""A plan that was read from a file, settled on a function: recorded, recognised and verified.

Neither detection nor colouring is repeated. The map is recorded once, its ops are compared with
those that were planned for, the tensors that served as structure with their digests; then the
program is recorded and its products are verified, as those of a new plan are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.boundary import Arguments, Layout
from pushforward.building import build, verify
from pushforward.checks import check_samples
from pushforward.circumstances import Circumstances, Guarded, strides_of
from pushforward.errors import PlanError
from pushforward.explaining import TAPED
from pushforward.passes import Linearization
from pushforward.planning import Recipe, as_views
from pushforward.plans import Plan
from pushforward.problems import Problem
from pushforward.saving import Conditions, digest
from pushforward.state import State
from pushforward.structure.graph import call_of, is_counted
from pushforward.tape import Tape, inside_a_transform


class Names(TorchDispatchMode):
    """Notes the calls of ops that run inside, the first one under 1."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def start(self, inputs: Sequence[Tensor], arguments: Sequence[Tensor], domain: Layout) -> None:
        """A run begins."""
        self.names = [""]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Note what runs inside."""
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_counted(func):
            self.names.append(call_of(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def settled(
    plan: Plan, arguments: Arguments, make: Callable[..., Any], diagonal_by: Callable[..., Any]
) -> Plan | None:
    """The plan with a program, circumstances and a function; None where it is not for this map."""
    assert plan.saved is not None
    for earlier in plan.saved.settled:
        if _still_holds(earlier, plan, arguments):
            return earlier.of(plan.function)
    made = _recognised(plan, arguments)
    if made is None:
        return None
    made = replace(made, make=make, diagonal_by=diagonal_by)
    plan.saved.settled[:] = [made.of(_forgotten)]
    return made


def _still_holds(earlier: Plan, plan: Plan, arguments: Arguments) -> bool:
    circumstances, guarded = earlier.recipe.circumstances, earlier.recipe.evaluation is not None
    return circumstances is not None and circumstances.hold(plan.function, arguments, guarded)


def _recognised(plan: Plan, arguments: Arguments) -> Plan | None:
    """The plan for a function that does what was planned for."""
    if inside_a_transform(arguments.tensors):
        return None
    names = Names()
    tape = plan.map.tape(arguments, watch=names)
    assert plan.saved is not None
    conditions = plan.saved.conditions
    circumstances = _circumstances(plan.function, arguments, conditions)
    if circumstances is None or not _same_run(plan, tape, names.names, conditions):
        return None
    problem = Problem(Linearization(tape), plan.quantity, plan.memory, None)
    check_samples(problem)
    recipe = _verified(plan, arguments, replace(plan.recipe, circumstances=circumstances))
    if recipe is None:
        return None
    own = {"domain": arguments.domain, "codomain": tape.codomain, "mode": tape.mode}
    return replace(plan, recipe=recipe, saved=None, **own)


def _same_run(plan: Plan, tape: Tape, names: Sequence[str], conditions: Conditions) -> bool:
    """Whether the same ops ran, in the same modes, to outputs of the same shapes."""
    return (
        plan.codomain.signature == tape.codomain.signature
        and plan.mode == tape.mode
        and as_views(plan.recipe.ops) == as_views(tape.census.ops)
        and all(number < len(names) and names[number] == op for number, op in conditions.steps)
    )


def _circumstances(
    function: Callable[..., Any], arguments: Arguments, conditions: Conditions
) -> Circumstances | None:
    """What holds now, where tensors that served as structure are the same as then."""
    others, state = arguments.others, State.of(function, arguments.context)
    if conditions.unplaced or len(others) != len(conditions.arguments):
        return None
    pairs = zip(conditions.arguments, others, strict=True)
    if any(code is not None and code != digest(tensor) for code, tensor in pairs):
        return None
    found = [_found(state, place) for place, _ in conditions.constants]
    codes = [None if tensor is None else digest(tensor) for tensor in found]
    if codes != [code for _, code in conditions.constants]:
        return None
    guarded = tuple(Guarded.of(tensor) for tensor in found if tensor is not None)
    kept = tuple(
        None if code is None else tensor.detach().clone()
        for code, tensor in zip(conditions.arguments, others, strict=True)
    )
    strides = strides_of(arguments)
    return Circumstances(state, guarded, kept, conditions.at_point, strides)


def _found(state: State, place: int) -> Tensor | None:
    """The tensor at a place that can be reached from the function."""
    if not 0 <= place < len(state.places):
        return None
    alive = state.places[place].alive
    found = None if alive is None else alive()
    return found if isinstance(found, Tensor) else None


def _verified(plan: Plan, arguments: Arguments, recipe: Recipe) -> Recipe | None:
    """The recipe with its program, where the products agree."""
    notes = tuple(note for note in recipe.notes if not note.startswith(TAPED))
    try:
        made = build(plan.map, arguments, replace(recipe, notes=notes), plan.memory, plan.compiled)
        wrong = verify(plan.map, arguments, made)
    except PlanError:  # its cuts are not there
        return None
    return made if wrong is None else None


def _forgotten(*_: Any) -> Any:
    raise PlanError("a plan that was loaded knows its function only when it is asked for")
