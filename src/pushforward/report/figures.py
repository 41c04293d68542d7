"""The pictures of a report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.report.canvas import (
    BLUE,
    GREEN,
    ORANGE,
    Picture,
    draw,
    legend,
    log_axis,
    plain_numbers,
)
from pushforward.report.layer_figures import (
    ROWS,
    WIDTH,
    Rung,
    bound_by_depth,
    condensed,
    ladder,
    waterfall,
)
from pushforward.report.measure import Measurement
from pushforward.report.optional import require
from pushforward.report.summary import (
    NoiseMean,
    alive,
    gap,
    noise_means,
    spread_over_samples,
    steps,
)
from pushforward.report.verdict import departs, path_title
from pushforward.report.words import number


def pictures(measurement: Measurement) -> tuple[Picture, ...]:
    """All pictures that these numbers allow."""
    found: list[Picture] = []
    if alive(measurement).any():
        path = steps(measurement)
        rows = condensed(path, ROWS)
        found += [waterfall(rows, path_title(path)), bound_by_depth(rows, gap(measurement))]
        found.append(ladder(_rungs(measurement), path[0].level))
    if visible(measurement).any():
        found += [spectrum(measurement), distribution(measurement)]
    if measurement.noise:
        found.append(noise(measurement))
    return tuple(found)


def _rungs(measurement: Measurement) -> list[Rung]:
    labels = measurement.path.labels
    return [Rung(name, gap(measurement, name), label) for name, label in labels.items()]


def visible(measurement: Measurement) -> Tensor:
    """Which samples have a Jacobian that is not zero in the model's dtype, (B,)."""
    return measurement.jacobians.spectra.fro_norm > 0


# --- samples ------------------------------------------------------------------------------------


def spectrum(measurement: Measurement) -> Picture:
    """Singular values over samples."""
    found = measurement.jacobians.spectra
    low, middle, high = _bands(found.singular_values[visible(measurement)])
    ranks = spread_over_samples(found.effective_rank)
    full = min(measurement.shape)
    places = np.arange(1, len(middle) + 1)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        band = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": "80 % of samples"}
        axes.fill_between(places, low, high, **band)
        axes.plot(places, middle, color=BLUE, marker="o", markersize=4.5, label="median")
        axes.axvline(ranks.middle, color=ORANGE, linestyle=(0, (4, 3)), label="effective rank")
        log_axis(axes, "y")
        axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True))
        axes.set_xlabel("singular value, largest first")
        axes.set_ylabel("size (output per input)")
        legend(axes)

    first = f", the largest {len(middle)} shown" if full > len(middle) else ""
    return Picture(
        key="spectrum",
        title=f"About {number(ranks.middle, places=1)} of {full} directions carry the response",
        caption=(
            "A small ball around a sample becomes an ellipsoid in the output; these are its "
            f"half-axes{first}. The dashed line is the effective rank (Σs²)² / Σs⁴: how many equal "
            "axes would spread the response as widely. The band leaves out the lowest and the "
            "highest tenth of the samples."
        ),
        alt=(
            "Singular values in falling order on a logarithmic axis, medians over samples: "
            + ", ".join(number(value) for value in middle[:10])
            + f". Median effective rank {number(ranks.middle)}."
        ),
        svg=draw("spectrum", (WIDTH, 3.4), paint),
    )


def _bands(values: Tensor) -> tuple[list[float], list[float], list[float]]:
    """First tenth, median and last tenth of each column of (B, k); zeros give way to gaps."""
    spans = [spread_over_samples(column) for column in values.T]
    floor = values.max().item() * 1e-12
    return (
        [max(span.low, floor) for span in spans],
        [span.middle if span.middle > floor else math.nan for span in spans],
        [max(span.high, floor) for span in spans],
    )


def distribution(measurement: Measurement) -> Picture:
    """Norms and radii over samples."""
    found, decision = measurement.jacobians.spectra, measurement.jacobians.margins
    living = visible(measurement)
    radii = None if decision is None else _drawable(decision.radius)
    norms = found.spectral_norm[living]

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, 1 if radii is None else 2, squeeze=False)[0]
        whole = found.fro_norm[living]
        _histogram(panels[0], {"spectral": (norms, BLUE), "Frobenius": (whole, GREEN)})
        panels[0].set_xlabel("norm of the Jacobian")
        panels[0].set_ylabel("samples")
        if radii is not None:
            _histogram(panels[1], {"radius": (radii, ORANGE)})
            panels[1].set_xlabel("distance to the nearest other class")

    return Picture(
        key="distribution",
        title=_distribution_title((norms.max() / norms.median()).item()),
        caption=(
            "How many samples have which norm"
            + (
                "."
                if radii is None
                else " (left) and which robustness radius (right): the length of the smallest "
                "change of the input that changes the class if the logits were straight planes. It "
                "is a prediction to first order and no guarantee."
            )
        ),
        alt=_distribution_words(measurement, radii),
        svg=draw("distribution", (WIDTH, 3.0), paint),
    )


def _distribution_title(factor: float) -> str:
    if factor < 1.2:
        return "All samples are about equally sensitive"
    return (
        f"The most sensitive sample responds {number(factor, places=1)} times as strongly as the "
        "median one"
    )


def _drawable(radius: Tensor) -> Tensor | None:
    kept = radius[torch.isfinite(radius) & (radius > 0)]
    return kept if len(kept) else None


def _distribution_words(measurement: Measurement, radii: Tensor | None) -> str:
    norms = spread_over_samples(measurement.jacobians.spectra.spectral_norm)
    words = (
        f"Histogram of the spectral norm over samples: median {number(norms.middle)}, four fifths "
        f"between {number(norms.low)} and {number(norms.high)}."
    )
    if radii is None:
        return words
    span = spread_over_samples(radii)
    return (
        f"{words} Histogram of the robustness radius: median {number(span.middle)}, four fifths "
        f"between {number(span.low)} and {number(span.high)}."
    )


def _histogram(axes: Any, groups: dict[str, tuple[Tensor, str]]) -> None:
    """Histograms with common bins that are equally wide in logarithms."""
    values = [group.log10().cpu().numpy() for group, _ in groups.values()]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    pad = 0.02 + 0.02 * (high - low)
    edges = 10 ** np.linspace(low - pad, high + pad, 19)
    for (name, (group, colour)), _ in zip(groups.items(), values, strict=True):
        axes.hist(group.cpu().numpy(), bins=edges, color=colour, alpha=0.35, label=name)
        axes.hist(group.cpu().numpy(), bins=edges, color=colour, histtype="step", linewidth=1.6)
    log_axis(axes, "x")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, nbins=5))
    if len(groups) > 1:
        legend(axes)


# --- noise --------------------------------------------------------------------------------------


def noise(measurement: Measurement) -> Picture:
    """The response to noise against its size, beside what the Jacobian predicts."""
    levels = noise_means(measurement)
    sigmas = [level.sigma for level in levels]
    ratios = [level.ratio for level in levels]
    linear = levels[0].linear

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        band = ([level.low for level in levels], [level.high for level in levels])
        axes.fill_between(sigmas, *band, color=BLUE, alpha=0.25, linewidth=0, label="95 % interval")
        axes.plot(sigmas, ratios, color=BLUE, marker="o", markersize=4.5, label="measured")
        axes.axhline(
            linear, color=ORANGE, linestyle=(0, (4, 3)), linewidth=2, label="linear prediction"
        )
        log_axis(axes, "x")
        top = max(*band[1], linear, 1e-300)
        axes.set_ylim(-0.04 * top, 1.1 * top)
        axes.yaxis.set_major_formatter(plain_numbers())
        axes.set_xlabel("standard deviation σ of the noise on each input")
        axes.set_ylabel("E|f(x+e) − f(x)|² / E|e|²")
        legend(axes)

    return Picture(
        key="noise",
        title=noise_title(levels[-1]),
        caption=(
            "How much of the power of Gaussian noise comes out, as the noise grows. For little "
            "noise it is what the Jacobian predicts, ‖J‖² over the number of inputs (dashed); "
            "where the line leaves it, the map is no longer linear at that scale, and derivatives "
            "stop being a guide. Means over samples; the spread of the data is "
            f"{number(measurement.spread)}."
        ),
        alt=(
            "Response to noise by sigma, measured: "
            + ", ".join(f"{number(s)}: {number(r)}" for s, r in zip(sigmas, ratios, strict=True))
            + f". The linear prediction is {number(linear)}."
        ),
        svg=draw("noise", (WIDTH, 3.3), paint),
    )


def noise_title(largest: NoiseMean) -> str:
    """What the picture shows at its right end."""
    if not largest.resolved:
        return "The response to noise drowns in rounding"
    if not departs(largest):
        return f"The map answers noise as the Jacobian says, up to σ = {number(largest.sigma)}"
    way = "more" if largest.ratio > largest.linear else "less"
    return f"Large noise is amplified {way} than the Jacobian predicts"
