"""The page on one paper: one file that needs nothing else, no network and no script."""

from __future__ import annotations

import platform

import numpy as np
import torch

from pushforward import __version__
from pushforward.report.optional import require
from pushforward.report.render import style, template
from pushforward.reproduce.study import Finding, Study


def to_html(found: Study) -> str:
    """The page.

    Raises:
        MissingDependencyError: where jinja2 or matplotlib is not installed.
    """
    markup = require("markupsafe").Markup
    drawn = found.paper.figures(found.outcomes)
    return template("pushforward.reproduce", "page.html.j2").render(
        found=found,
        paper=found.paper,
        style=style(),
        headline=headline(found),
        rows=[(each, measured_text(each), parts_text(each)) for each in found.findings],
        # Matplotlib has escaped every text in its SVG.
        pictures=[(picture, markup(picture.svg)) for picture in drawn],
        facts=_facts(found),
        version=__version__,
    )


def headline(found: Study) -> str:
    """How many claims hold, and which do not; after a quick run, that it judges nothing."""
    missed = [finding.claim.text for finding in found.findings if not finding.holds]
    total = len(found.findings)
    said = (
        f"{total - len(missed)} of {total} claims hold here. Not reproduced: {'; '.join(missed)}."
        if missed
        else f"All {total} claims hold here."
    )
    quick = found.settings == found.paper.quick
    return f"A quick run, too short to judge the paper by. {said}" if quick else said


def measured_text(finding: Finding) -> str:
    """Mean and spread with the unit: ``12.3 ± 0.4 points``."""
    return f"{finding.measured} {finding.claim.unit}".strip()


def parts_text(finding: Finding) -> str:
    """The numbers that it is made of, by what tells them apart: ``none 22 ± 1, L2 2.8 ± 0.2``."""
    heads = {name.rpartition(", ")[0] for name in finding.parts}
    apart = len(heads) == 1 < len(finding.parts)
    names = [name.rpartition(", ")[2] if apart else name for name in finding.parts]
    spreads = finding.parts.values()
    return ", ".join(f"{name} {spread}" for name, spread in zip(names, spreads, strict=True))


def _facts(found: Study) -> dict[str, str]:
    images = found.images
    return {
        "data": f"{images.name}: {len(images.train_x)} images to train on, {len(images.test_x)} to "
        f"test on, of {' × '.join(map(str, images.train_x.shape[2:]))} pixels",
        "seeds": ", ".join(map(str, range(len(found.outcomes)))),
        "settings": ", ".join(f"{name} {value}" for name, value in vars(found.settings).items()),
        "seconds": f"{found.seconds:.0f}",
        "versions": f"pushforward {__version__}, torch {torch.__version__}, numpy "
        f"{np.__version__}, python {platform.python_version()}",
    }
