"""One evaluation of a model, with every call of its modules written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pushforward.boundary import Structure
from pushforward.path.states import State


@dataclass(frozen=True, eq=False)
class Crossing:
    """A tensor of the forward pass as a place in the graph; it holds no values."""

    edge: GradientEdge
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Crossing:
        return Crossing(get_gradient_edge(tensor), tuple(tensor.shape), tensor.dtype, tensor.device)

    @property
    def node(self) -> Node:
        return self.edge.node

    def is_seen_by(self, node: Node | None) -> bool:
        """Whether a tensor made by ``node`` is this one, or a mere copy of it."""
        if node is None or node is self.node:
            return node is self.node
        return node.name() == "CloneBackward0" and node.next_functions[0][0] is self.node


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: of the module, with ``:2`` where it is its second call.
        module_name: without that number; the model itself has the name of its class.
        leaf: whether no other module was called meanwhile.
        leaves: numbers of the first and the last leaf call inside, one past the end.
        source: the node of its input, where that is a single tensor and nothing else.
        outputs: its tensor outputs that depend on the input of the model.
        state: what a leaf was like meanwhile; None where hooks or the like took part.
    """

    name: str
    module_name: str
    module: nn.Module
    leaf: bool
    leaves: tuple[int, int]
    source: Node | None
    outputs: tuple[Crossing, ...]
    state: State | None = None

    def ends_at(self, place: Crossing) -> bool:
        return any(output.node is place.node for output in self.outputs)


@dataclass(eq=False)
class _Frame:
    """A call that has begun and not ended."""

    module: nn.Module
    name: str
    source: Node | None
    first_leaf: int
    leaf: bool = True


@dataclass(eq=False)
class _Recorder:
    """The hooks, and what they saw; ``calls`` is in the order in which calls ended."""

    names: dict[nn.Module, str]
    calls: list[Call] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)
    copies: set[Node] = field(default_factory=set)
    leaf_calls: int = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.frames:
            self.frames[-1].leaf = False
        else:
            self._begin()
        name = self.names[module]
        self.times[name] += 1
        shown = name if self.times[name] == 1 else f"{name}:{self.times[name]}"
        source = _only_tensor(args, kwargs)
        node = None if source is None else source.grad_fn
        self.frames.append(_Frame(module, shown, node, self.leaf_calls))

    def _begin(self) -> None:
        """Forget an earlier evaluation: a model may be recorded twice, the last one counts."""
        self.calls.clear()
        self.times.clear()
        self.copies.clear()
        self.leaf_calls = 0

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        frame = self.frames.pop()
        while frame.module is not module:  # a call that ended in an exception the model caught
            frame = self.frames.pop()
        self.leaf_calls += frame.leaf
        values, structure = Structure.of(output)
        copies = [self._own(value, frame.leaf) for value in values]
        crossings = tuple(Crossing.of(c) for c in copies if _differentiable(c))
        span = (frame.first_leaf, self.leaf_calls)
        named = frame.name, self.names[module], module
        state = State.during_call(module) if frame.leaf else None
        self.calls.append(Call(*named, frame.leaf, span, frame.source, crossings, state))
        same = all(copy is value for copy, value in zip(copies, values, strict=True))
        return None if same else structure.rebuild(copies)

    def _own(self, value: Any, leaf: bool) -> Any:
        """Give an output a node of its own, which later in-place ops leave as it is."""
        if not _differentiable(value) or (not leaf and value.grad_fn in self.copies):
            return value
        copy = value.clone()
        self.copies.add(copy.grad_fn)
        return copy


def _differentiable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and value.is_floating_point()
        and value.layout == torch.strided
    )


def _only_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
    return args[0] if single else None


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Names as the user gave them: without what torch.compile wraps around a module."""
    return {
        module: name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")
        for name, module in model.named_modules()
    }


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Write down the calls of all modules of a model while the context lasts."""
    names = {module: name or type(module).__name__ for module, name in module_names(model).items()}
    recorder = _Recorder(names)
    handles = []
    try:
        for module in names:
            # Scripted modules take no hooks, and are part of the step around them.
            if not isinstance(module, torch.jit.RecursiveScriptModule):
                handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
        with _uncompiled(model):
            yield recorder.calls
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run the Python code of compiled modules, whose calls can be seen."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
