"""Normalisation: an output depends on all that shares its mean and variance."""

from __future__ import annotations

import numpy as np
import torch

from pushforward.structure.rules.registry import Call, Numbers, rule

aten = torch.ops.aten


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def layer_norm(call: Call) -> list[Numbers]:
    numbers, shape = call.numbers(call.args[0]), call.args[1]
    axes = range(numbers.ndim - len(shape), numbers.ndim)
    statistics = call.unite_axes(numbers, axes, True)
    found = call.unite(np.broadcast_to(statistics, numbers.shape), *call.tensors[1:])
    return [found, *[statistics] * (len(call.outputs) - 1)]


@rule(aten.native_group_norm)
def group_norm(call: Call) -> list[Numbers]:
    numbers, groups = call.numbers(call.args[0]), call.args[6]
    batch = numbers.shape[0]
    statistics = call.sets.unite_axis(numbers.reshape(batch, groups, -1))
    spread = np.broadcast_to(statistics[..., None], (*statistics.shape, numbers.size // max(
        statistics.size, 1
    ))).reshape(numbers.shape)
    affine = [_per_channel(call.numbers(t), numbers.ndim) for t in call.tensors[1:]]
    return [call.unite(spread, *affine), statistics, statistics]


def _per_channel(numbers: Numbers, rank: int) -> Numbers:
    return numbers.reshape(-1, *[1] * (rank - 2))


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_no_update,
    aten.cudnn_batch_norm,
)
def batch_norm(call: Call) -> list[Numbers]:
    """With statistics of the batch, each channel as a whole; with running ones, element by element."""
    numbers = call.numbers(call.args[0])
    training = _trains(call)
    axes = [axis for axis in range(numbers.ndim) if axis != 1]
    own = call.unite_axes(numbers, axes, True) if training else numbers
    affine = [_per_channel(call.numbers(t), numbers.ndim) for t in call.tensors[1:]]
    found = call.unite(np.broadcast_to(own, numbers.shape), *affine)
    channel = call.unite_axes(numbers, axes)
    return [found, *[channel if training else np.ones((), np.int32)] * (len(call.outputs) - 1)]


def _trains(call: Call) -> bool:
    name = str(call.func.overloadpacket)
    if "no_training" in name or "no_update" in name:
        return False
    return "with_update" in name or any(a is True for a in call.args[3:6])
