"""The zoo against itself: closed forms, patterns and tags hold, by oracles that share nothing."""

import numpy as np
import pytest
import torch

from oracles import (
    as_real,
    dense_per_sample,
    finite_difference_jacobian,
    is_differentiated,
    leaves,
    loop_jacobian,
    loop_matrix,
)
from zoo import CASES, TAGS, Case, cases, over

PLAIN = ("tree", "complex", "random")
KNOWN = [case for case in cases(without=PLAIN) if case.make().jacobian]
PATTERNED = [case for case in cases(without=PLAIN) if case.make().pattern]


def matrix(case: Case) -> torch.Tensor:
    """(m, n) by the row loop."""
    problem = case.make()
    jacobian = loop_jacobian(problem.oracle_map, problem.x)
    outputs = jacobian.shape[: jacobian.dim() - problem.x.dim()].numel()
    return jacobian.reshape(outputs, problem.x.numel())


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_closed_form_is_the_jacobian(case: Case):
    closed = case.make().jacobian()
    torch.testing.assert_close(closed, matrix(case).reshape(closed.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", PATTERNED, ids=str)
def test_pattern_covers_the_nonzeros(case: Case):
    pattern = case.make().pattern()
    nonzero = matrix(case).numpy() != 0
    assert pattern.dtype == np.bool_
    assert pattern.shape == nonzero.shape
    assert not (nonzero & ~pattern).any()


@over(without=(*PLAIN, "surrogate", "empty"))
def test_finite_differences_agree(case: Case):
    problem = case.make()
    numeric = finite_difference_jacobian(problem.oracle_map, problem.x, step=1e-4)
    exact = loop_jacobian(problem.oracle_map, problem.x)
    torch.testing.assert_close(exact, numeric, rtol=1e-7, atol=1e-8)


@over(without=("tree", "random", "empty"))
def test_reference_is_the_same_map(case: Case):
    problem = case.make()
    expected = problem.oracle_map(problem.x.clone())
    torch.testing.assert_close(problem.f(problem.x.clone()), expected, rtol=1e-12, atol=1e-12)


@over("batched", without=("random", "complex"))
def test_batched_cases_do_not_couple(case: Case):
    problem = case.make()
    batch = len(problem.x)
    per_sample = dense_per_sample(problem.oracle_map, problem.x)
    whole = loop_jacobian(problem.oracle_map, problem.x)
    blocks = whole.reshape(batch, -1, batch, problem.x[0].numel())
    own = torch.stack([blocks[b, :, b] for b in range(batch)])
    torch.testing.assert_close(own, per_sample.reshape(own.shape), rtol=1e-10, atol=1e-12)
    assert blocks.abs().sum() == pytest.approx(own.abs().sum().item(), rel=1e-10)


@over("square", without=("tree",))
def test_square_cases_are_square(case: Case):
    problem = case.make()
    assert problem.f(problem.x.clone()).numel() == problem.x.numel()


@over("symmetric", without=("random",))
def test_symmetric_cases_are_symmetric(case: Case):
    jacobian = matrix(case)
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=1e-10, atol=1e-12)


@over("complex")
def test_complex_cases_have_real_jacobians(case: Case):
    problem = case.make()
    point = torch.view_as_real(problem.x)
    exact = loop_jacobian(as_real(problem.f), point)
    numeric = finite_difference_jacobian(as_real(problem.f), point)
    torch.testing.assert_close(exact, numeric, rtol=1e-7, atol=1e-8)


@over("tree")
def test_tree_cases_have_the_size_of_their_leaves(case: Case):
    problem = case.make()
    numbers = [problem.argnums] if isinstance(problem.argnums, int) else problem.argnums
    inputs = [x for i in numbers for x in leaves(problem.args[i]) if is_differentiated(x)]
    outputs = leaves(problem.f(*problem.args))
    shape = (sum(y.numel() for y in outputs), sum(x.numel() for x in inputs))
    jacobian = loop_matrix(problem.f, *problem.args, argnums=problem.argnums)
    assert jacobian.shape == shape


@over()
def test_making_a_case_leaves_the_global_generator_alone(case: Case):
    before = torch.get_rng_state()
    first, second = case.make(), case.make()
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(leaves(first.args), leaves(second.args), strict=True):
        assert torch.equal(a, b)


def test_names_are_unique_and_tags_are_known():
    assert len({case.name for case in CASES}) == len(CASES) > 100
    assert set().union(*(case.tags for case in CASES)) == set(TAGS)


def test_every_differentiated_leaf_is_double():
    for case in CASES:
        floats = [x for x in leaves(case.make().args) if is_differentiated(x)]
        assert {x.dtype for x in floats} <= {torch.float64, torch.complex128}, case.name
