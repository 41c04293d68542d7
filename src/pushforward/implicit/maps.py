"""A map of a state to a state of the same form, seen as a map of flat samples (B, n) -> (B, n)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pushforward.boundary import Layout, Structure
from pushforward.errors import InputError, ShapeError
from pushforward.explaining import function_name
from pushforward.purity import RandomState, untouched

BatchDim = int | None | Literal["auto"]


@dataclass(frozen=True, eq=False)
class StateMap:
    """A map f of states that are laid out alike before and after."""

    function: Callable[..., Any]
    layout: Layout

    @staticmethod
    def of(function: Callable[..., Any], state: Any, batch_dim: BatchDim) -> StateMap:
        """Check a state and take its form.

        Raises:
            InputError: f cannot be called, or the state has leaves that are no floats.
            ShapeError: leaves of the state disagree on the size of the batch.
        """
        if not callable(function):
            raise InputError(
                f"expected a function or module f to iterate, got {type(function).__name__}; "
                "pass f itself, not its value"
            )
        values, layout = Layout.of(state, _batch_dim_of(state, batch_dim), "state")
        if not values or any(not leaf.differentiable for leaf in layout.leaves):
            raise InputError(
                "expected a state of floating-point or complex tensors, got "
                f"{layout.describe()}; let f close over what it does not iterate"
            )
        return StateMap(function, layout)

    @property
    def name(self) -> str:
        return function_name(self.function)

    @property
    def batched(self) -> bool:
        return self.layout.batch is not None

    def flatten(self, state: Any) -> Tensor:
        """State -> (B, n), detached, in single precision at least; B is 1 without a batch."""
        packed = self.layout.pack(state)
        assert packed is not None  # the layout was taken from this state
        flat = (packed[0] if self.batched else packed).detach().clone()
        return flat.float() if flat.dtype.itemsize < 4 else flat

    def unflatten(self, flat: Tensor) -> Any:
        """(B, n) -> state."""
        return self.layout.unpack(flat if self.batched else flat[0])

    def per_sample(self, values: Tensor) -> Tensor:
        """(..., B) -> (..., B), or (...) where there is no batch."""
        return values if self.batched else values[..., 0]

    def __call__(self, flat: Tensor) -> Tensor:
        """(B, n) -> (B, n). The function sees a copy: it may write to its argument."""
        value = self.function(self.unflatten(flat.clone()))
        packed = self.layout.pack(value)
        if packed is None:
            raise ShapeError(
                f"{self.name} is expected to return what it takes, {self.layout.describe()}, got "
                f"{_described(value)}; let it close over everything but the state"
            )
        return (packed[0] if self.batched else packed).to(flat.dtype)


def _batch_dim_of(state: Any, batch_dim: BatchDim) -> int | None:
    if batch_dim == "auto":
        leaves, _ = Structure.of(state)
        vectors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return 0 if vectors and all(leaf.dim() > 1 for leaf in vectors) else None
    if batch_dim is not None and (isinstance(batch_dim, bool) or batch_dim != 0):
        raise InputError(
            f'batch_dim expects None, 0 or "auto", got {batch_dim!r}; move the batch to dimension 0'
        )
    return batch_dim


def _described(value: Any) -> str:
    leaves, _ = Structure.of(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return type(value).__name__
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


class Evaluations:
    """Evaluations of a map that all draw the same random numbers (dropout keeps its mask)."""

    def __init__(self, f: StateMap) -> None:
        self.f = f
        self._before = RandomState.now()
        self._after: RandomState | None = None

    def __call__(self, flat: Tensor) -> Tensor:
        if self._after is not None and self.draws:
            self._before.restore()
        value = self.f(flat)
        if self._after is None:
            self._after = RandomState.now()
            self.draws = not _same(self._before, self._after)
        return value

    def settle(self) -> None:
        """Leave torch's generators as one call of the map leaves them."""
        if self._after is not None and self.draws:
            self._after.restore()


def _same(one: RandomState, other: RandomState) -> bool:
    # As bytes: to a plan that follows the ops of a map, comparing tensors would be a branch of it.
    pairs = zip((one.cpu, *one.cuda), (other.cpu, *other.cuda), strict=False)
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)


@contextmanager
def evaluations(f: StateMap) -> Iterator[Evaluations]:
    """Evaluate a map as often as need be; random numbers are drawn once, buffers stay as they are.

    What a call draws for dropout is drawn from torch's default generator, as by one call of f, so
    that masks differ from one step of training to the next.
    """
    made = Evaluations(f)
    try:
        with untouched(f.function):
            yield made
    finally:
        made.settle()
