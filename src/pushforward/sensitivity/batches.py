"""Samples a few at a time: within a budget, with a progress bar, joined in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from pushforward.errors import InputError, MemoryBudgetError, ShapeError
from pushforward.sensitivity.bar import progress_bar

SAMPLES = 256  # taken at once, where the budget allows it
# For a measurement, which keeps no graph, where the caller names no budget.
MEMORY = 2**30

T = TypeVar("T")


def checked_batch(x: Tensor, name: str) -> None:
    """Refuse what is not a batch of floating-point samples."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} expects a real floating-point tensor (B, *in), got {came}")
    if x.dim() == 0 or math.prod(x.shape[1:]) == 0:
        raise ShapeError(
            f"{name} expects a batch (B, *in) of samples that have entries, got {tuple(x.shape)}; "
            "put one sample in a batch with x[None]"
        )


def budget(memory: int | None) -> int | None:
    """The bytes that a Jacobian may take; graphs that are wanted have no limit of our own."""
    return MEMORY if memory is None and not torch.is_grad_enabled() else memory


def over_samples(
    measured: Callable[[slice], T], count: int, title: str, progress: bool | None
) -> list[T]:
    """``measured`` of part after part of ``count`` samples, of fewer at once where many do not fit.

    Raises:
        MemoryBudgetError: not even one sample fits.
    """
    found: list[T] = []
    done, size = 0, _even(count, SAMPLES)
    with progress_bar(title, progress) as advance:
        while done < count:
            rows = slice(done, min(done + size, count))
            try:
                found.append(measured(rows))
            except MemoryBudgetError:
                if size == 1:
                    raise
                size = math.ceil(size / 2)
                continue
            done = rows.stop
            advance(done, count)
    return found


def _even(count: int, most: int) -> int:
    """The size of parts that are nearly alike, so that few shapes are planned for."""
    return math.ceil(count / max(1, math.ceil(count / most)))


def joined(parts: list[T]) -> T:
    """Records of tensors per sample, end to end."""
    first: Any = parts[0]
    names = [field.name for field in fields(first)]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return type(first)(**columns)
