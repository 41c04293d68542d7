"""One call of an op, and how its arguments depend on the input of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pushforward.program.recorder import READS_A_VALUE
from pushforward.sensitivity import pieces
from pushforward.structure.rules.affine import is_affine
from pushforward.structure.rules.movement import MOVES

aten = torch.ops.aten


class Kind(IntEnum):
    """How a tensor depends on the input; a later one swallows an earlier."""

    NOT = 0
    STEPS = 1
    LINEAR = 2
    ENDED = 3


@dataclass(frozen=True)
class Dependence:
    """Of what a storage holds: its kind, the comparisons behind it, the op that ended it."""

    kind: Kind = Kind.NOT
    comparisons: frozenset[int] = frozenset()
    ended_by: str = ""

    @staticmethod
    def joined(several: Sequence[Dependence]) -> Dependence:
        comparisons = frozenset().union(*(each.comparisons for each in several))
        ended_by = next((each.ended_by for each in several if each.ended_by), "")
        return Dependence(
            max((each.kind for each in several), default=Kind.NOT), comparisons, ended_by
        )


@dataclass(frozen=True)
class Call:
    """A call before it runs, and what its tensors, in order, depend on."""

    func: Any
    args: Any
    kwargs: Any
    depends: dict[int, Dependence]

    @property
    def op(self) -> Any:
        return self.func.overloadpacket

    @property
    def name(self) -> str:
        """``softmax`` for ``aten._softmax``, ``layer_norm`` for ``aten.native_layer_norm``."""
        return self.op.__name__.strip("_").removeprefix("native_").removesuffix("_forward")

    @cached_property
    def given(self) -> Dependence:
        """The dependence of all arguments together."""
        return Dependence.joined(list(self.depends.values()))

    @property
    def written(self) -> list[Tensor]:
        """Arguments that the call changes."""
        if not self.func._schema.is_mutable:
            return []
        found = []
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.append(
                    self.args[place] if place < len(self.args) else self.kwargs.get(argument.name)
                )
        return tensors_of(found)

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn; the slopes of an RReLU in evaluation mode are fixed."""
        if self.op in (aten.rrelu_with_noise, aten.rrelu_with_noise_):
            return len(self.args) > 4 and bool(self.args[4])
        return torch.Tag.nondeterministic_seeded in self.func.tags

    @property
    def reads_a_value(self) -> bool:
        return self.func in READS_A_VALUE

    @property
    def is_pointwise(self) -> bool:
        return torch.Tag.pointwise in self.func.tags

    @property
    def is_move(self) -> bool:
        """Whether elements are only looked at otherwise, or moved about."""
        in_place = torch.Tag.inplace_view in self.func.tags
        return self.func.is_view or in_place or self.op in MOVES

    @property
    def is_affine(self) -> bool:
        """Whether the results are affine in the input wherever the arguments are."""
        if not (self.kwargs.get("dtype") or torch.float32).is_floating_point:
            return False
        if self.op in pieces.BATCH_NORMS:
            return not self.args[pieces.BATCH_NORMS[self.op]]
        known = self.is_move or self.op in pieces.AFFINE
        return known or is_affine(self.func, self.args, self._is_linear)

    def _is_linear(self, tensor: Tensor) -> bool:
        found = self.depends.get(id(tensor))
        return found is not None and found.kind == Kind.LINEAR

    @property
    def unit(self) -> Any:
        """The code of a piecewise linear unit, as a function of the arguments; None for others."""
        linear = [t for t in tensors_of((self.args, self.kwargs)) if self._is_linear(t)]
        if linear and all(t is self.args[0] for t in linear):
            return pieces.UNITS.get(self.op) or pieces.UNITS_OF_TWO.get(self.op)
        return pieces.UNITS_OF_TWO.get(self.op)

    @property
    def code(self) -> Tensor:
        return self.unit(*self.args, **self.kwargs)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
