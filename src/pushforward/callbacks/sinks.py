"""Where numbers go: one function from names with values and a step, whatever takes them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pushforward.errors import InputError

Sink = Callable[[dict[str, float], int], Any]


def sink_of(log: Any) -> Sink:
    """How to hand numbers to ``log``, by what it can do.

    Raises:
        InputError: where it is nothing that takes numbers.
    """
    if inspect.isroutine(log):
        return log
    if isinstance(log, logging.Logger):
        return lambda values, step: log.info("step %d: %s", step, _in_words(values))
    for method, sink in _BY_METHOD.items():
        if callable(getattr(log, method, None)):
            return sink(log)
    if callable(log):
        return log
    raise InputError(
        "log expects a function of (values, step), a SummaryWriter, a run of Weights & Biases or "
        f"a logger, got {type(log).__name__}"
    )


def _to_summary_writer(writer: Any) -> Sink:
    def write(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


# In this order: a SummaryWriter, a logger of Lightning, a run of Weights & Biases or the module.
_BY_METHOD: dict[str, Callable[[Any], Sink]] = {
    "add_scalar": _to_summary_writer,
    "log_metrics": lambda logger: lambda values, step: logger.log_metrics(values, step=step),
    "log": lambda run: lambda values, step: run.log(values, step=step),
}


def _in_words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
