"""The plan that users hold: what was chosen and why, as a table, and a way to use it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.boundary import Arguments, Layout
from pushforward.building import Map, entries, real_inputs
from pushforward.compressed import Compressed
from pushforward.costs import Prediction, evaluation_ops, prediction
from pushforward.errors import DifferentiationError
from pushforward.explaining import function_name, lines, table
from pushforward.factors import Split
from pushforward.passes import Linearization
from pushforward.pattern import Pattern
from pushforward.planning import Recipe, may_couple
from pushforward.purity import modes_set
from pushforward.saving import Saved, save
from pushforward.work import Op


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
        cost: FLOPs, bytes, ops and predicted seconds of one evaluation.
        saved: where the plan was loaded from a file: what stands there.
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
    modules: tuple[tuple[Callable[[], nn.Module | None], bool], ...] = ()
    saved: Saved | None = None

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

    @cached_property
    def scheme(self) -> Compressed | Split | None:
        """How entries are found, where they are not simply rows or columns."""
        return self.recipe.candidate.scheme if self.entries_are_all else None

    @cached_property
    def compressed(self) -> Compressed | None:
        """The scheme, where it is a coloured pattern of all entries."""
        return self.recipe.candidate.compressed if self.entries_are_all else None

    @cached_property
    def entries_are_all(self) -> bool:
        """Whether the scheme finds every entry, and not the diagonal alone."""
        return self.strategy != "diagonal"

    def of(self, function: Callable[..., Any]) -> Plan:
        """The same plan for another function; what was worked out for it stays."""
        made = object.__new__(Plan)
        made.__dict__.update(self.__dict__)
        made.__dict__["function"] = function
        return made

    def taped_entries(self, arguments: Arguments, linear: Linearization) -> Sequence[Tensor]:
        """What the scheme gives through a tape that was made before."""
        return entries(self.map, arguments, self.recipe, linear)

    def versions(self) -> tuple[tuple[int, int], ...]:
        """How often each tensor that the program reads was written to."""
        evaluation = self.recipe.evaluation
        return () if evaluation is None else evaluation.versions()

    @cached_property
    def may_couple(self) -> bool:
        """Whether the samples of a batch are to be checked wherever the plan is used."""
        return self.domain.batch is not None and may_couple(self.recipe, self.recipe.ops)

    @cached_property
    def has_program(self) -> bool:
        """Whether all entries come from a flat program."""
        return self.recipe.evaluation is not None and self.entries_are_all

    @property
    def name(self) -> str:
        """What the function is called."""
        return function_name(self.function)

    @property
    def length(self) -> int | None:
        """The number of ops of the program; None where evaluations go through the tape."""
        if self.saved is not None:
            return self.saved.length
        return None if self.recipe.evaluation is None else self.recipe.evaluation.program.length

    @property
    def guards(self) -> str:
        """What the plan relies on: where that has changed, the plan is made anew."""
        if self.saved is not None:
            return self.saved.guards
        circumstances = self.recipe.circumstances
        return "any point" if circumstances is None else circumstances.describe()

    @property
    def ops(self) -> tuple[tuple[Op, ...] | None, int]:
        """The ops of one evaluation, and how many tensors from outside it reads."""
        if self.saved is not None:
            return self.saved.ops, self.saved.externals
        evaluation = self.recipe.evaluation
        externals = 0 if evaluation is None else len(evaluation.program.externals)
        return evaluation_ops(self.recipe, self.domain, self.codomain), externals

    @cached_property
    def cost(self) -> Prediction | None:
        """What one evaluation takes: FLOPs, bytes, ops, and the seconds predicted here.

        None where nothing was counted: a plan through the tape whose passes are small.
        """
        ops, externals = self.ops
        return None if ops is None else prediction(ops, self.domain, externals)

    @property
    def map(self) -> Map:
        """The map, as it is recorded."""
        return Map(self.function, self.batch_dim, self.quantity)

    def linearise(self, arguments: Arguments) -> Linearization:
        """The tape at some arguments, in the way that the plan goes."""
        return Linearization(self.map.tape(arguments), self.recipe.batched)

    def entries(self, arguments: Arguments, linear: Linearization | None) -> Sequence[Tensor]:
        """What the scheme gives at some arguments: values in order, or two factors."""
        evaluation = self.recipe.evaluation
        if evaluation is None:
            return entries(self.map, arguments, self.recipe, linear)
        made = partial(self._recorded_late, arguments)
        return evaluation.values(real_inputs(arguments), arguments.others, made)

    def _recorded_late(self, arguments: Arguments) -> Sequence[Tensor]:
        """The entries with a graph, for a backward pass that comes after the values."""
        with self.late(arguments):
            return entries(self.map, arguments, self.recipe)

    @contextmanager
    def late(self, arguments: Arguments) -> Iterator[None]:
        """Entered where the map is recorded after the Jacobian was taken: in the modes of then.

        Raises:
            DifferentiationError: something else that the function reads has changed since.
        """
        alive = [(module(), training) for module, training in self.modules]
        with modes_set([(module, flag) for module, flag in alive if module is not None]):
            if self._has_changed(arguments):
                raise DifferentiationError(
                    "expected a function that is what it was when this Jacobian was taken, but "
                    "something that it reads has changed since; take the Jacobian again after the "
                    "change, or use it before"
                )
            yield

    def _has_changed(self, arguments: Arguments) -> bool:
        """Whether something that the function reads is known to be other than it was."""
        known = self.recipe.circumstances if self.recipe.is_followed else None
        return known is not None and not known.hold(self.function, arguments, guarded=True)

    def attached(self, arguments: Arguments) -> bool:
        """Whether anything that the program reads is to have gradients."""
        assert self.recipe.evaluation is not None
        externals = (external() for external in self.recipe.evaluation.program.externals)
        read = (*arguments.tensors, *arguments.others, *externals)
        return any(tensor is not None and tensor.requires_grad for tensor in read)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was decided to a file, without the function: `load_plan` reads it again.

        Args:
            path: of the file, an ``.npz`` of plain arrays and a header in JSON, no pickle.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> import tempfile, torch, pushforward as pf
            >>> path = f"{tempfile.mkdtemp()}/sin.plan"
            >>> pf.plan(torch.sin, torch.zeros(3)).save(path)
            >>> pf.load_plan(path, torch.sin)
            Plan(jacobian 3 x 3: sparse, 1 passes)
        """
        save(self, path)

    def __str__(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        m, n = self.codomain.size, self.domain.size
        return f"Plan({self.quantity} {m} x {n}: {self.strategy}, {self.passes} passes)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(label)}</th>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in lines(self)
        )
        return f"<table>{rows}</table>"


__all__ = ["Plan", "function_name"]
