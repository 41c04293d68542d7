"""Paths through input space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pushforward.errors import InputError, ShapeError


def great_circle(a: Tensor, b: Tensor, c: Tensor, steps: int) -> Tensor:
    r"""The ellipse through three points: a closed path that is left open.

    .. math::
        z(\theta) = \sum_{k=0}^{2} \frac{1 + 2\cos(\theta - 2\pi k/3)}{3}\, p_k, \quad
        (p_0, p_1, p_2) = (a, b, c), \quad \theta_i = 2\pi i / \text{steps}

    It lies in the plane of the three, around their mean, and passes through a, b and c at the
    angles 0, 2 pi / 3 and 4 pi / 3: exactly, where ``steps`` is a multiple of 3. Between two
    samples it leaves the segment that joins them, and the data with it (Novak et al., "Sensitivity
    and generalization in neural networks: an empirical study", ICLR 2018, section 4.1).

    Args:
        a, b, c: three points of one shape, real floating point, ``(*in)``.
        steps: how many points to take, at least 1.

    Returns:
        ``(steps, *in)``; differentiable with respect to the three points.

    Raises:
        InputError: the points are not real floating point, or ``steps`` is no positive number.
        ShapeError: the points differ in shape.

    >>> corners = torch.eye(3).unbind()
    >>> great_circle(*corners, steps=3)
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    check_points((a, b, c), "great_circle")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps expects a whole number of at least 1, got {steps!r}")
    points = torch.stack((a, b, c))
    weights = _weights(steps).to(points.device, points.dtype)
    return (weights @ points.reshape(3, -1)).reshape(steps, *a.shape)


def check_points(points: tuple[Tensor, ...], name: str) -> None:
    """Refuse points that do not lie in one space of real numbers."""
    for point in points:
        if not isinstance(point, Tensor) or not point.is_floating_point():
            came = point.dtype if isinstance(point, Tensor) else type(point).__name__
            raise InputError(f"{name} expects real floating-point points, got {came}; convert them")
    shapes = [tuple(point.shape) for point in points]
    if len(set(shapes)) > 1:
        raise ShapeError(f"{name} expects three points of one shape, got {shapes}")
    kinds = {(point.dtype, point.device) for point in points}
    if len(kinds) > 1:
        raise InputError(f"{name} expects points of one dtype on one device, got {kinds}")


def _weights(steps: int) -> Tensor:
    """(steps, 3), with the angles in whole numbers, so that a, b and c are met exactly."""
    turn = 3 * torch.arange(steps).unsqueeze(1) - steps * torch.arange(3)
    weights = (1 + 2 * torch.cos(2 * math.pi * turn.double() / (3 * steps))) / 3
    return torch.where(weights.abs() < 1e-15, 0.0, weights)
