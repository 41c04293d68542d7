"""Matplotlib figures as SVG that takes its colours and fonts from the page around it.

Colours are drawn as stand-ins, which become CSS variables, so that one picture is legible in dark
and in light; text stays text. Nothing here touches pyplot or leaves a setting changed.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pushforward.report.optional import require
from pushforward.report.words import number

# Stand-ins: none of them may occur in a drawing by chance.
INK, MUTED, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
BLUE, ORANGE, GREEN, PURPLE = "#0d0e0f", "#101112", "#131415", "#161718"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # names of layers are not formulas
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Picture:
    """An SVG element, what it shows, how to read it, and the same in words for those who cannot."""

    key: str
    title: str
    caption: str
    alt: str
    svg: str


def draw(key: str, size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """Let ``paint`` fill a matplotlib figure of ``size`` inches; the SVG element for a page."""
    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # The font that measures the text need not be the one that shows it.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from.*font")
        figure = figures.Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), key)


def _for_page(svg: str, key: str) -> str:
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"'DejaVu Sans'(?:, [^;\"]+)?", "var(--sans)", svg)
    # A style element would reach the whole page, which sets this for pictures itself.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # Several drawings share a page, so their names must differ.
    svg = re.sub(r'(\bid=")', rf"\g<1>{key}-", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", svg, count=2).strip()


# --- parts of drawings -------------------------------------------------------------------------


def legend(axes: Any) -> None:
    """Above the drawing, where it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        ncols=3,
        labelcolor=INK,
        columnspacing=1.4,
        handlelength=1.6,
        borderaxespad=0,
    )


def plain_numbers() -> Any:
    """A formatter for ticks without offsets and trailing zeros."""
    return require("matplotlib.ticker").FuncFormatter(lambda value, _: number(value))


def log_axis(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, or at powers of ten where it is long."""
    ticker = require("matplotlib.ticker")
    axis = axes.xaxis if which == "x" else axes.yaxis
    scale: Callable[[str], None] = axes.set_xscale if which == "x" else axes.set_yscale
    scale("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    span = math.log10(high / low)
    marks = (1.0, 2.0, 5.0) if span < 2 else (1.0, 3.0) if span < 3 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=marks, numticks=12))
    axis.set_major_formatter(plain_numbers())
    axis.set_minor_locator(ticker.NullLocator())
