"""The content of ``report.json``; docs/reference/report-json.md says what each name means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.report.data import DataSet
from pushforward.report.measure import Layer, Measurement, Noise
from pushforward.report.models import LoadedModel
from pushforward.report.summary import alive, noise_means
from pushforward.report.verdict import Verdict, accuracy

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Everything that is written about one model on one set of data."""

    model: LoadedModel
    data: DataSet
    measurement: Measurement
    verdict: Verdict
    provenance: Mapping[str, Any]


def to_json(report: Report) -> str:
    """Strict JSON with sorted keys; numbers that are not finite are strings that float() reads."""
    return json.dumps(strict(payload(report)), allow_nan=False, sort_keys=True, indent=1) + "\n"


def payload(report: Report) -> dict[str, Any]:
    """The report as nested dicts, with tensors and floats where numbers stand."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": _model(report),
        "data": _data(report.data),
        "verdict": {"headline": report.verdict.headline, "details": report.verdict.details},
        "provenance": report.provenance,
        **_path(report.measurement),
        **_jacobians(report.measurement),
        "accuracy": accuracy(report.measurement, report.data.y),
        "noise": _noise(report.measurement),
        "unbearable": report.measurement.unbearable,
    }


def _model(report: Report) -> dict[str, Any]:
    m, n = report.measurement.shape
    return {
        "name": report.model.name,
        "source": report.model.source,
        "parameters": sum(p.numel() for p in report.model.module.parameters()),
        "outputs": m,
        "inputs": n,
    }


def _data(data: DataSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "size": data.size,
        "samples": len(data.x),
        "indices": data.indices,
        "sample_shape": tuple(data.x.shape[1:]),
        "dtype": str(data.x.dtype).removeprefix("torch."),
        "labels": data.y,
        "classes": data.classes,
        "notes": data.notes,
    }


def _path(measurement: Measurement) -> dict[str, Any]:
    path, kept = measurement.path, alive(measurement)
    gaps = {
        # Where the truth is -inf the distance is that of a finite bound from nothing.
        name: torch.where(kept, rung - path.log_norm, torch.inf)
        for name, rung in path.rungs.items()
    }
    return {
        "log_norm": _column(path.log_norm, kept),
        "rungs": {name: _column(rung, kept) for name, rung in path.rungs.items()},
        "gap": {name: _column(values, kept) for name, values in gaps.items()},
        "certified": path.certified,
        "labels": path.labels,
        "layers": [_layer(layer, kept) for layer in path.layers],
        "notes": path.notes,
        "zero_jacobians": (~kept).nonzero().flatten(),
    }


def _layer(layer: Layer, kept: Tensor) -> dict[str, Any]:
    return {
        "name": layer.name,
        "exact": layer.exact,
        "spectral_label": layer.spectral_label,
        "log_gain": _column(layer.log_gain, kept),
        "log_fro": _column(layer.log_fro, kept),
        "log_spectral": _column(layer.log_spectral, kept),
        "log_bound_so_far": _column(layer.log_bound_so_far, kept),
    }


def _jacobians(measurement: Measurement) -> dict[str, Any]:
    found, decision = measurement.jacobians.spectra, measurement.jacobians.margins
    columns = {
        "fro_norm": _column(found.fro_norm),
        "spectral_norm": _column(found.spectral_norm),
        "singular_values": _column(found.singular_values),
        "effective_rank": _column(found.effective_rank),
        "input_norm": _column(measurement.input_norm),
    }
    if decision is None:
        return {**columns, "margin": None, "radius": None, "prediction": None, "rival": None}
    return {
        **columns,
        "margin": _column(decision.margin),
        "radius": _column(decision.radius, torch.isfinite(decision.radius)),
        "prediction": decision.prediction,
        "rival": decision.rival,
    }


def _noise(measurement: Measurement) -> list[dict[str, Any]]:
    rows = zip(measurement.noise, noise_means(measurement), strict=True)
    return [_noise_row(level, mean.low, mean.high) for level, mean in rows]


def _noise_row(level: Noise, low: float, high: float) -> dict[str, Any]:
    return {
        "sigma": level.sigma,
        "ratio": _column(level.ratio),
        "linear": _column(level.linear),
        "low": {"mean": low, "per_sample": level.low},
        "high": {"mean": high, "per_sample": level.high},
    }


def _column(values: Tensor, kept: Tensor | None = None) -> dict[str, Any]:
    """Numbers per sample, (B, ...), and their mean over the samples that are ``kept``."""
    chosen = values if kept is None else values[kept]
    mean = chosen.double().mean(0) if len(chosen) else None
    return {"mean": mean, "per_sample": values}


def strict(value: Any) -> Any:
    """The same with lists and numbers alone, and strings for what is not finite."""
    if isinstance(value, Tensor):
        return strict(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
