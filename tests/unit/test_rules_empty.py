"""Rules on tensors without elements, with one element and without axes."""

import pytest
import torch
import torch.nn.functional as F
from torch import linalg, nn, tensor

from detected import draw, exact

NONE = torch.zeros(0, dtype=torch.long)
ZERO = tensor([0])
S, EYE = draw(3, 3, seed=1), torch.eye(3, dtype=torch.float64)


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


EMPTY = {
    "index": (lambda x: x[NONE], (3, 2)),
    "take": (lambda x: x.take(NONE), (3,)),
    "gather": (lambda x: x.gather(0, NONE), (3,)),
    "masked_select": (lambda x: x.masked_select(tensor([False] * 3)), (3,)),
    "masked_scatter": (lambda x: x.masked_scatter(tensor([False] * 3), x[:0]), (3,)),
    "scatter": (lambda x: x.scatter(0, NONE, x[:0]), (3,)),
    "index_add": (lambda x: x.index_add(0, NONE, x[:0]), (0, 2)),
    "index_put": (lambda x: x.index_put((NONE,), x[:0]), (3, 2)),
    "put": (lambda x: x.put(NONE, x[:0]), (3,)),
    "embedding": (lambda x: F.embedding(NONE, x, padding_idx=0), (3, 2)),
    "embedding_bag": (lambda x: F.embedding_bag(NONE, x, tensor([0, 0]), mode="sum"), (3, 2)),
    "cat": (lambda x: torch.cat([x, x[:0]]), (2, 2)),
    "roll": (lambda x: x.roll(1), (0,)),
    "tril": (lambda x: x.tril(), (0, 3)),
    "diag": (lambda x: x.diag(), (0,)),
    "pad": (lambda x: F.pad(x, (1, 1)), (0,)),
    "im2col": (lambda x: F.unfold(x, 2), (0, 1, 2, 2)),
    "col2im": (lambda x: F.fold(x, (2, 2), 2), (0, 4, 1)),
    "block_diag": (lambda x: torch.block_diag(x, x[:0]), (2, 2)),
    "sort": (lambda x: x.sort(1).values, (2, 0)),
    "topk": (lambda x: x.topk(0).values, (2, 3)),
    "cumsum": (lambda x: x.cumsum(0), (0, 2)),
    "softmax": (lambda x: x.softmax(1), (2, 0)),
    "bmm": (lambda x: torch.bmm(x, _zeros(0, 3, 2)), (0, 2, 3)),
    "bmm along nothing": (lambda x: torch.bmm(x, _zeros(2, 0, 3)), (2, 2, 0)),
    "mm by a mask": (lambda x: EYE @ x, (3, 0)),
    "mm of no rows": (lambda x: S[:0] @ x, (3, 2)),
    "linear": (lambda x: F.linear(x, EYE), (0, 3)),
    "linear to nothing": (lambda x: F.linear(x, S[:0]), (2, 3)),
    "kron": (lambda x: torch.kron(x, _zeros(0, 2)), (2, 2)),
    "cross": (lambda x: linalg.cross(x, x), (0, 3)),
    "bilinear": (lambda x: F.bilinear(x, x, S[None, :2, :2]), (0, 2)),
    "cdist": (lambda x: torch.cdist(x, S), (0, 3)),
    "cdist to nothing": (lambda x: torch.cdist(x, S[:0]), (2, 3)),
    "solve_triangular": (lambda x: linalg.solve_triangular(S[:0, :0], x, upper=False), (0, 2)),
    "inv": (linalg.inv, (0, 2, 2)),
    "inv of nothing": (linalg.inv, (0, 0)),
    "det of nothing": (linalg.det, (0, 0)),
    "svdvals": (linalg.svdvals, (0, 3)),
    "interpolate": (lambda x: F.interpolate(x, size=(2, 3), mode="bilinear"), (0, 1, 2, 2)),
    "grid_sample": (
        lambda x: F.grid_sample(x, _zeros(0, 2, 2, 2), align_corners=False),
        (0, 1, 2, 2),
    ),
    "grid_sample nowhere": (
        lambda x: F.grid_sample(x, _zeros(1, 0, 2, 2), align_corners=False),
        (1, 1, 2, 2),
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (1, 0, 3, 2)),
    "attention to nothing": (lambda x: F.scaled_dot_product_attention(x, x, x), (1, 1, 0, 2)),
}

SINGLE = {
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        (1, 1, 1, 2),
    ),
    "unfold": (lambda x: x.unfold(0, 1, 1), (1,)),
    "solve": (lambda x: linalg.solve(S[:1, :1], x), (1,)),
    "recurrence": (lambda x: nn.GRU(1, 1, dtype=torch.float64)(x)[0], (1, 1, 1)),
    "cross, broadcast": (lambda x: linalg.cross(x, S[:1]), (1, 3)),
    "bilinear": (lambda x: F.bilinear(x, x, S[None, :1, :1]), (1, 1)),
    "padding alone": (lambda x: F.embedding_bag(tensor([[0, 0]]), x, padding_idx=0), (2, 2)),
}

SCALAR = {
    "cumsum": lambda x: x.cumsum(0),
    "take": lambda x: x.take(ZERO),
    "gather": lambda x: x.gather(0, tensor([0, 0])),
    "scatter": lambda x: x.scatter(0, tensor(0), 2 * x),
    "index_fill": lambda x: x.index_fill(0, ZERO, 2.0),
    "index_copy": lambda x: x.index_copy(0, ZERO, 2 * x),
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat(3),
}

ORDERED = {
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(1).values,
    "median": lambda x: x.median(0).values,
    "mode": lambda x: x.mode(0).values,
    "kthvalue": lambda x: x.kthvalue(1).values,
}


@pytest.mark.parametrize("name", EMPTY)
def test_without_elements(name):
    f, shape = EMPTY[name]
    exact(f, draw(*shape), at_point=name == "topk")


@pytest.mark.parametrize("name", SINGLE)
def test_one_element(name):
    torch.manual_seed(0)
    f, shape = SINGLE[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("name", SCALAR)
def test_without_axes(name):
    exact(SCALAR[name], draw())


@pytest.mark.parametrize("name", ORDERED)
def test_orders_without_axes(name):
    exact(ORDERED[name], draw(), at_point=True)
