"""Linear algebra: dense in a batch, apart between batches, by column where that is exact."""

import pytest
import torch
from torch import linalg, tensor

from detected import detect, draw, exact, overs, sound, spd

EYE = torch.eye(3, dtype=torch.float64)
SQUARE = draw(3, 3, seed=1) + 4 * EYE
BATCH = draw(2, 3, 3, seed=2) + 4 * EYE
LOWER, UPPER = SQUARE.tril(), SQUARE.triu()
CHOLESKY = linalg.cholesky(spd(3, 2))
RIGHT = draw(3, 2, seed=3)
BIDIAGONAL = (EYE * 2 + torch.ones(3, 3).double().tril(-1).triu(-1))[:, :]
BLOCKS = torch.block_diag(LOWER, LOWER[:2, :2])

# From matrices (2, 3, 3): dense in each batch, nothing between them.
WHOLE = {
    "inv": linalg.inv,
    "pinv": linalg.pinv,
    "matrix_exp": linalg.matrix_exp,
    "det": linalg.det,
    "logdet": lambda x: (x @ x.mT).logdet(),
    "slogdet": lambda x: linalg.slogdet(x)[1],
    "eigvalsh": lambda x: linalg.eigvalsh(x + x.mT),
    "eigh": lambda x: linalg.eigh(x @ x.mT)[1].square(),
    "svdvals": linalg.svdvals,
    "svd": lambda x: linalg.svd(x)[0].square(),
    "eigvals": lambda x: linalg.eigvals(x).abs(),
    "qr": lambda x: linalg.qr(x)[0],
    "lu_factor": lambda x: linalg.lu_factor(x)[0],
    "cholesky_inverse": torch.cholesky_inverse,
    "matrix_norm": lambda x: linalg.matrix_norm(x, 2),
    "nuclear": lambda x: linalg.matrix_norm(x, "nuc"),
    "cond": linalg.cond,
    "householder_product": lambda x: linalg.householder_product(x, x[..., 0] / 9),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_matrices(name):
    structure = detect(WHOLE[name], BATCH)
    samples = len(BATCH)
    assert structure.pattern.todense().reshape(samples, -1, samples, 9)[0, :, 1].sum() == 0
    assert structure.dense_ops == ()
    sound(WHOLE[name], BATCH)


@pytest.mark.parametrize("name", ["inv", "matrix_exp", "det", "slogdet"])
def test_whole_matrices_exactly(name):
    exact(WHOLE[name], BATCH)


def test_triangles_are_empty_on_one_side():
    rows = detect(lambda x: linalg.cholesky(x @ x.mT + 9 * EYE), BATCH).pattern.todense().any(1)
    assert (rows.reshape(2, 3, 3) == EYE.bool().numpy() | (LOWER != 0).numpy()).all()
    upper = detect(lambda x: linalg.qr(x)[1], BATCH).pattern.todense().any(1)
    assert (upper.reshape(2, 3, 3) == (UPPER != 0).numpy()).all()
    low, high = (detect(lambda x, i=i: linalg.lu(x)[i], draw(4, 3)).pattern for i in (1, 2))
    assert low.todense().any(1).reshape(4, 3).tolist() == [
        [False] * 3,
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]
    assert high.todense().any(1).reshape(3, 3).tolist() == (UPPER != 0).tolist()


@pytest.mark.parametrize("upper", [False, True])
def test_cholesky(upper):
    sound(lambda x: linalg.cholesky(x @ x.mT + 9 * EYE, upper=upper), BATCH)
    sound(lambda x: linalg.qr(x)[1], BATCH)
    sound(lambda x: linalg.lu(x)[1], BATCH)


SOLVES = {
    "solve": (lambda x: linalg.solve(SQUARE, x), (3, 2)),
    "solve from the right": (lambda x: linalg.solve(SQUARE, x, left=False), (2, 3)),
    "solve a vector": (lambda x: linalg.solve(SQUARE, x), (3,)),
    "solve, batched": (lambda x: linalg.solve(BATCH, x), (2, 3, 2)),
    "solve vectors, batched": (lambda x: linalg.solve(BATCH, x), (2, 3)),
    "solve, broadcast": (lambda x: linalg.solve(BATCH, x), (3, 2)),
    "lu_solve": (lambda x: torch.lu_solve(x, *linalg.lu_factor(SQUARE)), (3, 2)),
    "linalg.lu_solve": (lambda x: linalg.lu_solve(*linalg.lu_factor(BATCH), x), (2, 3, 2)),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, CHOLESKY), (2, 3, 2)),
    "tensorsolve": (lambda x: linalg.tensorsolve(SQUARE, x), (3,)),
    "lstsq": (lambda x: linalg.lstsq(SQUARE, x).solution, (3, 2)),
    "a lower triangle": (lambda x: linalg.solve_triangular(LOWER, x, upper=False), (3, 2)),
    "an upper triangle": (lambda x: linalg.solve_triangular(UPPER, x, upper=True), (3, 2)),
    "from the right": (
        lambda x: linalg.solve_triangular(LOWER, x, upper=False, left=False),
        (2, 3),
    ),
    "from the right, upper": (
        lambda x: linalg.solve_triangular(UPPER, x, upper=True, left=False),
        (2, 3),
    ),
    "unit triangle": (
        lambda x: linalg.solve_triangular(LOWER, x, upper=False, unitriangular=True),
        (3, 2),
    ),
    "triangles, batched": (
        lambda x: linalg.solve_triangular(BATCH.tril(), x, upper=False),
        (2, 3, 2),
    ),
    "triangles, broadcast": (lambda x: linalg.solve_triangular(LOWER, x, upper=False), (2, 3, 1)),
    "two diagonals": (lambda x: linalg.solve_triangular(BIDIAGONAL, x, upper=False), (3, 2)),
    "blocks": (lambda x: linalg.solve_triangular(BLOCKS, x, upper=False), (5, 2)),
    "blocks, transposed": (lambda x: linalg.solve_triangular(BLOCKS.T, x, upper=True), (5, 1)),
    "triangular_solve": (lambda x: torch.triangular_solve(x, UPPER).solution, (3, 2)),
    "triangular_solve, lower": (
        lambda x: torch.triangular_solve(x, LOWER, upper=False).solution,
        (3, 2),
    ),
    "triangular_solve, transposed": (
        lambda x: torch.triangular_solve(x, UPPER, transpose=True).solution,
        (3, 2),
    ),
    "inverse of a constant": (lambda x: linalg.inv(SQUARE) @ x, (3, 2)),
    "of one": (lambda x: linalg.solve(SQUARE[:1, :1], x), (1, 1)),
    "of nothing": (lambda x: linalg.solve(SQUARE[:0, :0], x), (0, 2)),
    "trace": (lambda x: x.trace(), (3, 3)),
    "diagonal product": (lambda x: x.diagonal(0, -2, -1).prod(-1), (2, 3, 3)),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve", "ignore:torch.lu_solve")
def test_solves(name):
    f, shape = SOLVES[name]
    exact(f, draw(*shape))


MATRICES = {
    "solve": lambda a: linalg.solve(a, RIGHT),
    "solve a vector": lambda a: linalg.solve(a, RIGHT[:, 0]),
    "a lower triangle": lambda a: linalg.solve_triangular(a, RIGHT, upper=False),
    "an upper triangle": lambda a: linalg.solve_triangular(a, RIGHT, upper=True),
    "unit triangle": lambda a: linalg.solve_triangular(a, RIGHT, upper=True, unitriangular=True),
    "from the right": lambda a: linalg.solve_triangular(a, RIGHT.T, upper=False, left=False),
    "cholesky_solve": lambda a: torch.cholesky_solve(RIGHT, a.tril()),
    "lu": lambda a: linalg.lu_solve(*linalg.lu_factor(a), RIGHT),
    "lu_unpack": lambda a: torch.lu_unpack(a, tensor([1, 2, 3], dtype=torch.int32))[2],
    "lu_unpack, lower": lambda a: torch.lu_unpack(a, tensor([1, 2, 3], dtype=torch.int32))[1],
    "cholesky and solve": lambda a: linalg.solve_triangular(
        linalg.cholesky(a @ a.mT + 9 * EYE), RIGHT, upper=False
    ),
}
# Some entries vanish there in theory, and all are computed.
ROUNDED = {"cholesky and solve", "cholesky_solve"}


@pytest.mark.parametrize("name", MATRICES)
def test_by_the_matrix(name):
    (sound if name in ROUNDED else exact)(MATRICES[name], SQUARE)


def test_by_both():
    both = detect(lambda a, b: linalg.solve(a, b), SQUARE, RIGHT, argnums=(0, 1)).pattern
    assert both.nnz == 6 * (9 + 3)
    exact(lambda a, b: linalg.solve(a, b), SQUARE, RIGHT, argnums=(0, 1))


def test_sign_has_no_derivative():
    assert detect(lambda x: linalg.slogdet(x)[0] * x, SQUARE).pattern.nnz == 9


def test_residuals_of_least_squares():
    tall = draw(5, 2, seed=4)
    exact(lambda x: linalg.lstsq(tall, x).residuals, draw(5, 3))
    assert overs(lambda a: linalg.lstsq(a, RIGHT).solution, draw(3, 2)) == 0
