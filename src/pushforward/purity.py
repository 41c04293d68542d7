"""Nothing that a call does is visible afterwards: random state, buffers, modes stay as they are."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


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


@contextmanager
def borrowed_buffers(function: Callable[..., Any]) -> Iterator[Loan]:
    """Give each module that a function runs copies of its buffers for a while.

    Copies rather than a restore afterwards: writing a buffer back would raise its version counter
    and break every graph that saved it. Yields the loan.
    """
    loan = Loan()
    owner = _module_of(function)
    handle = None
    if owner is None:
        handle = register_module_forward_pre_hook(loan.hook)
    else:
        loan.take(owner)
    try:
        yield loan
    finally:
        if handle is not None:
            handle.remove()
        loan.give_back()


def _module_of(function: Any) -> nn.Module | None:
    """The module that a callable is, or is a method of."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class Loan:
    """Which modules work on copies of their buffers now.

    Attributes:
        modules: the modules that were run, in the order in which they were met.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._thread = threading.get_ident()
        self._met: set[int] = set()
        self._originals: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._copies: dict[int, Tensor] = {}
        self._by_copy: dict[int, Tensor] = {}
        self._values: list[tuple[Tensor, Tensor]] = []

    def hook(self, module: nn.Module, _: Any) -> None:
        if threading.get_ident() == self._thread:
            self.take(module)

    def take(self, module: nn.Module) -> None:
        if id(module) in self._met:
            return
        pending: list[nn.Module | None] = [module]
        while pending:
            part = pending.pop()
            if part is not None and id(part) not in self._met:
                self._met.add(id(part))
                self.modules.append(part)
                self._lend(part)
                pending.extend(part._modules.values())

    def _lend(self, module: nn.Module) -> None:
        if not module._buffers:
            return
        if isinstance(module, torch.jit.ScriptModule):  # its buffers cannot be exchanged
            self._values += [(b, b.clone()) for b in module.buffers(recurse=False)]
            return
        self._originals.append((module, dict(module._buffers)))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in self._copies:
                    self._copies[id(buffer)] = buffer.clone()
                    self._by_copy[id(self._copies[id(buffer)])] = buffer
                module._buffers[name] = self._copies[id(buffer)]

    def original(self, tensor: Tensor) -> Tensor:
        """The buffer that a tensor is the copy of, or else the tensor."""
        return self._by_copy.get(id(tensor), tensor)

    def give_back(self) -> None:
        for module, buffers in self._originals:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in self._values:
            # Past the version counter: graphs recorded meanwhile hold what the module computed.
            buffer.data.copy_(value)


def _attention_switches() -> tuple[bool, bool, bool, bool]:
    kernels = torch.backends.cuda  # these switches hold for the CPU too
    return (
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )


def _switch_attention(flash: bool, efficient: bool, cudnn: bool, math: bool) -> None:
    kernels = torch.backends.cuda
    kernels.enable_flash_sdp(flash)
    kernels.enable_mem_efficient_sdp(efficient)
    kernels.enable_cudnn_sdp(cudnn)
    kernels.enable_math_sdp(math)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Run recurrent layers by their steps: the fused CPU kernel has no second derivative."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


_ONE_AT_A_TIME = threading.RLock()


def one_at_a_time() -> threading.RLock:
    """The lock under which switches of torch, generators and buffers are borrowed and given back.

    Two threads that borrow in turns would each give back what the other had borrowed.
    """
    return _ONE_AT_A_TIME


@contextmanager
def outside_inference() -> Iterator[None]:
    """Inference mode off, but gradients as it leaves them: off too."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Gradients on and inference mode off."""
    with outside_inference(), torch.enable_grad():
        yield


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence vmap's remark that an op has no rule and is looped over: the result is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@contextmanager
def untouched(function: Callable[..., Any], state: RandomState | None = None) -> Iterator[Loan]:
    """Run a user's function so that nothing of it is visible afterwards, and so that it can be
    differentiated. Yields the loan of its buffers, which knows the modules that it runs.

    Attention runs by the kernel that has all its derivatives; the fused ones lack the second.
    """
    with one_at_a_time(), recording(), borrowed_buffers(function) as loan:
        before, kernels = RandomState.now(), _attention_switches()
        _switch_attention(flash=False, efficient=False, cudnn=False, math=True)
        if state is not None:
            state.restore()
        try:
            yield loan
        finally:
            _switch_attention(*kernels)
            before.restore()


@contextmanager
def modes_set(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Give modules the training flags that they had, for a while, each its own alone."""
    with one_at_a_time():
        before = [(module, module.training) for module, _ in modes]
        for module, training in modes:
            module.training = training
        try:
            yield
        finally:
            for module, training in before:
                module.training = training


@contextmanager
def custom_functions(seen: Callable[[Any, Any], None]) -> Iterator[None]:
    """Tell of every call of a custom ``autograd.Function``: its arguments and its results.

    Its ops run where gradients are off, so that nothing else says that it was called.
    """
    original = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def told(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = original.__get__(None, cls)(*args, **kwargs)
        if threading.get_ident() == thread:
            seen((args, kwargs), result)
        return result

    with one_at_a_time():
        torch.autograd.Function.apply = classmethod(told)
        try:
            yield
        finally:
            torch.autograd.Function.apply = original
