"""The zoo: functions at points, with closed-form Jacobians and exact patterns where they are known.

    for case in cases("batched", without=("random",)):
        problem = case.make()
        problem.f, problem.args, problem.argnums, problem.jacobian, problem.pattern

Tests, documentation and benchmarks share it. Everything is float64 with its own seeds, small, and
of unequal shapes. A new function is one decorated recipe in ``tests/zoo_families``.
"""

from collections.abc import Iterable

import pytest

from zoo_families import (
    elementary,
    fields,
    matrices,
    movement,
    networks,
    normalisation,
    trees,
    unusual,
)
from zoo_families.case import CASES, TAGS, Case, Problem

__all__ = ["CASES", "FAMILIES", "TAGS", "Case", "Problem", "cases", "named", "over"]

FAMILIES = (
    elementary,
    fields,
    matrices,
    movement,
    networks,
    normalisation,
    trees,
    unusual,
)


def cases(*tags: str, without: Iterable[str] = ()) -> list[Case]:
    """The cases that carry all ``tags`` and none of ``without``, in order of entry."""
    barred = frozenset(without)
    return [case for case in CASES if case.tags.issuperset(tags) and not case.tags & barred]


def named(name: str) -> Problem:
    """The problem of one case, made afresh."""
    (case,) = (case for case in CASES if case.name == name)
    return case.make()


def over(*tags: str, without: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Run a test once for each of ``cases(...)``, as its argument ``case``."""
    return pytest.mark.parametrize("case", cases(*tags, without=without), ids=str)
