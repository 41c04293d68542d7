"""Places of a model where noise goes: its input, outputs of modules, values of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pushforward.errors import InputError
from pushforward.path.steps import checked_layers
from pushforward.regularizers.activations import OwnModule, is_activation, own_activations
from pushforward.regularizers.twins import Twins

INPUT = "input"
ACTIVATION = "activation"
Visit = Callable[[str, Tensor], Tensor]
Layers = str | Sequence[str] | None
Sigma = float | Mapping[str, float]


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
        for module in own_activations(model) if self.layers is None else ():
            yield module.register_forward_pre_hook, run.enter, {}
            yield module.register_forward_hook, run.leave, {"always_call": True}
        # First, so that one context inside of another ends before it.
        yield model.register_forward_hook, run.stop, {"always_call": True, "prepend": True}

    def _listed(self) -> list[str]:
        return [self.layers] if isinstance(self.layers, str) else list(self.layers or ())

    def _modules(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
        """Modules that are places, their names, and whether somebody wrote that very name."""
        patterns = [pattern for pattern in self._listed() if pattern != INPUT]
        if not patterns:
            return
        known = [name for names in _all_names(model).values() for name in names]
        strange = [p for p in patterns if not isinstance(p, str) or not _matches(known, p)]
        if strange:
            checked_layers(model, strange)
        for module, names in _all_names(model).items():
            fitting = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
            if fitting:
                written = [name for name in fitting if name in patterns]
                yield module, (written or fitting)[0], bool(written)


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The submodules, each with all the names under which it is registered."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            names.setdefault(module, []).append(name)
    return names


def _matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


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
        self.inside: list[OwnModule] = []
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
        kwargs = dict(kwargs or {})
        values = args or (kwargs.get("input"),)
        activation = self.activations and is_activation(func, values, kwargs)
        self.seen += activation
        if self.inside:
            return self._inside(self.inside[-1], func, args, kwargs, activation)
        if not activation:
            return self.twins.run(func, args, kwargs)
        args = args or (kwargs.pop("input"),)
        if func.__name__.endswith("_") or kwargs.get("inplace") or any(a is True for a in args[1:]):
            clean = func(args[0].clone(), *args[1:], **kwargs)
            self.twins.overwrite(args[0], self.visit(ACTIVATION, clean), clean)
            return args[0]
        return self._activated(func(*args, **kwargs))

    def _inside(
        self, own: OwnModule, func: Any, args: tuple, kwargs: dict, activation: bool
    ) -> Any:
        """Call a function inside of a module of the user's."""
        args = own.arguments(args, func, self._activated)
        kwargs = own.arguments(kwargs, func, self._activated)
        depends = own.depends((args, kwargs))
        result = self.twins.run(func, args, kwargs)
        if activation or depends:
            own.add(args[0] if result is None else result)
        return result

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A module of the user's begins, which may be an activation made of those of torch."""
        self.inside.append(OwnModule(module))

    def leave(self, module: nn.Module, _: Any, output: Any) -> Any:
        """Visit what it returns that was computed from an activation inside."""
        if not any(own.module is module for own in self.inside):
            return None
        while (own := self.inside.pop()).module is not module:
            pass  # one that ended in an exception
        if not own.depends(output):
            return None
        if self.inside:
            self.inside[-1].add(output)
            return None
        return pytree.tree_map(lambda leaf: own.visited(leaf, self._activated), output)

    def _activated(self, clean: Tensor) -> Tensor:
        return self._visited(ACTIVATION, clean)

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
