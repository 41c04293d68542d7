"""The plan that users hold: what was chosen and why, as a table, and a way to use it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import Tensor

from pushforward.boundary import Arguments, Layout
from pushforward.building import Map, evaluate
from pushforward.compressed import Compressed
from pushforward.costs import Prediction, evaluation_ops, prediction
from pushforward.factors import Split
from pushforward.passes import Linearization
from pushforward.pattern import Pattern
from pushforward.planning import Recipe


@dataclass(frozen=True)
class Plan:
    """How a quantity of one map is computed: made once, used at any point of the same shapes.

    Call it with other arguments to get the Jacobian there without planning again. A plan that does
    not hold any more (another branch, another mask, another mode) is made anew, never used.

    Attributes:
        strategy: the name of the strategy that was chosen.
        passes: the AD passes that one evaluation makes; ``jvps`` and ``vjps`` are its parts. For a
            Hessian, Hessian-vector products.
        chunk: how many of them run together.
        pattern, nnz: where entries may be nonzero; None, where nothing was detected.
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
    wanted: str = "auto"
    diagonal_by: Callable[..., Any] | None = None
    compiled: bool = False

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
    def pattern(self) -> Pattern | None:
        return self.recipe.structure.pattern

    @property
    def nnz(self) -> int | None:
        return None if self.pattern is None else self.pattern.nnz

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return self.domain.dtype

    @cached_property
    def device(self) -> torch.device:
        """Where entries are computed."""
        return self.domain.device

    @property
    def scheme(self) -> Compressed | Split | None:
        """How entries are found, where they are not simply rows or columns."""
        return self.recipe.candidate.scheme if self.entries_are_all else None

    @property
    def compressed(self) -> Compressed | None:
        """The scheme, where it is a coloured pattern of all entries."""
        return self.recipe.candidate.compressed if self.entries_are_all else None

    @property
    def entries_are_all(self) -> bool:
        """Whether the scheme finds every entry, and not the diagonal alone."""
        return self.strategy != "diagonal"

    def of(self, function: Callable[..., Any]) -> Plan:
        """The same plan for another function; what was worked out for it stays."""
        made = object.__new__(Plan)
        made.__dict__.update(self.__dict__)
        made.__dict__["function"] = function
        return made

    @property
    def has_program(self) -> bool:
        """Whether all entries come from a flat program."""
        return self.recipe.evaluation is not None and self.entries_are_all

    @cached_property
    def cost(self) -> Prediction | None:
        """What one evaluation takes: FLOPs, bytes, ops, and the seconds predicted here."""
        ops = evaluation_ops(self.recipe, self.domain, self.codomain)
        return None if ops is None else prediction(ops, self.domain)

    @property
    def map(self) -> Map:
        """The map, as it is recorded."""
        return Map(self.function, self.batch_dim, self.quantity)

    def linearise(self, arguments: Arguments) -> Linearization:
        """The tape at some arguments, in the way that the plan goes."""
        return Linearization(self.map.tape(arguments), self.recipe.batched)

    def entries(self, arguments: Arguments, linear: Linearization | None) -> Sequence[Tensor]:
        """What the scheme gives at some arguments: values in order, or two factors."""
        return evaluate(self.map, arguments, self.recipe, linear)

    def for_diagonal(self, arguments: Arguments) -> Tensor | None:
        """The diagonal with fewer passes than all entries take; None where there is no such way."""
        if self.diagonal_by is None or self.quantity != "jacobian" or self.passes < 2:
            return None
        other = self.diagonal_by(self, arguments)
        fewer = other.plan.strategy == "diagonal" and other.plan.passes < self.passes
        return other.diagonal() if fewer else None

    def __call__(self, *args: Any) -> Any:
        """The Jacobian at other arguments of the same shapes and dtypes.

        Raises:
            PlanError: the arguments are not those of the plan.
        """
        return self.make(self, args)

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self._lines())
        return "\n".join(f"{label:<{width}}  {text}" for label, text in self._lines())

    def __repr__(self) -> str:
        m, n = self.codomain.size, self.domain.size
        return f"Plan({self.quantity} {m} x {n}: {self.strategy}, {self.passes} passes)"

    def _repr_html_(self) -> str:
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
            ("pattern", self._pattern()),
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

    def _pattern(self) -> str:
        structure = self.recipe.structure
        if structure.pattern is None:
            return f"not detected: {structure.note or 'every entry is computed'}"
        found = structure.pattern
        text = f"{found.nnz} of {found.shape[0]} x {found.shape[1]} entries, {found.density:.3g} full"
        return f"{text}; tiers: {', '.join(structure.tiers)}"

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
