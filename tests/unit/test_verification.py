"""A plan that is wrong is not used: rules, colours and programs broken on purpose are caught."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from detected import exact, sound
from oracles import dense_per_sample, loop_hessian, loop_jacobian
from pushforward import building, coloring, strategies
from pushforward.planning import due
from pushforward.structure.rules import RULES, Call
from zoo_families.case import module, randn

aten = torch.ops.aten
Rule = Callable[[Call], list[np.ndarray]]


def each_its_own(call: Call) -> list[np.ndarray]:
    """Right for no op that moves or mixes anything."""
    return call.same_everywhere(call.numbers(call.args[0]))


def nothing(call: Call) -> list[np.ndarray]:
    return call.same_everywhere(np.zeros(call.shape, np.int32))


# An op, a rule that is wrong for it, and a map that gets a wrong pattern by that.
BROKEN: dict[str, tuple[Any, Rule, Callable[[Tensor], Tensor]]] = {
    "roll": (aten.roll, each_its_own, lambda x: x.roll(1) * x),
    "flip": (aten.flip, each_its_own, lambda x: x.flip(0) ** 2),
    "sine": (aten.sin, nothing, lambda x: x.sin() + x.roll(1)),
    "cumsum": (aten.cumsum, each_its_own, lambda x: x.cumsum(0)[::3].repeat(3) ** 2),
}


def text(J: pf.Jacobian) -> str:
    """What the plan says, without its line breaks."""
    return " ".join(J.explain().split())


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    op, rule, f = BROKEN[request.param]
    monkeypatch.setitem(RULES, op, rule)
    return f


class TestWrongPatterns:
    def test_fall_back_and_say_so(self, broken: Callable[[Tensor], Tensor]):
        x = randn(9)
        J = pf.jacobian(broken, x)
        torch.testing.assert_close(J.dense(), loop_jacobian(broken, x))
        assert J.plan.strategy in ("reverse", "forward", "loop")
        assert J.plan.pattern is None
        assert J.plan.nnz is None
        assert "gives other numbers than a backward pass at the point" in text(J)

    def test_are_not_remembered_as_patterns(self, broken: Callable[[Tensor], Tensor]):
        x = randn(9)
        for point in (x, 2 * x, -x):
            found = pf.jacobian(broken, point)
            torch.testing.assert_close(found.dense(), loop_jacobian(broken, point))

    def test_of_hessians(self, broken: Callable[[Tensor], Tensor]):
        def f(x: Tensor) -> Tensor:
            return (broken(x) ** 2).sum()

        x = randn(9)
        torch.testing.assert_close(pf.hessian(f, x).dense(), loop_hessian(f, x))

    def test_of_diagonals(self, broken: Callable[[Tensor], Tensor]):
        x = randn(9)
        expected = loop_jacobian(broken, x).diagonal()
        torch.testing.assert_close(pf.jacobian(broken, x).diagonal(), expected)

    def test_are_seen_by_the_harness(self, broken: Callable[[Tensor], Tensor]):
        """What tests the rules fails where a rule is wrong."""
        with pytest.raises(AssertionError, match="missed"):
            sound(broken, randn(9))


def test_patterns_that_are_too_full_are_seen_by_the_harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RULES, aten.flip, lambda call: call.same_everywhere(call.everything()))

    def f(x: Tensor) -> Tensor:
        return x.flip(0) ** 2

    x = randn(9)
    torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x))
    with pytest.raises(AssertionError, match="too much"):
        exact(f, x)


def test_patterns_wrong_per_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RULES, aten.roll, each_its_own)

    def f(x: Tensor) -> Tensor:
        return x.roll(1, 1) * x

    x = randn(4, 7)
    J = pf.jacobian(f, x, batch_dim=0)
    torch.testing.assert_close(J.dense(), dense_per_sample(f, x))
    assert "gives other numbers" in text(J)


def test_an_entry_that_is_zero_at_the_point_alone(monkeypatch: pytest.MonkeyPatch):
    """Nothing is wrong at the point of planning; the second point tells."""
    monkeypatch.setitem(RULES, aten.roll, each_its_own)

    def f(x: Tensor) -> Tensor:
        return x.roll(1) ** 2 + x

    J = pf.jacobian(f, torch.zeros(9, dtype=torch.float64))
    assert "other numbers than a backward pass at a second point" in text(J)
    torch.testing.assert_close(pf.jacobian(f, randn(9)).dense(), loop_jacobian(f, randn(9)))


def test_wrong_colours(monkeypatch: pytest.MonkeyPatch):
    """Two columns that share an entry share a pass."""
    true = coloring.by_columns

    def merged(*args: Any) -> Any:
        found = true(*args)
        colors = np.minimum(found.column_colors, found.jvps - 2)
        source = coloring.scheme.read_columns(args[0], colors)
        return replace(found, column_colors=colors, source=source)

    monkeypatch.setattr(strategies, "by_columns", merged)
    monkeypatch.setattr(strategies, "by_rows", lambda *args: true(args[0]))

    def f(x: Tensor) -> Tensor:
        return x[1:-1] ** 2 + x[2:] * x[:-2]

    x = randn(30)
    J = pf.jacobian(f, x, plan="sparse")
    assert J.plan.strategy in ("reverse", "forward", "loop")
    assert "sparse gives other numbers" in text(J)
    torch.testing.assert_close(J.dense(), loop_jacobian(f, x))


def test_wrong_splits(monkeypatch: pytest.MonkeyPatch):
    true = building.factors

    def wrong(*args: Any) -> Any:
        tall, wide = true(*args)
        return tall, wide * (1 + 1e-3)

    monkeypatch.setattr(building, "factors", wrong)
    widths = (130, 24, 2, 24, 128)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    net = module(lambda: nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]))
    x = randn(130)
    J = pf.jacobian(net, x)
    assert "split gives other numbers" in text(J)
    torch.testing.assert_close(J.dense(), pf.jacobian(net, x, plan="loop").dense())


def test_a_function_that_is_not_the_same_twice():
    """Nothing that Python shows tells that it changed; checks now and then do."""
    calls: Any = iter(range(1000))

    def f(x: Tensor) -> Tensor:
        return x**2 if next(calls) < 40 else x**3

    x = randn(6)
    for _ in range(60):
        found = pf.jacobian(f, x).dense().diagonal()
        assert torch.allclose(found, 2 * x) or torch.allclose(found, 3 * x**2)
    torch.testing.assert_close(pf.jacobian(f, x).dense(), torch.diag(3 * x**2))


def test_checks_become_rarer():
    recipe = pf.plan(torch.sin, randn(3)).recipe
    fresh = replace(recipe, uses=iter(range(1, 100)))
    assert [use for use in range(1, 100) if due(fresh)] == [1, 4, 16, 64]


def test_functions_that_are_not_defined_nearby():
    """The second point is a courtesy: a map that refuses it is planned all the same."""
    x = randn(9).abs()

    def f(z: Tensor) -> Tensor:
        if not torch.equal(z, x):
            raise ValueError("only there")
        return z.roll(1) * z

    J = pf.jacobian(f, x)
    assert J.plan.strategy == "sparse"
    torch.testing.assert_close(J.dense(), loop_jacobian(lambda z: z.roll(1) * z, x))


def test_infinite_derivatives_are_no_mismatch():
    """Entries that are not there stay zeros, where rows of infinities would give 0 * inf."""
    x = torch.tensor([0.0, 1.0, 4.0, -1.0], dtype=torch.float64)
    J = pf.jacobian(torch.sqrt, x)
    assert J.plan.strategy == "sparse"
    expected = torch.tensor([torch.inf, 0.5, 0.25, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(J.diagonal(), expected, equal_nan=True)
    torch.testing.assert_close(J.dense(), torch.diag(expected), equal_nan=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_sparse_tensors_inside(kind: str):
    matrix, x = randn(4, 3).relu(), randn(3)
    outside = getattr(matrix, kind)()
    for f in (
        lambda x: (getattr(matrix, kind)() @ x.view(3, 1)).sin(),
        lambda x: (outside @ x.view(3, 1)).sin(),
    ):
        torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x))
