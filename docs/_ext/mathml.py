"""Formulas as MathML, made by docutils itself: the pages read without a network."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

APPLIED = re.compile(r"<mo>&ApplyFunction;</mo>(?=\s*<m(?!o\b))")  # to a name, not to a bracket
BAR = re.compile(r"<mo[^>]*>([|‖])</mo>")


def spaced(mathml: str) -> str:
    """Put a thin space after an operator's name, and none around the bars of a norm."""
    mathml = APPLIED.sub('<mspace width="0.17em"/>', mathml)
    return BAR.sub(r'<mo stretchy="false" lspace="0.05em" rspace="0.05em">\1</mo>', mathml)


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(spaced(tex2mathml(node.astext(), as_block=False)))
    raise nodes.SkipNode


def display(writer: HTML5Translator, node: nodes.math_block) -> None:
    mathml = spaced(tex2mathml(node.astext(), as_block=True))
    writer.body.append(f'<div class="formula">{mathml}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
