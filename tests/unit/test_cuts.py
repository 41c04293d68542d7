"""Cuts of graphs: which tensors separate a map, and the cheapest order of products."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pushforward as pf
from detected import draw
from oracles import loop_jacobian
from pushforward.boundary import Arguments
from pushforward.structure.cuts import Chain, cuts
from pushforward.structure.detection import Detector
from pushforward.structure.graph import Graph
from pushforward.tape import record
from zoo_families.case import module


def graph_of(f, x: Tensor) -> Graph:
    detector = Detector(fine=True)
    tape = record(f, Arguments.of((x,), 0, None), None, watch=detector)
    return detector.structure(tape.outputs, tape.domain, tape.codomain).graph


def widths(f, x: Tensor) -> list[int]:
    return [cut.width for cut in cuts(graph_of(f, x))]


def waist(width: int, n: int = 12) -> nn.Module:
    return module(
        lambda: nn.Sequential(nn.Linear(n, width), nn.Tanh(), nn.Linear(width, n), nn.Sigmoid())
    )


class TestFound:
    def test_a_waist(self):
        assert min(widths(waist(3), draw(12))) == 3

    def test_a_tensor_that_is_used_twice_is_one_cut(self):
        def f(x: Tensor) -> Tensor:
            narrow = x.reshape(3, 4).sum(1)
            return torch.outer(narrow.sin(), narrow.cos()).reshape(-1)

        assert min(widths(f, draw(12))) == 3

    def test_a_frontier_of_several_tensors(self):
        """Two narrow tensors, neither of which is made of the other."""

        def f(x: Tensor) -> Tensor:
            low, high = x[:8].reshape(2, 4).sum(1), x[8:].reshape(2, 4).prod(1)
            return torch.cat([torch.outer(low, low).reshape(-1).sin(), high.repeat(8).cos()])

        found = [cut for cut in cuts(graph_of(f, draw(16))) if cut.width == 4]
        assert found
        assert any(len(cut.tensors.made) == 2 for cut in found)

    def test_one_made_of_the_other_is_no_cut(self):
        """Rows of the one would have to go through the other a second time."""

        def f(x: Tensor) -> Tensor:
            narrow = x.reshape(2, 6).sum(1)
            more = narrow.sin()
            return torch.cat([narrow, more]).repeat(6) * narrow.repeat(12)

        for cut in cuts(graph_of(f, draw(12))):
            assert len(cut.tensors.made) == 1

    def test_a_shortcut_around_the_waist_is_no_cut(self):
        net = waist(3)
        assert min(widths(lambda x: x + net(x), draw(12)), default=12) >= 12

    def test_what_is_written_in_place_is_no_cut(self):
        def f(x: Tensor) -> Tensor:
            narrow = x.reshape(3, 4).sum(1)
            narrow[0] = narrow[1].sin()
            return narrow.repeat(4).cos()

        made = {place for cut in cuts(graph_of(f, draw(12))) for place in cut.tensors.made}
        written = {s.number for s in graph_of(f, draw(12)).steps if s.mutates}
        assert not {number for number, _ in made} & written

    def test_none_without_steps(self):
        assert cuts(Graph()) == []
        assert widths(lambda x: torch.ones(2, dtype=x.dtype), draw(3)) == []

    def test_names_say_what_is_around(self):
        narrowest = min(cuts(graph_of(waist(3), draw(12))), key=lambda cut: cut.width)
        assert any(op in narrowest.name for op in ("mv", "addmm", "mm", "squeeze", "tanh", "add"))
        assert " -> " in narrowest.name


def by_trying(widths: tuple[int, ...], work: tuple[float, ...]) -> float:
    """The least work over every choice of cuts, of orders of products and of rows or columns."""
    ends = list(itertools.accumulate(work, initial=0.0))

    def least(bounds: tuple[int, ...]) -> float:
        if len(bounds) == 2:
            start, stop = bounds
            one = ends[stop] - ends[start]
            return min(widths[stop] * one, (widths[start] + 1) * one)
        return min(
            least(bounds[: k + 1])
            + least(bounds[k:])
            + 2.0 * widths[bounds[0]] * widths[bounds[k]] * widths[bounds[-1]]
            for k in range(1, len(bounds) - 1)
        )

    last = len(widths) - 1
    inner = range(1, last)
    chosen = [c for size in range(len(inner) + 1) for c in itertools.combinations(inner, size)]
    return min(least((0, *c, last)) for c in chosen)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_no_order_is_cheaper_than_the_one_chosen(sizes: list[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    work = tuple((torch.rand(len(sizes) - 1, generator=generator) * 5000).tolist())
    best = Chain(tuple(sizes), work).best(0, len(sizes) - 1)
    assert best.work == pytest.approx(by_trying(tuple(sizes), work))
    bounds = [(leaf.stop, leaf.start) for leaf in best.leaves]
    assert bounds[0][0] == len(sizes) - 1
    assert bounds[-1][1] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))  # they join


def frontier(x: Tensor) -> Tensor:
    low, high = x[:100].reshape(4, 25).sum(1), x[100:].reshape(4, 15).prod(1)
    parts = torch.outer(low, draw(24, seed=1)), torch.outer(high, draw(16, seed=2))
    return torch.cat([parts[0].reshape(-1).sin(), parts[1].reshape(-1).cos()])


SPLIT = {
    "waist": (waist(4, 160), None),
    "two waists": (nn.Sequential(waist(4, 160), waist(5, 160)), None),
    "samples": (waist(4, 96), 0),
    "frontier": (frontier, None),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_gives_the_same_numbers(name: str):
    """Values at two points, and gradients in the point, through factors."""
    f, batch_dim = SPLIT[name]
    points = [draw(160, seed=k) if batch_dim is None else draw(3, 96, seed=k) for k in range(2)]
    J = pf.jacobian(f, points[0], batch_dim=batch_dim, plan="split")
    assert J.plan.strategy == "split"
    assert J.plan.passes < 40
    for x in points:
        found, last = J.plan(x).matrix(), x if batch_dim is None else x[-1]
        whole = loop_jacobian(f, last)
        torch.testing.assert_close(
            found.reshape(-1, *whole.shape)[-1], whole, rtol=1e-10, atol=1e-12
        )

    def gradient(plan: pf.Plan | str) -> Tensor:
        x = points[1].clone().requires_grad_()
        matrix = pf.jacobian(f, x, batch_dim=batch_dim, plan=plan).matrix()
        return torch.autograd.grad(matrix.square().sum(), x)[0]

    torch.testing.assert_close(gradient(J.plan), gradient("loop"), rtol=1e-8, atol=1e-10)
