"""Nothing that a call does is visible afterwards: random state, buffers, modes stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The state of torch's default generators at one moment."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] = field(default=())

    @staticmethod
    def now() -> RandomState:
        """Copy the state of the CPU generator, and of the CUDA ones where CUDA is in use."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return RandomState(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


@contextmanager
def replayed(state: RandomState | None = None) -> Iterator[None]:
    """Draw random numbers from ``state`` (from now, if None) and forget that they were drawn."""
    before = RandomState.now()
    if state is not None:
        state.restore()
    try:
        yield
    finally:
        before.restore()


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """Every module that a callable can reach: itself, its owner, what it closes over or names."""
    found: dict[int, nn.Module] = {}
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found.update((id(module), module) for module in item.modules())
        else:
            pending.extend(_held_by(item))
    return list(found.values())


def _held_by(item: Any) -> list[Any]:
    """What a callable or container holds that could be, or lead to, a module."""
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, (list, tuple)):
        return [part for part in item if callable(part)]
    if isinstance(item, dict):
        return [part for part in item.values() if callable(part)]
    owner = getattr(item, "__self__", None)
    code = getattr(item, "__code__", None)
    if not isinstance(code, CodeType):
        return [owner] if isinstance(owner, nn.Module) else []
    return [owner, getattr(item, "__func__", None), *_closure(item), *_globals(item, code)]


def _closure(function: Any) -> list[Any]:
    held = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # the name is bound only after the function is made
            continue
    return [part for part in held if callable(part) or isinstance(part, (list, tuple, dict))]


def _globals(function: Any, code: CodeType) -> list[Any]:
    space = function.__globals__
    named = [space[name] for name in code.co_names if name in space]
    return [part for part in named if isinstance(part, nn.Module) or _beside(part, space)]


def _beside(part: Any, space: dict[str, Any]) -> bool:
    """Whether it is a function of the same file, which may name modules in its turn."""
    return isinstance(part, FunctionType) and part.__globals__ is space


@contextmanager
def borrowed_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Give each module copies of its buffers for a while.

    Copies rather than a restore afterwards: writing a buffer back would raise its version counter
    and break every graph that saved it.
    """
    originals = [(m, dict(m._buffers)) for m in modules if any(_values(m._buffers))]
    copies: dict[int, Tensor] = {}
    for module, buffers in originals:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for module, buffers in originals:
            module._buffers.clear()
            module._buffers.update(buffers)


def _values(buffers: dict[str, Tensor | None]) -> list[bool]:
    return [buffer is not None for buffer in buffers.values()]


@contextmanager
def math_attention() -> Iterator[None]:
    """Use the attention kernel that has all its derivatives; the fused ones lack the second."""
    kernels = torch.backends.cuda  # these switches hold for the CPU too
    before = (
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )
    _switch_attention(False, False, False, True)
    try:
        yield
    finally:
        _switch_attention(*before)


def _switch_attention(flash: bool, efficient: bool, cudnn: bool, math: bool) -> None:
    kernels = torch.backends.cuda
    kernels.enable_flash_sdp(flash)
    kernels.enable_mem_efficient_sdp(efficient)
    kernels.enable_cudnn_sdp(cudnn)
    kernels.enable_math_sdp(math)


@contextmanager
def recording() -> Iterator[None]:
    """Gradients on and inference mode off."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            yield
    else:
        with torch.enable_grad():
            yield


@contextmanager
def untouched(modules: list[nn.Module], state: RandomState | None = None) -> Iterator[None]:
    """Run a user's function so that nothing of it is visible afterwards, and so that it can be
    differentiated."""
    with recording(), replayed(state), borrowed_buffers(modules), math_attention():
        yield
