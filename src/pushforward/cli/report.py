"""``pushforward report``: load, measure, write, say."""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pushforward import __version__
from pushforward.cli.console import print_table, print_text, progress
from pushforward.cli.output import output_folder
from pushforward.errors import InputError
from pushforward.report.data import FORMS, DataSet, held_out_digits, load_data
from pushforward.report.embedded import embedded_model
from pushforward.report.fitting import fitted
from pushforward.report.measure import Measurement, measure
from pushforward.report.models import LoadedModel, load_model
from pushforward.report.optional import require
from pushforward.report.payload import Report, to_json
from pushforward.report.randomness import fitting_threads
from pushforward.report.render import to_html
from pushforward.report.summary import Step, alive, gap, spread_over_samples, steps
from pushforward.report.verdict import verdict
from pushforward.report.words import number, readable
from pushforward.report.writing import write_together

NEEDED = ("rich", "jinja2", "matplotlib")
TABLE_ROWS = 12


def run_report(options: argparse.Namespace) -> int:
    """Write ``report.html`` and ``report.json`` and print a summary, or the JSON."""
    if options.model is None and options.weights is not None:
        raise InputError("--weights needs a MODEL to put them into, such as file.py:factory")
    for package in NEEDED:
        require(package)
    folder = output_folder(options.out)
    # What the user's code prints must not end up between the lines of our JSON.
    with contextlib.redirect_stdout(sys.stderr):
        report = build(options)
        written = to_json(report)
        page = to_html(report)
    write_together({folder / "report.html": page, folder / "report.json": written})
    if options.json:
        print(written, end="")
    else:
        summarise(report, folder / "report.html")
    return 0


def build(options: argparse.Namespace) -> Report:
    """Load, measure, and put it into words."""
    started = time.monotonic()
    model = _model(options)
    data = fitted(model.module, _data(options))
    title = f"Measuring {len(data.x)} samples"
    with fitting_threads(model.module, data.x), progress(title) as advance:
        measurement = measure(
            model.module,
            data,
            layers=options.layers,
            seed=options.seed,
            memory=options.memory,
            progress=advance,
        )
        provenance = _provenance(options, data, time.monotonic() - started)
    return Report(model, data, measurement, verdict(measurement, data.y), provenance)


def _model(options: argparse.Namespace) -> LoadedModel:
    if options.model is not None:
        return load_model(
            options.model,
            weights=options.weights,
            trust_code=options.trust_code,
            seed=options.seed,
        )
    with progress("Preparing the embedded model") as advance:
        return embedded_model(options.seed, advance)


def _data(options: argparse.Namespace) -> DataSet:
    if options.data is not None:
        return load_data(options.data, options.samples, options.seed)
    if options.model is not None:
        raise InputError(f"a model of yours needs data: add --data with {FORMS}")
    return held_out_digits(options.samples, options.seed)


def _provenance(options: argparse.Namespace, data: DataSet, seconds: float) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "memory": options.memory,
        "layers": options.layers,
        "device": str(data.x.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "pushforward": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


# --- what is printed ----------------------------------------------------------------------------


def summarise(report: Report, page: Path) -> None:
    """The verdict, the layers that matter, the key numbers, and where the rest is."""
    print_text(report.verdict.headline, style="bold")
    print_table(("layer", "gain", "so far", "bound"), layer_rows(steps(report.measurement)), 1)
    if alive(report.measurement).any():
        print_table(("bound", "above the truth", ""), rung_rows(report.measurement), 1)
    print_text("decades (log10) from the input to the output, means over samples; ~ is estimated")
    print_table(("over samples", "a tenth below", "median", "a tenth above"), key_rows(report), 1)
    for sentence in report.verdict.details:
        print_text(sentence)
    print_text(f"Written: {readable(str(page))}")


def layer_rows(path: tuple[Step, ...]) -> list[tuple[str, ...]]:
    """The layers in their order; of many, those that change most."""
    ranked = sorted(range(len(path)), key=lambda place: -abs(path[place].gain))
    kept = sorted(ranked[:TABLE_ROWS])
    rows = [_layer_row(path[place]) for place in kept]
    if len(path) > len(kept):
        rows.append((f"({len(path) - len(kept)} smaller ones)", "", "", ""))
    return rows


def _layer_row(step: Step) -> tuple[str, ...]:
    bound = f"{step.bound:.2f}" + ("" if step.exact else "~")
    return readable(step.name), f"{step.gain:+.2f}", f"{step.level:.2f}", bound


def rung_rows(measurement: Measurement) -> list[tuple[str, ...]]:
    """The ladder of bounds: how far each is above the truth, and what it is."""
    labels = measurement.path.labels
    return [
        (name, f"{max(0.0, gap(measurement, name)):.2f}", label) for name, label in labels.items()
    ]


def key_rows(report: Report) -> list[tuple[str, ...]]:
    """Quantiles of what is measured for each sample."""
    measurement = report.measurement
    return [_key_row(name, values) for name, values in _columns(measurement).items()]


def _columns(measurement: Measurement) -> dict[str, torch.Tensor]:
    found, decision = measurement.jacobians.spectra, measurement.jacobians.margins
    columns = {
        "||J||_2": found.spectral_norm,
        "||J||_F": found.fro_norm,
        "effective rank": found.effective_rank,
    }
    if decision is None:
        return columns
    return {**columns, "margin": decision.margin, "radius (first order)": decision.radius}


def _key_row(name: str, values: torch.Tensor) -> tuple[str, ...]:
    span = spread_over_samples(values)
    return name, number(span.low), number(span.middle), number(span.high)
