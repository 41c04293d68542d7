"""``pushforward check``: a gate for continuous integration."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pushforward import __version__
from pushforward.cli.console import print_table, print_text, progress
from pushforward.cli.explain import example
from pushforward.cli.gate import LIMITS, Finding, Measured, judged, measured
from pushforward.cli.junit import Case, junit
from pushforward.errors import InputError
from pushforward.report.data import FORMS, DataSet, load_data
from pushforward.report.fitting import fitted
from pushforward.report.models import load_model
from pushforward.report.optional import require
from pushforward.report.payload import strict
from pushforward.report.randomness import fitting_threads
from pushforward.report.words import number, readable
from pushforward.report.writing import write_together

PASSED, FAILED = 0, 1
SCHEMA_VERSION = 1
SHOWN = 8  # layers beyond a limit that are named


def run_check(options: argparse.Namespace) -> int:
    """Measure, compare with the limits, say so; 1 where one of them does not hold."""
    require("rich")
    started, limits = time.monotonic(), limits_of(options)
    place = None if options.junit is None else _writable(options.junit)
    with _told_as_junit(options, place, limits, started):
        # What the user's code prints must not end up between the lines of our JSON.
        with contextlib.redirect_stdout(sys.stderr):
            data, found = _measured(options, limits)
        findings = judged(found, limits)
    if place is not None:
        cases = [_case(finding) for finding in findings]
        write_together({place: _junit(options.model, cases, started)})
    if options.json:
        content = strict(payload(options, data, found, findings))
        print(json.dumps(content, allow_nan=False, indent=1))
    else:
        say(findings, data, found.notes)
    return PASSED if all(finding.passed for finding in findings) else FAILED


def limits_of(options: argparse.Namespace) -> dict[str, float]:
    """The limits that were set, by name."""
    values = {each.name: getattr(options, each.name.replace("-", "_")) for each in LIMITS}
    return {name: value for name, value in values.items() if value is not None}


def complaint(options: argparse.Namespace) -> str | None:
    """What is wrong with the words of the command, None where nothing is."""
    limits = limits_of(options)
    if not limits:
        return f"a gate needs a limit: give one of --{', --'.join(each.name for each in LIMITS)}"
    if options.data is not None and options.input is not None:
        return "give --data or --input, not both"
    for quantity in ("gain", "norm"):
        low, high = limits.get(f"min-{quantity}"), limits.get(f"max-{quantity}")
        if low is not None and high is not None and low > high:
            return f"--min-{quantity} {low:g} is over --max-{quantity} {high:g}: nothing passes"
    return None


def _measured(options: argparse.Namespace, limits: Mapping[str, float]) -> tuple[DataSet, Measured]:
    model = load_model(
        options.model, weights=options.weights, trust_code=options.trust_code, seed=options.seed
    ).module
    data = fitted(model, _data(options, model))
    title = f"Measuring {len(data.x)} samples"
    with fitting_threads(model, data.x), progress(title) as advance:
        found = measured(
            model,
            data,
            frozenset(each.quantity for each in LIMITS if each.name in limits),
            layers=options.layers,
            memory=options.memory,
            progress=advance,
        )
    return data, found


# --- inputs -------------------------------------------------------------------------------------


def _data(options: argparse.Namespace, model: nn.Module) -> DataSet:
    """What ``--data`` or ``--input`` names; without both, what a first linear layer takes."""
    if options.data is not None:
        return load_data(options.data, options.samples, options.seed)
    if options.input is not None:
        return _normal(options.input, options.seed)
    width = _first_width(model)
    if width is None:
        raise InputError(
            f"the gate needs samples: add --data with {FORMS}, or --input with the shape of a "
            "batch, such as 'f32[16,3,32,32]', for normal numbers"
        )
    return _normal(f"f32[{options.samples},{width}]", options.seed)


def _first_width(model: nn.Module) -> int | None:
    """How many numbers a linear layer that comes before all others takes."""
    leaves = (module for module in model.modules() if not any(module.children()))
    width = getattr(next(leaves, None), "in_features", None)
    return width if isinstance(width, int) else None


def _normal(spec: str, seed: int) -> DataSet:
    """Standard normal numbers of a given dtype and shape, a batch."""
    x = example(spec, seed)
    if not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        raise InputError(
            "--input must be the dtype and shape of a batch of real numbers, with the samples "
            f"first, such as f32[16,3,32,32]; got {spec!r}"
        )
    indices = tuple(range(len(x)))
    return DataSet(f"standard normal numbers, {spec}", x, None, indices, len(x))


# --- what is printed ----------------------------------------------------------------------------


def say(findings: Sequence[Finding], data: DataSet, notes: Sequence[str]) -> None:
    """The verdict, a row for each limit, and the layers that are beyond it."""
    failed = sum(not finding.passed for finding in findings)
    verdict = f"failed: {failed} of {len(findings)} limits" if failed else "passed"
    print_text(verdict, style="bold red" if failed else "bold green")
    headings = ("limit", "", "worst at", "allowed", "measured", "beyond by")
    print_table(headings, [_row(finding) for finding in findings], 3)
    for finding in findings:
        if len(finding.beyond) > 1:
            print_text(_others(finding))
    print_text(f"{len(data.x)} of {data.size} samples of {readable(data.name)}")
    for note in notes:
        print_text(readable(note))


def _row(finding: Finding) -> tuple[str, ...]:
    return (
        finding.name,
        "passed" if finding.passed else "failed",
        _where(finding),
        f"{finding.limit:g}",
        number(finding.value),
        "" if finding.passed else f"{number(finding.times)}x",
    )


def _where(finding: Finding) -> str:
    layer = "" if finding.layer is None else f"layer {readable(finding.layer)}, "
    return f"{layer}sample {finding.sample}"


def _others(finding: Finding) -> str:
    """The layers beyond a limit, with their values, worst first."""
    named = [
        f"{readable(layer)} ({number(finding.layers[layer])})" for layer in finding.beyond[:SHOWN]
    ]
    more = len(finding.beyond) - len(named)
    rest = f" and {more} more" if more else ""
    return f"beyond {finding.name} {finding.limit:g}: {', '.join(named)}{rest}"


def message(finding: Finding) -> str:
    """One sentence: the worst value, where it is, and how far it is from the limit."""
    worst = f"{finding.quantity} {number(finding.value)} at {_where(finding)}"
    if finding.passed:
        return f"{worst} keeps to {finding.name} {finding.limit:g}"
    return f"{worst} is beyond {finding.name} {finding.limit:g} by {number(finding.times)}x"


# --- for machines -------------------------------------------------------------------------------


def payload(
    options: argparse.Namespace, data: DataSet, found: Measured, findings: Sequence[Finding]
) -> dict[str, Any]:
    """The outcome as nested dicts."""
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": all(finding.passed for finding in findings),
        "model": options.model,
        "data": {"name": data.name, "samples": len(data.x), "size": data.size},
        "seed": options.seed,
        "limits": [asdict(each) | {"message": message(each)} for each in findings],
        "notes": found.notes,
        "versions": {"pushforward": __version__, "torch": torch.__version__},
    }


def _case(finding: Finding) -> Case:
    name = f"{finding.name} {finding.limit:g}"
    if finding.passed:
        return Case(name)
    details = [message(finding), f"{finding.samples_beyond} samples are beyond it"]
    details += [f"layer {name}: {finding.layers[name]:.6g}" for name in finding.beyond]
    return Case(name, failure=message(finding), details="\n".join(details))


def _junit(model: str, cases: Sequence[Case], started: float) -> str:
    created = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    return junit(model, cases, time.monotonic() - started, created)


def _writable(file: str) -> Path:
    """The place for the XML, its folder made if need be, before anything is computed for it."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise InputError(f"--junit must be a file to write to, got {file}: {error}") from error
    return path


@contextlib.contextmanager
def _told_as_junit(
    options: argparse.Namespace, place: Path | None, limits: Mapping[str, float], started: float
) -> Iterator[None]:
    """Where the gate cannot be tried, say so in the XML too: it must not look like a pass."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if place is not None:
            why = str(error) or type(error).__name__
            cases = [Case(f"{name} {limit:g}", error=why) for name, limit in limits.items()]
            write_together({place: _junit(options.model, cases, started)})
        raise
