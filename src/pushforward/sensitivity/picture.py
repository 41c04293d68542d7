"""A decision map as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pushforward.errors import MissingDependencyError

# Ten colours that are told apart on paper too; more classes begin again.
COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1"),
    *("#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#bab0ac"),
)
# Between the largest norm and the smallest that is told apart in colour.
DECADES = 6


@dataclass(frozen=True, eq=False)
class Grid:
    """Decisions and norms on a grid; see `DecisionMap`."""

    classes: Tensor
    norm: Tensor
    u: Tensor
    v: Tensor
    anchors: Tensor
    of: str


def plot(found: Grid) -> Any:
    """Two panels without pyplot, so that no window and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plot expects matplotlib, which is not installed; pip install 'pushforward[cli]'"
        ) from error
    figure = Figure(figsize=(10.5, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _draw_classes(left, found)
    _draw_norm(figure, right, found)
    for panel in (left, right):
        _draw_anchors(panel, found.anchors.cpu().numpy())
        panel.set_xlabel("distance in the input")
        panel.set_aspect("equal")
    return figure


def _draw_classes(panel: Any, found: Grid) -> None:
    """One colour for each class, named where there is room."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    classes = found.classes.cpu().numpy()
    palette = np.array([to_rgb(colour) for colour in COLOURS])
    panel.imshow(palette[classes % len(COLOURS)], origin="lower", extent=_extent(found))
    present = np.unique(classes)[:20]
    handles = [Patch(color=COLOURS[k % len(COLOURS)], label=str(k)) for k in present]
    panel.legend(handles=handles, fontsize=8, loc="upper right", framealpha=0.85)
    panel.set_title("decision", fontsize=10)


def _draw_norm(figure: Any, panel: Any, found: Grid) -> None:
    norm = found.norm.double().cpu().numpy()
    largest = norm.max() if norm.max() > 0 else 1.0
    decades = np.log10(np.maximum(norm, largest * 10.0**-DECADES))
    image = panel.imshow(decades, origin="lower", extent=_extent(found), cmap="viridis")
    figure.colorbar(image, ax=panel, shrink=0.85)
    _draw_borders(panel, found)
    panel.set_title(f"log₁₀ ‖J‖ of the {found.of}, and the borders", fontsize=10)


def _draw_borders(panel: Any, found: Grid) -> None:
    u, v, classes = (each.cpu().numpy() for each in (found.u, found.v, found.classes))
    for k in np.unique(classes)[1:] if len(np.unique(classes)) > 1 else ():
        panel.contour(u, v, classes == k, levels=[0.5], colors="white", linewidths=0.8)


def _draw_anchors(panel: Any, anchors: Any) -> None:
    panel.plot(*anchors.T, "o", color="white", markeredgecolor="black", markersize=6)
    for name, place in zip("abc", anchors, strict=True):
        panel.annotate(
            name,
            place,
            xytext=(5, 5),
            textcoords="offset points",
            color="white",
            fontweight="bold",
        )


def _extent(found: Grid) -> tuple[float, float, float, float]:
    """The borders of the outermost cells."""
    u, v = found.u.tolist(), found.v.tolist()
    across, up = (u[1] - u[0]) / 2, (v[1] - v[0]) / 2
    return u[0] - across, u[-1] + across, v[0] - up, v[-1] + up
