"""Decision cells of several networks, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.report.canvas import INK, MUTED
from pushforward.report.optional import require
from pushforward.sensitivity import DecisionMap


def three_digits(x: Tensor, y: Tensor, classes: Sequence[int]) -> list[Tensor]:
    """The first image of each of three classes."""
    return [x[(y == each).nonzero()[0, 0]] for each in classes]


def paint_cells(figure: Any, panels: Mapping[str, DecisionMap], digits: Sequence[int]) -> None:
    """One panel for each network; hues are classes, white where its answer is most sensitive."""
    steepest = torch.stack([found.norm for found in panels.values()]).amax().item()
    rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (name, found) in zip(rows[0], panels.items(), strict=True):
        axes.imshow(_colours(found, steepest), origin="lower", extent=_extent(found))
        axes.set_title(name, fontsize=10.5, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        for (x, y), digit in zip(found.anchors.tolist(), digits, strict=True):
            axes.plot(x, y, "o", color="black", markersize=13)
            axes.text(x, y, str(digit), color="white", ha="center", va="center", fontsize=9)
    figure.supxlabel("the plane through three test images", color=MUTED, fontsize=10.5)


def _extent(found: DecisionMap) -> tuple[float, float, float, float]:
    return (*found.u[[0, -1]].tolist(), *found.v[[0, -1]].tolist())


def _colours(found: DecisionMap, steepest: float) -> np.ndarray:
    """RGB, the hue of a class fading with the root of the norm."""
    hues = np.asarray(require("matplotlib").colormaps["tab10"].colors)
    fading = (found.norm.double().numpy() / max(steepest, 1e-300))[..., None] ** 0.5
    return hues[found.classes.numpy()] * (1 - fading) + fading
