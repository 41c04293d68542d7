"""Laws of structure: patterns over the whole zoo, and every strategy against the row loop."""

from typing import Any

import numpy as np
import pytest
import torch
from lawbook import REFUSED, assert_same, drawn, jacobian, oracle
from torch import Tensor

import pushforward as pf
from detected import detect, draw
from oracles import loop_matrix
from zoo import Case, cases, over

PATTERNED = [case for case in cases(without=("complex", "random")) if case.make().pattern]
# Zeros that no rule sees: which of several elements is the greatest, or rounding in a residual.
LOOSE = {"real_fft": 36, "cholesky": 15, "lenet": 20, "residual_block": 612}


def nonzeros(case: Case, count: int = 3) -> np.ndarray:
    """(m, n): entries that autograd finds at the point of a case or at others near it."""
    problem = case.make()
    numbers = [problem.argnums] if isinstance(problem.argnums, int) else problem.argnums
    met = None
    for seed in range(count):
        args = [_moved(arg, seed) if i in numbers else arg for i, arg in enumerate(problem.args)]
        matrix = drawn(lambda a=args: loop_matrix(problem.oracle_map, *a, argnums=problem.argnums))
        found = (matrix != 0).numpy()
        met = found if met is None else met | found
    return met


def _moved(tree: Any, seed: int) -> Any:
    """A point nearby; the point itself for the seed 0, and what is no single tensor."""
    if seed == 0 or not isinstance(tree, Tensor) or not tree.is_floating_point():
        return tree
    return tree + 0.05 * draw(*tree.shape, seed=seed) * tree.abs()


def pattern_of(case: Case) -> np.ndarray:
    problem = case.make()
    structure = drawn(lambda: detect(problem.f, *problem.args, argnums=problem.argnums))
    assert structure.pattern is not None, structure.note
    return structure.pattern.todense()


@over(without=("complex", "random"))
def test_no_entry_is_missed_and_few_are_added(case: Case):
    """At several points; the entries too many are counted exactly."""
    found, met = pattern_of(case), nonzeros(case)
    assert found.shape == met.shape
    assert not (met & ~found).any()
    if case.make().pattern is None and "surrogate" not in case.tags:
        assert (found & ~met).sum() == LOOSE.get(case.name, 0)


@pytest.mark.parametrize("case", PATTERNED, ids=str)
def test_patterns_that_are_known_are_found(case: Case):
    assert (pattern_of(case) == case.make().pattern()).all()


@over()
def test_strategies_by_name_give_the_same_numbers(case: Case):
    """Twice, so that a plan that is remembered is used as well."""
    problem = case.make()
    expected = oracle(problem)
    for strategy in 2 * ("sparse", "batch", "constant"):
        try:
            J = jacobian(problem, plan=strategy)
        except pf.errors.PlanError as refusal:
            assert REFUSED.search(str(refusal))  # noqa: PT017
            continue
        assert J.plan.strategy == strategy
        assert_same(drawn(J.dense), expected)


@over(without=("complex", "random", "empty", "tree", "stateful"))
def test_budgets_are_kept_by_sparse_plans(case: Case):
    """Entries chunk by chunk are the entries at once."""
    problem = case.make()
    try:
        J = pf.jacobian(problem.f, problem.x, plan="sparse", memory=1 << 24)
    except pf.errors.PlanError:
        return
    assert J.plan.recipe.evaluation is None
    assert_same(J.dense(), oracle(problem))
    torch.testing.assert_close(J.sparse().to_dense(), J.matrix())


@over("batched", without=("random", "complex"))
def test_sparse_plans_per_sample(case: Case):
    problem = case.make()
    try:
        J = pf.jacobian(problem.f, problem.x, batch_dim=0, plan="sparse")
    except pf.errors.PlanError:
        return
    expected = pf.jacobian(problem.f, problem.x, batch_dim=0, plan="loop")
    torch.testing.assert_close(J.matrix(), expected.matrix(), rtol=1e-10, atol=1e-10)
    assert J.plan.pattern.shape == expected.shape
