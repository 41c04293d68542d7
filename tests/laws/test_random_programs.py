"""Small programs of random operations and shapes, against the row loop."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lawbook import EXACT, REFUSED, normal
from torch import Tensor
from torch.nn import functional

import pushforward as pf
from oracles import dense_per_sample, loop_hessian, loop_jacobian, reverse_over_reverse
from programs import ENDINGS, OPS, Program

Step = Callable[[Tensor], Tensor]


def _in_place(x: Tensor) -> Tensor:
    y = x * 1.5
    y[..., :1] *= 2
    return y.add_(0.3)


def _branch(x: Tensor) -> Tensor:
    return x.sin() if float(x.detach().abs().sum()) % 2 < 1 else x * 0.7


STEPS: dict[str, Step] = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "square": lambda x: x * x / (1 + x * x),
    "relu": torch.relu,
    "scale": lambda x: 1.3 * x - 0.2,
    "softmax": lambda x: torch.softmax(x, -1),
    "norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "cumsum": lambda x: x.cumsum(-1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1) + x,
    "residual": lambda x: x + torch.tanh(x),
    "centre": lambda x: x - x.mean(-1, keepdim=True),
    "gate": lambda x: x * torch.sigmoid(x.sum(-1, keepdim=True)),
    "repeat": lambda x: torch.cat([x, x.cos()], -1),
    "first": lambda x: x[..., : max(1, x.shape[-1] // 2)],
    "pairs": lambda x: (x[..., :, None] * x[..., None, :]).flatten(-2)[..., : 2 * x.shape[-1]],
    "detach": lambda x: x * x.detach().sigmoid(),
    "in_place": _in_place,
    "to_one": lambda x: torch.logsumexp(x, -1, keepdim=True),
}
ONE_MAP_ONLY: dict[str, Step] = {"branch": _branch, "total": lambda x: x * x.sum().tanh()}


def compose(names: list[str]) -> Step:
    """The program that takes the named steps one after the other."""
    table = STEPS | ONE_MAP_ONLY

    def program(x: Tensor) -> Tensor:
        for name in names:
            x = table[name](x)
        return x

    return program


per_sample = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5)
whole = st.lists(st.sampled_from(sorted(STEPS | ONE_MAP_ONLY)), min_size=1, max_size=5)
sides = st.integers(1, 4)
seeds = st.integers(0, 3)


@given(names=whole, rows=sides, columns=sides, seed=seeds)
@settings(max_examples=120)
def test_dense(names: list[str], rows: int, columns: int, seed: int):
    f, x = compose(names), normal(rows, columns, seed=seed)
    torch.testing.assert_close(pf.jacobian(f, x).dense(), loop_jacobian(f, x), **EXACT)


@given(
    names=whole, rows=sides, columns=sides, seed=seeds, plan=st.sampled_from(["forward", "loop"])
)
@settings(max_examples=60)
def test_other_plans(names: list[str], rows: int, columns: int, seed: int, plan: str):
    f, x = compose(names), normal(rows, columns, seed=seed)
    torch.testing.assert_close(pf.jacobian(f, x, plan=plan).dense(), loop_jacobian(f, x), **EXACT)


@given(names=per_sample, batch=st.integers(1, 5), columns=sides, seed=seeds)
@settings(max_examples=80)
def test_per_sample(names: list[str], batch: int, columns: int, seed: int):
    f, x = compose(names), normal(batch, columns, seed=seed)
    expected = dense_per_sample(f, x)
    torch.testing.assert_close(pf.jacobian(f, x, batch_dim=0).dense(), expected, **EXACT)


@given(names=whole, rows=sides, columns=sides, seed=seeds)
@settings(max_examples=60)
def test_products(names: list[str], rows: int, columns: int, seed: int):
    f, x = compose(names), normal(rows, columns, seed=seed)
    J = pf.jacobian(f, x)
    m, n = J.shape
    v, u, matrix = normal(n, 3, seed=7), normal(m, 3, seed=8), loop_jacobian(f, x).reshape(m, n)
    torch.testing.assert_close(J.push(v), matrix @ v, **EXACT)
    torch.testing.assert_close(J.pull(u), matrix.mT @ u, **EXACT)


@given(names=whole, rows=sides, columns=sides, seed=seeds)
@settings(max_examples=60)
def test_gradients(names: list[str], rows: int, columns: int, seed: int):
    f, x = compose(names), normal(rows, columns, seed=seed)
    (expected,) = reverse_over_reverse(lambda J: J.square().sum(), f, x)
    leaf = x.clone().requires_grad_()
    loss = pf.jacobian(f, leaf).fro_norm().square()
    actual = torch.zeros_like(x)
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        actual = actual if found is None else found
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@given(
    pair=st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), batch=st.integers(6, 9)
)
@settings(max_examples=60)
def test_a_single_coupled_pair_is_found(pair: list[int], batch: int):
    """One sample that looks at one other is enough to refuse, whichever two they are."""
    looks, at = pair

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return y.index_add(0, torch.tensor([looks]), x[at : at + 1])

    try:
        pf.jacobian(f, normal(batch, 3), batch_dim=0)
    except pf.errors.CouplingError:
        return
    raise AssertionError(f"sample {looks} of {batch} looks at sample {at}, and nobody noticed")


def test_infinite_derivatives_are_not_taken_for_coupling():
    x = torch.tensor([[0.0], [1.0], [4.0]])
    J = pf.jacobian(torch.sqrt, x, batch_dim=0).matrix()
    assert J.flatten().tolist() == [float("inf"), 0.5, 0.25]


steps = st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 3), st.integers(0, 3))
programs = st.builds(
    Program, st.lists(steps, min_size=1, max_size=6), st.sampled_from(sorted(ENDINGS))
)
SCHEMES = ("sparse", "batch", "constant", "reverse", "loop")


def points(rows: int, columns: int, seed: int) -> list[Tensor]:
    """One point, and others at which signs, orders and branches are different ones."""
    x = normal(rows, columns, seed=seed)
    return [x, -x, normal(rows, columns, seed=seed + 10), 0.5 * x]


@given(program=programs, rows=sides, columns=sides, seed=seeds)
@settings(max_examples=40)
def test_straight_line_programs(program: Program, rows: int, columns: int, seed: int):
    """Values, patterns and verification, with plans used again where signs and orders change."""
    first, *others = points(rows, columns, seed)
    plan = pf.plan(program, first)
    for x in (first, *others, first):
        expected = loop_jacobian(program, x)
        for J in (pf.jacobian(program, x), plan(x)):
            torch.testing.assert_close(J.dense(), expected, rtol=1e-9, atol=1e-9)
            assert not any("other numbers" in note for note in J.plan.recipe.notes)
            assert J.plan.recipe.structure.note == ""
            missed = (expected.reshape(J.shape) != 0).numpy() & ~J.plan.pattern.todense()
            assert not missed.any()


@given(program=programs, rows=sides, columns=sides, plan=st.sampled_from(SCHEMES))
@settings(max_examples=60)
def test_straight_line_programs_by_name(program: Program, rows: int, columns: int, plan: str):
    x, y, *_ = points(rows, columns, 2)
    for point in (x, y):
        try:
            J = pf.jacobian(program, point, plan=plan)
        except pf.errors.PlanError as refusal:
            assert REFUSED.search(str(refusal))  # noqa: PT017
            continue
        expected = loop_jacobian(program, point)
        torch.testing.assert_close(J.dense(), expected, rtol=1e-9, atol=1e-9)


@given(program=programs, rows=sides, columns=sides, again=st.booleans())
@settings(max_examples=30)
def test_straight_line_programs_train(program: Program, rows: int, columns: int, again: bool):
    x = normal(rows, columns)
    (expected,) = reverse_over_reverse(_loss, program, x)
    for _ in range(1 + again):
        leaf = x.clone().requires_grad_()
        loss = _loss(pf.jacobian(program, leaf).dense())
        found = torch.zeros_like(x)
        if loss.requires_grad:
            (found,) = torch.autograd.grad(loss, leaf, materialize_grads=True)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def _loss(matrix: Tensor) -> Tensor:
    return (matrix * normal(*matrix.shape, seed=5)).sum() + matrix.square().sum()


@given(program=programs.map(lambda p: Program(p.steps, "total")), rows=sides, columns=sides)
@settings(max_examples=30)
def test_straight_line_programs_curve(program: Program, rows: int, columns: int):
    f = lambda x: program(x)[0]  # noqa: E731
    for x in points(rows, columns, 1)[:2]:
        H = pf.hessian(f, x)
        torch.testing.assert_close(H.dense(), loop_hessian(f, x), rtol=1e-8, atol=1e-8)
        assert not any("other numbers" in note for note in H.plan.recipe.notes)
