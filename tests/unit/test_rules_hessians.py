"""Backward passes of moves, products, solves and attention: Hessians against autograd's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import linalg, nn, tensor

from detected import detect, draw
from oracles import loop_hessian

PLACES = tensor([2, 0, 2, 1])
LETS = torch.ones(3, 3, dtype=torch.bool).tril()
S = draw(3, 3, seed=1) + 4 * torch.eye(3, dtype=torch.float64)
BAND = torch.ones(6, 6, dtype=torch.float64).tril(1).triu(-1)
SPARSE = BAND.to_sparse()
attend = F.scaled_dot_product_attention
torch.manual_seed(0)
LSTM = nn.LSTM(2, 2, dtype=torch.float64)
ATTENTION = nn.MultiheadAttention(2, 1, batch_first=True, dtype=torch.float64)

# From six numbers; the Hessian of the sum of third powers shows who meets whom.
MAPS = {
    "index": lambda x: x[PLACES],
    "gather": lambda x: x.gather(0, PLACES),
    "take": lambda x: x.take(PLACES),
    "scatter": lambda x: x.scatter(0, PLACES[:2], x[:2].square()),
    "index_add": lambda x: x.index_add(0, PLACES, x[:4].square()),
    "index_put": lambda x: x.index_put((PLACES,), x[:4].square(), True),
    "put": lambda x: x.put(PLACES, x[:4].square(), accumulate=True),
    "scatter_reduce": lambda x: x.scatter_reduce(0, PLACES, x[:4], "mean"),
    "masked_select": lambda x: x.masked_select(torch.arange(6) > 2),
    "embedding": lambda x: F.embedding(PLACES, x.reshape(3, 2)),
    "unfold": lambda x: x.unfold(0, 3, 2),
    "im2col": lambda x: F.unfold(x.reshape(1, 1, 2, 3), 2, padding=1),
    "col2im": lambda x: F.fold(x.reshape(1, 1, 6), (2, 3), 1),
    "pad, reflected": lambda x: F.pad(x[None], (1, 1), mode="reflect"),
    "pad, replicated": lambda x: F.pad(x[None], (1, 1), mode="replicate"),
    "pad, circular": lambda x: F.pad(x[None], (1, 1), mode="circular"),
    "diag": lambda x: x.diag(),
    "tril": lambda x: x.reshape(2, 3).tril(),
    "roll": lambda x: x.roll(1) * x,
    "block_diag": lambda x: torch.block_diag(x[:2], x[2:]),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:4].reshape(1, 4, 1, 1), 2),
    "sort": lambda x: x.sort().values * torch.arange(6),
    "topk": lambda x: x.topk(3).values,
    "median": lambda x: x.reshape(2, 3).median(1).values,
    "cumsum": lambda x: x.reshape(2, 3).cumsum(1),
    "trapezoid": lambda x: torch.trapezoid(x.reshape(2, 3).square()),
    "a band": lambda x: BAND @ x,
    "a sparse band": lambda x: SPARSE @ x[:, None],
    "a quadratic form": lambda x: (x @ BAND @ x).reshape(1),
    "einsum": lambda x: torch.einsum("i,ij,j->i", x, BAND, x),
    "kron": lambda x: torch.kron(x[:2], x[2:]),
    "solve": lambda x: linalg.solve(S, x.reshape(3, 2)),
    "solve_triangular": lambda x: linalg.solve_triangular(S.tril(), x.reshape(3, 2), upper=False),
    "cholesky_solve": lambda x: torch.cholesky_solve(x.reshape(3, 2), S.tril()),
    "lstsq": lambda x: linalg.lstsq(S, x[:3, None]).solution,
    "convolution": lambda x: F.conv1d(x[None, None], S[:1, None]),
    "strided convolution": lambda x: F.conv2d(
        x.reshape(1, 1, 2, 3), S[None, None, :2, :2], padding=1, stride=2
    ),
    "grouped convolution": lambda x: F.conv1d(x.reshape(1, 2, 3), S[:2, None, :2], groups=2),
    "transposed convolution": lambda x: F.conv_transpose1d(x[None, None], S[:1, None], stride=2),
    "a kernel with a zero": lambda x: F.conv1d(x[None, None], tensor([[[1.0, 0.0, 1.0]]]).double()),
    "softmax": lambda x: x.reshape(2, 3).softmax(1),
    "causal attention": lambda x: attend(*[x.reshape(1, 3, 2)] * 3, is_causal=True),
    "an additive mask": lambda x: (
        x[:3, None] * x[:3] + torch.zeros(3, 3).double().masked_fill(~LETS, -math.inf)
    ).softmax(1),
    "multihead attention": lambda x: ATTENTION(*[x.reshape(1, 3, 2)] * 3, attn_mask=~LETS)[0],
    "lstm": lambda x: LSTM(x.reshape(3, 1, 2))[0],
    "fft": lambda x: torch.fft.fft(x.reshape(2, 3)).abs(),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_hessians(name):
    def energy(x):
        return MAPS[name](x).pow(3).sum()

    x = draw(6, seed=3)
    structure = detect(energy, x, hessian=True)
    points = [x] if structure.guards.at_point else [x, draw(6, seed=4), draw(6, seed=5)]
    met = torch.stack([loop_hessian(energy, point) != 0 for point in points]).any(0)
    assert (structure.pattern.todense() == met.numpy()).all()
    assert structure.dense_ops == ()
