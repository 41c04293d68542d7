"""The hook as a callback of Lightning."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pushforward.callbacks.logger import GainLogger
from pushforward.errors import InputError, MissingDependencyError

# The same framework goes by two names, each with classes of its own.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LightningGainLogger:
    """`GainLogger` for a Lightning ``Trainer``: logs the largest gains to the trainer's loggers.

    Measures before the training step of every ``every``-th ``global_step``, the first one included.
    An instance is a ``Callback`` of ``lightning`` or of ``pytorch_lightning``, whichever is
    imported.

    Args:
        every: how many steps of the optimizer from one measurement to the next.
        top, bottom, layers, samples, directions, prefix: as in `GainLogger`.
        log: where numbers go, as in `GainLogger`; None takes the trainer's loggers.
        model: the name of the attribute of the LightningModule to watch, such as "backbone"; None
            watches the LightningModule itself, by its ``forward``.
        inputs: a function from a batch to the input tensor; None takes a tensor as it is, and the
            first element of a tuple or list.

    Raises:
        MissingDependencyError: neither package is installed.
        InputError: an argument cannot be worked with.

    Cost: that of `GainLogger`.

    ``Trainer(callbacks=[pf.callbacks.LightningGainLogger(every=100, top=5)])``
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LightningGainLogger:
        """An instance of a subclass that is a callback of Lightning too."""
        return object.__new__(_as_callback(cls, _callback_classes()))

    def __init__(
        self,
        every: int = 100,
        top: int | None = 5,
        log: Any = None,
        *,
        bottom: int = 0,
        layers: str | Sequence[str] | None = None,
        samples: int | None = None,
        directions: int | None = None,
        prefix: str = "pushforward",
        model: str | None = None,
        inputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "every": every,
            "top": top,
            "log": log,
            "bottom": bottom,
            "layers": layers,
            "samples": samples,
            "directions": directions,
            "prefix": prefix,
            "model": model,
            "inputs": inputs,
        }
        self.watch: GainLogger | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the call that made it, for processes that are spawned."""
        return functools.partial(LightningGainLogger, **self.options), ()

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin anew: the module, the strategy and the loggers may be others."""
        self.watch = self._watch(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Measure where it is time to."""
        assert self.watch is not None
        self.watch(batch, int(trainer.global_step))

    def _watch(self, trainer: Any, pl_module: nn.Module) -> GainLogger:
        options = dict(self.options)
        name = options.pop("model")
        if options["log"] is None:
            options["log"] = functools.partial(_to_loggers, trainer)
        return GainLogger(_part(pl_module, name), **options)


# What may be given to the class is what __init__ takes; __new__ passes it on.
LightningGainLogger.__signature__ = inspect.Signature(  # type: ignore
    list(inspect.signature(LightningGainLogger.__init__).parameters.values())[1:]
)


def _to_loggers(trainer: Any, values: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)


def _part(module: nn.Module, name: str | None) -> nn.Module:
    """The module that a dotted name leads to."""
    if name is None:
        return module
    found = dict(module.named_modules()).get(name)
    if found is None:
        names = ", ".join(name for name, _ in module.named_children())
        raise InputError(
            f"model expects the name of a module of {type(module).__name__}, got {name!r}; "
            f"it has {names or 'none'}"
        )
    return found


def _callback_classes() -> tuple[type, ...]:
    """The classes of the packages that are imported, or else of the first that can be."""
    loaded = [sys.modules[name] for name in _PACKAGES if sys.modules.get(name) is not None]
    found = loaded or list(filter(None, map(_imported, _PACKAGES)))[:1]
    if not found:
        raise MissingDependencyError(
            "LightningGainLogger needs the package 'lightning' or 'pytorch_lightning'; install it "
            "with: pip install 'pushforward[lightning]', or use GainLogger in a loop of your own"
        )
    return tuple(package.Callback for package in found)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@functools.cache
def _as_callback(cls: type, bases: tuple[type, ...]) -> type:
    return type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, "__doc__": cls.__doc__})
