"""A `PathBound` for the eye and for machines."""

from __future__ import annotations

import html
import math
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import MissingDependencyError
from pushforward.path.findings import Findings, Layer

DECADE = math.log(10)
HEADINGS = (
    "step",
    "log gain",
    "decades",
    "log ‖J_l‖_F",
    "log ‖J_l‖_2",
    "alignment",
    "rank",
    "bound so far",
    "",
)


def mean(nats: Tensor) -> float:
    """The mean over samples; -inf where one of them is."""
    return nats.mean().item()


def table(path: Findings) -> str:
    """Aligned columns, totals, and what to know about them."""
    lines = _aligned(_filled(path))
    rule = "─" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *_remarks(path)])


def _filled(path: Findings) -> list[tuple[str, ...]]:
    """Headings, rows and totals, without the columns that hold nothing."""
    rows = [HEADINGS, *(_cells(row) for row in path.layers), _total(path)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def _cells(row: Layer) -> tuple[str, ...]:
    gain = mean(row.log_gain)
    numbers = (row.log_fro, row.log_spectral, row.alignment)
    rank = "" if row.effective_rank is None else f"{mean(row.effective_rank):.1f}"
    so_far = _nats_or_nothing(row.log_bound_so_far)
    measured = (_nats_or_nothing(number) for number in numbers)
    return (row.name, _nats(gain), _decades(gain), *measured, rank, so_far, _mark(row))


def _nats_or_nothing(logs: Tensor | None) -> str:
    return "" if logs is None else _nats(mean(logs))


def _mark(row: Layer) -> str:
    """What is not exact or certified about a row."""
    marks = [] if row.exact else ["‖·‖_F estimate"]
    certain = row.spectral_label in (None, "certified")
    marks += [] if certain else [f"‖·‖_2 {row.spectral_label}"]
    return ", ".join(marks)


def _total(path: Findings) -> tuple[str, ...]:
    truth = mean(path.log_norm)
    return ("log ‖J‖_F", _nats(truth), _decades(truth), *[""] * (len(HEADINGS) - 3))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right, marks to the left again."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    left = [place == 0 or not heading for place, heading in enumerate(rows[0])]
    return [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def _nats(number: float) -> str:
    return f"{round(number, 3) + 0.0:+.3f}"


def _decades(nats: float) -> str:
    return f"{round(nats / DECADE, 2) + 0.0:+.2f}"


def _remarks(path: Findings) -> list[str]:
    samples = path.log_norm.numel()
    lines = [f"means over {samples} samples, in nats" if samples > 1 else "in nats"]
    lines += [] if path.interval is None else [_guess(path.interval)]
    lines += [_gap(path, name) for name in path.rungs]
    lines += [_loss(path)] if len(path.layers) > 1 else []
    lines += [text for text in (_joint(path), verdict(path)) if text]
    return [*lines, *path.notes]


def _guess(interval: tuple[Tensor, Tensor]) -> str:
    low, high = (mean(end) for end in interval)
    return f"gains are estimates; 95 % of the time log ‖J‖_F is in [{_nats(low)}, {_nats(high)}]"


def _gap(path: Findings, name: str) -> str:
    kind = KINDS.get(path.labels[name], f"bound that {path.labels[name]}")
    truth, bound = mean(path.log_norm), mean(path.rungs[name])
    if math.isinf(truth):
        return f"{name}: {kind}; the Jacobian is zero for at least one sample"
    below = path.labels[name] == "lower bound" or bound < truth
    side = "below" if below else "above"
    return f"{name}: {kind}, {abs(bound - truth) / DECADE:.2f} decades {side} the {_line(path)}"


def _line(path: Findings) -> str:
    """What the bounds are held against."""
    return "truth" if path.interval is None else "estimate"


KINDS = {
    "certified": "certified bound",
    "estimate": "estimate of a bound, not certified",
    "lower bound": "bound from below",
}


def _loss(path: Findings) -> str:
    """Name the step that moves the norm most: down if one does, else up."""
    gains = [mean(row.log_gain) for row in path.layers]
    place = min(range(len(gains)), key=gains.__getitem__)
    if gains[place] < 0:
        return f"{path.layers[place].name} loses most: {_decades(gains[place])} decades"
    place = max(range(len(gains)), key=gains.__getitem__)
    return f"no step loses; {path.layers[place].name} gains most: {_decades(gains[place])} decades"


def _joint(path: Findings) -> str | None:
    """Name the joint at which the product of norms loses most against the truth."""
    slacks = [mean(row.slack) for row in path.layers[:-1] if row.slack is not None]
    if not slacks or math.isinf(mean(path.log_norm)):
        return None
    place = max(range(len(slacks)), key=slacks.__getitem__)
    if not slacks[place] > 0:
        return None
    here, there = path.layers[place].name, path.layers[place + 1].name
    lost = slacks[place] / DECADE
    return f"the Frobenius bound loses most where {here} meets {there}: {lost:.2f} decades"


def verdict(path: Findings) -> str | None:
    """Say in a sentence how far the best of the certified rungs is from the truth."""
    truth = mean(path.log_norm)
    certified = [name for name, is_bound in path.certified.items() if is_bound]
    if not certified or math.isinf(truth):
        return None
    best = min(certified, key=lambda name: mean(path.rungs[name]))
    gap = (mean(path.rungs[best]) - truth) / DECADE
    size = f"‖J‖_F is 10^{truth / DECADE:.2f}"
    if path.interval is not None:
        size = f"‖J‖_F is about 10^{truth / DECADE:.2f}"
        level = f"10^{round(mean(path.rungs[best]) / DECADE, 2) + 0.0:.2f}"  # no "-0.00"
        return f"{size}, an estimate; the {best} rung proves that it is at most {level}"
    if gap < TIGHT:
        return f"{size}, and the {best} rung proves it"
    beside = f"all that the {best} rung says is at most 10^{(truth / DECADE) + gap:.2f}"
    return f"{size}; {beside}, {gap:.2f} decades more"


TIGHT = 0.005  # decades that the table shows as 0.00


def one_line(path: Findings) -> str:
    truth = mean(path.log_norm)
    parts = [f"{len(path.layers)} steps", f"log_norm={truth:.3f}"]
    for name, bound in path.rungs.items():
        label = "" if path.certified[name] else f" ({path.labels[name]})"
        parts.append(f"{name}={mean(bound):.3f}{label}")
    samples = path.log_norm.numel()
    parts += [f"means over {samples} samples"] if samples > 1 else []
    return f"PathBound({', '.join(parts)})"


def as_html(path: Findings) -> str:
    """The table in HTML, names escaped."""
    headings, *rows, total = _filled(path)
    head, foot = _row("th", headings), _row("th", total)
    body = "".join(_row("td", row) for row in rows)
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
        "labels": dict(path.labels),
        "log_spectral_norm": _numbers_or_none(path.log_spectral_norm),
        "interval": _ends(path.interval),
        "verdict": verdict(path),
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
        "alignment": row.alignment,
        "slack": row.slack,
        "effective_rank": row.effective_rank,
    }
    data: dict[str, Any] = {name: _numbers_or_none(log) for name, log in logs.items()}
    data["gain_interval"] = _ends(row.gain_interval)
    return {"name": row.name, **data, "exact": row.exact, "spectral_label": row.spectral_label}


def _numbers_or_none(logs: Tensor | None) -> dict[str, Any] | None:
    return None if logs is None else numbers(logs)


def _ends(interval: tuple[Tensor, Tensor] | None) -> dict[str, Any] | None:
    return None if interval is None else {"low": numbers(interval[0]), "high": numbers(interval[1])}


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
    panels = [_draw_gains]
    panels += [_draw_bound] if path.layers[0].log_bound_so_far is not None else []
    panels += [_draw_ladder] if path.rungs else []
    # The ladder is as tall as it has rungs.
    heights = [0.25 + 0.11 * len(path.rungs) if draw is _draw_ladder else 0.9 for draw in panels]
    width = max(6.0, min(16.0, 2 + 0.45 * rows))
    figure = Figure(figsize=(width, 4 * sum(heights)), dpi=110)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for draw, part in zip(panels, axes, strict=True):
        draw(part, path)
    names = [row.name for row in path.layers]
    for part in axes[:2]:
        _name_steps(part, names)
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
    exact = all(row.exact for row in path.layers)
    kind = "product of Frobenius norms" if exact else "product of Frobenius norms (estimate)"
    axes.plot(places, truth[::-1], color="#264653", marker="o", markersize=3, label=_line(path))
    frobenius = _sums_to_output([row.log_fro for row in path.layers])
    axes.plot(places, frobenius, color="#e07a1f", marker="s", markersize=3, label=kind)
    if exact and path.layers[0].log_spectral is not None:
        label = "all but one of them spectral"
        axes.plot(places, _mixed(path), color="#2a9d8f", marker="^", markersize=3, label=label)
    axes.set_ylabel("decades")
    axes.set_title("‖∂out/∂h‖ from the input of a step on, and products of norms", fontsize=10)
    axes.legend(fontsize=8)


def _sums_to_output(logs: list[Tensor | None]) -> list[float]:
    """Sums of decades from each step to the output."""
    level, sums = 0.0, []
    for log in reversed(logs):
        level += 0.0 if log is None else _finite(mean(log) / DECADE)
        sums.append(level)
    return sums[::-1]


def _mixed(path: Findings) -> list[float]:
    """The mixed rung of the steps from each one to the output, in decades."""
    bounds: list[Tensor] = []
    spectral = torch.zeros_like(path.log_norm)
    for row in reversed(path.layers):
        here, fro = row.log_spectral, row.log_fro
        if here is not None and fro is not None:
            choice = fro + spectral
            bounds.append(torch.minimum(choice, here + bounds[-1]) if bounds else choice)
            spectral = spectral + here
    return [_finite(mean(bound) / DECADE) for bound in bounds[::-1]]


def _draw_ladder(axes: Any, path: Findings) -> None:
    """A bar from the truth to each rung; hatched where it is no certified bound."""
    truth = _finite(mean(path.log_norm) / DECADE)
    names = list(path.rungs)
    for place, name in enumerate(names):
        length = _finite(mean(path.rungs[name]) / DECADE) - truth
        hatch = None if path.certified[name] else "///"
        colour = "#e07a1f" if length >= 0 else "#8d99ae"
        axes.barh(place, length, left=truth, color=colour, hatch=hatch, height=0.6)
        axes.annotate(
            f"{length:+.2f}",
            (truth + max(length, 0), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(truth, color="#264653", linewidth=1.2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("decades")
    title = f"The ladder: bounds on log₁₀ ‖J‖_F, and the {_line(path)} (line)"
    axes.set_title(title, fontsize=10)


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
