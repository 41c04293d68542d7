"""Plans on disk: one file of plain arrays and a header in JSON, so that reading it runs no code.

What was decided is kept (pattern, colouring, cuts, order of products, reasons), and what the plan
relied on as far as it can be recognised: the names of ops, and digests of the tensors that served
as structure. The function is not kept, nor its program, which is recorded again at the first use.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pushforward.boundary import Layout
from pushforward.errors import InputError, PushforwardError
from pushforward.explaining import Planned
from pushforward.planning import Recipe
from pushforward.saving.archive import Arrays, Header, arrays_of, checked_header, damaged, write
from pushforward.saving.conditions import Conditions, conditions, conditions_of, digest
from pushforward.saving.recipes import ops_of, packed_recipe, put_ops, recipe_of
from pushforward.saving.sides import layout_of, packed_side
from pushforward.work import Op

__all__ = ["Conditions", "Contents", "Saved", "digest", "read", "save"]


class Saveable(Planned, Protocol):
    """What is written of a plan."""

    @property
    def argnums(self) -> int | tuple[int, ...]: ...

    @property
    def batch_dim(self) -> int | None: ...

    @property
    def mode(self) -> tuple[bool, ...]: ...

    @property
    def wanted(self) -> str: ...

    @property
    def compiled(self) -> bool: ...

    @property
    def ops(self) -> tuple[tuple[Op, ...] | None, int]: ...

    @property
    def saved(self) -> Saved | None: ...


@dataclass(frozen=True, eq=False)
class Saved:
    """What the file says of a plan beside its recipe.

    ``settled`` holds the plan that was made of it at the last use.
    """

    length: int | None
    guards: str
    ops: tuple[Op, ...] | None
    externals: int
    conditions: Conditions
    settled: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Contents:
    """A file that was read."""

    name: str
    terms: Mapping[str, Any]
    domain: Layout
    codomain: Layout
    recipe: Recipe
    saved: Saved


def save(plan: Saveable, path: str | os.PathLike[str]) -> None:
    """Write a plan."""
    arrays: Arrays = {}
    header = _header(plan, arrays)
    write(path, header, arrays)


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a plan.

    Raises:
        LoadError: there is no such file, it is damaged, no plan, or of a later version.
    """
    arrays = arrays_of(path)
    header = checked_header(arrays, path)
    try:
        return _contents(header, arrays)
    except PushforwardError as error:
        raise damaged(path, str(error)) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _header(plan: Saveable, arrays: Arrays) -> Header:
    ops, externals = plan.ops
    if ops is not None:
        put_ops("ops", ops, arrays)
    found = conditions(plan.recipe) if plan.saved is None else plan.saved.conditions
    return {
        "torch": torch.__version__,
        "function": plan.name,
        "terms": {
            "argnums": plan.argnums,
            "batch_dim": plan.batch_dim,
            "quantity": plan.quantity,
            "memory": plan.memory,
            "mode": plan.mode,
            "wanted": plan.wanted,
            "compiled": plan.compiled,
        },
        "domain": packed_side(plan.domain),
        "codomain": packed_side(plan.codomain),
        "recipe": packed_recipe(plan.recipe, arrays),
        "length": plan.length,
        "guards": plan.guards,
        "externals": externals,
        "conditions": dataclasses.asdict(found),
    }


def _contents(header: Header, arrays: Arrays) -> Contents:
    terms = dict(header["terms"])
    terms["argnums"] = _argnums(terms["argnums"])
    terms["mode"] = tuple(map(bool, terms["mode"]))
    domain, codomain = layout_of(header["domain"]), layout_of(header["codomain"])
    recipe = recipe_of(header["recipe"], arrays, domain)
    pattern = recipe.structure.pattern
    if pattern is not None and pattern.shape != (codomain.size, domain.size):
        raise InputError("the pattern has another shape than the map")
    saved = Saved(
        header["length"],
        str(header["guards"]),
        ops_of("ops", arrays),
        int(header["externals"]),
        conditions_of(header["conditions"]),
    )
    return Contents(str(header["function"]), terms, domain, codomain, recipe, saved)


def _argnums(value: Any) -> int | tuple[int, ...]:
    return int(value) if isinstance(value, int) else tuple(map(int, value))
