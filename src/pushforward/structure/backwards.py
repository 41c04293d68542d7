"""What the backward of a custom function reaches: it alone says what the outputs depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pushforward.structure.rules.registry import Numbers
from pushforward.structure.sets import VARIES, Sets


def backward_reach(follower: Any, given: list[Tensor], outs: list[Tensor]) -> Transposed | None:
    """Follow a custom backward from random cotangents; None where that fails."""
    probes = [torch.ones_like(t).requires_grad_() for t in outs]
    if any(t.is_complex() for t in (*probes, *given)):
        return None
    starts = np.cumsum([0, *(p.numel() for p in probes)])
    labels = [
        np.arange(start, start + p.numel()).reshape(tuple(p.shape))
        for start, p in zip(starts, probes, strict=False)
    ]
    inner = follower.within(probes, labels, int(starts[-1]))
    try:
        with torch.enable_grad(), _disable_current_modes(), inner:
            gradients = torch.autograd.grad(
                outs, given, probes, retain_graph=True, create_graph=True, allow_unused=True
            )
        if inner.failure is not None:
            return None
        found = [None if g is None else inner.numbers(g) for g in gradients]
    except Exception:  # a backward in Python can fail in any way
        return None
    follower.guards.elsewhere |= inner.guards.at_point
    for name, count in inner.dense_ops.items():
        follower.dense_ops[name] = follower.dense_ops.get(name, 0) + count
    return Transposed(follower.sets, inner.sets, starts, [tuple(p.shape) for p in probes], found)


@dataclass
class Transposed:
    """What a backward pass reaches, read from the outputs."""

    sets: Sets
    inner: Sets
    starts: np.ndarray
    shapes: list[tuple[int, ...]]
    found: list[Numbers | None]

    def __call__(self, place: int, numbers: list[Numbers]) -> Numbers:
        """The sets of one output, given those of the inputs."""
        start, stop = int(self.starts[place]), int(self.starts[place + 1])
        owners, members = [], []
        for reached, own in zip(self.found, numbers, strict=True):
            if reached is not None:
                flat = np.ascontiguousarray(reached).reshape(-1)
                begins, variables = self.inner.members(flat)
                owners.append(variables)
                members.append(np.repeat(np.ascontiguousarray(own).reshape(-1), np.diff(begins)))
        variables = np.concatenate(owners) if owners else np.zeros(0, np.int64)
        sets = np.concatenate(members) if members else np.zeros(0, np.int32)
        order = np.argsort(variables, kind="stable")
        bounds = np.searchsorted(variables[order], np.arange(start, stop + 1))
        united = self.sets.unite_groups(bounds, sets[order])
        return np.maximum(united, VARIES).reshape(self.shapes[place])
