"""Places of a model where noise goes: its input, outputs of modules, values of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pushforward.errors import InputError
from pushforward.path.record import module_names
from pushforward.path.steps import checked_layers
from pushforward.regularizers.twins import Twins

INPUT = "input"
ACTIVATION = "activation"
Visit = Callable[[str, Tensor], Tensor]
Layers = str | Sequence[str] | None
Sigma = float | Mapping[str, float]

_NAMES = (
    *("relu", "relu_", "relu6", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu"),
    *("mish", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "softplus", "softsign"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh", "hardtanh_", "hardsigmoid", "hardswish"),
    *("logsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold", "threshold_", "glu"),
)
_ACTIVATIONS = frozenset(
    getattr(home, name) for home in (F, torch, Tensor) for name in _NAMES if hasattr(home, name)
)


class Sites:
    """Where to visit a model, and what noise there is at each place.

    Attributes:
        sigma: the standard deviation by name; a number holds everywhere.
        patterns: names and globs of modules; None is the input and every hidden activation.
    """

    def __init__(self, sigma: Sigma, layers: Layers) -> None:
        self.sigma = _checked_sigma(sigma)
        if layers is None and isinstance(self.sigma, dict):
            layers = list(self.sigma)
        self.layers = layers
        if isinstance(self.sigma, dict) and layers is not None:
            _check_covered(self.sigma, [layers] if isinstance(layers, str) else layers)

    def sigma_at(self, name: str) -> float:
        """The standard deviation at a place; the first pattern that fits decides."""
        if not isinstance(self.sigma, dict):
            return self.sigma
        return next(value for key, value in self.sigma.items() if _fits(name, key))

    @contextmanager
    def visiting(self, model: nn.Module, visit: Visit) -> Iterator[None]:
        """Hand each place to ``visit`` while a model runs; hooks are gone afterwards."""
        handles = self.attach(model, visit)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, model: nn.Module, visit: Visit) -> list[Any]:
        """The same, until the handles that are returned are removed."""
        _check_model(model)
        run = _Run(visit, self.layers is None)
        handles: list[Any] = []
        try:
            for register, hook, how in self._hooks(model, run):
                handles.append(register(hook, **how))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return handles

    def _hooks(self, model: nn.Module, run: _Run) -> Iterator[tuple[Callable, Callable, dict]]:
        """Who registers which hook, and how; the names are looked up before the first of them."""
        modules = list(self._modules(model))
        if self.layers is None or INPUT in self._listed():
            enter = run.input_or_nothing if self.layers is None else run.input
            yield model.register_forward_pre_hook, enter, {"with_kwargs": True}
        yield model.register_forward_pre_hook, run.start, {"with_kwargs": True}
        for module, name, named in modules:
            yield module.register_forward_hook, run.output_of(name, named), {}
        for module in _own_activations(model) if self.layers is None else ():
            yield module.register_forward_pre_hook, run.enter, {}
            yield module.register_forward_hook, run.leave, {}
        # First, so that one context inside of another ends before it.
        yield model.register_forward_hook, run.stop, {"always_call": True, "prepend": True}

    def _listed(self) -> list[str]:
        return [self.layers] if isinstance(self.layers, str) else list(self.layers or ())

    def _modules(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
        """Modules that are places, their names, and whether somebody wrote that very name."""
        patterns = [pattern for pattern in self._listed() if pattern != INPUT]
        if not patterns:
            return
        checked_layers(model, patterns)
        for module, name in module_names(model).items():
            if module is not model and any(fnmatchcase(name, pattern) for pattern in patterns):
                yield module, name, name in patterns


def _own_activations(model: nn.Module) -> Iterator[nn.Module]:
    """Modules without parameters that are none of torch's: what they compute is one function."""
    for module in model.modules():
        simple = not list(module.children()) and not list(module.parameters())
        if simple and module is not model and not type(module).__module__.startswith("torch."):
            yield module


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


class _Run(TorchFunctionMode):
    """One evaluation of a model after the other, with its places visited.

    As a mode it sees the activations, whether modules or functions compute them, and keeps torch
    from ways around the modules of a transformer that it takes in evaluation mode.
    """

    def __init__(self, visit: Visit, activations: bool) -> None:
        super().__init__()
        self.visit, self.activations = visit, activations
        self.depth = self.seen = 0
        self.inside: list[int] = []
        self.twins = Twins()

    def input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Visit the first real tensor that a model is called with."""
        found = self.input_or_nothing(module, args, kwargs)
        if found is None:
            raise InputError(
                'layers="input" expects a model that is called with a real floating-point tensor, '
                "got none; name a module whose output can take noise, an embedding for instance"
            )
        return found

    def input_or_nothing(self, _: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.depth:
            return args, kwargs
        values = [*args, *kwargs.values()]
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.is_floating_point():
                values[i] = self.visit(INPUT, value)
                rest = values[len(args) :]
                return tuple(values[: len(args)]), dict(zip(kwargs, rest, strict=True))
        return None

    def start(self, *_: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.seen = 0
            self.inside.clear()
            self.twins.clear()
            self.__enter__()

    def stop(self, model: nn.Module, _: Any, output: Any) -> Any:
        if not self.depth:
            return None
        self.depth -= 1
        if self.depth:
            return None
        self.__exit__(None, None, None)
        if self.activations and output is not None:
            self._refuse_none(model)
        output = pytree.tree_map(self._undone, output)
        self.twins.clear()
        return output

    def output_of(self, name: str, named: bool) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                raise InputError(
                    f"layers expects modules that return a real floating-point tensor, got "
                    f"{_kind(output)} from {name!r}; name a module inside of it"
                )
            return self.visit(name, output) if named else self._visited(name, output)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (self.activations and func in _ACTIVATIONS and _is_tensor(args)):
            return self.twins.run(func, args, kwargs)
        self.seen += 1
        if self.inside:
            return self.twins.run(func, args, kwargs)
        if func.__name__.endswith("_") or kwargs.get("inplace") or any(a is True for a in args[1:]):
            clean = func(args[0].clone(), *args[1:], **kwargs)
            self.twins.overwrite(args[0], self.visit(ACTIVATION, clean), clean)
            return args[0]
        return self._visited(ACTIVATION, func(*args, **kwargs))

    def enter(self, *_: Any) -> None:
        """A module of the user's begins, which may be an activation made of those of torch."""
        self.inside.append(self.seen)

    def leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Visit what it returns, if an activation was computed inside."""
        before = self.inside.pop()
        computed = self.seen > before and isinstance(output, Tensor) and output.is_floating_point()
        return self._visited(ACTIVATION, output) if computed else output

    def _visited(self, name: str, clean: Tensor) -> Tensor:
        """Visit a place, and remember what stood there in case that the model returns it."""
        visited = self.visit(name, clean)
        self.twins.note(visited, clean)
        return visited

    def _undone(self, leaf: Any) -> Any:
        """An output without what a visit did to it: a model's result is no hidden place."""
        clean = self.twins.of(leaf) if isinstance(leaf, Tensor) else None
        return leaf if clean is None else clean

    def _refuse_none(self, model: nn.Module) -> None:
        """A network of several layers whose activations nobody has seen."""
        layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
        if not self.seen and len(layers) > 1:
            raise InputError(
                "layers=None expects activations of torch (nn.ReLU, F.gelu, torch.tanh, ...), and "
                f"{type(model).__name__} has none; name the modules whose outputs get noise"
            )


def _is_tensor(args: tuple) -> bool:
    return bool(args) and isinstance(args[0], Tensor)


def _kind(output: Any) -> str:
    return f"{output.dtype}" if isinstance(output, Tensor) else type(output).__name__


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module to find layers in, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "expected a module whose layers can be seen, got a scripted one; give the module as it "
            "was written"
        )


def _checked_sigma(sigma: Any) -> float | dict[str, float]:
    if isinstance(sigma, Mapping):
        return {str(name): _checked_number(value) for name, value in sigma.items()}
    return _checked_number(sigma)


def _checked_number(sigma: Any) -> float:
    try:
        number = float(sigma)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError(
            f"sigma expects a finite number of at least 0, or a dict of them, got {sigma!r}"
        )
    return number


def _check_covered(sigma: dict[str, float], layers: Sequence[str]) -> None:
    for layer in layers:
        if not any(_fits(layer, key) for key in sigma):
            raise InputError(
                f"sigma expects a number for each of the layers, got none for {layer!r}; it has "
                f"{', '.join(sigma) or 'no names'}"
            )
