"""JUnit XML, as continuous integration reads it: one test case for each limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

# What XML 1.0 cannot hold, not even escaped.
_UNSPEAKABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One limit: it holds, or ``failure`` says why not, or ``error`` why nobody knows."""

    name: str
    failure: str | None = None
    error: str | None = None
    details: str = ""


def junit(suite: str, cases: Sequence[Case], seconds: float, created: str) -> str:
    """The document; ``created`` is the time in ISO 8601."""
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.failure is not None for case in cases)),
        "errors": str(sum(case.error is not None for case in cases)),
        "time": f"{seconds:.3f}",
    }
    root = xml.Element("testsuites", {"name": "pushforward check", **counts})
    of_model = {"name": _speakable(suite), **counts, "skipped": "0", "timestamp": created}
    parent = xml.SubElement(root, "testsuite", of_model)
    for case in cases:
        _add(parent, case, suite, seconds / len(cases))
    xml.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{xml.tostring(root, encoding="unicode")}\n'


def _add(parent: xml.Element, case: Case, suite: str, seconds: float) -> None:
    attributes = {"name": case.name, "classname": suite, "time": f"{seconds:.3f}"}
    element = xml.SubElement(parent, "testcase", {k: _speakable(v) for k, v in attributes.items()})
    for tag, message in (("failure", case.failure), ("error", case.error)):
        if message is not None:
            told = {"message": _speakable(message), "type": f"pushforward.{tag}"}
            xml.SubElement(element, tag, told).text = _speakable(case.details or message)


def _speakable(text: str) -> str:
    return _UNSPEAKABLE.sub("\ufffd", text)
