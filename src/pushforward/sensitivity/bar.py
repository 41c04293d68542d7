"""A progress bar on standard error, for work that takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

WIDTH = 30
PATIENCE = 1.0  # seconds before a bar that nobody asked for appears
EVERY = 0.1  # seconds between two drawings

Advance = Callable[[int, int], None]


@contextmanager
def progress_bar(title: str, wanted: bool | None) -> Iterator[Advance]:
    """A function that takes what is done and the total.

    ``wanted`` None: a bar on a terminal alone, and only once the work turns out to be long.
    """
    if wanted is False or (wanted is None and not _is_watched(sys.stderr)):
        yield lambda done, total: None
        return
    bar = _Bar(title, sys.stderr, 0.0 if wanted else PATIENCE, time.monotonic())
    try:
        yield bar.advance
    finally:
        bar.close()


def _is_watched(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


@dataclass
class _Bar:
    """What is drawn, and when it was drawn last."""

    title: str
    stream: TextIO
    shown_from: float
    started: float
    last: float | None = None

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        drawn_lately = self.last is not None and now - self.last < EVERY
        if now - self.started < self.shown_from or (drawn_lately and done < total):
            return
        self.last = now
        self.stream.write("\r" + _line(self.title, done / max(total, 1), now - self.started))
        self.stream.flush()

    def close(self) -> None:
        if self.last is not None:
            self.stream.write("\n")
            self.stream.flush()


def _line(title: str, share: float, seconds: float) -> str:
    filled = "#" * round(WIDTH * share)
    left = f"{seconds * (1 - share) / share:.0f} s left" if share > 0 else ""
    return f"{title} [{filled:<{WIDTH}}] {100 * share:3.0f} % {left:<12}"
