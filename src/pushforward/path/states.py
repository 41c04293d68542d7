"""What a module was like when it was called, to be held against what it is like later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as shared

SETTINGS = (bool, int, float, str, tuple, type(None))
# A recorder has one of each on the module.
OWN_HOOKS = 1


@dataclass(frozen=True, eq=False)
class _Weight:
    """A tensor of a module: ``alias`` keeps its memory, so that the address stays taken."""

    name: str
    tensor: Tensor
    alias: Tensor
    version: int

    @staticmethod
    def of(name: str, tensor: Tensor) -> _Weight:
        return _Weight(name, tensor, tensor.detach(), _version(tensor))

    def is_in(self, module: nn.Module) -> bool:
        return (
            getattr(module, self.name, None) is self.tensor
            and self.tensor.data_ptr() == self.alias.data_ptr()
            and self.tensor.shape == self.alias.shape
            and self.tensor.stride() == self.alias.stride()
            and self.tensor.dtype == self.alias.dtype
            and _version(self.tensor) == self.version
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, eq=False)
class State:
    """Weights and settings of a module during one call of it."""

    module: nn.Module
    weights: tuple[_Weight, ...]
    settings: dict[str, Any]

    @staticmethod
    def during_call(module: nn.Module) -> State | None:
        """Read off a module that a recorder watches; None where it does more than its forward."""
        if hooks_of_all_modules() or _more_than_forward(module, OWN_HOOKS):
            return None
        tensors = dict(_tensors(module))
        if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors.values()):
            return None
        if any(tensor.layout != torch.strided for tensor in tensors.values()):
            return None
        weights = tuple(_Weight.of(name, tensor) for name, tensor in tensors.items())
        return State(module, weights, _settings(module))

    def lasts(self) -> bool:
        """Whether the module is the same now, without the hooks of the recorder."""
        return (
            not _more_than_forward(self.module, 0)
            and all(weight.is_in(self.module) for weight in self.weights)
            and self.settings == _settings(self.module)
        )


def hooks_of_all_modules() -> bool:
    """Whether hooks are registered that run around the forward or backward of any module."""
    return bool(
        shared._global_forward_hooks
        or shared._global_forward_pre_hooks
        or shared._global_backward_hooks
        or shared._global_backward_pre_hooks
    )


def _more_than_forward(module: nn.Module, own_hooks: int) -> bool:
    """Whether there are hooks of others, weights that are computed, or another ``forward``."""
    return bool(
        len(module._forward_hooks) > own_hooks
        or len(module._forward_pre_hooks) > own_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or "weight" in module._buffers  # which a call has copies of
        or any(tensor.grad_fn is not None for _, tensor in _tensors(module))
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module itself, and tensors that are plain attributes."""
    for name, value in (*module._parameters.items(), *vars(module).items()):
        if isinstance(value, Tensor):
            yield name, value


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) in SETTINGS}
