"""The page: one file that needs nothing else, no network and no script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from pushforward.report.figures import pictures
from pushforward.report.images import heat_uri, picture_uri
from pushforward.report.optional import require
from pushforward.report.payload import Report
from pushforward.report.summary import alive, best_rung, gap, spread_over_samples, steps
from pushforward.report.verdict import accuracy
from pushforward.report.words import number, percent, readable

LARGEST_PAGE = 2_000_000  # bytes
CARDS = 8
TABLE_ROWS = 400


@dataclass(frozen=True)
class Key:
    """A number for the top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Card:
    """One of the most sensitive samples; the pictures are ``data:`` addresses, or None."""

    title: str
    facts: tuple[str, ...]
    picture: str | None
    heat: str | None
    alt: str


def to_html(report: Report) -> str:
    """The page; without pictures of samples where these would make it larger than 2 MB.

    Raises:
        MissingDependencyError: where jinja2 or matplotlib is not installed.
    """
    page = _page(report, with_images=True)
    if len(page.encode()) <= LARGEST_PAGE:
        return page
    return _page(report, with_images=False)


def _page(report: Report, with_images: bool) -> str:
    markup = require("markupsafe").Markup
    path = steps(report.measurement)
    return template("pushforward.report", "template.html.j2").render(
        report=report,
        style=style(),
        keys=keys(report),
        # Matplotlib has escaped every text in its SVG.
        pictures=[(picture, markup(picture.svg)) for picture in pictures(report.measurement)],
        cards=cards(report, with_images),
        steps=path[:TABLE_ROWS],
        left_out=len(path[TABLE_ROWS:]),
        notes=(*report.data.notes, *report.measurement.path.notes),
    )


def style() -> Any:
    """The style sheet of all pages, as markup."""
    sheet = resources.files("pushforward.report").joinpath("style.css")
    return require("markupsafe").Markup(sheet.read_text(encoding="utf-8"))


def template(package: str, name: str) -> Any:
    """A template among the files of ``package``: everything is escaped, and names must exist."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_printable
    )
    source = resources.files(package).joinpath(name)
    return environment.from_string(source.read_text(encoding="utf-8"))


def _printable(value: Any) -> Any:
    """Names from files may hold control characters, which have no place in a page."""
    return readable(value) if type(value) is str else value


# --- key numbers --------------------------------------------------------------------------------


def keys(report: Report) -> tuple[Key, ...]:
    """The numbers at the top of the page."""
    measurement = report.measurement
    found = measurement.jacobians.spectra
    candidates = (
        _over_samples("spectral norm", found.spectral_norm, "worst direction"),
        _over_samples("Frobenius norm", found.fro_norm, "all directions"),
        _rank(report),
        _radius(report),
        _gap(report),
        _accuracy(report),
    )
    return tuple(key for key in candidates if key is not None)


def _over_samples(label: str, values: torch.Tensor, note: str) -> Key:
    span = spread_over_samples(values)
    low, high = number(span.low), number(span.high)
    return Key(label, number(span.middle), note if low == high else f"{note}; mostly {low}–{high}")


def _rank(report: Report) -> Key:
    rank = spread_over_samples(report.measurement.jacobians.spectra.effective_rank).middle
    return Key("effective rank", number(rank), f"of {min(report.measurement.shape)} directions")


def _radius(report: Report) -> Key | None:
    decision = report.measurement.jacobians.margins
    if decision is None:
        return None
    return _over_samples("robustness radius", decision.radius, "to first order")


def _gap(report: Report) -> Key | None:
    """The Frobenius bound, and beside it the best of the certified ones."""
    measurement = report.measurement
    if not alive(measurement).any():
        return None
    value = number(gap(measurement), places=1)
    best = best_rung(measurement)
    if best in (None, "frobenius"):
        return Key("gap of the bound", value, "decades, Frobenius")
    beside = number(max(0.0, gap(measurement, best)), places=1)
    return Key("gap of the bounds", f"{value}–{beside}", f"decades, Frobenius to {best}")


def _accuracy(report: Report) -> Key | None:
    right = accuracy(report.measurement, report.data.y)
    return None if right is None else Key("accuracy", percent(right), "on these samples")


# --- the most sensitive samples -----------------------------------------------------------------


def cards(report: Report, with_images: bool) -> list[Card]:
    """The samples with the largest spectral norms, largest first."""
    norms = report.measurement.jacobians.spectra.spectral_norm
    order = norms.argsort(descending=True, stable=True)[:CARDS].tolist()
    return [_card(report, place, with_images) for place in order]


def _card(report: Report, place: int, with_images: bool) -> Card:
    data = report.data
    title = f"sample {data.indices[place]}"
    facts = (_norm_fact(report, place), *_decision_facts(report, place))
    heat = report.measurement.jacobians.heat
    if not with_images or heat is None or data.image_shape is None:
        return Card(title, facts, None, None, "")
    return Card(
        title,
        facts,
        picture_uri(data.x[place].reshape(data.image_shape)),
        heat_uri(heat[place]),
        f"{title}, {', '.join(facts)}",
    )


def _norm_fact(report: Report, place: int) -> str:
    return f"norm {number(report.measurement.jacobians.spectra.spectral_norm[place].item())}"


def _decision_facts(report: Report, place: int) -> tuple[str, ...]:
    decision = report.measurement.jacobians.margins
    if decision is None:
        return ()
    said = int(decision.prediction[place])
    verdict = f"read as {_class(report, said)}"
    if report.data.y is not None and int(report.data.y[place]) != said:
        verdict += f", is {_class(report, int(report.data.y[place]))}"
    radius = decision.radius[place].item()
    if not math.isfinite(radius):
        return verdict, "no other class near"
    rival = _class(report, int(decision.rival[place]))
    return verdict, f"{number(radius)} from {rival}"


def _class(report: Report, index: int) -> str:
    names = report.data.classes
    if names is None or not 0 <= index < len(names):
        return f"class {index}"
    return names[index]
