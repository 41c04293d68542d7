"""A plane through three inputs: what a classifier decides on it, and how strongly it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.derivatives import jacobian
from pushforward.errors import InputError, ShapeError
from pushforward.sensitivity.batches import budget, over_samples
from pushforward.sensitivity.circle import check_points
from pushforward.sensitivity.norms import check_request, norm_of
from pushforward.sensitivity.picture import Grid, plot

# Around the three points, as a part of what they span.
MARGIN = 0.25


@dataclass(frozen=True, eq=False, repr=False)
class DecisionMap(Grid):
    """What `decision_map` returns; rows run upwards along ``v``, columns along ``u``.

    Attributes:
        classes: the decision at each point of the grid, ``(R, R)``, integer.
        norm: ||J||_F there, ``(R, R)``.
        u, v: the coordinates of columns and rows, ``(R,)``, in units of distance in the input.
        anchors: where a, b and c lie, ``(3, 2)``.
        of: what J is the Jacobian of.
    """

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: the decisions, and log10 ||J|| with their borders.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot(self)

    def __repr__(self) -> str:
        rows, columns = self.classes.shape
        found = self.classes.unique().tolist()
        low, high = self.norm.min().item(), self.norm.max().item()
        return f"DecisionMap({rows} x {columns}, classes {found}, ||J|| {low:.3g} to {high:.3g})"


def decision_map(
    model: Callable[[Tensor], Any],
    a: Tensor,
    b: Tensor,
    c: Tensor,
    resolution: int = 100,
    of: str = "probabilities",
    *,
    memory: int | None = None,
    progress: bool | None = None,
) -> DecisionMap:
    """Decisions and Jacobian norms of a classifier on the plane through three inputs.

    The plane is spanned by orthonormal directions, the first of them from a to b, so that
    distances on the map are distances in the input. The window is a square around the three points
    and a quarter of its size beyond them (the picture is that of Hoffman, Roberts and Yaida,
    "Robust learning with Jacobian regularization", 2019).

    Args:
        model: a module or function that gives logits ``(B, C)``, in the mode that it is in.
        a, b, c: three inputs of one shape ``(*in)``, not on one line.
        resolution: points along each side of the grid.
        of, memory, progress: as in `jacobian_norm`.

    Returns:
        `DecisionMap`, detached.

    Raises:
        InputError: ``resolution`` is less than 2, the points lie on one line.
        ShapeError: the points differ in shape, or no logits ``(B, C)`` come out.
        PushforwardError: for the reasons that `jacobian_norm` has.

    Cost: ``resolution`` squared evaluations with their Jacobians.

    >>> corners = torch.eye(3).unbind()
    >>> found = decision_map(lambda x: 5 * x, *corners, resolution=20)
    >>> found.classes.unique(), tuple(found.norm.shape)
    (tensor([0, 1, 2]), (20, 20))
    """
    check_points((a, b, c), "decision_map")
    _check_resolution(resolution)
    check_request(model, of)
    axes, anchors = _plane(torch.stack((a, b, c)).detach().flatten(1).double())
    u, v = _window(anchors, resolution)
    shifts = torch.cartesian_prod(v, u).flip(1) @ axes
    grid = (a.detach().flatten().double() + shifts).to(a.dtype).reshape(-1, *a.shape)

    def measured(rows: slice) -> tuple[Tensor, Tensor]:
        J = jacobian(model, grid[rows], batch_dim=0, memory=room)
        return _decided(J.value), norm_of(J, of, room).to(a.dtype)

    with torch.no_grad():
        room = budget(memory)
        found = over_samples(measured, len(grid), "Decision map", progress)
    classes, norms = (
        torch.cat(part).reshape(resolution, resolution) for part in zip(*found, strict=True)
    )
    return DecisionMap(classes, norms, u, v, anchors, of)


def _check_resolution(resolution: int) -> None:
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 2:
        raise InputError(f"resolution expects a whole number of at least 2, got {resolution!r}")


def _plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthonormal directions (2, n), and where three points (3, n) lie, the first at 0."""
    first, second = points[1] - points[0], points[2] - points[0]
    across = first / first.norm()
    rest = second - (second @ across) * across
    if not bool(rest.norm() > 1e-6 * second.norm()):
        raise InputError(
            "decision_map expects three points that span a plane, got points on one line; move one"
        )
    axes = torch.stack((across, rest / rest.norm()))
    return axes, (points - points[0]) @ axes.T


def _window(anchors: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The coordinates of a square around the points."""
    low, high = anchors.amin(0), anchors.amax(0)
    half = (high - low).max() * (0.5 + MARGIN)
    reach = torch.linspace(-1, 1, resolution, dtype=anchors.dtype, device=anchors.device) * half
    u, v = ((low + high) / 2).unsqueeze(1) + reach
    return u, v


def _decided(output: Tensor) -> Tensor:
    """The class of each sample."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeError(f"decision_map expects logits (B, C), got {came}")
    return output.detach().argmax(1)
