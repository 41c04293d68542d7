"""Laws that the Jacobian of every function in the zoo obeys."""

from typing import Any

import numpy as np
import pytest
import torch
from lawbook import EXACT, assert_same, drawn, flat_oracle, jacobian, normal, oracle
from torch import Tensor

import pushforward as pf
from oracles import dense_per_sample, leaves
from zoo import Case, Problem, named, over


@over()
def test_dense_equals_the_row_loop(case: Case):
    problem = case.make()
    J = jacobian(problem)
    assert_same(J.dense(), oracle(problem))
    assert_same(J.value, drawn(lambda: problem.f(*case.make().args)))


@over("batched", without=("complex", "random"))
def test_per_sample_equals_the_loop_over_samples(case: Case):
    problem = case.make()
    expected = dense_per_sample(problem.oracle_map, problem.x)
    assert_same(jacobian(problem, batch_dim=0).dense(), expected)


@over("batched", "random")
def test_noise_differs_between_samples_and_is_one_draw(case: Case):
    problem = case.make()
    J = jacobian(problem, batch_dim=0)
    whole = jacobian(problem).matrix()
    batch, m, n = J.matrix().shape
    blocks = whole.reshape(batch, m, batch, n)
    own = torch.stack([blocks[b, :, b] for b in range(batch)])
    torch.testing.assert_close(J.matrix(), own, **EXACT)
    assert not torch.equal(own[0], own[1])


def test_dropout_uses_the_mask_of_the_value():
    problem = named("dropout_train")
    J = jacobian(problem)
    mask = (J.value / problem.x).reshape(-1)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(J.matrix(), torch.diag(mask), **EXACT)


@over("coupled")
def test_coupled_samples_are_refused(case: Case):
    problem = case.make()
    with pytest.raises(pf.errors.CouplingError, match="influence each other"):
        jacobian(problem, batch_dim=0)


@over(without=("random",))
def test_every_plan_gives_the_same_numbers(case: Case):
    problem = case.make()
    assert_plans_agree(problem, jacobian(problem))


@over("batched", without=("random",))
def test_every_plan_gives_the_same_numbers_per_sample(case: Case):
    problem = case.make()
    assert_plans_agree(problem, jacobian(problem, batch_dim=0), batch_dim=0)


def assert_plans_agree(problem: Problem, J: pf.Jacobian, **options: Any) -> None:
    """The loop of plain gradients always applies; the others may say that they do not."""
    expected = J.matrix()
    for strategy in {"reverse", "forward", "loop"} - {J.plan.strategy}:
        try:
            other = jacobian(problem, plan=strategy, **options)
        except pf.errors.PlanError:
            assert strategy != "loop"
            continue
        assert other.plan.strategy == strategy
        assert_same(other.matrix(), expected)


@over(without=("random",))
def test_the_smallest_budget_gives_the_same_numbers(case: Case):
    problem = case.make()
    assert_same(_within_the_smallest_budget(problem), jacobian(problem).matrix())


def _within_the_smallest_budget(problem: Problem) -> Tensor:
    """The entries under the smallest power of four for which they fit, as the library says."""
    for exponent in range(10, 34, 2):
        try:
            return jacobian(problem, memory=2**exponent).matrix()
        except pf.errors.MemoryBudgetError:
            continue
    raise AssertionError("no budget under 16 GiB is enough")


@over()
def test_products(case: Case):
    """J v and J^T u are adjoint, linear, those of the matrix, and block by block."""
    J = jacobian(case.make())
    (m, n), matrix = J.shape, J.matrix()
    v, u = normal(n, 2, seed=1), normal(m, 2, seed=2)
    pushed, pulled = J @ v, J.T @ u
    torch.testing.assert_close(pushed, matrix @ v, **EXACT)
    torch.testing.assert_close(pulled, matrix.mT @ u, **EXACT)
    torch.testing.assert_close((u * pushed).sum(0), (pulled * v).sum(0), **EXACT)
    for k in range(2):
        torch.testing.assert_close(_flat(J @ v[:, k]), pushed[:, k], **EXACT)
        torch.testing.assert_close(_flat(J.T @ u[:, k]), pulled[:, k], **EXACT)
    difference = 2 * v - 3 * v.flip(1)
    torch.testing.assert_close(J @ difference, 2 * pushed - 3 * pushed.flip(1), **EXACT)


@over(without=("tree",))
def test_vectors_of_the_shape_of_the_input_are_taken_as_they_are(case: Case):
    problem = case.make()
    J = jacobian(problem)
    m, n = J.shape
    v, u = normal(n, seed=1), normal(m, seed=2)
    shaped_v, shaped_u = _like(v, problem.x), _like(u, J.value)
    assert (J @ shaped_v).shape == J.value.shape
    assert (J.T @ shaped_u).shape == problem.x.shape
    pushed, pulled = J @ torch.stack([v, v], 1), J.T @ torch.stack([u, u], 1)
    torch.testing.assert_close(_flat(J @ shaped_v), pushed[:, 0], **EXACT)
    torch.testing.assert_close(_flat(J.T @ shaped_u), pulled[:, 0], **EXACT)


def _like(flat: Tensor, tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_complex(flat.reshape(*tensor.shape, 2))
    return flat.reshape(tensor.shape)


def _flat(tree: Any) -> Tensor:
    """All differentiated entries of a tree as one real vector."""
    real = [torch.view_as_real(x) if x.is_complex() else x for x in leaves(tree) if x is not None]
    return torch.cat([x.reshape(-1) for x in real])


@over("tree")
def test_trees_go_through_products(case: Case):
    """J applied to a tree like the input is the sum of the dense blocks applied to its leaves."""
    problem = case.make()
    J = jacobian(problem)
    v = normal(J.shape[1], seed=1)
    tree = J._domain.unpack(v)
    assert_same(_flat(J @ tree), J.matrix() @ v)


@over("batched", without=("random", "complex"))
def test_products_and_quantities_per_sample(case: Case):
    problem = case.make()
    J = jacobian(problem, batch_dim=0)
    (m, n), batch, matrix = J.shape, len(problem.x), J.matrix().detach()
    v, u = normal(batch, n, 2, seed=1), normal(batch, m, 2, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(J @ v, matrix @ v, **EXACT)
        torch.testing.assert_close(J.T @ u, matrix.mT @ u, **EXACT)
        one = v[..., 0]
        expected = (matrix @ v)[..., 0]
        torch.testing.assert_close((J @ one).reshape(batch, m), expected, **EXACT)
        shaped = one.reshape(problem.x.shape)
        torch.testing.assert_close((J @ shaped).reshape(batch, m), expected, **EXACT)
        torch.testing.assert_close(J.fro_norm(), matrix.flatten(1).norm(dim=1), **EXACT)
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(J.svdvals(), values, rtol=1e-8, atol=1e-10)
        assert J.logvol().shape == J.log_pdet().shape == (batch,)
        assert not J.logvol().isnan().any()
        if m == n:
            traces = matrix.diagonal(dim1=1, dim2=2).sum(1)
            torch.testing.assert_close(J.trace(), traces, **EXACT)


@over()
def test_representations_agree(case: Case):
    J = jacobian(case.make())
    matrix = J.matrix()
    m, n = J.shape
    assert matrix.shape == (m, n)
    assert torch.equal(J.sparse("csr").to_dense(), matrix)
    assert torch.equal(J.sparse("coo").to_dense(), matrix)
    expected = matrix.detach().numpy()
    np.testing.assert_array_equal(J.sparse("scipy").toarray(), expected)
    torch.testing.assert_close(J.T.matrix(), matrix.mT, **EXACT)
    assert J.T.T is J
    assert J.T.shape == (n, m)
    assert f"{m} x {n}" in repr(J)
    assert J.explain() == str(J.plan)
    operator = J.to_scipy()
    v, u = normal(n, 2, seed=1).numpy(), normal(m, 2, seed=2).numpy()
    np.testing.assert_allclose(operator @ v, expected @ v, atol=1e-10)
    np.testing.assert_allclose(operator.T @ u, expected.T @ u, atol=1e-10)
    np.testing.assert_allclose(operator @ v[:, 0], expected @ v[:, 0], atol=1e-10)


@over("square", without=("random",))
def test_diagonal_trace_and_determinant_are_those_of_the_matrix(case: Case):
    problem = case.make()
    J = jacobian(problem)
    matrix = flat_oracle(problem, J.shape) if "tree" not in case.tags else J.matrix()
    torch.testing.assert_close(J.diagonal(), matrix.diagonal(), **EXACT)
    torch.testing.assert_close(J.trace(), matrix.trace(), **EXACT)
    sign, logabsdet = J.slogdet()
    assert not logabsdet.isnan()
    assert not J.logvol().isnan()
    if torch.linalg.cond(matrix) < 1e8:
        expected = torch.linalg.slogdet(matrix)
        torch.testing.assert_close(logabsdet.detach(), expected.logabsdet, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(J.logvol().detach(), expected.logabsdet, rtol=1e-8, atol=1e-8)
        assert sign == expected.sign


@over()
def test_norms_are_those_of_the_matrix(case: Case):
    with torch.no_grad():
        J = jacobian(case.make())
        matrix = J.matrix()
        torch.testing.assert_close(J.fro_norm(), matrix.norm(), **EXACT)
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(J.svdvals(), values, rtol=1e-8, atol=1e-10)
        top = values.max() if values.numel() else matrix.new_zeros(())
        torch.testing.assert_close(J.spectral_norm(), top, rtol=1e-8, atol=1e-10)
        eps = torch.finfo(matrix.dtype).eps
        assert J.rank() == (values > max(J.shape, default=0) * eps * top).sum()


@over(without=("random",))
def test_a_plan_holds_at_another_point(case: Case):
    """``plan(*args)`` there equals a Jacobian taken there."""
    problem = case.make()
    made = pf.plan(problem.f, *problem.args, argnums=problem.argnums)
    elsewhere = [_moved(arg) for arg in problem.args]
    moved = Problem(problem.f, tuple(elsewhere), problem.argnums)
    assert_same(made(*elsewhere).matrix(), jacobian(moved).matrix())


def _moved(arg: Any) -> Any:
    """Another point, a little away, where it is a plain tensor."""
    is_real = isinstance(arg, Tensor) and arg.is_floating_point()
    return arg + 1e-3 * normal(*arg.shape, seed=9) if is_real and arg.dim() else arg
