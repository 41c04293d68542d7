"""Normalisation: an output depends on all that shares its mean and variance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pushforward.structure.rules.registry import Call, Numbers, rule, without_derivative

aten = torch.ops.aten


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def layer_norm(call: Call) -> list[Numbers]:
    numbers = call.numbers(call.args[0])
    statistics = call.unite_axes(numbers, _last(numbers.ndim, call.args[1]), True)
    row = _row(call, statistics, call.args[1])
    found = call.unite(np.broadcast_to(row, numbers.shape), *call.tensors[1:])
    return [found, *[statistics] * (len(call.outputs) - 1)]


def _row(call: Call, numbers: Numbers, shape: Sequence[int]) -> Numbers:
    """What passes by the statistics of a row: nothing by the difference of one number to itself."""
    alone = "layer" in call.op and int(np.prod(shape)) == 1
    return without_derivative(numbers) if alone else numbers


def _last(rank: int, shape: Sequence[int]) -> range:
    """The axes that are normalised."""
    return range(rank - len(shape), rank)


@rule(aten.native_layer_norm_backward, aten._fused_rms_norm_backward)
def layer_norm_backward(call: Call) -> list[Numbers]:
    """Of x from the whole of its row; of the weight and the bias from all rows at their place."""
    gradient, weight, mask = call.args[0], call.named("weight"), call.named("output_mask")
    own = call.numbers(call.args[1])
    axes = _last(own.ndim, call.args[2])
    row = _row(call, call.unite_axes(own, axes, True), call.args[2])
    sent = call.unite_axes(call.unite(gradient, weight), axes, True)
    rest = range(axes.start)
    whole = np.broadcast_to(call.unite(row, sent), own.shape)
    scale = call.unite_axes(call.unite(np.broadcast_to(row, own.shape), gradient), rest)
    offset = call.unite_axes(call.numbers(gradient), rest)
    return _asked((whole, scale, offset), mask)


def _asked(found: Sequence[Numbers], mask: Sequence[bool]) -> list[Numbers]:
    """The gradients that were asked for; the others are no tensors."""
    return [numbers for numbers, asked in zip(found, mask, strict=False) if asked]


@rule(aten.native_group_norm)
def group_norm(call: Call) -> list[Numbers]:
    numbers = call.numbers(call.args[0])
    statistics, spread = _by_group(call, numbers, call.args[6])
    affine = [_per_channel(call.numbers(t), numbers.ndim) for t in call.args[1:3]]
    return [call.unite(spread, *affine), statistics, statistics]


@rule(aten.native_group_norm_backward)
def group_norm_backward(call: Call) -> list[Numbers]:
    """The same by groups of channels of a sample."""
    gradient, weight = call.args[0], call.named("weight")
    own, groups = call.numbers(call.named("input")), call.named("group")
    sent = call.unite(gradient, _per_channel(call.numbers(weight), own.ndim))
    _, statistics = _by_group(call, own, groups)
    _, spread = _by_group(call, np.broadcast_to(sent, own.shape), groups)
    scale = _by_channel(call, call.unite(gradient, statistics))
    found = (call.unite(spread, statistics), scale, _by_channel(call, call.numbers(gradient)))
    return _asked(found, call.named("output_mask"))


def _by_group(call: Call, numbers: Numbers, groups: int) -> tuple[Numbers, Numbers]:
    """The unions over groups of channels of a sample, and the same at each place of them."""
    size = numbers.size // max(len(numbers) * groups, 1)
    united = call.sets.unite_axis(numbers.reshape(len(numbers), groups, size))
    return united, np.repeat(united, size, 1).reshape(numbers.shape)


def _by_channel(call: Call, numbers: Numbers, keepdim: bool = False) -> Numbers:
    """The unions over everything but axis 1."""
    return call.unite_axes(numbers, [i for i in range(numbers.ndim) if i != 1], keepdim)


def _per_channel(numbers: Numbers, rank: int) -> Numbers:
    """One number for each channel, beside images; those of what is not there."""
    return numbers.reshape(-1, *[1] * (rank - 2)) if numbers.ndim else numbers


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_no_update,
    aten.cudnn_batch_norm,
)
def batch_norm(call: Call) -> list[Numbers]:
    """With statistics of the batch, channel by channel; with running ones, element by element."""
    numbers = call.numbers(call.args[0])
    training = _trains(call)
    own = _by_channel(call, numbers, True) if training else numbers
    affine = [_per_channel(call.numbers(t), numbers.ndim) for t in call.tensors[1:]]
    found = call.unite(np.broadcast_to(own, numbers.shape), *affine)
    channel = _by_channel(call, numbers) if training else np.ones((), np.int32)
    return [found, *[channel] * (len(call.outputs) - 1)]


def _trains(call: Call) -> bool:
    """Whether the statistics are those of the batch."""
    if call.op.endswith(("no_training", "no_update")):
        return False
    return call.op.endswith("with_update") or bool(call.named("training", call.named("train")))


@rule(aten.native_batch_norm_backward, aten.cudnn_batch_norm_backward, aten.batch_norm_backward)
def batch_norm_backward(call: Call) -> list[Numbers]:
    """Of x from its channel, or from its place where running statistics were used."""
    gradient = call.numbers(call.named("grad_out", call.named("grad_output")))
    own, weight = call.numbers(call.named("input")), call.numbers(call.named("weight"))
    mask = call.named("output_mask", (True, True, True))
    sent = call.unite(gradient, _per_channel(weight, own.ndim))
    both = _by_channel(call, call.unite(gradient, own), True)
    training = call.op.startswith("cudnn") or bool(call.named("train", call.named("update")))
    whole = call.unite(both, sent) if training else sent
    kept = [call.numbers(call.named(name)) for name in ("running_mean", "running_var")]
    whole = call.unite(whole, *[_per_channel(each, own.ndim) for each in kept])
    scale = _by_channel(call, both)
    found = (np.broadcast_to(whole, own.shape), scale, _by_channel(call, gradient))
    return _asked(found, mask)
