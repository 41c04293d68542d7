"""Determinants, volumes, ranks and norms of matrices."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from pushforward import linalg
from pushforward.errors import DimensionError, InputError, ShapeError

# torch compiles its table of forward-mode decompositions with torch.jit, at the first jvp.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

SECOND_DERIVATIVES = {
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
}
VALUES = {
    "slogdet": lambda A: linalg.slogdet(A)[1],
    "logvol": linalg.logvol,
    "log_pdet": linalg.log_pdet,
}
NORMS = {
    "fro_norm": linalg.fro_norm,
    "spectral_norm": linalg.spectral_norm,
    "stable_rank": linalg.stable_rank,
    "cond": linalg.cond,
}
ALL = VALUES | NORMS | {"pdet": linalg.pdet, "rank": linalg.rank, "svdvals": linalg.svdvals}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values, m, n, seed=0):
    """A (m, n) matrix U diag(values) V^T with random orthonormal U and V."""
    U = torch.linalg.qr(random(m, len(values), seed=seed)).Q
    V = torch.linalg.qr(random(n, len(values), seed=seed + 1)).Q
    return (U * torch.as_tensor(values, dtype=torch.float64)) @ V.T


def inverse_transpose_derivative(A):
    """d^2 log|det A| / dA_ij dA_kl = -(A^-1)_jk (A^-1)_li."""
    inverse = torch.linalg.inv(A)
    return -torch.einsum("jk,li->ijkl", inverse, inverse)


def gram_logvol(A):
    """1/2 log det of the smaller Gram matrix, which reverse mode differentiates rightly."""
    gram = A.mT @ A if A.shape[-2] >= A.shape[-1] else A @ A.mT
    return torch.linalg.cholesky(gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


class TestValues:
    @pytest.mark.parametrize("shape", [(4, 4), (1, 1), (2, 3, 3), (2, 0, 3, 3), (0, 0), (2, 0, 0)])
    def test_slogdet_agrees_with_torch(self, shape):
        A = random(*shape)
        sign, logabs = linalg.slogdet(A)
        expected = torch.linalg.slogdet(A)
        torch.testing.assert_close(sign, expected.sign)
        torch.testing.assert_close(logabs, expected.logabsdet)

    @pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 3, 4, 2), (7, 1), (1, 7)])
    def test_logvol_is_the_gram_volume(self, shape):
        A = random(*shape)
        torch.testing.assert_close(linalg.logvol(A), gram_logvol(A))
        torch.testing.assert_close(linalg.log_pdet(A), gram_logvol(A))

    @pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (2, 3, 0), (2, 0, 3), (0, 0)])
    def test_empty_matrices_have_the_empty_product(self, shape):
        A = torch.zeros(shape, requires_grad=True)
        batch = torch.zeros(shape[:-2])
        torch.testing.assert_close(linalg.logvol(A), batch)
        torch.testing.assert_close(linalg.log_pdet(A), batch)
        torch.testing.assert_close(linalg.pdet(A), batch + 1)
        torch.testing.assert_close(linalg.rank(A), batch.long())
        for norm in NORMS.values():
            torch.testing.assert_close(norm(A), batch)
            assert torch.autograd.grad(norm(A).sum(), A)[0].shape == shape

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_short_dtypes_are_worked_in_float64(self, dtype):
        A = random(3, 4, 4).to(dtype)
        for f in (*VALUES.values(), *NORMS.values(), linalg.pdet):
            assert f(A).dtype is dtype
            torch.testing.assert_close(f(A), f(A.double()).to(dtype))

    def test_pdet_is_the_product_of_singular_values_not_of_eigenvalues(self):
        A = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(linalg.pdet(A).item(), math.sqrt(2))

    def test_the_zero_matrix(self):
        zero = torch.zeros(3, 2)
        assert linalg.pdet(zero) == 1
        assert linalg.log_pdet(zero) == 0
        assert linalg.logvol(zero) == -math.inf
        assert linalg.rank(zero) == 0
        assert linalg.stable_rank(zero) == 0
        assert linalg.cond(zero) == math.inf
        assert linalg.spectral_norm(zero) == linalg.fro_norm(zero) == 0

    @pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
    def test_rank_deficient(self, m, n):
        A = with_singular_values([3.0, 0.5], m, n)
        assert linalg.rank(A) == 2
        assert linalg.logvol(A) == -math.inf
        torch.testing.assert_close(linalg.log_pdet(A).item(), math.log(1.5))

    def test_rtol_decides_what_counts_as_zero(self):
        A = with_singular_values([1.0, 1e-3, 1e-5], 4, 3)
        assert linalg.rank(A) == 3
        assert linalg.rank(A, rtol=1e-4) == 2
        assert linalg.logvol(A, rtol=1e-4) == -math.inf
        torch.testing.assert_close(linalg.log_pdet(A, rtol=1e-4).item(), math.log(1e-3))
        torch.testing.assert_close(linalg.logvol(A, rtol=0.0).item(), math.log(1e-8))

    def test_a_singular_value_at_the_tolerance_counts_as_zero(self):
        A = torch.diag(torch.tensor([4.0, 1.0]))
        assert linalg.rank(A, rtol=0.25) == 1
        assert linalg.logvol(A, rtol=0.25) == -math.inf
        assert linalg.pdet(A, rtol=0.25) == 4

    def test_default_tolerances_follow_the_dtype_of_the_input(self):
        A = with_singular_values([1.0, 1e-8], 3, 3)
        assert linalg.rank(A) == 2
        assert linalg.rank(A.float()) == 1

    def test_norms(self):
        A = with_singular_values([4.0, 2.0, 1.0], 5, 3)
        torch.testing.assert_close(linalg.svdvals(A), torch.tensor([4.0, 2.0, 1.0]).double())
        torch.testing.assert_close(linalg.spectral_norm(A).item(), 4.0)
        torch.testing.assert_close(linalg.fro_norm(A).item(), math.sqrt(21))
        torch.testing.assert_close(linalg.stable_rank(A).item(), 21 / 16)
        torch.testing.assert_close(linalg.cond(A).item(), 4.0)


class TestConditioning:
    @pytest.mark.parametrize("n", [3, 10, 64])
    def test_float32_at_condition_1e6(self, n):
        values = torch.logspace(0, -6, n, dtype=torch.float64)
        A = with_singular_values(values, n, n).float()
        expected = values.log().sum().item()
        tall = torch.cat([A, A]) / math.sqrt(2)
        for got in (linalg.slogdet(A)[1], linalg.logvol(A), linalg.logvol(tall)):
            assert abs(got.item() - expected) < 0.05
        assert abs(linalg.log_pdet(A, rtol=1e-7).item() - expected) < 0.05

    def test_small_entries_do_not_underflow(self):
        A = random(200, 200).float() * 1e-3
        expected = torch.linalg.slogdet(A.double()).logabsdet.float()
        for f in VALUES.values():
            torch.testing.assert_close(f(A), expected)

    def test_the_frobenius_norm_neither_overflows_nor_underflows(self):
        A = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        for scale in (1e200, 1e-200):
            torch.testing.assert_close(linalg.fro_norm(A * scale).item() / scale, 5.0)


class TestSingular:
    def test_exact_and_rounded_singular_matrices(self):
        rows = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3)
        waist = random(6, 2) @ random(2, 6, seed=1)
        for A in (rows, waist, torch.zeros(2, 2), torch.ones(3, 3), waist.float()):
            sign, logabs = linalg.slogdet(A)
            assert (sign, logabs) == (0, -math.inf)
            assert linalg.logvol(A) == -math.inf

    @pytest.mark.parametrize(
        "rows",
        [
            [[1e10, 0.0], [0.0, 1e-10]],
            [[1e10, 1e10], [1e-10, 2e-10]],
            [[1.0, 0.0], [1e5, 1e-12]],
            [[1e-12, 1e5], [0.0, 1.0]],
        ],
    )
    def test_badly_scaled_is_not_singular(self, rows):
        A = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
        sign, logabs = linalg.slogdet(A)
        exact = rows[0][0] * rows[1][1] - rows[0][1] * rows[1][0]
        torch.testing.assert_close((sign * logabs.exp()).item(), exact)
        (gradient,) = torch.autograd.grad(logabs, A)
        cofactors = [[rows[1][1], -rows[1][0]], [-rows[0][1], rows[0][0]]]
        expected = torch.tensor(cofactors, dtype=torch.float64) / exact
        # An entry of the gradient is as large as one over what its row and column are scaled by.
        row = A.detach().abs().amax(1, keepdim=True)
        column = (A.detach() / row).abs().amax(0, keepdim=True)
        assert ((gradient - expected).abs() <= 1e-12 / (row * column)).all()

    @pytest.mark.parametrize("name", ["slogdet", "logvol"])
    def test_one_singular_matrix_does_not_poison_the_others(self, name):
        A = torch.stack([random(3, 3), torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)])
        A.requires_grad_()
        values = VALUES[name](A)
        assert values[1] == values[2] == -math.inf
        (gradient,) = torch.autograd.grad(values.sum(), A, create_graph=True)
        expected = torch.linalg.inv(A.detach()[[0, 3]]).mT
        torch.testing.assert_close(gradient[[0, 3]], expected)
        assert not gradient[1:3].any()
        (second,) = torch.autograd.grad(gradient.square().sum(), A)
        assert second.isfinite().all()
        assert not second[1:3].any()

    def test_pdet_takes_a_batch_of_mixed_ranks(self):
        parts = [with_singular_values(values, 4, 3) for values in ([2.0, 1.0, 0.5], [3.0], [])]
        A = torch.stack(parts).requires_grad_()
        values = linalg.log_pdet(A)
        torch.testing.assert_close(values.detach(), torch.tensor([1.0, 3.0, 1.0]).double().log())
        (gradient,) = torch.autograd.grad(values.sum(), A)
        expected = torch.linalg.pinv(A.detach(), rtol=1e-10).mT
        torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-12)


class TestDerivatives:
    @pytest.mark.parametrize("name", VALUES)
    @pytest.mark.parametrize("point", ["random", "identity"])
    def test_second_derivatives_in_every_mode(self, name, point):
        A = random(3, 3) if point == "random" else torch.eye(3, dtype=torch.float64)
        expected = inverse_transpose_derivative(A)
        for second in SECOND_DERIVATIVES.values():
            got = second(VALUES[name])(A)
            torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-11)
            under_vmap = vmap(second(VALUES[name]))(torch.stack([A, 2 * A]))
            torch.testing.assert_close(under_vmap[0], expected, rtol=0.0, atol=1e-11)
            torch.testing.assert_close(under_vmap[1], expected / 4, rtol=0.0, atol=1e-11)

    @pytest.mark.parametrize("name", ["logvol", "log_pdet"])
    @pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 1), (1, 4)])
    def test_derivatives_of_volumes(self, name, shape):
        A = random(*shape)
        first = jacrev(VALUES[name])(A)
        torch.testing.assert_close(first, torch.linalg.pinv(A).T, rtol=0.0, atol=1e-12)
        expected = jacrev(jacrev(gram_logvol))(A)
        for second in SECOND_DERIVATIVES.values():
            torch.testing.assert_close(second(VALUES[name])(A), expected, rtol=0.0, atol=1e-10)

    def test_third_derivatives(self):
        A = random(3, 3)
        expected = jacrev(inverse_transpose_derivative)(A)
        for f in VALUES.values():
            got = jacrev(jacrev(jacrev(f)))(A)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", VALUES)
    def test_batched_backward_of_a_graph_that_is_kept(self, name):
        A = random(3, 3).requires_grad_()
        (first,) = torch.autograd.grad(VALUES[name](A), A, create_graph=True)
        seeds = torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)
        (second,) = torch.autograd.grad(first, A, seeds, is_grads_batched=True, create_graph=True)
        expected = inverse_transpose_derivative(A.detach())
        torch.testing.assert_close(
            second.detach().reshape(3, 3, 3, 3), expected, rtol=0.0, atol=1e-11
        )
        assert second.requires_grad

    def test_the_determinant_at_the_identity(self):
        def det(A):
            sign, logabs = linalg.slogdet(A)
            return sign * logabs.exp()

        index = torch.eye(3, dtype=torch.float64)
        expected = torch.einsum("ij,kl->ijkl", index, index) - torch.einsum(
            "il,jk->ijkl", index, index
        )
        torch.testing.assert_close(hessian(det)(index), expected)
        torch.testing.assert_close(hessian(linalg.pdet)(index), expected)

    def test_log_pdet_at_fixed_rank(self):
        def through_factors(B, C):
            return linalg.log_pdet(B @ C)

        def expected(B, C):
            return gram_logvol(B) + gram_logvol(C)

        factors = random(5, 2), random(2, 4, seed=1)
        torch.testing.assert_close(through_factors(*factors), expected(*factors))
        for f_first, e_first in zip(
            jacrev(through_factors, (0, 1))(*factors),
            jacrev(expected, (0, 1))(*factors),
            strict=True,
        ):
            torch.testing.assert_close(f_first, e_first, rtol=0.0, atol=1e-12)
        got = jacrev(jacrev(through_factors, (0, 1)), (0, 1))(*factors)
        want = jacrev(jacrev(expected, (0, 1)), (0, 1))(*factors)
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(got[i][j], want[i][j], rtol=0.0, atol=1e-11)

    @pytest.mark.parametrize("name", NORMS)
    @pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
    def test_derivatives_of_norms(self, name, shape):
        A = random(*shape)
        svd = torch.linalg.svdvals
        expected = {
            "fro_norm": lambda A: A.square().sum().sqrt(),
            "spectral_norm": lambda A: svd(A)[0],
            "stable_rank": lambda A: A.square().sum() / svd(A)[0] ** 2,
            "cond": lambda A: svd(A)[0] / svd(A)[-1],
        }[name]
        first = jacrev(NORMS[name])(A)
        torch.testing.assert_close(first, jacrev(expected)(A), rtol=1e-10, atol=1e-10)
        for second in SECOND_DERIVATIVES.values():
            got = second(NORMS[name])(A)
            torch.testing.assert_close(got, jacrev(jacrev(expected))(A), rtol=1e-9, atol=1e-9)

    def test_the_spectral_norm_where_other_values_coincide(self):
        A = torch.diag(torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64))
        step = 1e-4
        gradients = []
        for sign in (1, -1):
            moved = A.clone()
            moved[0, 1] += sign * step
            gradients.append(grad(linalg.spectral_norm)(moved))
        expected = (gradients[0] - gradients[1]) / (2 * step)
        got = hessian(linalg.spectral_norm)(A)[:, :, 0, 1]
        torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-7)

    @pytest.mark.parametrize("name", ["spectral_norm", "cond", "stable_rank"])
    def test_norms_of_the_identity_have_finite_derivatives(self, name):
        identity = torch.eye(3, dtype=torch.float64)
        assert jacrev(NORMS[name])(identity).isfinite().all()
        assert hessian(NORMS[name])(identity).isfinite().all()

    def test_zero_matrices_have_zero_gradients(self):
        zero = torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
        for f in (linalg.logvol, linalg.log_pdet, linalg.fro_norm, linalg.stable_rank, linalg.cond):
            (gradient,) = torch.autograd.grad(f(zero).sum(), zero)
            assert not gradient.any()

    def test_forward_mode(self):
        A, direction = random(4, 3), random(4, 3, seed=1)
        for f in (linalg.logvol, linalg.log_pdet):
            _, tangent = jvp(f, (A,), (direction,))
            torch.testing.assert_close(tangent, (torch.linalg.pinv(A).T * direction).sum())


class TestErrors:
    @pytest.mark.parametrize("name", ALL)
    def test_not_a_matrix(self, name):
        with pytest.raises(ShapeError, match=r"expects a tensor of matrices .* got \(3,\)"):
            ALL[name](torch.zeros(3))
        with pytest.raises(ShapeError, match="got list"):
            ALL[name]([[1.0]])

    @pytest.mark.parametrize("name", ALL)
    def test_not_real_floating_point(self, name):
        for dtype in (torch.int64, torch.complex64, torch.bool):
            with pytest.raises(InputError, match=f"{name} expects real floating point.*{dtype}"):
                ALL[name](torch.zeros(2, 2, dtype=dtype))

    @pytest.mark.parametrize("name", ALL)
    def test_nan_and_inf_are_named(self, name):
        A = torch.zeros(2, 3, 3)
        A[1, 0, 2] = math.nan
        with pytest.raises(InputError, match=rf"{name} expects finite.*nan at index \(1, 0, 2\)"):
            ALL[name](A)
        with pytest.raises(InputError, match="got inf"):
            ALL[name](torch.full((1, 1), math.inf))
        with pytest.raises(InputError, match="expects finite entries"):
            vmap(ALL[name])(A)

    def test_slogdet_of_a_rectangle(self):
        with pytest.raises(DimensionError, match=r"square matrices.*\(2, 3\).*logvol"):
            linalg.slogdet(torch.zeros(2, 3))

    @pytest.mark.parametrize("rtol", [-1e-3, math.nan, math.inf])
    def test_rtol(self, rtol):
        for f in (linalg.logvol, linalg.pdet, linalg.log_pdet, linalg.rank):
            with pytest.raises(InputError, match="rtol expects a finite number >= 0"):
                f(torch.eye(2), rtol=rtol)
