"""Products of vectors, matrices and more: the detected pattern against the Jacobian of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor

from detected import detect, draw, exact, followed, overs
from oracles import loop_matrix

A, B = draw(3, 4, seed=1), draw(4, 2, seed=2)
BATCH = draw(2, 4, 3, seed=3)
BAND = torch.ones(4, 4, dtype=torch.float64).tril(1).triu(-1)
TALL = BAND[:, :3].clone()

FULL = {
    "mm": (lambda x: A @ x, (4, 2)),
    "mm from the left": (lambda x: x @ B, (3, 4)),
    "mm of itself": (lambda x: x @ x.T, (2, 3)),
    "mv": (lambda x: A @ x, (4,)),
    "vector by matrix": (lambda x: x @ A, (3,)),
    "dot": (lambda x: x.dot(A[0]), (4,)),
    "vdot": (lambda x: torch.vdot(x, A[0]), (4,)),
    "inner": (lambda x: torch.inner(x, A), (2, 4)),
    "bmm": (lambda x: torch.bmm(x, BATCH), (2, 3, 4)),
    "matmul, broadcast": (lambda x: x @ B, (2, 3, 4)),
    "matmul, batches broadcast": (lambda x: x @ BATCH[:, None], (3, 1, 4)),
    "addmm": (lambda x: torch.addmm(x[0, :2], A, x), (4, 2)),
    "addmm without its bias": (lambda x: torch.addmm(x[:3], A, 2 * x, beta=0), (4, 2)),
    "addmm, the bias alone": (lambda x: torch.addmm(x[:3], A, 2 * x, alpha=0), (4, 2)),
    "addmv": (lambda x: torch.addmv(x[:3], A, x), (4,)),
    "baddbmm": (lambda x: torch.baddbmm(x[:, :, :3], x, BATCH), (2, 3, 4)),
    "addbmm": (lambda x: torch.addbmm(x[0, :, :3], x, BATCH), (2, 3, 4)),
    "addr": (lambda x: torch.addr(A, x[:3], x), (4,)),
    "outer": (lambda x: torch.outer(x, x[:2]), (3,)),
    "kron": (lambda x: torch.kron(x, B), (2, 3)),
    "cross": (lambda x: torch.linalg.cross(x, x.flip(0)), (2, 3)),
    "cross with a constant": (lambda x: torch.linalg.cross(x, A.T[:1, :3]), (2, 3)),
    "cross along rows": (lambda x: torch.linalg.cross(x, A[:, :2], dim=0), (3, 2)),
    "tensordot": (lambda x: torch.tensordot(x, BATCH, ([1, 2], [2, 1])), (2, 3, 4)),
    "bilinear": (lambda x: F.bilinear(x, A[:, :2], draw(2, 4, 2)), (3, 4)),
    "bilinear in the weight": (lambda w: F.bilinear(A, A[:, :2], w), (2, 4, 2)),
    "chain": (lambda x: torch.linalg.multi_dot([A.T[:2], A.T[:3].T, x]), (3, 2)),
    "power": (lambda x: torch.linalg.matrix_power(x, 3), (2, 2)),
    "linear": (lambda x: F.linear(x, A, A[:, 0]), (2, 4)),
    "linear of a vector": (lambda x: F.linear(x, A), (4,)),
    "linear in three axes": (lambda x: F.linear(x, A, A[:, 0]), (2, 3, 4)),
    "linear in the weight": (lambda w: F.linear(A, w), (2, 4)),
    "cdist": (lambda x: torch.cdist(x, A), (2, 4)),
    "cdist, batched": (lambda x: torch.cdist(x, BATCH, p=3.0), (2, 3, 3)),
    "pdist": (lambda x: torch.pdist(x), (4, 2)),
    "cosine_similarity": (lambda x: F.cosine_similarity(x[:, None], A, dim=-1), (2, 4)),
    "of nothing": (lambda x: x @ A, (0, 3)),
    "along nothing": (lambda x: x @ A[:0], (2, 0)),
    "of one": (lambda x: x @ A[:1, :1], (1, 1)),
}

EINSUM = {
    "a diagonal": ("ii->i", ((3, 3),)),
    "a trace": ("ii", ((3, 3),)),
    "a transposition": ("ij->ji", ((2, 3),)),
    "a sum": ("ij->j", ((2, 3),)),
    "rows with rows": ("ij,ij->i", ((3, 2), (3, 2))),
    "element by element": ("ij,ij->ij", ((3, 2), (3, 2))),
    "a product": ("ij,jk->ik", ((2, 3), (3, 4))),
    "a batch": ("bij,bjk->bik", ((2, 3, 2), (2, 2, 3))),
    "a batch at the end": ("ijb,jkb->ikb", ((3, 2, 2), (2, 3, 2))),
    "an outer product": ("i,j->ij", ((3,), (2,))),
    "a broadcast": ("...ij,jk->...ik", ((2, 2, 3), (3, 2))),
    "three": ("ij,jk,k->i", ((2, 3), (3, 2), (2,))),
    "attention": ("bhqd,bhkd->bhqk", ((1, 2, 3, 2), (1, 2, 2, 2))),
}

LEFT = nn.Parameter(draw(4, 4, seed=5))
ZEROS = {
    "a band": (lambda x: BAND @ x, (4, 2)),
    "a band from the right": (lambda x: x @ TALL, (2, 4)),
    "a band and a vector": (lambda x: BAND @ x, (4,)),
    "two bands": (lambda x: BAND @ (BAND @ x), (4,)),
    "a mask on a parameter": (lambda x: F.linear(x, LEFT * BAND), (3, 4)),
    "a mask on the input": (lambda x: (x * BAND) @ x, (4, 4)),
    "a triangle of the input": (lambda x: x.tril() @ x[:, :2], (4, 4)),
    "a batch of masks": (
        lambda x: torch.bmm(torch.stack([BAND, BAND.tril()]), x),
        (2, 4, 2),
    ),
    "a mask in a batch": (lambda x: (x * BAND) @ x.mT, (2, 4, 4)),
    "block by block": (lambda x: torch.block_diag(A, B) @ x, (6, 2)),
    "nothing at all": (lambda x: torch.zeros(3, 4).double() @ x, (4, 2)),
    "identity": (lambda x: torch.eye(4).double() @ x, (4, 2)),
    "a dot product": (lambda x: x.dot(BAND[0]), (4,)),
    "linear by the weight, masked input": (lambda w: F.linear(BAND, w), (2, 4)),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", BAND, x), (4, 2)),
    "kron": (lambda x: torch.kron(BAND[:2, :3], x), (2, 2)),
    "outer": (lambda x: torch.outer(x, BAND[0]), (3,)),
    "addmm": (lambda x: torch.addmm(x[:, :2], BAND, x[:, 1:]), (4, 3)),
    "a bilinear form": (lambda x: F.bilinear(x, x, BAND[None]), (2, 4)),
}


@pytest.mark.parametrize("name", FULL)
def test_products(name):
    f, shape = FULL[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", EINSUM)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_einsum(name, argument):
    equation, shapes = EINSUM[name]
    if argument < len(shapes):
        args = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        exact(lambda *terms: torch.einsum(equation, *terms), *args, argnums=argument)


@pytest.mark.parametrize("name", ZEROS)
def test_constant_zeros_are_structure(name):
    f, shape = ZEROS[name]
    exact(f, draw(*shape))


SPARSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
}


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
class TestSparseConstants:
    def test_matrix(self, layout):
        matrix = SPARSE[layout](TALL)
        exact(lambda x: matrix @ x, draw(3, 2))

    def test_vector(self, layout):
        matrix = SPARSE[layout](BAND)
        exact(lambda x: matrix @ x.exp(), draw(4))

    def test_sparse_mm(self, layout):
        matrix = SPARSE[layout](TALL)
        exact(lambda x: torch.sparse.mm(matrix, x), draw(3, 2))

    def test_graph_convolution(self, layout):
        matrix = SPARSE[layout](BAND)
        exact(lambda x: matrix @ (matrix @ (x @ B)).tanh(), draw(4, 4))

    def test_addmm(self, layout):
        matrix = SPARSE[layout](BAND)
        exact(lambda x: torch.addmm(x[:, :2], matrix, x[:, 1:]), draw(4, 3))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_matrix_with_stored_zeros():
    places, values = tensor([[0, 0, 2], [1, 2, 0]]), tensor([1.0, 0.0, 2.0]).double()
    matrix = torch.sparse_coo_tensor(places, values, (3, 3), check_invariants=True)
    exact(lambda x: matrix @ x, draw(3, 2))


def test_sparse_matrix_made_inside():
    places, values = tensor([[0, 1, 1], [1, 0, 1]]), tensor([1.0, 3.0, 2.0]).double()

    def f(x):
        return torch.sparse_coo_tensor(places, values, (2, 3), check_invariants=True) @ x

    exact(f, draw(3, 2))


def test_distances_to_itself_keep_the_diagonal():
    """The distance of a point to itself is constant; nothing says so before it is computed."""
    f = torch.cdist
    assert overs(lambda x: f(x, x, compute_mode="use_mm_for_euclid_dist"), draw(2, 3)) == 6


DISTANCES = {
    "cdist": lambda x: torch.cdist(x, A, p=3.0),
    "cdist, Euclidean": lambda x: torch.cdist(x, A, compute_mode="use_mm_for_euclid_dist"),
    "cdist, batched": lambda x: torch.cdist(x[:, None], A),
    "pdist": torch.pdist,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_fused_distances(name):
    """The kernels themselves, which a tape replaces."""
    f, x = DISTANCES[name], draw(3, 4)
    assert (followed(f, x) == (loop_matrix(f, x) != 0).numpy()).all()


def test_made_masks_keep_the_order_of_their_inputs():
    """A masked autoencoder: an output sees the inputs before it, and no others."""
    first = (torch.arange(5)[:, None] % 3 >= torch.arange(4)[None] % 4).double()
    second = (torch.arange(4)[:, None] > torch.arange(5)[None] % 3).double()
    weights = nn.ParameterList([draw(5, 4, seed=1), draw(4, 5, seed=2)])

    def made(x):
        return F.linear(F.linear(x, weights[0] * first).tanh(), weights[1] * second)

    pattern = exact(made, draw(4)).pattern.todense()
    assert pattern.sum(1).tolist() == [0, 1, 2, 3]


def test_zeros_around_parameters_are_structure():
    weight = nn.Parameter(draw(3, 3))
    exact(lambda x: weight.tril() @ x, draw(3))
    exact(lambda x: torch.block_diag(weight, weight[:1, :2]) @ x, draw(5))
    exact(lambda x: F.pad(weight, (1, 0)) @ x, draw(4))
    exact(lambda x, w: w.triu(1) @ x, draw(3), draw(3, 3))
    exact(lambda x, w: (w * BAND[:3, :3]) @ x, draw(3), draw(3, 3))


def test_a_parameter_that_is_zero_stays():
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    assert detect(lambda x: F.linear(x, weight), draw(3)).pattern.nnz == 6
