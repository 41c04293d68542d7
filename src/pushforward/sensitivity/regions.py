"""How many linear regions of a network a path crosses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import CouplingError, InputError, MemoryBudgetError, ShapeError
from pushforward.sensitivity.bar import Advance, progress_bar
from pushforward.sensitivity.calls import tensors_of
from pushforward.sensitivity.codes import Codes, codes_of

POINTS = 1024  # of a path, taken at once where the budget allows it
MEMORY = 2**28
# Activations alive at once, in units of all codes, each as wide as an entry of the input.
COPIES = 4


def linear_regions(
    model: Callable[[Tensor], Any],
    path: Tensor,
    *,
    pooling: bool = False,
    memory: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Count, for each step of a path, the units that pass to another of their linear pieces.

    .. math::
        t_i = \#\{\,\text{units } u : c_u(x_{i+1}) \ne c_u(x_i)\,\}, \quad 0 \le i < T - 1

    where the code c_u says on which piece the unit is: 0 or 1 for ReLU and leaky units, 0, 1 or 2
    for ReLU6, hard-tanh and clamps of both sides. A network of such units is linear where no code
    changes, so that the sum counts the borders between linear regions that the path meets, as well
    as its steps tell them apart (Novak et al., "Sensitivity and generalization in neural networks:
    an empirical study", ICLR 2018).

    The model is followed op by op while it runs: modules, functions and in-place forms count alike.
    Units are ReLU, ReLU6, leaky, parametric and (evaluated) randomised ReLU, hard-tanh,
    hard-sigmoid, clamp, threshold, hard- and soft-shrink, absolute values, the larger or smaller
    of two, and masks made by comparisons. Softmax, log-softmax and sigmoid are allowed as the last
    op, where they bend no region.

    Args:
        model: a module or function of a batch of points, in the mode that it is in.
        path: points along a path, ``(T, *in)``; it is left open.
        pooling: count a change of winner in max pooling too, one unit for each window. It borders
            linear regions as well, but is none of the units above.
        memory: a budget in bytes for activations; the path is taken in parts that fit.
        progress: whether to show a bar on standard error; None shows one on a terminal, where the
            work is long.

    Returns:
        ``(T - 1,)``, integer.

    Raises:
        InputError: a unit that is smooth (tanh, GELU, softmax inside the model, layer
            normalisation), random (dropout in training mode), or different from point to point.
        ShapeError: ``path`` has no points.
        CouplingError: points influence each other (batch normalisation in training mode).
        NotAvailableError: an op of which it is not known whether it is piecewise linear, or a
            branch in Python on a value.
        MemoryBudgetError: not even two points fit in ``memory``.

    Cost: one forward pass for each point; point by point, where the model mixes other dimensions
    with that of the batch.

    >>> path = torch.linspace(-1, 1, 6).unsqueeze(1)
    >>> linear_regions(torch.relu, path)
    tensor([0, 0, 1, 0, 0])
    >>> linear_regions(lambda x: x.clamp(-0.5, 0.5), path)
    tensor([0, 1, 0, 1, 0])
    """
    _check_path(model, path)
    pair = _checked_pair(model, path, pooling)
    alone = codes_of(model, path[:1], pooling)
    size = _points_at_once(alone, path, memory)
    with progress_bar("Linear regions", progress) as advance:
        if _first_is_batch(alone, pair):
            return _in_parts(model, path, pooling, size, advance)
        return _one_by_one(model, path, pooling, advance)


def _check_path(model: Any, path: Tensor) -> None:
    if not callable(model):
        raise InputError(f"linear_regions expects a model or function, got {type(model).__name__}")
    if not isinstance(path, Tensor) or not path.is_floating_point():
        came = path.dtype if isinstance(path, Tensor) else type(path).__name__
        raise InputError(f"linear_regions expects a floating-point path (T, *in), got {came}")
    if path.dim() == 0 or path.numel() == 0:
        raise ShapeError(
            f"linear_regions expects a path (T, *in) of one point or more, got {tuple(path.shape)}"
        )


def _points_at_once(alone: Codes, path: Tensor, memory: int | None) -> int:
    """How many steps fit, each with the activations of one point."""
    entries = path[0].numel() + sum(code.numel() for code in alone.units)
    needed = COPIES * path.element_size() * entries
    if memory is not None and 2 * needed > memory:
        raise MemoryBudgetError(
            f"memory={memory} bytes expects room for two points of the path, got about "
            f"{needed} bytes for each; allow more, or take a smaller model"
        )
    return min(POINTS, max(1, (memory or MEMORY) // needed - 1))


def _checked_pair(model: Any, path: Tensor, pooling: bool) -> Codes:
    """The first point and its neighbour, with the same output for the first beside any other,
    whether that comes after it or before.

    Raises:
        CouplingError: a point moves another one.
    """
    beside = (min(1, len(path) - 1), -1)
    pair, other = (codes_of(model, path[[0, place]], pooling) for place in beside)
    before = [codes_of(model, path[[place, 0]], pooling) for place in beside]
    compared = [*_outputs_at(0, pair, other), *_outputs_at(1, *before)]
    if not all(_agree(*both) for both in compared):
        raise CouplingError(
            "linear_regions expects points that do not influence each other, but the output at the "
            "first one depends on the others; call .eval() first, or let the model keep dimension "
            "0 apart"
        )
    return pair


def _first_is_batch(alone: Codes, pair: Codes) -> bool:
    """Whether dimension 0 of every code is that of the points: 1 for one, 2 for two of them."""
    shapes = [tuple(code.shape) for code in alone.units]
    expected = [(2, *shape[1:]) for shape in shapes if shape[:1] == (1,)]
    return len(expected) == len(shapes) and expected == [tuple(c.shape) for c in pair.units]


def _outputs_at(place: int, one: Codes, other: Codes) -> Iterator[tuple[Tensor, Tensor]]:
    """What two runs of two points say of the one at a place."""
    for a, b in zip(tensors_of(one.output), tensors_of(other.output), strict=True):
        if a.shape[:1] == (2,) and a.is_floating_point():
            yield a[place], b[place]


def _agree(one: Tensor, other: Tensor) -> bool:
    # The same shapes run through the same kernels: rounding is alike, or nearly so.
    slack = 100 * torch.finfo(one.dtype).eps * one.abs().amax() if one.numel() else 0.0
    return bool(((one - other).abs() <= slack).all())


def _in_parts(model: Any, path: Tensor, pooling: bool, size: int, advance: Advance) -> Tensor:
    """Parts overlap by one point, so that no step falls between two of them."""
    counts = [torch.zeros(0, dtype=torch.int64, device=path.device)]
    for start in range(0, len(path) - 1, size):
        part = path[start : start + size + 1]
        counts.append(_transitions(codes_of(model, part, pooling).units, part))
        advance(start + len(part) - 1, len(path) - 1)
    return torch.cat(counts)


def _transitions(units: Sequence[Tensor], part: Tensor) -> Tensor:
    """For each step within a part, the codes that change."""
    total = torch.zeros(len(part) - 1, dtype=torch.int64, device=part.device)
    for code in units:
        total += (code[1:] != code[:-1]).reshape(len(total), -1).sum(1)
    return total


def _one_by_one(model: Any, path: Tensor, pooling: bool, advance: Advance) -> Tensor:
    """Each point through the model alone: slow, and right whatever becomes of dimension 0."""
    counts, before = [], codes_of(model, path[:1], pooling).units
    for place in range(1, len(path)):
        after = codes_of(model, path[place : place + 1], pooling).units
        if [code.shape for code in before] != [code.shape for code in after]:
            raise InputError(
                "linear_regions expects the same units at every point, got other ones at point "
                f"{place}; take the branches of the model one by one"
            )
        counts.append(sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)))
        before = after
        advance(place, len(path) - 1)
    return torch.tensor(counts, dtype=torch.int64, device=path.device)
