"""``pushforward reproduce``: papers' headline results, measured beside the published ones."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pushforward.cli.console import print_table, print_text, progress
from pushforward.cli.output import output_folder
from pushforward.report.optional import require
from pushforward.report.words import readable
from pushforward.report.writing import write_together
from pushforward.reproduce.data import Images, load_images
from pushforward.reproduce.page import headline, measured_text, parts_text, to_html
from pushforward.reproduce.paper import Paper
from pushforward.reproduce.papers import papers_named
from pushforward.reproduce.study import Study, payload, study

NEEDED = ("rich", "jinja2", "matplotlib")


def run_reproduce(options: argparse.Namespace) -> int:
    """Write one page for each paper and print tables, or all findings as one object of JSON."""
    papers = papers_named(options.papers)
    for package in NEEDED:
        require(package)
    folder = output_folder(options.out)
    images = load_all(papers, options.data)
    found = {}
    for paper in papers:
        found[paper.name] = run_paper(paper, images[paper.name], folder, options)
        if not options.json:
            summarise(found[paper.name], folder)
    if options.json:
        content = {name: payload(each) for name, each in found.items()}
        print(json.dumps(content, allow_nan=False, indent=1))
    return 0


def load_all(papers: Sequence[Paper], chosen: str | None) -> dict[str, Images]:
    """The images of each paper, before anything is trained; each set is read once."""
    specs = {paper.name: chosen or paper.data for paper in papers}
    loaded = {spec: load_images(spec) for spec in dict.fromkeys(specs.values())}
    return {name: loaded[spec] for name, spec in specs.items()}


def run_paper(paper: Paper, images: Images, folder: Path, options: argparse.Namespace) -> Study:
    """Train, measure and write the page; what papers print does not reach standard output."""
    settings = paper.quick if options.quick else paper.settings
    seeds = options.seeds or paper.seeds
    title = f"Reproducing {paper.name} on {readable(images.name)}"
    with contextlib.redirect_stdout(sys.stderr):
        with progress(title) as advance:
            found = study(paper, images, seeds, settings, advance)
        write_together({folder / f"{paper.name}.html": to_html(found)})
    return found


def summarise(found: Study, folder: Path) -> None:
    """The table of claims, what did not come out, and where the page is."""
    print_text(f"{found.paper.title} ({found.paper.source})", style="bold")
    print_table(("claim", "published", "measured", "holds where", "holds"), rows(found), 5)
    print_text(headline(found))
    print_text(f"Written: {readable(str(folder / found.paper.name))}.html")


def rows(found: Study) -> list[tuple[str, ...]]:
    """A row for each claim."""
    return [
        (
            finding.claim.text,
            finding.claim.published,
            "\n".join(filter(None, (measured_text(finding), parts_text(finding)))),
            str(finding.claim.criterion),
            "yes" if finding.holds else "no",
        )
        for finding in found.findings
    ]
