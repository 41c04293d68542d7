"""A plan in words: what people read, paste into issues and hand to machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from textwrap import wrap
from typing import Any, Protocol

from pushforward.boundary import Layout
from pushforward.compressed import Compressed
from pushforward.costs import Prediction
from pushforward.factors import Split
from pushforward.planning import Recipe
from pushforward.structure.cuts import Way

WIDE = 100
# Notes that say why there is no program begin with this.
TAPED = "through the tape: "

Lines = Iterator[tuple[str, str]]


class Planned(Protocol):
    """What is said of a plan; a `Plan` has it, one that was loaded too."""

    @property
    def name(self) -> str:
        """What the function is called."""
        ...

    @property
    def quantity(self) -> str: ...

    @property
    def memory(self) -> int | None: ...

    @property
    def domain(self) -> Layout: ...

    @property
    def codomain(self) -> Layout: ...

    @property
    def recipe(self) -> Recipe: ...

    @property
    def length(self) -> int | None:
        """The number of ops of the program; None where there is no program."""
        ...

    @property
    def guards(self) -> str:
        """What the plan relies on."""
        ...

    @property
    def cost(self) -> Prediction | None: ...


def function_name(function: Callable[..., Any]) -> str:
    """What to call a function in tables and messages."""
    return getattr(function, "__name__", type(function).__name__)


def table(plan: Planned) -> str:
    """The plan as aligned lines; a label stands once for all lines that it is for."""
    found = list(lines(plan))
    width = max(len(label) for label, _ in found)
    text, last = [], ""
    for label, content in found:
        parts = wrap(content, WIDE - width - 2, subsequent_indent="  ") or [""]
        shown = "" if label == last else label
        text.append(f"{shown:<{width}}  {parts[0]}".rstrip())
        text += [" " * (width + 2) + part for part in parts[1:]]
        last = label
    return "\n".join(text)


def lines(plan: Planned) -> Lines:
    """Labels and what there is to say, in order."""
    m, n = plan.codomain.size, plan.domain.size
    batch = "" if plan.domain.batch is None else f", {plan.domain.batch} samples"
    yield "plan", f"{plan.quantity} of {plan.name}"
    yield "size", f"{m} x {n}{batch}"
    yield "input", plan.domain.describe()
    yield "output", plan.codomain.describe()
    yield "pattern", _pattern(plan.recipe)
    yield "strategy", f"{plan.recipe.candidate.strategy}: {_passes(plan)}"
    yield from _scheme(plan.recipe)
    yield "program", _program(plan)
    yield from _costs(plan)
    if plan.memory is not None:
        yield "memory", f"{si(plan.memory)}B"
    yield from _rejected(plan.recipe)
    for op, count in plan.recipe.structure.dense_ops:
        yield "dense ops", f"{op}: no rule, taken as dense ({times(count)})"
    yield "holds for", plan.guards
    for note in checked(plan):
        yield "checked", note


def ops_in_words(count: int) -> str:
    """So many ops."""
    return "1 op" if count == 1 else f"{count} ops"


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count} times"


def _pattern(recipe: Recipe) -> str:
    structure = recipe.structure
    if structure.pattern is None:
        return f"not detected: {structure.note or 'every entry is computed'}"
    found = structure.pattern
    m, n = found.shape
    by = f"; followed: {', '.join(structure.tiers)}" if structure.tiers else ""
    return f"{found.nnz} of {m * n} entries, density {100 * found.density:.3g}%{by}"


def _passes(plan: Planned) -> str:
    candidate, chunk = plan.recipe.candidate, plan.recipe.chunk
    if not candidate.passes:
        return "no passes, its entries are constants"
    what = passes_in_words(candidate.jvps, candidate.vjps, plan.quantity)
    if candidate.strategy == "loop":
        return f"{what}, one by one"
    return f"{what}, {min(chunk, candidate.passes)} at a time"


def passes_in_words(jvps: int, vjps: int, quantity: str) -> str:
    """How many passes of which kind."""
    count = jvps + vjps
    noun = "pass" if count == 1 else "passes"
    if quantity == "hessian":
        return f"{count} Hessian-vector product{'' if count == 1 else 's'}"
    if jvps and vjps:
        return f"{count} {noun} ({jvps} forward, {vjps} backward)"
    return f"{count} {'forward' if jvps else 'backward'} {noun}"


def _scheme(recipe: Recipe) -> Lines:
    """How entries are found, where they are not simply rows or columns."""
    candidate, structure = recipe.candidate, recipe.structure
    if candidate.strategy == "batch" and structure.samples and structure.pattern is not None:
        m, n = (size // structure.samples for size in structure.pattern.shape)
        yield "blocks", f"{structure.samples} blocks of {m} x {n}, one for each sample"
    elif candidate.compressed is not None and candidate.passes:
        yield "colouring", coloring_in_words(candidate.compressed)
    if candidate.split is not None:
        for cut in cuts_in_words(candidate.split):
            yield "cut", cut
        yield "order", order_in_words(candidate.split, candidate.split.way)


def coloring_in_words(scheme: Compressed) -> str:
    """Which colouring, with how many colours, and the fewest that there can be."""
    coloring = scheme.coloring
    by = f"rows and columns ({coloring.kind})"
    if coloring.kind in ("rows", "columns"):
        by = coloring.kind
    elif coloring.kind in ("star", "acyclic", "diagonal"):
        by = f"{coloring.kind} colouring"
    colours = "colour" if coloring.passes == 1 else "colours"
    return f"by {by}: {coloring.passes} {colours}, no fewer than {coloring.lower_bound} will do"


def cuts_in_words(split: Split) -> list[str]:
    """The cuts that factors end at, the input's first."""
    chosen = [split.cuts[place - 1] for place in sorted(set(split.used))]
    return [f"of width {cut.width} at {cut.name}" for cut in chosen]


def order_in_words(split: Split, way: Way) -> str:
    """The product in the order in which it is made: ``(cut 1 <- input, by rows) ...``."""
    if way.parts:
        return " x ".join(_factor(split, part) for part in reversed(way.parts))
    return f"{_boundary(split, way.stop)} <- {_boundary(split, way.start)} by {way.kind}"


def _factor(split: Split, way: Way) -> str:
    return f"({order_in_words(split, way)})"


def _boundary(split: Split, place: int) -> str:
    if place == 0:
        return "input"
    if place > len(split.cuts):
        return "output"
    return f"cut of {split.cuts[place - 1].width}"


def _program(plan: Planned) -> str:
    if plan.length is not None:
        return f"{ops_in_words(plan.length)}, flat"
    why = [note.removeprefix(TAPED) for note in plan.recipe.notes if note.startswith(TAPED)]
    return f"none, through the tape: {why[0] if why else 'it was not verified'}"


def _costs(plan: Planned) -> Lines:
    cost, one = plan.cost, plan.recipe.candidate.cost
    if cost is not None:
        done = f"{_work(cost.flops)}, {si(cost.bytes)}B moved, {ops_in_words(cost.ops)}"
        yield "cost", f"{done}, about {si(cost.seconds)}s"
    if one is not None:
        text = f"{_work(one.flops)}, {si(one.moved)}B written, {si(one.peak)}B held"
        yield "one pass", text


def _work(flops: int) -> str:
    """What products of matrices and convolutions take; elementwise ops are counted in bytes."""
    return f"{si(flops)}FLOP" if flops else "no products of matrices"


def _rejected(recipe: Recipe) -> Lines:
    width = max((len(name) for name, _ in recipe.rejected), default=0)
    for name, why in recipe.rejected:
        yield "rejected", f"{name + ':':<{width + 1}} {why}"


def checked(plan: Planned) -> list[str]:
    """What was verified when the plan was made, and what was found doing so."""
    recipe = plan.recipe
    notes = [note for note in recipe.notes if not note.startswith(TAPED)]
    if recipe.candidate.scheme is not None or plan.length is not None:
        notes.append("products agree with a backward pass here, and nearby where f is defined")
    return notes


def facts(plan: Planned) -> dict[str, Any]:
    """The same for machines: plain values only."""
    recipe, pattern = plan.recipe, plan.recipe.structure.pattern
    candidate, cost = recipe.candidate, plan.cost
    compressed, split = candidate.compressed, candidate.split
    return {
        "function": plan.name,
        "quantity": plan.quantity,
        "shape": [plan.codomain.size, plan.domain.size],
        "batch": plan.domain.batch,
        "input": plan.domain.describe(),
        "output": plan.codomain.describe(),
        "strategy": candidate.strategy,
        "passes": candidate.passes,
        "jvps": candidate.jvps,
        "vjps": candidate.vjps,
        "chunk": recipe.chunk,
        "nnz": None if pattern is None else pattern.nnz,
        "density": None if pattern is None else pattern.density,
        "tiers": list(recipe.structure.tiers),
        "colouring": compressed and {
            "kind": compressed.coloring.kind,
            "colours": compressed.coloring.passes,
            "lower_bound": compressed.coloring.lower_bound,
        },
        "cuts": None if split is None else cuts_in_words(split),
        "program": None if plan.length is None else {"ops": plan.length},
        "cost": cost and {
            "flops": cost.flops,
            "bytes": cost.bytes,
            "ops": cost.ops,
            "seconds": cost.seconds,
        },
        "memory": plan.memory,
        "rejected": [{"strategy": name, "reason": why} for name, why in recipe.rejected],
        "dense_ops": dict(recipe.structure.dense_ops),
        "guards": plan.guards,
        "checked": checked(plan),
    }  # fmt: skip


def si(number: float) -> str:
    """A number with three digits and the prefix of its unit."""
    if number and abs(number) < 1:
        for unit in ("m", "µ", "n"):
            number *= 1000
            if abs(number) >= 1:
                return f"{number:.3g} {unit}"
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T"
