"""Cuts of the autograd graph against the definition, and random networks against their laws."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pushforward.derivatives import jacobian
from pushforward.path import path_bound
from pushforward.path.cuts import between, cuts
from pushforward.path.record import Crossing


def reaches(node, source, without) -> bool:
    if node is without:
        return False
    return node is source or any(
        reaches(parent, source, without) for parent, _ in node.next_functions if parent is not None
    )


def graph_of(x: Tensor, output: Tensor):
    return output.grad_fn, Crossing.of(x).node


def diamond(x: Tensor) -> Tensor:
    h = x.sin()
    return (h.exp() + h.cos()).tanh()


def braid(x: Tensor) -> Tensor:
    a, b = x.split(2)
    a, b = a + b.sin(), b
    a, b = a, b * a.cos()
    return torch.cat([a, b]).sum()


def nested(x: Tensor) -> Tensor:
    for _ in range(2):
        h = x.sin()
        x = (h + (h.exp() * h)).cos() + x
    return x.exp()


@pytest.mark.parametrize("f", [diamond, braid, nested, torch.sin, torch.clone])
def test_cuts_are_the_nodes_without_which_nothing_connects(f):
    x = torch.randn(4, requires_grad=True)
    output, source = graph_of(x, f(x * torch.ones(4, requires_grad=True)))
    nodes = between(output, source)
    expected = {node for node in nodes if not reaches(output, source, node)}
    assert cuts(output, source) == expected
    assert {output, source} <= expected


def test_nodes_stand_before_their_parents():
    x = torch.randn(4, requires_grad=True)
    output, source = graph_of(x, nested(x))
    order = {node: place for place, node in enumerate(between(output, source))}
    for node, place in order.items():
        assert all(order[p] > place for p, _ in node.next_functions if p in order)


def test_nothing_in_between():
    x, other = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    output, source = graph_of(x, other.sin())
    assert between(output, source) == []
    assert cuts(output, source) == set()
    assert cuts(None, source) == set()


def test_depth_needs_no_recursion():
    x = torch.randn(1, requires_grad=True)
    y = x
    for _ in range(5000):
        y = y + 1
    assert len(cuts(*graph_of(x, y))) == 5001


# Random networks


class Block(nn.Module):
    """A block whose kind decides how its parts meet."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True) if kind == "in place" else nn.Softplus()
        if kind == "recurrent":
            self.rnn = nn.GRU(width, width, batch_first=True)
        if kind == "attention":
            self.rnn = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "residual":
                return x + self.b(self.act(self.a(x)))
            case "gated":
                return self.a(x) * torch.sigmoid(self.b(x))
            case "concatenated":
                return torch.cat([self.a(x), self.b(x)], -1).unflatten(-1, (2, -1)).sum(-2)
            case "recurrent":
                return self.rnn(x[:, None])[0][:, 0]
            case "attention":
                return self.rnn(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
            case "functional":
                return torch.tanh(self.b(torch.cos(x) * 2))
        return self.b(self.act(self.a(x)))


KINDS = [
    *("residual", "gated", "concatenated", "recurrent", "attention", "functional", "in place"),
    "tied",
]


class Random(nn.Module):
    def __init__(self, kinds: list[str], skip: bool) -> None:
        super().__init__()
        blocks = [Block(kind, 4) for kind in kinds]
        blocks = [
            blocks[place - 1] if kind == "tied" and place else block
            for place, (kind, block) in enumerate(zip(kinds, blocks, strict=True))
        ]
        self.body = nn.Sequential(*blocks)
        self.head, self.skip = nn.Linear(4, 3), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return y + x[..., :3] if self.skip else y


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    skip=st.booleans(),
    batch_dim=st.sampled_from([0, None]),
    seed=st.integers(0, 100),
)
def test_random_networks_keep_the_laws(kinds, skip, batch_dim, seed):
    torch.manual_seed(seed)
    model = Random(kinds, skip).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    path = path_bound(model, x, batch_dim=batch_dim)
    truth = jacobian(model, x, batch_dim=batch_dim).fro_norm().log().detach()
    torch.testing.assert_close(path.log_norm, truth, atol=1e-9, rtol=0)
    total = torch.stack([row.log_gain for row in path.layers]).sum(0)
    torch.testing.assert_close(total, path.log_norm, atol=1e-10, rtol=0)
    assert path.certified["frobenius"]
    assert (path.rungs["frobenius"] >= path.log_norm).all()
    names = [row.name for row in path.layers]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("pair", list(itertools.product(["residual", "in place"], KINDS)))
def test_a_block_is_the_same_step_wherever_it_stands(pair):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(kind, 4) for kind in pair]).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    blocks = path_bound(model, x, layers=["0"])
    first = path_bound(model[0], x, layers="*")
    alone = path_bound(nn.Sequential(model[0]), x, layers=["0"])
    torch.testing.assert_close(blocks.layers[0].log_fro, alone.layers[0].log_fro)
    torch.testing.assert_close(first.log_norm, alone.log_norm)
