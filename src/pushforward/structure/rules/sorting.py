"""Order: where values go is read from the values, so that a pattern holds at this point only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, rule, without_derivative
from pushforward.structure.sets import VARIES

aten = torch.ops.aten


# Where the axis stands among the arguments; ``keepdim`` comes next, if there is one.
_AXIS = {"sort": 1, "topk": 2, "kthvalue": 2, "mode": 1, "median": 1, "nanmedian": 1}


@rule(aten.sort, aten.topk, aten.kthvalue, aten.mode)
def sort(call: Call) -> list[Numbers]:
    """Values are taken from where the indices, the second output, say."""
    numbers, index = call.numbers(call.args[0]), call.outputs[1]
    _note(call)
    if numbers.ndim == 0:
        return [numbers, without_derivative(numbers)]
    place = _AXIS[call.op]
    axis = call.arg(place, "dim", -1)
    keeps = call.op in ("sort", "topk") or bool(call.arg(place + 1, "keepdim", False))
    taken = _taken(numbers, index if keeps else index.unsqueeze(axis), axis)
    order = without_derivative(call.unite_axes(numbers, [axis], keeps))
    found = taken if keeps else np.squeeze(taken, axis)
    return [np.maximum(found, order), np.broadcast_to(order, found.shape)]


@rule(aten.median, aten.nanmedian)
def median(call: Call) -> list[Numbers]:
    """Along an axis the element that is chosen; over all, each that equals the median."""
    if call.func._overloadname != "default":
        return list(sort(call))
    numbers = call.numbers(call.args[0])
    _note(call)
    equal = (call.value(call.args[0]) == call.outputs[0]).cpu().numpy()
    chosen = numbers[equal] if equal.any() else numbers.reshape(-1)
    return [np.maximum(call.sets.unite_axis(chosen), VARIES)]


def _taken(numbers: Numbers, index: Tensor, axis: int) -> Numbers:
    return np.take_along_axis(numbers, index.detach().cpu().numpy(), axis)


def _note(call: Call) -> None:
    call.noted(call.args[0], not call.is_constant(call.args[0]))


@rule(aten.searchsorted, aten.bucketize, aten.histc, aten.bincount, aten._histogramdd_bin_edges)
def counted(call: Call) -> list[Numbers]:
    """Whole numbers: without a derivative."""
    return call.same_everywhere(without_derivative(call.everything()))


@rule(aten.nonzero, aten._unique2, aten.unique_dim, aten.unique_consecutive)
def selected(call: Call) -> list[Numbers]:
    """The shapes of the outputs depend on the values."""
    _note(call)
    return call.same_everywhere(without_derivative(call.everything()))
