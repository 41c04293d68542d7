"""Low precision: the numbers of float64 to the digits of the dtype, and the same dtype out."""

import pytest
import torch

import pushforward as pf
from oracles import loop_jacobian
from zoo import Case, cases

DTYPES = {"float32": 3e-5, "bfloat16": 0.12, "float16": 2e-2}
DOUBLE_ONLY = ("tree", "complex", "empty", "random")
# Ops that torch has no kernel for in half precision.
LINEAR_ALGEBRA = {
    "inverse",
    "solve",
    "det",
    "slogdet",
    "logdet_batched",
    "cholesky",
    "qr_log_volume",
    "singular_values",
    "eigenvalues",
    "matrix_exponential",
    "distances",
    "pairwise_distances",
    "real_fft",
    "complex_inside",
}
SMOOTH = [
    case
    for case in cases("batched", without=(*DOUBLE_ONLY, "network"))
    if case.make().jacobian
    and case.name not in LINEAR_ALGEBRA
    and not case.make().parameters
    and case.name != "matrix_product"
]
NETWORKS = cases("network", "batched", without=DOUBLE_ONLY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_closed_forms_in_low_precision(case: Case, dtype: str):
    problem = case.make()
    low = getattr(torch, dtype)
    J = pf.jacobian(problem.f, problem.x.to(low)).matrix()
    assert J.dtype == low
    expected = problem.jacobian()
    error = (J.double() - expected).abs().max()
    assert error <= DTYPES[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_networks_in_single_precision(case: Case):
    problem = case.make()
    reference = case.make()
    net = problem.f.float()
    x = problem.x.float()
    expected = loop_jacobian(reference.oracle_map, reference.x)
    J = pf.jacobian(net, x)
    assert J.dtype == J.value.dtype == torch.float32
    actual = J.dense().double()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item())
    per_sample = pf.jacobian(net, x, batch_dim=0)
    assert per_sample.fro_norm().dtype == torch.float32
    assert per_sample.svdvals().dtype == torch.float32


def test_bfloat16_network():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    expected = pf.jacobian(net, x, batch_dim=0).matrix().detach()
    low = pf.jacobian(net.bfloat16(), x.bfloat16(), batch_dim=0)
    assert low.matrix().dtype == torch.bfloat16
    torch.testing.assert_close(low.matrix().detach().float(), expected, rtol=0.1, atol=0.05)
    assert low.fro_norm().shape == (2,)


def test_mixed_precision_inputs():
    """A float32 and a float64 leaf: columns of each, at the precision of the wider one."""
    args = (torch.ones(2), torch.ones(3, dtype=torch.float64))
    J = pf.jacobian(lambda a, b: torch.cat([a.double() * 2, b * 3]), *args, argnums=(0, 1))
    assert J.matrix().dtype == torch.float64
    expected = torch.diag(torch.tensor([2.0, 2, 3, 3, 3], dtype=torch.float64))
    torch.testing.assert_close(J.matrix(), expected)
