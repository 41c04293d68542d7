"""A `PathBound` for the eye and for machines."""

from __future__ import annotations

import html
import math
from typing import Any

from torch import Tensor

from pushforward.errors import MissingDependencyError
from pushforward.path.findings import Findings, Layer

DECADE = math.log(10)
HEADINGS = ("step", "log gain", "decades", "log ‖J_l‖_F", "decades", "bound so far", "")


def mean(nats: Tensor) -> float:
    """The mean over samples; -inf where one of them is."""
    return nats.mean().item()


def table(path: Findings) -> str:
    """Aligned columns, totals, and what to know about them."""
    lines = _aligned([HEADINGS, *(_cells(row) for row in path.layers), _total(path)])
    rule = "─" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *_remarks(path)])


def _cells(row: Layer) -> tuple[str, ...]:
    gain = mean(row.log_gain)
    if row.log_fro is None or row.log_bound_so_far is None:
        return (row.name, _nats(gain), _decades(gain), "", "", "", "")
    fro, so_far = mean(row.log_fro), mean(row.log_bound_so_far)
    mark = "" if row.exact else "estimate"
    return (row.name, _nats(gain), _decades(gain), _nats(fro), _decades(fro), _nats(so_far), mark)


def _total(path: Findings) -> tuple[str, ...]:
    truth = mean(path.log_norm)
    name = "log ‖J‖_F"
    if "frobenius" not in path.rungs:
        return (name, _nats(truth), _decades(truth), "", "", "", "")
    bound = mean(path.rungs["frobenius"])
    return (name, _nats(truth), _decades(truth), _nats(bound), _decades(bound), "", "")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in (0, len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _nats(number: float) -> str:
    return f"{number:+.3f}"


def _decades(nats: float) -> str:
    return f"{nats / DECADE:+.2f}"


def _remarks(path: Findings) -> list[str]:
    samples = path.log_norm.numel()
    lines = [f"means over {samples} samples, in nats" if samples > 1 else "in nats"]
    lines += [_gap(path, name) for name in path.rungs]
    lines += [_loss(path)] if len(path.layers) > 1 else []
    return [*lines, *path.notes]


def _gap(path: Findings, name: str) -> str:
    kind = "certified bound" if path.certified[name] else "estimate of a bound, not certified"
    truth, bound = mean(path.log_norm), mean(path.rungs[name])
    if math.isinf(truth):
        return f"{name}: {kind}; the Jacobian is zero for at least one sample"
    return f"{name}: {kind}, {(bound - truth) / DECADE:.2f} decades above the truth"


def _loss(path: Findings) -> str:
    """Name the step that moves the norm most: down if one does, else up."""
    gains = [mean(row.log_gain) for row in path.layers]
    place = min(range(len(gains)), key=gains.__getitem__)
    if gains[place] < 0:
        return f"{path.layers[place].name} loses most: {_decades(gains[place])} decades"
    place = max(range(len(gains)), key=gains.__getitem__)
    return f"no step loses; {path.layers[place].name} gains most: {_decades(gains[place])} decades"


def one_line(path: Findings) -> str:
    truth = mean(path.log_norm)
    parts = [f"{len(path.layers)} steps", f"log_norm={truth:.3f}"]
    for name, bound in path.rungs.items():
        label = "" if path.certified[name] else " (estimate)"
        parts.append(f"{name}={mean(bound):.3f}{label}")
    samples = path.log_norm.numel()
    parts += [f"means over {samples} samples"] if samples > 1 else []
    return f"PathBound({', '.join(parts)})"


def as_html(path: Findings) -> str:
    """The table in HTML, names escaped."""
    head = _row("th", HEADINGS)
    body = "".join(_row("td", _cells(row)) for row in path.layers)
    foot = _row("th", _total(path))
    remarks = "<br>".join(html.escape(line) for line in _remarks(path))
    return (
        f"<table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
        f"<p>{remarks}</p>"
    )


def _row(tag: str, cells: tuple[str, ...]) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def to_dict(path: Findings) -> dict[str, Any]:
    """Plain data; see `PathBound.to_dict`."""
    return {
        "log_norm": numbers(path.log_norm),
        "rungs": {name: numbers(bound) for name, bound in path.rungs.items()},
        "certified": dict(path.certified),
        "layers": [_row_data(row) for row in path.layers],
        "notes": list(path.notes),
        "passes": path.passes,
        "seed": path.seed,
    }


def _row_data(row: Layer) -> dict[str, Any]:
    logs = {
        "log_gain": row.log_gain,
        "log_fro": row.log_fro,
        "log_spectral": row.log_spectral,
        "log_bound_so_far": row.log_bound_so_far,
    }
    data = {name: None if log is None else numbers(log) for name, log in logs.items()}
    return {"name": row.name, **data, "exact": row.exact}


def numbers(nats: Tensor) -> dict[str, Any]:
    """The mean and the values themselves, as strict JSON has them."""
    return {
        "mean": _plain(mean(nats)),
        "per_sample": [_plain(value) for value in nats.reshape(-1).tolist()],
    }


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def plot(path: Findings) -> Any:
    """Two panels without pyplot, so that no window and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plot expects matplotlib, which is not installed; pip install 'pushforward[cli]'"
        ) from error
    rows = len(path.layers)
    both = "frobenius" in path.rungs
    figure = Figure(figsize=(max(6.0, min(16.0, 2 + 0.45 * rows)), 6.5 if both else 4), dpi=110)
    panels = figure.subplots(2 if both else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_gains(panels[0], path)
    if both:
        _draw_bound(panels[1], path)
    _name_steps(panels[-1], [row.name for row in path.layers])
    figure.set_layout_engine("constrained")
    return figure


def _draw_gains(axes: Any, path: Findings) -> None:
    """Each bar starts where the steps behind it, on the way to the output, have come to."""
    gains = [_finite(mean(row.log_gain) / DECADE) for row in path.layers]
    level = 0.0
    for place in reversed(range(len(gains))):
        colour = "#2a9d8f" if gains[place] >= 0 else "#d1495b"
        axes.bar(place, gains[place], bottom=level, color=colour, width=0.7)
        level += gains[place]
    axes.use_sticky_edges = False  # a bar must not end where the frame does
    axes.margins(y=0.08)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axhline(level, color="0.3", linewidth=0.8, linestyle=":")
    axes.set_ylabel("decades")
    axes.set_title(f"Gain of each step; they add up to log₁₀ ‖J‖ = {_shown(path)}", fontsize=10)


def _draw_bound(axes: Any, path: Findings) -> None:
    places = range(len(path.layers))
    truth, level = [], 0.0
    for row in reversed(path.layers):
        level += _finite(mean(row.log_gain) / DECADE)
        truth.append(level)
    bounds = [mean(row.log_bound_so_far) for row in path.layers if row.log_bound_so_far is not None]
    kind = "bound" if path.certified["frobenius"] else "bound (estimate)"
    axes.plot(places, truth[::-1], color="#264653", marker="o", markersize=3, label="truth")
    decades = [_finite(bound / DECADE) for bound in bounds]
    axes.plot(places, decades, color="#e07a1f", marker="s", markersize=3, label=kind)
    axes.set_ylabel("decades")
    axes.set_title("‖∂out/∂h‖ from the input of a step on, and the product of norms", fontsize=10)
    axes.legend(fontsize=8)


def _finite(number: float) -> float:
    """What can be drawn: a step that kills everything gets no bar."""
    return number if math.isfinite(number) else 0.0


def _shown(path: Findings) -> str:
    return f"{mean(path.log_norm) / DECADE:.2f}"


def _name_steps(axes: Any, names: list[str]) -> None:
    # A name is text: matplotlib would read dollars as formulas.
    every = max(1, len(names) // 40)
    shown = [name.replace("$", r"\$") for name in names[::every]]
    axes.set_xticks(range(0, len(names), every), shown, rotation=90, fontsize=8)
