"""A choice as plain values, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pushforward.boundary import Layout
from pushforward.errors import InputError
from pushforward.meter import Cost
from pushforward.planning import Recipe
from pushforward.saving.archive import Arrays, Header
from pushforward.saving.schemes import packed_scheme, pattern_of, put_pattern, scheme_of
from pushforward.strategies import STRATEGIES, Candidate
from pushforward.structure import detection
from pushforward.structure.follow import Guards
from pushforward.structure.graph import Graph
from pushforward.work import Op

_KINDS = {field.name: type(field.default) for field in dataclasses.fields(Op)}


def packed_recipe(recipe: Recipe, arrays: Arrays) -> Header:
    """A recipe without its program; its arrays go into ``arrays``."""
    candidate, structure = recipe.candidate, recipe.structure
    if structure.pattern is not None:
        put_pattern("pattern", structure.pattern, arrays)
    cost = candidate.cost
    if cost is not None:
        put_ops("pass.ops", cost.ops, arrays)
    return {
        "strategy": candidate.strategy,
        "jvps": candidate.jvps,
        "vjps": candidate.vjps,
        "work": candidate.work,
        "cost": cost and [cost.flops, cost.moved, cost.peak, cost.held],
        "scheme": packed_scheme(candidate, structure.pattern, arrays),
        "chunk": recipe.chunk,
        "rejected": recipe.rejected,
        "notes": recipe.notes,
        "batched": recipe.batched,
        "ops": sorted(recipe.ops),
        "samples": structure.samples,
        "dense_ops": structure.dense_ops,
        "tiers": structure.tiers,
        "note": structure.note,
        "orders": sorted(structure.guards.orders),
        "branches": structure.guards.branches,
        "elsewhere": structure.guards.elsewhere,
    }


def recipe_of(header: Header, arrays: Arrays, domain: Layout) -> Recipe:
    """Undo `packed_recipe`."""
    pattern = pattern_of("pattern", arrays) if "pattern.shape" in arrays else None
    guards = Guards({}, set(header["orders"]), bool(header["branches"]), bool(header["elsewhere"]))
    structure = detection.Structure(
        pattern,
        header["samples"],
        Graph(),
        guards,
        tuple((str(op), int(count)) for op, count in header["dense_ops"]),
        tuple(header["tiers"]),
        header["note"],
    )
    if header["strategy"] not in STRATEGIES:
        raise InputError(f"a strategy {header['strategy']!r} that is not known")
    candidate = Candidate(
        header["strategy"],
        int(header["jvps"]),
        int(header["vjps"]),
        float(header["work"]),
        _cost_of(header["cost"], ops_of("pass.ops", arrays) or ()),
        scheme_of(header["scheme"], pattern, arrays, domain),
    )
    return Recipe(
        candidate,
        int(header["chunk"]),
        tuple((str(name), str(why)) for name, why in header["rejected"]),
        tuple(map(str, header["notes"])),
        bool(header["batched"]),
        structure,
        ops=frozenset(header["ops"]),
    )


def _cost_of(numbers: list[Any] | None, ops: tuple[Op, ...]) -> Cost | None:
    """What one pass costs; None where that was not counted."""
    if not numbers:
        return None
    flops, moved, peak, held = map(int, numbers)
    return Cost(flops, moved, peak, held, ops)


def put_ops(name: str, ops: tuple[Op, ...], arrays: Arrays) -> None:
    """What ops do, as rows of numbers."""
    rows = [dataclasses.astuple(op) for op in ops]
    arrays[name] = np.array(rows, np.float64).reshape(len(rows), len(_KINDS))


def ops_of(name: str, arrays: Arrays) -> tuple[Op, ...] | None:
    """Undo `put_ops`; None where there are none."""
    if name not in arrays:
        return None
    return tuple(
        _op_of({key: kind(v) for (key, kind), v in zip(_KINDS.items(), row, strict=True)})
        for row in arrays[name].tolist()
    )


def _op_of(parts: dict[str, Any]) -> Op:
    return Op(**parts)
