"""Progress on standard error and tables on standard output; plain where nobody watches."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pushforward.report.optional import require

Advance = Callable[[float, float], None]
WIDE = 160  # columns where standard output is a file or a pipe


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A bar with the time that is left, or one line where standard error is no terminal.

    The function that it gives takes what is done and the total, in any unit.
    """
    console = require("rich.console").Console(stderr=True)
    if not console.is_terminal:
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(console: Any) -> Any:
    parts = require("rich.progress")
    return parts.Progress(
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        parts.TaskProgressColumn(),
        parts.TimeElapsedColumn(),
        parts.TextColumn("elapsed, left"),
        parts.TimeRemainingColumn(),
        console=console,
    )


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: int) -> None:
    """Print a table whose columns from ``numeric`` on are numbers; names are never markup."""
    require("rich")
    box, tables, text = require("rich.box"), require("rich.table"), require("rich.text")
    table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        justify = "right" if place >= numeric else "left"
        table.add_column(text.Text(heading), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(text.Text(cell) for cell in row))
    _print(table)


def print_text(line: str, style: str = "") -> None:
    """Print a line, wrapped at words where it is longer than the terminal."""
    _print(require("rich.text").Text(line, style=style))


def _print(renderable: Any) -> None:
    """Through a string, so that a character which the terminal lacks costs no more than itself."""
    watched = require("rich.console").Console(file=sys.stdout)
    buffer = io.StringIO()
    console = require("rich.console").Console(
        file=buffer,
        width=watched.width if watched.is_terminal else WIDE,
        force_terminal=watched.is_terminal,
        color_system=watched.color_system if watched.is_terminal else None,
        no_color=watched.no_color,
        safe_box=not _speaks_unicode(),
    )
    console.print(renderable)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    print("\n".join(lines).encode(_encoding(), "replace").decode(_encoding()))


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _speaks_unicode() -> bool:
    return _encoding().lower().replace("-", "").startswith("utf")
