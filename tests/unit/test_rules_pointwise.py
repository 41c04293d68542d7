"""Elementwise ops: an output depends on the inputs at its place, if a derivative passes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from detected import detect, draw, exact
from oracles import loop_hessian, loop_matrix
from pushforward.structure.follow import rule_of
from pushforward.structure.rules.pointwise import FLAT, pointwise

aten = torch.ops.aten
MASK = tensor([[True, False, True], [False, True, True]])
HOLES = tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]], dtype=torch.float64)


def marked() -> list[str]:
    """Overloads on one or two tensors, and nothing else that is needed, marked as elementwise."""
    names = []
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        overload = schema.overload_name or "default"
        func = getattr(getattr(aten, name, None), overload, None) if space == "aten" else None
        marked = func is not None and torch.Tag.pointwise in func.tags
        if marked and not schema.is_mutable and _plain(func):
            names.append(f"{name}.{overload}")
    return sorted(names)


def _plain(func) -> bool:
    needed = [a for a in func._schema.arguments if not a.has_default_value()]
    return 1 <= len(needed) <= 2 and all(str(a.type) == "Tensor" for a in needed)


def _jacobian(func, count: int) -> np.ndarray | None:
    """(3, 3 * count) at numbers between 0 and 1; None where there is no derivative."""
    inputs = [torch.rand(3, dtype=torch.float64, generator=_generator(i)) for i in range(count)]
    try:
        value = func(*[x.clone().requires_grad_() for x in inputs])
        first = value[0] if isinstance(value, tuple) else value
        if not isinstance(first, Tensor) or not first.requires_grad:
            return None
        return loop_matrix(lambda *xs: _first(func(*xs)), *inputs, argnums=range(count)).numpy()
    except (RuntimeError, NotImplementedError):  # integers alone, or no formula
        return None


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_torch_marks_as_elementwise_is_so_for_autograd():
    compared = 0
    for name in marked():
        packet, overload = name.split(".")
        func = getattr(getattr(aten, packet), overload)
        count = sum(not a.has_default_value() for a in func._schema.arguments)
        matrix = _jacobian(func, count)
        if matrix is not None:
            blocks = matrix.reshape(3, count, 3).transpose(1, 0, 2)
            # Outside of its domain an op gives NaN, times zero off the diagonal.
            assert not np.nan_to_num(blocks[:, ~np.eye(3, dtype=bool)]).any(), name
            compared += 1
    assert compared >= 90


def test_flat_ops_have_no_derivative_anywhere():
    for packet in FLAT:
        func = packet.default
        matrix = _jacobian(func, sum(not a.has_default_value() for a in func._schema.arguments))
        assert matrix is None or not matrix.any(), packet


def test_in_place_forms_have_the_rule_of_their_plain_form():
    assert rule_of(aten.abs_.default) is pointwise
    assert rule_of(aten.mish_.default) is pointwise
    assert rule_of(aten.tanh_.default) is rule_of(aten.tanh.default)
    assert rule_of(aten.max.other) is pointwise
    assert rule_of(aten.max.dim) is not pointwise


EXACT = {
    "floor": torch.floor,
    "round in place": lambda x: x.clone().round_(),
    "sign": lambda x: x * x.sign(),
    "angle": torch.angle,
    "copysign": lambda x: torch.copysign(x, x.roll(1, 1)),
    "nextafter": lambda x: torch.nextafter(x, x.roll(1, 1)),
    "frexp": lambda x: torch.frexp(x).mantissa,
    "power of zero": lambda x: x.pow(0) + x[:, :1],
    "powers": lambda x: (x.exp() + 1).pow(tensor([0.0, 1.0, 2.0])),
    "product with zeros": lambda x: x * HOLES + x[:, :1],
    "zeros over": lambda x: HOLES / x.exp(),
    "addcdiv of zeros": lambda x: torch.addcdiv(x[:1, :1], HOLES, x.exp()),
    "rounded quotient": lambda x: torch.div(x, 2 + x.exp(), rounding_mode="floor") + x[:, :1],
    "where": lambda x: torch.where(MASK, x, x.flip(1)),
    "masked_fill": lambda x: x.masked_fill(MASK, 2.0),
    "hardtanh": lambda x: F.hardtanh(x, -9.0, 9.0),
    "hardtanh between nothing": lambda x: F.hardtanh(x, 0.0, 0.0),
    "glu": F.glu,
    "logsigmoid": F.logsigmoid,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "softplus": F.softplus,
    "lerp": lambda x: x.lerp(x.roll(1, 1), x[:, :1].exp()),
    "dropout, off": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of everything": lambda x: F.dropout(x, 1.0, training=True),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x.flip(1))).sum(-1),
}
SHAPES = {"glu": (2, 4)}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str):
    exact(EXACT[name], draw(*SHAPES.get(name, (2, 3)), seed=2))


# What vanishes on one side of a kink, and what depends on the same without one.
TWO_SIDED = {
    "relu": (F.relu, torch.exp),
    "abs": (torch.abs, torch.exp),
    "where": (lambda x: torch.where(x > 0, x, x.roll(1, 1)), lambda x: x + x.roll(1, 1)),
    "clamp": (lambda x: x.clamp(min=x.roll(1, 1)), lambda x: x + x.roll(1, 1)),
    "maximum": (lambda x: x.maximum(x.roll(1, 1)), lambda x: x + x.roll(1, 1)),
    "prelu": (lambda x: F.prelu(x, x[0, :1]), lambda x: x + x[0, :1]),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 0.0), torch.exp),
    "hardsigmoid": (F.hardsigmoid, torch.exp),
}


@pytest.mark.parametrize("name", TWO_SIDED)
def test_kinks_keep_both_sides(name: str):
    kinked, smooth = (detect(f, draw(2, 3, seed=2)) for f in TWO_SIDED[name])
    assert kinked.pattern.same_as(smooth.pattern)
    assert not kinked.guards.at_point


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["tanh", "softplus", "logsigmoid", "hardswish", "elu"])
def test_sizes(name: str, shape: tuple[int, ...]):
    exact(getattr(F, name), draw(*shape))


SMOOTH = (
    *("tanh", "sigmoid", "gelu", "silu", "mish", "softplus", "elu", "selu", "celu"),
    *("logsigmoid", "softsign", "tanhshrink"),
)
KINKED = ("relu", "leaky_relu", "hardtanh", "hardshrink", "softshrink", "relu6")


def second(f, x: Tensor) -> tuple[np.ndarray, bool]:
    """The pattern of a Hessian, and whether all of its ops have rules."""
    structure = detect(f, x, hessian=True)
    return structure.pattern.todense(), not structure.dense_ops


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_of_smooth_functions_are_diagonal(name: str):
    pattern, ruled = second(lambda x: getattr(F, name)(x).sum(), draw(3))
    assert ruled
    assert (pattern == np.eye(3, dtype=bool)).all()


@pytest.mark.parametrize("name", KINKED)
def test_second_derivatives_of_kinked_functions_are_none(name: str):
    pattern, ruled = second(lambda x: (getattr(F, name)(x) * HOLES[0]).sum(), draw(3))
    assert ruled
    assert not pattern.any()


@pytest.mark.parametrize("name", KINKED)
def test_products_through_kinks_keep_both_sides(name: str):
    def energy(x: Tensor) -> Tensor:
        return (getattr(F, name)(x) * x.roll(1)).sum()

    pattern, _ = second(energy, draw(4))
    for seed in range(4):
        assert not ((loop_hessian(energy, 3 * draw(4, seed=seed)) != 0).numpy() & ~pattern).any()
    ring = np.roll(np.eye(4, dtype=bool), 1, 1)
    assert (pattern == (ring | ring.T)).all()


def test_dropout_keeps_every_element_whatever_is_drawn():
    pattern = detect(lambda x: F.dropout(x, 0.9, training=True), draw(20)).pattern
    assert (pattern.todense() == np.eye(20, dtype=bool)).all()
