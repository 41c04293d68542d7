"""Curves with a band that shows the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Values (seeds, points) at ``places``, drawn as mean and one standard deviation."""

    places: Sequence[float]
    values: np.ndarray
    colour: str
    dashed: bool = False


def paint_curves(axes: Any, curves: Mapping[str, Curve], marker: str | None = "o") -> None:
    """All curves by their names, the last one on top."""
    for name, curve in curves.items():
        mean = curve.values.mean(0)
        line = (0, (4, 3)) if curve.dashed else "-"
        axes.plot(
            curve.places,
            mean,
            color=curve.colour,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            label=name,
        )
        if len(curve.values) > 1:
            spread = curve.values.std(0, ddof=1)
            axes.fill_between(
                curve.places,
                mean - spread,
                mean + spread,
                color=curve.colour,
                alpha=0.18,
                linewidth=0,
            )
