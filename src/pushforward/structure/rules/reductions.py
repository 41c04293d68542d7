"""Reductions and scans: an output depends on a whole axis, or on the part of it before a place."""

from __future__ import annotations

import numpy as np
import torch

from pushforward.structure.rules.pointwise import pointwise, product
from pushforward.structure.rules.registry import (
    RULES,
    Call,
    Numbers,
    dims,
    rule,
    without_derivative,
)

aten = torch.ops.aten


@rule(aten.sum, aten.mean, aten.nansum, aten.amax, aten.amin, aten.prod, aten.logsumexp)
@rule(aten.max, aten.min, aten.aminmax, aten.var, aten.std, aten.var_mean, aten.std_mean)
@rule(aten.linalg_vector_norm, aten.norm, aten.all, aten.any, aten.argmax, aten.argmin)
def over_axes(call: Call) -> list[Numbers]:
    """Over the axes that are named, or over all."""
    numbers = call.numbers(call.args[0])
    axes = dims(call.named("dim"), numbers.ndim)
    found = call.unite_axes(numbers, axes, bool(call.named("keepdim", False)))
    return call.same_everywhere(without_derivative(found) if _counts(call) else found)


def _counts(call: Call) -> bool:
    """Whether a norm of order zero counts what is not zero."""
    return call.named("ord", call.named("p")) == 0


RULES[aten.max.other] = RULES[aten.min.other] = pointwise


@rule(aten.dist)
def distance(call: Call) -> list[Numbers]:
    """A norm of a difference."""
    found = call.everything()
    return [without_derivative(found) if call.arg(2, "p", 2) == 0 else found]


@rule(aten.renorm)
def renorm(call: Call) -> list[Numbers]:
    """Each slice along one axis is scaled by its own norm."""
    numbers, axis = call.numbers(call.args[0]), call.args[2]
    others = [i for i in range(numbers.ndim) if i != axis % numbers.ndim]
    return [np.broadcast_to(call.unite_axes(numbers, others, True), numbers.shape)]


@rule(aten.trace)
def trace(call: Call) -> list[Numbers]:
    return [call.sets.unite_axis(np.diagonal(call.numbers(call.args[0])))]


@rule(aten._softmax, aten._log_softmax, aten.softmax, aten.log_softmax, aten._safe_softmax)
def softmax(call: Call) -> list[Numbers]:
    """Over one axis, without what is minus infinity; an entry that is left alone is constant."""
    numbers, axis, sunk = call.numbers(call.args[0]), call.args[1], call.sunk(call.args[0])
    if numbers.ndim == 0:
        return [np.zeros((), np.int32)]
    if sunk is None and numbers.shape[axis] != 1:
        return [np.broadcast_to(call.unite_axes(numbers, [axis], True), numbers.shape)]
    kept = np.ones(numbers.shape, bool) if sunk is None else ~sunk
    kept |= ~kept.any(axis, keepdims=True)
    united = call.unite_axes(np.where(kept, numbers, 0), [axis], True)
    shared = np.where(kept & (kept.sum(axis, keepdims=True) > 1), united, 0)
    if "log" in call.op:  # what is minus infinity goes on to have a derivative there
        shared = np.where(kept, shared, call.unite(numbers, united))
    return [shared]


@rule(aten._softmax_backward_data)
def softmax_backward(call: Call) -> list[Numbers]:
    """y (g - sum of g y): nothing where y is constantly zero, and nothing of there elsewhere."""
    gradient, result, axis = call.args[:3]
    if gradient.dim() == 0:
        return [call.unite(gradient, result)]
    weighed = product(call, gradient, result)
    united = np.broadcast_to(call.unite_axes(weighed, [axis], True), weighed.shape)
    zero = call.equals(result, 0)
    return [united if zero is None else np.where(zero, 0, united)]


@rule(aten._log_softmax_backward_data)
def log_softmax_backward(call: Call) -> list[Numbers]:
    """g - exp(y) times the sum of g, which takes y away where g is constantly zero."""
    gradient, result, axis = call.args[:3]
    own, zero = call.numbers(result), call.equals(gradient, 0)
    total = call.unite_axes(call.numbers(gradient), [axis], True)
    if zero is not None and zero.ndim:
        own = np.where(zero.all(axis, keepdims=True), 0, own)
    return [call.unite(gradient, own, total)]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin)
def scan(call: Call) -> list[Numbers]:
    """Everything up to a place along one axis."""
    numbers, axis = call.numbers(call.args[0]), call.args[1]
    if numbers.ndim == 0:
        return call.same_everywhere(numbers)
    return call.same_everywhere(prefixes(call, np.moveaxis(numbers, axis, 0), axis))


def prefixes(call: Call, rows: Numbers, axis: int) -> Numbers:
    """Running unions along the first axis, put back at ``axis``."""
    step = 1
    while step < len(rows):
        rows = np.concatenate([rows[:step], call.sets.unite(rows[step:], rows[:-step])])
        step *= 2
    return np.moveaxis(rows, 0, axis)
