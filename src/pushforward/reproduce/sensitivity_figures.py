"""The scatter of gaps and norms, and norms along ellipses through images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pushforward.report.canvas import BLUE, GREEN, INK, MUTED, ORANGE, Picture, draw, log_axis
from pushforward.report.words import number
from pushforward.reproduce.curves import Curve, paint_curves
from pushforward.reproduce.paper import Outcome

KINDS = {"right labels": BLUE, "moved images": GREEN, "wrong labels": ORANGE}
PATHS = {"different classes": ORANGE, "one class": BLUE, "pixels at random": MUTED}


def figures(outcomes: Sequence[Outcome]) -> tuple[Picture, ...]:
    """The scatter over all seeds, the factors, and the paths."""
    return scatter(outcomes), along_the_paths(outcomes)


def scatter(outcomes: Sequence[Outcome]) -> Picture:
    """Gap against norm, of probabilities and of logits."""
    nets = [net for outcome in outcomes for net in outcome.drawn["population"]]
    fitted = [net for net in nets if net.train_accuracy == 100]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, name in ((left, "norm"), (right, "norm_of_logits")):
            for kind, colour in KINDS.items():
                some = [net for net in fitted if net.kind == kind]
                x, y = [getattr(net, name) for net in some], [net.gap for net in some]
                axes.plot(x, y, "o", color=colour, markersize=5, alpha=0.8, label=kind)
            log_axis(axes, "x")
        left.set_xlabel("mean ‖J‖ of the probabilities")
        right.set_xlabel("mean ‖J‖ of the logits")
        left.set_ylabel("generalisation gap, points")
        _legend_above(figure, left)

    rho = _mean_of(outcomes, "rank correlation, probabilities")
    of_logits = _mean_of(outcomes, "rank correlation, logits")
    return Picture(
        key="scatter",
        title="Generalisation gap against the norm of the Jacobian",
        caption=(
            f"Each dot is a network that classifies all of its training images as labelled: "
            f"{len(fitted)} of {len(nets)}. Norms are means over test images. After section 4.3 "
            "of the paper, which takes probabilities."
        ),
        alt=f"Two scatter plots. Rank correlation of gap and norm: {number(rho)} for "
        f"probabilities, {number(of_logits)} for logits.",
        svg=draw("scatter", (7.8, 3.6), paint),
    )


def along_the_paths(outcomes: Sequence[Outcome]) -> Picture:
    """Norms and transitions along ellipses through three images."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        paint_curves(left, _norms(outcomes), marker=None)
        paint_curves(right, _transitions(outcomes), marker=None)
        for axes in (left, right):
            for place in (0, 120, 240):
                axes.axvline(place, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.set_xticks(range(0, 361, 60))
            axes.set_xlabel("angle on the ellipse, degrees")
        left.set_ylabel("log₁₀ ‖J‖ of the probabilities")
        right.set_ylabel("units that change in a step, %")
        _legend_above(figure, left)

    apart, alike = (_mean_of(outcomes, f"norm on path, {name}") for name in list(PATHS)[:2])
    return Picture(
        key="paths",
        title="Along ellipses through three training images",
        caption=(
            "Left: the norm. Right: hidden units that pass to another linear piece in a step. "
            "Images lie at the dotted lines; means over paths, bands of one standard deviation "
            "over seeds. After section 4.1 of the paper."
        ),
        alt=f"Norms are low at the images and high between them; their means are {number(apart)} "
        f"between classes and {number(alike)} within one.",
        svg=draw("paths", (7.8, 3.6), paint),
    )


def _legend_above(figure: Any, axes: Any) -> None:
    """One legend over all panels, which keep their widths."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), labelcolor=INK)


def _norms(outcomes: Sequence[Outcome]) -> dict[str, Curve]:
    return {
        name: _curve(name, 360 / norms.shape[1], 0.0, norms.log10())
        for name, norms in _along(outcomes, "norms").items()
    }


def _transitions(outcomes: Sequence[Outcome]) -> dict[str, Curve]:
    """Means over windows of a thirty-sixth of the ellipse: single steps hold few transitions."""
    curves = {}
    for name, changes in _along(outcomes, "transitions").items():
        steps = changes.shape[1] + 1
        window = max(1, steps // 36)
        means = changes.unfold(1, window, window).mean(2)
        curves[name] = _curve(name, 360 * window / steps, 0.5, means)
    return curves


def _along(outcomes: Sequence[Outcome], what: str) -> dict[str, Tensor]:
    """(seeds, places) for each kind of path."""
    drawn = [outcome.drawn["along"] for outcome in outcomes]
    return {name: torch.stack([along[name][what] for along in drawn]) for name in PATHS}


def _curve(name: str, degrees: float, first: float, values: Tensor) -> Curve:
    """Values at angles ``degrees`` apart, from ``first`` of that on."""
    angles = [(first + place) * degrees for place in range(values.shape[1])]
    return Curve(angles, values.numpy(), PATHS[name], dashed=name == "pixels at random")


def _mean_of(outcomes: Sequence[Outcome], name: str) -> float:
    return sum(outcome.numbers[name] for outcome in outcomes) / len(outcomes)
