"""Which passes to make: the strategies, what each would cost, and the choice that was made.

A strategy is one function from a `Problem` to a `Candidate`, or to the reason why it does not
apply. All stand in `STRATEGIES`; the cheapest candidate wins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Layout
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    InputError,
    MemoryBudgetError,
    PlanError,
)
from pushforward.meter import Cost, measure
from pushforward.passes import Linearization
from pushforward.tape import coupling_op, op_name

QUANTITIES = ("jacobian", "hessian")

# Below this many entries the choice of a mode cannot matter as much as measuring it would cost.
_SMALL = 1 << 14
# How much dearer one kind of pass can be than the other: beyond it the count of passes decides.
_PASS_RATIO = 8
# What one chunk of passes may hold when no budget is given: large enough to keep the cores busy.
_DEFAULT_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Problem:
    """What there is to plan: a recorded map, the quantity wanted, and the budget."""

    linear: Linearization
    quantity: str
    memory: int | None
    recorded: Cost | None

    @property
    def m(self) -> int:
        return self.linear.tape.codomain.size

    @property
    def n(self) -> int:
        return self.linear.tape.domain.size

    @property
    def samples(self) -> int:
        batch = self.linear.tape.domain.batch
        return 1 if batch is None else batch

    @property
    def entries(self) -> int:
        return self.m * self.n * self.samples

    @property
    def entry_bytes(self) -> int:
        return self.entries * self.linear.tape.domain.dtype.itemsize

    @property
    def is_small(self) -> bool:
        return self.entries <= _SMALL and self.memory is None

    @cached_property
    def pull_cost(self) -> Cost:
        """What one backward pass costs, counted on one."""
        u = self.random(self.linear.tape.codomain, 1)[0]
        return _cost_of(lambda: self.linear.pull(u))

    @cached_property
    def push_cost(self) -> Cost:
        """What one transposed backward pass costs, counted on one."""
        v = self.random(self.linear.tape.domain, 1)[0]
        self.linear.push(v)
        return _cost_of(lambda: self.linear.push(v))

    def random(self, side: Layout, count: int) -> tuple[Tensor, ...]:
        """Vectors to try things on, ``(1, [B,] size)`` each, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, *side.lead, side.size)
        draws = [torch.randn(shape, generator=generator) for _ in range(count)]
        return tuple(v.to(side.device, side.dtype) for v in draws)


def _cost_of(product: Callable[[], Any]) -> Cost:
    with torch.no_grad():
        return measure(product)[1]


@dataclass(frozen=True)
class Candidate:
    """A strategy that applies, and its cost."""

    strategy: str
    jvps: int
    vjps: int
    work: float
    cost: Cost | None = None

    @property
    def passes(self) -> int:
        return self.jvps + self.vjps


def reverse(problem: Problem) -> Candidate | str:
    """Row by row: one backward pass for each output, many in one batch."""
    if not problem.linear.batched:
        return "not all of its ops can run under vmap"
    return _by_rows(problem, "reverse")


def loop(problem: Problem) -> Candidate | str:
    """Row by row through plain ``autograd.grad``, with nothing of ``torch.func``."""
    return _by_rows(problem, "loop", penalty=4.0)


def _by_rows(problem: Problem, name: str, penalty: float = 1.0) -> Candidate:
    passes = problem.m
    if problem.is_small or problem.m * _PASS_RATIO <= problem.n:
        return Candidate(name, 0, passes, passes * penalty)
    cost = problem.pull_cost
    return Candidate(name, 0, passes, passes * cost.work * penalty, cost)


def forward(problem: Problem) -> Candidate | str:
    """Column by column: the transposed backward pass for each input, many in one batch."""
    if problem.quantity == "hessian":
        return "a Hessian is symmetric: its columns are its rows"
    # A forward pass stands on a second derivative, and has a graph of its own to build first.
    hopeless = problem.m <= problem.n if problem.is_small else problem.m * _PASS_RATIO <= problem.n
    if hopeless:
        return f"{problem.n} passes where rows take {problem.m}"
    refusal = _why_not_forward(problem)
    if refusal is not None:
        return refusal
    if problem.is_small or problem.n * _PASS_RATIO <= problem.m:
        return Candidate("forward", problem.n, 0, problem.n)
    cost = problem.push_cost
    return Candidate("forward", problem.n, 0, (problem.n + 1) * cost.work, cost)


def _why_not_forward(problem: Problem) -> str | None:
    """Try <u, J v> = <J^T u, v>, which fails where a second derivative is missing or wrong."""
    linear = problem.linear
    v = torch.cat(problem.random(linear.tape.domain, 2))
    (u,) = problem.random(linear.tape.codomain, 1)
    try:
        with torch.no_grad():
            pushed, pulled = linear.push(v), linear.pull(u)
    except (RuntimeError, DifferentiationError) as error:
        return f"no second derivative ({str(error).splitlines()[0][:80]})"
    if linear.by_rows:
        return "no second derivative, so that J v is made of rows"
    if not _agree(_inner(u, pushed), _inner(pulled, v), _inner(u.abs(), pushed.abs())):
        ops = ", ".join(op_name(name) for name in sorted(linear.tape.census.custom))
        return f"J v and J^T u disagree; the backward of {ops or 'an op'} is not a linear graph"
    return None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(-1)


def _agree(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    tolerance = 1e-2 if one.dtype.itemsize < 4 else 1e-3
    bounded = torch.isfinite(one) & torch.isfinite(other)
    return bool(((one - other).abs() <= tolerance * scale)[bounded].all())


Strategy = Callable[[Problem], Candidate | str]
STRATEGIES: dict[str, Strategy] = {"reverse": reverse, "forward": forward, "loop": loop}


@dataclass(frozen=True)
class Recipe:
    """A choice, free of the function it was made for."""

    candidate: Candidate
    chunk: int
    rejected: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    m: int


def choose(problem: Problem, wanted: str) -> Recipe:
    """Check the map, ask the strategies, take the cheapest and size its chunks."""
    notes = check_samples(problem) + check_batching(problem)
    asked = _asked(problem, wanted)
    candidates = [c for c in asked.values() if isinstance(c, Candidate)]
    if not candidates:
        reasons = "; ".join(f"{name}: {why}" for name, why in asked.items())
        raise PlanError(
            f"expected a strategy that applies to this map, got {wanted!r} ({reasons}); "
            'use plan="auto"'
        )
    best = min(candidates, key=lambda candidate: candidate.work)
    rejected = [(name, _why_rejected(c, best)) for name, c in asked.items() if c is not best]
    return Recipe(best, chunk_size(problem, best), tuple(rejected), notes, problem.m)


def _asked(problem: Problem, wanted: str) -> dict[str, Candidate | str]:
    if wanted == "auto":
        return {name: strategy(problem) for name, strategy in STRATEGIES.items()}
    if wanted not in STRATEGIES:
        raise PlanError(
            f'plan= expects "auto", a Plan or one of {", ".join(STRATEGIES)}, got {wanted!r}'
        )
    if wanted == "forward" and problem.quantity == "jacobian":
        refusal = _why_not_forward(problem)
        return {wanted: refusal or Candidate(wanted, problem.n, 0, problem.n)}
    return {wanted: STRATEGIES[wanted](problem)}


def _why_rejected(candidate: Candidate | str, best: Candidate) -> str:
    if isinstance(candidate, str):
        return candidate
    ratio = candidate.work / best.work if best.work else 1.0
    return f"{candidate.passes} passes, {ratio:.2g}x the work"


def chunk_size(problem: Problem, candidate: Candidate) -> int:
    """How many passes go together, so that a chunk keeps to the budget."""
    passes = max(candidate.passes, 1)
    if problem.is_small:
        return passes
    cost = problem.push_cost if candidate.strategy == "forward" else problem.pull_cost
    side = problem.m + problem.n
    one = cost.peak + side * problem.samples * problem.linear.tape.domain.dtype.itemsize
    if problem.memory is None:
        return max(1, min(passes, _DEFAULT_CHUNK_BYTES // max(one, 1)))
    held = problem.recorded.held if problem.recorded else 0
    room = problem.memory - held
    if room < one:
        raise MemoryBudgetError(
            f"memory={problem.memory} bytes expects at least {held + one}: {held} to hold the "
            f"graph and {one} for a single pass; raise it, or take fewer samples at a time"
        )
    # Half of the room for the passes of a chunk, the other half for what is made of them.
    return max(1, min(passes, room // (2 * max(one, 1))))


def check_samples(problem: Problem) -> tuple[str, ...]:
    """Refuse a batch whose samples influence each other.

    Scaling the cotangent of each sample by its own power of two scales the gradient of that sample
    by exactly the same, unless another sample's cotangent reaches it.
    """
    batch = problem.linear.tape.domain.batch
    if batch is None:
        return ()
    if batch > 1 and not samples_independent(problem):
        raise CouplingError(_coupling_message(problem, batch))
    return ("samples are independent: checked",)


def check_batching(problem: Problem) -> tuple[str, ...]:
    """Go one by one where several cotangents at once give other numbers than each alone."""
    linear = problem.linear
    if not linear.batched or problem.m < 2 or linear.tape.domain.batch == 0:
        return ()
    cotangents = problem.random(linear.tape.codomain, 2)
    with torch.no_grad():
        together = linear.pull(torch.cat(cotangents))
        apart = torch.cat([linear.pull(u) for u in cotangents])
    scale = apart.abs().amax().nan_to_num(posinf=0.0)
    if not linear.batched or _agree(together, apart, scale):
        return ()
    linear.batched = False
    return ("vmap of the backward gives wrong numbers here: cotangents go one by one",)


def samples_independent(problem: Problem) -> bool:
    """Compare the gradients of random cotangents with those of the same ones scaled."""
    linear = problem.linear
    (u,) = problem.random(linear.tape.codomain, 1)
    with torch.no_grad():
        plain = linear.pull(u)
        for scale in sample_scales(problem.samples):
            factor = scale.to(u.device, u.dtype).reshape(1, -1, 1)
            if not _scaled_alike(plain * factor.to(plain.dtype), linear.pull(u * factor)):
                return False
    return True


def sample_scales(samples: int) -> Iterator[Tensor]:
    """Signed powers of two, (B,), in as few rounds as tell every two samples apart in one.

    A pair with the same scale in all rounds could hide its coupling: samples get the digits of
    their number.
    """
    digits = torch.tensor([sign * 2.0**k for k in range(-3, 4) for sign in (1, -1)])
    left = torch.arange(samples)
    while True:
        yield digits[left % len(digits)]
        left = left // len(digits)
        if not left.any():
            return


def _scaled_alike(expected: Tensor, came: Tensor) -> bool:
    tolerance = 64 * torch.finfo(expected.dtype).eps * expected.abs().amax(-1, keepdim=True)
    close = (came - expected).abs() <= tolerance
    return bool((close | ~torch.isfinite(expected)).all())


def _coupling_message(problem: Problem, batch: int) -> str:
    tape = problem.linear.tape
    (u,) = problem.random(tape.codomain, 1)
    u[:, (batch + 1) // 2 :] = 0
    op = coupling_op(tape, [part[0] for part in tape.codomain.split(u)], batch)
    trains = "norm" in (op or "") and any(tape.mode)
    advice = "call .eval() on the model first, or " if trains else ""
    return (
        "batch_dim=0 expects independent samples, but they influence each other through "
        f"{op or 'an op'}; {advice}use batch_dim=None for one map of the whole batch"
    )


@dataclass(frozen=True)
class Plan:
    """How a quantity of one map is computed: made once, used at any point of the same shapes.

    Call it with other arguments to get the Jacobian there without planning again.

    Attributes:
        strategy: the name of the strategy that was chosen.
        passes: the AD passes that one evaluation makes; ``jvps`` and ``vjps`` are its parts. For a
            Hessian, Hessian-vector products.
        chunk: how many of them run together.
        pattern, nnz: None, where no sparsity was detected.
        rejected: the other strategies, and why they were not taken.
    """

    function: Callable[..., Any]
    argnums: int | tuple[int, ...]
    batch_dim: int | None
    quantity: str
    memory: int | None
    domain: Layout
    codomain: Layout
    recipe: Recipe
    mode: tuple[bool, ...]
    make: Callable[..., Any]

    @property
    def strategy(self) -> str:
        return self.recipe.candidate.strategy

    @property
    def jvps(self) -> int:
        return self.recipe.candidate.jvps

    @property
    def vjps(self) -> int:
        return self.recipe.candidate.vjps

    @property
    def passes(self) -> int:
        return self.recipe.candidate.passes

    @property
    def chunk(self) -> int:
        return self.recipe.chunk

    @property
    def rejected(self) -> tuple[tuple[str, str], ...]:
        return self.recipe.rejected

    @property
    def pattern(self) -> None:
        return None

    @property
    def nnz(self) -> None:
        return None

    def __call__(self, *args: Any) -> Any:
        """The Jacobian at other arguments of the same shapes and dtypes.

        Raises:
            PlanError: the arguments, or the training mode, are not those of the plan.
        """
        return self.make(self, args)

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self._lines())
        return "\n".join(f"{label:<{width}}  {text}" for label, text in self._lines())

    def __repr__(self) -> str:
        m, n = self.codomain.size, self.domain.size
        return f"Plan({self.quantity} {m} x {n}: {self.strategy}, {self.passes} passes)"

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(label)}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in self._lines()
        )
        return f"<table>{rows}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        m, n = self.codomain.size, self.domain.size
        batch = "" if self.domain.batch is None else f", {self.domain.batch} samples"
        lines = [
            ("plan", f"{self.quantity} of {function_name(self.function)}"),
            ("size", f"{m} x {n}{batch}"),
            ("input", self.domain.describe()),
            ("output", self.codomain.describe()),
            ("strategy", f"{self.strategy}: {self._passes()}"),
            ("pattern", "not detected: every entry is computed"),
        ]
        cost = self.recipe.candidate.cost
        if cost is not None:
            text = f"{_si(cost.flops)}FLOP, {_si(cost.moved)}B written, {_si(cost.peak)}B held"
            lines.append(("one pass", text))
        if self.memory is not None:
            lines.append(("memory", f"{_si(self.memory)}B"))
        lines += [("rejected", f"{name}: {why}") for name, why in self.rejected]
        lines += [("checked", note) for note in self.recipe.notes]
        return lines

    def _passes(self) -> str:
        what = "Hessian-vector products" if self.quantity == "hessian" else "passes"
        kind = "forward" if self.jvps else "backward"
        count = (
            f"{self.passes} {what}"
            if self.quantity == "hessian"
            else f"{self.passes} {kind} {what}"
        )
        return (
            f"{count}, {self.chunk} at a time"
            if self.strategy != "loop"
            else f"{count}, one by one"
        )


def function_name(function: Callable[..., Any]) -> str:
    """What to call a function in tables and messages."""
    return getattr(function, "__name__", type(function).__name__)


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T"


_CACHE: MutableMapping[Any, dict[Any, Recipe]] = weakref.WeakKeyDictionary()


def cached_recipe(function: Callable[..., Any], key: Any) -> Recipe | None:
    """The recipe made earlier for the same function under the same circumstances."""
    try:
        return _CACHE.get(function, {}).get(key)
    except TypeError:  # not hashable, or no weak references
        return None


def store_recipe(function: Callable[..., Any], key: Any, recipe: Recipe) -> None:
    """Remember a recipe for as long as the function lives."""
    try:
        _CACHE.setdefault(function, {})[key] = recipe
    except TypeError:
        return


def check_quantity(quantity: str) -> None:
    if quantity not in QUANTITIES:
        raise InputError(f"quantity expects one of {', '.join(QUANTITIES)}, got {quantity!r}")


def check_memory(memory: int | None) -> None:
    if memory is not None and (not isinstance(memory, int) or memory <= 0):
        raise InputError(f"memory expects a positive number of bytes, got {memory!r}")


def blocks(passes: int, chunk: int) -> Sequence[tuple[int, int]]:
    """Cut ``passes`` into ranges of at most ``chunk``."""
    return [(start, min(start + chunk, passes)) for start in range(0, passes, max(chunk, 1))]
