"""Docstrings are plain text to read in a terminal: stars and bars in them are mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

LITERAL = re.compile(r"(``.*?``|`[^`]*`)")
MARKUP = re.compile(r"(?<!\\)([*|])")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(line: str) -> str:
    """Escape stars and bars, but not inside backquotes."""
    parts = LITERAL.split(line)
    return "".join(part if i % 2 else MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def plain(lines: list[str]) -> Iterator[str]:
    """Escape what is text; leave doctests, literal blocks and formulas alone."""
    verbatim: int | None = None  # the indent of the line that opened a verbatim block
    doctest = False
    for line in lines:
        if verbatim is not None and line.strip() and indent(line) <= verbatim:
            verbatim = None
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        yield line if doctest or verbatim is not None else escaped(line)
        if verbatim is None and line.rstrip().endswith("::"):
            verbatim = indent(line)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    lines[:] = list(plain(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
