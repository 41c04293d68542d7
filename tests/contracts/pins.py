"""Pins on what PyTorch does: each fails loudly, with what to look at again, once that changes."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# Forward mode compiles its decompositions by a function that torch itself has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def pinned(holds: bool | Tensor, what: str, revisit: str) -> None:
    """Fail where PyTorch no longer does ``what``, and say what stands on it here."""
    assert bool(holds), f"PyTorch changed: no longer {what}; revisit {revisit}"


@contextmanager
def pinned_raise(match: str, what: str, revisit: str, error: type[Exception] = RuntimeError):
    """Fail where a call that PyTorch refuses goes through, or is refused for another reason."""
    try:
        with pytest.raises(error, match=match):
            yield
    except BaseException as failure:
        raise AssertionError(
            f"PyTorch changed: no longer {what} ({failure}); revisit {revisit}"
        ) from failure


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return ((actual - expected).norm() / expected.norm()).item()


def second_derivative(f: Callable[[Tensor], Tensor], x: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """d/dx of (<c, f> derived along v), by plain reverse mode over reverse mode."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((f(x) * c).sum(), x, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), x)[0]


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
