"""The pictures of the way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pushforward.report.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Picture,
    draw,
    legend,
)
from pushforward.report.summary import Step
from pushforward.report.words import number, readable, signed

ROWS = 32  # layers that a picture names; runs of the smallest others are drawn as one
NAME_LENGTH = 30
WIDTH = 5.6
TOTAL = "whole network"
SIZE_LABEL = "size of the derivative of the output, log₁₀"


def condensed(path: Sequence[Step], rows: int) -> tuple[Step, ...]:
    """At most about ``rows`` steps: runs of those with the smallest gains become one step each."""
    if len(path) <= rows:
        return tuple(path)
    by_gain = sorted(range(len(path)), key=lambda place: -abs(path[place].gain))
    # Each kept step may be followed by a run, so that half of the rows are kept.
    kept = {*by_gain[: rows // 2], 0, len(path) - 1}
    found: list[Step] = []
    run: list[Step] = []
    for place, step in enumerate(path):
        if place in kept:
            found += [*_merged(run), step]
            run = []
        else:
            run.append(step)
    return (*found, *_merged(run))


def _merged(run: Sequence[Step]) -> list[Step]:
    if len(run) <= 1:
        return list(run)
    first = run[0]
    gain = sum(step.gain for step in run)
    exact = all(step.exact for step in run)
    name = f"({len(run)} smaller steps)"
    return [Step(name, gain, first.level, first.bound, exact, first.mixed)]


def shown(name: str) -> str:
    """A name that fits beside a picture, its middle left out where it is long."""
    name = readable(name)
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def waterfall(rows: Sequence[Step], title: str) -> Picture:
    """How the norm of the derivative builds up from the output back to the input."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        _bars(axes, rows)
        _name_rows(axes, [TOTAL, *(shown(step.name) for step in rows)])
        _write_gains(axes, [rows[0].level, *(step.gain for step in rows)])
        axes.set_xlabel(SIZE_LABEL)

    total = rows[0].level
    return Picture(
        key="gains",
        title=title,
        caption=(
            "Read it from below. The lowest bar is the derivative of the output by the input of "
            "the last layer. Each bar above it is what one more layer multiplies to its size: "
            "to the right it gains, to the left it loses. Together they give log₁₀‖J‖ = "
            f"{signed(total)}, exactly. Means over samples."
        ),
        alt=(
            "Waterfall chart of the gain of each layer in decades, from the input to the output: "
            + ", ".join(f"{shown(step.name)} {step.gain:+.2f}" for step in rows)
            + f". The total is {total:.2f}."
        ),
        svg=draw("gains", (WIDTH, _height(rows)), paint),
    )


def _height(rows: Sequence[Step]) -> float:
    return 1.05 + 0.25 * max(3, len(rows))


def _bars(axes: Any, rows: Sequence[Step]) -> None:
    """The total, and under it row by row from the level behind the step to the level before it."""
    axes.barh(0, rows[0].level, height=0.66, color=INK)
    behind = [*(step.level for step in rows[1:]), 0.0]
    for place, (step, start) in enumerate(zip(rows, behind, strict=True), start=1):
        last = place == len(rows)
        colour = MUTED if last else BLUE if step.gain >= 0 else ORANGE
        axes.barh(place, step.level - start, left=start, height=0.66, color=colour)
        axes.plot([step.level, step.level], [place - 1, place], color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.margins(x=0.06)
    axes.grid(visible=False, axis="y")


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)


def _write_gains(axes: Any, gains: Sequence[float]) -> None:
    """The numbers, at the right edge, where no bar covers them."""
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(gains)), [signed(gain) for gain in gains])
    right.spines["right"].set_visible(False)
    right.tick_params(axis="y", length=0, labelcolor=MUTED)


def bound_by_depth(rows: Sequence[Step], distance: float) -> Picture:
    """Products of the norms of layers beside the truth, from the output back."""
    exact = all(step.exact for step in rows)
    kind = "bound" if exact else "estimated bound"

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        places = list(range(len(rows)))
        truth, bound = [step.level for step in rows], [step.bound for step in rows]
        axes.fill_betweenx(places, truth, bound, color=ORANGE, alpha=0.14, linewidth=0)
        axes.plot(truth, places, color=BLUE, marker="o", markersize=4.5, label="truth")
        label = f"Frobenius {kind}"
        axes.plot(bound, places, color=ORANGE, marker="s", markersize=4.5, label=label)
        mixed = [step.mixed for step in rows]
        if None not in mixed:
            label = "mixed bound"
            axes.plot(mixed, places, color=GREEN, marker="^", markersize=4.5, label=label)
        _name_rows(axes, [shown(step.name) for step in rows])
        axes.set_xlabel(SIZE_LABEL)
        legend(axes)

    return Picture(
        key="bound",
        title=(
            f"The product of norms ends {number(distance, places=1)} decades above the truth"
            if exact
            else f"The {kind} ends {number(distance, places=1)} decades above the truth"
        ),
        caption=(
            "At each layer, the derivative of the output by what enters that layer: its true size "
            "and the product of the Frobenius norms from there to the output, which the size "
            "cannot exceed. The shaded distance is what the product forgets about directions: "
            "where it widens, the bound says little. The mixed bound, one Frobenius norm among "
            "spectral ones, forgets less. Means over samples."
        ),
        alt=(
            "Two lines by layer, from the output at the bottom to the input at the top: the truth "
            f"ends at {rows[0].level:.2f}, the {kind} at {rows[0].bound:.2f} in log10."
        ),
        svg=draw("bound", (WIDTH, _height(rows)), paint),
    )


@dataclass(frozen=True)
class Rung:
    """A bound in decades above the truth, and what it is: certified, probable or an estimate."""

    name: str
    distance: float
    label: str


def ladder(rungs: Sequence[Rung], truth: float) -> Picture:
    """The bounds beside the truth, each as far as it is above it."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, rung in enumerate(rungs):
            certified = rung.label == "certified"
            colour, hatch = (GREEN, None) if certified else (ORANGE, "////")
            bar = {"left": truth, "height": 0.6, "color": colour, "hatch": hatch, "alpha": 0.85}
            axes.barh(place, rung.distance, **bar)
        axes.axvline(truth, color=BLUE, linewidth=2)
        names = [f"{rung.name}, {rung.label}" for rung in rungs]
        axes.set_ylim(len(rungs) - 0.4, -0.6)
        axes.set_yticks(range(len(rungs)), names)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.margins(x=0.06)
        axes.grid(visible=False, axis="y")
        _write_gains(axes, [rung.distance for rung in rungs])
        axes.set_xlabel(SIZE_LABEL)

    best = min(rungs, key=lambda rung: rung.distance)
    return Picture(
        key="ladder",
        title=_ladder_title(best),
        caption=(
            "Bounds on ‖J‖ from the layers, in decades above the truth (line). Frobenius: the "
            "product of all Frobenius norms. Spectral: the product of the largest singular "
            "values, times the root of the narrowest width. Mixed: one Frobenius norm, the others "
            "spectral. Segments: the same over groups of layers whose Jacobians are taken whole, "
            "as many as a budget allows. Hatched bars are no certified bounds. Means over samples."
        ),
        alt=(
            "Bars from the truth to each bound, in decades above it: "
            + ", ".join(f"{rung.name} {rung.distance:.2f} ({rung.label})" for rung in rungs)
            + "."
        ),
        svg=draw("ladder", (WIDTH, 1.0 + 0.3 * len(rungs)), paint),
    )


def _ladder_title(best: Rung) -> str:
    if best.distance < MEETS:
        return f"The ladder of bounds comes down to the truth at its {best.name} rung"
    far = number(best.distance, places=1)
    return f"The best rung of the ladder, {best.name}, is {far} decades above the truth"


MEETS = 0.05  # decades
