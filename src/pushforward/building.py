"""A chosen strategy made ready: its program recorded, and verified at two points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Arguments, as_real
from pushforward.checks import agree
from pushforward.compressed import Compressed
from pushforward.evaluations import Evaluation
from pushforward.factors import Split, Tap, factors, pulled_through, record_with_taps
from pushforward.meter import measure
from pushforward.passes import Linearization, random_vectors
from pushforward.planning import Recipe
from pushforward.program import CannotRecord, Program, Recorder, program
from pushforward.strategies import Candidate
from pushforward.tape import Tape, inside_a_transform, record, record_gradient

# A call of an op takes about as long as so many operations.
_CALL = 20_000.0
# An evaluation of more work than this goes through the tape, and is verified on rows alone.
_HEAVY = 5e8
# How many rows are compared with the pattern there.
_ROWS = 8
# A program that takes more work than this is not made a second time in another way.
_WORTH_COMPARING = 1e9
# Programs hold all passes at once; with more entries than this they go in chunks instead.
_PROGRAM_ENTRIES = 1 << 25


@dataclass(frozen=True, eq=False)
class Map:
    """What is needed to record a map again, at any point."""

    function: Callable[..., Any]
    batch_dim: int | None
    quantity: str

    def tape(self, arguments: Arguments, **how: Any) -> Tape:
        """Record the map, or its gradient where a Hessian is wanted."""
        make = record_gradient if self.quantity == "hessian" else record
        return make(self.function, arguments, self.batch_dim, **how)


def entries(
    mapping: Map, arguments: Arguments, recipe: Recipe, linear: Linearization | None = None
) -> list[Tensor]:
    """The entries of a scheme through a tape: values, or the two factors.

    ``linear`` is a tape that is there already; a split needs one with taps in it.
    """
    scheme = recipe.candidate.scheme
    if isinstance(scheme, Split):
        tape, kept = record_with_taps(mapping.function, arguments, mapping.batch_dim, scheme)
        return list(factors(_linear(tape, recipe), kept, scheme, recipe.chunk))
    linear = linear or Linearization(mapping.tape(arguments), recipe.batched)
    if scheme is None:
        return [_whole(linear, recipe.candidate.jvps > 0)]
    values = scheme.values(linear, recipe.chunk)
    if mapping.quantity == "hessian":
        values = scheme.symmetrised(values)
    return [values]


def _linear(tape: Tape, recipe: Recipe) -> Linearization:
    """The products of a tape; that J v can be had was tried when it was planned for."""
    transparent = True if recipe.candidate.jvps else None
    return Linearization(tape, recipe.batched, _transparent=transparent)


def _whole(linear: Linearization, by_columns: bool) -> Tensor:
    """All rows or all columns in one batch, ``([B,] m, n)``."""
    tape = linear.tape
    if by_columns:
        return linear.columns(0, tape.domain.size).movedim(0, -1)
    return linear.rows(0, tape.codomain.size).movedim(0, -2)


def build(
    mapping: Map, arguments: Arguments, recipe: Recipe, memory: int | None, compiled: bool = False
) -> Recipe:
    """Record the program of a recipe, where it can have one, and compile it if that is wanted."""
    reason = _why_no_program(arguments, recipe, memory, compiled)
    if reason is None:
        try:
            made = _with_program(mapping, arguments, recipe)
            return _handed_on(made) if compiled else made
        except CannotRecord as error:
            reason = str(error)
    candidate = recipe.candidate
    if candidate.strategy == "constant":  # only a program can tell, and keep what it found
        candidate = replace(candidate, strategy="sparse")
    notes = (*recipe.notes, f"through the tape: {reason}")
    return replace(recipe, candidate=candidate, notes=notes)


def _with_program(mapping: Map, arguments: Arguments, recipe: Recipe) -> Recipe:
    """The recipe with the cheapest program that its candidate, or one of its rivals, has."""
    made = [_attempt(mapping, arguments, recipe)]
    for rival in recipe.candidate.rivals:
        if made[0].work < _WORTH_COMPARING:
            other = replace(recipe, candidate=rival, chunk=max(recipe.chunk, rival.passes))
            made.append(_attempt(mapping, arguments, other))
    best = min(made, key=lambda attempt: attempt.work)
    return _completed(best.recipe, best.program)


def _handed_on(recipe: Recipe) -> Recipe:
    """The recipe with its program compiled by torch."""
    assert recipe.evaluation is not None
    note = "handed to torch.compile"
    compiled = Evaluation(recipe.evaluation.program.compiled())
    return replace(recipe, evaluation=compiled, notes=(*recipe.notes, note))


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A program and what one run of it takes, counted."""

    recipe: Recipe
    program: Program
    work: float


def _attempt(mapping: Map, arguments: Arguments, recipe: Recipe) -> _Attempt:
    made = _program(mapping, arguments, recipe)
    with torch.no_grad():
        _, cost = measure(lambda: made(*real_inputs(arguments), *arguments.others))
    return _Attempt(recipe, made, cost.work + _CALL * made.length)


def _completed(recipe: Recipe, made: Program) -> Recipe:
    chosen = bool(recipe.rejected)  # and not asked for by name
    candidate = _settled(recipe.candidate, made, chosen)
    rejected = tuple((name, why) for name, why in recipe.rejected if name != candidate.strategy)
    return replace(recipe, candidate=candidate, rejected=rejected, evaluation=Evaluation(made))


def _settled(candidate: Candidate, made: Program, chosen: bool) -> Candidate:
    """What is constant takes no pass, the Hessian of a quadratic form among them; what was taken
    for constant and turns out to vary takes the passes that it was found by.
    """
    if made.varies:
        varying = candidate.strategy == "constant"
        return replace(candidate, strategy="sparse") if varying else candidate
    if candidate.strategy == "constant" or (chosen and candidate.strategy in ("sparse", "reverse")):
        return replace(candidate, strategy="constant", jvps=0, vjps=0)
    return candidate


def _why_no_program(
    arguments: Arguments, recipe: Recipe, memory: int | None, compiled: bool
) -> str | None:
    _candidate, passes = recipe.candidate, recipe.candidate.passes
    if recipe.structure.guards.elsewhere:
        return "values go where they cannot be compared"
    if not recipe.is_followed:
        return "what the function reads cannot be told in full"
    if memory is not None:
        return "a memory budget is kept to chunk by chunk"
    if is_heavy(recipe) and not compiled:
        return "a pass is work enough, whatever calls it"
    if recipe.chunk < passes:
        return f"{passes} passes go {recipe.chunk} at a time"
    if not recipe.batched:
        return "vectors go one by one"
    if inside_a_transform(arguments.tensors):
        return "a transform of torch.func is at work"
    return None


def is_heavy(recipe: Recipe) -> bool:
    """Whether an evaluation takes so long that what it is called by does not matter."""
    return recipe.candidate.scheme is not None and recipe.candidate.work > _HEAVY


def _program(mapping: Map, arguments: Arguments, recipe: Recipe) -> Program:
    scheme = recipe.candidate.scheme
    own = _private(arguments)
    constants = scheme.constants if isinstance(scheme, Compressed) else []
    loans: list[Any] = []

    def original(tensor: Tensor) -> Tensor:
        return loans[0].original(tensor) if loans else tensor

    def owned(tensor: Tensor) -> bool:
        reachable = recipe.circumstances is not None and recipe.circumstances.state.tensors
        return bool(reachable) and id(tensor) in reachable

    inputs = [*real_inputs(own), *own.others]
    recorder = Recorder(inputs, constants)

    names = {s.number: s.op for s in recipe.structure.graph.steps if not s.mutates}
    places = scheme.places if isinstance(scheme, Split) else ()
    tap = Tap(places, recipe.structure.guards.orders, names)

    def work() -> list[Tensor]:
        if isinstance(scheme, Split):
            tape, kept = record_with_taps(mapping.function, own, mapping.batch_dim, scheme, tap)
            found = factors(_linear(tape, recipe), kept, scheme, recipe.chunk)
        else:
            tape = mapping.tape(own, watch=tap)
            found = entries(mapping, own, recipe, _linear(tape, recipe))
        loans.append(tape.loan)
        for indices in tap.indices:
            recorder.expect(indices)
        return list(found)

    with torch.no_grad():
        return program(work, recorder, original, owned)


def _private(arguments: Arguments) -> Arguments:
    """The same arguments in storages of their own: a closure may hold the very tensors."""
    leaves = tuple(
        leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in arguments.leaves
    )
    chosen = (arguments.argnums,) if isinstance(arguments.argnums, int) else arguments.argnums
    copied = arguments.substitute(leaves)
    picked = [arg for i, arg in enumerate(copied) if i not in chosen]
    rest = iter(picked)
    args = tuple(arg if i in chosen else next(rest) for i, arg in enumerate(copied))
    return replace(arguments, leaves=leaves, args=args)


def real_inputs(arguments: Arguments) -> list[Tensor]:
    """The tensors to differentiate with respect to, as real ones."""
    return [as_real(leaf) for leaf in arguments.tensors]


def verify(mapping: Map, arguments: Arguments, recipe: Recipe, once: bool = False) -> str | None:
    """Compare products of the planned entries with an independent derivative, at two points.

    ``once``: at the point alone.

    Returns:
        None, or what is wrong.
    """
    if recipe.candidate.scheme is None and recipe.evaluation is None:
        return None
    with torch.no_grad():
        points = [("at the point", arguments), ("at a second point", _nearby(arguments))]
        for place, point in points[: 1 if once or _holds_here_alone(recipe) else 2]:
            try:
                wrong = _differs(mapping, point, recipe)
            except (
                Exception
            ):  # a function need not be defined nearby, or takes another branch there
                if point is arguments:
                    raise
                continue
            if wrong:
                return (
                    f"{recipe.candidate.strategy} gives other numbers than a backward pass {place}"
                )
    return None


def _holds_here_alone(recipe: Recipe) -> bool:
    """Whether the pattern is that of one point, and no program would notice another one."""
    circumstances = recipe.circumstances
    return recipe.evaluation is None and circumstances is not None and circumstances.at_point


def _nearby(arguments: Arguments) -> Arguments:
    """A second point of the same shapes, not far from the first."""
    generator = torch.Generator().manual_seed(1)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf.device)
        return leaf.detach() * (1 + 0.1 * noise).to(leaf.dtype) + (1e-3 * noise).to(leaf.dtype)

    return replace(arguments, leaves=tuple(moved(leaf) for leaf in arguments.leaves))


def _strictness(recipe: Recipe) -> float:
    """The tolerance in double precision; wider where something on the way is in single."""
    return 1e-4 if "ToCopyBackward0" in recipe.ops else 1e-7


def _differs(mapping: Map, arguments: Arguments, recipe: Recipe) -> bool:
    linear = Linearization(mapping.tape(arguments), recipe.batched)
    (u,) = random_vectors(linear.tape.codomain, 1)
    split = recipe.candidate.split
    through_tape = recipe.evaluation is None and is_heavy(recipe)
    if split is not None and through_tape:
        tape, kept = record_with_taps(mapping.function, arguments, mapping.batch_dim, split)
        through = pulled_through(_linear(tape, recipe), kept, split, u)
        expected = linear.pull(u)
        return not agree(through, expected, expected.abs().amax(), double=_strictness(recipe))
    if recipe.candidate.compressed is not None and through_tape:
        return not _rows_fit(linear, recipe.candidate.compressed)
    if recipe.candidate.strategy == "diagonal":
        return not _diagonal_agrees(mapping, arguments, recipe, linear)
    found, scale = _pulled(planned(mapping, arguments, recipe, linear), recipe, u[0])
    expected = linear.pull(u)[0]
    return not agree(found, expected, scale + _rounding(scale), double=_strictness(recipe))


def _rounding(scale: Tensor) -> Tensor:
    """What rounding leaves where terms cancel, in the unit of the tolerance of `agree`."""
    whole = scale.nan_to_num(posinf=0.0, neginf=0.0).amax() if scale.numel() else scale.sum()
    return whole * (2e-7 if scale.dtype.itemsize == 8 else 1e-2)


def planned(
    mapping: Map, arguments: Arguments, recipe: Recipe, linear: Linearization | None
) -> Sequence[Tensor]:
    """The entries as the recipe computes them: by its program, or through the tape."""
    if recipe.evaluation is None:
        return entries(mapping, arguments, recipe, linear)
    return recipe.evaluation.program(*real_inputs(arguments), *arguments.others)


def _rows_fit(linear: Linearization, scheme: Compressed) -> bool:
    """Whether a few rows, taken at random, have no entry outside of the pattern."""
    m, n = scheme.pattern.shape
    chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[:_ROWS]
    lead = linear.tape.domain.lead
    units = torch.zeros(len(chosen), m, dtype=scheme.dtype, device=scheme.device)
    units[torch.arange(len(chosen)), chosen] = 1
    rows = linear.pull(units.reshape(len(chosen), *(1 for _ in lead), m).expand(-1, *lead, -1))
    for row, place in zip(rows.reshape(len(chosen), -1, n), chosen.tolist(), strict=True):
        start, stop = scheme.pattern.indptr[place : place + 2]
        allowed = torch.zeros(n, dtype=torch.bool, device=row.device)
        allowed[torch.from_numpy(scheme.pattern.indices[start:stop])] = True
        if bool((row[:, ~allowed] != 0).any()):
            return False
    return True


def _pulled(parts: Sequence[Tensor], recipe: Recipe, u: Tensor) -> tuple[Tensor, Tensor]:
    """J^T u from entries, ([B,] n), and the size of what was added up."""
    scheme = recipe.candidate.scheme
    if isinstance(scheme, Compressed):
        (values,) = parts
        m, n = scheme.pattern.shape
        rows = torch.repeat_interleave(
            torch.arange(m, device=u.device), scheme.starts.diff(), output_size=scheme.pattern.nnz
        )
        terms = values * u.to(values.dtype).index_select(-1, rows)
        zeros = values.new_zeros(*values.shape[:-1], n)
        return (
            zeros.index_add(-1, scheme.columns, terms),
            zeros.index_add(-1, scheme.columns, terms.abs()),
        )
    u = u.to(parts[0].dtype).unsqueeze(-2)
    if scheme is None:
        (whole,) = parts
        return (u @ whole).squeeze(-2), (u.abs() @ whole.abs()).squeeze(-2)
    tall, wide = parts
    return (u @ tall @ wide).squeeze(-2), (u.abs() @ tall.abs() @ wide.abs()).squeeze(-2)


def _diagonal_agrees(
    mapping: Map, arguments: Arguments, recipe: Recipe, linear: Linearization
) -> bool:
    """A few entries of the diagonal against rows of their own."""
    (values,) = planned(mapping, arguments, recipe, linear)
    scheme = recipe.candidate.compressed
    assert scheme is not None
    whole = scheme.diagonal(values)
    size = scheme.pattern.shape[0]
    for place in {0, size // 2, size - 1}:
        if 0 <= place < size:
            row = linear.rows(place, place + 1)[0][..., place]
            if not agree(whole[..., place], row, row.abs()):
                return False
    return True
