"""Ops that work element by element: an output depends on the inputs at the same place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import (
    Call,
    Numbers,
    rule,
    without_derivative,
)

aten = torch.ops.aten

# Their derivative is zero wherever it exists, in all arguments.
FLAT = frozenset(
    {
        *(aten.floor, aten.ceil, aten.round, aten.trunc, aten.sign, aten.heaviside, aten.signbit),
        *(aten.floor_divide, aten.isnan, aten.isinf, aten.isfinite, aten.isneginf, aten.isposinf),
    }
)
# The same for real numbers alone: the phase of a complex number has a derivative.
FLAT_FOR_REALS = frozenset({aten.sgn, aten.angle})
# Elementwise, though torch does not say so.
_UNMARKED = (
    *(aten.rsub, aten.hardswish, aten.hardswish_backward, aten.elu_backward, aten.mish_backward),
    *(aten.softplus_backward, aten.complex, aten.polar, aten._conj_physical, aten.gelu_backward),
    *(aten.special_ndtr, aten.isclose, aten.special_i0, aten.special_i1, aten.special_erf),
)


@rule(*_UNMARKED)
def pointwise(call: Call) -> list[Numbers]:
    """Any op that torch marks as pointwise: everything at the same place, one set."""
    numbers = call.unite(*call.tensors) if call.tensors else np.zeros((), np.int32)
    return call.same_everywhere(without_derivative(numbers) if _is_flat(call) else numbers)


def _is_flat(call: Call) -> bool:
    plain = getattr(aten, call.op, None)
    if plain in FLAT_FOR_REALS:
        return not any(t.is_complex() for t in call.tensors)
    return plain in FLAT


@rule(aten.nextafter, aten.copysign)
def first_alone(call: Call) -> list[Numbers]:
    """Of two arguments only the first passes a derivative."""
    other = without_derivative(call.numbers(call.args[1]))
    return [call.unite(call.args[0], other)]


@rule(aten.pow)
def power(call: Call) -> list[Numbers]:
    """What is raised to a constant zero is one."""
    numbers = call.unite(*call.tensors)
    zero = call.equals(call.args[1], 0)
    return [numbers if zero is None else np.where(_like(zero, numbers), 0, numbers)]


def _like(where: np.ndarray, numbers: Numbers) -> np.ndarray:
    return np.broadcast_to(where, np.broadcast_shapes(where.shape, numbers.shape))


def product(call: Call, a: Any, b: Any) -> Numbers:
    """The sets of a b: none where either is constantly zero."""
    numbers = call.unite(a, b)
    for zero in (call.equals(a, 0), call.equals(b, 0)):
        if zero is not None:
            numbers = np.where(np.broadcast_to(zero, numbers.shape), 0, numbers)
    return numbers


@rule(aten.mul, aten.bitwise_and, aten.logical_and)
def mul(call: Call) -> list[Numbers]:
    return [product(call, call.args[0], call.args[1])]


def quotient(call: Call, a: Any, b: Any) -> Numbers:
    """The sets of a / b: none where a is constantly zero."""
    numbers, zero = call.unite(a, b), call.equals(a, 0)
    return numbers if zero is None else np.where(_like(zero, numbers), 0, numbers)


@rule(aten.div, aten.true_divide)
def div(call: Call) -> list[Numbers]:
    numbers = quotient(call, call.args[0], call.args[1])
    if call.kwargs.get("rounding_mode") is not None:
        numbers = without_derivative(numbers)
    return [numbers]


@rule(aten.add)
def add(call: Call) -> list[Numbers]:
    """A sum with minus infinity stays so, and its derivative is one: masks of attention."""
    one, other = call.args[:2]
    sunk = [call.sunk(one), call.sunk(other) if call.kwargs.get("alpha", 1) == 1 else None]
    for mask in sunk:
        if mask is not None:
            before = np.zeros((), bool) if call.sinks is None else call.sinks
            call.sinks = np.broadcast_to(mask | before, call.shape)
    return [call.unite(one, other)]


@rule(aten.addcmul)
def addcmul(call: Call) -> list[Numbers]:
    return [call.unite(call.args[0], product(call, call.args[1], call.args[2]))]


@rule(aten.where)
def where(call: Call) -> list[Numbers]:
    condition, one, other = call.args
    return [chosen(call, condition, call.numbers(one), call.numbers(other))]


@rule(aten.masked_fill)
def masked_fill(call: Call) -> list[Numbers]:
    numbers, mask, value = call.args
    return [chosen(call, mask, call.numbers(value), call.numbers(numbers))]


def chosen(call: Call, condition: Tensor, one: Numbers, other: Numbers) -> Numbers:
    """One or the other by a mask; both where the mask varies."""
    if not call.is_constant(condition):
        return call.unite(one, other, without_derivative(call.numbers(condition)))
    mask = call.constant(condition)
    one, other, mask = np.broadcast_arrays(one, other, mask)
    return np.where(mask, one, other)


@rule(aten.addcdiv)
def addcdiv(call: Call) -> list[Numbers]:
    return [call.unite(call.args[0], quotient(call, call.args[1], call.args[2]))]


@rule(aten.bernoulli, aten.normal)
def drawn(call: Call) -> list[Numbers]:
    return [np.ones((), np.int32)]


@rule(aten.native_dropout)
def native_dropout(call: Call) -> list[Numbers]:
    """With a probability of one nothing is left."""
    mask = np.ones((), np.int32)
    if call.args[1] == 1 and call.args[2] is not False:
        return [np.zeros((), np.int32), mask]
    return [call.unite(call.args[0], mask), mask]


@rule(aten.native_dropout_backward)
def native_dropout_backward(call: Call) -> list[Numbers]:
    gradient, mask, scale = call.args
    return [np.zeros((), np.int32) if scale == 0 else product(call, gradient, mask)]


@rule(aten.log_sigmoid_forward)
def log_sigmoid(call: Call) -> list[Numbers]:
    """The second output is scratch, of a size that depends on the device."""
    numbers = call.numbers(call.args[0])
    scratch = numbers if call.outputs[1].shape == call.outputs[0].shape else call.everything()
    return [numbers, scratch]


@rule(aten.log_sigmoid_backward)
def log_sigmoid_backward(call: Call) -> list[Numbers]:
    return [call.unite(*call.args[:2])]


# The first argument is a gradient; the derivative of the rest is zero wherever it exists.
@rule(aten.threshold_backward, aten.hardtanh_backward, aten.hardsigmoid_backward)
@rule(aten.leaky_relu_backward, aten.hardshrink_backward, aten.softshrink_backward)
@rule(aten.rrelu_with_noise_backward, aten.rrelu_with_noise)
def gate(call: Call) -> list[Numbers]:
    own = without_derivative(call.unite(*call.tensors[1:]))
    return [call.unite(call.args[0], own)]


@rule(aten.hardtanh)
def hardtanh(call: Call) -> list[Numbers]:
    """A clamp; between bounds that leave nothing in between, a constant."""
    least, most = call.arg(1, "min_val", -1), call.arg(2, "max_val", 1)
    numbers = call.numbers(call.args[0])
    return [numbers if least < most else without_derivative(numbers)]


@rule(aten._prelu_kernel)
def prelu(call: Call) -> list[Numbers]:
    return [call.unite(*call.args[:2])]


@rule(aten._prelu_kernel_backward)
def prelu_backward(call: Call) -> list[Numbers]:
    """The gradients for x, from the weight and the sign of x, and for the weight."""
    gradient, own, weight = call.args
    sign = without_derivative(call.numbers(own))
    return [call.unite(gradient, weight, sign), call.unite(gradient, own)]


@rule(aten.glu)
def glu(call: Call) -> list[Numbers]:
    """Each element of one half with the one at the same place of the other half."""
    return [call.unite(*_halves(call.numbers(call.args[0]), call.arg(1, "dim", -1)))]


@rule(aten.glu_backward)
def glu_backward(call: Call) -> list[Numbers]:
    """For a sigmoid(b): of a from the gradient and b, of b from all three."""
    gradient, own, axis = call.args
    one, other = _halves(call.numbers(own), axis)
    first = call.unite(gradient, other)
    return [np.concatenate([first, call.unite(first, one)], axis)]


def _halves(numbers: Numbers, axis: int) -> list[Numbers]:
    return np.split(numbers, 2, axis)
