"""Decision cells: which class a network gives each point of a plane through three images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pushforward.report.canvas import INK, MUTED
from pushforward.report.optional import require
from pushforward.reproduce.training import outputs

MARGIN = 0.6  # how far the picture reaches beyond the images, as a part of their extent


@dataclass(frozen=True)
class Plane:
    """Points (r, r, *image) of a plane, and where in it, (3, 2), the three images lie.

    ``extent`` is left, right, bottom, top in Euclidean distance, as matplotlib takes it.
    """

    points: Tensor
    corners: Tensor
    extent: tuple[float, float, float, float]


@dataclass(frozen=True)
class Cells:
    """Class and probability of the class at each point of a plane, (r, r) each."""

    classes: Tensor
    confidence: Tensor


def plane_through(images: Sequence[Tensor], resolution: int) -> Plane:
    """The plane of three images; orthonormal axes, the first one from image to image."""
    a, b, c = images
    first = (b - a).flatten().double()
    second = (c - a).flatten().double()
    along = first / first.norm()
    across = second - (second @ along) * along
    axes = torch.stack([along, across / across.norm()])
    corners = torch.stack([torch.zeros_like(first), first, second]) @ axes.T
    low, high = corners.amin(0), corners.amax(0)
    reach = MARGIN * (high - low).amax()
    xs, ys = (
        torch.linspace(float(start - reach), float(stop + reach), resolution, dtype=torch.float64)
        for start, stop in zip(low, high, strict=True)
    )
    places = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)
    points = (a.flatten().double() + places @ axes).to(a.dtype)
    extent = (float(xs[0]), float(xs[-1]), float(ys[0]), float(ys[-1]))
    return Plane(points.reshape(resolution, resolution, *a.shape), corners, extent)


def three_digits(x: Tensor, y: Tensor, classes: Sequence[int]) -> list[Tensor]:
    """The first image of each of three classes."""
    return [x[(y == each).nonzero()[0, 0]] for each in classes]


def cells(model: nn.Module, plane: Plane) -> Cells:
    """What ``model`` says at each point of ``plane``."""
    found = outputs(model, plane.points.flatten(0, 1)).softmax(1).max(1)
    shape = plane.points.shape[:2]
    return Cells(found.indices.reshape(shape), found.values.reshape(shape))


def paint_cells(
    figure: Any, plane: Plane, panels: Mapping[str, Cells], digits: Sequence[int]
) -> None:
    """One panel for each network; hues are classes, paler where the probability is lower."""
    for axes, (name, found) in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True
    ):
        axes.imshow(_colours(found), origin="lower", extent=plane.extent, interpolation="nearest")
        axes.set_title(name, fontsize=10.5, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        for (x, y), digit in zip(plane.corners.tolist(), digits, strict=True):
            axes.plot(x, y, "o", color="black", markersize=13)
            axes.text(x, y, str(digit), color="white", ha="center", va="center", fontsize=9)
    figure.supxlabel("Euclidean distance in the plane of three test images", color=MUTED)


def _colours(found: Cells) -> np.ndarray:
    """RGB on white, the share of the hue growing with the probability."""
    hues = np.asarray(require("matplotlib").colormaps["tab10"].colors)
    share = (0.15 + 0.75 * found.confidence.double().numpy())[..., None]
    return share * hues[found.classes.numpy()] + (1 - share)
