"""Laws that the Jacobian of every function in the zoo obeys."""

from typing import Any

import numpy as np
import pytest
import torch
from lawbook import EXACT, assert_same, drawn, flat_oracle, jacobian, normal, oracle
from torch import Tensor

import pushforward as pf
from oracles import dense_per_sample, leaves
from zoo import Case, over

SINGLE = ("tree",)
STRATEGIES = ("reverse", "forward", "loop")


@over()
def test_dense_equals_the_row_loop(case: Case):
    problem = case.make()
    assert_same(jacobian(problem).dense(), oracle(problem))


@over()
def test_value_is_the_value(case: Case):
    problem = case.make()
    expected = drawn(lambda: problem.f(*case.make().args))
    assert_same(jacobian(problem).value, expected)


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
    (case,) = [case for case in over("random").args[1] if case.name == "dropout_train"]
    problem = case.make()
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
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_plan_gives_the_same_numbers(case: Case, strategy: str):
    problem = case.make()
    assert_same(_planned(problem, strategy).matrix(), jacobian(problem).matrix())


def _planned(problem, strategy: str, **options) -> pf.Jacobian:
    """The Jacobian by a named strategy, or a skip where the library says that it cannot."""
    try:
        return jacobian(problem, plan=strategy, **options)
    except pf.errors.PlanError as refusal:
        assert strategy != "loop", "the loop of plain gradients always applies"
        pytest.skip(str(refusal)[:100])


@over("batched", without=("random",))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_plan_gives_the_same_numbers_per_sample(case: Case, strategy: str):
    problem = case.make()
    actual = _planned(problem, strategy, batch_dim=0).matrix()
    assert_same(actual, jacobian(problem, batch_dim=0).matrix())


@over(without=("random",))
def test_any_budget_gives_the_same_numbers(case: Case):
    problem = case.make()
    expected = jacobian(problem).matrix()
    budget = _least_budget(problem)
    for memory in (budget, 2 * budget, 1 << 30):
        assert_same(jacobian(problem, memory=memory).matrix(), expected)


def _least_budget(problem) -> int:
    """The smallest power of two under which the library says that the result fits."""
    for exponent in range(8, 34):
        try:
            jacobian(problem, memory=2**exponent).matrix()
        except pf.errors.MemoryBudgetError:
            continue
        return 2**exponent
    raise AssertionError("no budget under 16 GiB is enough")


@over()
def test_adjointness(case: Case):
    J = jacobian(case.make())
    m, n = J.shape
    v, u = normal(n, 3, seed=1), normal(m, 3, seed=2)
    left, right = u * (J @ v), (J.T @ u) * v
    torch.testing.assert_close(left.sum(0), right.sum(0), **EXACT)


@over()
def test_products_are_those_of_the_matrix(case: Case):
    J = jacobian(case.make())
    m, n = J.shape
    v, u, matrix = normal(n, 3, seed=1), normal(m, 3, seed=2), J.matrix()
    torch.testing.assert_close(J @ v, matrix @ v, **EXACT)
    torch.testing.assert_close(J.T @ u, matrix.mT @ u, **EXACT)
    torch.testing.assert_close(J.T.matrix(), matrix.mT, **EXACT)


@over()
def test_blocks_are_their_columns(case: Case):
    J = jacobian(case.make())
    m, n = J.shape
    v, u = normal(n, 2, seed=1), normal(m, 2, seed=2)
    for k in range(2):
        torch.testing.assert_close((J @ v)[:, k], _flat(J @ v[:, k]), **EXACT)
        torch.testing.assert_close((J.T @ u)[:, k], _flat(J.T @ u[:, k]), **EXACT)


@over()
def test_products_are_linear(case: Case):
    J = jacobian(case.make())
    m, n = J.shape
    v, w = normal(n, 2), normal(n, 2, seed=1)
    u, z = normal(m, 2, seed=2), normal(m, 2, seed=3)
    torch.testing.assert_close(J @ (2 * v - 3 * w), 2 * (J @ v) - 3 * (J @ w), **EXACT)
    torch.testing.assert_close(J.T @ (2 * u - 3 * z), 2 * (J.T @ u) - 3 * (J.T @ z), **EXACT)


@over(without=SINGLE)
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
    domain = J._domain
    tree = domain.unpack(v)
    assert_same(_flat(J @ tree), J.matrix() @ v)


@over("batched", without=("random", "complex"))
def test_products_per_sample(case: Case):
    problem = case.make()
    J = jacobian(problem, batch_dim=0)
    (m, n), batch, matrix = J.shape, len(problem.x), J.matrix()
    v, u = normal(batch, n, 2, seed=1), normal(batch, m, 2, seed=2)
    torch.testing.assert_close(J @ v, matrix @ v, **EXACT)
    torch.testing.assert_close(J.T @ u, matrix.mT @ u, **EXACT)
    torch.testing.assert_close((J @ v[..., 0]).reshape(batch, m), (matrix @ v)[..., 0], **EXACT)
    shaped = v[..., 0].reshape(problem.x.shape)
    torch.testing.assert_close(
        (J @ shaped).reshape(batch, m), (matrix @ v)[..., 0].reshape(batch, m), **EXACT
    )


@over()
def test_representations_agree(case: Case):
    J = jacobian(case.make())
    matrix = J.matrix()
    assert matrix.shape == J.shape
    assert torch.equal(J.sparse("csr").to_dense(), matrix)
    assert torch.equal(J.sparse("coo").to_dense(), matrix)
    np.testing.assert_array_equal(J.sparse("scipy").toarray(), matrix.detach().numpy())
    if 0 not in J.shape:
        operator = J.to_scipy()
        v, u = normal(J.shape[1], 2, seed=1).numpy(), normal(J.shape[0], 2, seed=2).numpy()
        expected = matrix.detach().numpy()
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
    J = jacobian(case.make())
    matrix = J.matrix().detach()
    torch.testing.assert_close(J.fro_norm().detach(), matrix.norm(), **EXACT)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(J.svdvals().detach(), values, rtol=1e-8, atol=1e-10)
    top = values.max() if values.numel() else matrix.new_zeros(())
    torch.testing.assert_close(J.spectral_norm().detach(), top, rtol=1e-8, atol=1e-10)
    eps = torch.finfo(matrix.dtype).eps
    assert J.rank() == (values > max(J.shape, default=0) * eps * top).sum()


@over("batched", without=("random", "complex"))
def test_quantities_per_sample_are_those_of_each_matrix(case: Case):
    problem = case.make()
    J = jacobian(problem, batch_dim=0)
    matrix = J.matrix().detach()
    torch.testing.assert_close(J.fro_norm().detach(), matrix.flatten(1).norm(dim=1), **EXACT)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(J.svdvals().detach(), values, rtol=1e-8, atol=1e-10)
    assert J.logvol().shape == J.log_pdet().shape == (len(problem.x),)
    assert not J.logvol().isnan().any()
    if J.shape[0] == J.shape[1]:
        torch.testing.assert_close(
            J.trace().detach(), matrix.diagonal(dim1=1, dim2=2).sum(1), **EXACT
        )


@over(without=("random",))
def test_a_plan_holds_at_another_point(case: Case):
    """``plan(*args)`` there equals a Jacobian taken there."""
    problem = case.make()
    made = pf.plan(problem.f, *problem.args, argnums=problem.argnums)
    assert_same(made(*case.make().args).dense(), jacobian(problem).dense())


@over()
def test_transposing_twice_is_nothing(case: Case):
    J = jacobian(case.make())
    assert J.T.T is J
    assert J.T.shape == J.shape[::-1]


@over()
def test_the_text_of_a_jacobian(case: Case):
    J = jacobian(case.make())
    m, n = J.shape
    assert f"{m} x {n}" in repr(J)
    assert J.explain() == str(J.plan)
