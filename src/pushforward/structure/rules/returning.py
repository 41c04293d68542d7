"""Gradients of data movement: each element of the input sums what was made of it.

As in `movement`, no op is described: the forward op is run on positions, which say where each
element of the gradient came from, and so where it goes back to.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, positions, rule
from pushforward.structure.rules.scattering import joined
from pushforward.structure.sets import VARIES

aten = torch.ops.aten


def returned(call: Call, gradient: Numbers, forward: Callable[[Tensor], Tensor]) -> Numbers:
    """The sets of the gradient of an input shaped like the first output, by the op that moved it.

    Place 0 takes what came from nowhere.
    """
    places = forward(positions(call.shape, 1)).long().numpy()
    room = np.zeros(int(np.prod(call.shape)) + 1, np.int32)
    values = np.broadcast_to(gradient, places.shape)
    return joined(call, room, places, values, True)[1:].reshape(call.shape)


@rule(aten.reflection_pad1d_backward, aten.reflection_pad2d_backward)
@rule(aten.reflection_pad3d_backward, aten.replication_pad1d_backward)
@rule(aten.replication_pad2d_backward, aten.replication_pad3d_backward)
def pad_backward(call: Call) -> list[Numbers]:
    gradient, padding = call.args[0], call.args[2]
    pad = getattr(aten, call.op.removesuffix("_backward"))
    return [returned(call, call.numbers(gradient), lambda x: pad(x, padding))]


@rule(aten.embedding_dense_backward)
def embedding_backward(call: Call) -> list[Numbers]:
    """A row of the table sums the gradients of its uses; that of the padding has none."""
    gradient, index, _, padding = call.args[:4]
    rows = torch.from_numpy(call.constant(index)).long()
    kept = (rows != padding).unsqueeze(-1)
    found = returned(call, call.numbers(gradient), lambda x: torch.where(kept, x[rows], 0))
    return [found if call.is_constant(index) else np.maximum(found, VARIES)]


@rule(aten.masked_scatter_backward)
def masked_scatter_backward(call: Call) -> list[Numbers]:
    """Of the source: the gradients where the mask is true, in order, and then zeros."""
    gradient, mask = call.args[:2]
    numbers, chosen = call.numbers(gradient), call.constant(mask)
    numbers, chosen = np.broadcast_arrays(numbers, chosen)
    found = np.zeros(int(np.prod(call.shape)), np.int32)
    taken = numbers[chosen][: len(found)]
    found[: len(taken)] = taken
    found = found.reshape(call.shape)
    return [found if call.is_constant(mask) else np.maximum(found, VARIES)]
