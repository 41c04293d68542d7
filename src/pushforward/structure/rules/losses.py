"""Losses: element by element, then summed or not; those over classes pick by their labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pushforward.structure.rules.registry import Call, Numbers, rule, without_derivative
from pushforward.structure.sets import VARIES

aten = torch.ops.aten

_NONE = 0


@rule(aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss, aten.soft_margin_loss)
@rule(aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits)
def elementwise(call: Call) -> list[Numbers]:
    """Prediction, target and weights at the same place, then united where they are summed."""
    return [_reduced(call, call.unite(*call.tensors))]


def _reduced(call: Call, numbers: Numbers) -> Numbers:
    """One set where a loss is summed or averaged."""
    if call.named("reduction", 1) == _NONE:
        return numbers
    return call.sets.unite_axis(numbers.reshape(-1))


@rule(aten.mse_loss_backward, aten.smooth_l1_loss_backward, aten.huber_loss_backward)
@rule(aten.soft_margin_loss_backward, aten.binary_cross_entropy_backward)
def elementwise_backward(call: Call) -> list[Numbers]:
    """The gradient of the loss, one for all or one a place, and the rest at the same place."""
    return [call.unite(*call.tensors)]


@rule(aten.nll_loss_forward, aten.nll_loss2d_forward)
def nll_loss(call: Call) -> list[Numbers]:
    """The log-probability of each label, with its weight."""
    scores, labels, weight = call.args[:3]
    labels, counted = _labels(call, labels)
    numbers = call.numbers(scores)
    classes = min(1, numbers.ndim - 1)
    chosen = np.take_along_axis(numbers, np.expand_dims(labels, classes), classes)
    chosen = call.unite(np.squeeze(chosen, classes), _weight(call, weight, labels))
    found = _reduced(call, np.where(counted, chosen, 0))
    return [_relabelled(call, found), np.full((), VARIES, np.int32)]


@rule(aten.nll_loss_backward, aten.nll_loss2d_backward)
def nll_loss_backward(call: Call) -> list[Numbers]:
    """The gradient of the loss goes to the scores of the labels alone."""
    gradient, scores, labels, weight = call.args[:4]
    labels, counted = _labels(call, labels)
    united = call.unite(gradient, _weight(call, weight, labels), call.numbers(call.args[6]))
    values = np.where(counted, np.broadcast_to(united, labels.shape), 0)
    classes = min(1, scores.dim() - 1)
    found = np.zeros(tuple(scores.shape), np.int32)
    np.put_along_axis(
        found, np.expand_dims(labels, classes), np.expand_dims(values, classes), classes
    )
    return [_relabelled(call, found)]


def _labels(call: Call, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels as they are, and where they count."""
    values = call.constant(labels)
    counted = values != call.named("ignore_index")
    return np.where(counted, values, 0), counted


def _weight(call: Call, weight: Tensor | None, labels: np.ndarray) -> Numbers:
    return call.numbers(weight) if weight is None else call.numbers(weight)[labels]


def _relabelled(call: Call, found: Numbers) -> Numbers:
    """Nothing is constant where the labels vary."""
    return found if call.is_constant(call.named("target")) else np.maximum(found, VARIES)


@rule(aten.multi_margin_loss, aten.multilabel_margin_loss_forward)
def margins(call: Call) -> list[Numbers]:
    """All scores of a sample against that of its label."""
    numbers = call.numbers(call.args[0])
    classes = numbers.shape[-1] if numbers.ndim else 1
    own = call.sets.unite_axis(numbers, -1) if numbers.ndim else numbers
    own = np.maximum(own if classes > 1 else without_derivative(own), VARIES)
    found = _reduced(call, own)
    return [found, *[np.full((), VARIES, np.int32)] * (len(call.outputs) - 1)]


@rule(aten._ctc_loss)
def ctc_loss(call: Call) -> list[Numbers]:
    """All scores (time, samples, classes) of a sample."""
    numbers = call.numbers(call.args[0])
    united = call.sets.unite_axis(call.sets.unite_axis(numbers, -1), 0)
    found = np.maximum(united, VARIES)
    return [found.reshape(call.shape), np.full((), VARIES, np.int32)]
